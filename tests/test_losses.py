# SPDX-License-Identifier: MIT
"""Every loss term against a naive loop or a closed form, its gradient by finite differences in
float64, and the schedules. The terms of CAR-FT are in test_carft.py."""
import math

import pytest
import torch
from open_clip.loss import ClipLoss

import anchor
import calft
import carft
import common

def features(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)

def naive_cross_entropy(row, target):
    return -math.log(math.exp(row[target]) / sum(math.exp(x) for x in row))

def test_contrastive_loss_is_the_mean_of_both_directions():
    """Else every method trains on something else than CLIP's loss."""
    u, v, tau = features(5, 7, 0), features(5, 7, 1), 3.7
    S = [[tau * sum(a * b for a, b in zip(x, y)) for y in v.tolist()] for x in u.tolist()]
    rows = sum(naive_cross_entropy(S[i], i) for i in range(5)) / 5
    columns = sum(naive_cross_entropy([S[i][j] for i in range(5)], j) for j in range(5)) / 5
    ours = float(common.contrastive_loss(u, v, tau))
    assert ours == pytest.approx((rows + columns) / 2, rel=1e-12)
    assert ours == pytest.approx(float(ClipLoss()(u, v, tau)), rel=1e-6)            # open_clip's

def test_orthogonality():
    """The norm is not squared: the coefficient 0.2 belongs to that. Orthonormal columns give 0, and
    twice those, d of them, ||4I - I|| = 3 sqrt(d)."""
    W = torch.randn(6, 3, dtype=torch.float64)
    dots = [[sum(float(W[k, i] * W[k, j]) for k in range(6)) for j in range(3)] for i in range(3)]
    total = sum((dots[i][j] - (i == j)) ** 2 for i in range(3) for j in range(3))
    assert float(calft.orthogonality(W)) == pytest.approx(math.sqrt(total), rel=1e-12)
    Q = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q
    assert float(calft.orthogonality(Q)) == pytest.approx(0, abs=1e-12)
    assert float(calft.orthogonality(2 * Q)) == pytest.approx(3 * 2, rel=1e-12)

def test_self_distillation_by_loops():
    """The sum, not the mean, of the two directions, and the teacher is the target."""
    S, S_t = torch.randn(2, 4, 4, dtype=torch.float64).mul(3)

    def direction(S, S_t):
        total = 0.0
        for row, target in zip(S.tolist(), S_t.tolist()):
            p = [math.exp(-naive_cross_entropy(target, j)) for j in range(4)]
            total += sum(p[j] * naive_cross_entropy(row, j) for j in range(4))
        return total / len(S)
    expected = direction(S, S_t) + direction(S.T, S_t.T)
    assert float(calft.self_distillation(S, S_t)) == pytest.approx(expected, rel=1e-12)

def test_self_distillation_has_the_gradient_of_kl():
    """The paper writes KL, the code cross-entropy: they differ by the teacher's entropy alone, so a
    student that is its teacher stays."""
    S = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    S_t = torch.randn(5, 5, dtype=torch.float64)
    ours, = torch.autograd.grad(calft.self_distillation(S, S_t), S)
    kl = sum(torch.nn.functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
             for a, b in ((S, S_t), (S.T, S_t.T)))
    theirs, = torch.autograd.grad(kl, S)
    torch.testing.assert_close(ours, theirs)
    own, = torch.autograd.grad(calft.self_distillation(S, S.detach()), S)
    assert own.abs().max() < 1e-12

def test_cross_frobenius_by_entries():
    """The norm of all inner products of rows, not squared: the weight 0.05 belongs to that."""
    W_v, W_t = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    total = sum(float((W_v[i] * W_t[j]).sum()) ** 2 for i in range(5) for j in range(4))
    assert float(calft.cross_frobenius(W_v, W_t)) == pytest.approx(math.sqrt(total), rel=1e-12)

@pytest.mark.parametrize("loss, shapes", [
    (lambda u, v: common.contrastive_loss(u, v, 5.0), [(4, 3), (4, 3)]),
    (lambda tau: common.contrastive_loss(features(4, 3, 0), features(4, 3, 1), tau), [()]),
    (calft.orthogonality, [(5, 3)]),
    (lambda S: calft.self_distillation(S, torch.eye(4, dtype=torch.float64) * 3), [(4, 4)]),
    (calft.cross_frobenius, [(5, 3), (4, 3)]),
], ids=["contrastive", "logit_scale", "orthogonality", "self_distillation", "cross_frobenius"])
def test_gradient_by_finite_differences(loss, shapes):
    """Else a term pulls the weights elsewhere than its value says, as a detach too many would."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(loss, inputs)

def test_ema_momentum():
    """0.05 at the start, 0.9 from a fifth of the run on, a line between: else the teacher lags."""
    for step, m in ((0, 0.05), (100, 0.475), (199, 0.89575), (200, 0.9), (201, 0.9), (999, 0.9)):
        assert calft.ema_momentum(step, 1000) == pytest.approx(m)

@pytest.mark.parametrize("script", [calft, carft, anchor])
def test_cosine_lr(script):
    """Linear up to the peak, then a cosine to 0: else the recipe is not the released one."""
    for step, lr in ((0, 0.2), (9, 2.0), (10, 2.0), (55, 1.0), (100, 0.0)):
        assert script.cosine_lr(step, 100, 10, 2.0) == pytest.approx(lr)

@pytest.mark.parametrize("kind, d_in", [("vit", 32), ("resnet", 256), ("timm", 96)])
def test_projections(clip, kind, d_in):
    """u = h W_v for the features h before the projection: W_v is found in each kind of tower, is
    the last map, and is a view of the parameter itself, so that L_oc has a gradient."""
    model, *_ = common.load_model(clip(kind), "")
    W_v, W_t = calft.projections(model)
    assert W_v.shape == (d_in, 24) and W_t.shape == (16, 24)
    x = torch.randn(2, 3, 32, 32, device=common.DEVICE)
    with torch.no_grad():
        before = model.encode_image(x)
        W_v.mul_(2)
        after = model.encode_image(x)
    bias = model.visual.attnpool.c_proj.bias if kind == "resnet" else 0
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("case", ["batch of 2", "same images", "same captions", "opposite"])
def test_losses_at_the_greatest_scale_from_bf16_features(case):
    """tau = 100 and features rounded to bf16: values and gradients are finite, and what float64
    makes of the same numbers."""
    u, v = features(8, 16, 0), features(8, 16, 1)
    u, v = {"batch of 2": (u[:2], v[:2]), "same images": (u[:1].expand(8, -1), v),
            "same captions": (u, v[[0, 0, 1, 1, 2, 2, 3, 3]]), "opposite": (u, -u)}[case]

    def losses(dtype):
        a, b = (x.bfloat16().to(dtype).requires_grad_() for x in (u, v))
        S = 100.0 * a @ b.T
        E = torch.stack([b, b.flip(0)], 1)                                          # (K, M, d)
        values = [common.contrastive_loss(a, b, 100.0), carft.context_kl(S, S.detach().roll(1, 0)),
                  calft.self_distillation(S, S.detach().flip(0)), common.class_head(E).sum(),
                  carft.context_head(E).sum()]
        return values, torch.autograd.grad(sum(values), [a, b])
    low, high = losses(torch.float32), losses(torch.float64)
    for x, y in zip([*low[0], *low[1]], [*high[0], *high[1]]):
        assert x.isfinite().all() and (x.double() - y).abs().max() <= 1e-4 * (1 + y.abs().max())
