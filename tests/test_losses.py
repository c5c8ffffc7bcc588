# SPDX-License-Identifier: MIT
"""Test every loss term against a naive loop or a closed form, its gradient by finite differences
in float64, and the schedules. The terms of CAR-FT are in test_carft.py."""
import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

import anchor
import calft
import carft
import common

def features(n, d, seed):
    """Return random L2-normalised features (n, d) in float64."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)

def naive_cross_entropy(row, target):
    """Return the cross-entropy of a list of logits, by its definition."""
    return -math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))

def test_contrastive_loss_is_the_mean_of_both_directions():
    """Compare with a loop and with open_clip: otherwise every method trains on something else than
    CLIP's loss."""
    u = features(5, 7, 0)
    v = features(5, 7, 1)
    tau = 3.7
    S = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            S[i, j] = tau * sum(float(u[i, k] * v[j, k]) for k in range(7))
    of_rows = [naive_cross_entropy(S[i].tolist(), i) for i in range(5)]
    of_columns = [naive_cross_entropy(S[:, j].tolist(), j) for j in range(5)]
    expected = (sum(of_rows) / 5 + sum(of_columns) / 5) / 2
    ours = float(common.contrastive_loss(u, v, tau))
    assert ours == pytest.approx(expected, rel=1e-12)
    assert ours == pytest.approx(float(common.clip_loss(S)), rel=1e-12)
    assert ours == pytest.approx(float(ClipLoss()(u, v, tau)), rel=1e-6)            # open_clip's

def test_orthogonality():
    """Compute the norm by entries: it is not squared, as the weight 0.2 is for that. Orthonormal
    columns give 0. Twice these give ||4 I - I|| = 3 sqrt(d) for d columns."""
    W = torch.randn(6, 3, dtype=torch.float64)
    total = 0.0
    for i in range(3):
        for j in range(3):
            product = sum(float(W[k, i] * W[k, j]) for k in range(6))
            total += (product - (i == j)) ** 2
    assert float(calft.orthogonality(W)) == pytest.approx(math.sqrt(total), rel=1e-12)
    Q = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    assert float(calft.orthogonality(Q)) == pytest.approx(0, abs=1e-12)
    assert float(calft.orthogonality(2 * Q)) == pytest.approx(3 * 2, rel=1e-12)

def test_self_distillation_by_loops():
    """Compute the sum, not the mean, of the two directions, with the teacher as the target."""
    S, S_ema = torch.randn(2, 4, 4, dtype=torch.float64).mul(3)
    def direction(S, S_ema):
        total = 0.0
        for row, target in zip(S.tolist(), S_ema.tolist()):
            p = [math.exp(-naive_cross_entropy(target, j)) for j in range(4)]
            total += sum(p[j] * naive_cross_entropy(row, j) for j in range(4))
        return total / len(S)
    expected = direction(S, S_ema) + direction(S.T, S_ema.T)
    assert float(calft.self_distillation(S, S_ema)) == pytest.approx(expected, rel=1e-12)

def test_self_distillation_has_the_gradient_of_kl():
    """Compare with the KL of the paper: the code's cross-entropy differs from it by the teacher's
    entropy alone, so a student that equals its teacher has no gradient."""
    S = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    S_ema = torch.randn(5, 5, dtype=torch.float64)
    ours, = torch.autograd.grad(calft.self_distillation(S, S_ema), S)
    def kl(student, teacher):
        return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    theirs, = torch.autograd.grad(kl(S, S_ema) + kl(S.T, S_ema.T), S)
    torch.testing.assert_close(ours, theirs)
    own, = torch.autograd.grad(calft.self_distillation(S, S.detach()), S)
    assert own.abs().max() < 1e-12

