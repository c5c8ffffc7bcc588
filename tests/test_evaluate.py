# SPDX-License-Identifier: MIT
"""Test evaluate.py: its measures against plain ways, its models against weights mixed by hand, and
which images it takes for which run."""
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import cross_entropy, one_hot

import calft
import carft
import common
import evaluate
from conftest import REPO, argv, environment, run, torchrun, write_images

def score(out, *flags):
    """Run evaluate.py, and return the columns of the table that it writes, {title: column}."""
    evaluate.main(["--out", str(out), "--workers", "0", *flags])
    return common.read_json(f"{out}/results.json")

def score_one(out, *flags):
    """Run evaluate.py on one model, and return its column."""
    column, = score(out, *flags).values()
    return column

def refuses(message, out, *flags):
    """Assert that evaluate.py ends with one line that has this message, and writes no results."""
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.*\Z"):
        score(out, *flags)
    assert not os.path.exists(f"{out}/results.json")

def assert_same_scores(ours, theirs):
    """Assert that two columns have the same sets and, to rounding, the same scores."""
    assert list(ours["sets"]) == list(theirs["sets"])
    for name, expected in theirs["sets"].items():
        expected = dict(expected)
        scores = dict(ours["sets"][name])
        assert scores.pop("head") == expected.pop("head")
        scores.pop("skipped")
        expected.pop("skipped")
        assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if theirs["shift_mean"] is None:                        # there is no shift
        assert ours["shift_mean"] is None
    else:
        assert ours["shift_mean"] == pytest.approx(theirs["shift_mean"], rel=1e-4, abs=1e-6)

# ---- measures ------------------------------------------------------------------------------------
def test_fit_temperature_is_the_best_of_a_fine_grid():
    """Fit T where the NLL has a minimum, and where it has none: it stays between its bounds."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(300, 7, generator=g).double() * 9
    random_labels = torch.randint(7, (300,), generator=g)
    is_right = torch.rand(300, generator=g) < 0.7
    y = torch.where(is_right, z.argmax(1), random_labels)
    grid = np.geomspace(0.01, 100, 20001)
    for factor in (1, 0.02, 7):                             # T is above 1, below 1, far above
        best = min(grid, key=lambda T: cross_entropy(factor * z / T, y))
        assert evaluate.fit_temperature(factor * z, y) == pytest.approx(best, rel=1e-3)
        assert evaluate.fit_temperature((factor * z).float(), y) == pytest.approx(best, rel=1e-3)
    assert 0.01 <= evaluate.fit_temperature(one_hot(y, 7).float(), y) < 0.05        # all right
    assert 0.01 <= evaluate.fit_temperature(torch.zeros(300, 7), y) <= 100          # no minimum
    wrong = one_hot((y + 1) % 7, 7).float()
    assert evaluate.fit_temperature(wrong, y) == 100

def test_sigma_min_by_numpy():
    """Compare with numpy: the covariance of standardised features is their correlation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 5
    expected = np.linalg.svd(np.corrcoef(x.T), compute_uv=False)[-1]
    assert evaluate.sigma_min(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)
    x[:, 2] = 1                                             # a constant dimension
    assert evaluate.sigma_min(torch.from_numpy(x)) == 0

