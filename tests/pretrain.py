# SPDX-License-Identifier: MIT
"""Make a small CLIP, and a ROOT of real images to fine-tune it on, from public PACS and CIFAR-10.

    python tests/folders.py cifar10 SETS/cifar10
    python tests/pretrain.py --pacs PACS --cifar SETS/cifar10 --out OUT
    python evaluate.py --data OUT/root --model local-dir:OUT/clip           # what it knows
    python calft.py --data OUT/root --model local-dir:OUT/clip --batch-size 64 --lr 3e-4 --warmup 20

    OUT/root/{train,val}            80 and 20 % of PACS' photographs; none is pretrained on
    OUT/root/{art_painting,cartoon,sketch}    20 % of each, not pretrained on: the shifts
    OUT/root/cifar10                CIFAR-10's test images
    OUT/clip                        the CLIP, an open_clip `local-dir:`
    OUT/pool.tsv, OUT/pool          captioned CIFAR-10 training images, not pretrained on

Images are links to the originals. The CLIP is pretrained from scratch on the other paintings,
cartoons and sketches and on 12,000 CIFAR-10 images: a ResNet-10 at 64 x 64, 8 million parameters,
of which the table of tokens stays as it was initialised. 1,843 steps are 19 epochs.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402                                  before torch, see its first lines
import calft  # noqa: E402

import argparse
import math
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

# The captions of a domain are those of CLIP's 80 templates that hold one of these.
WORDS = {"art_painting": ["painting of", "art of", "rendition of"],
         "cartoon": ["cartoon", "graffiti of", "drawing of"], "sketch": ["sketch of", "doodle of"],
         "cifar10": ["a photo of a {}.", "a photo of the {}.", "blurry", "low resolution",
                     "cropped", "pixelated"]}
ALL_TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
TEMPLATES = {domain: [t for t in ALL_TEMPLATES if any(word in t for word in words)]
             for domain, words in WORDS.items()}
SIZE, STORED = 64, 72                                       # of a crop, and of what it is cut from
VISION = {"image_size": SIZE, "timm_model_name": "resnet10t", "timm_model_pretrained": False,
          "timm_pool": "avg", "timm_proj": "linear"}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
PREPROCESS = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
              "size": SIZE, "interpolation": "bicubic", "resize_mode": "shortest"}
CONFIG = {"model_cfg": {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT},
          "preprocess_cfg": PREPROCESS}

# ---- images --------------------------------------------------------------------------------------
def read(path):
    """Return the images in path/<class>/* as an ImageSet."""
    found = common.scan(path)
    classes = list(found)
    names = [c.replace("_", " ") for c in classes]
    paths, labels = common.flatten(found, classes)
    return common.ImageSet(
        os.path.basename(path), classes, names, [], paths, labels, None, "", False)

def select(images, parts):
    """Return a set with only some of the images; parts is a list of arrays of their rows."""
    rows = np.sort(np.concatenate(parts))
    return replace(images, paths=images.paths[rows], labels=images.labels[rows])

def divide(images, rng, n_held_out=10**9, n_seen=10**9):
    """Divide a set at random. Return what is held out, a fifth of each class but at most
    n_held_out images of it, and what is pretrained on, at most n_seen of the other images."""
    held_out = []
    seen = []
    for k in range(len(images.classes)):
        rows = rng.permutation(np.flatnonzero(images.labels == k))
        n = min(n_held_out, math.ceil(len(rows) / 5))
        held_out.append(rows[:n])
        seen.append(rows[n:n + n_seen])
    return select(images, held_out), select(images, seen)

def link(images, folder):
    """Make links to the images in folder/<class>/*, and return their paths in the folder."""
    names = []
    for path in map(os.fsdecode, images.paths):
        name = "/".join(path.split(os.sep)[-2:])
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(path, target)
        names.append(name)
    return names

def in_memory(images):
    """Return all images, cut to squares with sides of 72: uint8 (n, 3, 72, 72)."""
    out = torch.empty(len(images), 3, STORED, STORED, dtype=torch.uint8)
    for i in tqdm(range(len(images)), f"reading {images.name}", unit="image", leave=False):
        x, problem = common.read_image(images.paths[i])
        if problem:
            common.fail(f"{os.fsdecode(images.paths[i])} {problem}")
        x = VF.resize(x, [STORED], InterpolationMode.BICUBIC, antialias=True)
        out[i] = VF.center_crop(x, [STORED, STORED])
    return out

def augment(x, g):
    """Return random crops (n, 3, 64, 64) of x (n, 3, 72, 72). Half of them are flipped, and three
    in ten are grey."""
    n = len(x)
    window = torch.arange(SIZE)
    top, left = torch.randint(STORED - SIZE + 1, (2, n, 1), generator=g)
    flip, grey = torch.rand(2, n, 1, generator=g) < torch.tensor([0.5, 0.3]).view(2, 1, 1)
    rows = top + window                                                             # (n, 64)
    columns = left + torch.where(flip, window.flip(0), window)                      # (n, 64)
    x = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]]
    x = x.permute(0, 3, 1, 2)
    return torch.where(grey[:, :, None, None], VF.rgb_to_grayscale(x, 3), x)

# ---- pretraining ---------------------------------------------------------------------------------
def spread_loss(S, group):
    """Return CLIP's symmetric loss of S (N, N): scalar. An image belongs to all texts of its group
    (N,) alike."""
    target = F.normalize((group[:, None] == group).float(), p=1, dim=1)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2

def pretrain(model, pixels, group, captions, args):
    """Train the model, in place, on pixels (n, 3, 72, 72). group (n,) says for each image which
    domain and class it shows, and captions[group] (M, L) are the tokens of what is said of them."""
    n = len(pixels)
    g = torch.Generator().manual_seed(args.seed)
    epochs = math.ceil(args.steps * args.batch_size / n)
    order = [np.random.default_rng([args.seed, epoch]).permutation(n) for epoch in range(epochs)]
    order = torch.from_numpy(np.concatenate(order))
    model.train().visual.to(memory_format=torch.channels_last)              # faster on a CPU
    model.token_embedding.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.05)
    for step in tqdm(range(args.steps), "pretraining", unit="step"):
        optimizer.param_groups[0]["lr"] = calft.cosine_lr(step, args.steps, 100, 2e-3)
        rows = order[step * args.batch_size:(step + 1) * args.batch_size]
        text = [captions[k][torch.randint(len(captions[k]), (), generator=g)]
                for k in group[rows].tolist()]
        text = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)              # (N, L)
        text = common.cut_padding(text).to(common.DEVICE)
        images = common.to_input(model, augment(pixels[rows], g))
        u = common.encode_image(model, images)                                      # (N, d)
        v = common.encode_text(model, text)                                         # (N, d)
        S = model.logit_scale.exp() * u @ v.T                                       # (N, N)
        loss = spread_loss(S, group[rows].to(S.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))

def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("--pacs", required=True, metavar="DIR", help="{photo,art_painting,...}/<class>/*.jpg")
    add("--cifar", required=True, metavar="DIR", help="{train,test}/<class>/*")
    add("--out", required=True, metavar="OUT", help="folder that is written; must be new")
    add("--steps", type=int, default=1843, help="of pretraining (%(default)s)")
    add("--batch-size", type=int, default=192, help="(%(default)s)")
    add("--seed", type=int, default=0, help="of all randomness (%(default)s)")
    args = parser.parse_args(argv)
    out = os.path.abspath(args.out)
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        common.fail(f"--out {out} is there already; give another, or remove it")

    # what is held out, and what is pretrained on
    pacs = os.path.abspath(args.pacs)
    cifar = os.path.abspath(args.cifar)
    domains = ["photo", "art_painting", "cartoon", "sketch"]
    photos, *drawings = [read(f"{pacs}/{domain}") for domain in domains]
    rng = np.random.default_rng(args.seed)
    val, train = divide(photos, rng)
    root = {"train": train, "val": val}                     # what is tuned on or scored
    seen = {}                                               # what is pretrained on
    for images in drawings:
        root[images.name], seen[images.name] = divide(images, rng)
    pool, seen["cifar10"] = divide(read(f"{cifar}/train"), rng, 500, 1200)
    root["cifar10"] = read(f"{cifar}/test")

    # the folder, which is whole or not there
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(f"{partial}/clip")
    for name, images in root.items():
        link(images, f"{partial}/root/{name}")
    pairs = ["path\ttext"]
    for file, k in zip(link(pool, f"{partial}/pool"), pool.labels):
        template = rng.choice(TEMPLATES["cifar10"])
        pairs.append(f"pool/{file}\t{template.format(pool.classnames[k])}")
    with common.replacing(f"{partial}/pool.tsv") as f:
        f.write("".join(f"{line}\n" for line in pairs).encode("utf-8", "surrogateescape"))

    # the CLIP
    pixels = torch.cat([in_memory(images) for images in seen.values()])             # (n, 3, 72, 72)
    group = []
    captions = []
    for d, images in seen.items():
        group.append(torch.from_numpy(images.labels) + len(captions))
        captions += common.prompts(open_clip.tokenize, images.classnames, TEMPLATES[d])
    torch.manual_seed(args.seed)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"]).to(common.DEVICE)
    model.visual.preprocess_cfg = PREPROCESS
    pretrain(model, pixels, torch.cat(group), captions, args)
    common.write(f"{partial}/clip/open_clip_config.json", CONFIG)
    common.write(f"{partial}/clip/open_clip_model.safetensors", model.state_dict())
    os.rename(partial, out)
    print(f"{out}: {args.steps} steps on {len(pixels)} images")

if __name__ == "__main__":
    main()
