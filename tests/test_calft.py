# SPDX-License-Identifier: MIT
"""Run calft.py as a user does: against a plain loop, in every kind of tower, and by itself."""
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import calft
import common
from conftest import BASE, REPO, environment, log, parse, run, weights

def test_end_to_end(tiny_root, clip, tmp_path):
    """Look for the files and fields that README promises, on which others build."""
    results = run(calft, tiny_root, clip(), tmp_path)
    files = ".lock args.json head.safetensors last.pt log.jsonl model results.json teacher".split()
    assert sorted(os.listdir(tmp_path)) == files
    fields = "n classes top1 top1_se ece mean_per_class macro_f1 ece_batch10 nll brier skipped head"
    for summary in (results, results["zero_shot"]):
        sets = summary["sets"]
        assert list(sets) == ["val", "few", "other", "sketch"]
        assert [s["head"] for s in sets.values()] == ["all", "subset", "zero-shot", "all"]
        assert [s["n"] for s in sets.values()] == [15, 9, 9, 15]
        assert all(sorted(s) == sorted(fields.split()) for s in sets.values())
        for key, mean in summary["shift_mean"].items():
            assert mean == pytest.approx((sets["few"][key] + sets["sketch"][key]) / 2)
    for step, line in zip(range(4), log(tmp_path), strict=True):
        weight_of = {"contrastive": 1, "orthogonality": 0.2, "cross_frobenius": 0.05}
        if step > 0:                                        # at step 0 the teacher is the student
            weight_of["self_distillation"] = 1.5
        assert set(line) == {"step", "loss", "lr", *weight_of}
        assert line["step"] == step
        loss = sum(weight * line[term] for term, weight in weight_of.items())
        assert line["loss"] == pytest.approx(loss, rel=1e-5)