def test_temperature_and_predictions(tiny_root, clip, tmp_path, capsys):
    """Fit a temperature: it lowers val's NLL, scales every set and moves no prediction. The files
    of --predictions hold what the table counts."""
    flags = ["--fit-temperature", "--sigma-min", "--predictions", f"{tmp_path}/p"]
    columns = score(tmp_path / "out", "--data", tiny_root, "--model", clip(), *flags)
    title = clip().removeprefix("local-dir:")
    assert list(columns) == [title, f"{title} at T"]
    plain, scaled = columns.values()
    T = scaled["temperature"]
    assert (plain["temperature"], plain["alpha"], scaled["alpha"]) == (1, None, None)
    assert T != 1
    assert plain["sigma_min"] >= 0
    out = capsys.readouterr().out
    assert f"{T:<8.3g} T of {title}" in out
    assert f"{plain['sigma_min']:<8.3g} sigma_min of {title}" in out
    assert scaled["sets"]["val"]["nll"] < plain["sets"]["val"]["nll"]
    model, _, transform = open_clip.create_model_and_transforms(clip())
    model.eval()
    templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    names = ["ant", "bee", "cat", "dog", "sea eel"]
    W = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(clip()), names, templates)
    labels = torch.arange(5).repeat_interleave(3)
    for name in ("sketch", "val"):                          # T is val's, in every set
        files = sorted(Path(tiny_root, name).rglob("*.png"))
        x = torch.stack([transform(Image.open(file)) for file in files])
        with torch.no_grad():
            S = model.logit_scale.exp() * model.encode_image(x, normalize=True) @ W
        nll = cross_entropy(S / T, labels).item()
        assert scaled["sets"][name]["nll"] == pytest.approx(nll, rel=1e-3)
    assert T == pytest.approx(evaluate.fit_temperature(S, labels), rel=0.01)        # of val
    folder = tmp_path / "p" / evaluate.filename(title)
    for name, s in plain["sets"].items():
        file = np.load(folder / f"{name}.npz")
        hits = file["prediction"] == file["label"]
        assert len(hits) == s["n"]
        assert hits.mean() == s["top1"] == scaled["sets"][name]["top1"]
        assert scaled["sets"][name]["ece"] != s["ece"]
        assert common.ece(file["confidence"], hits) == pytest.approx(s["ece"], abs=1e-6)
        for path, label in zip(file["path"], file["label"], strict=True):
            assert os.path.isfile(path)
            assert file["classes"][label] == path.split("/")[-2]

# ---- the models ----------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [calft, carft])
def test_wise_interpolates_weights_and_head(tiny_root, clip, tmp_path, script):
    """Mix weights by hand: 0 is the zero-shot model, 1 the tuned one, a quarter nearer to the
    former. Plots show them."""
    tuned = run(script, tiny_root, clip(), tmp_path / "run")
    folder = f"{tmp_path}/run"
    flags = ["--model", folder, "--wise", "0", "0.25", "1", "--plot", f"{tmp_path}/plots"]
    columns = score(tmp_path / "wise", *flags, "--batch-size", "5")
    assert list(columns) == [f"{folder} 0", f"{folder} 0.25", f"{folder} 1"]
    assert [column["alpha"] for column in columns.values()] == [0, 0.25, 1]
    assert [column["temperature"] for column in columns.values()] == [1, 1, 1]
    zero, quarter, one = columns.values()
    assert_same_scores(zero, tuned["zero_shot"])
    assert_same_scores(one, tuned)
    base = open_clip.create_model(clip())
    mixed = open_clip.create_model(f"local-dir:{folder}/model")
    with torch.no_grad():
        for p, q in zip(mixed.parameters(), base.parameters(), strict=True):
            p.copy_(0.25 * p + 0.75 * q)
    common.export(mixed, clip(), f"{tmp_path}/mixed/model")
    if script is carft:
        templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
        names = ["ant", "bee", "cat", "dog", "sea eel"]
        tokenizer = open_clip.get_tokenizer(clip())
        W = open_clip.build_zero_shot_classifier(base, tokenizer, names, templates)
        with safe_open(f"{folder}/head.safetensors", "pt") as f:
            head = 0.25 * f.get_tensor("W_cls") + 0.75 * W.T
            about = f.metadata()
        common.write(f"{tmp_path}/mixed/head.safetensors", {"W_cls": head}, **about)
    by_hand = score_one(tmp_path / "hand", "--data", tiny_root, "--model", f"{tmp_path}/mixed")
    assert_same_scores(quarter, by_hand)
    pages = [np.asarray(Image.open(f).convert("L")) for f in (tmp_path / "plots").iterdir()]
    assert len(pages) == 2 + 1                              # reliability of the ends, the curve
    for page in pages:
        assert min(page.shape) > 300
        assert page.std() > 10                              # otherwise it is empty

