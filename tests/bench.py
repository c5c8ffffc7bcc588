# SPDX-License-Identifier: MIT
"""Speed, memory and endurance, printed with hardware and versions.

    python tests/bench.py step      # each method's step against a peer's way and the matrix rate
    python tests/bench.py input     # decoding and cropping against open_clip's; the loader
    python tests/bench.py head      # the zero-shot head against open_clip's builder
    python tests/bench.py eval      # three models scored together against one after another
    python tests/bench.py index     # reading 1.28 million file names against ImageFolder
    python tests/bench.py memory    # peak of a step by --accum and --grad-checkpointing
    python tests/bench.py bill      # operations and memory of a step, hours of a run: computed
    python tests/bench.py client    # clip_benchmark's top-1 of an exported model against ours
    python tests/bench.py soak      # runs killed again and again end as if they never were

Things compared take turns in one process; ratios are of medians. Accuracy: tests/evidence.py.
"""
import argparse
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = f"{REPO}/out/bench"
sys.path.insert(0, REPO)
import common  # noqa: E402

METHODS = {"FT": ("carft", "--lam", "0"), "CAR-FT": ("carft",),
           "FLYP": ("calft", "--oc", "0", "--sd", "0", "--cross-fnorm", "0"), "CaRot": ("calft",),
           "ARF": ("anchor",)}
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

def in_a_process(function, *args):
    """function(*args) in a new process, whose memory nothing else has touched."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()

def megabytes(key, file="/proc/self/status"):
    """What Linux says of a process. VmHWM is the most that it held; Pss is what it holds now, with
    pages that several processes share counted in parts."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024

# ---- the methods' steps --------------------------------------------------------------------------
def make_step(method, name, n, steps, *given, peer=False, around=()):
    """A function that makes the next step of a method's own script, `steps` in all, on a batch of n
    random images. The script runs in a thread that waits for its next batch between the calls; it
    scores nothing and writes no file. around: context managers of the last step. peer: as others do
    it, with prompts of 77 tokens, torch's default AdamW, and the losses read at each step."""
    script, *own = METHODS[method]
    for module in ("common", script):                       # copies of their own, to be changed
        sys.modules.pop(module, None)
    common, script = (importlib.import_module(module) for module in ("common", script))
    config, rows, AdamW = open_clip.get_model_config(name), max(n, 512), torch.optim.AdamW
    size, g = config["vision_cfg"]["image_size"], torch.Generator().manual_seed(0)
    batch = [torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=g),
             *(torch.randint(most, (n,), generator=g) for most in (100, rows, 80))]
    E = common.normalize(torch.randn(100, 80, config["embed_dim"], generator=g)).to(common.DEVICE)
    templates = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    train = common.ImageSet("train", [], open_clip.IMAGENET_CLASSNAMES[:100], templates, [],
                            np.zeros(rows, "S1"), np.zeros(rows, int))
    texts = ["a large brown dog lies on the grass beside a small red ball in the sun"] * rows
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def train_loader(images, crop, args, start, total, batch_size=None, seed=None):
        if batch_size:                                      # ARF's pairs
            yield from itertools.repeat(batch)
        for i in range(steps):
            done.release()
            go.acquire()
            with ExitStack() as stack:
                for manager in around if i == steps - 1 else ():
                    stack.enter_context(manager)
                yield batch

    def at_full_length(model, tokens, accum=1):
        tokens = F.pad(tokens, (0, 77 - tokens.shape[1])).to(common.DEVICE)
        return common.normalize(model.encode_text(tokens))

    def plain_adamw(*args, fused, **settings):
        return AdamW(*args, **settings)

    def run():
        try:
            script.main(flags.split() + ["--pretrained", "", *own, *given])
        finally:
            done.release()

    def step():
        assert thread.is_alive()
        go.release()
        done.acquire()
    flags = (f"--data . --model {name} --batch-size {n} --max-steps {steps} --epochs 9999 --warmup "
             f"0 --eval-every 0 --overwrite --out {OUT}/step --log-every {1 if peer else 50}")
    own += ["--captions", "-", "--pool", "-"] * (method == "ARF")
    common.RANK, common.signal = 1, mock.Mock()             # no bar, no file, no signal handler
    common.train_loader = train_loader
    for module, function, value in (
            (common, "read_data", (train, [train])), (common, "text_embeddings", E),
            (common, "evaluate", {}), (common.Run, "report", None),
            (script, "open_pool", (train, texts)), (script, "read_captions", [[t] for t in texts]),
            (script, "retrieve_pairs", list(range(rows)))):
        setattr(module, function, mock.Mock(return_value=value))
    common.encode_text = at_full_length if peer else common.encode_text
    with mock.patch.object(torch.optim, "AdamW", plain_adamw if peer else AdamW):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        done.acquire()                                      # it asks for its first batch
    return step

