# SPDX-License-Identifier: MIT
"""What calft.py, carft.py, anchor.py and evaluate.py share. No training method is in here.

1. Models, features, heads and losses: what the training loops call. Read this.
2. Scores, and the table that a run prints.
3. Data: image folders as sets, images as crops. Skip this unless your data fails.
4. Flags, and the files of a run.

Shapes: N images in the global batch, n on this process (or in a set), K classes, M templates,
L tokens, d features.
"""
import os

# Otherwise OpenMP's threads spin while they wait, and take the cores of everything else that runs.
# It counts only before torch is imported, so the scripts import this module first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import difflib
import fcntl
import functools
import hashlib
import io
import json
import math
import pathlib
import shutil
import sys
import textwrap
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from os.path import abspath, basename, dirname, exists, isdir, isfile, realpath
from statistics import fmean

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

# torchrun starts WORLD processes and numbers them by RANK. Without it there is one, number 0.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
elif torch.backends.mps.is_available() and WORLD == 1:      # torch has no collectives for mps
    DEVICE = torch.device("mps")
else:
    DEVICE = torch.device("cpu")

NO_BAR = RANK > 0 or not sys.stderr.isatty()                # a log file would fill with bars

def fail(message):
    """End the program with one line on stderr. Every mistake of a user ends here."""
    sys.exit("error: " + message.replace("\n", " "))

def say(message):
    """Print, by the first process only and above any progress bar."""
    if RANK == 0:
        tqdm.write(message)

# ---- 1. models, features, heads and losses -------------------------------------------------------
def read_weights(path, read=open_clip.factory.load_state_dict, **flags):
    """Return {name: weight} of a file as open_clip reads it, without the prefixes of torch.compile
    and DistributedDataParallel."""
    weights = read(path, **flags)
    return {name.replace("_orig_mod.", "").removeprefix("module."): weight
            for name, weight in weights.items()}

open_clip.factory.load_state_dict = read_weights            # itself it knows "module." alone

def load_model(name, pretrained, device=DEVICE):
    """Return open_clip's model in float32, preprocess_train and preprocess_val, which turn uint8
    (3, H, W) into uint8 (3, S, S), and the tokenizer.

    End the program if the model is unknown or unreadable, if its text tower is Hugging Face's, or
    if the pretrained weights belong to another activation (QuickGELU or GELU): open_clip only
    warns of that, and the accuracy drops."""
    if ":" in name:                                         # local-dir: and hf-hub: have weights
        pretrained = ""
    try:
        config = open_clip.get_model_config(name)
        if config is None:
            similar = difflib.get_close_matches(name, open_clip.list_models())
            fail(f"--model {name} is unknown; similar: {', '.join(similar)}. A folder is "
                 "local-dir:PATH, and open_clip.list_models() returns all names")
        if "hf_tokenizer_name" in config["text_cfg"]:
            fail(f"--model {name}: text towers of Hugging Face are not supported")
        tag = open_clip.get_pretrained_cfg(name, pretrained)            # empty for a file
        if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
            fail(f"--pretrained {pretrained} is for another activation than --model {name}; add or "
                 "drop -quickgelu")
        twin = name.removesuffix("-quickgelu")
        if twin == name:
            twin = f"{name}-quickgelu"
        if isfile(pretrained) and open_clip.get_model_config(twin):
            say(f"--pretrained {pretrained}: a file does not say its activation; be sure that it "
                f"is of {name}, not of {twin}")
        model = open_clip.create_model(name, pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as e:                                  # no network, a broken file: many kinds
        problem = textwrap.shorten(str(e), 300, placeholder=" ...")     # may list all weights
        fail(f"--model {name} --pretrained {pretrained!r}: {problem}")
    # In training too: otherwise BatchNorm and drop path depend on how a batch is cut.
    model.eval()
    config = model.visual.preprocess_cfg
    size = int(np.ravel(model.visual.image_size)[0])
    resized = {"shortest": size, "squash": [size, size]}.get(config["resize_mode"])
    if resized is None:
        fail(f"--model {name}: its resize mode, {config['resize_mode']}, is not supported")
    interpolation = InterpolationMode(config["interpolation"])
    preprocess_train = v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=interpolation)
    preprocess_val = v2.Compose([v2.Resize(resized, interpolation), v2.CenterCrop(size)])
    return model, preprocess_train, preprocess_val, tokenizer

def prepare_towers(model, args):
    """Compile the towers in place if --compile is given; the names of the weights stay the same."""
    if DEVICE.type == "cuda":
        model.visual.to(memory_format=torch.channels_last)              # faster convolutions
    if args.compile:
        model.visual.compile(dynamic=False)                 # a short batch would make it dynamic
        getattr(model, "text", model).transformer.compile()             # prompts vary in length

