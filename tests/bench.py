# SPDX-License-Identifier: MIT
"""Speed and memory, printed with hardware and versions. Several names may be given.

    python tests/bench.py step      # each method's step against a peer's way and the matrix rate
    python tests/bench.py input     # decoding and cropping against open_clip's
    python tests/bench.py loader    # images a second by the number of workers
    python tests/bench.py head      # the zero-shot head against open_clip's builder
    python tests/bench.py busy      # the toy's steps beside other programs, by how threads wait
    python tests/bench.py index     # reading 1.28 million file names against ImageFolder
    python tests/bench.py memory    # of a step by --accum: counted
    python tests/bench.py plan      # memory, time, workers and traffic of a run: computed

What is compared takes turns in one process, and ratios are of medians. ARF's captions and pairs
have 8 to 77 tokens. `memory` and `plan` need no GPU; where there is one, `memory` prints the
measured peak, too. tests/evidence.py measures accuracy.

What a step makes the host wait for on a GPU, by reading the code and on fake tensors (by
test_cuda.py), not measured:
- In every step, its loader. Images and labels come pinned from it. The scripts cut prompts,
  captions and pairs at the longest of a batch while they are on the CPU, and pin them. So these
  copies are queued. The normalisation divides by numbers, which need no copy.
- Every --log-every steps, the losses. Every --save-every steps, the check that weights are finite,
  tensor by tensor, and the copy of last.pt to the CPU.
- Nothing else: the optimiser is fused, and in fp16 it reads the scaler's found_inf on the GPU;
  clipping multiplies by a number that stays there. Gradients are averaged after the backward pass.
- Scoring: the features of each set, in float32 without TF32, and each batch of a head's prompts.
"""
from loops import METHODS, REPO, activations, lone_loop, operations, without_data
import common                                               # before torch, see its first lines

import argparse
import gc
import itertools
import json
import logging
import math
import os
import sys
import subprocess
import tempfile
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

OUT = f"{REPO}/out/bench"
GPU = common.DEVICE.type == "cuda"

def system():
    """Return the names and versions of what runs this."""
    device = "a processor without a name"
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                device = f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    if GPU:
        device = torch.cuda.get_device_name()
    return (f"{device}; Python {sys.version.split()[0]}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, open_clip {open_clip.__version__}")

def flags(data=None, val=None, workers=0, batch_size=32):
    """Return the flags that common's readers and loaders look at."""
    return argparse.Namespace(data=data, train=["train"], val=val, val_frac=0.2, eval=[], seed=0,
                              workers=workers, batch_size=batch_size)

def clock():
    """Return the seconds at which all that was queued has ended."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()

def take_turns(rounds, *functions):
    """Return the median seconds of each function. A round is a call of each; one more round comes
    first, to warm up."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, seconds in zip(functions, times):
            start = clock()
            function()
            seconds.append(clock() - start)
    return [np.median(seconds[1:]) for seconds in times]

def compare(what, count, rounds, **functions):
    """Print how many of `count` things each of two functions does in a second."""
    ours, peer = functions
    a, b = take_turns(rounds, *functions.values())
    print(f"{what}: {ours} {count / a:,.1f} a second, {peer} {count / b:,.1f}, ratio {b / a:.2f}")

# ---- the methods' steps --------------------------------------------------------------------------
def make_step(method, name, n, *given, steps, peer=False):
    """Return a function that makes the next step of a lone_loop, of `steps` in all. The loop runs
    in a thread that waits for its next batch between the calls."""
    go = threading.Semaphore(0)
    done = threading.Semaphore(0)

    def turns():
        for _ in range(steps):
            done.release()
            go.acquire()
            yield

    def run():
        try:
            main()
        finally:
            done.release()

    def step():
        assert thread.is_alive()
        go.release()
        done.acquire()

    main, _ = lone_loop(method, name, n, turns(), *given, peer=peer)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    done.acquire()                                          # it asks for its first batch
    return step

def matrix_rate():
    """Return the operations a second of a product of large matrices, the best of seven: in bf16 on
    a GPU, in float32 on a CPU."""
    side = 2048
    dtype = torch.float32
    if GPU:
        side = 8192
        dtype = torch.bfloat16
    a = torch.randn(side, side).to(common.DEVICE, dtype)
    seconds = min(take_turns(1, lambda: a @ a)[0] for _ in range(7))
    return 2 * side ** 3 / seconds

def bench_step(args):
    n = args.batch_size or 16
    name = args.model or "ViT-B-32-quickgelu"
    if GPU:
        n = args.batch_size or 512
        name = args.model or "ViT-B-16-quickgelu"
    ours_flags = []
    if args.compile:
        ours_flags = ["--compile"]
    rate = matrix_rate()
    print(f"{name}, batch {n}, compile {args.compile}; product {rate / 1e12:.2f} TFLOP/s\n\n"
          f"{'':<8}{'images/s':>10}{'peer':>10}{'ratio':>8}{'GFLOP/image':>13}{'of the rate':>13}"
          f"{'of FT time':>12}")
    seconds = {}
    for method in METHODS:
        make = partial(make_step, method, name, n, steps=args.rounds + 1)
        ours, peer = take_turns(args.rounds, make(*ours_flags), make(peer=True))
        seconds[method] = ours
        flop = operations(method, name, n)
        print(f"{method:<8}{n / ours:>10.1f}{n / peer:>10.1f}{peer / ours:>8.2f}"
              f"{flop / n / 1e9:>13.1f}{flop / ours / rate:>12.0%}{ours / seconds['FT']:>12.2f}",
              flush=True)

