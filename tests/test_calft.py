# SPDX-License-Identifier: MIT
"""calft.py and evaluate.py as a user runs them, against a plain loop, an uninterrupted run, and one process."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import calft
import common
import evaluate
from conftest import (BASE, REPO, SHARED, assert_continues_to_the_same_bytes, assert_processes_are_one, environment, log,
                      run, weights)

CPU = torch.device("cpu")
def test_end_to_end(tiny_root, clip, tmp_path, capsys):
    results = run(calft, tiny_root, clip(), tmp_path / "out", "--precision", "fp32")
    assert set(os.listdir(tmp_path / "out")) - {".lock"} == {"args.json", "log.jsonl", "last.pt", "model", "teacher", "results.json"}
    for scores in (results, results["zero_shot"]):
        assert list(scores["sets"]) == ["val", "few", "other", "sketch"]
        assert [s["head"] for s in scores["sets"].values()] == ["all", "subset", "zero-shot", "all"]
        assert [s["n"] for s in scores["sets"].values()] == [15, 9, 9, 15]
        for s in scores["sets"].values():
            assert set(s) == {"n", "classes", "top1", "top1_se", "ece", "ece_batch10", "nll", "brier", "skipped", "head"}
            assert 0 <= s["top1"] <= 1 and 0 <= s["ece"] <= 1
        mean = np.mean([scores["sets"][name]["top1"] for name in ("few", "sketch")])
        assert scores["shift_mean"]["top1"] == pytest.approx(mean)
    lines = log(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        total = line["contrastive"] + 0.2 * line["orthogonality"] + 0.05 * line["cross_frobenius"] \
            + 1.5 * line.get("self_distillation", 0)
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert ["self_distillation" in line for line in lines] == [False, True, True, True]
    table = capsys.readouterr().out
    assert "zero-shot" in table and "fine-tuned" in table and "other *" in table and "shift mean" in table
    assert max(map(len, table.splitlines())) <= 100


def test_training_is_a_plain_loop(tiny_root, clip, tmp_path):
    """Four steps of CaRot written out with open_clip, stock AdamW and no helper of ours but the batches."""
    run(calft, tiny_root, clip(), tmp_path / "out", "--ema-every", "2")
    model = open_clip.create_model(clip()).eval()
    teacher = copy.deepcopy(model)
    tokenizer = open_clip.get_tokenizer(clip())
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0, batch_size=8,
                                 workers=0)
    root = common.read_root(args)
    preprocess = common.load_model(clip(), "", CPU)[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    lrs = [0.5e-3, 1e-3, 1e-3, 0.5e-3]                          # two steps of warm-up, then a cosine of two steps
    for step, (x, y, _, draw) in enumerate(common.train_loader(root.train, preprocess, args, 4, CPU)):
        texts = [root.templates[d % 3].replace("{}", root.classnames[k]) for k, d in zip(y.tolist(), draw.tolist())]
        x, tokens = (x / 255 - mean) / std, tokenizer(texts)

        def logits(m):
            return m.logit_scale.exp() * m.encode_image(x, normalize=True) @ m.encode_text(tokens, normalize=True).T
        S, target = logits(model), torch.arange(8)
        W_v, W_t = model.visual.proj, model.text_projection
        loss = (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2
        loss = loss + 0.2 * (W_v.T @ W_v - torch.eye(24)).pow(2).sum().sqrt() + 0.05 * (W_v @ W_t.T).pow(2).sum().sqrt()
        if step > 0:
            S_t = logits(teacher).detach()
            loss = loss + 1.5 * (F.cross_entropy(S, S_t.softmax(1)) + F.cross_entropy(S.T, S_t.T.softmax(1)))
        optimizer.param_groups[0]["lr"] = lrs[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            m = {0: 0.05, 2: 0.9}[step]
            for p_t, p in zip(teacher.parameters(), model.parameters()):
                p_t.data = m * p_t.data + (1 - m) * p.data
    # features and not weights: the attention keys' bias has no gradient but rounding, which Adam blows up
    for which, reference in (("model", model), ("teacher", teacher)):
        ours = open_clip.create_model(f"local-dir:{tmp_path}/out/{which}").eval()
        torch.testing.assert_close(ours.encode_image(x), reference.encode_image(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.encode_text(tokens), reference.encode_text(tokens), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.logit_scale, reference.logit_scale, rtol=1e-6, atol=0)


def test_flyp_is_the_contrastive_loss_alone(tiny_root, clip, tmp_path):
    run(calft, tiny_root, clip(), tmp_path / "out", "--oc", "0", "--sd", "0", "--cross-fnorm", "0")
    assert not os.path.exists(tmp_path / "out" / "teacher")
    assert all(line["loss"] == line["contrastive"] for line in log(tmp_path / "out"))


@pytest.mark.parametrize("kind, extra", [("vit", {}), ("vit", {"custom_text": True}), ("resnet", {}), ("timm", {})])
def test_towers(tiny_root, clip, tmp_path, kind, extra):
    """Every kind of tower trains, all its parameters move but none of BatchNorm's statistics does."""
    run(calft, tiny_root, clip(kind, **extra), tmp_path / "out", steps=2)
    before, after = load_file(clip(kind, **extra)[10:] + "/open_clip_model.safetensors"), weights(tmp_path / "out")
    for name in before:
        statistics = "running_" in name or "num_batches" in name
        assert torch.equal(before[name], after[name]) == statistics, name


