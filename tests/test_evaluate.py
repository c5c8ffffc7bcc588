# SPDX-License-Identifier: MIT
"""evaluate.py's measures against plain ways, its models against weights mixed by hand, its sets counted exactly once."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch

import calft
import carft
import common
import evaluate
from conftest import REPO, environment, run


def results(out):
    return json.load(open(f"{out}/results.json"))


def call(root, out, *flags):
    evaluate.main(["--data", str(root), "--out", str(out), "--workers", "0", *flags])
    return results(out)


# ---- measures

@pytest.mark.parametrize("scale, expected", [(1.0, 1.0), (4.0, 4.0), (0.2, 0.2)])
def test_fit_temperature_recovers_the_true_one(scale, expected):
    """Labels drawn from the softmax of z; the logits are scale * z."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(40000, 5, generator=g) * 2
    labels = torch.multinomial(z.softmax(1), 1, generator=g).squeeze(1)
    assert evaluate.fit_temperature(scale * z, labels) == pytest.approx(expected, rel=0.03)


def test_fit_temperature_is_the_best_of_a_fine_grid():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 7, generator=g) * 9
    labels = torch.where(torch.rand(300, generator=g) < 0.7, logits.argmax(1), torch.randint(7, (300,), generator=g))
    T = evaluate.fit_temperature(logits, labels)
    nll = {t: float(torch.nn.functional.cross_entropy(logits.double() / t, labels)) for t in np.geomspace(0.01, 100, 2001)}
    best = min(nll, key=nll.get)
    assert T == pytest.approx(best, rel=0.01) and 1 < T < 50
    perfect = torch.nn.functional.one_hot(labels, 7).float()
    assert evaluate.fit_temperature(perfect, labels) < 0.05                                 # the sharper the better
    assert evaluate.fit_temperature(torch.zeros(300, 7), labels) > 0                        # nothing to fit: no harm


def test_sigma_min_of_a_dimension_that_stands_still():
    assert evaluate.sigma_min(torch.cat([torch.randn(50, 3), torch.ones(50, 1)], 1)) == 0


def test_sigma_min_by_numpy():
    x = np.random.default_rng(0).normal(size=(200, 6)) @ np.random.default_rng(1).normal(size=(6, 6)) + 5
    expected = np.linalg.svd(np.corrcoef(x.T), compute_uv=False)[-1]
    assert evaluate.sigma_min(torch.from_numpy(x)) == pytest.approx(expected, rel=1e-9)


def test_temperature_is_fitted_on_val_and_shown_beside(tiny_root, clip, tmp_path):
    got = call(tiny_root, tmp_path, "--model", clip(), "--temperature", "fit", "--sigma-min")
    (plain, scaled), T = got.values(), list(got.values())[1]["temperature"]
    assert T != 1 and plain["sigma_min"] >= 0
    for name, s in plain["sets"].items():
        assert s["top1"] == scaled["sets"][name]["top1"]                # it moves no prediction
    assert scaled["sets"]["val"]["nll"] <= plain["sets"]["val"]["nll"]


def test_predictions_hold_what_the_table_counts(tiny_root, clip, tmp_path):
    got = call(tiny_root, tmp_path / "out", "--model", clip(), "--predictions", str(tmp_path / "p"))
    folder, = (tmp_path / "p").iterdir()
    for name, s in next(iter(got.values()))["sets"].items():
        stored = np.load(folder / f"{name}.npz")                        # no pickle in it
        assert len(stored["path"]) == s["n"] and all(map(os.path.isfile, stored["path"]))
        correct = stored["prediction"] == stored["label"]
        assert correct.mean() == pytest.approx(s["top1"])
        assert common.ece(stored["confidence"], correct) == pytest.approx(s["ece"], abs=1e-6)
        for path, label in zip(stored["path"], stored["label"]):
            assert stored["classes"][label] == path.split("/")[-2]


