# SPDX-License-Identifier: MIT
"""Make a small CLIP, and a ROOT of real images to fine-tune it on, from public PACS and CIFAR-10.

    python tests/pretrain.py --pacs PACS --cifar cifar10:FOLDER --out OUT
    python calft.py --data OUT/root --model local-dir:OUT/clip --batch-size 64 --lr 3e-4 --warmup 20
    python anchor.py --pool OUT/pool.tsv ...                      # the same flags

    OUT/root/{train,val}            80 and 20 % of PACS' photographs; none is pretrained on
    OUT/root/{art_painting,cartoon,sketch}    20 % of each, not pretrained on: the shifts
    OUT/root/cifar10                CIFAR-10's test images
    OUT/clip                        the CLIP, an open_clip `local-dir:`
    OUT/pool.tsv, OUT/pool          CIFAR-10 training images that are not pretrained on, with captions
    OUT/heldout.txt                 the 20 % of the four domains, relative to PACS

Images are links to the originals. The CLIP is pretrained from scratch on the other paintings, cartoons and sketches
and on 12,000 CIFAR-10 images: a ResNet-10 at 64 x 64, 8 million parameters, of which the table of tokens stays as it
was initialised. The default 1,843 steps are 19 epochs.
"""
import argparse
import math
import os
import shutil
import sys
import time

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common  # noqa: E402

# Captions: a domain's are those of CLIP's 80 templates that hold one of these
WORDS = {"art_painting": ["painting of", "art of", "rendition of"], "cartoon": ["cartoon", "graffiti of", "drawing of"],
         "sketch": ["sketch of", "doodle of"],
         "cifar10": ["a photo of a {}.", "a photo of the {}.", "blurry", "low resolution", "cropped", "pixelated"]}
TEMPLATES = {domain: [t for t in (t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES) if any(w in t for w in words)]
             for domain, words in WORDS.items()}
