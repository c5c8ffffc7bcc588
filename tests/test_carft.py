# SPDX-License-Identifier: MIT
"""carft.py: its two heads and its divergence by naive loops, its run against a plain loop."""
import json
import math
import os
import types

import open_clip
import pytest
import safetensors
import torch
import torch.nn.functional as F

import carft
import common
import evaluate
from conftest import assert_continues_to_the_same_bytes, assert_processes_are_one, log, run, weights

CPU = torch.device("cpu")


def test_heads_by_loops():
    """W_cls averages over templates, W_ctx over classes, each then normalised."""
    E = F.normalize(torch.randn(4, 3, 5, dtype=torch.float64), dim=-1)
    for k in range(4):
        mean = sum(E[k, m] for m in range(3)) / 3
        torch.testing.assert_close(common.class_head(E)[k], mean / mean.norm())
    for m in range(3):
        mean = sum(E[k, m] for k in range(4)) / 4
        torch.testing.assert_close(carft.context_head(E)[m], mean / mean.norm())


def test_context_kl_by_loops():
    """KL(p0 || p), p0 from the first argument; not symmetric, and 0 for the same logits."""
    z0, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    total = 0.0
    for a, b in zip(z0.tolist(), z.tolist()):
        p0 = [math.exp(x) / sum(map(math.exp, a)) for x in a]
        p = [math.exp(x) / sum(map(math.exp, b)) for x in b]
        total += sum(x * math.log(x / y) for x, y in zip(p0, p))
    assert float(carft.context_kl(z0, z)) == pytest.approx(total / 3, rel=1e-12)
    assert float(carft.context_kl(z, z0)) != pytest.approx(total / 3, rel=1e-3)
    assert float(carft.context_kl(z, z)) == pytest.approx(0, abs=1e-12)


def test_context_kl_gradient_by_finite_differences():
    z0, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: carft.context_kl(z0, z), z)
    assert torch.autograd.gradcheck(lambda z: carft.context_kl(z, z0), z)      # --reverse-kl
    assert torch.isfinite(carft.context_kl(100 * z0, -100 * z0))