def autocast(precision):
    """Return the context in which towers run. Features leave it in float32, so losses are too."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(DEVICE.type, dtype, enabled=precision != "fp32")

def to_input(model, images):
    """Return uint8 images (n, 3, S, S) as the model expects them: normalised float32, on its
    device."""
    config = model.visual.preprocess_cfg
    x = images.to(model.logit_scale.device, non_blocking=True) / 255
    channels = zip(x.unbind(1), config["mean"], config["std"])
    # By numbers, not by tensors: copying a tensor to a GPU would wait for the GPU.
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)

def in_chunks(encode, model, x, accum):
    """Return encode(model, x), computed in `accum` chunks to save memory. Only the features are
    kept, so a loss may compare the whole batch, and the backward pass computes each chunk again
    (GradCache, Gao et al., 2021)."""
    features = [checkpoint(encode, model, chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in x.chunk(accum)]
    return torch.cat(features)

def normalize(x):
    """Return the rows of x (n, d) with L2 norm 1, in float32 (in float64 if x is)."""
    if x.dtype != torch.float64:
        x = x.float()
    return F.normalize(x, dim=-1)

def encode_image(model, images, accum=1):
    """Return L2-normalised features (n, d) in float32 of normalised images (n, 3, S, S)."""
    if accum > 1:
        return in_chunks(encode_image, model, images, accum)
    return normalize(model.encode_image(images))

def padding_has_no_effect(text):
    """Whether a text tower reads left to right and pools at the end-of-text token, so that nothing
    behind that token can reach the feature."""
    is_causal = text.attn_mask is not None and getattr(text, "cls_emb", None) is None
    pooling = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    return is_causal and pooling == "argmax" and torch.is_tensor(text.text_projection)

def encode_text(model, tokens, accum=1):
    """Return L2-normalised text features (n, d) in float32 of tokens (n, L), padded with zeros."""
    if accum > 1:
        return in_chunks(encode_text, model, tokens, accum)
    text = getattr(model, "text", model)                    # CLIP is its own text tower
    if not padding_has_no_effect(text):
        missing = text.context_length - tokens.shape[1]
        return normalize(model.encode_text(F.pad(tokens, (0, missing))))
    L = tokens.shape[1]
    x = text.token_embedding(tokens) + text.positional_embedding[:L]                # (n, L, width)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:L, :L]))
    end_of_text = tokens.argmax(-1)                         # the token with the largest id
    x = x[torch.arange(len(x), device=x.device), end_of_text]                       # (n, width)
    return normalize(x @ text.text_projection)                                      # (n, d)

def cut_padding(tokens):
    """Return tokens (n, L) without the columns that are padding in every row, but for those up to a
    multiple of 8: a GPU plans its work anew for each length."""
    longest = int(tokens.argmax(-1).max()) + 1              # up to the end-of-text token
    return tokens[:, :math.ceil(longest / 8) * 8].contiguous()

def tokenize(tokenizer, texts):
    """Return tokens (n, L), int32 on the CPU, of texts; L is the length of the longest, rounded up
    to a multiple of 8."""
    return cut_padding(tokenizer(texts).int())

tokenize_once = functools.lru_cache(32)(tokenize)            # scoring asks after each epoch

def prompts(tokenizer, classnames, templates):
    """Return tokens (K, M, L) of every class name in every template, which is a text with {} or a
    function of the name."""
    texts = []
    for classname in classnames:
        for template in templates:
            text = template(classname) if callable(template) else template.replace("{}", classname)
            texts.append(text)
    return tokenize_once(tokenizer, tuple(texts)).view(len(classnames), len(templates), -1)

@torch.no_grad()
def text_embeddings(model, tokenizer, classnames, templates):
    """Return text features (K, M, d) of every class in every template, each L2-normalised."""
    tokens = prompts(tokenizer, classnames, templates).flatten(0, 1)                # (K*M, L)
    by_length = tokens.argmax(-1).argsort()                 # so that most batches can be cut short
    features = []
    for rows in tqdm(by_length.split(1024), "prompts", leave=False, delay=3, disable=NO_BAR):
        batch = cut_padding(tokens[rows]).to(model.logit_scale.device)
        features.append(encode_text(model, batch))
    E = torch.cat(features)[by_length.argsort()]            # in the order of the prompts again
    return E.view(len(classnames), len(templates), -1)

def class_head(E):
    """Return the zero-shot classifier W_cls (K, d) of text features E (K, M, d): the normalised
    mean over the templates."""
    return normalize(E.mean(1))

def clip_loss(S):
    """Return CE2(S), the mean of the cross-entropies of the rows and of the columns of S (N, N):
    scalar. Row i belongs to column i."""
    target = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2

def contrastive_loss(image_features, text_features, logit_scale):
    """Return CLIP's loss over the global batch (Radford et al., 2021, figure 3): scalar. Features
    (n, d) are L2-normalised; logit_scale is already exponentiated, as in open_clip."""
    return clip_loss(logit_scale * gather(image_features) @ gather(text_features).T)

def gather(x):
    """Concatenate x of all processes, (n, ...) -> (N, ...).

    Gradients reach only this process's rows, scaled by WORLD. So the mean over the processes that
    average_gradients takes is the sum of their parts. Terms that do not pass through here (tau,
    W_v, W_cls) have the same gradient on every process, and the mean leaves it as it is."""
    if WORLD == 1:
        return x
    own = x.detach().contiguous()
    rows = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(rows, own)
    rows[RANK] = own + WORLD * (x - x.detach())             # x with WORLD times its gradient
    return torch.cat(rows)

def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one all-reduce.

    DistributedDataParallel would do it during the backward pass, but its hooks want one forward
    pass of one module, and here two towers run in chunks that are computed again."""
    if WORLD == 1:
        return
    trained = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in trained]).div_(WORLD)
    dist.all_reduce(flat)
    for p, mean in zip(trained, flat.split([p.numel() for p in trained])):
        mean = mean.view_as(p)
        if mean.stride() == p.grad.stride():
            p.grad = mean                                   # a view: nothing is copied
        else:                                               # channels_last
            p.grad.copy_(mean)

def epoch_ended(step, total, n, args):
    """Whether val is to be scored after this step: --eval-every epochs of n images have ended. The
    last epoch does not count, as the end of the run scores all sets."""
    if not args.eval_every or step + 1 == total:
        return False
    images_seen = (step + 1) * args.batch_size
    return images_seen % (args.eval_every * n) < args.batch_size

# ---- 2. scores and the table ---------------------------------------------------------------------
def ece(confidence, correct, bins=15):
    """Return the expected calibration error of a whole set (Guo et al., 2017), in [0, 1]: the sum
    over equal bins of confidence of n_bin / n * |accuracy - confidence|. Both arguments are (n,);
    correct is 0 or 1."""
    confidence = np.asarray(confidence, np.float64)
    correct = np.asarray(correct, np.float64)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, correct - confidence, minlength=bins)    # n_bin * (acc. - conf.)
    return float(np.abs(gaps).sum() / len(confidence))