# ---- memory, and the plan of a run ---------------------------------------------------------------
def measured(method, name, n, accum):
    """Return the largest number of bytes that CUDA's allocator gave out in two steps."""
    main, _ = lone_loop(
        method, name, n, range(2), "--precision", "bf16", "--accum", str(accum))
    torch.cuda.reset_peak_memory_stats()
    try:
        main()
        return torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        del main
        gc.collect()
        torch.cuda.empty_cache()

def sizes(name):
    """Return the parameters of a model, those of its image tower, the operations for the features
    of an image, and the crop for training."""
    with without_data(common, "meta"), FlopCounterMode(display=False) as counter:
        model, crop, *_ = common.load_model(name, "")
        common.encode_image(model, torch.zeros(1, 3, *crop.size, device="meta"))
    P = sum(p.numel() for p in model.parameters())
    V = sum(p.numel() for p in model.visual.parameters())
    return P, V, counter.get_total_flops(), crop

def print_memory(name, n, measure):
    """Print the GiB of a step on n images: `activations`, and in float32 the weights, those of a
    teacher or an untuned model, the gradients and two moments. With `measure`, print what CUDA gave
    out as well."""
    P, V, *_ = sizes(name)
    both_models = 8 * P                                     # the second one even where it is unused
    fixed = {
        "FT": both_models + 12 * V,
        "CAR-FT": both_models + 12 * V,
        "FLYP": both_models + 12 * P,
        "CaRot": both_models + 12 * P,
        "ARF": 16 * P}
    same_activations = {"CAR-FT": "FT", "CaRot": "FLYP"}    # what lacks a gradient is not held
    title = f"{name}, GiB for {n} images in bf16, counted"
    if measure:
        title += " (measured)"
    print(f"\n{title}\n{'':<12}", *(f"{method:>15}" for method in METHODS), sep="")
    for accum in (1, 2, 4, 8, 16):
        if n % accum:                                       # the scripts refuse it
            break
        held = {}
        line = f"--accum {accum:<4}"
        for method in METHODS:
            if method in same_activations:
                held[method] = held[same_activations[method]]
            else:
                held[method] = activations(method, name, n, accum)
            cell = f"{(held[method] + fixed[method]) / 2 ** 30:.1f}"
            if measure:
                cell += f" ({measured(method, name, n, accum) / 2 ** 30:.1f})"
            line += f"{cell:>15}"
        print(line, flush=True)

def bench_memory(args):
    names = ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"]
    if args.model:
        names = [args.model]
    for name in names:
        print_memory(name, args.batch_size or 512, measure=GPU)

