# SPDX-License-Identifier: MIT
"""Speed, memory and endurance, each printed with versions and hardware. Ratios: runs that take turns in one process.

    python tests/bench.py step       # each method's step against a peer's, and against the matrix rate (MFU)
    python tests/bench.py input      # decoding and cropping against open_clip's transform; the loader by workers
    python tests/bench.py head       # the zero-shot head against open_clip's builder
    python tests/bench.py eval       # evaluate.py's images/s, one model and three
    python tests/bench.py memory     # peak memory of a step by --accum and --grad-checkpointing
    python tests/bench.py activations  # what autograd keeps of an image, and what batches need: computed
    python tests/bench.py bill       # operations of each method's step, and hours of an ImageNet run: computed
    python tests/bench.py index      # memory and time to index 1.28 million images
    python tests/bench.py client     # clip_benchmark, in an environment of its own, on an exported model
    python tests/bench.py soak       # runs killed again and again end as if they never were

Accuracy and calibration are in tests/evidence.py.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
sys.path[:0] = [HERE, REPO]


METHODS = ("FT", "CAR-FT", "FLYP", "CaRot", "ARF")


def system():
    import open_clip
    import torch
    import torchvision
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?") \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    return (f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, open_clip {open_clip.__version__}")


# ---- speed

def device_of():
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device):
    if device.type == "cuda":
        import torch
        torch.cuda.synchronize()


def take_turns(functions, rounds, device):
    """Median seconds of each function, {name: seconds}; a round is one call of each, after a round to warm up."""
    import time
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, f in functions.items():
            synchronise(device)
            start = time.perf_counter()
            f()
            synchronise(device)
            times[name] += [time.perf_counter() - start] * (i > 0)
    return {name: statistics.median(t) for name, t in times.items()}


def make_steps(name, model_name, batch, precision, device, compile_, peer):
    """A function that makes one step of method `name` as its script does, or as a peer would: full length text,
    default AdamW, no compile, the loss read each step."""
    import copy

    import torch
    import torch.nn.functional as F

    import calft
    import carft
    import common
    torch.manual_seed(0)
    model, *_, tokenizer = common.load_model(model_name, "", device)
    side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    M, K = 80, 100
    templates, names = list(common.open_clip.OPENAI_IMAGENET_TEMPLATES), common.open_clip.IMAGENET_CLASSNAMES[:K]
    tokens = common.prompts(tokenizer, names, templates)
    other = copy.deepcopy(model).requires_grad_(False) if name in ("CaRot", "CAR-FT") else None
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=g)
    labels, draws = torch.randint(0, K, (batch,), generator=g), torch.randint(0, M, (batch,), generator=g)
    captions = tokenizer(["a large brown dog lies on the grass beside a small red ball in the sun"] * batch)
    prepare = common.to_input(model, device)
    tau = model.logit_scale.exp().detach()
    W_cls = torch.nn.Parameter(F.normalize(torch.randn(K, tokens_dim(model), device=device), dim=-1))
    W_ctx = F.normalize(torch.randn(M, W_cls.shape[1], device=device), dim=-1)
    trained = [*model.visual.parameters(), W_cls] if name in ("FT", "CAR-FT") else list(model.parameters())
    if name in ("FT", "CAR-FT"):
        model.requires_grad_(False).visual.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, 1e-5, weight_decay=0.1, **({} if peer else {"fused": True}))
    if compile_ and not peer:
        for m in (model, other):
            if m is not None:
                common.prepare_towers(m, argparse.Namespace(grad_checkpointing=False, compile=True, model=model_name))
    text_of = (lambda m, t: F.normalize(m.encode_text(t.to(device)).float(), dim=-1)) if peer else common.encode_text
    frozen = torch.no_grad if peer else torch.inference_mode

    def step():
        x, y, text = prepare(images), labels.to(device), tokens[labels, draws]
        with common.autocast(device, precision):
            u = common.encode_image(model, x)
            v = text_of(model, text) if name not in ("FT", "CAR-FT") else None
        if v is None:
            loss = F.cross_entropy(tau * u @ W_cls.T, y)
            if name == "CAR-FT":
                with frozen(), common.autocast(device, precision):
                    u0 = common.encode_image(other, x)
                loss = loss + carft.context_kl(tau * u0 @ W_ctx.T, tau * u @ W_ctx.T)
        else:
            S = common.similarity(u, v, model.logit_scale.exp())
            loss = common.clip_loss(S)
        if name == "CaRot":
            W_v, W_t = calft.projections(model)
            with frozen(), common.autocast(device, precision):
                a, b = common.encode_image(other, x), text_of(other, text)
            S_ema = common.similarity(a, b, other.logit_scale.exp())
            loss = (loss + 0.2 * calft.orthogonality(W_v) + 0.05 * calft.cross_frobenius(W_v, W_t)
                    + 1.5 * calft.self_distillation(S, S_ema))
        if name == "ARF":
            with common.autocast(device, precision):
                c = text_of(model, captions)
                a, b = common.encode_image(model, x.flip(0)), text_of(model, captions)
            loss = loss + common.contrastive_loss(u, c, tau) + common.contrastive_loss(a, b, tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if peer:
            loss.item()
    return step


def tokens_dim(model):
    return getattr(model, "text", model).text_projection.shape[1]


def operations(name, model, batch, precision, device):
    """Floating point operations of one step of method `name`, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)               # its one fused operation is not counted
    with counter:
        make_steps(name, model, batch, precision, device, False, peer=False)()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def bench_bill(args):
    """What ten epochs of ImageNet cost on an H100, from the operations of a step: computed, not measured."""
    images, rate = 10 * 1_281_167, 0.4 * 989e12                  # 40 % of an H100's dense bf16 peak
    print(f"GFLOP an image, and hours on one H100 at 40 % of its 989 TFLOP/s in bf16; {system()}")
    for model in [args.model] if args.model else ["ViT-B-16", "ViT-L-14", "RN50"]:
        work = {name: operations(name, model, 2, "fp32", device_of()) / 2 for name in METHODS}
        print(f"{model:<10}" + "".join(f"{m:>8} {w / 1e9:.0f}, {w * images / rate / 3600:.1f} h" for m, w in work.items()),
              flush=True)


