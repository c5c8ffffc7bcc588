# SPDX-License-Identifier: MIT
"""Test carft.py: its heads and its divergence by naive ways, its run against a plain loop."""
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import carft
import common
from conftest import assert_processes_are_one, log, parse, run, weights

def test_the_head_of_contexts_is_a_normalised_mean():
    """Compute W_ctx, the mean over classes: a mean over templates would classify classes."""
    E = F.normalize(torch.randn(4, 3, 5, dtype=torch.float64), dim=-1)
    for m in range(3):
        mean = (E[0, m] + E[1, m] + E[2, m] + E[3, m]) / 4
        torch.testing.assert_close(carft.context_head(E)[m], mean / mean.norm())

def test_context_kl():
    """Compare with torch's KL(p0 || p), not with the reverse. It has a gradient in both, and is
    finite where a p is 0."""
    z0, z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = F.kl_div(z.log_softmax(1), z0.softmax(1), reduction="batchmean")
    torch.testing.assert_close(carft.context_kl(z0, z), expected)
    assert torch.autograd.gradcheck(carft.context_kl, (z0, z))
    assert torch.isfinite(carft.context_kl(1000 * z0, -1000 * z0))

@pytest.mark.parametrize("flags, lam, is_reversed, largest_norm", [
    ([], 1, False, 1),
    (["--lam=2", "--reverse-kl"], 2, True, 1),
    (["--lam=2", "--clip-grad=0"], 2, False, float("inf")),
    (["--lam=0", "--clip-grad=0.5"], 0, False, 0.5)])
def test_training_is_a_plain_loop(
        tiny_root, clip, tmp_path, flags, lam, is_reversed, largest_norm):
    """Take four steps by open_clip and stock AdamW: otherwise what we train is not CAR-FT. The head
    holds tau, and gradients are clipped by their norm as numbers."""
    results = run(carft, tiny_root, clip(), tmp_path, *flags)
    model, _, transform = open_clip.create_model_and_transforms(clip())
    model.eval()
    untuned = open_clip.create_model(clip()).eval()
    normalize = transform.transforms[-1]
    tokenizer = open_clip.get_tokenizer(clip())
    args = parse("--data", tiny_root)
    train, sets = common.read_data(args)
    E = []
    for classname in train.classnames:
        tokens = tokenizer([template.replace("{}", classname) for template in train.templates])
        with torch.no_grad():
            E.append(model.encode_text(tokens, normalize=True))
    E = torch.stack(E)                                                              # (K, M, d)
    tau = model.logit_scale.exp().detach()
    W_ctx = F.normalize(E.mean(0), dim=-1)
    W_cls = torch.nn.Parameter(tau * F.normalize(E.mean(1), dim=-1))
    trained = [*model.visual.parameters(), W_cls]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.1)
    _, crop, preprocess, _ = common.load_model(clip(), "")
    batches = common.train_loader(train, crop, args, 0, 4)
    lrs = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    norms = []
    for (x, y, _, _), lr, line in zip(batches, lrs, log(tmp_path), strict=True):
        x = normalize(x / 255)
        u = model.encode_image(x, normalize=True)
        with torch.no_grad():
            u0 = untuned.encode_image(x, normalize=True)
        p = (tau * u @ W_ctx.T).softmax(1)
        p0 = (tau * u0 @ W_ctx.T).softmax(1)
        kl = (p0 * (p0 / p).log()).sum(1).mean()
        if is_reversed:
            kl = (p * (p / p0).log()).sum(1).mean()
        loss = F.cross_entropy(u @ W_cls.T, y) + lam * kl
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in trained).sqrt().item()
        norms.append(norm)
        for p in trained:
            p.grad.mul_(min(1, largest_norm / norm))
        optimizer.step()
    assert max(norms) > 1.1                                 # otherwise nothing was clipped
    ours = open_clip.create_model(f"local-dir:{tmp_path}/model").eval()
    torch.testing.assert_close(ours.encode_image(x), model.encode_image(x), rtol=1e-4, atol=1e-4)
    head = load_file(tmp_path / "head.safetensors")["W_cls"]
    torch.testing.assert_close(head, W_cls.detach() / tau, rtol=1e-4, atol=1e-5)
    # AdamW's means of gradients: a weight after so few steps hardly depends on their size.
    state = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["state"]
    means = [state[k]["exp_avg"] for k in state]
    for i, p in enumerate(trained):
        expected = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(means[i], expected, rtol=1e-3, atol=1e-5)

    few = sets[1]
    x = torch.stack([preprocess(common.read_image(path)[0]) for path in few.paths])
    u = model.encode_image(normalize(x / 255), normalize=True)
    nll = F.cross_entropy(u @ W_cls[[1, 3, 4]].T, torch.arange(3).repeat_interleave(3))
    assert few.name == "few"
    assert results["sets"]["few"]["nll"] == pytest.approx(nll.item(), rel=1e-3)

