# SPDX-License-Identifier: MIT
"""What calft.py, carft.py, anchor.py and evaluate.py share. No training method is in here.

Sizes: N of a batch, n of a process or a set, K classes, M templates, L tokens, d features."""
import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from os.path import abspath, basename, dirname, isdir, isfile, join, realpath

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

# torchrun starts WORLD processes and numbers them; without it there is one, number 0.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
else:                                                       # torch has no collectives for mps
    DEVICE = torch.device("mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")

# ---- flags and processes -------------------------------------------------------------------------
def number_type(kind, least, below=math.inf):
    """An argparse type: a number of this kind, at least `least` and below `below`."""
    def number(text):
        if not least <= kind(text) < below:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least} and below {below}")
        return kind(text)
    return number

positive_int, natural = number_type(int, 1), number_type(int, 0, 2 ** 63)
weight, fraction = number_type(float, 0), number_type(float, 1e-9, 1)

def flags(doc, out, **recipe):
    """An argparse parser of the flags that all scripts share; with a recipe, of training's too."""
    parser = argparse.ArgumentParser(description=doc, conflict_handler="resolve",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"error: {message}")
    parser.set_defaults(method=doc.split(":")[0], **recipe)
    bf16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "bf16" if bf16 else "fp16" if DEVICE.type == "cuda" else "fp32"
    add = parser.add_argument_group("data and model").add_argument
    add("--data", metavar="ROOT", type=abspath, help="holds train/, val/, shifts (default: a toy)")
    add("--train", nargs="+", default=["train"], metavar="DIR", help="training folders in ROOT")
    add("--val", metavar="DIR", help="validation folder in ROOT (val, if there is one)")
    add("--val-frac", type=fraction, default=0.2, help="held out if there is no val (%(default)s)")
    add("--eval", nargs="+", default=[], metavar="DIR", help="more image folders to score")
    add("--model", default="ViT-B-16-quickgelu", help="name or local-dir:PATH (%(default)s)")
    add("--pretrained", default="openai", help="tag, file, or '' for random weights (%(default)s)")
    add = parser.add_argument_group("machine and files").add_argument
    add("--out", default=out, help="folder of everything that is written (%(default)s)")
    add("--batch-size", type=positive_int, default=512, help="of all GPUs together (%(default)s)")
    add("--workers", type=natural, default=min(8, os.cpu_count()), help="per process (%(default)s)")
    add("--precision", choices=["fp32", "bf16", "fp16"], default=precision, help="(%(default)s)")
    add("--seed", type=natural, default=0, help="of all randomness (%(default)s)")
    if recipe:
        add("--accum", type=positive_int, default=1, help="parts of a batch, to save memory")
        add("--grad-checkpointing", action="store_true", help="recompute activations: less memory")
        add("--compile", action="store_true", help="torch.compile the towers")
        add("--log-every", type=positive_int, default=50, help="steps (%(default)s)")
        add("--save-every", type=positive_int, default=1000, help="steps (%(default)s)")
        add("--eval-every", type=natural, default=1, help="epochs; 0: only at end (%(default)s)")
        add("--overwrite", action="store_true", help="start anew, whatever --out holds")
        add = parser.add_argument_group("recipe").add_argument
        add("--epochs", type=positive_int, help="passes over the images (%(default)s)")
        add("--max-steps", type=positive_int, help="end the run and its schedule earlier")
        add("--lr", type=weight, help="peak learning rate of AdamW (%(default)s)")
        add("--wd", type=weight, help="weight decay of every parameter (%(default)s)")
        add("--warmup", type=natural, help="steps of rise to --lr, then cosine to 0 (%(default)s)")
    return parser

def start(parser, argv):
    """Parse argv; without --data draw the toy and take its defaults; join torchrun's processes."""
    args = parser.parse_args(argv)
    if args.data is None:
        sys.path.insert(0, join(dirname(abspath(__file__)), "tests"))
        try:
            import toy
        except ModuleNotFoundError:
            sys.exit("error: --data ROOT is needed, a folder with train/<class>/*, val/<class>/*")
        parser.set_defaults(**toy.defaults())
        args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("highest")           # some container images switch TF32 on
    torch.backends.cudnn.allow_tf32 = False
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:                                           # one may download while others wait
        dist.init_process_group(timeout=timedelta(hours=2))
    return args