def test_training_is_a_plain_loop(tiny_root, clip, tmp_path):
    """Take four steps of CaRot by open_clip and stock AdamW: otherwise what we train is not
    CaRot."""
    run(calft, tiny_root, clip(), tmp_path, "--ema-every", "2", "--seed", "3")
    model, _, transform = open_clip.create_model_and_transforms(clip())
    model.eval()
    teacher = copy.deepcopy(model)
    normalize = transform.transforms[-1]
    tokenizer = open_clip.get_tokenizer(clip())
    args = parse("--data", tiny_root, "--seed", "3")
    train, _ = common.read_data(args)
    crop = common.load_model(clip(), "")[1]
    batches = common.train_loader(train, crop, args, 0, 4)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    target = torch.arange(8)
    lrs = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    momenta = [0.05, 1, 0.9, 1]                             # 1: the teacher stays
    for (x, y, _, draws), lr, m in zip(batches, lrs, momenta, strict=True):
        texts = []
        for label, draw in zip(y, draws):
            texts.append(train.templates[draw % 3].replace("{}", train.classnames[label]))
        x = normalize(x / 255)
        tokens = tokenizer(texts)
        u, v, tau = model(x, tokens)
        with torch.no_grad():
            u_ema, v_ema, tau_ema = teacher(x, tokens)
        S = tau * u @ v.T
        S_ema = tau_ema * u_ema @ v_ema.T
        W_v = model.visual.proj
        W_t = model.text_projection
        loss = (cross_entropy(S, target) + cross_entropy(S.T, target)) / 2
        loss = loss + 0.2 * (W_v.T @ W_v - torch.eye(24)).pow(2).sum().sqrt()
        loss = loss + 1.5 * cross_entropy(S, S_ema.softmax(1))
        loss = loss + 1.5 * cross_entropy(S.T, S_ema.T.softmax(1))
        loss = loss + 0.05 * (W_v @ W_t.T).pow(2).sum().sqrt()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p_ema, p in zip(teacher.parameters(), model.parameters()):
            p_ema.data = m * p_ema.data + (1 - m) * p.data
    # Features, not weights: Adam blows up the attention keys' bias, whose gradient is rounding.
    for which, expected in (("model", model), ("teacher", teacher)):
        ours = open_clip.create_model(f"local-dir:{tmp_path}/{which}").eval()
        torch.testing.assert_close(ours(x, tokens), expected(x, tokens), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("kind", ["vit", "resnet", "timm", "custom_text"])
def test_towers(tiny_root, clip, tmp_path, kind):
    """Train every kind of tower: all of its parameters move, and none of BatchNorm's statistics."""
    name = clip("vit", custom_text=True) if kind == "custom_text" else clip(kind)
    run(calft, tiny_root, name, tmp_path, steps=2)
    before = load_file(f"{name.removeprefix('local-dir:')}/open_clip_model.safetensors")
    for weight, after in weights(tmp_path).items():
        is_statistic = "running_" in weight or "num_batches" in weight
        assert torch.equal(before[weight], after) == is_statistic, weight

def test_a_tower_without_projection(tiny_root, clip, tmp_path):
    """Train a tower without W_v: the run names the flags that leave it out, and trains with
    them."""
    name = clip("attention-pool")
    with pytest.raises(SystemExit, match="^error: .*--oc 0 --cross-fnorm 0"):
        run(calft, tiny_root, name, tmp_path)
    run(calft, tiny_root, name, tmp_path, "--oc=0", "--cross-fnorm=0", steps=1)

def test_val_is_scored_after_each_epoch(tiny_root, clip, tmp_path, monkeypatch):
    """Score val by the weights of that moment, which were saved before. Scoring moves none of them:
    the results at the end are the same however often val was scored."""
    evaluate = common.evaluate
    def keep(model, tokenizer, preprocess, sets, args, head=None):
        if len(sets) == 1:                                  # val, after an epoch
            checkpoint = torch.load(f"{args.out}/last.pt", weights_only=True)
            for name, weight in model.state_dict().items():
                assert torch.equal(weight, checkpoint["model"][name])
            common.export(model, clip(), f"{args.out}-after-{checkpoint['step']}")
        return evaluate(model, tokenizer, preprocess, sets, args, head)
    monkeypatch.setattr(common, "evaluate", keep)
    results = {}
    lines = {}
    for every in "012":                                     # of three epochs of five steps
        out = tmp_path / f"every-{every}"
        flags = ["--eval-every", every, "--save-every", "5"]
        results[every] = run(calft, tiny_root, clip(), out, *flags, steps=15)["sets"]
        lines[every] = log(out, epochs=True)
    assert results["0"] == results["1"] == results["2"]
    assert lines["2"] == lines["1"][1:]
    assert lines["0"] == []
    for line, step in zip(lines["1"], (5, 10), strict=True):
        name = f"local-dir:{tmp_path}/every-1-after-{step}"
        val = run(calft, tiny_root, name, tmp_path / f"of-{step}")["zero_shot"]["sets"]["val"]
        expected = {"step": step - 1, "val_top1": val["top1"], "val_ece": val["ece"]}
        assert line == pytest.approx(expected, rel=1e-6)

def test_scores_of_subsets_and_unseen_classes(tiny_root, clip, tmp_path):
    """Compute them by open_clip alone: `few` by its three classes, `other` by a zero-shot head of
    its own."""
    model, _, transform = open_clip.create_model_and_transforms(clip())
    model.eval()
    tokenizer = open_clip.get_tokenizer(clip())
    templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    results = run(calft, tiny_root, clip(), tmp_path, steps=1)["zero_shot"]["sets"]
    for folder, classes in (("few", ["bee", "dog", "sea eel"]), ("other", ["bee", "fox", "hen"])):
        W = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
        files = sorted(Path(tiny_root, folder).rglob("*.png"))
        x = torch.stack([transform(Image.open(file)) for file in files])
        with torch.no_grad():
            S = model.logit_scale.exp() * model.encode_image(x, normalize=True) @ W
        expected = float(cross_entropy(S, torch.arange(3).repeat_interleave(3)))
        assert results[folder]["nll"] == pytest.approx(expected, rel=1e-4)

def test_two_files_copied_alone_run(tiny_root, clip, tmp_path):
    """Copy calft.py and common.py: they are a whole project. Without tests/ they ask for --data."""
    for file in ("calft.py", "common.py"):
        shutil.copy(f"{REPO}/{file}", tmp_path)
    def start(*flags):
        command = [sys.executable, "calft.py", "--model", clip(), *BASE, *flags]
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with_data = start("--data", tiny_root, "--max-steps", "2")
    without_data = start()
    out, error = with_data.communicate()
    assert with_data.returncode == 0 and "fine-tuned" in out, error
    assert weights(tmp_path / "out" / "calft")
    error = without_data.communicate()[1]
    assert without_data.returncode == 1
    assert error.count("\n") == 1 and error.startswith("error: --data ROOT is needed")