def test_a_tower_without_projection_says_so(tiny_root, clip, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(calft, tiny_root, clip("attention-pool"), tmp_path / "out")
    assert e.value.code == 2 and "--oc 0" in capsys.readouterr().err
    run(calft, tiny_root, clip("attention-pool"), tmp_path / "out", "--oc", "0", "--cross-fnorm", "0", steps=1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(tiny_root, clip, tmp_path, precision):
    """Towers in low precision, losses and weights in float32: near the fp32 run."""
    run(calft, tiny_root, clip(), tmp_path / "fp32")
    run(calft, tiny_root, clip(), tmp_path / "low", "--precision", precision)
    for a, b in zip(log(tmp_path / "fp32"), log(tmp_path / "low")):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05) and a["loss"] != b["loss"]
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "low").values())


def test_an_interrupted_run_continues_to_the_same_bytes(tiny_root, clip, tmp_path, monkeypatch):
    assert_continues_to_the_same_bytes(calft, tiny_root, clip(), tmp_path, monkeypatch, "--ema-every", "2",
                                       exports=("model", "teacher"))


def test_a_folder_that_holds_a_run(tiny_root, clip, tmp_path, capsys):
    """Finished: its table, nothing written. Other flags: refused by name. --overwrite: anew."""
    out = tmp_path / "out"
    run(calft, tiny_root, clip(), out)
    stamp, table = os.stat(out / "last.pt").st_mtime_ns, capsys.readouterr().out
    run(calft, tiny_root, clip(), out, "--workers", "1")
    again = capsys.readouterr().out
    assert os.stat(out / "last.pt").st_mtime_ns == stamp and "holds this run: finished" in again
    assert again.splitlines()[-8:] == table.splitlines()[-8:] and "fine-tuned" in again
    with pytest.raises(SystemExit) as e:
        run(calft, tiny_root, clip(), out, "--oc", "0.3")
    assert e.value.code == 2 and "--oc 0.2" in capsys.readouterr().err
    assert os.stat(out / "last.pt").st_mtime_ns == stamp
    run(calft, tiny_root, clip(), out, "--oc", "0.3", "--overwrite", steps=2)
    assert len(log(out)) == 2


def test_a_folder_on_other_images_is_refused(tiny_root, clip, tmp_path, capsys):
    """A resume on other files would draw other batches, and a finished table would speak of sets that are gone."""
    shutil.copytree(tiny_root, tmp_path / "root")
    run(calft, tmp_path / "root", clip(), tmp_path / "out", steps=1)
    os.remove(tmp_path / "root" / "sketch" / "bee" / "1.png")
    with pytest.raises(SystemExit) as e:
        run(calft, tmp_path / "root", clip(), tmp_path / "out", steps=1)
    assert e.value.code == 2 and "other images" in capsys.readouterr().err


@pytest.mark.parametrize("file, text, code", [("last.pt", "not a checkpoint", 2), ("args.json", "{", 2)])
def test_a_broken_folder_is_refused_by_name(tiny_root, clip, tmp_path, capsys, file, text, code):
    run(calft, tiny_root, clip(), tmp_path / "out", steps=1)
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(SystemExit) as e:
        run(calft, tiny_root, clip(), tmp_path / "out", steps=1)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == code and file in err and "Traceback" not in err


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(tiny_root, clip, tmp_path):
    shutil.copytree(tiny_root, tmp_path / "root")
    image = tmp_path / "root" / "sketch" / "bee" / "1.png"
    image.write_bytes(b"")
    with pytest.raises(SystemExit):
        run(calft, tmp_path / "root", clip(), tmp_path / "out", steps=1)
    shutil.copy(f"{tiny_root}/sketch/bee/1.png", image)
    run(calft, tmp_path / "root", clip(), tmp_path / "out", "--batch-size", "4", steps=1)