def cost(method, name, n, *given):
    """Floating point operations of a step, and the bytes that autograd keeps for its gradients."""
    storages, counter = {}, FlopCounterMode(display=False)

    def keep(t):                                            # held, so that no address comes twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    step = make_step(method, name, n, 2, *given, around=(counter, hooks))
    step()                                                  # CaRot's first step has no teacher
    torch.backends.mha.set_fastpath_enabled(False)          # its one fused operation is not counted
    step()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops(), sum(s.nbytes() for s in storages.values())

def bench_step(args):
    n, side = args.batch_size, 8192 if GPU else 2048
    a = torch.randn(side, side).to(common.DEVICE, torch.bfloat16 if GPU else torch.float32)
    rate = 2 * side ** 3 / min(take_turns(1, lambda: a @ a)[0] for _ in range(7))
    print(f"{args.model}, batch {n}, compile {args.compile}; product {rate / 1e12:.2f} TFLOP/s\n\n"
          f"{'':<8}{'images/s':>10}{'peer':>10}{'ratio':>8}{'GFLOP/image':>13}{'of the rate':>13}"
          f"{'of FT time':>12}")
    for method in METHODS:
        make = partial(make_step, method, args.model, n, args.rounds + 1)
        ours, peer = take_turns(
            args.rounds, make(*["--compile"] * args.compile), make(peer=True))
        flop, ft = cost(method, args.model, n)[0], ours if method == "FT" else ft
        print(f"{method:<8}{n / ours:>10.1f}{n / peer:>10.1f}{peer / ours:>8.2f}"
              f"{flop / n / 1e9:>13.1f}{flop / ours / rate:>12.0%}{ours / ft:>12.2f}", flush=True)

def print_peak(name, n, *given):
    """The memory of two steps: on CUDA what its allocator gave out, else the most of a process."""
    take_turns(1, make_step("FLYP", name, n, 2, *given))
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if GPU else megabytes("VmHWM") / 1024
    print(f"{' '.join(given):<32}{peak:.2f} GiB", flush=True)

def bench_memory(args):
    print(f"peak of FLYP, {args.model}, batch {args.batch_size}, in a process of its own")
    for given in ("", "--accum 2", "--accum 4", "--accum 8", "--grad-checkpointing",
                  "--accum 4 --grad-checkpointing"):
        in_a_process(print_peak, args.model, args.batch_size, *given.split())

def bench_bill(args):
    """Hours are at 40 % of an H100's dense bf16 peak. Memory is that of what autograd keeps, and 16
    bytes a parameter that is trained, 4 of another, and 2 for a copy in bf16."""
    images, rate = 10 * 1_281_167, 0.4 * 989e12
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "RN50"):
        model = common.load_model(name, "")[0]
        P, V = (sum(p.numel() for p in part.parameters()) for part in (model, model.visual))
        print(f"\n{name}, {P / 1e6:.0f} M parameters\n{'':<8}{'GFLOP/image':>12}{'hours':>8}"
              f"{'MiB/image':>11}   GiB of a batch of 512 by --accum 1 2 4 ... 64")
        fixed = {"FT": 14 * V + 4 * P, "CAR-FT": 14 * V + 8 * P, "CaRot": 22 * P}
        for method in METHODS:
            (flop, few), (_, more) = (cost(method, name, n, "--precision", "bf16") for n in (2, 6))
            one = (more - few) / 4                          # bytes an image: weights cancel
            chunk = one if method != "ARF" else chunk       # --accum has one term at a time: FLYP's
            needs = [fixed.get(method, 18 * P) + 512 // k * (chunk if k > 1 else one)
                     for k in (1, 2, 4, 8, 16, 32, 64)]
            print(f"{method:<8}{flop / 2e9:>12.1f}{flop / 2 * images / rate / 3600:>8.1f}"
                  f"{one / 2 ** 20:>11.0f}  ", *(f"{b / 2 ** 30:.1f}" for b in needs), flush=True)

