# SPDX-License-Identifier: MIT
"""The scripts on CUDA. Without a card: each script's own loop on fake CUDA tensors, which have a
device and no data, so that an operation that mixes devices raises. They cannot show the backward
pass, for which torch wants a driver (gradients are zeros here), what --accum computes again, NCCL,
pinned copies, events, kernels, --compile or any number.

With a card, on which this half has never run: losses against the CPU's, a resumed run, two cards,
and figures to send us: pytest -s tests/test_cuda.py.
"""
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import anchor
import calft
import carft
import common
from bench import OUT, flags, system, write_photos
from conftest import REPO, argv, environment, log, run, torchrun
from loops import METHODS, lone_loop, without_data

TERMS = {
    "CaRot": {"contrastive", "orthogonality", "self_distillation", "cross_frobenius"},
    "CAR-FT": {"cross_entropy", "context_kl"},
    "ARF": {"contrastive", "captions", "retrieved"}}
SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor}
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
without_driver = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="before torch 2.10 fake CUDA tensors need a driver")

# ---- without a card ------------------------------------------------------------------------------
def fake_steps(method, name, *flags, **changes):
    """Return what two steps of a method's own loop log, a dict each. changes: {name: change} of
    functions of common; change(f) takes the place of f."""
    main, common = lone_loop(method, name, 8, range(2), "--log-every", "1", *flags)
    with without_data(common):
        for function, change in changes.items():
            setattr(common, function, change(getattr(common, function)))
        main()
    return [call.kwargs for call in common.Run.return_value.log.call_args_list]

@without_driver
@pytest.mark.parametrize("kind, given", [
    ("vit", "bf16"), ("vit", "fp16 --accum 2"), ("vit", "fp32"),
    ("resnet", "bf16 --accum 2"), ("resnet", "fp16"), ("resnet", "fp32")])
@pytest.mark.parametrize("method", TERMS)
def test_a_step_mixes_no_devices(clip, method, kind, given):
    """A tensor left on the CPU would end the first step that anybody runs on a GPU."""
    _, line = fake_steps(method, clip(kind), "--precision", *given.split())
    assert line.keys() == TERMS[method] | {"loss", "lr"}    # of the second step: with a teacher
    for name in TERMS[method] | {"loss"}:
        x = line[name]
        assert x.device.type == "cuda"
        assert x.dtype == torch.float32
        assert x.ndim == 0
        assert x.requires_grad

@without_driver
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_gpu(clip, method):
    """While the host waits it queues nothing, and the GPU idles after that. The losses, which are
    read every --log-every steps, are left alone here."""
    def turns():
        yield
        fake.waits.clear()                                  # those before the second step
        yield
    main, common = lone_loop(method, clip(), 8, turns(), "--precision", "fp16")
    with without_data(common) as fake:
        main()
    assert not fake.waits

def output_on_cpu(f):
    return lambda *args: f(*args).cpu()

def labels_on_cpu(gather):
    return lambda x: gather(x.cpu() if x.dtype == torch.int64 else x)

def tokens_on_cpu(encode_text):
    return lambda model, tokens, accum: encode_text(model, tokens.cpu(), accum)

@without_driver
@pytest.mark.parametrize("method, function, change", [
    ("CaRot", "to_input", output_on_cpu), ("CaRot", "encode_text", tokens_on_cpu),
    ("CAR-FT", "to_input", output_on_cpu), ("CAR-FT", "gather", labels_on_cpu),
    ("CAR-FT", "class_head", output_on_cpu), ("CAR-FT", "text_embeddings", output_on_cpu),
    ("ARF", "to_input", output_on_cpu), ("ARF", "encode_text", tokens_on_cpu),
    ("ARF", "encode_text", output_on_cpu)])
def test_what_stays_on_the_cpu_raises(clip, method, function, change):
    """Otherwise the tests here would pass whatever the scripts do."""
    with pytest.raises(RuntimeError, match="on the same device|two different devices"):
        fake_steps(method, clip(), "--precision", "bf16", **{function: change})

