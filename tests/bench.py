# SPDX-License-Identifier: MIT
"""Speed and memory, printed with hardware and versions; several names may be given.

    python tests/bench.py step      # each method's step against a peer's way and the matrix rate
    python tests/bench.py input     # decoding and cropping against open_clip's
    python tests/bench.py loader    # images a second by the number of workers
    python tests/bench.py head      # the zero-shot head against open_clip's builder
    python tests/bench.py index     # reading 1.28 million file names against ImageFolder
    python tests/bench.py memory    # of a step by --accum and --grad-checkpointing: counted
    python tests/bench.py plan      # memory, time, workers and traffic of a run: computed

Things compared take turns in one process; ratios are of medians. Accuracy: tests/evidence.py.
`memory` and `plan` need no GPU. Where there is one, `memory` prints the measured peak as well.

What a step makes the host wait for on a GPU, by reading the code (none of it is measured):
- Only its loader, in most steps. Images come pinned from it. Tokens, labels and the constants of
  the normalisation are pinned (`to_device`), so copies are queued. The longest prompt is looked up
  in tokens that are still on the CPU. The optimiser is fused, and in fp16 it reads the scaler's
  found_inf on the GPU.
- Every --log-every steps the losses; every --save-every steps the finiteness check, tensor by
  tensor, and the copy of last.pt to the CPU. Gradients are averaged after the backward pass.
- Scoring: the features of each batch, in float32 without TF32. Captions: each token.
"""
import argparse
import gc
import itertools
import logging
import math
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from loops import METHODS, REPO, activations, lone_loop, operations, without_data
import common  # noqa: E402

OUT = f"{REPO}/out/bench"
GPU = common.DEVICE.type == "cuda"

def system():
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), "?")
    device = torch.cuda.get_device_name() if GPU else f"{cpu}, {os.cpu_count()} cores"
    return (f"{device}; Python {sys.version.split()[0]}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, open_clip {open_clip.__version__}")

def flags(data=None, val=None, workers=0, batch_size=32):
    """What common's readers and loaders want to know of a script's flags."""
    return argparse.Namespace(data=data, train=["train"], val=val, val_frac=0.2, eval=[], seed=0,
                              workers=workers, batch_size=batch_size)

def clock():
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()

def take_turns(rounds, *functions):
    """Median seconds of each function. A round is a call of each; the first one is to warm up."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for f, t in zip(functions, times):
            start = clock()
            f()
            t.append(clock() - start)
    return [np.median(t[1:]) for t in times]

def compare(what, count, rounds, **functions):
    """Print how many of `count` things two functions do in a second."""
    (ours, peer), (a, b) = functions, take_turns(rounds, *functions.values())
    print(f"{what}: {ours} {count / a:,.1f} a second, {peer} {count / b:,.1f}, ratio {b / a:.2f}")

# ---- the methods' steps --------------------------------------------------------------------------
def make_step(*args, steps, **kw):
    """A function that makes the next step of lone_loop(*args), `steps` in all. The loop runs in a
    thread that waits for its next batch between the calls."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def turns():
        for _ in range(steps):
            done.release()
            yield go.acquire()

    def run():
        try:
            main()
        finally:
            done.release()

    def step():
        assert thread.is_alive()
        go.release()
        done.acquire()
    main, _ = lone_loop(*args[:3], turns(), *args[3:], **kw)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    done.acquire()                                          # it asks for its first batch
    return step

def bench_step(args):
    n, side = args.batch_size or (512 if GPU else 16), 8192 if GPU else 2048
    name = args.model or ("ViT-B-16-quickgelu" if GPU else "ViT-B-32-quickgelu")
    a = torch.randn(side, side).to(common.DEVICE, torch.bfloat16 if GPU else torch.float32)
    rate = 2 * side ** 3 / min(take_turns(1, lambda: a @ a)[0] for _ in range(7))
    print(f"{name}, batch {n}, compile {args.compile}; product {rate / 1e12:.2f} TFLOP/s\n\n"
          f"{'':<8}{'images/s':>10}{'peer':>10}{'ratio':>8}{'GFLOP/image':>13}{'of the rate':>13}"
          f"{'of FT time':>12}")
    for method in METHODS:
        make = partial(make_step, method, name, n, steps=args.rounds + 1)
        ours, peer = take_turns(
            args.rounds, make(*["--compile"] * args.compile), make(peer=True))
        flop, ft = operations(method, name), ours if method == "FT" else ft
        print(f"{method:<8}{n / ours:>10.1f}{n / peer:>10.1f}{peer / ours:>8.2f}"
              f"{flop / 1e9:>13.1f}{flop * n / ours / rate:>12.0%}{ours / ft:>12.2f}", flush=True)