def scores(logits, labels):
    """Score a whole set from its logits (n, K) and labels (n,): fractions, but nll is in nats.

    mean_per_class is the mean of the classes' recalls, and macro_f1 that of their F1 scores, over
    the classes that the labels have, as in WILDS. ece_batch10 is what CaRot's code reports: the
    mean over batches of 512, with 10 bins. It is biased upwards, and is here only to be compared
    with the papers' tables."""
    p = logits.float().softmax(-1)                                                  # (n, K)
    confidence, predicted = p.max(-1)
    correct = (predicted == labels).double()
    top1 = correct.mean().item()
    squared_error = (p - F.one_hot(labels, p.shape[1])).square().sum(-1)
    hits = labels.bincount(correct, len(p.T))                                       # (K,)
    of_class = labels.bincount(minlength=len(p.T))
    guesses = predicted.bincount(minlength=len(p.T))
    is_there = of_class > 0
    recall = hits / of_class
    f1 = 2 * hits / (of_class + guesses)
    batch_eces = [len(hits) * ece(c, hits, 10)
                  for c, hits in zip(confidence.split(512), correct.split(512))]
    return {
        "top1": top1,
        "top1_se": math.sqrt(top1 * (1 - top1) / len(labels)),
        "ece": ece(confidence, correct),
        "mean_per_class": recall[is_there].mean().item(),
        "macro_f1": f1[is_there].mean().item(),
        "ece_batch10": sum(batch_eces) / len(labels),
        "nll": F.cross_entropy(logits.float(), labels).item(),
        "brier": squared_error.mean().item(),
    }

@torch.no_grad()
def image_features(models, preprocesses, images, args, skip_corrupt=False, precision="fp32"):
    """Return the features (n, d) of one set for each model, on the CPU. Each image is decoded once
    for all models. An unreadable image ends the program or, with skip_corrupt, has NaN."""
    n = len(images)
    block = math.ceil(n / WORLD)                            # each process computes one block
    rows = [min(row, n - 1) for row in range(RANK * block, (RANK + 1) * block)]
    data = EvalImages(images, {repr(p): p for p in preprocesses}, skip_corrupt)
    batch_size = args.batch_size // vars(args).get("accum", 1)          # memory may be small
    features = [[] for _ in models]
    for crops, readable in load(data, rows, batch_size, args, images.name):
        for model, preprocess, of_model in zip(models, preprocesses, features):
            x = crops[repr(preprocess)]
            with autocast(precision):
                u = encode_image(model, to_input(model, x))                         # (n, d)
            u[~readable] = math.nan
            of_model.append(u)
    return [gather(torch.cat(of_model))[:n].cpu() for of_model in features]

def zero_shot_head(model, tokenizer, images):
    """Return the zero-shot classifier (K, d) of the classes of a set."""
    return class_head(text_embeddings(model, tokenizer, images.classnames, images.templates))

@torch.no_grad()
def set_logits(model, tokenizer, images, features, head):
    """Return logits (n, K') of one set from its features (n, d), on the CPU: by the head (K, d) of
    the training classes or, if the set has a class that was not trained on, by a zero-shot head of
    all classes of the set."""
    tau = model.logit_scale.exp()
    columns = images.columns
    if columns is None:
        head = zero_shot_head(model, tokenizer, images)
        columns = [[k] for k in range(len(head))]
    head = head.to(tau.device)
    longest = max(map(len, columns))                        # shorter lists repeat themselves
    columns = torch.tensor([(c * longest)[:longest] for c in columns], device=tau.device)
    blocks = []
    for u in features.split(4096):
        logits = tau * u.to(tau.device) @ head.T                                    # (4096, K)
        blocks.append(logits[:, columns].amax(-1).cpu())                            # (4096, K')
    return torch.cat(blocks)

def score_set(images, logits, labels):
    """Return the scores of one set and what a reader of them needs to know. Rows that could not be
    read are missing in logits (n, K') and labels (n,)."""
    if not logits.isfinite().all():
        fail(f"no prediction for {images.name}: the weights of the model are not finite")
    about = {
        "n": len(labels),
        "classes": len(images.classes),
        "skipped": len(images) - len(labels),
        "head": images.head}
    return {**about, **scores(logits, labels)}

def summary(sets, scores_of):
    """Return {"sets": scores by name, "shift_mean": their mean over the sets that are shifts}."""
    shifts = [scores_of[images.name] for images in sets if images.is_shift]
    mean = None
    if shifts:
        mean = {key: fmean(shift[key] for shift in shifts) for key in ("top1", "ece")}
    return {"sets": scores_of, "shift_mean": mean}

def evaluate(model, tokenizer, preprocess, sets, args, head=None):
    """Return the summary of a model on sets, of which val is the first. head (K, d) classifies the
    training classes; None: zero-shot. In float32, as bf16 may turn near ties around."""
    if head is None:
        head = zero_shot_head(model, tokenizer, sets[0])
    scores_of = {}
    for images in sets:
        features, = image_features([model], [preprocess], images, args)
        logits = set_logits(model, tokenizer, images, features, head)
        scores_of[images.name] = score_set(images, logits, torch.from_numpy(images.labels))
    return summary(sets, scores_of)

def table(columns):
    """Return a table of models on the same sets, {title: summary}: top-1 and ECE in percent."""
    first = next(iter(columns.values()))
    rows = {name: f"{r['n']:>8}  {r['head']:<10}" for name, r in first["sets"].items()}
    if first["shift_mean"]:
        rows["shift mean"] = " " * 20
    titles = " " * 20
    header = f"{'images':>8}  {'head':<10}"
    for title, column in columns.items():
        if len(title) > 21:
            title = f"…{title[-20:]}"
        titles += f"{title:>22}"
        header += f"{'top-1':>8}{'± se':>6}{'ECE':>8}"
        scores_of = {**column["sets"], "shift mean": column["shift_mean"]}
        for name in rows:
            r = scores_of[name]
            error = f"±{100 * r['top1_se']:.1f}" if "top1_se" in r else ""
            rows[name] += f"{100 * r['top1']:>8.2f}{error:>6}{100 * r['ece']:>8.2f}"
    width = max(map(len, rows))
    lines = [f"{name:<{width}}{row}" for name, row in {"": titles, "set": header, **rows}.items()]
    return "\n".join(lines)

