# SPDX-License-Identifier: MIT
"""--accum, --grad-checkpointing and --compile change no gradient; flags are read late but never too late."""
import open_clip
import pytest
import torch

import anchor
import calft
import carft
import common
from conftest import log, run, weights

SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor}


def second_gradients(monkeypatch, name, root, model, out, dtype, *flags):
    """Gradients of the second step, where CaRot's teacher takes part, and the log; all in `dtype`, at learning rate 0."""
    load, to_input, average, grads = common.load_model, common.to_input, common.average_gradients, []

    def load_in_dtype(*a):
        model, *rest = load(*a)
        return model.to(dtype), *rest

    def spy(parameters):
        parameters = list(parameters)
        average(parameters)
        grads.append([None if p.grad is None else p.grad.clone() for p in parameters])
    with monkeypatch.context() as m:
        m.setattr(common, "load_model", load_in_dtype)
        m.setattr(common, "to_input", lambda *a: lambda x: to_input(*a)(x).to(dtype))
        m.setattr(common, "average_gradients", spy)
        m.setattr(common, "evaluate", lambda *a, **k: {"sets": {}})
        m.setattr(common, "report", lambda results: None)
        m.setattr(calft, "update_teacher", lambda teacher, *a: [p.data.mul_(1.1) for p in teacher.parameters()])
        run(SCRIPTS[name], root, model, out, *flags, "--lr", "0", steps=2)
    return grads[1], log(out)


@pytest.mark.parametrize("name, kind", [("calft", "vit"), ("calft", "resnet"), ("carft", "vit"), ("anchor", "vit")])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_accum_has_the_gradient_of_the_whole_batch(tiny_root, clip, tmp_path, monkeypatch, captions, pool, name, kind, dtype,
                                                   tolerance):
    anchors = ["--captions", captions, "--pool", pool] if name == "anchor" else []
    one, lines = second_gradients(monkeypatch, name, tiny_root, clip(kind), tmp_path / "1", dtype, *anchors)
    for flags in (["--accum", "4"], ["--accum", "8"], ["--accum", "2", "--grad-checkpointing"]):
        if kind == "resnet" and len(flags) > 2:
            continue
        many, other = second_gradients(monkeypatch, name, tiny_root, clip(kind), tmp_path / "".join(flags), dtype, *flags, *anchors)
        whole = torch.stack([a.norm() for a in one if a is not None]).norm()
        for a, b in zip(one, many, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= tolerance * (a.norm() + 0.01 * whole)
        for a, b in zip(lines, other, strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accum_in_low_precision(tiny_root, clip, tmp_path, precision):
    """Chunks are recomputed under the same autocast: the gradients, so the weights, stay near."""
    for accum in "14":
        run(calft, tiny_root, clip(), tmp_path / accum, "--precision", precision, "--accum", accum, steps=3)
    for a, b in zip(log(tmp_path / "1"), log(tmp_path / "4")):
        assert a == pytest.approx(b, rel=2e-2)


def test_accum_keeps_activations_of_one_chunk(tiny_root, clip, tmp_path):
    """What autograd saves in the forward pass shrinks to the inputs, and the backward pass holds one chunk at a time."""
    model, _, preprocess, _ = common.load_model(clip(), "", torch.device("cpu"))
    x, alive, peak = torch.randn(16, 3, 32, 32), set(), {}

    class Held:
        def __init__(self, t):
            self.t = t
            alive.add(id(self))
            peak[accum] = max(peak.get(accum, 0), len(alive))

        def __del__(self):
            alive.discard(id(self))
    for accum in (1, 4):
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.t):
            u = common.encode_image(model, x, accum)
        u.square().sum().backward()
        del u
    assert peak[4] < peak[1] / 4


def test_grad_checkpointing_of_a_tower_without(tiny_root, clip, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(calft, tiny_root, clip("resnet"), tmp_path, "--grad-checkpointing")
    assert e.value.code == 2 and "--accum" in capsys.readouterr().err


def test_compile(tiny_root, clip, tmp_path, monkeypatch):
    """The towers are compiled, the exported names are open_clip's, the losses those of the eager run.

    Traced whole, but not by Inductor, which takes a minute here; `tests/bench.py step` runs that.
    """
    compiled, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compiled.append(type(self).__name__) or compile(
        self, backend="aot_eager", **kw))
    a, b = (run(calft, tiny_root, clip(), tmp_path / str(len(flags)), *flags) for flags in ((), ("--compile",)))
    assert compiled == ["VisionTransformer", "Transformer"] * 2          # the model's and the teacher's
    for x, y in zip(log(tmp_path / "0"), log(tmp_path / "1"), strict=True):
        assert x == pytest.approx(y, rel=1e-3)
    assert weights(tmp_path / "0").keys() == weights(tmp_path / "1").keys()
    open_clip.create_model(f"local-dir:{tmp_path}/1/model")
    assert a["sets"]["val"]["nll"] == pytest.approx(b["sets"]["val"]["nll"], rel=1e-2)