def test_a_schedule_that_cannot_work_is_said(tiny_root, clip, tmp_path, capsys):
    run(calft, tiny_root, clip(), tmp_path / "out", "--warmup", "500", "--ema-every", "500", steps=1)
    out = capsys.readouterr().out
    assert "warning: --warmup 500 in a run of 1 steps" in out and "warning: --ema-every 500" in out
    run(calft, tiny_root, clip(), tmp_path / "flyp", "--ema-every", "500", "--sd", "0", steps=3)
    assert "warning" not in capsys.readouterr().out             # there is no teacher


def test_the_seed_is_the_run(tiny_root, clip, tmp_path):
    """Same seed, same bytes, whatever the workers; another seed, another run."""
    for out, flags in (("a", []), ("b", ["--workers", "2"]), ("c", ["--seed", "1"])):
        run(calft, tiny_root, clip(), tmp_path / out, *flags)
    a, b, c = (weights(tmp_path / out)["visual.proj"] for out in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---- evaluation

def test_evaluate_gives_the_same_table(tiny_root, clip, tmp_path, capsys):
    results = run(calft, tiny_root, clip(), tmp_path / "out")
    capsys.readouterr()
    model = f"local-dir:{tmp_path}/out/model"
    for batch in ("3", "64"):                                   # ... whatever the batch
        evaluate.main(["--data", tiny_root, "--model", clip(), model, "--out", str(tmp_path / "eval"), "--workers", "0",
                       "--batch-size", batch])
        columns = list(json.load(open(tmp_path / "eval" / "results.json")).values())
        for ours, theirs in zip(columns, (results["zero_shot"], results)):
            for name, s in ours["sets"].items():
                for key, value in s.items():
                    expected = theirs["sets"][name][key]
                    assert value == (expected if key == "head" else pytest.approx(expected, rel=1e-4, abs=1e-6)), (name, key)
    assert "shift mean" in capsys.readouterr().out


def test_scores_of_subsets_and_unseen_classes_by_hand(tiny_root, clip, tmp_path):
    """`few` on the logits of its three classes, `other` with a zero-shot head of its own, by open_clip alone."""
    name = clip()
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer, templates = open_clip.get_tokenizer(name), ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    results = run(calft, tiny_root, name, tmp_path / "out", steps=1)["zero_shot"]["sets"]
    for folder, classes in (("few", ["bee", "dog", "sea eel"]), ("other", ["bee", "fox", "hen"])):
        W = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
        loss = []
        for k, c in enumerate(classes):
            for i in range(3):
                x = transform(Image.open(f"{tiny_root}/{folder}/{c.replace(' ', '_')}/{i}.png"))[None]
                S = model.logit_scale.exp() * model.encode_image(x, normalize=True) @ W
                loss.append(float(F.cross_entropy(S, torch.tensor([k])).detach()))
        assert results[folder]["nll"] == pytest.approx(np.mean(loss), rel=0.01)


def test_evaluation_keeps_to_the_val_held_out_in_training(tiny_root, clip, tmp_path, capsys):
    """Without val/ the split is the seed's: with another seed most of "val" would be training images."""
    os.makedirs(tmp_path / "root")
    os.symlink(f"{tiny_root}/train", tmp_path / "root" / "train")
    results = run(calft, tmp_path / "root", clip(), tmp_path / "out", "--seed", "3", steps=1)
    evaluation = ["--data", str(tmp_path / "root"), "--model", str(tmp_path / "out"), "--out", str(tmp_path / "eval")]
    evaluate.main(evaluation)
    again, = json.load(open(tmp_path / "eval" / "results.json")).values()
    assert again["sets"]["val"]["nll"] == pytest.approx(results["sets"]["val"]["nll"], rel=1e-4)
    with pytest.raises(SystemExit) as e:                        # the results of a run are not written over
        evaluate.main([*evaluation, "--out", str(tmp_path / "out")])
    assert e.value.code == 2 and json.load(open(tmp_path / "out" / "results.json")) == results


def test_a_corrupt_image_stops_evaluation_by_name(tiny_root, clip, tmp_path, capsys):
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "sketch" / "bee" / "1.png").write_bytes(b"")
    with pytest.raises(SystemExit) as e:
        evaluate.main(["--data", str(tmp_path / "root"), "--model", clip(), "--out", str(tmp_path / "o"), "--workers", "0"])
    assert e.value.code == 1 and "sketch/bee/1.png" in capsys.readouterr().err


# ---- bad input: one line, exit code 2, nothing written