# ---- images, heads, scores -----------------------------------------------------------------------
def write_photos():
    """64 JPEGs of 500 x 375 pixels, as ImageNet's, of some texture, in a ROOT; their ImageSet."""
    coarse = torch.randint(256, (64, 3, 24, 32), generator=torch.Generator().manual_seed(0)).float()
    for i, x in enumerate(F.interpolate(coarse, (375, 500), mode="bicubic")):
        x = (x + 8 * torch.randn(x.shape)).clamp(0, 255).byte()
        os.makedirs(f"{OUT}/photos/train/{i % 2}", exist_ok=True)
        torchvision.io.write_jpeg(x, f"{OUT}/photos/train/{i % 2}/{i}.jpg", 90)
    return common.read_data(flags(f"{OUT}/photos", "train"))[0]

def bench_input(args):
    torch.set_num_threads(1)
    photos, (_, crop, _, _) = write_photos(), common.load_model("ViT-B-16", "")
    _, peer, _ = open_clip.create_model_and_transforms("ViT-B-16", aug_cfg={"scale": (0.9, 1.0)})

    def load(crop, read):
        for path in photos.paths:
            crop(read(os.fsdecode(path)))
    compare("500 x 375 JPEGs to 224 crops, one core", 64, args.rounds,
            ours=partial(load, crop, common.read_image), open_clip=partial(load, peer, Image.open))
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

def bench_eval(args):
    photos, (model, _, preprocess, _) = write_photos(), common.load_model(args.model, "")

    def score(times, n):
        for _ in range(times):
            common.image_features([model] * n, [preprocess] * n, [photos], flags(), "scoring")
    compare("photographs for three models", 64, args.rounds,
            together=partial(score, 1, 3), by_turns=partial(score, 3, 1))

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
    in_a_process(print_index_memory)

def print_index_memory():
    """What the index of bench_index costs in memory, and what workers add."""
    before = megabytes("VmHWM")
    train, _ = common.read_data(flags(f"{OUT}/index"))
    print(f"{megabytes('VmHWM') - before:.0f} MB at the most, "
          f"{(train.paths.nbytes + train.labels.nbytes) / 2 ** 20:.0f} MB kept")
    common.read_image = mock.Mock(return_value=torch.zeros(3, 8, 8, dtype=torch.uint8))
    for workers in (1, 2, 4):
        given, crop = flags(workers=workers, batch_size=512), torch.nn.Identity()
        for _ in zip(range(80), common.train_loader(train, crop, given, 0, 90)):
            pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
        total = sum(megabytes("Pss", f"/proc/{pid}/smaps_rollup") for pid in pids)
        print(f"{workers} workers: {total:.0f} MB in all, shared pages counted once", flush=True)

