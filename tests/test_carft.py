# SPDX-License-Identifier: MIT
"""carft.py: its heads and its divergence by naive ways, its run against a plain loop."""
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import carft
import common
from conftest import assert_processes_are_one, log, run, weights

def test_the_head_of_contexts_is_a_normalised_mean():
    """W_ctx is the mean over classes; over templates it would be a classifier of classes."""
    E = F.normalize(torch.randn(4, 3, 5, dtype=torch.float64), dim=-1)
    for m in range(3):
        mean = (E[0, m] + E[1, m] + E[2, m] + E[3, m]) / 4
        torch.testing.assert_close(carft.context_head(E)[m], mean / mean.norm())

def test_context_kl():
    """It is KL(p0 || p) and not the reverse, with a gradient in both, finite where a p is 0."""
    z0, z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = F.kl_div(z.log_softmax(1), z0.softmax(1), reduction="batchmean")
    torch.testing.assert_close(carft.context_kl(z0, z), expected)
    assert torch.autograd.gradcheck(carft.context_kl, (z0, z))
    assert torch.isfinite(carft.context_kl(1000 * z0, -1000 * z0))

@pytest.mark.parametrize("lam, reverse", [(2, False), (2, True), (0, False)])
def test_training_is_a_plain_loop(tiny_root, clip, tmp_path, lam, reverse):
    """Four steps by open_clip and stock AdamW are ours, or what we train is not CAR-FT."""
    results = run(carft, tiny_root, clip(), tmp_path, f"--lam={lam}", *["--reverse-kl"] * reverse)
    model, _, transform = open_clip.create_model_and_transforms(clip())
    untuned, tokenizer = open_clip.create_model(clip()).eval(), open_clip.get_tokenizer(clip())
    flags = ["--data", tiny_root, "--batch-size", "8", "--workers", "0"]
    args, normalize = common.flags("test:", "out").parse_args(flags), transform.transforms[-1]
    train, sets = common.read_data(args)
    texts = [tokenizer([t.replace("{}", c) for t in train.templates]) for c in train.classnames]
    with torch.no_grad():
        E = torch.stack([model.eval().encode_text(tokens, normalize=True) for tokens in texts])
        tau, W_ctx = model.logit_scale.exp(), F.normalize(E.mean(0), dim=-1)
    W_cls = torch.nn.Parameter(F.normalize(E.mean(1), dim=-1))
    optimizer = torch.optim.AdamW([*model.visual.parameters(), W_cls], weight_decay=0.1)
    _, crop, preprocess, _ = common.load_model(clip(), "")
    batches = common.train_loader(train, crop, args, 0, 4)
    lrs = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    for (x, y, _, _), lr, line in zip(batches, lrs, log(tmp_path), strict=True):
        x = normalize(x / 255)
        u, u0 = (m.encode_image(x, normalize=True) for m in (model, untuned))
        p, p0 = (tau * u @ W_ctx.T).softmax(1), (tau * u0 @ W_ctx.T).softmax(1).detach()
        if reverse:
            p, p0 = p0, p
        loss = F.cross_entropy(tau * u @ W_cls.T, y) + lam * (p0 * (p0 / p).log()).sum(1).mean()
        assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = open_clip.create_model(f"local-dir:{tmp_path}/model").eval()
    torch.testing.assert_close(ours.encode_image(x), model.encode_image(x), rtol=1e-4, atol=1e-4)
    head = load_file(tmp_path / "head.safetensors")["W_cls"]
    torch.testing.assert_close(head, W_cls.data, rtol=1e-4, atol=1e-4)
    x = torch.stack([preprocess(common.read_image(sets[1].paths[i])[0]) for i in range(9)])  # `few`
    logits = tau * model.encode_image(normalize(x / 255), normalize=True) @ W_cls[[1, 3, 4]].T
    nll = F.cross_entropy(logits, torch.arange(3).repeat_interleave(3)).detach()
    assert results["sets"]["few"]["nll"] == pytest.approx(float(nll), rel=1e-3)

def test_the_text_tower_is_not_carried(tiny_root, clip, tmp_path):
    """It is not in the optimiser nor in the checkpoint, and is exported as it was."""
    run(carft, tiny_root, clip(), tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    before = open_clip.create_model(clip())
    trained = len(list(before.visual.parameters())) + 1         # and W_cls
    assert len(state["optimizer"]["param_groups"][0]["params"]) == trained
    assert set(state) == {"visual", "head", "optimizer", "scaler", "step", "log_bytes"}
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, before.state_dict()[name]) != name.startswith("visual."), name

def test_two_processes_are_one(tiny_root, clip, tmp_path):
    """Gradients, log and table do not depend on how many processes share a batch."""
    assert_processes_are_one(carft, tiny_root, clip(), tmp_path)