SIZE, STORED = 64, 72                                            # of a crop, and of what it is cut from
VISION = {"image_size": SIZE, "timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg",
          "timm_proj": "linear"}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CONFIG = {"model_cfg": {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT},
          "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "size": SIZE}}


# ---- images --------------------------------------------------------------------------------------------------------

def divide(images, rng, held=10**9, seen=10**9):
    """Two parts of the images, at random: a fifth of each class, but at most `held`; at most `seen` of the others."""
    parts = [], []
    for k, c in enumerate(images.classes):
        rows = rng.permutation(np.flatnonzero(images.labels == k))
        if len(rows) < 2:
            raise common.Abort(f"{images.base}: {images.name} has one image of class {c}; two are needed")
        n = min(held, math.ceil(len(rows) / 5))
        parts[0].append(rows[:n])
        parts[1].append(rows[n:n + seen])
    return [images.take(np.sort(np.concatenate(part)), images.name) for part in parts]


def link(images, folder):
    """Make folder/<class>/* links to the images, copies where there can be none, files of pixels; their names."""
    names = [images.file(i).partition("/")[2] for i in range(len(images))]       # of photo/dog/1.jpg, cifar10:test/17
    if images.pixels:
        names = [f"{images.classes[k]}/{name}.png" for k, name in zip(images.labels, names)]
    for i, name in enumerate(names):
        target = os.path.join(folder, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if images.pixels:
            torchvision.io.write_png(images.read(i), target)
        else:
            try:
                os.symlink(images.path(i), target)
            except OSError:
                shutil.copyfile(images.path(i), target)
    return names


def in_memory(images):
    """All images with their short side resized to 72, and the middle of the long one: uint8 (n, 3, 72, 72)."""
    out = torch.empty(len(images), 3, STORED, STORED, dtype=torch.uint8)
    for i in tqdm(range(len(images)), f"reading {images.name}", unit="image", leave=False):
        x = VF.resize(images.read(i), [STORED], InterpolationMode.BICUBIC, antialias=True)
        out[i] = VF.center_crop(x, [STORED, STORED])
    return out


def augment(x, g):
    """Random crops (n, 3, 64, 64) of x (n, 3, 72, 72): half of them flipped, three in ten grey."""
    n, window = len(x), torch.arange(SIZE)
    top, left = torch.randint(STORED - SIZE + 1, (2, n, 1), generator=g)
    flip, grey = torch.rand(2, n, 1, generator=g) < torch.tensor([0.5, 0.3]).view(2, 1, 1)
    rows, columns = top + window, left + torch.where(flip, window.flip(0), window)                 # (n, 64) each
    x = x[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    return torch.where(grey[:, :, None, None], VF.rgb_to_grayscale(x, 3), x)


# ---- pretraining ---------------------------------------------------------------------------------------------------

def spread_loss(S, group):
    """CLIP's symmetric loss of S (N, N), where an image belongs to all texts of its group (N,) alike: scalar."""
    target = F.normalize((group[:, None] == group).float(), p=1, dim=1)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


def pretrain(model, pixels, group, captions, args, device):
    """Train the model, in place, on pixels (n, 3, 72, 72). group (n,): domain and class; captions[group]: (M, L)."""
    prepare, g = common.to_input(model, device), torch.Generator().manual_seed(args.seed)
    model.train().visual.to(memory_format=torch.channels_last)       # faster on a CPU
    model.token_embedding.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.05)
    batches = common.batches(len(pixels), args.batch_size, args.steps, args.seed)
    bar = tqdm(batches, "pretraining", args.steps, unit="step")
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = common.cosine_lr(step, args.steps, 100, 2e-3)
        rows = torch.tensor([i for _, i in batch])
        text = [captions[k][torch.randint(len(captions[k]), (), generator=g)] for k in group[rows].tolist()]
        u = common.encode_image(model, prepare(augment(pixels[rows], g)))                          # (N, d)
        v = common.encode_text(model, torch.stack(text))                                           # (N, d)
        loss = spread_loss(common.similarity(u, v, model.logit_scale.exp()), group[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 10 == 0 or step + 1 == args.steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@common.cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pacs", required=True, metavar="DIR", help="PACS: {photo,art_painting,cartoon,sketch}/<class>/*.jpg")
    add("--cifar", required=True, metavar="DIR", help="{train,test}/<class>/*, or cifar10:FOLDER: torchvision's in "
        "FOLDER, downloaded if need be")
    add("--out", required=True, metavar="OUT", help="folder of everything that is written; must be new")
    add("--steps", type=int, default=1843, help="of pretraining (default: %(default)s)")
    add("--batch-size", type=int, default=192, help="images in a batch (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all randomness (default: %(default)s)")
    args, device, began = parser.parse_args(argv), common.setup(), time.perf_counter()
    pacs, out = os.path.abspath(args.pacs), os.path.abspath(args.out)
    for flag, value, least in (("steps", args.steps, 1), ("batch-size", args.batch_size, 2), ("seed", args.seed, 0)):
        if not least <= value < 2 ** 63:
            raise common.Abort(f"--{flag} must be at least {least} and less than 2^63, not {value}")
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise common.Abort(f"--out {out} is there already; give another, or remove it")

    # what is held out, and what is pretrained on
    domains = {d: common._scan(os.path.join(pacs, d), pacs) for d in ("photo", "art_painting", "cartoon", "sketch")}
    if common._split_name(args.cifar)[0] == "cifar10":
        train, test = common._torchvision(args.cifar, 0, "train"), common._torchvision(args.cifar, 2, "test")
    else:
        cifar = os.path.abspath(args.cifar)
        train, test = (common._scan(os.path.join(cifar, d), cifar) for d in ("train", "test"))
    for images, other in [(domains[d], domains["photo"]) for d in domains] + [(test, train)]:
        if images.classes != other.classes:
            raise common.Abort(f"{images.base}: {images.name} and {other.name} do not have the same class folders")
    rng = np.random.default_rng(args.seed)
    split = {d: divide(images, rng) for d, images in domains.items()}
    pool, rest = divide(train, rng, 500, 1200)
    held = sorted(images.file(i) for images, _ in split.values() for i in range(len(images)))
    val, train = split.pop("photo")
    root = {"train": train, "val": val, **{d: images for d, (images, _) in split.items()}, "cifar10": test}
    seen = {**{d: images for d, (_, images) in split.items()}, "cifar10": rest}

    # the folder, which is whole or not there
    partial = f"{out}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(os.path.join(partial, "clip"))
    for name, images in root.items():
        link(images, os.path.join(partial, "root", name))
    pairs = ["path\ttext"]
    for file, k in zip(link(pool, os.path.join(partial, "pool")), pool.labels):
        pairs.append(f"pool/{file}\t{rng.choice(TEMPLATES['cifar10']).format(pool.classes[k].replace('_', ' '))}")
    for name, lines in (("pool.tsv", pairs), ("heldout.txt", held)):
        with common.replacing(os.path.join(partial, name)) as f:
            f.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))

    # the CLIP
    pixels, group, captions = torch.cat([in_memory(images) for images in seen.values()]), [], []
    for d, images in seen.items():
        group.append(torch.from_numpy(images.labels) + len(captions))
        captions += common.prompts(open_clip.tokenize, [c.replace("_", " ") for c in images.classes], TEMPLATES[d])
    torch.manual_seed(args.seed)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"]).to(device)
    model.visual.preprocess_cfg = CONFIG["preprocess_cfg"]
    try:
        pretrain(model, pixels, torch.cat(group), captions, args, device)
    except KeyboardInterrupt:
        raise common.Abort("interrupted; the same command begins anew", 130)
    common.write_json(os.path.join(partial, "clip", "open_clip_config.json"), CONFIG)
    common.write_tensors(os.path.join(partial, "clip", "open_clip_model.safetensors"), model.state_dict())
    os.rename(partial, out)

    # what it knows
    model, _, preprocess, tokenizer = common.load_model(f"local-dir:{out}/clip", None, device)
    flags = common.flags("", "").parse_args(["--data", os.path.join(out, "root"), "--workers", "0"])
    root = common.read_root(flags, need_train=False)
    print(common.table({"zero-shot": common.evaluate(model, tokenizer, preprocess, root, flags, device)}))
    print(f"{out}: {args.steps} steps on {len(pixels)} images, {time.perf_counter() - began:.0f} seconds in all")


if __name__ == "__main__":
    main()