def say(message):
    """Print, by the first process only and above any progress bar."""
    if RANK == 0:
        tqdm.write(message)

def gather(x):
    """Every process gets all rows, (n, ...) -> (N, ...), for the whole batch's loss. Gradient flows
    to its own rows only, times WORLD, so that the mean of average_gradients is the sum."""
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[RANK] = x.detach() + WORLD * (x - x.detach())
    return torch.cat(parts)

def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one all-reduce."""
    if WORLD > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads]) / WORLD
        dist.all_reduce(flat)
        for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

def total_steps(args, n):
    """Optimiser steps of a run over n images: --epochs in whole batches, at most --max-steps."""
    parts = WORLD * args.accum
    if args.batch_size > n or args.batch_size % parts:
        sys.exit(f"error: --batch-size: at most {n}, a multiple of {parts} (processes x --accum)")
    steps = min(args.epochs * n // args.batch_size, args.max_steps or math.inf)
    if args.warmup >= steps:
        say(f"warning: --warmup {args.warmup} in a run of {steps} steps: --lr is never reached")
    return steps

# ---- data: image folders as sets, images as crops ------------------------------------------------
@dataclass
class ImageSet:
    """Images, labels, class names, prompts. columns[k]: the training classes that class k
    covers, mostly one; the greatest of their logits is k's. None: the set has its own head."""
    name: str                                               # its row in the table
    classes: list                                           # K folder names
    classnames: list                                        # K names as prompts say them
    templates: list                                         # M prompts with {} for a class name
    columns: list | None                                    # K lists; None: some are not trained on
    paths: np.ndarray                                       # (n,) bytes: str takes four times that
    labels: np.ndarray                                      # (n,) indices of classes

    def __len__(self):
        return len(self.paths)

def subfolders(path):
    """Names of the folders in a folder, without hidden ones."""
    if not isdir(path):
        sys.exit(f"error: {path} is not a folder (expected image folders: {path}/<class>/*.jpg)")
    return sorted(d.name for d in os.scandir(path) if d.is_dir() and not d.name.startswith("."))

def scan(path):
    """{class: paths of its images, as bytes} of path/<class>/*, without hidden files."""
    found = {c: sorted(os.fsencode(f) for f in os.scandir(join(path, c)) if not f.is_dir() and
                       f.name.lower().endswith(IMG_EXTENSIONS) and not f.name.startswith("."))
             for c in subfolders(path)}
    for c in [c for c in found if not found[c] and any(found.values())]:
        say(f"warning: {path}/{c} holds no image and is passed over")
    return {c: paths for c, paths in found.items() if paths}

def flatten(found, classes):
    """Paths (n,) and labels (n,) of the images in a scan."""
    labels = np.repeat(np.arange(len(classes)), [len(found.get(c, [])) for c in classes])
    return np.array([path for c in classes for path in found.get(c, [])]), labels

def read_rows(path, *columns):
    """Rows of a text file, tabs between the named columns. A header, "path" first, is left out."""
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")    # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"error: {path} cannot be read as text ({e})")
    rows = [[c.strip() for c in line.split("\t")] for line in text.split("\n") if line.strip()]
    for row in rows:
        if len(row) != len(columns) or not all(row):
            sys.exit(f"error: {path}: expected {'<TAB>'.join(columns)}, found {' '.join(row)!r}")
    return rows[1:] if rows and rows[0][0] == columns[0] == "path" else rows

def find_texts(classes, folders, templates):
    """Class names: by classnames.txt in the first of `folders` that lists the class, else OpenAI's
    for a wnid, else the folder's with _ as space. Prompts: templates.txt, else `templates`."""
    names = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
    for folder in reversed(folders):
        if isfile(join(folder, "classnames.txt")):
            names.update(read_rows(join(folder, "classnames.txt"), "folder", "name"))
        if isfile(join(folder, "templates.txt")):
            templates = [row[0] for row in read_rows(join(folder, "templates.txt"), "prompt")]
            if not templates or not all("{}" in t for t in templates):
                sys.exit(f"error: {folder}/templates.txt: expected a prompt with {{}} on each line")
    return [names.get(c, c.replace("_", " ")) for c in classes], templates