def test_plots_without_weights_have_no_labels(tiny_root, clip, tmp_path, monkeypatch):
    """Plot models that are not mixtures: no weight is written beside their points. There is a
    reliability diagram of each."""
    labels = []
    monkeypatch.setattr(Axes, "annotate", lambda axis, text, *given: labels.append(text))
    flags = ["--data", tiny_root, "--plot", f"{tmp_path}/plots", "--model", clip(), clip("resnet")]
    titles = list(score(tmp_path / "out", *flags))
    assert labels == []
    files = [f"reliability_{evaluate.filename(title)}.png" for title in titles]
    assert sorted(os.listdir(tmp_path / "plots")) == sorted([*files, "val_against_shifts.png"])

def test_interpolate_keeps_the_tuned_model(clip):
    """Mix two ResNets: neither of them changes, and the counters of BatchNorm are those of the
    base."""
    base, *_ = common.load_model(clip("resnet"), "")
    tuned, *_ = common.load_model(clip("resnet", seed=1), "")
    tuned.visual.bn1.num_batches_tracked.fill_(7)
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (base, tuned)]
    mixed = evaluate.interpolate(base, tuned, 0.25)
    for model, weights in zip((base, tuned), before):
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    for k, v in mixed.state_dict().items():
        a, b = (weights[k] for weights in before)
        if v.is_floating_point():
            torch.testing.assert_close(v, 0.75 * a + 0.25 * b)
        else:
            assert torch.equal(v, a)

def test_a_teacher_has_no_head_but_its_own(tiny_root, clip, tmp_path):
    """Score the teacher of a run as OUT/teacher: by the zero-shot head of its text tower, even if a
    student's trained head lies in the same OUT. OUT/model is the run itself."""
    run(calft, tiny_root, clip(), tmp_path / "run", "--ema-every", "2")
    run(carft, tiny_root, clip(), tmp_path / "other", steps=3)
    flags = ["--model", f"local-dir:{tmp_path}/run/teacher", "--data", tiny_root]
    expected = score_one(tmp_path / "a", *flags)
    shutil.copy(tmp_path / "other" / "head.safetensors", tmp_path / "run")
    columns = score(tmp_path / "b", "--model", f"{tmp_path}/run/teacher", f"{tmp_path}/run/model")
    assert list(columns) == [f"{tmp_path}/run/teacher", f"{tmp_path}/run"]
    teacher, student = columns.values()
    assert_same_scores(teacher, expected)
    teacher_wise = score(tmp_path / "c", "--model", f"{tmp_path}/run/teacher", "--wise", "1")
    assert_same_scores(*teacher_wise.values(), expected)
    with pytest.raises(AssertionError):                     # it has the head of the other run
        assert_same_scores(student, common.read_json(tmp_path / "run" / "results.json"))

def test_a_head_of_other_classes_is_not_used(clip, tmp_path, capsys):
    """Score a run on a ROOT of other classes: by the zero-shot head of its text tower, which a line
    says."""
    write_images(tmp_path / "root" / "train", ["cat", "dog"], 8, 1)
    write_images(tmp_path / "elsewhere" / "val", ["fox", "hen"], 4, 2)
    run(carft, tmp_path / "root", clip(), tmp_path / "run", steps=2)
    data = ["--data", f"{tmp_path}/elsewhere"]
    tuned = score_one(tmp_path / "a", "--model", f"{tmp_path}/run", *data)
    assert f"{tmp_path}/run/head.safetensors has other classes; " in capsys.readouterr().out
    os.remove(tmp_path / "run" / "head.safetensors")
    assert_same_scores(tuned, score_one(tmp_path / "b", "--model", f"{tmp_path}/run", *data))

def test_the_model_that_a_run_was_tuned_from(tiny_root, clip, tmp_path, capsys):
    """Name it zero-shot: its column is the run's own first one."""
    results = run(calft, tiny_root, clip(), tmp_path / "run", steps=2)
    flags = ["--model", "zero-shot", f"{tmp_path}/run"]
    columns = score(tmp_path / "out", *flags)
    assert list(columns) == ["zero-shot", f"{tmp_path}/run"]
    assert_same_scores(columns["zero-shot"], results["zero_shot"])
    assert_same_scores(columns[f"{tmp_path}/run"], results)
    refuses("--model zero-shot needs a run", tmp_path / "none", "--data", tiny_root, "--model",
            "zero-shot")

