# SPDX-License-Identifier: MIT
"""The toy that `python calft.py` runs on when no --data is given: drawn images and a small CLIP that knows them.

    python tests/toy.py               # write the toy (a few seconds), print where it is
    python tests/toy.py --pretrain    # make tests/toy_clip.safetensors anew (see `pretrain`)

A class is a shape with a pattern ("striped star"): 48 of them, of which fine-tuning sees 36. An image is one object
on a background in one of six styles. Training and val are photographs in which colour gives the class away four times
in five, as it never does in the other styles: that is what a robust method should not lean on.

    root/train  root/val                              photographs of 36 classes, colour tied to class
    root/{sketch,cartoon,painting,graffiti,dark}      the same 36 classes in other styles, any colour: the shifts
    root/unseen                                       photographs of the 12 classes left out, any colour
    root/captions.tsv                                 a caption for each training image, naming colour, size, background
    pool/  pool.tsv                                   image-text pairs in all styles and of all classes (for anchor.py)
    clip/                                             the CLIP, an open_clip `local-dir:`

The CLIP is pretrained on captioned images of all styles and classes, so its zero-shot head means something everywhere.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import sys

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import common  # noqa: E402

WEIGHTS = os.path.join(HERE, "toy_clip.safetensors")
SHAPES = "circle square triangle star heart cross ring moon".split()
PATTERNS = "plain striped dotted checkered ringed halved".split()
COLOURS = {"red": (.85, .12, .12), "orange": (.95, .55, .1), "yellow": (.93, .88, .15), "green": (.15, .65, .2),
           "cyan": (.15, .75, .8), "blue": (.15, .25, .85), "purple": (.55, .2, .75), "pink": (.95, .5, .75)}
BACKGROUNDS = {"grass": (.35, .5, .25), "sand": (.75, .68, .5), "sky": (.6, .72, .85), "stone": (.5, .5, .5),
               "wood": (.5, .35, .22), "snow": (.88, .9, .92)}
SIZES = ["small", "medium", "large"]
STYLES = ["photo", "sketch", "cartoon", "painting", "graffiti", "dark"]
# Which of CLIP's 80 templates go with a style: all that hold one of these words; a photograph takes what is left.
WORDS = {"sketch": ["sketch", "doodle", "drawing", "black and white"], "cartoon": ["cartoon", "video game", "plastic", "toy"],
         "painting": ["painting", "art of", "rendition", "rendering", "sculpture"],
         "graffiti": ["graffiti", "tattoo", "embroidered", "origami", "plushie"], "dark": ["dark"]}
CLASSES = [f"{p} {s}" for s in SHAPES for p in PATTERNS]
UNSEEN = [f"{p} {s}" for i, s in enumerate(SHAPES) for j, p in enumerate(PATTERNS) if (i + j) % 4 == 3]
SEEN = [c for c in CLASSES if c not in UNSEEN]
TIE = 0.8                                                      # how often a training photograph's colour is its class's own
SIZE = 32


# ---- drawing -------------------------------------------------------------------------------------------------------

def _shape(kind, x, y):
    """Signed distance (negative inside) of the points x, y (n, S, S) from shapes of radius about 1; kind (n,)."""
    r = (x * x + y * y).sqrt()
    a = torch.atan2(x, -y)

    def box(u, v, w, h):
        return torch.maximum(u.abs() - w, v.abs() - h)

    def star(points, inner):
        k = math.pi / points
        m = (a.remainder(2 * k) - k).abs() / k
        return r - (inner + (1.08 - inner) * m)
    tri = torch.maximum(y - .62, torch.maximum(.866 * x - .5 * y, -.866 * x - .5 * y) - .52)
    hx, hy = x.abs() * .95, -y * .95 + .35
    heart = torch.where(hx + hy > 1, ((hx - .25) ** 2 + (hy - .75) ** 2).sqrt() - .3536,
                        torch.minimum((hx ** 2 + (hy - 1) ** 2).sqrt(),
                                      ((hx - .5 * (hx + hy).clamp(min=0)) ** 2 + (hy - .5 * (hx + hy).clamp(min=0)) ** 2).sqrt())
                        * (hx - hy).sign())
    moon = torch.maximum(r - .95, .72 - ((x - .42) ** 2 + y ** 2).sqrt())
    every = [r - .85, box(x, y, .74, .74), tri, star(5, .42), heart, torch.minimum(box(x, y, .92, .3), box(x, y, .3, .92)),
             (r - .66).abs() - .27, moon]
    out = torch.empty_like(x)
    for i, d in enumerate(every):
        out[kind == i] = d[kind == i]
    return out


def _pattern(kind, x, y, phase):
    """The second colour's mask in {0, 1} at the points x, y (n, S, S); kind, phase (n,)."""
    p = phase[:, None, None]
    cell = .46
    u, v = (x + p) / cell, (y + p) / cell
    dots = ((u.remainder(1) - .5) ** 2 + (v.remainder(1) - .5) ** 2).sqrt() < .3
    every = [torch.zeros_like(x, dtype=torch.bool), v.remainder(1) < .5, dots,
             (u.floor() + v.floor()).remainder(2) < .5, ((x * x + y * y).sqrt() / cell + p).remainder(1) < .5, y > 0]
    out = torch.empty_like(x)
    for i, m in enumerate(every):
        out[kind == i] = m[kind == i].float()
    return out