# ---- 3. data -------------------------------------------------------------------------------------
@dataclass
class ImageSet:
    """Images of a folder with their labels, and the texts of their classes."""
    name: str                                               # its row in the table
    classes: list                                           # K folder names
    classnames: list                                        # K names, as prompts say them
    templates: list                                         # M prompts, with {} for a class name
    paths: np.ndarray                                       # (n,) bytes: n strings would grow in
                                                            # every worker that touches them
    labels: np.ndarray                                      # (n,) indices of classes
    # columns[k] lists the training classes that class k covers (usually one; the largest logit
    # counts). None: some class was not trained on, so the set has a zero-shot head of its own.
    columns: list | None
    head: str                                               # what classifies it: "all" or "subset"
                                                            # of the training classes' head, or
                                                            # "zero-shot", a head of its own
    # A shift is a set that --val and --train do not name, that is not called test, and whose
    # classes were all trained on. The shift mean is over these.
    is_shift: bool

    def __len__(self):
        return len(self.paths)

def list_folder(path):
    """Return the paths of the folders and, as bytes, of the images in a folder, sorted, without
    hidden ones. Raise OSError if it cannot be read."""
    folders = []
    images = []
    for entry in sorted(os.scandir(path), key=attrgetter("name")):
        if entry.name.startswith("."):
            continue
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.lower().endswith(IMG_EXTENSIONS) and not is_folder:
            images.append(os.fsencode(entry.path))
        elif isdir(entry.path):                             # a link to a folder is one, too
            folders.append(entry.path)
    return folders, images

def images_below(folder, seen):
    """Return the images in a folder and in all folders below it. `seen` holds the real paths of
    folders to leave out, as links may form a loop; those visited are added."""
    seen.add(realpath(folder))
    folders, images = list_folder(folder)
    for inner in folders:
        if realpath(inner) not in seen:
            images += images_below(inner, seen)
    return images

def scan(path, is_asked_for=True):
    """Return {class: paths of its images} of an image folder, path/<class>/*. Folders below a class
    belong to it, but only if some class has images of its own: otherwise path is a folder of sets.
    Where there are no images, end the program or, if nobody asked for them, return {}."""
    found = {}
    problem = f"no images in {path}/<class>/"
    try:
        classes, _ = list_folder(path)
        if any(list_folder(c)[1] for c in classes):
            real = pathlib.Path(realpath(path))
            above = {str(real), *map(str, real.parents)}
            found = {basename(c): images_below(c, set(above)) for c in classes}
    except OSError as e:
        found = {}
        problem = f"{e.filename} cannot be read ({e.strerror})"
    if not found and is_asked_for:
        fail(f"{path}: {problem}. If it is a folder of image folders, give {path}/*")
    if not found:
        say(f"warning: {path} is skipped: {problem}")
    for c, images in found.items():
        if not images:
            say(f"warning: {path}/{c} holds no image and is skipped")
    return {c: images for c, images in found.items() if images}

def flatten(found, classes):
    """Return the paths (n,) and labels (n,) of {class: paths}; labels are indices of classes."""
    paths = [path for c in classes for path in found.get(c, [])]
    counts = [len(found.get(c, [])) for c in classes]
    return np.array(paths), np.repeat(np.arange(len(classes)), counts)

def read_rows(path, *columns):
    """Read a tab-separated text file with these columns into a list of rows, [] if there is no such
    file. A header line, which starts with "path", is skipped."""
    if not exists(path):
        return []
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")    # some editors write a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path} cannot be read as text ({e})")
    rows = []
    for line in text.split("\n"):
        row = [cell.strip() for cell in line.split("\t")]
        if not any(row) or row[0] == columns[0] == "path":
            continue
        if len(row) != len(columns) or not all(row):
            fail(f"{path}: expected {'<TAB>'.join(columns)}, found {line!r}")
        rows.append(row)
    return rows

def listed_names(folders):
    """Return {class folder: name} of the lines of classnames.txt in these folders; the first folder
    that lists a class decides."""
    names = {}
    for folder in reversed(folders):
        names.update(read_rows(f"{folder}/classnames.txt", "folder", "name"))
    return names

def find_texts(classes, folders, templates):
    """Return the class names (K) and templates (M) of which prompts are made.

    A class name comes from classnames.txt (folder<TAB>name) in the first of `folders` that lists
    the class; otherwise a wnid has OpenAI's name, and any other class the folder's name with
    spaces for underscores. Templates come from templates.txt in the first of `folders` that has
    one; otherwise they are `templates`."""
    names = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
    names.update(listed_names(folders))
    for folder in reversed(folders):
        own = [row[0] for row in read_rows(f"{folder}/templates.txt", "prompt")]
        if not all("{}" in template for template in own):
            fail(f"{folder}/templates.txt: expected a prompt with {{}} on each line")
        templates = own or templates
    return [names.get(c, c.replace("_", " ")) for c in classes], templates

def match_classes(path, folders, train):
    """Return {class folder: the names of the training classes that it covers} of a set.

    path/classes.txt (folder<TAB>training class[;training class...]) decides. Any other folder
    covers the training class of its own name. Digits that no classnames.txt lists are numbers: of
    training classes that are numbers, too (01 is 1), otherwise indices of the sorted training
    classes (ImageNet-V2). End the program if they are neither."""
    listed = dict(read_rows(f"{path}/classes.txt", "folder", "training class[;...]"))
    named = {*train.classes, *listed_names([path, dirname(path)])}
    numbers = {folder: int(folder) for folder in folders
               if folder.isdecimal() and folder not in named}
    class_of = {int(c): c for c in train.classes if c.isdecimal()}
    are_indices = not class_of and len(numbers) == len(folders)
    if are_indices:
        class_of = dict(enumerate(train.classes))
    covered = {}
    for folder in folders:
        if folder in listed:
            covered[folder] = [name.strip() for name in listed[folder].split(";")]
        elif folder not in numbers:
            covered[folder] = [folder]
        elif numbers[folder] in class_of:
            covered[folder] = [class_of[numbers[folder]]]
        else:
            fail(f"{path}/{folder} is neither the name nor the index of a training class; write "
                 f"{folder}<TAB>training class into {path}/classes.txt or, for a new class, "
                 f"{folder}<TAB>name into {path}/classnames.txt")
    if are_indices:
        first, *_ = covered[folders[0]]
        names = dict(zip(train.classes, train.classnames))
        say(f"{path}: its folders are indices of the training classes; {folders[0]} is "
            f"{names.get(first, first)}")
    return covered

