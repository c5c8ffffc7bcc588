# SPDX-License-Identifier: MIT
"""calft.py as a user runs it, against a plain loop, an uninterrupted run and a single process."""
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
from conftest import BASE, REPO, environment, log, run, weights

def test_end_to_end(tiny_root, clip, tmp_path):
    """A run leaves the files and fields that README promises, or what is built on them breaks."""
    results = run(calft, tiny_root, clip(), tmp_path)
    files = "args.json last.pt log.jsonl model results.json teacher".split()
    assert sorted(os.listdir(tmp_path)) == files
    fields = "n classes top1 top1_se ece ece_batch10 nll brier skipped head".split()
    for summary in (results, results["zero_shot"]):
        sets = summary["sets"]
        assert list(sets) == ["val", "few", "other", "sketch"]
        assert [s["head"] for s in sets.values()] == ["all", "subset", "zero-shot", "all"]
        assert [s["n"] for s in sets.values()] == [15, 9, 9, 15]
        assert all(sorted(s) == sorted(fields) for s in sets.values())
        for key, mean in summary["shift_mean"].items():
            assert mean == pytest.approx((sets["few"][key] + sets["sketch"][key]) / 2)
    for step, line in zip(range(4), log(tmp_path), strict=True):
        terms = {"contrastive": 1, "orthogonality": 0.2, "cross_frobenius": 0.05}
        if step > 0:                                            # before, the teacher is the student
            terms["self_distillation"] = 1.5
        assert set(line) == {"step", "loss", "lr", *terms} and line["step"] == step
        assert line["loss"] == pytest.approx(sum(w * line[t] for t, w in terms.items()), rel=1e-5)

def test_training_is_a_plain_loop(tiny_root, clip, tmp_path):
    """Four steps of CaRot by open_clip and stock AdamW are ours, or what we train is not CaRot."""
    run(calft, tiny_root, clip(), tmp_path, "--ema-every", "2", "--seed", "3")
    model, _, transform = open_clip.create_model_and_transforms(clip())
    teacher, tokenizer = copy.deepcopy(model.eval()), open_clip.get_tokenizer(clip())
    flags = ["--data", tiny_root, "--batch-size", "8", "--workers", "0", "--seed", "3"]
    args = common.flags("test:", "out").parse_args(flags)
    train, _ = common.read_data(args)
    batches = common.train_loader(train, common.load_model(clip(), "")[1], args, 0, 4)
    optimizer, target = torch.optim.AdamW(model.parameters(), weight_decay=0.1), torch.arange(8)
    lrs, momenta = [0.5e-3, 1e-3, 1e-3, 0.5e-3], [0.05, 1, 0.9, 1]          # 1: the teacher stays
    for (x, y, _, draws), lr, m in zip(batches, lrs, momenta, strict=True):
        x, tokens = transform.transforms[-1](x / 255), tokenizer([
            train.templates[d % 3].replace("{}", train.classnames[k]) for k, d in zip(y, draws)])
        u, v, tau = model(x, tokens)
        u_ema, v_ema, tau_ema = teacher(x, tokens)
        S, S_ema = tau * u @ v.T, (tau_ema * u_ema @ v_ema.T).detach()
        W_v, W_t = model.visual.proj, model.text_projection
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
    """In every kind of tower all parameters train, and none of BatchNorm's statistics moves."""
    model = clip("vit", custom_text=True) if kind == "custom_text" else clip(kind)
    run(calft, tiny_root, model, tmp_path, steps=2)
    before = load_file(f"{model.removeprefix('local-dir:')}/open_clip_model.safetensors")
    for name, after in weights(tmp_path).items():
        statistics = "running_" in name or "num_batches" in name
        assert torch.equal(before[name], after) == statistics, name

def test_a_tower_without_projection(tiny_root, clip, tmp_path):
    """Without a W_v the run names the flags that leave it out, and trains with them."""
    with pytest.raises(SystemExit, match="error: .*--oc 0 --cross-fnorm 0"):
        run(calft, tiny_root, clip("attention-pool"), tmp_path)
    run(calft, tiny_root, clip("attention-pool"), tmp_path, "--oc=0", "--cross-fnorm=0", steps=1)

def test_val_is_scored_after_each_epoch(tiny_root, clip, tmp_path, monkeypatch):
    """By the weights of that moment, which scoring does not move; the last are in results.json."""
    save, sets, lines = common.Run.save, {}, {}
    def keep(self, step, parts):
        common.export(parts["model"], clip(), tmp_path / str(step))
        save(self, step, parts)
    monkeypatch.setattr(common.Run, "save", keep)
    for every in "012":                                         # of three epochs of five steps
        out = tmp_path / f"every-{every}"
        sets[every] = run(calft, tiny_root, clip(), out, "--eval-every", every, steps=15)["sets"]
        lines[every] = log(out, epochs=True)
    assert sets["0"] == sets["1"] == sets["2"]
    assert lines["2"] == lines["1"][1:] and lines["0"] == []
    for line, step in zip(lines["1"], (5, 10), strict=True):
        model = f"local-dir:{tmp_path}/{step}"
        val = run(calft, tiny_root, model, tmp_path / f"of-{step}")["zero_shot"]["sets"]["val"]
        expected = {"step": step - 1, "val_top1": val["top1"], "val_ece": val["ece"]}
        assert line == pytest.approx(expected, rel=1e-6)

def test_scores_of_subsets_and_unseen_classes(tiny_root, clip, tmp_path):
    """By open_clip alone: `few` by its three classes, `other` by a zero-shot head of its own."""
    model, _, transform = open_clip.create_model_and_transforms(clip())
    tokenizer = open_clip.get_tokenizer(clip())
    templates = ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    results = run(calft, tiny_root, clip(), tmp_path, steps=1)["zero_shot"]["sets"]
    for folder, classes in (("few", ["bee", "dog", "sea eel"]), ("other", ["bee", "fox", "hen"])):
        W = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, classes, templates)
        files = sorted(Path(tiny_root, folder).rglob("*.png"))
        x = torch.stack([transform(Image.open(file)) for file in files])
        S = (model.logit_scale.exp() * model.encode_image(x, normalize=True) @ W).detach()
        expected = float(cross_entropy(S, torch.arange(3).repeat_interleave(3)))
        assert results[folder]["nll"] == pytest.approx(expected, rel=1e-4)

def test_two_files_copied_alone_run(tiny_root, clip, tmp_path):
    """calft.py and common.py are a whole project; without tests/ they ask for --data."""
    for file in ("calft.py", "common.py"):
        shutil.copy(f"{REPO}/{file}", tmp_path)
    command, pipe = [sys.executable, "calft.py", "--model", clip(), *BASE], subprocess.PIPE
    whole, without = (
        subprocess.Popen([*command, *flags], cwd=tmp_path, env=environment(), stdout=pipe,
                         stderr=pipe, text=True)
        for flags in (["--data", tiny_root, "--max-steps", "2"], []))
    out, error = whole.communicate()
    assert whole.returncode == 0 and "fine-tuned" in out, error
    assert weights(tmp_path / "out" / "calft")
    error = without.communicate()[1]
    assert without.returncode == 1 and error.count("\n") == 1 and "--data" in error
