# SPDX-License-Identifier: MIT
"""Turn a data set into the layout that the training scripts read. Run it once for each set.

    python tests/folders.py cifar100 SETS/cifar100
    python tests/folders.py objectnet OBJECTNET-1.0 ROOT/objectnet
    python tests/folders.py iwildcam iwildcam_v2.0 SETS/iwildcam
    python tests/folders.py ucf101 COOP/ucf101 SETS/ucf101
    python tests/folders.py pool CC3M POOL                      # img2dataset's folders or its tars
    python tests/folders.py pool 'CC3M/{00000..00331}.tar' POOL

A set of torchvision's becomes OUT/train/<class>/*, OUT/test/<class>/* and, for aircraft,
flowers102 and dtd, OUT/val/<class>/*: its official splits (pets' trainval is train/). caltech101,
sun397 and eurosat have no split in torchvision, so all their images go to train/. classnames.txt
(folder<TAB>name) and templates.txt are those of CLIP's authors (data/prompts.md of openai/CLIP).
Images are hard links where possible, otherwise copies; CIFAR is written as PNG.

The 113 classes of ObjectNet that ImageNet has too become OUT/<class>/*.png without their border.
OUT/classes.txt (folder<TAB>wnid[;wnid...]) says which classes of ImageNet they are.

iWildCam is WILDS's version 2.0: DIR holds its metadata.csv, categories.csv and train/. Its splits
train, id_val and id_test become OUT/train, OUT/val and OUT/test. Its val and test are of other
cameras, so they become the shifts OUT/ood_val and OUT/ood_test. A class folder has WILDS's label
and the Latin name, as in 015_panthera_onca. Prompts are FLYP's two templates with the Latin name
or, if DIR has labels.csv (from mlfoundations/wise-ft, src/datasets/iwildcam_metadata), the English
one. WILDS left out images of classes that training lacks, so every set is scored by the head of the
training classes. A set that has only some of the 182 classes is scored on their logits alone, so
its accuracy can only be higher than by WILDS's protocol, where all 182 compete.

UCF101 is the first of its three splits, and each video is its middle frame: DIR holds CoOp's
UCF-101-midframes/ and UCF101's ucfTrainTestlist/. Names and templates are those of CLIP's authors.

A pool is OUT/pool.tsv, the image-text pairs (path<TAB>text) that anchor.py --pool reads. Its paths
are relative to OUT. A pair is an image file and a text file of the same name, x.jpg and x.txt, as
img2dataset writes them. Images in folders stay where they are. Images in tars are unpacked to
OUT/<name of the tar>/. Hidden files, links that lead nowhere and images without text are skipped.

The same command finishes a folder that is half written and leaves a finished one as it is.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import fail  # noqa: E402                         before torch, see its first lines

import csv
import json
import re
import shutil
import tarfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from torchvision import datasets
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

def both(*templates):
    """The templates with "a" for THE, then with "the"."""
    return [t.replace("THE", article) for article in ("a", "the") for t in templates]

CIFAR = both(*[f"a {kind}photo of THE {{}}." for kind in (
    "", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")],
    "a photo of THE small {}.", "a photo of THE big {}.")
CALTECH = both(*[f"{art} of THE {{}}." for art in (
    "a photo", "a painting", "a sculpture", "a sketch", "a tattoo", "a rendition", "a drawing",
    "a doodle", "art", "graffiti")], "THE {} in a video game.", *[f"THE {kind} {{}}." for kind in (
        "plastic", "toy", "embroidered", "cartoon", "plushie", "origami")])
CARS = ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!",
        *[f"a photo of my {kind} {{}}." for kind in ("dirty", "clean", "new", "old")]]
DTD = both(*[f"a photo of THE {{}} {noun}." for noun in ("texture", "pattern", "thing", "object")])
UCF101 = both(*[f"a {noun} of THE person {verb}{{}}."
                for verb in ("", "using ", "doing ", "during ", "performing ", "practicing ")
                for noun in ("photo", "video", "example", "demonstration")])
EUROSAT = [f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")]
FLAG = {"train": {"train": True}, "test": {"train": False}}     # what torchvision is asked for
TWO = {part: {"split": part} for part in ("train", "test")}
THREE = {part: {"split": part} for part in ("train", "val", "test")}
PETS = {"train": {"split": "trainval"}, "test": {"split": "test"}}
SETS = {
    "cifar10": (datasets.CIFAR10, FLAG, CIFAR),
    "cifar100": (datasets.CIFAR100, FLAG, CIFAR),
    "food101": (datasets.Food101, TWO, ["a photo of {}, a type of food."]),
    "cars": (datasets.StanfordCars, TWO, CARS),
    "pets": (datasets.OxfordIIITPet, PETS, ["a photo of a {}, a type of pet."]),
    "aircraft": (datasets.FGVCAircraft, THREE, both("a photo of THE {}, a type of aircraft.")),
    "flowers102": (datasets.Flowers102, THREE, ["a photo of a {}, a type of flower."]),
    "dtd": (datasets.DTD, THREE, DTD),
    "caltech101": (datasets.Caltech101, {"train": {}}, CALTECH),
    "sun397": (datasets.SUN397, {"train": {}}, both("a photo of THE {}.")),
    "eurosat": (datasets.EuroSAT, {"train": {}}, EUROSAT)}
COUNTS = {"caltech101": 8677, "sun397": 108754, "eurosat": 27000}   # they come without file lists
NAMES = {       # where CLIP's name is not the class with "_" as a space
    "Faces": "off-center face", "Faces_easy": "centered face", "Leopards": "leopard",
    "Motorbikes": "motorbike", "airplanes": "airplane", "car_side": "side of a car",
    "cougar_body": "body of a cougar cat", "cougar_face": "face of a cougar cat", "River": "river",
    "crocodile_head": "head of a crocodile", "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)", "yin_yang": "yin and yang symbol", "Forest": "forest",
    "AnnualCrop": "annual crop land", "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road", "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land", "PermanentCrop": "permanent crop land", "SeaLake": "lake or sea",
    "Residential": "residential buildings or homes or apartments", "globe-flower": "globe flower",
    "pink-yellow dahlia?": "pink and yellow dahlia", "ball moss": "air plant",
    "Handstand_Pushups": "Hand Stand Pushups"}
IWILDCAM = {                                    # WILDS's name of a split: its folder
    "train": "train", "id_val": "val", "id_test": "test", "val": "ood_val", "test": "ood_test"}
POOL_IMAGES = (".jpg", ".jpeg", ".png", ".webp")

def write(source, target, border=0):
    """Write lines, bytes, pixels or an image file to `target`, whole as soon as it exists."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if isinstance(source, list):
        part.write_text("".join(f"{line}\n" for line in source), encoding="utf-8")
    elif isinstance(source, bytes):
        part.write_bytes(source)
    elif border or hasattr(source, "shape"):
        image = Image.open(source) if border else Image.fromarray(source)
        ImageOps.crop(image, border).save(part, "PNG", compress_level=1)    # the default is slow
    else:
        try:
            target.hardlink_to(Path(source).resolve())
            return
        except (OSError, NotImplementedError):  # another file system, or one without hard links
            shutil.copyfile(source, part)
    part.replace(target)