def measured(*args):
    """The most bytes that CUDA's allocator gave out in two steps of lone_loop(*args)."""
    torch.cuda.reset_peak_memory_stats()
    try:
        lone_loop(*args)[0]()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        gc.collect()
        torch.cuda.empty_cache()

def sizes(name):
    """Parameters of a model and of its image tower, operations for an image's features, crop."""
    with without_data(common, "meta"), FlopCounterMode(display=False) as counter:
        model, crop, *_ = common.load_model(name, "")
        common.encode_image(model, torch.zeros(1, 3, *crop.size, device="meta"))
    P, V = (sum(p.numel() for p in part.parameters()) for part in (model, model.visual))
    return P, V, counter.get_total_flops(), crop

def print_memory(name, n, measure):
    """GiB of a step on n images: `activations`, and in float32 the weights, those of a teacher or
    an untuned model, the gradients and two moments. With `measure` what CUDA gave out as well."""
    P, V, *_ = sizes(name)
    fixed = {"FT": 4 * P + 12 * V, "CAR-FT": 8 * P + 12 * V, "CaRot": 20 * P}
    print(f"\n{name}, GiB for {n} images in bf16, counted{' (measured)' * measure}\n{'':<32}"
          + "".join(f"{method:>15}" for method in METHODS))
    for flag in ("--accum 1", "--accum 2", "--accum 4", "--accum 16",
                 "--accum 1 --grad-checkpointing", "--accum 4 --grad-checkpointing"):
        cells, (_, accum, *given) = [], flag.split()
        for method in METHODS:
            if method not in ("CAR-FT", "CaRot"):           # they hold what FT and FLYP hold
                held = activations(method, name, n, int(accum), *given)
            cells.append(f"{(held + fixed.get(method, 16 * P)) / 2 ** 30:.1f}")
            if measure:
                peak = measured(method, name, n, range(2), "--precision", "bf16", *flag.split())
                cells[-1] += f" ({peak / 2 ** 30:.1f})"
        print(f"{flag:<32}", *(f"{cell:>15}" for cell in cells), sep="", flush=True)