def _noise(n, cells, g, size):
    """Smooth random fields (n, 1, size, size) of mean 0 and deviation about 1."""
    return F.interpolate(torch.randn(n, 1, cells, cells, generator=g), size=size, mode="bicubic", align_corners=False)


def draw(style, shape, pattern, colour, size, ground, g):
    """Draw n objects in one style: shape, pattern, colour, size, ground are (n,) long; uint8 (n, 3, 32, 32)."""
    n, S = len(shape), 2 * SIZE                                                     # drawn twice as large, then averaged
    uni = lambda lo, hi: lo + (hi - lo) * torch.rand(n, generator=g)
    scale, turn = (.62 + .13 * size) * uni(.95, 1.05), uni(-.35, .35)
    cx, cy = uni(-.12, .12), uni(-.12, .12)
    t = (torch.arange(S) + .5) / S * 2 - 1
    X, Y = t[None, None, :] - cx[:, None, None], t[None, :, None] - cy[:, None, None]
    c, s = turn.cos()[:, None, None], turn.sin()[:, None, None]
    x, y = (X * c + Y * s) / scale[:, None, None], (Y * c - X * s) / scale[:, None, None]
    d = _shape(shape, x, y) * scale[:, None, None]
    inside, second = (d < 0).float()[:, None], _pattern(pattern, x, y, uni(0, .46))[:, None]
    first = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]           # (n, 3, 1, 1)
    back = torch.tensor(list(BACKGROUNDS.values()))[ground][:, :, None, None]
    first = (first + .06 * torch.randn(n, 3, 1, 1, generator=g)).clamp(0, 1)
    other = torch.where(first.mean(1, keepdim=True) > .45, first * .35, first * .4 + .6)
    fill = first + (other - first) * second                                         # (n, 3, S, S)
    m = second * inside
    edges = ((F.max_pool2d(m, 3, 1, 1) - m) * inside).clamp(0, 1)                   # between the pattern's two colours
    line = (d.abs() < .045).float()[:, None]
    if style in ("photo", "dark"):
        ground_ = back + .07 * _noise(n, 5, g, S) + .07 * _noise(n, 17, g, S)
        light = 1 + .25 * (t[None, None, None, :] * uni(-1, 1)[:, None, None, None] + t[None, None, :, None] * uni(-1, 1)[:, None, None, None])
        out = (ground_ + (fill - ground_) * inside) * light
        if style == "dark":
            out = out * uni(.16, .3)[:, None, None, None]
        out = out + (.05 if style == "photo" else .02) * torch.randn(n, 3, S, S, generator=g) * 2
    elif style == "sketch":
        ink = (line + .7 * edges).clamp(0, 1) * (.75 + .2 * _noise(n, 9, g, S)).clamp(0, 1) + .12 * second * inside
        out = (.95 + .02 * _noise(n, 9, g, S) - .85 * ink).expand(n, 3, S, S)
    elif style == "cartoon":
        paper = .6 + .4 * back
        out = paper + ((fill * 1.15).clamp(0, 1) - paper) * inside
        out = out * (1 - (d.abs() < .075).float()[:, None])
    elif style == "painting":
        base = back * .8 + .2 * first.flip(1)
        out = base + (fill - base) * inside
        k = torch.ones(1, 1, 1, 7) / 7
        out = F.conv2d(F.pad(out.reshape(-1, 1, S, S), (3, 3, 0, 0), mode="replicate"), k).view(n, 3, S, S)
        out = ((out + .1 * _noise(n, 21, g, S)) * 5).round() / 5 + .05 * _noise(n, 32, g, S)
    elif style == "graffiti":
        row = ((t + 1) * 5).floor()
        mortar = (((t + 1) * 5).remainder(1) < .15)[:, None] | (((t[None, :] + 1) * 2.5 + .5 * row.remainder(2)[:, None]).remainder(1) < .08)
        wall = torch.tensor([.55, .28, .22])[None, :, None, None] + .05 * _noise(n, 13, g, S)
        wall = torch.where(mortar[None, None], torch.tensor(.7), wall)
        neon = (fill * 1.3 - .1).clamp(0, 1)
        out = wall + (neon - wall) * inside * .8
        out = out + (1 - out) * (d.abs() < .07).float()[:, None]
    out = F.avg_pool2d(out.clamp(0, 1), 2)
    return (out * 255).round().to(torch.uint8)


