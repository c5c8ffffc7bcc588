# SPDX-License-Identifier: MIT
"""Run each script's own loop on random images, and count what a step costs, without a GPU."""
import os
import sys

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
import common  # noqa: E402, F401                            before torch, see its first lines

import importlib
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# The script of each method, and the flags that make it that method.
METHODS = {
    "FT": ("carft", "--lam", "0"),
    "CAR-FT": ("carft",),
    "FLYP": ("calft", "--oc", "0", "--sd", "0", "--cross-fnorm", "0"),
    "CaRot": ("calft",),
    "ARF": ("anchor",)}

# ---- the loop of a script, alone -----------------------------------------------------------------
def import_copies(script):
    """Return a copy of common, and one of a script that uses it. Both may be changed."""
    with mock.patch.dict(sys.modules):
        for name in ("common", script):
            sys.modules.pop(name, None)
        return importlib.import_module("common"), importlib.import_module(script)

def random_texts(n, generator):
    """Return n texts of 8 to 77 tokens. As among captions, short ones are more frequent: the
    logarithm of the length is uniform."""
    lengths = 8 * (78 / 8) ** torch.rand(n, generator=generator)
    return ["dog " * (int(length) - 2) for length in lengths]           # plus a start and an end

def lone_loop(method, name, n, turns, *given, peer=False):
    """Return a function that runs the loop of a method's own script, without scores and files, and
    the copy of common that it uses. The loop makes one step for each item of `turns`, always on the
    same n random images; their classes, templates and captions change.

    peer: instead, with prompts of 77 tokens, torch's default AdamW, and the loss read at each
    step."""
    script_name, *own = METHODS[method]
    common, script = import_copies(script_name)
    config = open_clip.get_model_config(name)
    size = config["vision_cfg"]["image_size"]
    generator = torch.Generator().manual_seed(0)
    n_rows = max(n, 512)
    texts = random_texts(n_rows, generator)
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES[::4]]
    train = common.ImageSet(
        "train", [], open_clip.IMAGENET_CLASSNAMES[:100], templates, np.zeros(n_rows, "S1"),
        np.zeros(n_rows, int), None, "all", False)

    crops = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    def random_batches():
        while True:
            labels = torch.randint(100, (n,), generator=generator)
            rows = torch.randint(n_rows, (n,), generator=generator)
            draws = torch.randint(2 ** 31, (n,), generator=generator)
            yield crops, labels, rows, draws

    def train_loader(images, crop, args, first_step, total):
        if images is train:
            return (batch for _, batch in zip(turns, random_batches()))
        return random_batches()                             # of ARF's pairs

    E = common.normalize(torch.randn(100, 20, config["embed_dim"], generator=generator))
    def text_embeddings(model, tokenizer, classnames, templates):
        return E.to(common.DEVICE)

    def text_at_full_length(model, tokens, accum=1):
        return common.normalize(model.encode_text(F.pad(tokens, (0, 77 - tokens.shape[1]))))

    def read_loss(step, **values):
        values["loss"].item()

    run = mock.Mock(first_step=0, results={"zero_shot": {}}, path=Path("out"))
    run.steps = lambda batches, total: enumerate(batches)
    log_every = 50
    if peer:
        run.log = mock.Mock(side_effect=read_loss)
        log_every = 1
        common.encode_text = text_at_full_length
    common.train_loader = train_loader
    common.text_embeddings = text_embeddings
    common.Run = mock.Mock(return_value=run)
    common.read_data = mock.Mock(return_value=(train, [train]))
    for function in ("evaluate", "export", "zero_shot_head", "write", "say"):
        setattr(common, function, mock.Mock())
    if method == "ARF":
        own = ["--captions", "-", "--pool", "-"]
        script.read_captions = mock.Mock(return_value=[[text] for text in texts])
        script.read_pool = mock.Mock(return_value=(train, texts))
        script.retrieve_pairs = mock.Mock(return_value=list(range(n_rows)))

    AdamW = torch.optim.AdamW
    def default_adamw(*args, fused, **kwargs):
        return AdamW(*args, **kwargs)

    def main():
        argv = (f"--data . --model {name} --batch-size {n} --epochs 9999 --max-steps 9999 "
                f"--warmup 0 --eval-every 0 --log-every {log_every} --pretrained").split()
        argv += ["", *own, *given]
        with ExitStack() as stack:
            if peer:
                stack.enter_context(mock.patch.object(torch.optim, "AdamW", default_adamw))
            script.main(argv)
    return main, common