def read_sets(name, path, train, nested=True):
    """The evaluation sets of a folder: itself, or each image folder in it (ImageNet-C). A class
    folder's training class: by classes.txt (folder<TAB>training class[;training class...]), else
    by its name, else by its number, if the folders are exactly 0 to K-1 (ImageNet-V2)."""
    found = scan(path)
    if not found and not nested:
        say(f"{path} has no <class>/*.jpg: not scored (--eval scores image folders inside it)")
        return []
    if not found and not subfolders(path):
        sys.exit(f"error: {path} holds no images (expected {path}/<class>/*.jpg)")
    if not found:
        return [s for d in subfolders(path) for s in read_sets(f"{name}/{d}", join(path, d), train)]
    trained = {c: [k] for k, c in enumerate(train.classes)}
    numbers = {str(k): [k] for k in range(len(trained))}
    index = {**(numbers if set(found) == set(numbers) else {}), **trained}
    if isfile(join(path, "classes.txt")):
        for c, targets in read_rows(join(path, "classes.txt"), "folder", "training class[;...]"):
            known = [trained.get(t.strip()) for t in targets.split(";")]
            index[c] = None if None in known else sum(known, [])
    columns, classes = [index.get(c) for c in found], list(found)
    texts = [train.classnames[c[0]] for c in columns if c], train.templates
    if None in columns:
        texts, columns = find_texts(classes, [path, dirname(path)], train.templates), None
    return [ImageSet(name, classes, *texts, columns, *flatten(found, classes))]

def read_data(args):
    """The sets of a ROOT, by --data, --train, --val and --eval: train, [val, *others to score]."""
    say(f"reading the image folders of {args.data}")
    folders, val = [join(args.data, d) for d in args.train], join(args.data, args.val or "val")
    of_train = {}
    for folder in folders:
        for c, paths in scan(folder).items():
            of_train.setdefault(c, []).extend(paths)
    classes = sorted(of_train)
    if len(classes) < 2:
        sys.exit(f"error: {folders[0]} needs images of two classes at least, in <class>/*.jpg")
    if args.val or isdir(val):
        of_val = scan(val)
    else:                                                   # hold out the first in order of a hash
        of_val, seed = {}, b"%d " % args.seed
        for c, paths in of_train.items():
            order = sorted(paths, key=lambda path: hashlib.md5(seed + basename(path)).digest())
            n = min(math.ceil(args.val_frac * len(paths)), len(paths) - 1)
            of_val[c], of_train[c] = sorted(order[:n]), sorted(order[n:])
    unknown = sorted(set(of_val) - set(classes))
    if unknown or not any(of_val.values()):
        sys.exit(f"error: {val} has no images, or classes that training lacks: {unknown}")
    texts = find_texts(classes, [args.data], [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES])
    columns = [[k] for k in range(len(classes))]
    train = ImageSet("train", classes, *texts, columns, *flatten(of_train, classes))
    sets = [ImageSet("val", classes, *texts, columns, *flatten(of_val, classes))]
    used = {realpath(join(args.data, d)) for d in [*folders, val, "train", "val"]}
    for name in subfolders(args.data):
        if realpath(join(args.data, name)) not in used:
            sets += read_sets(name, join(args.data, name), train, nested=False)
    for path in map(abspath, args.eval):
        taken = ["test", *(s.name.split("/")[0] for s in sets)]
        depth = 2 if basename(path) in taken else 1         # "test" alone would be no shift
        sets += read_sets("/".join(path.split("/")[-depth:]), path, train)
    if len({s.name for s in sets}) < len(sets):
        sys.exit("error: --eval: two folders have the same name, and so do their parent folders")
    return train, sets

def read_image(path):
    """Decode a file or part of a tar, "x.tar:OFFSET:SIZE": (uint8 RGB (3, H, W), True), or (black,
    False) if it cannot be read or would fill the memory. Orientation tags are ignored."""
    path = os.fsdecode(path)
    file, offset, size = path.rsplit(":", 2) if ".tar:" in path else (path, 0, -1)
    try:
        with open(file, "rb") as f:
            f.seek(int(offset))
            data = f.read(int(size))
        image = Image.open(io.BytesIO(data))                # reads the header only
        short, long = sorted(image.size)
        if short * long > 89e6 or long > 100 * short:
            raise ValueError
        try:
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            x = v2.functional.to_dtype(decode_image(data, ImageReadMode.RGB), torch.uint8, True)
            return x[0] if x.ndim == 4 else x, True         # the first frame of an animation
        except (RuntimeError, ValueError):                  # a format that Pillow alone knows
            return v2.functional.pil_to_tensor(image.convert("RGB")), True
    except Exception:                                       # Pillow's plugins raise many kinds
        return torch.zeros(3, 8, 8, dtype=torch.uint8), False