BAD = {
    "no such root": (["--data", "/no/such/root"], "/no/such/root"),
    "no train": (["--train", "training"], "no folder training"),
    "unknown model": (["--model", "ViT-B/16"], "ViT-B-16"),
    "unknown tag": (["--model", "ViT-B-32", "--pretrained", "nope"], "tag"),
    "wrong activation": (["--model", "ViT-B-32", "--pretrained", "openai"], "ViT-B-32-quickgelu"),
    "batch larger than the data": (["--batch-size", "41"], "40 training images"),
    "no batch": (["--batch-size", "0"], "--batch-size"),
    "no steps": (["--max-steps", "0"], "--max-steps"),
    "no such eval folder": (["--eval", "/no/such/eval"], "/no/such/eval"),
    "not a number": (["--lr", "fast"], "--lr"),
    "a negative rate": (["--lr", "-1"], "--lr"),
    "no number for a rate": (["--lr", "nan"], "--lr"),
    "a folder for a model": (["--model", REPO], "local-dir:"),
    "a seed below zero": (["--seed", "-1"], "--seed"),
    "workers below zero": (["--workers", "-1"], "--workers"),
    "a fraction above one": (["--val-frac", "2"], "--val-frac"),
    "broken model folder": (["--model", "local-dir:BROKEN"], "could not be loaded"),
    "unknown flag": (["--accum-please", "2"], "--accum-please"),
}


@pytest.mark.parametrize("flags, culprit", BAD.values(), ids=BAD)
def test_bad_input(tiny_root, clip, tmp_path, capsys, flags, culprit):
    os.makedirs(tmp_path / "broken")
    for file in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / "broken" / file).write_text("{")
    flags = [f.replace("BROKEN", str(tmp_path / "broken")) for f in flags]
    with pytest.raises(SystemExit) as e:
        run(calft, tiny_root, clip(), tmp_path / "out", *flags)
    err = capsys.readouterr().err.strip()
    assert e.value.code == (1 if "broken" in str(flags) else 2) and culprit in err.splitlines()[-1] and "Traceback" not in err
    assert not os.path.exists(tmp_path / "out")


# ---- processes

def test_two_files_copied_alone_run(tiny_root, clip, tmp_path):
    """Copying calft.py and common.py into a new project is all it takes; without tests/ it asks for --data."""
    for file in ("calft.py", "common.py"):
        shutil.copy(os.path.join(REPO, file), tmp_path)
    command = [sys.executable, "calft.py", "--model", clip(), "--max-steps", "2", *BASE]
    done = subprocess.run([*command, "--data", tiny_root], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "fine-tuned" in done.stdout, done.stderr
    assert os.path.isfile(tmp_path / "out" / "calft" / "model" / "open_clip_model.safetensors")
    done = subprocess.run([*command, "--out", "other"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--data" in done.stderr


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_two_processes_are_one(tiny_root, clip, tmp_path, kind):
    assert_processes_are_one("calft", tiny_root, clip(kind), tmp_path, "--ema-every", "2", most=3 if kind == "vit" else 2)


# ---- ImageNet's layout

@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/imagenet-sample"), reason="no ../shared/data here")
def test_imagenet_layout_with_real_photographs(tmp_path):
    """1000 wnid folders and their names, digit-named V2, the projections and head of ViT-B-32."""
    os.makedirs(tmp_path / "imagenet")
    wnids = sorted(os.listdir(f"{SHARED}/imagenet-sample"))
    for folder in ("train", "val"):
        os.symlink(f"{SHARED}/imagenet-sample", tmp_path / "imagenet" / folder)
    for k in range(0, 1000):
        os.makedirs(tmp_path / "imagenet" / "v2" / str(k))
    for k, wnid in enumerate(wnids):
        source = sorted(os.listdir(f"{SHARED}/imagenet-sample/{wnid}"))[0]
        os.symlink(f"{SHARED}/imagenet-sample/{wnid}/{source}", tmp_path / "imagenet" / "v2" / str(k) / source)
    (tmp_path / "imagenet" / "templates.txt").write_text("a photo of a {}.\n")           # 80 take minutes on a CPU
    root = common.read_root(types.SimpleNamespace(data=str(tmp_path / "imagenet"), train=["train"], val=None, eval=[],
                                                  val_frac=0.2, seed=0))
    assert len(root.classes) == 1000 and root.classnames == list(open_clip.IMAGENET_CLASSNAMES)
    model, *_, tokenizer = common.load_model("ViT-B-32", "", CPU)
    assert calft.projections(model)[0].shape == (768, 512)
    v2 = root.shifts[0]
    columns = [v2.columns[k] for k in v2.labels]
    assert all(wnids[c] == os.path.realpath(v2.path(i)).split("/")[-2] for i, (c,) in enumerate(columns))
    head = common.class_head(common.text_embeddings(model, tokenizer, root.classnames[:50], root.templates))
    assert head.shape == (50, 512) and math.isclose(float(head[0].norm()), 1, rel_tol=1e-5)
