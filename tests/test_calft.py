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
from torch.optim.optimizer import register_optimizer_step_post_hook

import calft
import common
from conftest import (BASE, REPO, argv, assert_processes_are_one, assert_same_run, environment, log,
                      parse, run, weights)

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

# ---- the teacher that is a mean over the run -----------------------------------------------------
def beta_mean(untuned, kept, beta):
    """Return {name: weight} of the mean of the untuned weights and of those after each update, in
    float64: the definition, without any momentum."""
    ts = [(k + 0.5) / (len(kept) + 1) for k in range(len(kept) + 1)]
    w = torch.tensor([(t * (1 - t)) ** (beta - 1) for t in ts], dtype=torch.float64)
    means = {}
    for name in kept[0]:
        stack = torch.stack([of_update[name].double() for of_update in (untuned, *kept)])
        means[name] = torch.tensordot(w / w.sum(), stack, 1)
    return means

@pytest.mark.parametrize("beta", [0.5, 1])
@pytest.mark.parametrize("every, updated", [(3, [0, 3, 6, 9]), (1, range(12)), (5, [0, 5, 10])])
def test_a_teacher_is_the_mean_of_a_run(tiny_root, clip, tmp_path, every, updated, beta):
    """Keep the weights after each of 12 steps, and average them by definition: otherwise
    --teacher-beta trains by another teacher than TRACER's."""
    after = []
    model = []
    load_model = common.load_model
    def keep(optimizer, *_):
        names = [name for name, _ in model[0].named_parameters()]
        weights = optimizer.param_groups[0]["params"]
        after.append({name: w.detach().clone() for name, w in zip(names, weights, strict=True)})

    def look(*args):
        loaded = load_model(*args)
        model.append(loaded[0])
        return loaded
    flags = ["--ema-every", str(every), "--teacher-beta", str(beta), "--eval-every", "0"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(common, "load_model", look)
        hook = register_optimizer_step_post_hook(keep)
        run(calft, tiny_root, clip(), tmp_path, *flags, steps=12)
        hook.remove()
    assert len(after) == 12
    kept = [after[step] for step in updated]
    untuned = load_file(f"{clip().removeprefix('local-dir:')}/open_clip_model.safetensors")
    teacher = weights(tmp_path, "teacher")
    means = beta_mean(untuned, kept, beta)
    assert means.keys() == teacher.keys()                   # a ViT has no statistics
    for name, mean in means.items():
        torch.testing.assert_close(teacher[name].double(), mean, rtol=1e-6, atol=2e-7)
    for steps, b in ((kept[:-1], beta), (kept, beta + 0.25)):           # of other teachers
        mean = beta_mean(untuned, steps, b)["visual.proj"]
        assert (teacher["visual.proj"] - mean).abs().max() > 1e-5

def test_a_beta_of_one_is_a_plain_mean():
    """Keep k of k + 1 parts at update k. For any beta each of the first weights counts as often in
    the end as the definition says, and the density is the same from both ends."""
    for K in (1, 2, 9, 250):
        for k in range(1, K + 1):
            assert calft.beta_momentum(k, K, 1.0) == pytest.approx(k / (k + 1), rel=1e-12)
        for beta in (0.3, 0.5, 2.0):
            shares = [1.0]
            for k in range(1, K + 1):
                m = calft.beta_momentum(k, K, beta)
                assert 0 < m < 1
                shares = [m * share for share in shares] + [1 - m]
            assert shares == pytest.approx(shares[::-1], rel=1e-9)
            if K == 9:                                      # the middle against an end
                middle, end = 0.45 * 0.55, 0.05 * 0.95      # t (1 - t) of k = 4 and k = 0
                assert shares[4] / shares[0] == pytest.approx((middle / end) ** (beta - 1))

def test_a_beta_teacher_survives_a_kill(tiny_root, clip, tmp_path, monkeypatch):
    """End a run right after a save between two updates, and start it again: its teacher has the
    bits of a run that was left alone."""
    flags = ["--ema-every", "3", "--teacher-beta", "0.5", "--eval-every", "0"]
    whole = tmp_path / "whole"
    run(calft, tiny_root, clip(), whole, *flags, steps=12)
    arguments = argv(tiny_root, clip(), tmp_path / "killed", *flags, "--save-every=8", steps=12)
    save = common.Run.save
    def end(self, step, saved):
        save(self, step, saved)
        raise InterruptedError(step)
    with monkeypatch.context() as m, pytest.raises(InterruptedError, match="^8$"):
        m.setattr(common.Run, "save", end)
        calft.main(arguments)
    assert not (tmp_path / "killed" / "teacher").exists()
    calft.main(arguments)
    assert_same_run(whole, tmp_path / "killed", "teacher")
    plain = tmp_path / "plain"
    run(calft, tiny_root, clip(), plain, *flags[:2], "--eval-every", "0", steps=12)
    with pytest.raises(AssertionError):                     # CaRot's teacher is another
        assert_same_run(whole, plain, "teacher")

def test_two_processes_have_one_beta_teacher(tiny_root, clip, tmp_path):
    """Compare the teacher of two processes with that of one. The biases of attention's keys are
    left out: their gradient is rounding, which AdamW blows up."""
    flags = ["--ema-every", "2", "--teacher-beta", "0.5"]
    assert_processes_are_one(calft, tiny_root, clip(), tmp_path, *flags)
    one, two = (weights(tmp_path / name, "teacher") for name in ("one", "two"))
    student = weights(tmp_path / "one")
    for name in one:
        parts = [w.view(3, -1)[::2] if "in_proj_bias" in name else w
                 for w in (one[name], two[name], student[name])]
        torch.testing.assert_close(parts[0], parts[1], rtol=1e-4, atol=2e-6)
        assert (parts[0] - parts[2]).abs().max() > 1e-4     # by far more than the two differ

# ---- towers and scores ---------------------------------------------------------------------------
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