def test_gradients_of_any_layout_are_averaged(monkeypatch):
    """Convolutions on CUDA are channels_last, and their gradients are copied in place, as fused
    AdamW needs them in that layout. All others become views of what was reduced: a copy of each
    would launch hundreds of kernels."""
    conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    tau = torch.nn.Parameter(torch.tensor(2.0))
    frozen = torch.nn.Parameter(torch.ones(3))
    parameters = [conv.weight, tau, frozen, conv.bias]
    (tau * conv(torch.randn(2, 3, 5, 5)).square().sum()).backward()
    trained = [conv.weight, tau, conv.bias]
    own = [p.grad.clone() for p in trained]
    theirs = [torch.randn_like(grad) for grad in own]       # of the other process
    weight_grad = conv.weight.grad
    reduced = []
    def all_reduce(flat):
        flat += torch.cat([grad.reshape(-1) for grad in theirs]) / 2
        reduced.append(flat)
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common.dist, "all_reduce", all_reduce)
    common.average_gradients(iter(parameters))
    for p, a, b in zip(trained, own, theirs):
        torch.testing.assert_close(p.grad, (a + b) / 2)
        assert p.grad.stride() == p.stride()
    assert frozen.grad is None
    flat, = reduced                                         # in one call
    assert conv.weight.grad is weight_grad and not weight_grad.is_contiguous()
    for p in (tau, conv.bias):
        assert p.grad.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()

@without_driver
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_heads_features_and_retrieval_mix_no_devices(tiny_root, clip, kind):
    """These run before the first step."""
    args = flags(tiny_root, batch_size=16)
    name = clip(kind)                                       # written before tensors are fakes
    train, sets = common.read_data(args)
    with without_data(common):
        model, _, preprocess, tokenizer = common.load_model(name, "")
        E = common.text_embeddings(model, tokenizer, train.classnames, train.templates)
        W_cls = common.class_head(E)
        W_ctx = carft.context_head(E)
        assert W_cls.shape == (5, 24) and W_cls.device.type == "cuda"
        assert W_ctx.shape == (3, 24) and W_ctx.device.type == "cuda"
        for images in sets:                                 # one of them has a head of its own
            u, = common.image_features([model], [preprocess], images, args, precision="fp16")
            assert u.shape == (len(images), 24) and u.device.type == "cpu"
            logits = common.set_logits(model, tokenizer, images, u, W_cls)
            assert logits.shape == (len(images), len(images.classes))
            assert logits.device.type == "cpu"
        query = torch.zeros(50, 8, device="cuda")
        nearest = anchor.retrieve(query, torch.zeros(40000, 8).half(), 3)
        assert nearest.shape == (50, 3) and nearest.device.type == "cuda"

@without_driver
@pytest.mark.parametrize("n, blocks", [(7, 1), (4096, 1), (10000, 3)])
def test_scoring_copies_each_row_once(clip, n, blocks):
    """Bring the features of a set to the GPU and its logits back, in blocks, and nothing else but
    the lists of columns, whatever their lengths: each copy waits for the GPU."""
    name = clip()
    _, common = lone_loop("CaRot", name, 8, [])
    with without_data(common) as fake:
        model, *_ = common.load_model(name, "")
        head = torch.zeros(5, 24, device="cuda")
        images = SimpleNamespace(columns=[[0, 3], [1], [2]])
        fake.waits.clear()
        logits = common.set_logits(model, None, images, torch.zeros(n, 24), head)
        assert len(fake.waits) == 2 * blocks + 1
    assert logits.shape == (n, 3) and logits.device.type == "cpu"

# ---- with a card ---------------------------------------------------------------------------------
def assert_same_losses(a, b, tolerance):
    for x, y in zip(log(a), log(b), strict=True):
        assert x == pytest.approx(y, rel=tolerance, abs=tolerance)

def start(command, root, model, out, *given, env=None):
    subprocess.run([*command, *argv(root, model, out, *given, steps=3)], env=env, check=True)