def read_set(name, path, found, train, is_shift):
    """Return the ImageSet of an image folder whose images are `found`, {class: paths}. Folders that
    cover the same training classes are one class, called after the first of them."""
    folders_of = {}                                         # {covered training classes: folders}
    for folder, names in match_classes(path, list(found), train).items():
        folders_of.setdefault(tuple(sorted(set(names))), []).append(folder)
    covering = {}                                           # {training class: the list it is in}
    images_of = {}                                          # {class: paths}
    for names, folders in folders_of.items():
        for c in names:
            if c in covering:
                fail(f"{path}/classes.txt: {';'.join(covering[c])} and {';'.join(names)} overlap")
            covering[c] = names
        images_of[folders[0]] = [image for folder in folders for image in found[folder]]

    index = {c: k for k, c in enumerate(train.classes)}
    columns = None
    head = "zero-shot"
    if covering.keys() <= index.keys():                     # no class is new
        columns = [[index[c] for c in names] for names in folders_of]
        head = "all" if len(columns) == len(index) else "subset"
    classes = list(images_of)
    texts = find_texts(classes, [path, dirname(path)], train.templates)
    is_shift = is_shift and columns is not None
    return ImageSet(name, classes, *texts, *flatten(images_of, classes), columns, head, is_shift)

def hash_order(paths, seed):
    """Return paths in the order of a hash of seed and file name: one file more moves no other."""
    def digest_of_name(path):
        return hashlib.md5(b"%d " % seed + basename(path), usedforsecurity=False).digest()
    return sorted(paths, key=digest_of_name)

def hold_out(found, fraction, seed):
    """Split {class: paths} into the part for training and a fraction of each class for val."""
    train = {}
    val = {}
    for c, paths in found.items():
        ordered = hash_order(paths, seed)
        n_val = min(math.ceil(fraction * len(paths)), len(paths) - 1)       # one is to train on
        val[c] = sorted(ordered[:n_val])
        train[c] = sorted(ordered[n_val:])
    return train, val

def warn_of_unused_lines(path, folders):
    """Warn of lines of path/classnames.txt and path/classes.txt that belong to no class folder."""
    for file in ("classnames.txt", "classes.txt"):
        rows = read_rows(f"{path}/{file}", "folder", "...")
        unused = [folder for folder, _ in rows if folder not in folders]
        if unused:
            say(f"warning: {path}/{file}: there is no folder for {len(unused)} of {len(rows)} "
                f"lines, such as {unused[0]}")

def read_data(args):
    """Read ROOT by --data, --train, --val and --eval: return the training set and the list of the
    sets to score, of which val is the first. Where --train is empty, val stands in for it."""
    say(f"reading the image folders of {args.data}")
    val = args.val or "val"
    of_train = {}
    for name in args.train or [val]:
        for c, paths in scan(f"{args.data}/{name}").items():
            of_train.setdefault(c, []).extend(paths)
    classes = sorted(of_train)
    if len(classes) < 2:
        fail(f"{args.data}: training needs images of at least two classes, in <class>/*.jpg")

    of_root = {basename(folder): folder for folder in list_folder(args.data)[0]}
    trained = [realpath(f"{args.data}/{name}") for name in args.train]
    taken = {*trained, realpath(f"{args.data}/{val}")}
    if len(taken) < len(args.train) + 1:
        fail(f"--train {' '.join(args.train)} --val {val}: one folder is named twice")
    if args.val or val in of_root:
        of_val = scan(f"{args.data}/{val}")
    else:
        similar = [name for name in of_root.keys() - args.train
                   if name.lower() in ("val", "valid", "validation")]
        if similar:
            fail(f"{args.data} has no folder val; did you mean --val {similar[0]}?")
        of_train, of_val = hold_out(of_train, args.val_frac, args.seed)
        if not any(of_val.values()):
            fail(f"{args.data} has one training image a class, so none can be held out; add val/")
    shots = vars(args).get("shots")
    if shots:
        few = [c for c, paths in of_train.items() if len(paths) < shots]
        if few:
            say(f"warning: --shots {shots}: {len(few)} classes have fewer images, such as {few[0]}")
        for c, paths in of_train.items():
            of_train[c] = sorted(hash_order(paths, args.seed)[:shots])
    unknown = sorted(of_val.keys() - classes)
    if unknown:
        fail(f"{args.data}/{val} has classes that training lacks: {', '.join(unknown)}")

    openai_templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    texts = find_texts(classes, [args.data], openai_templates)
    columns = [[k] for k in range(len(classes))]
    train = ImageSet("train", classes, *texts, *flatten(of_train, classes), columns, "all", False)
    sets = [ImageSet("val", classes, *texts, *flatten(of_val, classes), columns, "all", False)]

    folders = set(classes)                                  # of all classes that are read
    taken = {*taken, realpath(f"{args.data}/train"), realpath(f"{args.data}/val")}
    of_eval = [("/".join(path.split("/")[-2:]), path) for path in args.eval]
    for name, path in [*of_root.items(), *of_eval]:
        if path in args.eval and realpath(path) in trained:
            fail(f"--eval {path} is trained on")
        if realpath(path) in taken:                         # each folder is scored once
            continue
        taken.add(realpath(path))
        found = scan(path, is_asked_for=path in args.eval)
        if found:
            sets.append(read_set(name, path, found, train, is_shift=name != "test"))
            warn_of_unused_lines(path, found)
            folders.update(found)
    warn_of_unused_lines(args.data, folders)
    if len({images.name for images in sets}) < len(sets):
        fail("--eval: two folders have the same name, and so have their parent folders")
    for images in [train, *sets]:
        twice = [name for name, count in Counter(images.classnames).items() if count > 1]
        if twice and (images is train or images.head == "zero-shot"):
            say(f"warning: {images.name}: two classes or more have the same name, so prompts "
                f"cannot tell them apart: {', '.join(twice)}")
    return train, sets