# ---- the same without a GPU and without data -----------------------------------------------------
class FakeCuda(FakeTensorMode):
    """Make tensors on 'cuda' that have a device and a shape but no data, so that they need no GPU
    and no memory. An operation that mixes devices raises. Tensors on the CPU are real.

    `waits` lists the operations at which the host would wait for the GPU: those that read a number
    from it, and those that copy between the devices and are not queued (non_blocking)."""
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.waits = []
        self.is_inside = False                              # of what torch makes of an operation

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.is_inside and not any(map(is_on_cuda, tree_leaves((args, kwargs)))):
            return function(*args, **kwargs)
        with mock.patch.object(self, "is_inside", True):
            result = super().__torch_dispatch__(function, types, args, kwargs)
        if not self.is_inside and host_waits(function, args, kwargs, result):
            self.waits.append(str(function))
        return result

def is_on_cuda(x):
    """Whether x is a tensor of FakeCuda's, or the device of one."""
    is_cuda = isinstance(x, torch.device) and x.type == "cuda"
    return is_cuda or isinstance(x, FakeTensor)

def host_waits(function, args, kwargs, result):
    """Whether the host would wait for the GPU at an operation."""
    if function is torch.ops.aten._local_scalar_dense.default:
        return True
    leaves = tree_leaves((args, kwargs, result))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.ndim > 0]
    devices = {tensor.device.type for tensor in tensors}
    return len(devices) > 1 and not kwargs.get("non_blocking")

@contextmanager
def without_data(common, kind="cuda"):
    """Let a copy of common compute on FakeCuda's tensors, without a backward pass, or on 'meta'.
    Yield the FakeCuda."""
    device = torch.device(kind, 0)
    create = open_clip.create_model
    def create_model(*args, **kwargs):
        kwargs["device"] = device
        with device:
            return create(*args, **kwargs)

    def zero_gradients(parameters):
        for p in parameters:
            p.grad = torch.zeros_like(p)

    def no_inference_mode(on=True):
        return torch.no_grad() if on else ExitStack()

    changes = {
        "common.DEVICE": device,
        "open_clip.create_model": create_model,
        "torch.backends.mha.get_fastpath_enabled": lambda: False,
        "torch.nn.Module.to": lambda self, *args, **kwargs: self}
    if kind == "meta":
        changes |= {
            "common.autocast": lambda precision: ExitStack(),
            "torch.optim.AdamW.step": mock.Mock()}
    else:
        changes |= {
            "common.average_gradients": zero_gradients,
            "torch.Tensor.backward": mock.Mock(),
            "torch.Tensor.pin_memory": lambda x: x,
            "torch.inference_mode": no_inference_mode,
            "torch.cuda.set_device": mock.Mock(),
            "torch.cuda.is_bf16_supported": mock.Mock(return_value=True),
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, {"common": common}))
        for name, value in changes.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")                     # of copies of fake tensors
        fake = FakeCuda()
        if kind == "cuda":
            stack.enter_context(fake)
        yield fake

def operations(method, name, n, *given):
    """Return the floating point operations of a step on n images, forward and backward."""
    counter = FlopCounterMode(display=False)

    def turns():
        yield                                               # CaRot's first step has no teacher
        with counter:
            yield
    main, common = lone_loop(method, name, n, turns(), *given)
    with without_data(common, "meta"):
        main()
    return counter.get_total_flops()

def activations(method, name, n, accum):
    """Return the bytes that a step holds for its backward pass in bf16 on CUDA with fused
    attention: what the forward pass keeps, and the largest chunk that --accum computes again."""
    of_step = {}                                            # {id: storage}, so that no id is reused
    of_chunk = {}
    held = of_step                                          # the one of both that grows
    largest_chunk = 0

    def size(storages):
        return sum(storage.nbytes() for storage in storages.values())

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            held[storage._cdata] = storage
        return tensor

    def in_chunks(encode, model, x, accum):
        nonlocal held, largest_chunk
        keep(x)
        held = of_chunk
        features = encode(model, x.chunk(accum)[0])         # all are alike, so one stands for all
        largest_chunk = max(largest_chunk, size(of_chunk))
        of_chunk.clear()
        held = of_step
        return features.repeat(accum, 1)

    def attention(q, k, v, mask, dropout_p, is_causal):
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]

    def turns():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield

    main, common = lone_loop(
        method, name, n, turns(), "--accum", str(accum), "--precision", "bf16")
    to_input = common.to_input
    common.to_input = lambda *args: keep(to_input(*args))
    common.in_chunks = in_chunks
    with without_data(common), mock.patch.object(F, "scaled_dot_product_attention", attention):
        main()
    return size(of_step) + largest_chunk