@pytest.mark.parametrize("reverse", [False, True])
def test_training_is_a_plain_loop(tiny_root, clip, tmp_path, reverse):
    """Four steps of CAR-FT written out with open_clip, stock AdamW and no helper of ours but the batches."""
    run(carft, tiny_root, clip(), tmp_path / "out", "--lam", "2", *["--reverse-kl"] * reverse)
    model, frozen = open_clip.create_model(clip()).eval(), open_clip.create_model(clip()).eval()
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0, batch_size=8,
                                 workers=0)
    root = common.read_root(args)
    texts = [[t.replace("{}", c) for t in root.templates] for c in root.classnames]
    with torch.no_grad():
        tokenizer = open_clip.get_tokenizer(clip())
        E = torch.stack([model.encode_text(tokenizer(row), normalize=True) for row in texts])
        tau = model.logit_scale.exp()
    W_cls = torch.nn.Parameter(F.normalize(E.mean(1), dim=-1))
    W_ctx = F.normalize(E.mean(0), dim=-1)
    optimizer = torch.optim.AdamW([*model.visual.parameters(), W_cls], lr=1e-3, weight_decay=0.1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    preprocess, lrs = common.load_model(clip(), "", CPU)[1], [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    for step, (x, y, _, _) in enumerate(common.train_loader(root.train, preprocess, args, 4, CPU)):
        x = (x / 255 - mean) / std
        u, u0 = model.encode_image(x, normalize=True), frozen.encode_image(x, normalize=True).detach()
        p, p0 = (tau * u @ W_ctx.T).softmax(1), (tau * u0 @ W_ctx.T).softmax(1)
        if reverse:
            p, p0 = p0, p
        loss = F.cross_entropy(tau * u @ W_cls.T, y) + 2 * (p0 * (p0 / p).log()).sum(1).mean()
        assert log(tmp_path / "out")[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = lrs[step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = open_clip.create_model(f"local-dir:{tmp_path}/out/model").eval()
    torch.testing.assert_close(ours.encode_image(x), model.encode_image(x), rtol=1e-4, atol=1e-4)
    with safetensors.safe_open(tmp_path / "out" / "head.safetensors", "pt") as f:
        torch.testing.assert_close(f.get_tensor("W_cls"), W_cls.data, rtol=1e-4, atol=1e-4)
        assert json.loads(f.metadata()["classes"]) == root.classes


def test_the_text_tower_is_not_carried(tiny_root, clip, tmp_path):
    """Not in the optimiser, not in the checkpoint, and exported as it was."""
    run(carft, tiny_root, clip(), tmp_path / "out")
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    model = open_clip.create_model(clip())
    assert len(state["optimizer"]["param_groups"][0]["params"]) == len(list(model.visual.parameters())) + 1
    assert set(state["visual"]) == set(model.visual.state_dict())
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(value, model.state_dict()[name]) == (not name.startswith("visual.")), name


def test_lam_0_is_plain_fine_tuning_and_skips_the_frozen_tower(tiny_root, clip, tmp_path, monkeypatch):
    seen, encode_image = [], common.encode_image
    monkeypatch.setattr(common, "encode_image", lambda m, x, *a: seen.append(m) or encode_image(m, x, *a))
    run(carft, tiny_root, clip(), tmp_path / "out", "--lam", "0")
    assert all(m is seen[0] for m in seen)
    assert all(line["loss"] == line["cross_entropy"] and "context_kl" not in line for line in log(tmp_path / "out"))


def test_one_image_forward_and_one_frozen(tiny_root, clip, tmp_path, monkeypatch):
    """The floor of a step: five steps more cost five forwards with gradient, five without, and no text."""
    texts, images, encode_text, encode_image = [], [], common.encode_text, common.encode_image
    monkeypatch.setattr(common, "encode_text", lambda m, t: texts.append(len(t)) or encode_text(m, t))
    monkeypatch.setattr(common, "encode_image", lambda m, x, *a: images.append(
        torch.is_grad_enabled()) or encode_image(m, x, *a))
    counts = []
    for steps in (1, 6):
        run(carft, tiny_root, clip(), tmp_path / str(steps), steps=steps)
        counts.append((len(texts), images.count(True), images.count(False)))
        texts.clear(), images.clear()
    assert [b - a for a, b in zip(*counts)] == [0, 5, 5]


def test_the_trained_head_is_used_where_classes_match(tiny_root, clip, tmp_path):
    """By hand on `few` (three columns of W_cls) and `other` (zero-shot); evaluate.py gives the same from the run."""
    results = run(carft, tiny_root, clip(), tmp_path / "out")["sets"]
    model, _, preprocess, tokenizer = common.load_model(f"local-dir:{tmp_path}/out/model", "", CPU)
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0)
    few = common.read_root(args).shifts[0]
    x = torch.stack([preprocess(few.read(i)) for i in range(len(few))])
    with torch.no_grad(), safetensors.safe_open(tmp_path / "out" / "head.safetensors", "pt") as f:
        u = common.encode_image(model, common.to_input(model, CPU)(x))
        logits = model.logit_scale.exp() * u @ f.get_tensor("W_cls")[[1, 3, 4]].T
    expected = float(F.cross_entropy(logits, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])))
    assert results["few"]["nll"] == pytest.approx(expected, rel=1e-4)
    assert results["other"]["head"] == "zero-shot"
    evaluate.main(["--data", tiny_root, "--model", f"{tmp_path}/out", "--out", str(tmp_path / "eval"), "--workers", "0"])
    again, = json.load(open(tmp_path / "eval" / "results.json")).values()
    for name in results:
        assert again["sets"][name]["nll"] == pytest.approx(results[name]["nll"], rel=1e-4)


def test_a_single_template_is_an_error(tiny_root, clip, tmp_path, capsys):
    os.makedirs(tmp_path / "root")
    for d in ("train", "val"):
        os.symlink(f"{tiny_root}/{d}", tmp_path / "root" / d)
    (tmp_path / "root" / "templates.txt").write_text("a photo of a {}.\n")
    with pytest.raises(SystemExit) as e:
        run(carft, tmp_path / "root", clip(), tmp_path / "out")
    err = capsys.readouterr().err
    assert e.value.code == 2 and "single template" in err and err.count("\n") == 1 and not os.path.exists(tmp_path / "out")
    run(carft, tmp_path / "root", clip(), tmp_path / "out", "--lam", "0", steps=1)


def test_an_interrupted_run_continues_to_the_same_bytes(tiny_root, clip, tmp_path, monkeypatch):
    assert_continues_to_the_same_bytes(carft, tiny_root, clip(), tmp_path, monkeypatch)
    a, b = (open(tmp_path / out / "head.safetensors", "rb").read() for out in ("whole", "cut"))
    assert a == b


def test_two_processes_are_one(tiny_root, clip, tmp_path):
    assert_processes_are_one("carft", tiny_root, clip(), tmp_path)