def test_five_models_side_by_side(tiny_root, clip, tmp_path, monkeypatch, capsys):
    """Score all kinds of models: each image is decoded once for all of them, and the table has as
    many models a page as 100 columns hold."""
    read = common.read_image
    seen = []
    def spy(path):
        seen.append(path)
        return read(path)
    monkeypatch.setattr(common, "read_image", spy)
    names = []
    for i, kind in enumerate(("vit", "resnet", "timm", "attention-pool", "vit")):
        names.append(f"local-dir:{tmp_path}/a-model-with-a-long-name-{i}")
        os.symlink(clip(kind).removeprefix("local-dir:"), names[i].removeprefix("local-dir:"))
    flags = ["--data", tiny_root, "--precision", "bf16", "--model", *names]
    columns = score(tmp_path / "out", *flags)
    assert list(columns) == [name.removeprefix("local-dir:") for name in names]
    assert len(seen) == len(set(seen)) == 15 + 9 + 9 + 15
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if "reading" not in line) <= 100
    assert out.count("\nshift mean") == 2
    assert all(f" …l-with-a-long-name-{i}" in out for i in range(5))    # is cut
    in_fp32 = score_one(tmp_path / "fp32", "--data", tiny_root, "--model", names[0])
    nll = in_fp32["sets"]["val"]["nll"]
    rounded = columns[names[0].removeprefix("local-dir:")]["sets"]["val"]["nll"]
    assert rounded != nll and rounded == pytest.approx(nll, rel=0.02)

def test_two_processes_count_every_image_once(tiny_root, clip, tmp_path):
    """Score 15, 9, 9 and 15 images by two processes in batches of 4: the numbers are those of one
    process."""
    flags = ["--data", tiny_root, "--model", clip(), "--batch-size", "4"]
    command = [*torchrun(2), "evaluate.py", "--out", f"{tmp_path}/two", *flags]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two, = common.read_json(f"{tmp_path}/two/results.json").values()
    assert_same_scores(score_one(tmp_path / "one", *flags), two)

# ---- which images --------------------------------------------------------------------------------
def test_a_run_is_a_whole_command(tiny_root, clip, tmp_path, monkeypatch):
    """Name only runs: --data, --train, --val, --val-frac and --seed are those of the first one.
    Beside a val/ folder runs of several seeds are one command."""
    monkeypatch.chdir(tmp_path)
    results = {}
    for seed in ("3", "4"):
        out = f"seed-{seed}"
        results[out] = run(carft, tiny_root, clip(), tmp_path / out, "--seed", seed, steps=3)
    evaluate.main(["--workers", "0", "--model", clip(), "seed-3", "seed-4"])
    columns = common.read_json("out/evaluate/results.json")
    assert list(columns) == [clip().removeprefix("local-dir:"), "seed-3", "seed-4"]
    for out in results:
        assert_same_scores(columns[out], results[out])
    assert_same_scores(columns[clip().removeprefix("local-dir:")], results["seed-3"]["zero_shot"])

@pytest.fixture(scope="module")
def domains(tmp_path_factory, clip):
    """Write a ROOT of three domains without val/, and tune a run on two of them for each that is
    left out. Return a folder with root/ and the runs, and the names of the domains."""
    folder = tmp_path_factory.mktemp("domains")
    names = ["art", "photo", "sketch"]
    for seed, name in enumerate(names):
        write_images(folder / "root" / name, ["cat", "dog", "owl"], 10, seed)
    for name in names:
        train = [other for other in names if other != name]
        flags = ["--seed", "3", "--val-frac", "0.3", "--train", *train]
        run(calft, folder / "root", clip(), folder / name, *flags, steps=2)
    flags = ["--seed", "3", "--train", "art", "photo", "--val", "sketch"]
    run(calft, folder / "root", clip(), folder / "with-val", *flags, steps=2)
    return folder, names