def decode(data):
    """Return the image that is in the bytes of a file, as uint8 RGB (3, H, W)."""
    image = Image.open(io.BytesIO(data))                    # reads the header, not the pixels
    short, long = sorted(image.size)
    if short * long > 89e6 or long > 100 * short:
        raise OverflowError("is too long or too large to be resized")
    try:
        x = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError):                      # a format that Pillow alone knows
        if image.mode[0] in "IF":                           # Pillow would clip all above 8 bits
            is_scaled = image.format == "PPM"               # to 16 bits, by Pillow
            if not is_scaled and (image.mode in "IF" or "I;12" in str(image.tile)):
                raise                                       # nobody knows what is white
            image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
        return v2.functional.pil_to_tensor(image.convert("RGB"))
    if x.ndim == 4:
        x = x[0]                                            # the first frame of an animation
    return v2.functional.to_dtype(x, torch.uint8, scale=True)           # from 16 bits

def read_image(path):
    """Return (uint8 RGB (3, H, W), "") or, if the file cannot be read or would fill the memory,
    (black, what is wrong with it). Orientation tags are ignored, as by open_clip."""
    try:
        return decode(pathlib.Path(os.fsdecode(path)).read_bytes()), ""
    except OverflowError as e:
        problem = str(e)
    except Exception:                                       # Pillow's plugins raise many kinds
        problem = "cannot be read"
    return torch.zeros(3, 8, 8, dtype=torch.uint8), problem

@functools.lru_cache(2)
def epoch_order(seed, epoch, n):
    """Return the order (n,) in which an epoch visits n images."""
    return np.random.default_rng([seed, epoch]).permutation(n)

@dataclass
class TrainImages:
    """An endless data set: index p is image p % n of epoch p // n; every epoch is shuffled anew.
    All randomness comes from (seed, epoch, row), so neither workers nor a resume change it.

    An item is a crop (uint8 (3, S, S)), its label, its row, and a random number."""
    images: ImageSet
    preprocess: torch.nn.Module
    seed: int

    def __getitem__(self, index):
        n = len(self.images)
        epoch, position = divmod(index, n)
        drawn = int(epoch_order(self.seed, epoch, n)[position])
        row, image = self.read(drawn)
        seeds = np.random.SeedSequence([self.seed, epoch, drawn]).generate_state(2).tolist()
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seeds[0])       # transforms.v2 takes no generator
        crop = self.preprocess(image)
        torch.set_rng_state(state)
        return crop, int(self.images.labels[row]), row, seeds[1]

    def read(self, drawn):
        """Return the first readable row from `drawn` on, and its image."""
        for row in range(drawn, drawn + 100):
            row %= len(self.images)
            image, problem = read_image(self.images.paths[row])
            if not problem:
                return row, image
            path = os.fsdecode(self.images.paths[row])
            warnings.warn(f"{path!r} {problem}; the next image takes its place")
        raise OSError(f"100 training images in a row cannot be read, such as {path!r}")

@dataclass
class EvalImages:
    """The images of a set, in each way to preprocess them, and whether they could be read."""
    images: ImageSet
    preprocesses: dict
    skip_corrupt: bool

    def __getitem__(self, row):
        image, problem = read_image(self.images.paths[row])
        if problem and not self.skip_corrupt:
            raise OSError(f"{os.fsdecode(self.images.paths[row])!r} {problem}; remove it")
        return {name: p(image) for name, p in self.preprocesses.items()}, not problem