def test_cross_frobenius_by_entries():
    """Compute the norm of all inner products of rows. It is not squared: the weight 0.05 is for
    that."""
    W_v = torch.randn(5, 3, dtype=torch.float64)
    W_t = torch.randn(4, 3, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        for j in range(4):
            total += float((W_v[i] * W_t[j]).sum()) ** 2
    assert float(calft.cross_frobenius(W_v, W_t)) == pytest.approx(math.sqrt(total), rel=1e-12)

@pytest.mark.parametrize("loss, shapes", [
    (lambda u, v: common.contrastive_loss(u, v, 5.0), [(4, 3), (4, 3)]),
    (lambda tau: common.contrastive_loss(features(4, 3, 0), features(4, 3, 1), tau), [()]),
    (calft.orthogonality, [(5, 3)]),
    (lambda S: calft.self_distillation(S, torch.eye(4, dtype=torch.float64) * 3), [(4, 4)]),
    (calft.cross_frobenius, [(5, 3), (4, 3)]),
], ids=["contrastive", "logit_scale", "orthogonality", "self_distillation", "cross_frobenius"])
def test_gradient_by_finite_differences(loss, shapes):
    """Compare gradients: otherwise a term pulls the weights elsewhere than its value says, as one
    detach too many would do."""
    g = torch.Generator().manual_seed(0)
    inputs = []
    for shape in shapes:
        inputs.append(torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(loss, inputs)

def test_ema_momentum():
    """Look up m: 0.05 at the start, 0.9 after a fifth of the run, a line between. Otherwise the
    teacher lags."""
    for step, m in ((0, 0.05), (100, 0.475), (199, 0.89575), (200, 0.9), (201, 0.9), (999, 0.9)):
        assert calft.ema_momentum(step, 1000) == pytest.approx(m)

@pytest.mark.parametrize("script", [calft, carft, anchor])
def test_cosine_lr(script):
    """Look up rates: a line up to the peak, then a cosine to 0. Otherwise the recipe is not the
    released one."""
    for step, lr in ((0, 0.2), (9, 2.0), (10, 2.0), (55, 1.0), (100, 0.0)):
        assert script.cosine_lr(step, 100, 10, 2.0) == pytest.approx(lr)

@pytest.mark.parametrize("kind, d_in", [("vit", 32), ("resnet", 256), ("timm", 96)])
def test_projections(clip, kind, d_in):
    """Double W_v in each kind of tower: the features double, so it is the last map, and a view of
    the parameter itself, so that L_oc has a gradient."""
    model, *_ = common.load_model(clip(kind), "")
    W_v, W_t = calft.projections(model)
    assert W_v.shape == (d_in, 24) and W_t.shape == (16, 24)
    x = torch.randn(2, 3, 32, 32, device=common.DEVICE)
    with torch.no_grad():
        before = model.encode_image(x)
        W_v.mul_(2)
        after = model.encode_image(x)
    bias = 0
    if kind == "resnet":
        bias = model.visual.attnpool.c_proj.bias
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("case", ["batch of 2", "same images", "same captions", "opposite"])
def test_losses_at_the_largest_scale_from_bf16_features(case):
    """Compute with tau = 100 from features rounded to bf16: values and gradients are finite, and
    those that float64 makes of the same numbers."""
    u = features(8, 16, 0)
    v = features(8, 16, 1)
    u, v = {
        "batch of 2": (u[:2], v[:2]),
        "same images": (u[:1].expand(8, -1), v),
        "same captions": (u, v[[0, 0, 1, 1, 2, 2, 3, 3]]),
        "opposite": (u, -u)}[case]

    def values_and_gradients(dtype):
        a = u.bfloat16().to(dtype).requires_grad_()
        b = v.bfloat16().to(dtype).requires_grad_()
        S = 100.0 * a @ b.T
        E = torch.stack([b, b.flip(0)], 1)                                          # (K, M, d)
        values = [
            common.contrastive_loss(a, b, 100.0),
            carft.context_kl(S, S.detach().roll(1, 0)),
            calft.self_distillation(S, S.detach().flip(0)),
            common.class_head(E).sum(),
            carft.context_head(E).sum()]
        return [*values, *torch.autograd.grad(sum(values), [a, b])]
    low = values_and_gradients(torch.float32)
    high = values_and_gradients(torch.float64)
    for x, y in zip(low, high, strict=True):
        assert x.isfinite().all()
        assert (x.double() - y).abs().max() <= 1e-4 * (1 + y.abs().max())
