# SPDX-License-Identifier: MIT
"""The scripts on CUDA. Without a card: each script's own loop on fake CUDA tensors, which have a
device and no data, so that an operation that mixes devices raises. They cannot show the backward
pass, for which torch wants a driver (gradients are zeros here), what --accum and
--grad-checkpointing compute again, NCCL, pinned copies, events, kernels, --compile or any number.

With a card, on which this half has never run: losses against the CPU's, a resumed run, two cards,
and figures to send us: pytest -s tests/test_cuda.py.
"""
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch

import anchor
import calft
import carft
import common
from bench import flags, system, write_photos
from conftest import REPO, argv, environment, log, run, torchrun
from loops import METHODS, lone_loop, without_data
from test_anchor import write_coca

TERMS = {"CaRot": {"contrastive", "orthogonality", "self_distillation", "cross_frobenius"},
         "CAR-FT": {"cross_entropy", "context_kl"}, "ARF": {"contrastive", "captions", "retrieved"}}
SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor}
card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")

# ---- without a card ------------------------------------------------------------------------------
def fake_steps(method, name, *flags, **changes):
    """What two steps of a method's own loop log. changes: functions of common, each made of the one
    that it replaces."""
    main, common = lone_loop(method, name, 8, range(2), "--log-every", "1", *flags)
    with without_data(common):
        for function, change in changes.items():
            setattr(common, function, change(getattr(common, function)))
        main()
    return [call.kwargs for call in common.Run.return_value.log.call_args_list]

@pytest.mark.parametrize("kind, given", [
    ("vit", "bf16"), ("vit", "fp16 --accum 2"), ("vit", "fp32 --grad-checkpointing"),
    ("vit", "fp32"), ("vit", "bf16 --accum 2 --grad-checkpointing"),
    ("resnet", "bf16 --accum 2"), ("resnet", "fp16"), ("resnet", "fp32")])
@pytest.mark.parametrize("method", TERMS)
def test_a_step_mixes_no_devices(clip, method, kind, given):
    """A tensor left on the CPU would end the first step that anybody runs on a GPU."""
    _, line = fake_steps(method, clip(kind), "--precision", *given.split())
    assert line.keys() == TERMS[method] | {"loss", "lr", "step"}        # the second has a teacher
    for x in (line[name] for name in TERMS[method] | {"loss"}):
        assert (x.device.type, x.dtype, x.ndim, x.requires_grad) == ("cuda", torch.float32, 0, True)

def test_what_stays_on_the_cpu_raises(clip):
    """Else the tests here would pass whatever the scripts do."""
    def on_cpu(f):
        return lambda *a: f(*a).cpu()

    def but(dtype):                                         # int64: labels; int32: tokens
        return lambda f: lambda x, *device: x if x.dtype == dtype else f(x, *device)
    for method, function, change in (
            ("CaRot", "to_input", on_cpu), ("CAR-FT", "to_input", on_cpu),
            ("ARF", "to_input", on_cpu), ("CAR-FT", "to_device", but(torch.int64)),
            ("CAR-FT", "class_head", on_cpu), ("CAR-FT", "text_embeddings", on_cpu),
            ("CaRot", "to_device", but(torch.int32)), ("ARF", "encode_text", on_cpu)):
        with pytest.raises(RuntimeError, match="on the same device"):
            fake_steps(method, clip(), "--precision", "bf16", **{function: change})

def test_gradients_of_any_layout_are_averaged(monkeypatch):
    """Convolutions on CUDA are channels_last. Here the other process has twice the gradient."""
    conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    conv(torch.randn(2, 3, 5, 5)).square().sum().backward()
    expected = [1.5 * p.grad for p in conv.parameters()]
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common.dist, "all_reduce", lambda x: x.mul_(3))
    common.average_gradients(list(conv.parameters()))
    for p, g in zip(conv.parameters(), expected):
        torch.testing.assert_close(p.grad, g)
        assert p.grad.stride() == p.stride()                # as fused AdamW needs it