def bench_step(args):
    """Images a second of each method's step, the ratio to a peer's, and the share of the measured matrix rate."""
    import torch
    device = device_of()
    model, batch, precision = ("ViT-B-16", 512, "bf16") if device.type == "cuda" else ("ViT-B-32", 16, "fp32")
    model, batch = args.model or model, args.batch_size or batch
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32) for _ in "ab")
    rate = max(2 * n ** 3 / take_turns({"product": lambda: a @ b}, 1, device)["product"] for _ in range(7))
    print(f"{model}, batch {batch}, {precision}, compile {args.compile}; {system()}")
    print(f"{n}-cube product: {rate / 1e12:.2f} TFLOP/s\n")
    print(f"{'':<8}{'images/s':>10}{'peer':>10}{'ratio':>8}{'GFLOP/image':>13}{'of the rate':>13}{'of FT time':>12}")
    ft = None
    for name in METHODS:
        ours = make_steps(name, model, batch, precision, device, args.compile, peer=False)
        peer = make_steps(name, model, batch, precision, device, args.compile, peer=True)
        work = operations(name, model, batch, precision, device)
        t = take_turns({"ours": ours, "peer": peer}, args.rounds, device)
        ft = ft or t["ours"]
        print(f"{name:<8}{batch / t['ours']:>10.1f}{batch / t['peer']:>10.1f}{t['peer'] / t['ours']:>8.2f}"
              f"{work / batch / 1e9:>13.1f}{work / t['ours'] / rate:>12.0%}{t['ours'] / ft:>12.2f}", flush=True)
        del ours, peer