class TrainImages(torch.utils.data.Dataset):
    """An endless data set: place p is image p mod n of epoch p // n, each epoch in a new order. An
    item: crop uint8 (3, S, S), label, row, a random number, failed. If the row drawn is unreadable,
    the next stands in, and `failed` is the row drawn, else -1. Seeded by seed, epoch, row drawn."""
    def __init__(self, images, preprocess, seed):
        self.images, self.preprocess, self.seed, self.epoch = images, preprocess, seed, -1

    def __getitem__(self, place):
        epoch, position = divmod(place, len(self.images))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        drawn = int(self.order[position])
        seeds = np.random.SeedSequence([self.seed, epoch, drawn]).generate_state(2).tolist()
        for row in range(drawn, drawn + len(self.images)):
            row %= len(self.images)
            image, readable = read_image(self.images.paths[row])
            if readable:
                break
        with torch.random.fork_rng(devices=[]):             # transforms.v2 takes no generator
            torch.manual_seed(seeds[0])
            crop = self.preprocess(image)
        return crop, int(self.images.labels[row]), row, seeds[1], drawn if row != drawn else -1

class EvalImages(torch.utils.data.Dataset):
    """Each image of some sets, ready for each model, and its row if it cannot be read, else -1."""
    def __init__(self, sets, preprocesses):
        self.paths, self.preprocesses = np.concatenate([s.paths for s in sets]), preprocesses

    def __getitem__(self, i):
        image, readable = read_image(self.paths[i])
        return [preprocess(image) for preprocess in self.preprocesses], -1 if readable else i

def outlive_sigterm(_):
    """A scheduler's SIGTERM reaches workers too; they live 30 s more, so that the step can end."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def loader(data, batch_size, places, args):
    """Batches of data[place] for the places of this process; batch_size is of all processes."""
    return torch.utils.data.DataLoader(
        data, max(1, batch_size // WORLD), sampler=places, num_workers=args.workers,
        pin_memory=DEVICE.type == "cuda", worker_init_fn=outlive_sigterm)

def train_loader(images, preprocess, args, start, total, batch_size=None, seed=None):
    """Yield the batches of steps start to total - 1: crops uint8 (n, 3, S, S), labels, rows, random
    numbers (n,). Of the N images of a batch, process r has every WORLD-th from the r-th on."""
    batch_size, unreadable = batch_size or args.batch_size, set()
    data = TrainImages(images, preprocess, args.seed if seed is None else seed)
    places = range(start * batch_size + RANK, total * batch_size, WORLD)
    for *batch, failed in loader(data, batch_size, places, args):
        for row in set(failed.tolist()) - unreadable - {-1}:
            unreadable.add(row)
            path = os.fsdecode(images.paths[row])
            tqdm.write(f"warning: {path} cannot be read; the next image stands in", file=sys.stderr)
        if len(unreadable) > 0.01 * len(images):
            sys.exit(f"error: over 1 % of the training images cannot be read, such as {path}")
        yield batch

# ---- models, features, heads, losses -------------------------------------------------------------
def load_model(name, pretrained, device=DEVICE):
    """open_clip's model in float32, preprocess_train and preprocess_val (uint8 (3, H, W) -> uint8
    (3, S, S)), and tokenizer. A tag of the other activation (QuickGELU) is an error."""
    try:
        pretrained = "" if ":" in name else pretrained      # local-dir:, hf-hub: have their own
        config, others = open_clip.get_model_config(name), ", ".join(open_clip.list_models())
        if config is None or config["text_cfg"].get("hf_tokenizer_name"):
            raise ValueError(f"unknown, or a Hugging Face text tower; try local-dir:PATH, {others}")
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
            raise ValueError("the tag is of another activation: add or drop -quickgelu in --model")
        model = open_clip.create_model(name, pretrained or None, device=device)
        crops = model.visual.preprocess_cfg
        if crops["resize_mode"] not in ("shortest", "squash"):
            raise ValueError(f"its resize mode, {crops['resize_mode']}, is not supported")
    except Exception as e:                                  # no network, a broken file: many kinds
        sys.exit(f"error: --model {name} --pretrained {pretrained}: {' '.join(str(e).split())}")
    model.eval()        # in training too, else BatchNorm and drop path vary with the batch's split
    size, how = int(np.ravel(model.visual.image_size)[0]), InterpolationMode(crops["interpolation"])
    crop = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=how)
    resize = v2.Resize(size if crops["resize_mode"] == "shortest" else [size, size], how)
    return model, crop, v2.Compose([resize, v2.CenterCrop(size)]), open_clip.get_tokenizer(name)

def prepare_towers(model, args):
    """Apply --grad-checkpointing and --compile in place; the names of the weights stay the same."""
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
        if not any(getattr(m, "grad_checkpointing", False) for m in model.visual.modules()):
            sys.exit(f"error: {args.model} does not support --grad-checkpointing; give --accum")
    if DEVICE.type == "cuda":
        model.visual.to(memory_format=torch.channels_last)              # for convolutions
    if args.compile:
        model.visual.compile(dynamic=False)                 # else a short batch makes it dynamic
        getattr(model, "text", model).transformer.compile()             # prompts vary in length

def autocast(precision):
    """The context in which towers run. Features leave it in float32, so losses are float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32")