@card
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 2e-2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_are_those_of_the_cpu(tiny_root, clip, captions, pool, tmp_path, script,
                                     precision, tolerance):
    """Neither the device, nor chunks, nor compiled towers change a loss by more than rounding."""
    given = ["--precision", precision]
    if script == "anchor":
        given += ["--captions", captions, "--pool", pool]
    command = [sys.executable, f"{REPO}/{script}.py"]
    start(command, tiny_root, clip(), tmp_path / "cpu", *given, env=environment())
    for more in ("--accum 1", "--accum 2", "--compile --accum 2"):
        torch.compiler.reset()                              # otherwise the ninth is not compiled
        out = tmp_path / more
        run(SCRIPTS[script], tiny_root, clip(), out, *given, *more.split(), steps=3)
        assert_same_losses(tmp_path / "cpu", out, tolerance)

@card
def test_a_resumed_run_is_one_left_alone(tiny_root, clip, tmp_path):
    """last.pt brings weights, teacher, moments and the scaler back to the card."""
    own = ["--precision", "fp16", "--save-every", "3"]
    run(calft, tiny_root, clip(), tmp_path / "whole", *own, steps=7)
    rates = [calft.cosine_lr(step, 7, 2, 1e-3) for step in range(5)]
    cut = mock.patch.object(calft, "cosine_lr", side_effect=[*rates, KeyError])
    with cut, pytest.raises(KeyError):
        run(calft, tiny_root, clip(), tmp_path / "cut", *own, steps=7)
    run(calft, tiny_root, clip(), tmp_path / "cut", *own, steps=7)
    assert_same_losses(tmp_path / "whole", tmp_path / "cut", 1e-3)

@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA cards")
@pytest.mark.parametrize("script", ["calft", "carft"])
def test_two_cards_are_one(tiny_root, clip, tmp_path, script):
    """NCCL gathers features with their gradients and averages the gradients."""
    for out, command in (("one", [sys.executable]), ("two", torchrun(2))):
        start([*command, f"{REPO}/{script}.py"], tiny_root, clip(), tmp_path / out,
              "--precision", "fp32")
    assert_same_losses(tmp_path / "one", tmp_path / "two", 1e-3)

def timed(batches, ticks):
    """Yield 25 batches. Append to ticks for each of them when the card had done all that was queued
    before, and when the batch was there."""
    for _ in range(25):
        torch.cuda.synchronize()
        asked = time.perf_counter()
        batch = next(batches)
        ticks.append((asked, time.perf_counter()))
        yield batch

@card
def test_figures(tmp_path, monkeypatch):
    """Print what 20 steps of ViT-B/16 on photographs cost; each waits for the one before."""
    photos = write_photos()
    root = f"{OUT}/photos"
    texts = f"{root}/texts.tsv"                             # serves as captions and as pairs
    with open(texts, "w") as f:
        for i, path in enumerate(photos.paths):
            f.write(f"{os.path.relpath(path.decode(), root)}\tpicture {i}\n")
    steps = common.Run.steps
    rate = {}
    print(f"\n{system()}\nViT-B-16-quickgelu, batches of 48 images, bf16")
    for method, (script, *own) in METHODS.items():
        ticks = []
        monkeypatch.setattr(common.Run, "steps", lambda run, batches, total: steps(
            run, timed(iter(batches), ticks), total))
        if method == "ARF":
            own = [*own, "--captions", texts, "--pool", texts]
        torch.cuda.reset_peak_memory_stats()
        SCRIPTS[script].main([
            "--data", root, "--out", f"{tmp_path}/{method}", "--pretrained", "",
            *"--batch-size 48 --max-steps 25 --warmup 1 --eval-every 0 --epochs 99".split(),
            "--precision", "bf16", *own])
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        seconds = ticks[-1][0] - ticks[5][0]
        waits = sum(begun - asked for asked, begun in ticks[5:-1])
        rate[method] = 19 * 48 / seconds
        print(f"{method}: {rate[method]:.0f} images/s, {waits / seconds:.0%} of the time waits for "
              f"the loader, peak {peak:.1f} GiB")
    print(f"CaRot takes {rate['FT'] / rate['CaRot']:.2f} times as long as FT")
