# SPDX-License-Identifier: MIT
"""--accum and --compile save memory or time and change no gradient."""
import copy
import weakref

import pytest
import torch

import anchor
import calft
import carft
import common
from conftest import log, run, weights

@pytest.fixture
def without_scores(monkeypatch):
    """Let runs score no set and print no table."""
    monkeypatch.setattr(common, "evaluate", lambda *args: {"sets": {}})
    monkeypatch.setattr(common.Run, "report", lambda run: None)

def double_weights(teacher, model, m):
    """Take the place of update_teacher: make the teacher another model than the student."""
    for p in teacher.parameters():
        p.mul_(2)

@pytest.mark.parametrize("script, kind", [(calft, "vit"), (calft, "resnet"), (carft, "vit"),
                                          (anchor, "vit")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_accum_has_the_gradient_of_the_whole_batch(
        tiny_root, clip, tmp_path, monkeypatch, without_scores, captions, pool, script, kind, dtype,
        tolerance):
    """Chunks that saw their own negatives alone would have other gradients, in the second step."""
    model, *rest = common.load_model(clip(kind), "")
    model = model.to(dtype)
    to_input = common.to_input
    grads = []                                              # of each step, for each parameter

    def spy(parameters):
        grads.append([p.grad.clone() for p in parameters if p.grad is not None])
    monkeypatch.setattr(common, "load_model", lambda *args: (copy.deepcopy(model), *rest))
    monkeypatch.setattr(common, "to_input", lambda *args: to_input(*args).to(dtype))
    monkeypatch.setattr(common, "average_gradients", spy)
    monkeypatch.setattr(calft, "update_teacher", double_weights)
    own = ["--lr", "0"]
    if script is anchor:
        own += ["--captions", captions, "--pool", pool]
    for accum in ("1", "2", "4", "8"):
        run(script, tiny_root, clip(), tmp_path / accum, "--accum", accum, *own, steps=2)
        for a, b in zip(log(tmp_path / "1"), log(tmp_path / accum), strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
        whole = torch.stack([grad.norm() for grad in grads[1]]).norm()
        for a, b in zip(grads[1], grads[-1], strict=True):
            assert (a - b).norm() <= tolerance * (a.norm() + 0.01 * whole)

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision(tiny_root, clip, tmp_path, precision):
    """It stays near fp32, chunks are computed again under the same autocast, and weights stay
    float32: otherwise small updates are lost."""
    losses = {}
    for name, flags in (("fp32", ["--precision", "fp32"]), ("whole", ["--precision", precision]),
                        ("chunks", ["--precision", precision, "--accum", "4"])):
        run(calft, tiny_root, clip(), tmp_path / name, *flags)
        losses[name] = torch.tensor([line["loss"] for line in log(tmp_path / name)])
    torch.testing.assert_close(losses["whole"], losses["fp32"], rtol=0.05, atol=0)
    torch.testing.assert_close(losses["chunks"], losses["whole"], rtol=0.02, atol=0)
    assert (losses["whole"] != losses["fp32"]).all()
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "whole").values())

def test_accum_keeps_activations_of_one_chunk(clip):
    """If more than a chunk's were alive for the backward pass, --accum would save no memory."""
    class Held:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)
            peak[accum] = max(peak[accum], len(alive))
    model, *_ = common.load_model(clip(), "")
    alive = weakref.WeakSet()
    peak = {1: 0, 4: 0}                                     # {accum: most tensors held at once}
    for accum in peak:
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            u = common.encode_image(model, torch.randn(16, 3, 32, 32), accum)
        u.square().sum().backward()
        del u
    assert peak[4] < peak[1] / 4

def test_compile(tiny_root, clip, tmp_path, monkeypatch, without_scores):
    """All towers are compiled; losses and names of weights stay. Inductor takes a minute here."""
    compiled = []
    compile = torch.nn.Module.compile

    def spy(module, **options):
        compiled.append(type(module).__name__)
        compile(module, backend="aot_eager", **options)
    monkeypatch.setattr(torch.nn.Module, "compile", spy)
    run(calft, tiny_root, clip(), tmp_path / "eager", steps=2)
    run(calft, tiny_root, clip(), tmp_path / "compiled", "--compile", steps=2)
    assert compiled == ["VisionTransformer", "Transformer"] * 2         # of model and teacher
    for a, b in zip(log(tmp_path / "eager"), log(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    eager = weights(tmp_path / "eager")
    assert eager.keys() == weights(tmp_path / "compiled").keys()