def link(name, images):
    """Write a list of (image file, target), but nothing if some of the files are missing."""
    missing = [str(source) for source, _ in images if not source.is_file()]
    if missing:
        fail(f"{name}: {len(missing)} of {len(images)} images are missing, such as {missing[0]}; "
             "unpack the archive again, then start the same command again")
    thread_map(write, *zip(*images), desc=name, unit="image")

def finish(out, names, templates):
    """Write templates.txt and, last, classnames.txt; names is {class folder: name}."""
    write(templates, out / "templates.txt")
    write([f"{c}\t{names[c]}" for c in sorted(names)], out / "classnames.txt")

def folder_name(name):
    """Return the name of a class without what a folder should not have: F/A-18 is an aircraft."""
    return re.sub(r"[^\w.-]", "_", name)

def torchvision_set(name, folder, out):
    """Write a set of torchvision's, downloaded to `folder` if it is not there, as class folders."""
    if name in ("cars", "flowers102") and find_spec("scipy") is None:
        fail(f"torchvision reads {name} by scipy: pip install scipy")
    cls, parts, templates = SETS[name]
    names = {}
    for part, options in parts.items():
        try:
            d = cls(folder, **options)
        except RuntimeError:                    # torchvision did not find it
            d = cls(folder, download=True, **options)
        classes = getattr(d, "classes", None) or d.categories
        pairs = getattr(d, "samples", None) or getattr(d, "_samples", None)     # eurosat, cars
        if name == "caltech101":
            pairs = [(f"{d.root}/101_ObjectCategories/{classes[k]}/image_{i:04d}.jpg", k)
                     for i, k in zip(d.index, d.y)]
        elif parts is FLAG:
            pairs = zip(d.data, d.targets)
        elif pairs is None:
            pairs = zip(d._images if name == "pets" else d._image_files, d._labels)
        images = []
        for i, (source, k) in enumerate(pairs):
            safe = folder_name(classes[k])
            called = classes[k].replace("/", " ") if name == "sun397" else classes[k]
            names[safe] = NAMES.get(called, called.replace("_", " "))
            file = f"{i:05d}.png" if parts is FLAG else Path(source).name
            images.append((source, out / part / safe / file))
        if len(images) < COUNTS.get(name, 0):
            raise ValueError(f"only {len(images)} of its {COUNTS[name]} images are there")
        thread_map(write, *zip(*images), desc=f"{name} {part}", unit="image")
    finish(out, names, templates)

