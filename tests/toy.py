# SPDX-License-Identifier: MIT
"""The toy that `python calft.py` runs on without --data: drawn images and a small CLIP for them.

    python tests/toy.py               # write the toy (a few seconds), print where it is
    python tests/toy.py --pretrain    # make tests/toy_clip.safetensors anew (see `pretrain`)

A class is a shape with a pattern ("striped star"); fine-tuning sees 36 of 48. An image is an object
in one of six styles. In the photographs of training and val colour gives the class away four times
in five, in the other styles never: a robust method should not lean on it.

    root/{train,val}        photographs of 36 classes, colour tied to class; captions.tsv
    root/{sketch,cartoon,painting,graffiti,dark}    the shifts: those classes, any colour
    root/unseen             photographs of the 12 classes left out, any colour
    pool/                   image-text pairs in all styles and of all classes, for anchor.py
    clip/                   the CLIP, an open_clip `local-dir:`

The CLIP is pretrained on images of all styles and classes: its zero-shot head works everywhere.
"""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import common  # noqa: E402                                  before torch, see its first lines

import contextlib
import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from tqdm import tqdm

WEIGHTS = f"{HERE}/toy_clip.safetensors"
SHAPES = "circle square triangle star heart cross ring moon".split()
PATTERNS = "plain striped dotted checkered ringed halved".split()
COLOURS = {"red": (.85, .12, .12), "orange": (.95, .55, .1), "yellow": (.93, .88, .15),
           "green": (.15, .65, .2), "cyan": (.15, .75, .8), "blue": (.15, .25, .85),
           "purple": (.55, .2, .75), "pink": (.95, .5, .75)}
BACKGROUNDS = {"grass": (.35, .5, .25), "sand": (.75, .68, .5), "sky": (.6, .72, .85),
               "stone": (.5, .5, .5), "wood": (.5, .35, .22), "snow": (.88, .9, .92)}
SIZES = ["small", "medium", "large"]
STYLES = ["photo", "sketch", "cartoon", "painting", "graffiti", "dark"]
# Those of CLIP's 80 templates that hold one of these words go with a style; the others: photo.
WORDS = {"sketch": ["sketch", "doodle", "drawing", "black and white"],
         "cartoon": ["cartoon", "video game", "plastic", "toy"],
         "painting": ["painting", "art of", "rendition", "rendering", "sculpture"],
         "graffiti": ["graffiti", "tattoo", "embroidered", "origami", "plushie"], "dark": ["dark"]}
CLASSES = [f"{p} {s}" for s in SHAPES for p in PATTERNS]
UNSEEN = [c for k, c in enumerate(CLASSES) if sum(divmod(k, len(PATTERNS))) % 4 == 3]
SEEN = [c for c in CLASSES if c not in UNSEEN]
TIE = 0.8                               # how often a training photograph has its class's own colour
SIZE = 32

# ---- drawing -------------------------------------------------------------------------------------
def _shape(kind, x, y):
    """Return the signed distances (negative inside) of points x, y (n, S, S) from shapes of radius
    about 1."""
    def box(w, h):
        return torch.maximum(x.abs() - w, y.abs() - h)
    r, fifth = (x * x + y * y).sqrt(), math.pi / 5
    turn = (torch.atan2(x, -y).remainder(2 * fifth) - fifth).abs() / fifth
    star = r - (.42 + (1.08 - .42) * turn)
    tri = torch.maximum(y - .62, torch.maximum(.866 * x - .5 * y, -.866 * x - .5 * y) - .52)
    hx, hy = x.abs() * .95, -y * .95 + .35
    half = .5 * (hx + hy).clamp(min=0)
    lobe = ((hx - .25) ** 2 + (hy - .75) ** 2).sqrt() - .3536
    edge = ((hx - half) ** 2 + (hy - half) ** 2).sqrt()
    tip = torch.minimum((hx ** 2 + (hy - 1) ** 2).sqrt(), edge) * (hx - hy).sign()
    heart = torch.where(hx + hy > 1, lobe, tip)
    cross = torch.minimum(box(.92, .3), box(.3, .92))
    moon = torch.maximum(r - .95, .72 - ((x - .42) ** 2 + y ** 2).sqrt())
    ring = (r - .66).abs() - .27
    every = [r - .85, box(.74, .74), tri, star, heart, cross, ring, moon]
    return torch.stack(every)[kind, torch.arange(len(x))]