def load(data, indices, batch_size, args, title=None):
    """Yield batches of data[i] for the indices of this process; batch_size is of all processes.
    With a title, a progress bar appears after three seconds."""
    loader = torch.utils.data.DataLoader(
        data, max(1, batch_size // WORLD), sampler=indices, num_workers=args.workers,
        pin_memory=DEVICE.type == "cuda")
    try:
        yield from tqdm(loader, title, leave=False, delay=3, disable=NO_BAR or not title)
    except OSError as e:                                    # a worker puts its traceback before it
        fail(str(e).splitlines()[-1])

def train_loader(images, preprocess, args, first_step, total):
    """Yield the batches of steps first_step to total - 1: crops uint8 (n, 3, S, S), labels, rows
    and random numbers (n,). Process r has every WORLD-th image of a global batch, from r on."""
    data = TrainImages(images, preprocess, args.seed)
    N = args.batch_size
    return load(data, range(first_step * N + RANK, total * N, WORLD), N, args)

# ---- 4. flags and the files of a run -------------------------------------------------------------
def add_number(group, flag, default, help):
    """Add a flag for a number of the type of its default, which the help shows."""
    group.add_argument(flag, type=type(default), default=default, help=f"{help} (%(default)s)")

def make_parser(doc, out):
    """Return an argparse parser of the flags that all scripts share."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # unlike a notebook's
            # Replace what a terminal cannot print; a killed run's lines are in its log file.
            stream.reconfigure(errors="replace", line_buffering=True)
    precision = "fp32"
    if DEVICE.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp16"
    add = parser.add_argument
    add("--data", metavar="ROOT", type=abspath, help="holds train/, val/, shifts (default: a toy)")
    add("--train", nargs="+", default=["train"], metavar="DIR", help="training folders in ROOT")
    add("--val", metavar="DIR", help="validation folder in ROOT (val, if there is one)")
    add_number(parser, "--val-frac", 0.2, "held out of training if there is no val")
    add("--eval", nargs="+", default=[], type=abspath, metavar="DIR", help="more folders to score")
    add("--pretrained", default="openai", help="tag, file, or '' for random weights (%(default)s)")
    add("--out", default=out, help="folder for everything that is written (%(default)s)")
    add_number(parser, "--seed", 0, "seed of all randomness")
    add_number(parser, "--batch-size", 512, "global batch size, over all GPUs")
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):                    # those that this process may use
        cores = len(os.sched_getaffinity(0))
    workers = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if DEVICE.type == "cpu":
        workers -= torch.get_num_threads()                  # which compute on the other cores
    add_number(parser, "--workers", min(max(workers, 0), 16), "loader processes for each GPU")
    add("--precision", choices=["fp32", "bf16", "fp16"], default=precision, help="(%(default)s)")
    return parser

def make_train_parser(method, doc, out, lr):
    """Return a parser of the flags that the training scripts share. Their defaults are FLYP's
    recipe, which CaRot's released code has, too."""
    parser = make_parser(doc, out)
    parser.set_defaults(method=method)
    parser.add_argument("--model", default="ViT-B-16-quickgelu",
                        help="open_clip name or local-dir:PATH (%(default)s)")
    add_number(parser, "--epochs", 10, "passes over the training images")
    parser.add_argument("--max-steps", type=int, help="end the run and its schedule earlier")
    add_number(parser, "--shots", 0, "training images for each class; 0: all")
    add_number(parser, "--lr", lr, "peak learning rate of AdamW")
    add_number(parser, "--wd", 0.1, "weight decay of every parameter")
    add_number(parser, "--warmup", 500, "warm-up steps; then cosine decay to 0")
    add_number(parser, "--accum", 1, "chunks of each batch: the same gradient, less memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile the towers")
    add_number(parser, "--log-every", 50, "steps between two lines of log.jsonl")
    add_number(parser, "--save-every", 1000, "steps between two checkpoints")
    add_number(parser, "--eval-every", 1, "epochs between two scores of val; 0: at the end only")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --out first")
    return parser

def given_flags(parser, argv):
    """Parse argv: return the flags, None where they are not given, and the defaults of all."""
    defaults = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    return args, defaults

def fill_in(args, defaults):
    """Fill in the defaults of flags that were not given. Without --data draw the toy, and take its
    defaults where it has them. End the program if a number is out of range."""
    if not args.data and not defaults["data"]:
        sys.path.insert(0, f"{dirname(abspath(__file__))}/tests")
        try:
            import toy
        except ModuleNotFoundError:
            fail("--data ROOT is needed, a folder with train/<class>/* and val/<class>/*")
        defaults.update(toy.defaults())
    for name, value in vars(args).items():
        if value is None:
            setattr(args, name, defaults[name])
    positive = "accum batch_size ema_every epochs k log_every max_steps save_every top".split()
    for name, value in vars(args).items():
        least = int(name in positive)                       # the others may be 0
        if type(value) in (int, float) and not least <= value < 2 ** 63:
            fail(f"--{name.replace('_', '-')} {value}: expected a number of {least} or more")
    if not 0 < args.val_frac < 1:
        fail(f"--val-frac {args.val_frac}: expected a fraction above 0 and below 1")
    return args

def start_processes():
    """Set up the device, and join the processes that torchrun started."""
    torch.set_float32_matmul_precision("highest")           # some container images switch TF32 on
    torch.backends.cudnn.allow_tf32 = False
    # cuDNN's attention may have NaN gradients under a mask, and plans anew for each shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:                                           # one may download while others wait
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        say("warning: Slurm has several tasks, but torchrun did not start this one, so it runs "
            "alone; see the README")

def end_processes():
    """Take leave of the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()

def total_steps(args, n):
    """Return the optimiser steps of a run over n images: --epochs in whole batches, at most
    --max-steps."""
    chunks = WORLD * args.accum
    if args.batch_size > n or args.batch_size % chunks:
        fail(f"--batch-size {args.batch_size}: expected at most {n}, the number of training "
             f"images, and a multiple of {chunks} (processes x --accum)")
    steps = args.epochs * n // args.batch_size
    if args.max_steps:
        steps = min(steps, args.max_steps)
    if args.warmup >= steps:
        say(f"warning: --warmup {args.warmup} in a run of {steps} steps: --lr is never reached")
    return steps

@contextlib.contextmanager
def replacing(path):
    """Yield a binary file to write. It replaces `path` when it is whole, and not before."""
    try:
        os.makedirs(dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "wb") as f:
            yield f
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:                    # torch.save raises the latter
        if isfile(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        fail(f"{path} cannot be written ({e}); an older file, if any, is kept")

def read_json(path):
    """Return the content of a JSON file, or {} if there is none."""
    if not isfile(path):
        return {}
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as e:
        fail(f"{path} is damaged ({e}); remove it")

def write(path, content, **metadata):
    """Write {name: tensor} to a .safetensors file, with metadata of strings, or JSON to another."""
    if RANK > 0:
        return
    if str(path).endswith(".safetensors"):
        tensors = {name: t.detach().cpu().contiguous() for name, t in content.items()}
        data = safetensors.torch.save(tensors, metadata)
    else:
        data = json.dumps(content, indent=1).encode()
    with replacing(path) as f:
        f.write(data)

def export_head(W_cls, model, images, path, is_trained):
    """Write the classifier W_cls (K, d) of a model: logits are exp(logit_scale) u W_cls^T."""
    write(path, {"W_cls": W_cls, "logit_scale": model.logit_scale},
          classes=json.dumps(images.classes), classnames=json.dumps(images.classnames),
          is_trained=json.dumps(is_trained))

def export(model, name, path):
    """Write a model, loaded as `name`, so that open_clip can load it as local-dir:path."""
    about = {"model_cfg": open_clip.get_model_config(name),
             "preprocess_cfg": model.visual.preprocess_cfg}
    write(f"{path}/open_clip_model.safetensors", model.state_dict())
    write(f"{path}/open_clip_config.json", about)

def digest(images):
    """Return a hash of a set: of its images, by folder and name, of their classes and texts. It is
    the same if the set lies elsewhere."""
    files = [path.split(b"/")[-2:] for path in images.paths.tolist()]
    about = (files, images.labels.tolist(), images.classnames, images.templates, images.columns)
    return hashlib.sha256(repr(about).encode()).hexdigest()

# Flags that may differ when a run continues: where its data are, which sets are scored, and what
# changes only the rounding. The training images and texts themselves must be the same.
PLACES = "data val val_frac eval captions pool".split()
FREE = [*PLACES, *"out workers log_every save_every eval_every overwrite accum compile".split()]
FILES = "results.json last.pt log.jsonl model teacher head.safetensors features.safetensors".split()

class Run:
    """The files of a run in --out. results is the content of results.json, and first_step the step
    to begin with: 0, or where the last checkpoint was written."""
    def __init__(self, args, train, sets, *texts):
        """Continue the run in --out, or begin one. End the program if --out holds another."""
        self.args = args
        self.path = pathlib.Path(args.out)
        trained_on = hashlib.sha256(repr((digest(train), texts)).encode()).hexdigest()
        settings = {**vars(args), "training images and texts": trained_on}
        old = read_json(self.path / "args.json")
        changed = [f"{name.replace('_', '-')} {old.get(name)}" for name in settings
                   if name not in FREE and old.get(name) != settings[name]]
        files = [self.path / name for name in FILES if (self.path / name).exists()]
        if files and changed and not args.overwrite:
            fail(f"--out {args.out} holds a run with other settings ({', '.join(changed)}); choose "
                 "another --out or add --overwrite")
        if RANK == 0:
            self.lock()
            if args.overwrite or not files:
                old = settings
                for file in files:                          # old ones would pass for the new run's
                    if file.is_dir():
                        shutil.rmtree(file)
                    else:
                        file.unlink()
            places = {name: settings[name] for name in PLACES if name in settings}
            # Last: until then a folder that is half empty belongs to the old run.
            write(self.path / "args.json", {**old, **places})
        if WORLD > 1:
            dist.barrier()                                  # the other processes wait for that

        checkpoint = self.path / "last.pt"
        self.checkpoint = {"step": 0, "log": ""}
        if checkpoint.exists():
            try:
                self.checkpoint = torch.load(checkpoint, "cpu", mmap=True, weights_only=True)
            except Exception as e:                          # of many kinds
                fail(f"{checkpoint} is damaged ({textwrap.shorten(str(e), 200)}); remove it, and "
                     "the run begins anew")
        self.first_step = self.checkpoint["step"]
        self.results = read_json(self.path / "results.json")
        scored = {images.name: digest(images) for images in sets}
        everything = hashlib.sha256(repr((trained_on, scored)).encode()).hexdigest()
        if self.results.get("scored", scored) != scored:
            if "sets" in self.results and not self.first_step:
                fail(f"the sets to score have changed, and {checkpoint} is gone; score them by "
                     f"evaluate.py --model {args.out}")
            say(f"the sets to score have changed since {args.out} was scored: all are scored again")
            self.results = {}
        self.results["scored"] = scored
        facts = [self.first_step, len(self.results), int(everything[:15], 16)]
        facts = gather(torch.tensor([facts], device=DEVICE))
        if len(facts.unique(dim=0)) > 1:
            fail(f"--out {args.out} is not the same folder for all processes, or {args.data} has "
                 "other images for some of them")

    def lock(self):
        """Keep other runs out of --out as long as this process lives, if its file system can."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.path / ".lock", "w")
        except OSError as e:
            fail(f"--out {self.path} cannot be written ({e})")
        try:
            # Unlike flock it is not inherited by loaders, which may outlive a killed run.
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"--out {self.path} is in use by another run")
        except OSError:                                     # there are no locks here
            pass

    def add_results(self, results):
        """Add {name: value} to results.json."""
        self.results.update(results)
        write(self.path / "results.json", self.results)

    def report(self):
        """Print the table, zero-shot beside fine-tuned."""
        say("\n" + table({"zero-shot": self.results["zero_shot"], "fine-tuned": self.results}))

    def restore(self, saved):
        """Load the checkpoint, if there is one, into saved, {name: what has a state_dict}, and set
        the log back to that moment."""
        if self.first_step:
            for name, part in saved.items():
                part.load_state_dict(self.checkpoint[name])
        if RANK == 0:
            with replacing(self.path / "log.jsonl") as f:
                f.write(self.checkpoint["log"].encode())
        del self.checkpoint                                 # it would hold a second copy in memory

    def steps(self, batches, total):
        """Return an iterator over (step, batch) up to step total - 1, with a progress bar."""
        batches = zip(range(self.first_step, total), batches)
        self.bar = tqdm(batches, self.args.method, total, initial=self.first_step, disable=NO_BAR)
        self.logged = self.first_step - 1, time.perf_counter()
        return self.bar

    def log(self, step, **values):
        """Log numbers or scalar tensors. End the program if one of them is not finite."""
        for name, value in values.items():
            if torch.is_tensor(value):
                values[name] = value.item()
        if not all(map(math.isfinite, values.values())):
            fail(f"loss not finite at step {step}: {values}; lower --lr? last.pt is kept")
        self.bar.set_postfix(values)
        line = {"step": step, **values}
        if "loss" in values:                                # otherwise val has been scored
            logged_step, logged_at = self.logged
            images = (step - logged_step) * self.args.batch_size
            line["images_per_s"] = images / (time.perf_counter() - logged_at)
        self.logged = step, time.perf_counter()
        if NO_BAR:
            say(f"{self.args.method} " + ", ".join(f"{k} {v:.6g}" for k, v in line.items()))
        if RANK == 0:
            try:
                with open(self.path / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
            except OSError as e:
                fail(f"{self.path}/log.jsonl cannot be written ({e}); last.pt is kept")

    def save(self, step, saved):
        """Write last.pt: the state of saved, {name: what has a state_dict}, after `step` steps, and
        the log so far. End the program if a weight is not finite."""
        if RANK > 0:
            return
        state = {name: part.state_dict() for name, part in saved.items()}
        for tensor in tree_leaves(state):
            if torch.is_tensor(tensor) and not tensor.isfinite().all():
                fail(f"weights are not finite after step {step - 1}; {self.path}/last.pt is kept")
        state["step"] = step
        state["log"] = (self.path / "log.jsonl").read_text()
        with replacing(self.path / "last.pt") as f:
            torch.save(state, f)