def bench_memory(args):
    for name in ([args.model] if args.model else
                 ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu")):
        print_memory(name, args.batch_size or 512, GPU)

def bench_plan(args):
    """Computed, but for the rate of decoding. ImageNet has 1,281,167 training images, and 166,963
    are scored: val, V2, R, A, Sketch, and those of ObjectNet that are of its classes."""
    name, gpus, N = args.model or "ViT-B-16-quickgelu", args.gpus, args.batch_size or 512
    (P, V, forward, crop), photos, rows = sizes(name), write_photos(), []
    torch.set_num_threads(1)
    core = 64 / take_turns(args.rounds, partial(load_all, photos, crop, read_image))[0]
    print_memory(name, N // gpus, False)
    for method in METHODS:
        flop, again = operations(method, name), operations(method, name, "--accum", "2")
        rate = 0.45 * 989e12 * gpus / flop                  # images/s
        load, trained = rate * (1 + (method == "ARF")), V if "FT" in method else P
        rows.append((N * flop / 1e12, N * again / 1e12, 1_281_167 / rate, load, load / core / gpus,
                     8 * trained * (gpus - 1) / gpus / 1e9))
    print(f"\n{gpus} H100s, {N} images a step; bf16 at 45 % of 989 TFLOP/s, float32 at 75 % of 67; "
          f"a core decodes and crops {core:.0f} images/s")
    for what, row in zip(("TFLOP a step", "TFLOP a step with --accum", "seconds an epoch, ImageNet",
                          "images/s to load", "workers a GPU for that", "GB a step sent by a GPU"),
                         zip(*rows)):
        print(f"{what:<32}", *(f"{x:>15,.{1 if x < 100 else 0}f}" for x in row), sep="")
    fp32, bf16 = (166_963 * forward / r / gpus for r in (0.75 * 67e12, 0.45 * 989e12))
    print(f"seconds to score val and five shifts, twice a run: {fp32:.1f} in float32, as we do, "
          f"{bf16:.1f} in bf16; on one GPU {fp32 * gpus:.0f} and {bf16 * gpus:.0f}")

# ---- images, heads, scores -----------------------------------------------------------------------
def write_photos():
    """64 JPEGs of 500 x 375 pixels, as ImageNet's, of some texture, in a ROOT; their ImageSet."""
    coarse = torch.randint(256, (64, 3, 24, 32), generator=torch.Generator().manual_seed(0)).float()
    for i, x in enumerate(F.interpolate(coarse, (375, 500), mode="bicubic")):
        x = (x + 8 * torch.randn(x.shape)).clamp(0, 255).byte()
        os.makedirs(f"{OUT}/photos/train/{i % 2}", exist_ok=True)
        torchvision.io.write_jpeg(x, f"{OUT}/photos/train/{i % 2}/{i}.jpg", 90)
    return common.read_data(flags(f"{OUT}/photos", "train"))[0]

def read_image(path):
    return common.read_image(path)[0]

def load_all(photos, crop, read):
    for path in photos.paths:
        crop(read(os.fsdecode(path)))

def bench_input(args):
    torch.set_num_threads(1)
    photos, (_, crop, _, _) = write_photos(), common.load_model("ViT-B-16", "")
    _, peer, _ = open_clip.create_model_and_transforms("ViT-B-16", aug_cfg={"scale": (0.9, 1.0)})
    compare("500 x 375 JPEGs to 224 crops, one core", 64, args.rounds,
            ours=partial(load_all, photos, crop, read_image),
            open_clip=partial(load_all, photos, peer, Image.open))

def bench_loader(args):
    photos, (_, crop, _, _) = write_photos(), common.load_model("ViT-B-16", "")
    for workers in [w for w in (0, 1, 2, 4, 8, 16) if w <= os.cpu_count()]:
        loader = common.train_loader(photos, crop, flags(workers=workers), 0, 10 * args.rounds + 10)
        list(itertools.islice(loader, 10))                  # until the workers are up
        start, count = clock(), sum(len(images) for images, *_ in loader)
        print(f"loader, {workers} workers: {count / (clock() - start):.0f} a second", flush=True)

def bench_head(args):
    model, *_, tokenizer = common.load_model("ViT-B-32", "")
    texts = open_clip.IMAGENET_CLASSNAMES[::100], open_clip.OPENAI_IMAGENET_TEMPLATES
    peer = partial(open_clip.build_zero_shot_classifier, device=common.DEVICE)
    compare("ViT-B-32, 10 classes x 80 prompts", 800, min(args.rounds, 3),
            ours=partial(common.text_embeddings, model, tokenizer, *texts),
            open_clip=partial(peer, model, tokenizer, *texts))

def bench_index(args):
    """ROOT has 1000 classes of 1281 empty files."""
    for k in range(1000) if not os.path.isdir(f"{OUT}/index/train/n00000999") else ():
        for part, count in (("val", 1), ("train", 1281)):
            folder = Path(OUT, "index", part, f"n{k:08d}")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (folder / f"{folder.name}_{i}.JPEG").touch()
    compare("of 1,281,000 files", 1281e3, min(args.rounds, 3),
            ours=partial(common.read_data, flags(f"{OUT}/index")),
            ImageFolder=partial(torchvision.datasets.ImageFolder, f"{OUT}/index/train"))

if __name__ == "__main__":
    benches = {name[6:]: f for name, f in list(globals().items()) if name.startswith("bench_")}
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("what", choices=list(benches), nargs="+")
    add("--rounds", type=int, default=7, help="turns of each of the compared")
    add("--model", help="of step, memory, plan")
    add("--batch-size", type=int, help="of step, memory, plan: of all GPUs")
    add("--gpus", type=int, default=8, help="of plan")
    add("--compile", action="store_true", help="our towers in step")
    args = parser.parse_args()
    logging.disable(logging.WARNING)                        # of random weights, which are meant
    print(system(), flush=True)
    for what in args.what:
        benches[what](args)