def bench_activations(args):
    """Bytes that autograd keeps of an image and its prompt in bf16, and what that makes of whole batches: computed."""
    import torch

    import common
    print(f"bf16, prompts of 16 tokens; {system()}")
    for name in [args.model] if args.model else ["ViT-B-32", "ViT-B-16", "ViT-L-14"]:
        model, *_, tokenizer = common.load_model(name, "", torch.device("cpu"))
        side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
        text = tokenizer(["a photo of a large brown dog with a very small red ball ."])

        def kept(n, both):
            """Bytes of distinct tensors saved for the backward pass of n images (and prompts)."""
            alive = {}                                           # kept, so that no address is used twice

            def keep(t):
                alive[t.untyped_storage().data_ptr()] = t
                return t
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), common.autocast(torch.device("cpu"), "bf16"):
                out = [common.encode_image(model, torch.randn(n, 3, side, side))]
                out += [common.encode_text(model, text.expand(n, -1))] if both else []
            return sum(t.untyped_storage().nbytes() for t in alive.values())
        both, image = ((kept(6, both) - kept(2, both)) / 4 for both in (True, False))    # weights cancel
        P, V = (sum(p.numel() for p in m.parameters()) for m in (model, model.visual))
        print(f"{name}: {P / 1e6:.0f} M parameters, {both / 2**20:.0f} MiB an image and prompt, {image / 2**20:.0f} an image")
        for accum in (1, 2, 4, 8, 16, 32, 64):                   # 16 bytes a parameter: weight, gradient, two moments
            n = 512 // accum
            needs = {"FLYP": 18 * P + n * both, "CaRot": 22 * P + n * both, "CAR-FT": 18 * V + 8 * P + n * image,
                     "ARF": 18 * P + n * both * (2 if accum == 1 else 1)}
            print(f"  batch 512, --accum {accum:>2}: " + ", ".join(f"{k} {v / 2**30:.1f} GiB" for k, v in needs.items()))


def bench_memory(args):
    """Peak memory of a CaRot step: on CUDA as the allocator counts it, on a CPU as the process's high-water mark."""
    device = device_of()
    model, batch = args.model or ("ViT-B-16" if device.type == "cuda" else "ViT-B-32"), args.batch_size or (
        512 if device.type == "cuda" else 64)
    precision = "bf16" if device.type == "cuda" else "fp32"
    print(f"CaRot's student, {model}, batch {batch}, {precision}; {system()}")
    for flags in ([1, 0], [2, 0], [4, 0], [8, 0], [1, 1], [4, 1]):
        code = MEMORY.format(repo=REPO, model=model, batch=batch, precision=precision, accum=flags[0], check=bool(flags[1]))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        said = done.stdout.strip() or done.stderr.strip().splitlines()[-1][:80]
        print(f"--accum {flags[0]}{' --grad-checkpointing' * flags[1]:<24}{said}", flush=True)


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {repo!r})
import common
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model, *_, tokenizer = common.load_model({model!r}, "", device)
if {check}:
    model.set_grad_checkpointing()
optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
side = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
x, text = torch.randn({batch}, 3, side, side, device=device), tokenizer(["a photo of the large brown dog."] * {batch})
def peak():
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / 2**30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()
before = peak()
with common.autocast(device, {precision!r}):
    u, v = common.encode_image(model, x, {accum}), common.encode_text(model, text, {accum})