@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_heads_features_and_retrieval_mix_no_devices(tiny_root, clip, kind):
    """These run before the first step."""
    args, name = flags(tiny_root, batch_size=16), clip(kind)
    train, sets = common.read_data(args)
    with without_data(common):
        model, _, preprocess, tokenizer = common.load_model(name, "")
        E = common.text_embeddings(model, tokenizer, train.classnames, train.templates)
        for head, shape in ((common.class_head(E), (5, 24)), (carft.context_head(E), (3, 24))):
            assert head.shape == shape and head.device.type == "cuda"
        (u, *_), = common.image_features([model], [preprocess], sets, args, "", precision="fp16")
        assert u.shape == (15, 24) and u.device.type == "cpu"
        near = anchor.retrieve(torch.zeros(50, 8, device="cuda"), torch.zeros(40000, 8).half(), 3)
        assert near.shape == (50, 3) and near.device.type == "cuda"

@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_captions_mix_no_devices(tmp_path, precision):
    """The captioner grows tokens and masks of its own; here no caption ever ends."""
    name = write_coca(tmp_path / "coca")
    with without_data(common), mock.patch("torch.Tensor.all", lambda *_: False), torch.no_grad():
        coca, *_ = common.load_model(name, "")
        images = common.to_input(coca, torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
        with common.autocast(precision):
            tokens = anchor.greedy_captions(coca, images, 6)
        assert tokens.shape == (4, 6) and tokens.device.type == "cuda"
        with pytest.raises(RuntimeError, match="on the same device"):
            anchor.greedy_captions(coca, images.cpu(), 6)

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
    own = ["--captions", captions, "--pool", pool] if script == "anchor" else []
    command, cpu = [sys.executable, f"{REPO}/{script}.py"], tmp_path / "cpu"
    start(command, tiny_root, clip(), cpu, "--precision", precision, *own, env=environment())
    for more in ("--accum 1", "--accum 2", "--grad-checkpointing", "--compile --accum 2"):
        torch.compiler.reset()                              # else the ninth model is not compiled
        given = ["--precision", precision, *own, *more.split()]
        run(SCRIPTS[script], tiny_root, clip(), tmp_path / more, *given, steps=3)
        assert_same_losses(cpu, tmp_path / more, tolerance)

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
    for n, command in enumerate(([sys.executable], torchrun(2))):
        start([*command, f"{REPO}/{script}.py"], tiny_root, clip(), tmp_path / str(n),
              "--precision", "fp32")
    assert_same_losses(tmp_path / "0", tmp_path / "1", 1e-3)

@card
def test_figures(tmp_path, monkeypatch):
    """Prints what 20 steps of ViT-B/16 on photographs cost; each waits for the one before."""
    photos, steps, rate, texts = write_photos(), common.Run.steps, {}, f"{tmp_path}/texts.tsv"
    with open(texts, "w") as f:                             # serves as captions and as pairs
        f.writelines(f"{p.decode()}\tpicture {i}\n" for i, p in enumerate(photos.paths))

    def timed(batches):
        for _ in range(25):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            batch = next(batches)
            ticks.append((begin, time.perf_counter()))
            yield batch
    monkeypatch.setattr(common.Run, "steps", lambda run, b, n: steps(run, timed(iter(b)), n))
    print(f"\n{system()}\nViT-B-16-quickgelu, batches of 48 images, bf16")
    for method, (script, *own) in METHODS.items():
        ticks, own = [], own + ["--captions", texts, "--pool", texts] * (method == "ARF")
        torch.cuda.reset_peak_memory_stats()
        SCRIPTS[script].main([
            "--data", f"{REPO}/out/bench/photos", "--out", f"{tmp_path}/{method}", "--pretrained",
            "", *"--batch-size 48 --max-steps 25 --warmup 1 --eval-every 0 --epochs 99".split(),
            "--precision", "bf16", *own])
        seconds, peak = ticks[-1][0] - ticks[5][0], torch.cuda.max_memory_allocated() / 2 ** 30
        rate[method], waits = 19 * 48 / seconds, sum(end - begin for begin, end in ticks[5:-1])
        print(f"{method}: {rate[method]:.0f} images/s, {waits / seconds:.0%} of the time waits for "
              f"the loader, peak {peak:.1f} GiB")
    print(f"CaRot takes {rate['FT'] / rate['CaRot']:.2f} times as long as FT")