def test_the_val_that_a_run_held_out(domains, tmp_path):
    """Score runs that held val out of their training images: on the same images, by their own flags
    or by the same ones given again."""
    folder, names = domains
    for name in names:
        results = common.read_json(folder / name / "results.json")
        assert list(results["sets"]) == ["val", name]
        train = [other for other in names if other != name]
        own = score_one(tmp_path / f"{name}-a", "--model", f"{folder}/{name}")
        given = ["--seed", "3", "--val-frac", "0.3", "--train", *train, "--data",
                 f"{folder}/root"]
        again = score_one(tmp_path / f"{name}-b", "--model", f"{folder}/{name}", *given)
        assert_same_scores(own, results)
        assert_same_scores(again, results)
    with_val = score_one(tmp_path / "with-val", "--model", f"{folder}/with-val", "--seed", "4")
    assert_same_scores(with_val, common.read_json(folder / "with-val" / "results.json"))

TUNED_ON = "was tuned on .*/{}, which is to be scored; see its --train"
HELD_OUT = "was tuned on images that are held out as val now; its flags had {}"

@pytest.mark.parametrize("models, flags, message", [
    ("sketch", "--seed 4", HELD_OUT.format("seed 3")),
    ("sketch", "--val-frac 0.2", HELD_OUT.format("val-frac 0.3")),
    ("sketch", "--train art photo sketch", HELD_OUT.format("train")),
    ("sketch", "--train photo", TUNED_ON.format("art")),
    ("sketch", "--val sketch --train photo", TUNED_ON.format("art")),
    ("sketch", "--val photo --train art", TUNED_ON.format("photo")),
    ("sketch", "--val photo", "--train art photo --val photo: one folder is named twice"),
    ("sketch/teacher", "--seed 4", HELD_OUT.format("seed 3")),
    ("sketch/model", "--seed 4", HELD_OUT.format("seed 3")),
    ("sketch art", "", TUNED_ON.format("sketch")),
    ("with-val sketch", "", None),
    ("sketch with-val", "", HELD_OUT.format("val sketch")),
    ("with-val", "--train photo", TUNED_ON.format("art"))])
def test_images_of_training_are_not_scored(domains, tmp_path, models, flags, message):
    """Refuse to score a set that a run was tuned on and, where val is held out, another part of its
    training images. Both would look like accuracy."""
    folder, _ = domains
    given = ["--model", *(f"{folder}/{model}" for model in models.split()), *flags.split()]
    if message is None:
        assert len(score(tmp_path / "out", *given)) == len(models.split())
    else:
        refuses(message, tmp_path / "out", *given)

def test_another_root_is_no_disagreement(domains, tmp_path):
    """Score a run on a copy of its ROOT, and on one of another layout, where a shift has the name
    of a folder that it was tuned on: nothing is known of images in --data that a run did not
    have."""
    folder, _ = domains
    shutil.copytree(folder / "root", tmp_path / "moved")
    flags = ["--model", f"{folder}/sketch", "--data", f"{tmp_path}/moved"]
    results = common.read_json(folder / "sketch" / "results.json")
    assert_same_scores(score_one(tmp_path / "a", *flags), results)
    os.rename(tmp_path / "moved" / "sketch", tmp_path / "moved" / "val")
    os.rename(tmp_path / "moved" / "art", tmp_path / "moved" / "train")
    column = score_one(tmp_path / "b", *flags, "--train", "train", "--seed", "4")
    assert list(column["sets"]) == ["val", "photo"]