# ---- other tools, and endurance ------------------------------------------------------------------
def bench_client(args):
    """clip_benchmark runs in an environment of its own, on the toy's val as a webdataset."""
    import calft
    import toy
    run, wds, python = f"{OUT}/client/run", f"{OUT}/client/wds", f"{OUT}/client/venv/bin"
    calft.main(["--out", run])
    subprocess.run([sys.executable, "-m", "venv", f"{OUT}/client/venv"], check=True)
    subprocess.run([f"{python}/pip", "install", "-q", "clip-benchmark", "requests", "numpy<2.3"],
                   check=True)
    val = common.read_data(flags(toy.defaults()["data"]))[1][0]
    texts = {"test/nshards.txt": ["1"], "classnames.txt": val.classnames,
             "zeroshot_classification_templates.txt": [t.format("{c}") for t in val.templates]}
    os.makedirs(f"{wds}/test", exist_ok=True)
    for name, lines in texts.items():
        Path(wds, name).write_text("\n".join(lines) + "\n")
    with tarfile.open(f"{wds}/test/0.tar", "w") as tar:
        for i, (path, label) in enumerate(zip(val.paths, val.labels)):
            Path(wds, "label").write_text(str(label))
            tar.add(os.fsdecode(path), f"{i}.png")
            tar.add(f"{wds}/label", f"{i}.cls")
    subprocess.run([
        f"{python}/clip_benchmark", "eval", "--model", f"local-dir:{run}/model", "--pretrained", "",
        "--dataset", "wds/toy", "--dataset_root", wds, "--task", "zeroshot_classification",
        "--no_amp", "--num_workers", "0", "--output", f"{wds}/result.json"], check=True)
    theirs = json.loads(Path(wds, "result.json").read_text())["metrics"]["acc1"]
    ours = json.loads(Path(run, "results.json").read_text())["sets"]["val"]["top1"]
    print(f"top-1 of the exported model on val: clip_benchmark {theirs:.6f}, ours {ours:.6f}")

def bench_soak(args):
    """Each script on a tiny ROOT, killed by SIGKILL at random, against the same run left alone."""
    import conftest
    folder = f"{OUT}/soak-{time.time():.0f}"
    model = conftest.write_clip(f"{folder}/clip")
    conftest.write_images(f"{folder}/root/train", "abcd", 20)
    pairs = "".join(f"root/train/{c}/0.png\tpicture of {c}\n" for c in "abcd")
    Path(folder, "pool.tsv").write_text("path\ttext\n" + pairs)
    recipe = (f"--data {folder}/root --model {model} --epochs 1000000 --max-steps 1500 --lr 1e-3 "
              "--batch-size 8 --warmup 2 --log-every 1 --save-every 5 --eval-every 50 --workers 1")

    def start(script, out, *own):
        return subprocess.Popen(
            [sys.executable, f"{REPO}/{script}.py", "--out", out, *recipe.split(), *own],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def size(log):
        return os.path.getsize(log) if os.path.isfile(log) else 0
    for script, *own in (("calft",), ("carft",), ("anchor", "--pool", f"{folder}/pool.tsv")):
        whole, killed, kills = f"{folder}/{script}", f"{folder}/{script}-killed", 0
        start(script, whole, *own).wait()
        while kills < args.kills // 3:
            before, process = size(f"{killed}/log.jsonl"), start(script, killed, *own)
            while process.poll() is None and size(f"{killed}/log.jsonl") == before:
                time.sleep(0.01)
            time.sleep(float(torch.rand(()) * 1.5))
            if process.poll() is not None:
                break                                       # done before its last kill
            os.killpg(process.pid, 9)
            process.wait()
            kills += 1
        start(script, killed, *own).wait()
        conftest.assert_same_run(whole, killed)
        print(f"{script}: after {kills} kills the same bit for bit", flush=True)

if __name__ == "__main__":
    benches = {name[6:]: f for name, f in list(globals().items()) if name.startswith("bench_")}
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("what", choices=list(benches))
    add("--rounds", type=int, default=7, help="turns of each of the compared")
    add("--model", default="ViT-B-16" if GPU else "ViT-B-32", help="of step, eval, memory")
    add("--batch-size", type=int, default=512 if GPU else 16, help="of step, memory")
    add("--kills", type=int, default=100, help="of soak, in all")
    add("--compile", action="store_true", help="our towers in step")
    args = parser.parse_args()
    logging.disable(logging.WARNING)                        # of random weights, which are meant
    print(system(), flush=True)
    benches[args.what](args)