def _pattern(kind, x, y, p):
    """Return the second colour's mask, 0 or 1, at points x, y (n, S, S). kind is (n,), p
    (n, 1, 1)."""
    cell = .46
    u, v = (x + p) / cell, (y + p) / cell
    dots = ((u.remainder(1) - .5) ** 2 + (v.remainder(1) - .5) ** 2).sqrt() < .3
    checks = (u.floor() + v.floor()).remainder(2) < .5
    rings = ((x * x + y * y).sqrt() / cell + p).remainder(1) < .5
    every = [torch.zeros_like(dots), v.remainder(1) < .5, dots, checks, rings, y > 0]
    return torch.stack(every)[kind, torch.arange(len(x))].float()

def _noise(n, cells, g, size):
    """Return smooth random fields (n, 1, size, size) of mean 0 and deviation about 1."""
    return F.interpolate(torch.randn(n, 1, cells, cells, generator=g), size, mode="bicubic")

def draw(style, shape, pattern, colour, size, ground, g):
    """Draw n objects in one style, uint8 (n, 3, 32, 32); shape ... ground are indices (n,)."""
    n, S = len(shape), 2 * SIZE                             # drawn twice as large, then averaged

    def uni(lo, hi):
        return lo + (hi - lo) * torch.rand(n, 1, 1, generator=g)
    scale, turn = (.62 + .13 * size[:, None, None]) * uni(.95, 1.05), uni(-.35, .35)
    t = (torch.arange(S) + .5) / S * 2 - 1
    X, Y, c, s = t - uni(-.12, .12), t[:, None] - uni(-.12, .12), turn.cos(), turn.sin()
    x, y = (X * c + Y * s) / scale, (Y * c - X * s) / scale                         # (n, S, S)
    d = _shape(shape, x, y) * scale
    inside, second = (d < 0).float()[:, None], _pattern(pattern, x, y, uni(0, .46))[:, None]
    first = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None]          # (n, 3, 1, 1)
    back = torch.tensor(list(BACKGROUNDS.values()))[ground][:, :, None, None]
    first = (first + .06 * torch.randn(n, 3, 1, 1, generator=g)).clamp(0, 1)
    other = torch.where(first.mean(1, keepdim=True) > .45, first * .35, first * .4 + .6)
    fill = first + (other - first) * second                                         # (n, 3, S, S)
    grown = F.max_pool2d(second * inside, 3, 1, 1)
    edges = ((grown - second * inside) * inside).clamp(0, 1)        # between the pattern's colours
    line = (d.abs() < .045).float()[:, None]
    if style in ("photo", "dark"):
        ground_ = back + .07 * _noise(n, 5, g, S) + .07 * _noise(n, 17, g, S)
        light = 1 + .25 * (t * uni(-1, 1) + t[:, None] * uni(-1, 1))[:, None]
        out = (ground_ + (fill - ground_) * inside) * light
        if style == "dark":
            out = out * uni(.16, .3)[:, None]
        out = out + (.05 if style == "photo" else .02) * torch.randn(n, 3, S, S, generator=g) * 2
    elif style == "sketch":
        ink = (line + .7 * edges).clamp(0, 1) * (.75 + .2 * _noise(n, 9, g, S)).clamp(0, 1)
        ink = ink + .12 * second * inside
        out = (.95 + .02 * _noise(n, 9, g, S) - .85 * ink).expand(n, 3, S, S)
    elif style == "cartoon":
        paper = .6 + .4 * back
        out = paper + ((fill * 1.15).clamp(0, 1) - paper) * inside
        out = out * (1 - (d.abs() < .075).float()[:, None])
    elif style == "painting":
        base = back * .8 + .2 * first.flip(1)
        out = base + (fill - base) * inside
        out = F.pad(out.reshape(-1, 1, S, S), (3, 3, 0, 0), mode="replicate")
        out = F.conv2d(out, torch.ones(1, 1, 1, 7) / 7).view(n, 3, S, S)
        out = ((out + .1 * _noise(n, 21, g, S)) * 5).round() / 5 + .05 * _noise(n, 32, g, S)
    elif style == "graffiti":
        bricks = (t + 1) * 2.5 + .5 * ((t + 1) * 5).floor().remainder(2)[:, None]
        mortar = (((t + 1) * 5).remainder(1) < .15)[:, None] | (bricks.remainder(1) < .08)
        wall = torch.tensor([.55, .28, .22])[None, :, None, None] + .05 * _noise(n, 13, g, S)
        wall = torch.where(mortar[None, None], torch.tensor(.7), wall)
        neon = (fill * 1.3 - .1).clamp(0, 1)
        out = wall + (neon - wall) * inside * .8
        out = out + (1 - out) * (d.abs() < .07).float()[:, None]
    out = F.avg_pool2d(out.clamp(0, 1), 2)
    return (out * 255).round().to(torch.uint8)