def read_csv(path, *columns):
    """Return the rows of a CSV file with a header, each a list of the cells of these columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[row.get(column) for column in columns] for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        fail(f"{path} cannot be read ({e}); unpack the archive again")
    if not rows or not all(map(all, rows)):
        fail(f"{path}: expected {', '.join(columns)} in each row; unpack the archive again")
    return rows

def iwildcam(folder, out):
    """Write the five splits of WILDS's iWildCam as class folders."""
    latin = dict(read_csv(folder / "categories.csv", "y", "name"))
    called = dict(latin)
    if (folder / "labels.csv").exists():
        called.update(read_csv(folder / "labels.csv", "y", "english"))
    names = {}
    images = []
    for split, y, file in read_csv(folder / "metadata.csv", "split", "y", "filename"):
        if split not in IWILDCAM or y not in latin:
            fail(f"{folder}/metadata.csv: split {split} or y {y} is unknown; expected the splits "
                 f"{', '.join(IWILDCAM)} and the y of categories.csv, as in WILDS's version 2.0")
        c = f"{int(y):03}_{folder_name(latin[y])}"          # two classes have the same name
        names[c] = called[y]
        images.append((folder / "train" / file, out / IWILDCAM[split] / c / Path(file).name))
    link("iwildcam", images)
    finish(out, names, ["a photo of {}.", "{} in the wild."])

def ucf101(folder, out):
    """Write the middle frames of the videos in UCF101's first split as class folders."""
    names = {}
    images = []
    for part in ("train", "test"):
        listed = folder / "ucfTrainTestlist" / f"{part}list01.txt"
        videos = re.findall(r"^(\w+)/(\S+)\.avi", listed.read_text("utf-8"), re.MULTILINE)
        if not videos:
            fail(f"{listed}: expected lines such as Archery/v_Archery_g01_c01.avi")
        for action, video in videos:
            c = "_".join(re.findall("[A-Z][^A-Z]*", action))            # TaiChi: Tai_Chi
            names[c] = NAMES.get(c, c.replace("_", " "))
            frame = f"{c}/{video}.jpg"
            images.append((folder / "UCF-101-midframes" / frame, out / part / frame))
    link("ucf101", images)
    finish(out, names, UCF101)

def objectnet(folder, out):
    """Write the classes of ObjectNet that ImageNet has too as class folders."""
    maps, wnids = folder / "mappings", ImageNetInfo().label_names()
    labels, imagenet, index = [json.loads((maps / f"{file}.json").read_text("utf-8")) for file in (
        "folder_to_objectnet_label", "objectnet_to_imagenet_1k", "pytorch_to_imagenet_2012_id")]
    lines = (maps / "imagenet_to_label_2012_v2").read_text("utf-8").split("\n")
    wnid = {lines[i].strip(): wnids[int(k)] for k, i in index.items()}
    kept = {c: ";".join(wnid[name] for name in imagenet[label].split("; "))
            for c, label in sorted(labels.items()) if label in imagenet}
    images = []
    for c in kept:
        files = sorted((folder / "images" / c).glob("[!.]*.png"))
        if not files:
            fail(f"objectnet: no *.png in {folder}/images/{c}; unpack the archive again")
        images += [(file, out / c / file.name, 2) for file in files]
    thread_map(write, *zip(*images), desc="objectnet", unit="image")
    write([f"{c}\t{labels[c]}" for c in kept], out / "classnames.txt")
    write([f"{c}\t{kept[c]}" for c in kept], out / "classes.txt")

def is_plain(name):
    """Whether a path in a folder stays in it, has no hidden part and fits into a line of a TSV."""
    hidden = any(part.startswith(".") for part in name.split("/"))      # ".." counts, too
    return not (hidden or name.startswith("/") or re.search(r"[\t\r\n\ud800-\udfff]", name))

def one_line(data):
    """Return the text of a file without line breaks and tabs."""
    return " ".join(data.decode("utf-8-sig", "replace").split())

def pairs_in_folder(folder):
    """Return [(image, text)] of the files below a folder; images are paths in it."""
    def stop(e):
        raise e                                             # os.walk would skip the folder
    pairs = []
    walk = os.walk(folder, onerror=stop, followlinks=True)
    for parent, subfolders, files in tqdm(walk, "pool", unit="folder"):
        subfolders.sort()
        for file in sorted(files):
            image = Path(parent, file)
            name = os.path.relpath(image, folder)
            if image.suffix.lower() not in POOL_IMAGES or not is_plain(name):
                continue
            text = image.with_suffix(".txt")
            if image.is_file() and text.is_file():          # a dangling link is not a file
                pairs.append((name, one_line(text.read_bytes())))
    return [(name, text) for name, text in pairs if text]

