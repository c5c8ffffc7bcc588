# SPDX-License-Identifier: MIT
"""evaluate.py: its measures against plain ways, its models against weights mixed by hand."""
import os
import shutil
import subprocess

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import cross_entropy, one_hot

import calft
import carft
import common
import evaluate
from conftest import REPO, environment, run, torchrun, write_images

def call(root, out, *flags):
    """The columns of the table that evaluate.py writes."""
    evaluate.main(["--data", str(root), "--out", str(out), "--workers", "0", *flags])
    return list(common.read_json(f"{out}/results.json").values())

def assert_same_scores(ours, theirs):
    assert list(ours["sets"]) == list(theirs["sets"])
    for s, other in zip(ours["sets"].values(), theirs["sets"].values()):
        a, b = ({**scores, "head": 0, "skipped": 0} for scores in (s, other))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6) and s["head"] == other["head"]

def test_fit_temperature_is_the_best_of_a_fine_grid():
    """It minimises the NLL where it can, and does no harm where there is nothing to fit."""
    g = torch.Generator().manual_seed(1)
    z, noise = torch.randn(300, 7, generator=g).double() * 9, torch.randint(7, (300,), generator=g)
    y = torch.where(torch.rand(300, generator=g) < 0.7, z.argmax(1), noise)
    best = min(np.geomspace(0.01, 100, 2001), key=lambda T: cross_entropy(z / T, y))
    assert evaluate.fit_temperature(z, y) == pytest.approx(best, rel=0.01) and 1 < best < 50
    assert evaluate.fit_temperature(one_hot(y, 7).float(), y) < 0.05        # all are right
    assert evaluate.fit_temperature(torch.zeros(300, 7), y) > 0

def test_sigma_min_by_numpy():
    """It is of the standardised features' covariance, which is their correlation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 5
    expected = np.linalg.svd(np.corrcoef(x.T), compute_uv=False)[-1]
    assert evaluate.sigma_min(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)
    x[:, 2] = 1                                                 # a dimension that stands still
    assert evaluate.sigma_min(torch.from_numpy(x)) == 0

def test_temperature_and_predictions(tiny_root, clip, tmp_path):
    """A temperature lowers val's NLL and moves no prediction; DIR holds what the table counts."""
    flags = ["--temperature", "fit", "--sigma-min", "--predictions", f"{tmp_path}/p"]
    plain, scaled = call(tiny_root, tmp_path / "out", "--model", clip(), *flags)
    assert scaled["temperature"] != 1 and "temperature" not in plain and plain["sigma_min"] >= 0
    assert scaled["sets"]["val"]["nll"] < plain["sets"]["val"]["nll"]
    folder, = (tmp_path / "p").iterdir()
    for name, s in plain["sets"].items():
        file = np.load(folder / f"{name}.npz")
        hits = file["prediction"] == file["label"]
        assert s["top1"] == scaled["sets"][name]["top1"] == hits.mean() and len(hits) == s["n"]
        assert common.ece(file["confidence"], hits) == pytest.approx(s["ece"], abs=1e-6)
        for path, label in zip(file["path"], file["label"]):
            assert os.path.isfile(path) and file["classes"][label] == path.split("/")[-2]

@pytest.mark.parametrize("script", [calft, carft])
def test_wise_interpolates_weights_and_head(tiny_root, clip, tmp_path, script):
    """0 is the zero-shot model, 1 the tuned one, 0.5 the weights mixed by hand; plots show them."""
    tuned, folder = run(script, tiny_root, clip(), tmp_path / "run"), f"{tmp_path}/run"
    flags = ["--model", folder, "--wise", "0", "0.5", "1", "--plot", f"{tmp_path}/plots"]
    zero, half, one = call(tiny_root, tmp_path / "wise", *flags, "--batch-size", "5")
    assert_same_scores(zero, tuned["zero_shot"])
    assert_same_scores(one, tuned)
    base, mixed = (open_clip.create_model(name) for name in (clip(), f"local-dir:{folder}/model"))
    with torch.no_grad():
        for p, q in zip(mixed.parameters(), base.parameters()):
            p.copy_((p + q) / 2)
    common.export(mixed, clip(), f"{tmp_path}/mixed/model")
    if script is carft:
        templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
        names, tokenizer = ["ant", "bee", "cat", "dog", "sea eel"], open_clip.get_tokenizer(clip())
        W = open_clip.build_zero_shot_classifier(base, tokenizer, names, templates)
        with safe_open(f"{folder}/head.safetensors", "pt") as f:
            head, about = (W.T + f.get_tensor("W_cls")) / 2, f.metadata()
        common.write(f"{tmp_path}/mixed/head.safetensors", {"W_cls": head}, **about)
    by_hand, = call(tiny_root, tmp_path / "hand", "--model", f"{tmp_path}/mixed")
    assert_same_scores(half, by_hand)
    pages = [np.asarray(Image.open(f).convert("L")) for f in (tmp_path / "plots").iterdir()]
    assert len(pages) == 2 + 1                                  # reliability of the ends, the curve
    assert all(min(page.shape) > 300 and page.std() > 10 for page in pages)         # none is empty