def sample(n, style, classes, g, tie=0.0):
    """Draw n objects of the given class indices (n,): images uint8 (n, 3, 32, 32) and their attributes.

    With probability `tie` the colour is the one that belongs to the class, otherwise any.
    """
    own = classes % len(COLOURS)
    colour = torch.where(torch.rand(n, generator=g) < tie, own, torch.randint(len(COLOURS), (n,), generator=g))
    size = torch.randint(len(SIZES), (n,), generator=g)
    ground = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    images = draw(style, classes // len(PATTERNS), classes % len(PATTERNS), colour, size, ground, g)
    return images, colour, size, ground


def style_templates():
    """CLIP's templates by style: {style: [str with {}]}; every one of the 80 belongs to exactly one style."""
    every = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    out = {style: [t for t in every if any(w in t for w in words)] for style, words in WORDS.items()}
    out["photo"] = [t for t in every if not any(t in ts for ts in out.values())]
    return out


def caption(style, name, colour, size, ground):
    """A caption that says more than the class: 'a photo of a small red striped star on grass.'"""
    what = "dark photo" if style == "dark" else style
    head = "graffiti of a" if style == "graffiti" else f"a {what} of a"
    if style == "sketch":                                                           # a sketch shows neither
        return f"{head} {SIZES[size]} {name}."
    if style == "graffiti":
        return f"{head} {SIZES[size]} {list(COLOURS)[colour]} {name} on a wall."
    return f"{head} {SIZES[size]} {list(COLOURS)[colour]} {name} on {list(BACKGROUNDS)[ground]}."


# ---- the CLIP ------------------------------------------------------------------------------------------------------

MODEL_CFG = {"embed_dim": 64,
             "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
             "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}


def words_in_use():
    """Sorted token numbers of everything that the toy can say."""
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    texts = [t for ts in style_templates().values() for t in ts] + CLASSES + ["on a wall"]
    texts += [caption(style, "", c, s, b) for style in STYLES for c in range(len(COLOURS)) for s in range(len(SIZES))
              for b in range(len(BACKGROUNDS))]
    return tokenizer(texts).unique()


def pretrain(steps=2000, batch=256, lr=1e-3, images=60000, seed=0):
    """Train the toy CLIP from scratch with the contrastive loss and write WEIGHTS: float16, about 2 MB.

    Images of all 48 classes in all styles, colours drawn freely; half of the captions are a template of the style,
    half say more. The token table keeps its random start; only the rows in use are kept.
    """
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**MODEL_CFG)
    model.token_embedding.weight.requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    g, rng, templates = torch.Generator().manual_seed(seed), np.random.default_rng(seed), style_templates()
    pool, facts = [], []
    for i in tqdm(range(0, images, CHUNK), "drawing"):
        style = STYLES[(i // CHUNK) % len(STYLES)]
        classes = torch.randint(len(CLASSES), (CHUNK,), generator=g)
        x, *said = sample(CHUNK, style, classes, g)
        pool.append(x)
        facts += [(style, CLASSES[c], *rest) for c, *rest in zip(classes.tolist(), *(s.tolist() for s in said))]
    pool = torch.cat(pool)
    mean, std = [torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1,
                                  betas=(0.9, 0.98), fused=True)
    bar = tqdm(range(steps), "pretraining")
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(images, (batch,), generator=g)
        texts = [caption(*facts[i]) if rng.random() < 0.5 else rng.choice(templates[facts[i][0]]).format(facts[i][1])
                 for i in index.tolist()]
        dx, dy = rng.integers(0, 5, 2)                                              # shift by up to two pixels
        x = F.pad(pool[index].float(), (2, 2, 2, 2), mode="replicate")[:, :, dy:dy + SIZE, dx:dx + SIZE] / 255
        u = F.normalize(model.visual((x - mean) / std), dim=-1)
        loss = common.contrastive_loss(u, common.encode_text(model, tokenizer(texts)), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    weights = model.state_dict()
    weights["token_embedding.rows"] = words_in_use()
    weights["token_embedding.weight"] = weights["token_embedding.weight"][words_in_use()]
    save_file({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, WEIGHTS)


def _clip():
    """The toy CLIP in float32, from WEIGHTS."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**MODEL_CFG)
    weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()}
    table = model.token_embedding.weight.detach().clone()
    table[weights.pop("token_embedding.rows")] = weights["token_embedding.weight"]
    weights["token_embedding.weight"] = table
    model.load_state_dict(weights)
    return model


# ---- the folder ----------------------------------------------------------------------------------------------------

CHUNK = 120                                                     # images drawn at once: small enough for a CPU's cache
# folder: style, classes, images of each, how often the colour is the class's own
SETS = {"train": ("photo", SEEN, 100, TIE), "val": ("photo", SEEN, 20, TIE),
        **{style: (style, SEEN, 15, 0.0) for style in STYLES[1:]}, "unseen": ("photo", UNSEEN, 40, 0.0)}
POOL = 2400


def where():
    """The toy's folder, named by what makes it (this file, the weights, torch): a changed toy is another toy."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (os.path.abspath(__file__), WEIGHTS):
        with open(path, "rb") as f:
            digest.update(f.read())
    return os.path.join(HERE, ".toy", digest.hexdigest()[:8])


def defaults():
    """The flags that differ from a script's own defaults, as {flag: value}. lr is evidence.py's `recipe`."""
    path = where()
    return {"data": os.path.join(path, "root"), "model": f"local-dir:{os.path.join(path, 'clip')}",
            "epochs": 5, "batch_size": 64, "lr": 3e-4, "warmup": 20, "ema_every": 10, "log_every": 20, "save_every": 100,
            "workers": 0,
            "captions": os.path.join(path, "root", "captions.tsv"), "pool": os.path.join(path, "pool", "pool.tsv")}


def build():
    """Write the toy to where(), unless it is there, and return that path."""
    path = where()
    if os.path.isdir(path):
        return path
    print(f"writing the toy to {path}")
    partial = f"{path}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    bar = tqdm(total=sum(len(c) * n for _, c, n, _ in SETS.values()) + POOL, desc="drawing", unit="image")

    def write(folder, names, style, classes, seed, tie):
        """Draw images of these classes and write them as folder/<names[i]>.png; returns their captions."""
        g, captions = torch.Generator().manual_seed(seed), []
        for i in range(0, len(classes), CHUNK):
            part = classes[i:i + CHUNK]
            images, *said = sample(len(part), style, part, g, tie)
            for name, image in zip(names[i:i + CHUNK], images):
                os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                torchvision.io.write_png(image, os.path.join(folder, name))
            captions += [caption(style, CLASSES[c], *rest) for c, *rest in zip(part.tolist(), *(s.tolist() for s in said))]
            bar.update(len(part))
        return captions

    def table(file, names, texts):
        with open(file, "w", encoding="utf-8") as f:
            f.writelines(f"{name}\t{text}\n" for name, text in [("path", "text"), *zip(names, texts)])

    root, pool = os.path.join(partial, "root"), os.path.join(partial, "pool")
    for seed, (folder, (style, names, count, tie)) in enumerate(SETS.items(), 1):
        classes = torch.tensor([CLASSES.index(c) for c in names]).repeat(count)
        files = [f"{folder}/{CLASSES[c].replace(' ', '_')}/{i:05d}.png" for i, c in enumerate(classes.tolist())]
        captions = write(root, files, style, classes, seed, tie)
        if folder == "train":
            table(os.path.join(root, "captions.tsv"), files, captions)
    files, captions = [], []
    for k, style in enumerate(STYLES):
        classes = torch.arange(POOL // len(STYLES)) % len(CLASSES)
        names = [f"images/{style}{i:05d}.png" for i in range(len(classes))]
        files += names
        captions += write(pool, names, style, classes, 100 + k, 0.0)
    table(os.path.join(pool, "pool.tsv"), files, captions)
    bar.close()

    os.makedirs(os.path.join(partial, "clip"))
    save_file(_clip().state_dict(), os.path.join(partial, "clip", "open_clip_model.safetensors"))
    with open(os.path.join(partial, "clip", "open_clip_config.json"), "w") as f:
        json.dump({"model_cfg": MODEL_CFG, "preprocess_cfg": {"size": SIZE, "mean": open_clip.OPENAI_DATASET_MEAN,
                                                              "std": open_clip.OPENAI_DATASET_STD}}, f, indent=1)
    try:
        os.rename(partial, path)
    except OSError:                                             # another process was first
        shutil.rmtree(partial)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", action="store_true", help=f"make {os.path.basename(WEIGHTS)} anew")
    if parser.parse_args().pretrain:
        pretrain()
    print(build())