def test_a_run_that_was_tuned_on_val_too(tiny_root, clip, tmp_path):
    """Score a run whose --val is test/: its row is called val, which is not the folder val/ that
    the run was tuned on."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    shutil.copytree(root / "sketch", root / "test")
    flags = ["--train", "train", "val", "--val", "test"]
    results = run(calft, root, clip(), tmp_path / "run", *flags, steps=2)
    column = score_one(tmp_path / "out", "--model", f"{tmp_path}/run")
    assert_same_scores(column, results)

def test_a_folder_with_a_slash_behind_it(tiny_root, clip, tmp_path):
    """Refuse images of training whatever way their folder was written; shells add the slash."""
    run(calft, tiny_root, clip(), tmp_path / "run", "--train", "train/", "sketch/", steps=1)
    flags = ["--model", f"{tmp_path}/run", "--train", "train"]
    refuses("was tuned on .*/sketch, ", tmp_path / "out", *flags)

def test_mean_of_runs(domains, capsys):
    """Average the sets that all runs have, which is val, and their means over shifts, whatever
    these are."""
    folder, names = domains
    evaluate.main(["--mean", *(f"{folder}/{name}" for name in names)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 runs")
    runs = [common.read_json(folder / name / "results.json") for name in names]
    shown = {"val": [r["sets"]["val"] for r in runs], "shift mean": [r["shift_mean"] for r in runs]}
    for line, (name, scores) in zip(lines[2:], shown.items(), strict=True):
        cells = []
        for key in ("top1", "ece"):
            values = [100 * s[key] for s in scores]
            cells.append(f"{np.mean(values):.2f} ±{np.std(values, ddof=1):.1f}")
        assert " ".join(line.split()) == f"{name} {cells[0]} {cells[1]}"
    with pytest.raises(SystemExit, match="^error: --mean takes the folders of two or more"):
        evaluate.main(["--mean", f"{folder}/art"])

def test_what_cannot_be_evaluated_is_refused(tiny_root, clip, tmp_path, monkeypatch):
    """Refuse a mixture with an unknown model, a run that has not finished, writing over a run's
    results, and a plot without matplotlib."""
    results = run(calft, tiny_root, clip(), tmp_path / "run", steps=1)
    data = ["--data", tiny_root]
    refuses("--wise: .* is not a run's folder", tmp_path / "out", *data, "--wise", "1", "--model",
            clip())
    with monkeypatch.context() as m, pytest.raises(AttributeError):
        m.delattr(common, "export")                         # ends while it writes model/
        calft.main(argv(tiny_root, clip(), tmp_path / "half", steps=1))
    for name in (f"{tmp_path}/half", f"local-dir:{tmp_path}/half"):
        refuses("half is a run that has not finished", tmp_path / "out", "--model", name)
        refuses("half is a run that has not finished", tmp_path / "out", "--model", name, *data)
    with pytest.raises(SystemExit, match=r"^error: --out .*run holds a run.*\Z"):
        score(tmp_path / "run", "--model", f"{tmp_path}/run")
    assert common.read_json(f"{tmp_path}/run/results.json") == results
    with pytest.raises(SystemExit, match=r"^error: .*templates.txt/x.* cannot be written.*\Z"):
        score(tmp_path / "plots", *data, "--model", clip(), "--plot",
              f"{tiny_root}/templates.txt/x")
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    refuses("pip install matplotlib", tmp_path / "out", *data, "--plot", f"{tmp_path}/plots")

def test_skip_corrupt_counts_and_lists(tiny_root, clip, tmp_path, capsys):
    """Skip an unreadable file: the scores are those without it, and it is counted and named."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    bad = root / "sketch" / "bee" / os.fsdecode(b"not utf-8 \xff.png")
    bad.write_bytes(b"broken")
    flags = ["--data", str(root), "--model", clip()]
    with_file = score_one(tmp_path / "a", *flags, "--skip-corrupt")
    assert f"skipped, not readable: {bad.parent}/not utf-8 \ufffd.png" in capsys.readouterr().out
    assert [s["skipped"] for s in with_file["sets"].values()] == [0, 0, 0, 1]
    bad.unlink()
    assert_same_scores(with_file, score_one(tmp_path / "b", *flags))
    for file in Path(root, "sketch").rglob("*.png"):
        file.write_bytes(b"broken")
    refuses("no image of sketch can be read", tmp_path / "c", *flags, "--skip-corrupt")