def test_plots_are_written_and_matplotlib_is_asked_for(tiny_root, clip, tmp_path, monkeypatch, capsys):
    run(calft, tiny_root, clip(), tmp_path / "run", steps=1)
    call(tiny_root, tmp_path / "out", "--model", str(tmp_path / "run"), "--wise", "0", "1", "--plot", str(tmp_path / "plots"))
    from PIL import Image
    assert len(os.listdir(tmp_path / "plots")) == 3             # a reliability diagram for each alpha, and the curve
    for file in (tmp_path / "plots").iterdir():
        image = np.asarray(Image.open(file).convert("L"))
        assert min(image.shape) > 300 and image.std() > 10      # not an empty page
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as e:
        call(tiny_root, tmp_path / "none", "--model", clip(), "--plot", str(tmp_path / "none"))
    assert e.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err


# ---- models

@pytest.mark.parametrize("script", [calft, carft])
def test_wise_interpolates_weights_and_head(tiny_root, clip, tmp_path, script):
    """0 is the zero-shot model, 1 the tuned one, 0.5 the weights mixed by hand."""
    tuned = run(script, tiny_root, clip(), tmp_path / "run", steps=4)
    got = list(call(tiny_root, tmp_path / "wise", "--model", str(tmp_path / "run"), "--wise", "0", "0.5", "1").values())
    for name in ("val", "few", "other"):
        assert got[0]["sets"][name]["nll"] == pytest.approx(tuned["zero_shot"]["sets"][name]["nll"], rel=1e-4)
        assert got[2]["sets"][name]["nll"] == pytest.approx(tuned["sets"][name]["nll"], rel=1e-4)
    a, b = open_clip.create_model(clip()), open_clip.create_model(f"local-dir:{tmp_path}/run/model")
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()):
            p.copy_((p + q) / 2)
    common.export(a, clip(), str(tmp_path / "mixed" / "model"))
    if script is carft:
        import safetensors
        with safetensors.safe_open(tmp_path / "run" / "head.safetensors", "pt") as f:
            tokenizer, base = open_clip.get_tokenizer(clip()), open_clip.create_model(clip())
            templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
            zero_shot = open_clip.build_zero_shot_classifier(base, tokenizer, ["ant", "bee", "cat", "dog", "sea eel"], templates)
            common.write_tensors(str(tmp_path / "mixed" / "head.safetensors"), {"W_cls": (zero_shot.T + f.get_tensor("W_cls")) / 2},
                                 **f.metadata())
    by_hand, = call(tiny_root, tmp_path / "hand", "--model", str(tmp_path / "mixed")).values()
    for name in ("val", "few", "other"):
        assert got[1]["sets"][name]["nll"] == pytest.approx(by_hand["sets"][name]["nll"], rel=1e-4)