common.contrastive_loss(u, v, model.logit_scale.exp()).backward()
optimizer.step()
print(f"peak {{peak():.2f}} GiB, of them {{peak() - before:.2f}} for the step")
"""


def bench_input(args):
    """Decoding and cropping on one core against open_clip's transform, and the whole loader by worker count."""
    import io
    import time

    import numpy as np
    import open_clip
    import torch
    from PIL import Image

    import common
    torch.set_num_threads(1)
    folder = os.path.join(REPO, "out", "bench", "jpeg", "a")
    os.makedirs(folder, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(64):                                          # 500 x 375 as ImageNet's, of some texture
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        noise = rng.normal(0, 8, (375, 500, 3))
        pixels = np.clip(np.asarray(small.resize((500, 375), Image.BICUBIC)) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(os.path.join(folder, f"{i}.jpg"), quality=90)
    paths = sorted(os.path.join(folder, f) for f in os.listdir(folder))
    model, preprocess, _, _ = common.load_model("ViT-B-16", "", torch.device("cpu"))
    peer = open_clip.create_model_and_transforms("ViT-B-16", aug_cfg={"scale": (0.9, 1.0)})[1]
    del model

    def ours():
        for p in paths:
            preprocess(common.read_image(p))

    def theirs():
        for p in paths:
            with open(p, "rb") as f:
                peer(Image.open(io.BytesIO(f.read())))
    t = take_turns({"ours": ours, "open_clip": theirs}, args.rounds, torch.device("cpu"))
    print(f"500 x 375 JPEG to a 224 crop, one core; {system()}")
    print(f"ours {64 / t['ours']:.0f} images/s, open_clip {64 / t['open_clip']:.0f} images/s, "
          f"ratio {t['open_clip'] / t['ours']:.2f}")
    images = common._scan(os.path.dirname(folder), os.path.dirname(folder), "jpeg")
    for workers in [w for w in (0, 1, 2, 4, 8, 16) if w <= os.cpu_count()]:
        run = argparse.Namespace(seed=0, workers=workers, batch_size=32)
        steps, start = 60, None
        for i, _ in enumerate(common.train_loader(images, preprocess, run, steps, device_of())):
            if i == 9:                                           # workers are up
                start = time.perf_counter()
        print(f"loader, {workers:>2} workers: {32 * (steps - 10) / (time.perf_counter() - start):.0f} images/s", flush=True)


def bench_head(args):
    """The zero-shot head of ViT-B-32's text tower for some of ImageNet's classes, against open_clip's builder."""
    import open_clip

    import common
    device = device_of()
    model, *_, tokenizer = common.load_model("ViT-B-32", "", device)
    names, templates = open_clip.IMAGENET_CLASSNAMES[::100], open_clip.OPENAI_IMAGENET_TEMPLATES
    heads = {}

    def ours():
        heads["ours"] = common.class_head(common.text_embeddings(model, tokenizer, names, templates))

    def theirs():
        heads["open_clip"] = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates, device=device).T
    t = take_turns({"ours": ours, "open_clip": theirs}, min(args.rounds, 3), device)
    print(f"ViT-B-32, {len(names)} classes x 80 templates; {system()}")
    print(f"ours {t['ours']:.2f} s, open_clip {t['open_clip']:.2f} s, ratio {t['open_clip'] / t['ours']:.2f}; "
          f"largest difference {float((heads['ours'] - heads['open_clip']).abs().max()):.1e}")


def bench_eval(args):
    """evaluate.py's way of images: images/s for one model and for three side by side."""
    import time

    import torch

    import common
    import toy
    toy.build()
    device, shared = device_of(), toy.defaults()
    names = ["ViT-B-32", "ViT-B-32", "ViT-B-32"]
    root = common.read_root(argparse.Namespace(data=shared["data"], train=["train"], val=None, val_frac=0.2, eval=[],
                                               seed=0), need_train=False)
    models = [common.load_model(name, "", device) for name in names]
    run = argparse.Namespace(batch_size=64, workers=min(8, os.cpu_count()))
    for count in (1, 3):
        start = time.perf_counter()
        common.image_features([m[0] for m in models[:count]], [m[2] for m in models[:count]], [root.val], run, device,
                              dtype=torch.float32)
        seconds = time.perf_counter() - start
        print(f"{count} x ViT-B-32: {len(root.val) / seconds:.1f} images/s; {system()}", flush=True)


def bench_index(args):
    """Memory and time to read a ROOT of 1.28 million (empty) files in 1000 classes, and what a worker adds."""
    folder = os.path.join(REPO, "out", "bench", "index")
    if not os.path.isdir(os.path.join(folder, "val")):
        for k in range(1000):
            os.makedirs(os.path.join(folder, "train", f"n{k:08d}"), exist_ok=True)
            for i in range(1281):
                open(os.path.join(folder, "train", f"n{k:08d}", f"n{k:08d}_{i}.JPEG"), "w").close()
            os.makedirs(os.path.join(folder, "val", f"n{k:08d}"))
            open(os.path.join(folder, "val", f"n{k:08d}", "0.JPEG"), "w").close()
    done = subprocess.run([sys.executable, "-c", INDEX.format(repo=REPO, folder=folder)], capture_output=True, text=True)
    print(done.stdout.strip() or done.stderr, system(), sep="\n")


INDEX = """
import argparse, os, sys, time
sys.path.insert(0, {repo!r})
import torch, common
def rss(pid="self"):                         # what is this process's own: shared pages are counted in parts
    lines = open(f"/proc/{{pid}}/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
def high():
    return int([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]) / 1024
before, start = high(), time.perf_counter()
root = common.read_root(argparse.Namespace(data={folder!r}, train=["train"], val=None, val_frac=.2, eval=[], seed=0))
print(f"{{len(root.train):,}} images indexed in {{time.perf_counter() - start:.1f}} s; "
      f"{{high() - before:.0f}} MB at most, {{(root.train.files.nbytes + root.train.labels.nbytes) / 2**20:.0f}} MB kept")
common.Images.read = lambda self, i: torch.zeros(3, 8, 8, dtype=torch.uint8)
for workers in (1, 2, 4):
    run = argparse.Namespace(seed=0, workers=workers, batch_size=512)
    for i, _ in enumerate(common.train_loader(root.train, lambda x: x, run, 100, torch.device("cpu"))):
        if i == 90:
            children = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
            total = rss() + sum(rss(pid) for pid in children)
    print(f"{{workers}} workers: {{total:.0f}} MB in all processes, shared pages counted once")
"""


def bench_client(args):
    """The top-1 of `clip_benchmark eval` on out/calft/model against evaluate.py's, on the toy's val as a webdataset."""
    import io
    import tarfile

    import common
    import toy
    toy.build()
    folder = os.path.join(REPO, "out", "bench", "client")
    run, python = os.path.join(folder, "run"), os.path.join(folder, "venv", "bin")
    os.makedirs(os.path.join(folder, "wds", "test"), exist_ok=True)
    subprocess.run([sys.executable, os.path.join(REPO, "calft.py"), "--out", run], check=True)
    if not os.path.isfile(os.path.join(python, "clip_benchmark")):
        subprocess.run([sys.executable, "-m", "venv", os.path.dirname(python)], check=True)
        subprocess.run([os.path.join(python, "pip"), "install", "-q", "clip-benchmark", "requests", "numpy<2.3"], check=True)
    root = common.read_root(argparse.Namespace(data=toy.defaults()["data"], train=["train"], val=None, val_frac=0.2, eval=[],
                                               seed=0), need_train=False)
    with tarfile.open(os.path.join(folder, "wds", "test", "0.tar"), "w") as tar:
        for i, label in enumerate(root.val.labels):
            with open(root.val.path(i), "rb") as f:
                members = {os.path.splitext(root.val.file(i))[1]: f.read(), ".cls": str(label).encode()}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{i}{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for name, lines in (("test/nshards.txt", ["1"]), ("classnames.txt", root.classnames),
                        ("zeroshot_classification_templates.txt", common.prompt_texts(["{c}"], root.templates))):
        with open(os.path.join(folder, "wds", name), "w") as f:
            f.write("\n".join(lines) + "\n")
    file = os.path.join(folder, "result.json")
    subprocess.run([os.path.join(python, "clip_benchmark"), "eval", "--model", f"local-dir:{run}/model", "--pretrained", "",
                    "--dataset", "wds/toy", "--dataset_root", os.path.join(folder, "wds"), "--task",
                    "zeroshot_classification", "--no_amp", "--num_workers", "0", "--output", file], check=True)
    theirs = json.load(open(file))["metrics"]["acc1"]
    ours = json.load(open(os.path.join(run, "results.json")))["sets"]["val"]["top1"]
    print(f"top-1 of the exported model on val: clip_benchmark {theirs:.6f}, ours {ours:.6f}")


# ---- reliability

def bench_soak(args):
    """Each script on a tiny ROOT, killed again and again by SIGKILL, against the same run left alone; and a long run."""
    import random
    import signal
    import time

    import torch

    import conftest
    folder = os.path.join(REPO, "out", "bench", "soak")
    subprocess.run(["rm", "-rf", folder])
    os.makedirs(folder)
    root, model = os.path.join(folder, "root"), conftest.write_clip(os.path.join(folder, "clip"))
    names = ["ant", "bee", "cat", "dog"]
    conftest.write_images(os.path.join(root, "train"), names, 20, 1)
    conftest.write_images(os.path.join(root, "val"), names, 3, 2)
    conftest.write_images(os.path.join(folder, "pool"), ["p"], 20, 3)
    with open(os.path.join(root, "templates.txt"), "w") as f:
        f.write("a photo of a {}.\nart of a {}.\n")
    with open(os.path.join(folder, "pool", "pool.tsv"), "w") as f:
        f.write("path\ttext\n" + "".join(f"p/{i}.png\tpicture {i}\n" for i in range(20)))
    draw, env, kills = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}, 0
    for script in ("calft", "carft", "anchor"):
        def command(out, script=script):
            pool = ["--pool", os.path.join(folder, "pool", "pool.tsv")] * (script == "anchor")
            return [sys.executable, os.path.join(REPO, f"{script}.py"), "--data", root, "--model", model, "--out", out,
                    *conftest.BASE, "--epochs", "1000000", "--max-steps", "1500", "--save-every", "5", "--workers", "1", *pool]

        def start(out):
            return subprocess.Popen(command(out), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                    start_new_session=True)
        whole, killed = os.path.join(folder, f"{script}-whole"), os.path.join(folder, f"{script}-killed")
        assert start(whole).wait() == 0
        here = 0
        while here < args.kills // 3:
            process, log = start(killed), os.path.join(killed, "log.jsonl")
            before = os.path.getmtime(log) if os.path.isfile(log) else 0
            while process.poll() is None and not (os.path.isfile(log) and os.path.getmtime(log) > before):
                time.sleep(0.01)
            time.sleep(draw.random() * 1.5)
            if process.poll() is not None:
                break                                            # done before its last kill
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            here += 1
        code = start(killed).wait()
        a, b = conftest.weights(whole), conftest.weights(killed)
        same = code == 0 and all(torch.equal(a[k], b[k]) for k in a) and conftest.log(whole) == conftest.log(killed) and \
            json.load(open(f"{whole}/results.json")) == json.load(open(f"{killed}/results.json"))
        kills += here
        print(f"{script}: {here} kills, weights, log and table {'bit for bit the same' if same else 'NOT THE SAME'}", flush=True)
    print(f"{kills} kills in all; {system()}")
    process = subprocess.Popen([sys.executable, os.path.join(REPO, "calft.py"), "--data", root, "--model", model, "--out",
                                os.path.join(folder, "long"), *conftest.BASE, "--epochs", "1000000", "--max-steps", "2000",
                                "--workers", "1"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, seen = os.path.join(folder, "long", "log.jsonl"), []
    while process.poll() is None:
        lines = open(log).read().count("\n") if os.path.isfile(log) else 0
        if lines >= 200 * (len(seen) + 1):
            status = open(f"/proc/{process.pid}/status").read()
            rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
            seen.append(f"{rss:.0f} MB, {len(os.listdir(f'/proc/{process.pid}/fd'))} files")
        time.sleep(0.02)
    print("2,000 steps, every 200: " + "; ".join(seen))


if __name__ == "__main__":
    benches = {"step": bench_step, "input": bench_input, "head": bench_head, "eval": bench_eval, "memory": bench_memory,
               "activations": bench_activations, "bill": bench_bill,
               "index": bench_index, "client": bench_client, "soak": bench_soak}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(benches))
    parser.add_argument("--rounds", type=int, default=7, help="turns that each of the compared takes")
    parser.add_argument("--model", help="step, memory: open_clip's name")
    parser.add_argument("--batch-size", type=int, help="step, memory")
    parser.add_argument("--kills", type=int, default=100, help="soak: kills in all")
    parser.add_argument("--compile", action="store_true", help="step: compile our towers")
    args = parser.parse_args()
    benches[args.what](args)