def test_what_cannot_be_evaluated_is_refused(tiny_root, clip, tmp_path, monkeypatch):
    """A missing library, mixing with an unknown model, and writing over a run's results."""
    results = run(calft, tiny_root, clip(), tmp_path / "run", steps=1)
    for flags, message in ((["--wise", "1", "--model", clip()], "--wise: .* is no run's folder"),
                           (["--out", f"{tmp_path}/run"], "--out .*run holds a run"),
                           (["--plot", f"{tiny_root}/templates.txt/x", "--model", clip()],
                            ".* cannot be written")):
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            call(tiny_root, tmp_path / "out", *flags)
    assert common.read_json(f"{tmp_path}/run/results.json") == results
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^error: .*pip install matplotlib"):
        call(tiny_root, tmp_path / "out", "--plot", f"{tmp_path}/plots")

def test_runs_that_left_a_domain_out(clip, tmp_path, capsys):
    """--mean is of val and of the means over shifts, whatever these are. The val that a run held
    out is found by its flags and refused by others, which would score training images."""
    root, runs, domains = tmp_path / "root", [], ["art", "photo", "sketch"]
    for seed, domain in enumerate(domains):
        write_images(root / domain, ["cat", "dog", "owl"], 10, seed)
    for left_out in domains:
        flags = ["--seed", "3", "--train", *(d for d in domains if d != left_out)]
        runs.append(run(calft, root, clip(), tmp_path / left_out, *flags, steps=2))
    model = ["--model", f"{tmp_path}/sketch"]
    assert_same_scores(*call(root, tmp_path / "again", *model, *flags), runs[-1])
    run(calft, root, clip(), tmp_path / "dev", *flags[:-1], "--val", "sketch", steps=2)
    few, seed = flags[:-1], ["--seed", "4", *flags[2:]]
    for name, other in (("sketch", seed), ("sketch", few), ("dev", few),
                        *(("sketch", [*few, "--val", d]) for d in ("sketch", "photo"))):
        with pytest.raises(SystemExit, match=f"^error: .*{name} was tuned on images to be scored"):
            call(root, tmp_path / "again", "--model", f"{tmp_path}/{name}", *other)
    capsys.readouterr()
    evaluate.main(["--mean", *(f"{tmp_path}/{d}" for d in domains)])
    lines = capsys.readouterr().out.splitlines()[2:]
    shown = {"val": [r["sets"]["val"] for r in runs], "shift mean": [r["shift_mean"] for r in runs]}
    for line, (name, scores) in zip(lines, shown.items(), strict=True):
        x, y = ([100 * s[key] for s in scores] for key in ("top1", "ece"))
        cells = [f"{np.mean(v):.2f} ±{np.std(v, ddof=1):.1f}" for v in (x, y)]
        assert " ".join(line.split()) == f"{name} {cells[0]} {cells[1]}"

def test_five_models_side_by_side(tiny_root, clip, tmp_path, monkeypatch, capsys):
    """Each image is decoded once for all kinds of models; what exceeds 100 columns stands below."""
    read, seen, models = common.read_image, [], []
    monkeypatch.setattr(common, "read_image", lambda path: seen.append(path) or read(path))
    for i, kind in enumerate(("vit", "resnet", "timm", "attention-pool", "vit")):
        models.append(f"{tmp_path}/a-model-with-a-long-name-{i}")
        os.symlink(clip(kind).removeprefix("local-dir:"), models[i])
    call(tiny_root, tmp_path / "out", "--precision", "bf16", "--model",
         *(f"local-dir:{model}" for model in models))
    assert len(seen) == len(set(seen)) == 15 + 9 + 9 + 15
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and out.count("\nshift mean") == 2
    assert all(f" …l-with-a-long-name-{i}" in out for i in range(5))                # is cut

def test_skip_corrupt_counts_and_lists(tiny_root, clip, tmp_path, capsys):
    """The scores are those without the file, which is counted and named."""
    shutil.copytree(tiny_root, tmp_path / "root")
    bad = tmp_path / "root" / "sketch" / "bee" / os.fsdecode(b"not utf-8 \xff.png")
    bad.write_bytes(b"broken")
    got, = call(tmp_path / "root", tmp_path / "a", "--model", clip(), "--skip-corrupt")
    assert f"skipped, not readable: {bad.parent}/not utf-8 \ufffd.png" in capsys.readouterr().out
    bad.unlink()
    without, = call(tmp_path / "root", tmp_path / "b", "--model", clip())
    assert [s["skipped"] for s in got["sets"].values()] == [0, 0, 0, 1]
    assert_same_scores(got, without)

def test_two_processes_count_every_image_once(tiny_root, clip, tmp_path):
    """15, 9, 9 and 15 images over two processes and batches of 4: the numbers of one process."""
    flags = ["--model", clip(), "--batch-size", "4"]
    command = [*torchrun(2), "evaluate.py", "--data", tiny_root, "--out", f"{tmp_path}/two", *flags]
    done = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two, = common.read_json(f"{tmp_path}/two/results.json").values()
    assert_same_scores(*call(tiny_root, tmp_path / "one", *flags), two)