def test_wise_without_a_run_says_so(tiny_root, clip, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        call(tiny_root, tmp_path, "--model", clip(), "--wise", "0", "1")
    assert e.value.code == 2 and "--wise" in capsys.readouterr().err


def test_each_image_is_decoded_once_for_all_models(tiny_root, clip, tmp_path, monkeypatch):
    """... and models of different kinds and sizes stand side by side."""
    read, seen = common.read_image, []
    monkeypatch.setattr(common, "read_image", lambda path: seen.append(path) or read(path))
    got = call(tiny_root, tmp_path, "--model", clip(), clip("resnet"), clip("attention-pool"))
    assert len(got) == 3 and len(seen) == len(set(seen)) == 15 + 9 + 9 + 15


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """DomainBed's layout: three domains of three classes, no val."""
    from conftest import write_images
    root = tmp_path_factory.mktemp("domains")
    for seed, domain in enumerate(("art", "photo", "sketch")):
        write_images(str(root / domain), ["cat", "dog", "owl"], 10, seed)
    return root


def test_runs_that_left_a_domain_out(domains, clip, tmp_path, capsys):
    """Each run is scored on its own val and its own left-out domain, and their mean is printed."""
    own = {}
    for left_out, *rest in (("art", "photo", "sketch"), ("photo", "art", "sketch"), ("sketch", "art", "photo")):
        own[left_out] = run(calft, domains, clip(), tmp_path / left_out, "--train", *rest, "--seed", "3", steps=2)
    capsys.readouterr()
    got = call(domains, tmp_path / "out", "--model", *(str(tmp_path / d) for d in own))
    for d in own:
        mine = got[str(tmp_path / d)]
        assert list(mine["sets"]) == ["val", d] and mine["sets"]["val"]["n"] == 12
        for s in mine["sets"]:
            assert mine["sets"][s]["nll"] == pytest.approx(own[d]["sets"][s]["nll"], rel=1e-4)
    mean = got["mean of 3 runs"]
    for k in ("top1", "ece"):
        for what, values in (("shift", [own[d]["shift_mean"][k] for d in own]), ("val", [own[d]["sets"]["val"][k] for d in own])):
            entry = mean["shift_mean"] if what == "shift" else mean["sets"]["val"]
            assert entry[k] == pytest.approx(np.mean(values), abs=1e-6)
            assert entry[k + "_sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    out = capsys.readouterr().out
    assert out.count("shift mean") == 4 and f"{100 * mean['shift_mean']['top1']:.2f}" in out.split("mean of 3 runs")[1]


def test_mean_over_seeds_with_wise_and_temperature(tiny_root, clip, tmp_path):
    for seed in "01":
        run(calft, tiny_root, clip(), tmp_path / seed, "--seed", seed, steps=2)
    got = call(tiny_root, tmp_path / "out", "--model", str(tmp_path / "0"), str(tmp_path / "1"), "--wise", "0", "1",
               "--temperature", "fit", "--plot", str(tmp_path / "plots"))
    means = [name for name in got if name.startswith("mean of 2 runs")]
    assert means == ["mean of 2 runs 0", "mean of 2 runs 0, temperature fitted", "mean of 2 runs 1",
                     "mean of 2 runs 1, temperature fitted"]
    run(calft, tiny_root, clip(), tmp_path / "other", "--oc", "0", steps=2)      # not a seed of these, nor is the teacher
    unlike = call(tiny_root, tmp_path / "out", "--model", str(tmp_path / "0"), str(tmp_path / "other"),
                  f"local-dir:{tmp_path}/0/teacher")
    assert len(unlike) == 3 and not any(name.startswith("mean") for name in unlike)
    assert got[means[0]]["sets"]["sketch"]["top1_sd"] == 0 and set(got[means[0]]["sets"]) == {"val", "few", "sketch", "other"}


def test_the_head_is_kept_by_its_content(tiny_root, clip, tmp_path, monkeypatch):
    """A second evaluation encodes no text; other prompts, weights or a broken file do."""
    encode, count = common.text_embeddings, []
    monkeypatch.setattr(common, "text_embeddings", lambda *a: count.append(1) or encode(*a))
    shutil.copytree(tiny_root, tmp_path / "root")

    def encoded(*flags):
        count.clear()
        got = call(tmp_path / "root", tmp_path / "out", *flags)
        return len(count), got
    n, first = encoded("--model", clip())
    assert n == 2 and len(os.listdir(tmp_path / "out" / "heads")) == 2          # training classes, and `other`
    assert encoded("--model", clip()) == (0, first)
    assert encoded("--model", clip("resnet"))[0] == 2
    (tmp_path / "root" / "templates.txt").write_text("a photo of a {}.\n")
    assert encoded("--model", clip())[0] == 2
    for file in (tmp_path / "out" / "heads").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    shutil.copy(f"{tiny_root}/templates.txt", tmp_path / "root")
    assert encoded("--model", clip()) == (2, first)


def test_bf16_is_near_fp32_on_the_toy(tmp_path):
    """bf16 moves single images between near ties, so the scores of a set by one image in 540 and more."""
    import toy
    toy.build()
    both = []
    for precision in ("fp32", "bf16"):
        evaluate.main(["--out", str(tmp_path / precision), "--precision", precision, "--workers", "2"])
        both.append(next(iter(results(tmp_path / precision).values()))["sets"])
    n = sum(s["n"] for s in both[0].values())
    top1 = [sum(s["top1"] * s["n"] for s in sets.values()) / n for sets in both]
    assert abs(top1[0] - top1[1]) < 0.003 and all(abs(both[0][s]["nll"] - both[1][s]["nll"]) < 0.01 for s in both[0])


def test_the_table_is_read_on_100_columns(tiny_root, clip, tmp_path, capsys):
    """Long names are cut, and models that do not fit beside stand below."""
    name = "imagenetv2-matched-frequency-format-val-once-more"
    os.makedirs(tmp_path / "elsewhere")
    os.symlink(f"{tiny_root}/sketch", tmp_path / "elsewhere" / name)
    models = [f"local-dir:{shutil.copytree(clip().split(':')[1], tmp_path / f'a-model-with-a-long-name-{i}')}" for i in range(5)]
    got = call(tiny_root, tmp_path / "out", "--eval", str(tmp_path / "elsewhere" / name), "--model", *models)
    out = capsys.readouterr().out
    assert len(got) == 5 and name in next(iter(got.values()))["sets"]
    assert max(map(len, out.splitlines())) <= 100 and out.count("\nshift mean") == out.count("top-1  ± se") > 1
    assert all(f"long-name-{i}" in out for i in range(5)) and out.count("format-val-once-more") == out.count("\nshift mean")


# ---- images counted

def test_skip_corrupt_counts_and_lists(tiny_root, clip, tmp_path, capsys):
    shutil.copytree(tiny_root, tmp_path / "root")
    bad = tmp_path / "root" / "sketch" / "bee" / "1.png"
    bad.write_bytes(b"broken")
    got, = call(tmp_path / "root", tmp_path / "skip", "--model", clip(), "--skip-corrupt").values()
    sketch = got["sets"]["sketch"]
    assert (sketch["n"], sketch["skipped"], sketch["skipped_files"]) == (14, 1, [str(bad)])
    assert got["sets"]["val"]["skipped"] == 0 and str(bad) in capsys.readouterr().out
    bad.unlink()                                                        # the same scores as without the file
    without, = call(tmp_path / "root", tmp_path / "without", "--model", clip()).values()
    assert without["sets"]["sketch"]["nll"] == pytest.approx(sketch["nll"], rel=1e-5)


def test_a_corrupt_image_in_a_worker_is_one_line(tiny_root, clip, tmp_path, capsys):
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "sketch" / "bee" / "1.png").write_bytes(b"broken")
    with pytest.raises(SystemExit) as e:
        evaluate.main(["--data", str(tmp_path / "root"), "--out", str(tmp_path / "o"), "--model", clip(), "--workers", "1"])
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 1 and "error: " in err and "sketch/bee/1.png: not readable" in err


def test_two_processes_count_every_image_once(tiny_root, clip, tmp_path):
    """15, 9, 9 and 15 images over two processes and batches of 4: the numbers of one process."""
    one, = call(tiny_root, tmp_path / "one", "--model", clip(), "--batch-size", "4").values()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                           str(20000 + os.getpid() % 20000), "evaluate.py", "--data", tiny_root, "--model", clip(),
                           "--batch-size", "4", "--out", str(tmp_path / "two")], cwd=REPO, env=environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    two, = results(tmp_path / "two").values()
    for name, s in one["sets"].items():
        for key, value in s.items():
            assert two["sets"][name][key] == (value if key == "head" else pytest.approx(value, rel=1e-4, abs=1e-6))