@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_clipped_at_their_true_size(tiny_root, clip, tmp_path, precision):
    """Clip in fp16, where gradients are scaled by 65536: before they are unscaled, clipping would
    leave next to nothing of them."""
    run(carft, tiny_root, clip(), tmp_path, "--precision", precision, steps=1)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["state"]
    means = torch.cat([state[k]["exp_avg"].flatten() for k in state])
    assert means.norm().item() == pytest.approx(0.1, rel=1e-3)          # a tenth of a norm of 1

def test_val_is_scored_by_the_trained_head(tiny_root, clip, tmp_path, monkeypatch):
    """Score val after an epoch by the tower and the head of that moment, which were saved before.
    The head that is scored does not hold tau, which the logits of any model are multiplied by."""
    evaluate = common.evaluate
    heads = []
    scored = []
    def keep(model, tokenizer, preprocess, sets, args, head=None):
        if len(sets) == 1:                                  # val, after an epoch
            checkpoint = torch.load(f"{args.out}/last.pt", weights_only=True)
            for name, weight in model.visual.state_dict().items():
                assert torch.equal(weight, checkpoint["visual"][name])
            torch.testing.assert_close(head * model.logit_scale.exp(), checkpoint["head"]["0"])
            heads.append(head.detach().clone())
        summary = evaluate(model, tokenizer, preprocess, sets, args, head)
        scored.append(summary["sets"]["val"])
        return summary
    monkeypatch.setattr(common, "evaluate", keep)
    run(carft, tiny_root, clip(), tmp_path, "--save-every", "5", steps=15)
    heads.append(load_file(tmp_path / "head.safetensors")["W_cls"])
    assert len(heads) == 3
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    of_epochs = scored[1:3]                                 # after zero-shot, before the end
    for line, step, val in zip(log(tmp_path, epochs=True), (4, 9), of_epochs, strict=True):
        assert line == {"step": step, "val_top1": val["top1"], "val_ece": val["ece"]}

def test_the_text_tower_is_not_carried(tiny_root, clip, tmp_path):
    """Look for the text tower: it is not in the optimiser nor in the checkpoint, and it is exported
    as it was."""
    run(carft, tiny_root, clip(), tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    before = open_clip.create_model(clip())
    n_trained = len(list(before.visual.parameters())) + 1   # and W_cls
    assert len(state["optimizer"]["param_groups"][0]["params"]) == n_trained
    assert set(state) == {"visual", "head", "optimizer", "scaler", "step", "log"}
    for name, weight in weights(tmp_path).items():
        is_equal = torch.equal(weight, before.state_dict()[name])
        assert is_equal != name.startswith("visual."), name

def test_two_processes_are_one(tiny_root, clip, tmp_path):
    """Share a batch between two processes: gradients, log and table are those of one, as clipping
    comes after the mean over processes."""
    assert_processes_are_one(carft, tiny_root, clip(), tmp_path)
