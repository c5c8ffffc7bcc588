# SPDX-License-Identifier: MIT
"""Write a caption for every training image, as anchor.py --captions reads them. Run it once.

    python tests/captions.py --data ROOT --model Salesforce/blip2-opt-2.7b --out captions.tsv
    python tests/captions.py --data ROOT --train photo sketch --out captions.tsv
    python tests/captions.py --images POOL/pool.tsv --out POOL/captions.tsv     # for --pool

The captioner is a BLIP-2, as in the ARF paper, or a BLIP. It comes from Hugging Face transformers
(pip install transformers) and runs in bfloat16 on a CUDA card, in float32 elsewhere. Decoding is
greedy. blip2-opt-2.7b is a download of 15 GB; Salesforce/blip-image-captioning-base is smaller.
So far this has only been run with tiny random captioners, and on CPUs.

Each line of the file is a path, a tab and a caption. With --data, paths are relative to ROOT.
With --images, they are relative to the folder of --out, so that the file can be a --pool itself.
An image that cannot be read gets the caption "an image", because anchor.py needs one for each.
Every batch is written as soon as it is captioned. The same command, started again, goes on after
the last whole line.
"""
import os
import re
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm

NO_CAPTION = "an image"         # for an unreadable image, and where the captioner says nothing
MAX_TOKENS = 30                 # length of a caption

def fail(message):
    """End the program with one line."""
    sys.exit(f"error: {message}")

def training_images(root, folders):
    """Return the images in ROOT/<folder>/<class>/**, without hidden ones, as paths in root."""
    paths = []
    for folder in folders:
        top = os.path.join(root, folder)
        try:
            images = make_dataset(top, extensions=IMG_EXTENSIONS, allow_empty=True)
        except OSError:
            fail(f"--data, --train: {top} has no class folders; expected images in {top}/<class>/*")
        for path, _ in images:
            below = os.path.relpath(path, top)
            if not any(part.startswith(".") for part in below.split(os.sep)):
                paths.append(os.path.relpath(path, root))
    return paths

def listed_images(tsv, folder):
    """Return the images in the first column of a TSV, relative to the TSV, as paths in `folder`."""
    try:
        lines = Path(tsv).read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--images {tsv} cannot be read as text ({e}); expected an image's path on each line")
    paths = [line.split("\t")[0].strip() for line in lines if line.strip()]
    if paths[:1] == ["path"]:                               # the header
        paths = paths[1:]
    base = os.path.realpath(os.path.dirname(tsv))           # "../" would lead elsewhere from a link
    return [os.path.relpath(os.path.join(base, path), folder) for path in paths]

def count_finished(out, header, paths):
    """Return how many captions `out` holds, after its last line, if it is cut, is dropped."""
    if not out.exists() or out.stat().st_size == 0:
        return 0
    written = out.read_bytes()
    whole = written[:written.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", "replace").split("\n")[:-1]
    finished = [line.split("\t")[0] for line in lines[1:]]
    if lines[:1] != [header] or finished != paths[:len(finished)]:
        fail(f"--out {out} does not hold captions of these images, in this order, by this --model; "
             "choose another --out, or delete the file")
    os.truncate(out, len(whole))
    return len(finished)

def load_captioner(name, device, dtype):
    """Return the processor and the model of a BLIP or BLIP-2."""
    try:
        from transformers import (AutoModelForImageTextToText, AutoProcessor, Blip2Processor,
                                  BlipProcessor)
    except ImportError:
        fail("the captioner needs transformers, version 5 or later: pip install transformers")
    try:
        processor = AutoProcessor.from_pretrained(name)
        if not isinstance(processor, (BlipProcessor, Blip2Processor)):
            raise ValueError("it is another kind of model")
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as e:
        reason = " ".join(str(e).split())
        fail(f"--model {name} cannot be loaded ({reason}); expected a BLIP or BLIP-2 of Hugging "
             "Face, by its name or its folder")
    return processor, model.to(device).eval()

def decode(files, processor):
    """Return pixels (n, 3, H, W) of n image files, and for each the reason if it is unreadable."""
    images = []
    problems = []
    for file in files:
        try:
            images.append(Image.open(file).convert("RGB"))
            problems.append("")
        except Exception as e:                              # PIL raises errors of many kinds
            images.append(Image.new("RGB", (64, 64)))
            problems.append(f"{type(e).__name__}: {e}")
    return processor(images=images, return_tensors="pt")["pixel_values"], problems

def describe(model, processor, pixels):
    """Return a caption, one line that is not empty, for each image of pixels (n, 3, H, W)."""
    pixels = pixels.to(model.device, model.dtype)
    tokens = model.generate(pixel_values=pixels, do_sample=False, num_beams=1,
                            max_new_tokens=MAX_TOKENS)                              # (n, L)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) or NO_CAPTION for text in texts]

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = fail
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="ROOT", help="caption the training images in ROOT")
    source.add_argument("--images", metavar="FILE.tsv", help="caption the images that it lists")
    add = parser.add_argument
    add("--train", nargs="+", default=["train"], metavar="DIR", help="training folders in ROOT")
    add("--model", default="Salesforce/blip2-opt-2.7b", help="name or folder (%(default)s)")
    add("--out", type=Path, default="captions.tsv", help="(%(default)s)")
    add("--batch-size", type=int, default=32, help="(%(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="decode images (%(default)s)")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        fail("--batch-size must be at least 1, and --workers at least 0")

    if args.data:
        base = args.data
        paths = training_images(base, args.train)
    else:
        base = os.path.realpath(args.out.parent)
        paths = listed_images(args.images, base)
    if not paths:
        fail(f"{args.data or args.images} holds no images")
    paths = [path.replace(os.sep, "/") for path in paths]
    strange = [path for path in paths if re.search(r"[\t\r\n\ud800-\udfff]", path)]
    if strange:                                             # surrogates: the name is not UTF-8
        fail(f"{strange[0]!r} does not fit into a line of text; rename that file")
    header = f"path\tcaption by {args.model}"
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        done = count_finished(args.out, header, paths)
    except OSError as e:
        fail(f"--out {args.out} cannot be written ({e.strerror}); choose another file")
    if done == len(paths):
        print(f"{args.out} is finished already: it has {done} captions")
        return

    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    processor, model = load_captioner(args.model, device, dtype)
    files = [os.path.join(base, path) for path in paths[done:]]
    loader = DataLoader(files, args.batch_size, num_workers=args.workers,
                        collate_fn=partial(decode, processor=processor))
    bar = tqdm(total=len(paths), initial=done, desc="captions", unit="image")
    with bar, open(args.out, "a", encoding="utf-8", newline="\n") as f:
        if f.tell() == 0:                                   # a new file
            f.write(f"{header}\n")
        for pixels, problems in loader:
            captions = describe(model, processor, pixels)
            for caption, problem in zip(captions, problems):
                if problem:
                    bar.write(f"warning: {paths[done]} cannot be read ({problem})", sys.stderr)
                    caption = NO_CAPTION
                f.write(f"{paths[done]}\t{caption}\n")
                done += 1
            f.flush()
            bar.update(len(captions))

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends at once; nothing is lost
    main()