def pairs_in_tar(shard, out):
    """Unpack the images of a tar to OUT/<name of the tar>; return [(image, text)], paths in OUT."""
    images, texts = {}, {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            name = os.path.normpath(member.name)
            stem, kind = os.path.splitext(name)
            if not member.isfile() or not is_plain(name):
                continue
            if kind.lower() in POOL_IMAGES:
                images[name] = member
            elif kind == ".txt":
                texts[stem] = one_line(tar.extractfile(member).read())
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):             # the block that ends every tar
            raise tarfile.ReadError("unexpected end")
        pairs = []
        for name, member in images.items():
            text = texts.get(os.path.splitext(name)[0])
            if not text:
                continue
            target = out / shard.stem / name
            if not target.exists() or target.stat().st_size != member.size:
                target.unlink(missing_ok=True)              # it is of another pool
                write(tar.extractfile(member).read(), target)
            pairs.append((f"{shard.stem}/{name}", text))
    return pairs

def expand_braces(pattern):
    """Return the paths of a pattern: x/{08..10}.tar is x/08.tar, x/09.tar and x/10.tar."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", str(pattern))
    if braces is None:
        return [pattern]
    first, last = braces.groups()
    numbers = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [Path(str(pattern).replace(braces[0], number)) for number in numbers]

def unpack(shards, out):
    """Return the pairs of all tars, unpacked to OUT."""
    if len({shard.stem for shard in shards}) < len(shards):
        fail(f"pool: two tars are called {shards[0].name}; give each its own OUT")

    def pairs_or_exit(shard):
        try:
            return pairs_in_tar(shard, out)
        except (OSError, tarfile.TarError) as e:
            fail(f"pool: {shard} cannot be unpacked ({e}); expected a whole tar, not compressed: "
                 "download it again or remove it, then start the same command again")
    found = thread_map(pairs_or_exit, shards, desc="pool", unit="tar")
    return [pair for pairs in found for pair in pairs]

def pool(source, out):
    """Write OUT/pool.tsv, the pairs in img2dataset's folders or tars."""
    shards = expand_braces(source)
    if source.is_dir():
        shards = sorted(source.glob("[!.]*.tar"))
    out.mkdir(parents=True, exist_ok=True)
    if shards:
        pairs = unpack(shards, out)
    else:
        folder = os.path.realpath(source)       # "../" would lead elsewhere from a link
        base = os.path.relpath(folder, os.path.realpath(out))
        pairs = [(os.path.normpath(f"{base}/{name}"), text)
                 for name, text in pairs_in_folder(folder)]
    if not pairs:
        fail(f"pool: {source} holds no pairs; expected images with a text, as 0.jpg and 0.txt, in "
             "folders or tars")
    write(["path\ttext", *[f"{path}\t{text}" for path, text in pairs]], out / "pool.tsv")
    print(f"{out / 'pool.tsv'} has {len(pairs)} pairs")

def main(argv=None):
    of_folder = {
        "iwildcam": iwildcam, "objectnet": objectnet, "pool": pool, "ucf101": ucf101}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("set", choices=[*SETS, *of_folder])
    parser.add_argument("paths", nargs="+", type=Path, metavar="OUT",
                        help=f"OUT; for {', '.join(of_folder)} DIR OUT")
    parser.add_argument("--download", metavar="DIR", help="torchvision's own files (OUT/.download)")
    args = parser.parse_args(argv)
    *source, out = args.paths
    if len(source) != (args.set in of_folder):
        fail(f"give OUT alone; for {', '.join(of_folder)} give DIR OUT; for pool also "
             "'DIR/{00000..00331}.tar' OUT, in quotes")
    last = out / {"pool": "pool.tsv", "objectnet": "classes.txt"}.get(args.set, "classnames.txt")
    if last.exists():                           # the file that is written last
        print(f"{out} is finished already: it has a {last.name}")
        return
    try:
        if source:
            folder = source[0]
            hint = "start the same command again when that is mended; it goes on"
            of_folder[args.set](folder, out)
        else:
            folder = Path(args.download or out / ".download")
            hint = (f"put the archive below {folder} by hand, where its reader looks, or unpack "
                    "it anew")
            torchvision_set(args.set, folder, out)
    except (Exception, KeyboardInterrupt) as e:
        fail(f"{args.set}: {type(e).__name__}: {e}; {hint}")

if __name__ == "__main__":
    main()