def to_device(x, device=DEVICE):
    """x on the device. A copy to a GPU waits for the GPU unless it comes from pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

def to_input(model, images):
    """uint8 images (n, 3, S, S) -> the normalised float input of the model, on its device."""
    x = to_device(images, model.logit_scale.device)
    mean, std = (to_device(torch.tensor(model.visual.preprocess_cfg[k]), x.device).view(3, 1, 1)
                 for k in ("mean", "std"))
    return (x.float() / 255 - mean) / std

def in_chunks(encode, model, x, accum):
    """encode(model, x) in `accum` chunks: only features are kept, so a loss may compare all of
    them, and the backward pass computes each chunk again (GradCache, Gao et al., 2021)."""
    return torch.cat([checkpoint(encode, model, chunk, use_reentrant=False,
                                 preserve_rng_state=False) for chunk in x.chunk(accum)])

def normalize(x):
    """Rows of x (n, d) with L2 norm 1, in float32 (float64 if x is)."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

def encode_image(model, images, accum=1):
    """Normalised images (n, 3, S, S) -> L2-normalised features (n, d), float32."""
    if accum > 1:
        return in_chunks(encode_image, model, images, accum)
    return normalize(model.encode_image(images))

def encode_text(model, tokens, accum=1):
    """Tokens (n, L), preferably on CPU -> L2-normalised features (n, d), float32. For causal towers
    that pool at end-of-text the batch is cut at its longest prompt: the rest has no effect."""
    if accum > 1:
        return in_chunks(encode_text, model, tokens, accum)
    text, device = getattr(model, "text", model), model.logit_scale.device
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    if not causal or pool != "argmax" or not isinstance(text.text_projection, torch.nn.Parameter):
        padding = getattr(text, "context_length", tokens.shape[1]) - tokens.shape[1]
        return normalize(model.encode_text(to_device(F.pad(tokens, (0, padding)), device)))
    L = int(tokens.argmax(-1).max()) + 1                    # end-of-text has the greatest number
    tokens = to_device(tokens[:, :L], device)
    x = text.token_embedding(tokens) + text.positional_embedding[:L]                # (n, L, width)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:L, :L]))
    x = x[torch.arange(len(x), device=device), tokens.argmax(-1)]                   # (n, width)
    return normalize(x @ text.text_projection)                                      # (n, d)

def tokenize(tokenizer, texts):
    """Tokens (n, L) int32 of texts, L the longest of them."""
    blocks = tqdm(range(0, len(texts), 8192), "tokenising", leave=False, delay=3, disable=RANK > 0)
    tokens = torch.cat([tokenizer(texts[i:i + 8192]).int() for i in blocks])
    return tokens[:, :int(tokens.argmax(-1).max()) + 1].contiguous()

def prompts(tokenizer, classnames, templates):
    """Every class name in every template (with {}, or a function) as tokens (K, M, L)."""
    texts = [t(c) if callable(t) else t.replace("{}", c) for c in classnames for t in templates]
    return tokenize(tokenizer, texts).view(len(classnames), len(templates), -1)