def bench_plan(args):
    """Compute all but the rate of decoding. ImageNet has 1,281,167 training images, and 166,963 are
    scored: val, V2, R, A, Sketch, and those of ObjectNet that are of its classes."""
    name = args.model or "ViT-B-16-quickgelu"
    N = args.batch_size or 512
    gpus = args.gpus
    P, V, forward, crop = sizes(name)
    bf16 = 0.45 * 989e12 * gpus                             # operations a second
    fp32 = 0.75 * 67e12 * gpus
    photos = write_photos()
    torch.set_num_threads(1)
    core = 64 / take_turns(args.rounds, partial(load_all, photos, crop, read_image))[0]
    print_memory(name, N // gpus, measure=False)

    rows = {}                                               # {what: one number for each method}
    for method in METHODS:
        flop = operations(method, name, N)
        trained = V if method in ("FT", "CAR-FT") else P
        images_a_step = 2 * N if method == "ARF" else N     # it loads pairs as well
        rate = bf16 / flop                                  # steps a second
        column = {
            "TFLOP a step": flop / 1e12,
            "TFLOP a step with --accum": operations(method, name, N, "--accum", "2") / 1e12,
            "seconds an epoch, ImageNet": 1_281_167 / N / rate,
            "images/s to load": images_a_step * rate,
            "workers a GPU for that": images_a_step * rate / core / gpus,
            "GB a step sent by a GPU": 8 * trained * (gpus - 1) / gpus / 1e9}
        for what, number in column.items():
            rows.setdefault(what, []).append(number)
    print(f"\n{gpus} H100s, {N} images a step; bf16 at 45 % of 989 TFLOP/s, float32 at 75 % of 67; "
          f"a core decodes and crops {core:.0f} images/s")
    for what, numbers in rows.items():
        digits = 1 if max(numbers) < 100 else 0
        print(f"{what:<32}", *(f"{number:>15,.{digits}f}" for number in numbers), sep="")
    work = 166_963 * forward
    print(f"seconds to score val and five shifts, twice a run: {work / fp32:.1f} in float32, as we "
          f"do, {work / bf16:.1f} in bf16; on one GPU {work / fp32 * gpus:.0f} and "
          f"{work / bf16 * gpus:.0f}")

# ---- images, heads, file names -------------------------------------------------------------------
def write_photos():
    """Write a ROOT of 64 JPEGs of some texture, 500 x 375 pixels as ImageNet's, and return them as
    an ImageSet."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (64, 3, 24, 32), generator=generator).float()
    for i, x in enumerate(F.interpolate(coarse, (375, 500), mode="bicubic")):
        x = (x + 8 * torch.randn(x.shape)).clamp(0, 255).byte()
        os.makedirs(f"{OUT}/photos/train/{i % 2}", exist_ok=True)
        torchvision.io.write_jpeg(x, f"{OUT}/photos/train/{i % 2}/{i}.jpg", 90)
    args = flags(f"{OUT}/photos", val="train")
    args.train = []                                         # all of them: val stands in for it
    return common.read_data(args)[0]

def read_image(path):
    return common.read_image(path)[0]

def load_all(photos, crop, read):
    for path in photos.paths:
        crop(read(os.fsdecode(path)))

def bench_input(args):
    torch.set_num_threads(1)
    photos = write_photos()
    _, crop, *_ = common.load_model("ViT-B-16", "")
    _, peer, _ = open_clip.create_model_and_transforms("ViT-B-16", aug_cfg={"scale": (0.9, 1.0)})
    compare("500 x 375 JPEGs to 224 crops, one core", 64, args.rounds,
            ours=partial(load_all, photos, crop, read_image),
            open_clip=partial(load_all, photos, peer, Image.open))

def bench_loader(args):
    photos = write_photos()
    _, crop, *_ = common.load_model("ViT-B-16", "")
    for workers in (0, 1, 2, 4, 8, 16):
        if workers > os.cpu_count():
            break
        total = 10 + 10 * args.rounds
        batches = common.train_loader(photos, crop, flags(workers=workers), 0, total)
        for _ in itertools.islice(batches, 10):             # until the workers are up
            pass
        start = clock()
        count = sum(len(images) for images, *_ in batches)
        print(f"loader, {workers} workers: {count / (clock() - start):.0f} a second", flush=True)

def bench_head(args):
    model, *_, tokenizer = common.load_model("ViT-B-32", "")
    texts = open_clip.IMAGENET_CLASSNAMES[::100], open_clip.OPENAI_IMAGENET_TEMPLATES
    peer = partial(open_clip.build_zero_shot_classifier, device=common.DEVICE)
    def ours():
        common.tokenize_once.cache_clear()                  # as the first head of a run
        common.text_embeddings(model, tokenizer, *texts)
    compare("ViT-B-32, 10 classes x 80 prompts", 800, min(args.rounds, 3),
            ours=ours, open_clip=partial(peer, model, tokenizer, *texts))

def toy_seconds(policy):
    """Return the seconds of 40 steps of calft.py on the toy, with this OMP_WAIT_POLICY."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            [sys.executable, f"{REPO}/calft.py", "--out", out, "--max-steps", "41", "--warmup", "5",
             "--log-every", "40", "--eval-every", "0"],
            env={**os.environ, "OMP_WAIT_POLICY": policy}, check=True, capture_output=True)
        lines = Path(out, "log.jsonl").read_text().splitlines()
    first, last = map(json.loads, lines)
    return 40 * 64 / last["images_per_s"]

def bench_busy(args):
    cores = len(os.sched_getaffinity(0))
    seconds = {}                                            # {(policy, beside loops): [seconds]}
    for _ in range(min(args.rounds, 3)):
        for policy in ("", "PASSIVE"):                      # "" is as if it were not set
            for loops in (0, cores):
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                        for _ in range(loops)]
                try:
                    seconds.setdefault((policy, loops), []).append(toy_seconds(policy))
                finally:
                    for process in busy:
                        process.kill()
    for policy in ("", "PASSIVE"):
        alone = np.median(seconds[policy, 0])
        beside = np.median(seconds[policy, cores])
        print(f"40 steps of the toy, OMP_WAIT_POLICY={policy!r}: alone {alone:.1f} s, beside "
              f"{cores} busy loops {beside:.1f} s, ratio {beside / alone:.2f}")

def write_index():
    """Write a ROOT of 1000 classes: 1281 empty files of each in train, one in val."""
    for part, count in (("val", 1), ("train", 1281)):
        for k in range(1000):
            folder = Path(OUT, "index", part, f"n{k:08d}")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (folder / f"{folder.name}_{i}.JPEG").touch()

def bench_index(args):
    if not os.path.isdir(f"{OUT}/index/train/n00000999"):
        write_index()
    compare("of 1,281,000 files", 1281e3, min(args.rounds, 3),
            ours=partial(common.read_data, flags(f"{OUT}/index")),
            ImageFolder=partial(torchvision.datasets.ImageFolder, f"{OUT}/index/train"))

def main():
    benches = {name.removeprefix("bench_"): function for name, function in globals().items()
               if name.startswith("bench_")}
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

if __name__ == "__main__":
    main()