def sample(n, style, classes, g, tie=0.0):
    """Draw n objects of the class indices (n,): images uint8 (n, 3, 32, 32) and what caption takes.
    With probability `tie` the colour is the one that belongs to the class, otherwise any."""
    own = classes % len(COLOURS)
    any_colour = torch.rand(n, generator=g) >= tie
    colour = torch.where(any_colour, torch.randint(len(COLOURS), (n,), generator=g), own)
    size = torch.randint(len(SIZES), (n,), generator=g)
    ground = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    images = draw(style, classes // len(PATTERNS), classes % len(PATTERNS), colour, size, ground, g)
    numbers = torch.stack([classes, colour, size, ground], 1).tolist()
    return images, [(style, CLASSES[c], *rest) for c, *rest in numbers]

def style_templates():
    """Return CLIP's 80 templates by style, {style: [str with {}]}. Each belongs to one style."""
    every = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    out = {style: [t for t in every if any(w in t for w in WORDS[style])] for style in WORDS}
    out["photo"] = [t for t in every if not any(t in ts for ts in out.values())]
    return out

def caption(style, name, colour, size, ground):
    """Return a caption that says more than the class: 'a photo of a small red striped star on
    grass.'"""
    what = {"dark": "a dark photo", "graffiti": "graffiti"}.get(style, f"a {style}")
    if style == "sketch":                                   # a sketch shows no colour, no ground
        return f"{what} of a {SIZES[size]} {name}."
    behind = "a wall" if style == "graffiti" else list(BACKGROUNDS)[ground]
    return f"{what} of a {SIZES[size]} {list(COLOURS)[colour]} {name} on {behind}."

# ---- the CLIP ------------------------------------------------------------------------------------
VISION = {"image_size": SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
MODEL_CFG = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
PREPROCESS_CFG = {"size": SIZE, "mean": open_clip.OPENAI_DATASET_MEAN,
                  "std": open_clip.OPENAI_DATASET_STD}

def pretrain(steps=2000, batch=256, lr=1e-3, images=60000, seed=0):
    """Train the toy CLIP from scratch with the contrastive loss and write WEIGHTS: float16, 2 MB.
    Images of all 48 classes in all styles, any colour; half of the captions are a template of the
    style, half say more. The token table keeps its random start; only rows in use are written."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**MODEL_CFG)
    model.token_embedding.weight.requires_grad_(False)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    pool, facts, templates = [], [], style_templates()
    for i in tqdm(range(images // CHUNK), "drawing"):
        classes = torch.randint(len(CLASSES), (CHUNK,), generator=g)
        x, said = sample(CHUNK, STYLES[i % len(STYLES)], classes, g)
        pool.append(x)
        facts += said
    pool = torch.cat(pool)
    mean, std = (torch.tensor(PREPROCESS_CFG[k])[:, None, None] for k in ("mean", "std"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    for step in tqdm(range(steps), "pretraining"):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * cosine
        index = torch.randint(images, (batch,), generator=g)
        texts = [caption(*f) if rng.random() < 0.5 else rng.choice(templates[f[0]]).format(f[1])
                 for f in (facts[i] for i in index.tolist())]
        dx, dy = rng.integers(0, 5, 2)                      # shift by up to two pixels
        x = F.pad(pool[index].float(), (2, 2, 2, 2), mode="replicate")
        x = x[:, :, dy:dy + SIZE, dx:dx + SIZE] / 255
        u = F.normalize(model.visual((x - mean) / std), dim=-1)
        v = common.encode_text(model, common.tokenize(tokenizer, texts))
        loss = common.contrastive_loss(u, v, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
    texts = [t for ts in templates.values() for t in ts] + CLASSES + ["on a wall"]
    texts += [caption(style, "", c, s, b) for style in STYLES for c in range(len(COLOURS))
              for s in range(len(SIZES)) for b in range(len(BACKGROUNDS))]
    weights = model.state_dict()
    rows = weights["token_embedding.rows"] = tokenizer(texts).unique()      # all that can be said
    weights["token_embedding.weight"] = weights["token_embedding.weight"][rows]
    save_file({k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, WEIGHTS)

def _clip():
    """Return the toy CLIP in float32, from WEIGHTS."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**MODEL_CFG)
    weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()}
    table = model.token_embedding.weight.detach().clone()
    table[weights.pop("token_embedding.rows")] = weights["token_embedding.weight"]
    model.load_state_dict({**weights, "token_embedding.weight": table})
    return model

# ---- the folder ----------------------------------------------------------------------------------
CHUNK = 120                             # images drawn at once: small enough for a CPU's cache
# folder: style, classes, images of each, how often the colour is the class's own
SETS = {"train": ("photo", SEEN, 100, TIE), "val": ("photo", SEEN, 20, TIE),
        **{style: (style, SEEN, 15, 0.0) for style in STYLES[1:]},
        "unseen": ("photo", UNSEEN, 40, 0.0)}
POOL = 2400

def where():
    """Return the toy's folder. A hash of all that makes the toy is in its name, so that a changed
    toy has another folder."""
    made_of = torch.__version__.encode() + Path(__file__).read_bytes() + Path(WEIGHTS).read_bytes()
    return f"{HERE}/.toy/{hashlib.sha256(made_of).hexdigest()[:8]}"

def defaults():
    """Draw the toy, unless it is there, and return the flags that differ from a script's defaults,
    {flag: value}. lr is that of evidence.py, for all methods."""
    path = build()
    return {"data": f"{path}/root", "model": f"local-dir:{path}/clip", "epochs": 5, "lr": 3e-4,
            "batch_size": 64, "warmup": 20, "ema_every": 10, "log_every": 20, "save_every": 100,
            "workers": 0, "captions": f"{path}/root/captions.tsv", "pool": f"{path}/pool/pool.tsv"}

def _write(folder):
    """Write the toy to a folder. The first process shows a bar."""
    total = sum(len(names) * count for _, names, count, _ in SETS.values()) + POOL
    bar = tqdm(total=total, desc="drawing the toy", unit="image", disable=common.NO_BAR)

    def write(where, names, style, classes, seed, tie):
        """Draw images of these classes as where/<names[i]>; return lines of names and captions."""
        g, lines = torch.Generator().manual_seed(seed), []
        for i in range(0, len(classes), CHUNK):
            part = classes[i:i + CHUNK]
            images, facts = sample(len(part), style, part, g, tie)
            for name, image, fact in zip(names[i:i + CHUNK], images, facts):
                os.makedirs(os.path.dirname(f"{where}/{name}"), exist_ok=True)
                torchvision.io.write_png(image, f"{where}/{name}")
                lines.append(f"{name}\t{caption(*fact)}\n")
            bar.update(len(part))
        return lines
    for seed, (part, (style, names, count, tie)) in enumerate(SETS.items(), 1):
        classes = torch.tensor([CLASSES.index(c) for c in names]).repeat(count)
        files = [f"{part}/{CLASSES[c].replace(' ', '_')}/{i:05d}.png"
                 for i, c in enumerate(classes.tolist())]
        lines = write(f"{folder}/root", files, style, classes, seed, tie)
        if part == "train":
            Path(folder, "root", "captions.tsv").write_text("path\ttext\n" + "".join(lines))
    lines, classes = ["path\ttext\n"], torch.arange(POOL // len(STYLES)) % len(CLASSES)
    for seed, style in enumerate(STYLES, 100):
        names = [f"images/{style}{i:05d}.png" for i in range(len(classes))]
        lines += write(f"{folder}/pool", names, style, classes, seed, 0.0)
    Path(folder, "pool", "pool.tsv").write_text("".join(lines))
    bar.close()
    os.makedirs(f"{folder}/clip")
    save_file(_clip().state_dict(), f"{folder}/clip/open_clip_model.safetensors")
    with open(f"{folder}/clip/open_clip_config.json", "w") as f:
        json.dump({"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}, f, indent=1)

def build():
    """Write the toy to where(), unless it is there, and return that path. Processes may call this
    at the same time: each writes a folder of its own, and the first to be ready renames it."""
    path = where()
    if not os.path.isdir(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            _write(f"{folder}/toy")
            with contextlib.suppress(OSError):              # if another process was first
                os.rename(f"{folder}/toy", path)
    return path

if __name__ == "__main__":
    if "--pretrain" in sys.argv:
        pretrain()
    print(build())