@torch.no_grad()
def text_embeddings(model, tokenizer, classnames, templates):
    """Text features of every class in every template, (K, M, d), each L2-normalised."""
    tokens = prompts(tokenizer, classnames, templates).flatten(0, 1)                # (K*M, L)
    order = tokens.argmax(-1).argsort()                     # by length: most batches are cut short
    batches = tqdm(tokens[order].split(1024), "prompts", leave=False, delay=3, disable=RANK > 0)
    E = torch.cat([encode_text(model, batch) for batch in batches])                 # (K*M, d)
    return E[order.argsort()].view(len(classnames), len(templates), -1)

def class_head(E):
    """Zero-shot classifier W_cls (K, d) of text features E (K, M, d): normalised mean over M."""
    return F.normalize(E.mean(1), dim=-1)

def clip_loss(S):
    """CE2(S): mean cross-entropy of rows and of columns of S (N, N); row i belongs to column i."""
    target = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2

def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's loss (Radford et al., 2021, figure 3) of the global batch, gathered: scalar. Features
    (n, d) are L2-normalised; logit_scale is exponentiated already, as in open_clip."""
    return clip_loss(logit_scale * gather(image_features) @ gather(text_features).T)

# ---- scores and the table ------------------------------------------------------------------------
def ece(confidence, correct, bins=15):
    """Expected calibration error of a whole set (Guo et al., 2017), in [0, 1]: the sum over equal
    confidence bins of n_bin/n * |accuracy - confidence|. Both (n,); correct is 0 or 1."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, correct - confidence, minlength=bins)     # n_bin * (acc. - conf.)
    return float(np.abs(gap).sum() / len(confidence))

def scores(logits, labels):
    """Scores of a whole set from logits (n, K) and labels (n,): fractions, nll in nats. To compare
    with CaRot's code, ece_batch10: mean over batches of 512 with 10 bins, biased upwards."""
    log_p = torch.cat([F.log_softmax(part.float(), -1) for part in logits.split(8192)])     # (n, K)
    confidence, predicted = log_p.exp().max(-1)
    correct, label_log_p = predicted == labels, log_p.gather(1, labels[:, None]).squeeze(1)
    batches, top1 = zip(confidence.split(512), correct.split(512)), float(correct.double().mean())
    return {"top1": top1, "top1_se": math.sqrt(top1 * (1 - top1) / len(labels)),
            "ece": ece(confidence, correct), "nll": float(-label_log_p.mean()),
            "ece_batch10": sum(ece(c, r, 10) * len(r) for c, r in batches) / len(labels),
            "brier": float((log_p.exp().square().sum(1) - 2 * label_log_p.exp() + 1).mean())}

@torch.no_grad()
def image_features(models, preprocesses, sets, args, title, skip=False, precision="fp32"):
    """Features of images decoded once for all models: for each model a list with (n, d) for each
    set, on the CPU. An unreadable image ends the program, or with `skip` has NaN features."""
    data, parts, n = EvalImages(sets, preprocesses), [[] for _ in models], sum(map(len, sets))
    places = [i % n for i in range(RANK, n + -n % WORLD, WORLD)]        # padded to equal shares
    batches = loader(data, args.batch_size, places, args)
    for crops, failed in tqdm(batches, title, leave=False, disable=RANK > 0):
        if failed.max() >= 0 and not skip:
            sys.exit(f"error: {os.fsdecode(data.paths[failed.max()])} cannot be read; remove it")
        for model, x, part in zip(models, crops, parts):
            with autocast(precision):
                u = encode_image(model, to_input(model, x))                             # (n, d)
            u = u.masked_fill(to_device(failed, u.device)[:, None] >= 0, math.nan)
            u = gather(u).cpu().unflatten(0, (WORLD, -1))                               # (W, n, d)
            part.append(u.transpose(0, 1).flatten(0, 1))    # row i is of process i mod WORLD
    return [torch.cat(part)[:n].split([len(s) for s in sets]) for part in parts]

