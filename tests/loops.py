# SPDX-License-Identifier: MIT
"""Each script's own loop on random images, and what a step costs, counted without a GPU."""
import importlib
import itertools
import os
import sys
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
METHODS = {"FT": ("carft", "--lam", "0"), "CAR-FT": ("carft",),
           "FLYP": ("calft", "--oc", "0", "--sd", "0", "--cross-fnorm", "0"), "CaRot": ("calft",),
           "ARF": ("anchor",)}

def lone_loop(method, name, n, turns, *given, peer=False):
    """A function that runs the loop of a method's own script on the same n random images for every
    item of `turns`, without scores or files, and the copy of common that it uses. peer: with
    prompts of 77 tokens, torch's default AdamW, and the loss read at each step."""
    script, *own = METHODS[method]
    with mock.patch.dict(sys.modules):                      # copies of their own, to be changed
        for module in ("common", script):
            sys.modules.pop(module, None)
        common, script = (importlib.import_module(module) for module in ("common", script))
    config, rows, AdamW = open_clip.get_model_config(name), max(n, 512), torch.optim.AdamW
    size, g = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(0)
    batch = [torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g),
             *(torch.randint(most, (n,), generator=g) for most in (100, rows, 20))]
    E = common.normalize(torch.randn(100, 20, config["embed_dim"], generator=g))
    templates = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES[::4]]
    train = common.ImageSet("train", [], open_clip.IMAGENET_CLASSNAMES[:100], templates, [],
                            np.zeros(rows, "S1"), np.zeros(rows, int))
    texts = ["a large brown dog lies on the grass beside a small red ball in the sun"] * rows
    run = mock.Mock(start=0, results={"zero_shot": {}}, stopped=False, path=Path("out"))
    run.steps = lambda batches, total: enumerate(batches)
    run.log = mock.Mock(side_effect=lambda **values: peer and values["loss"].item())

    def train_loader(images, crop, args, start, total, batch_size=None, seed=None):
        return itertools.repeat(batch) if batch_size else (batch for _ in turns)    # ARF's pairs

    def at_full_length(model, tokens, accum=1):
        tokens = F.pad(tokens, (0, 77 - tokens.shape[1])).to(common.DEVICE)
        return common.normalize(model.encode_text(tokens))

    def main():
        plain = mock.patch.object(torch.optim, "AdamW", lambda *a, fused, **kw: AdamW(*a, **kw))
        with plain if peer else ExitStack():
            script.main(f"--data . --model {name} --batch-size {n} --epochs 9999 --max-steps 9999 "
                        f"--warmup 0 --eval-every 0 --log-every {1 if peer else 50}".split()
                        + ["--pretrained", "", *own, *given])
    own += ["--captions", "-", "--pool", "-"] * (method == "ARF")
    for module, function, value in (
            (common, "Run", run), (common, "read_data", (train, [train])), (common, "evaluate", {}),
            (common, "export", None), (common, "write", None), (common, "say", None),
            (script, "open_pool", (train, texts)), (script, "read_captions", [[t] for t in texts]),
            (script, "retrieve_pairs", list(range(rows)))):
        setattr(module, function, mock.Mock(return_value=value))
    common.train_loader, common.text_embeddings = train_loader, lambda *_: E.to(common.DEVICE)
    common.encode_text = at_full_length if peer else common.encode_text
    return main, common

class FakeCuda(FakeTensorMode):
    """Under it a tensor on 'cuda' has a device and a shape but no data, so that it needs no GPU and
    no memory, and an operation that mixes devices raises. Tensors on the CPU are real."""
    inside = False                                          # of what torch makes of an operation

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if not self.inside and not any(
                isinstance(x, FakeTensor) or isinstance(x, torch.device) and x.type == "cuda"
                for x in tree_leaves((args, kwargs))):
            return f(*args, **(kwargs or {}))
        with mock.patch.object(self, "inside", True):
            return super().__torch_dispatch__(f, types, args, kwargs)

@contextmanager
def without_data(common, kind="cuda"):
    """Let a copy of common compute on FakeCuda's tensors, without a backward pass, or on 'meta'."""
    device, create = torch.device(kind, 0), open_clip.create_model

    def create_model(*args, **kw):
        with device:
            return create(*args, **{**kw, "device": device})

    def zero_gradients(parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p)
    changes = {"common.DEVICE": device, "open_clip.create_model": create_model,
               "torch.nn.Module.to": lambda self, *args, **kw: self}
    if kind == "meta":
        changes |= {"common.autocast": lambda precision: ExitStack(),
                    "torch.optim.AdamW.step": mock.Mock()}
    else:
        changes |= {"common.average_gradients": zero_gradients,
                    "torch.cuda.set_device": mock.Mock(),
                    "torch.inference_mode": lambda on=True: torch.no_grad() if on else ExitStack(),
                    "torch.Tensor.backward": mock.Mock(), "torch.Tensor.pin_memory": lambda x: x,
                    "torch.cuda.is_bf16_supported": mock.Mock(return_value=True),
                    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.dict(sys.modules, {"common": common}))
        enter(mock.patch.object(common.to_device, "__defaults__", (device,)))
        for name, value in changes.items():
            enter(mock.patch(name, value))
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")                     # of copies of fake tensors
        enter(mock.patch("torch.backends.mha.get_fastpath_enabled", lambda: False))
        if kind == "cuda":
            enter(FakeCuda(allow_non_fake_inputs=True))
        yield

def operations(method, name, *given):
    """Floating point operations of a step for each image, forward and backward."""
    counter = FlopCounterMode(display=False)

    def turns():
        yield                                               # CaRot's first step has no teacher
        with counter:
            yield
    main, common = lone_loop(method, name, 2, turns(), *given)
    with without_data(common, "meta"):
        main()
    return counter.get_total_flops() / 2

def activations(method, name, n, accum, *given):
    """Bytes that a step holds for its backward pass in bf16 on CUDA, with fused attention: what the
    forward pass keeps, and the greatest part that --accum or --grad-checkpointing compute again."""
    kept, again = [{}], [0]                                 # of the step, and of parts within parts

    def keep(t):
        if not isinstance(t, torch.nn.Parameter):           # held, so that no id comes twice
            kept[-1][t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def part(f, *args, **_):
        tree_map_only(torch.Tensor, keep, args)
        kept.append({})
        again.append(0)
        out = f(*args)
        need = again.pop() + sum(s.nbytes() for s in kept.pop().values())
        again[-1] = max(again[-1], need)
        return out

    def in_chunks(encode, model, x, accum):                 # all are alike, so one stands for all
        return part(encode, model, x.chunk(accum)[0]).repeat(accum, 1)

    def attention(q, k, v, mask, dropout_p, is_causal):
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]

    def turns():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            yield
    main, common = lone_loop(method, name, n, turns(), "--accum", str(accum), "--precision", "bf16",
                             *given)
    to_input = common.to_input
    with (without_data(common), mock.patch.object(F, "scaled_dot_product_attention", attention),
          mock.patch("open_clip.transformer.checkpoint", part), mock.patch.multiple(
              common, in_chunks=in_chunks, to_input=lambda *a: keep(to_input(*a)))):
        main()
    return again[0] + sum(s.nbytes() for s in kept[0].values())