def set_logits(model, tokenizer, sets, features, head=None):
    """For each set the readable rows (n',), logits (n', K), labels (n',), and facts for the table.
    head (K, d): of the classes of sets[0], val; None: the model's own zero-shot head."""
    def zero_shot(s):
        return class_head(text_embeddings(model, tokenizer, s.classnames, s.templates)).cpu()
    tau = model.logit_scale.detach().exp().cpu()
    head = zero_shot(sets[0]) if head is None else head.detach().cpu()              # (K, d)
    for s, u in zip(sets, features):
        rows = (~u[:, 0].isnan()).nonzero().squeeze(1)
        if not len(rows):
            sys.exit(f"error: no image of {s.name} can be read, or the weights are not finite")
        logits = tau * u[rows] @ (zero_shot(s) if s.columns is None else head).T    # (n', K)
        if s.columns is not None:                           # of several columns the greatest counts
            logits = torch.stack([logits[:, c].amax(1) for c in s.columns], 1)
        kind = "subset" if len(s.classes) < len(head) else "all"
        yield rows, logits, torch.from_numpy(s.labels)[rows], {
            "n": len(rows), "classes": len(s.classes), "skipped": len(s) - len(rows),
            "head": kind if s.columns else "zero-shot"}

def summary(sets, set_scores):
    """Scores by set, and their mean over the shifts: all but val, test, and sets with own heads."""
    shifts = [s.name for s in sets if s.name not in ("val", "test") and s.columns is not None]
    mean = {k: np.mean([set_scores[s][k] for s in shifts]) for k in ("top1", "ece") if shifts}
    return {"sets": set_scores, "shift_mean": mean or None}

def evaluate(model, tokenizer, preprocess, sets, args, head=None):
    """Summary of scores, in float32, as bf16 may flip near ties. head: as for set_logits."""
    features, = image_features([model], [preprocess], sets, args, "scoring")
    logits_of = set_logits(model, tokenizer, sets, features, head)
    return summary(sets, {s.name: {**about, **scores(logits, labels)}
                          for s, (_, logits, labels, about) in zip(sets, logits_of)})

def table(columns):
    """Summaries of models on the same sets, {title: summary}, as text; top-1 and ECE in percent."""
    first = next(iter(columns.values()))
    own = {name: r for name, r in first["sets"].items() if r["head"] == "zero-shot"}
    names = [name for name in first["sets"] if name not in own]
    names += ["shift mean"] * bool(first["shift_mean"]) + list(own)
    width = max(14, *(len(name) + 2 for name in names))
    titles = [title if len(title) < 22 else f"…{title[-20:]}" for title in columns]
    lines = [" " * (width + 15) + "".join(f"{title:>22}" for title in titles),
             f"{'set':<{width}}{'images':>7}{'classes':>8}"
             + f"{'top-1':>8}{'± se':>6}{'ECE':>8}" * len(columns)]
    for name in names:
        about, star = first["sets"].get(name, {"n": "", "classes": ""}), " *" * (name in own)
        lines.append(f"{name + star:<{width}}{about['n']:>7}{about['classes']:>8}")
        for column in columns.values():
            r = column["sets"].get(name, column["shift_mean"])
            error = f"±{100 * r['top1_se']:.1f}" if "top1_se" in r else ""
            lines[-1] += f"{100 * r['top1']:>8.2f}{error:>6}{100 * r['ece']:>8.2f}"
    note = "* has classes that were not trained on: zero-shot head, not in the shift mean"
    return "\n".join([*lines, *[note] * bool(own)])

# ---- the files of a run --------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path):
    """A binary file to write in place of `path`, whose old content stays until the new is whole."""
    try:
        os.makedirs(dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "wb") as f:
            yield f
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:                    # torch.save raises the latter
        if isfile(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        sys.exit(f"error: {path} cannot be written ({' '.join(str(e).split())}); the old is kept")

def read_json(path):
    """The content of a file, or {} where there is none."""
    return json.loads(pathlib.Path(path).read_text()) if isfile(path) else {}

def write(path, content, **metadata):
    """Write {name: tensor} to x.safetensors, with metadata of strings, or JSON to another file."""
    if RANK == 0:
        if str(path).endswith(".safetensors"):
            tensors = {name: t.detach().cpu().contiguous() for name, t in content.items()}
            content = safetensors.torch.save(tensors, metadata)
        else:
            content = json.dumps(content, indent=1).encode()
        with replacing(path) as f:
            f.write(content)

def export(model, name, path):
    """Write a model, loaded as `name`, so that open_clip can load it as local-dir:path."""
    config, images = open_clip.get_model_config(name), model.visual.preprocess_cfg
    write(join(path, "open_clip_model.safetensors"), model.state_dict())
    write(join(path, "open_clip_config.json"), {"model_cfg": config, "preprocess_cfg": images})

# Flags that may differ when a run continues; the last three change its rounding, nothing else.
FREE = "out workers log_every save_every eval_every overwrite accum compile grad_checkpointing"
FILES = "results.json last.pt log.jsonl model teacher head.safetensors features.safetensors".split()

class Run:
    """The files in --out. results: the content of results.json; start: the step to begin with."""
    def __init__(self, args, sets, *texts):
        """Continue the run in --out or begin one; an error if it has other flags, data or texts."""
        self.args, self.path, self.stopped = args, pathlib.Path(args.out), False
        about = [(s.name, s.paths.tolist(), s.classnames, s.templates, s.columns) for s in sets]
        digest = hashlib.sha256(repr((about, texts)).encode()).hexdigest()
        identity = {**vars(args), "data and texts": digest[:16]}
        begun = any((self.path / f).exists() for f in FILES) and not args.overwrite
        old = read_json(self.path / "args.json") if begun else identity
        changed = [f"{k.replace('_', '-')} {old.get(k)}" for k in identity
                   if k not in FREE.split() and old.get(k) != identity[k]]
        if changed:
            sys.exit(f"error: --out {args.out} has another run: {', '.join(changed)}. --overwrite?")
        self.results = read_json(self.path / "results.json") if begun else {}
        self.checkpoint = {"step": 0, "log_bytes": 0}
        if begun and (self.path / "last.pt").exists():
            self.checkpoint = torch.load(self.path / "last.pt", "cpu", mmap=True, weights_only=True)
        self.start = self.saved = self.checkpoint["step"]
        starts = gather(torch.tensor([[self.start, len(self.results)]], device=DEVICE))
        if len(starts.unique(dim=0)) > 1:
            sys.exit(f"error: --out {args.out} is not the same folder for all processes")
        if RANK == 0 and not begun:
            for file in [self.path / f for f in FILES if (self.path / f).exists()]:
                shutil.rmtree(file, ignore_errors=True)     # an old file would pass for a new one
                file.unlink(missing_ok=True)
            write(self.path / "args.json", identity)        # last, if a kill comes in between

    def add_results(self, results):
        self.results.update(results)
        write(self.path / "results.json", self.results)

    def report(self):
        say("\n" + table({"zero-shot": self.results["zero_shot"], "fine-tuned": self.results}))

    def restore(self, parts):
        """Load the checkpoint, if there is one, into parts {name: what has a state_dict}."""
        if self.start:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint.pop(name))
        log = self.path / "log.jsonl"
        if RANK == 0 and log.exists():                      # steps after last.pt are logged again
            os.truncate(log, min(log.stat().st_size, self.checkpoint["log_bytes"]))

    def steps(self, loader, total):
        """Yield (step, batch). After SIGTERM, the program ends once the current step is saved."""
        def stop(*_):
            self.stopped = True
        signal.signal(signal.SIGTERM, stop if RANK == 0 else signal.SIG_IGN)
        with tqdm(None, self.args.method, total, initial=self.start, disable=RANK > 0) as self.bar:
            for step, batch in zip(range(self.start, total), loader):
                yield step, batch
                self.bar.update()
                if self.stopped and self.saved == step + 1:
                    sys.exit(f"stopped by SIGTERM after step {step}; the same command continues")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def log(self, **values):
        """Log numbers or scalar tensors, `step` among them; exit if one is not finite."""
        line = {k: v.item() if torch.is_tensor(v) else v for k, v in values.items()}
        if not all(map(math.isfinite, line.values())):
            sys.exit(f"error: loss not finite at step {line['step']}; last.pt is kept. Lower --lr?")
        self.bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in line.items()))
        line["images_per_s"] = (self.bar.format_dict.get("rate") or 0) * self.args.batch_size
        if RANK == 0:
            with open(self.path / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def save(self, step, parts):
        """Write last.pt, unless it is of this step: `parts` after `step` steps; an error if a
        weight is not finite."""
        if RANK == 0 and step != self.saved:
            state = {name: part.state_dict() for name, part in parts.items()}
            if not all(t.isfinite().all() for t in tree_leaves(state) if torch.is_tensor(t)):
                sys.exit(f"error: weights are not finite after step {step - 1}; last.pt is kept")
            with open(self.path / "log.jsonl", "ab") as log, replacing(self.path / "last.pt") as f:
                torch.save({**state, "step": step, "log_bytes": log.tell()}, f)
            self.saved = step
