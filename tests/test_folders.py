# SPDX-License-Identifier: MIT
"""folders.py on small sets as ObjectNet and torchvision, whose readers are the judge, have them.

cars and flowers102 are left out, because their files need scipy; cifar100 is read as cifar10 is.
"""
import json
import pathlib
import pickle
import shutil
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets

import folders
from folders import FLAG, PETS, THREE, TWO

NUMBERS = {"train": range(4), "val": range(4, 6), "test": range(6, 9)}
CASES = [                                       # a set, its reader, its splits, prompts, names
    ("cifar10", datasets.CIFAR10, FLAG, 18, [f"some {k}" for k in range(10)]),
    ("food101", datasets.Food101, TWO, 1, ["apple pie", "waffles"]),
    ("pets", datasets.OxfordIIITPet, PETS, 1, ["Abyssinian", "Pug Dog"]),
    ("aircraft", datasets.FGVCAircraft, THREE, 2, ["BAE 146-200", "F-16A/B", "F/A-18"]),
    ("dtd", datasets.DTD, THREE, 8, ["banded", "polka-dotted"]),
    ("caltech101", datasets.Caltech101, {"train": {}}, 34, ["centered face", "grand piano"]),
    ("sun397", datasets.SUN397, {"train": {}}, 2, ["abbey", "hot tub outdoor"]),
    ("eurosat", datasets.EuroSAT, {"train": {}}, 3, ["annual crop land", "forest"])]

def made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

def write_lines(path, lines):
    made(path).write_text("".join(f"{line}\n" for line in lines))

def write_jpegs(base, files):
    """Noise, other pixels in each file."""
    for file in files:
        seed = zlib.crc32(f"{base / file}".encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made(base / file))

def write_cifar(base):
    """Two images of each class in each of torchvision's files, pickled as they are distributed."""
    rng, cls = np.random.default_rng(0), datasets.CIFAR10
    for file, _ in [*cls.train_list, *cls.test_list]:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {"data": pixels, "labels": list(range(10)) * 2}
        made(base / file).write_bytes(pickle.dumps(content))
    names = {cls.meta["key"]: [f"some_{k}" for k in range(10)]}
    (base / cls.meta["filename"]).write_bytes(pickle.dumps(names))

@pytest.fixture
def sets(tmp_path, monkeypatch):
    """The folder of torchvision's sets, all that folders.py knows."""
    root = tmp_path / "sets"
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: True)
    write_cifar(root / datasets.CIFAR10.base_folder)
    food, pets = root / "food-101", root / "oxford-iiit-pet"
    for split, trainval in (("train", "trainval"), ("test", "test")):
        files = {c: [f"{c}/{i}" for i in NUMBERS[split]] for c in ("apple_pie", "waffles")}
        write_lines(food / "meta" / f"{split}.json", [json.dumps(files)])
        write_jpegs(food / "images", [f"{file}.jpg" for file in sum(files.values(), [])])
        files = [f"{breed}_{i}" for breed in ("Abyssinian", "pug_dog") for i in NUMBERS[split]]
        lines = [f"{file} {1 + file.startswith('pug')} 1 1" for file in files]
        write_lines(pets / "annotations" / f"{trainval}.txt", lines)
        write_jpegs(pets / "images", [f"{file}.jpg" for file in files])
    aircraft, dtd, variants = root / "fgvc-aircraft-2013b/data", root / "dtd/dtd", CASES[3][-1]
    write_lines(aircraft / "variants.txt", variants)
    for split, numbers in NUMBERS.items():
        files = {f"{k}{i}": variant for k, variant in enumerate(variants) for i in numbers}
        write_jpegs(aircraft / "images", [f"{file}.jpg" for file in files])
        write_lines(aircraft / f"images_variant_{split}.txt", map(" ".join, files.items()))
        files = [f"{c}/{c}_{i}.jpg" for c in ("banded", "polka-dotted") for i in numbers]
        write_jpegs(dtd / "images", files)
        write_lines(dtd / "labels" / f"{split}1.txt", files)
    for i in range(1, 4):
        write_jpegs(root / "caltech101" / "101_ObjectCategories", [
            f"{c}/image_{i:04d}.jpg" for c in ("BACKGROUND_Google", "Faces_easy", "grand_piano")])
        write_jpegs(root / "eurosat" / "2750", [f"{c}/{i}.jpg" for c in ("AnnualCrop", "Forest")])
        write_jpegs(root / "SUN397", [f"{c}/sun_{i}.jpg" for c in ("a/abbey", "h/hot_tub/outdoor")])
    write_lines(root / "SUN397" / "ClassName.txt", ["/a/abbey", "/h/hot_tub/outdoor"])
    monkeypatch.setattr(folders, "COUNTS", {})
    for name in ("scipy", "scipy.io"):          # Caltech101 imports it, for outlines only
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return root

def run(*argv):
    folders.main([str(arg) for arg in argv])

def error(*argv):
    """The error line of a command that fails."""
    with pytest.raises(SystemExit) as e:
        run(*argv)
    assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    return e.value.code

def fails(*_):
    raise OSError("not\nhere")

def read_table(path):
    return dict(line.split("\t") for line in path.read_text().splitlines())

def state(out):
    """Every image of `out`: another inode or time tells that it was written again."""
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("*/*/*")}

@pytest.mark.parametrize("name, cls, parts, prompts, called", CASES)
def test_torchvisions_sets(sets, tmp_path, name, cls, parts, prompts, called):
    """Every image in its class and split, linked; a second call does not need the download."""
    out = tmp_path / "out"
    run(name, out, "--download", sets)
    names = read_table(out / "classnames.txt")
    assert sorted(names.values()) == sorted(called)
    assert not any(set(folder) & set(" /?") for folder in names)
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(parts)
    for part, options in parts.items():
        ours = [(names[file.parent.name], np.asarray(Image.open(file)).tolist())
                for file in out.glob(f"{part}/*/*")]
        theirs = [(called[k], np.asarray(image).tolist()) for image, k in cls(sets, **options)]
        assert sorted(ours) == sorted(theirs)
    templates = set((out / "templates.txt").read_text().splitlines())
    assert len(templates) == prompts and all(t.count("{}") == 1 for t in templates)
    assert all(file.stat().st_nlink == 2 for file in out.glob("*/*/*.jpg"))
    before = state(out)
    shutil.rmtree(sets)
    run(name, out, "--download", sets)
    assert state(out) == before

@pytest.mark.parametrize("name", ["cifar10", "dtd"])
def test_half_written_is_finished(sets, tmp_path, monkeypatch, name):
    """What is there stays; where no hard link is possible the rest is copied."""
    out = tmp_path / "out"
    run(name, out, "--download", sets)
    whole = {file: file.read_bytes() for file in out.rglob("*.*")}
    (out / "classnames.txt").unlink()
    for file in out.glob("test/*/*"):
        file.unlink()
        pathlib.Path(f"{file}.part").write_text("half a file")
    before = {file: seen for file, seen in state(out).items() if file.suffix != ".part"}
    monkeypatch.setattr(pathlib.Path, "hardlink_to", fails)
    run(name, out, "--download", sets)
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == whole
    assert before and before.items() <= state(out).items()
    assert all(file.stat().st_nlink == 1 for file in out.glob("test/*/*"))

def test_what_is_missing_is_said(sets, tmp_path, monkeypatch):
    """A call without the network, with it, and with parts that lack."""
    out, food = tmp_path / "out", tmp_path / "out" / ".download" / "food-101"
    monkeypatch.setattr(datasets.Food101, "_download", fails)
    line = error("food101", out)
    assert "food101: OSError: not here" in line and f"below {food.parent} by hand" in line
    monkeypatch.setattr(datasets.Food101, "_download", lambda self: (
        food.exists() or shutil.copytree(sets / "food-101", food)))
    run("food101", out)
    assert len(list(out.glob("t*/*/*.jpg"))) == 14
    (sets / "dtd" / "dtd" / "images" / "banded" / "banded_0.jpg").unlink()
    assert "banded_0.jpg" in error("dtd", tmp_path / "dtd", "--download", sets)
    monkeypatch.setattr(folders, "COUNTS", {"eurosat": 27000})
    assert "only 6 of its 27000" in error("eurosat", tmp_path / "eurosat", "--download", sets)
    monkeypatch.setattr(folders, "find_spec", lambda name: None)
    assert "pip install scipy" in error("flowers102", tmp_path / "flowers", "--download", sets)
    assert "OBJECTNET-1.0" in error("objectnet", out) and "OUT alone" in error("dtd", out, out)

def test_objectnet(tmp_path):
    """Folders and labels differ, lines have an order of their own, two classes are one."""
    source, out, wnids = tmp_path / "objectnet-1.0", tmp_path / "out", ImageNetInfo().label_names()
    order = np.random.default_rng(0).permutation(1000).tolist()
    labels = {"air_freshener": "Air freshener", "full_sized_towel": "Bath towel", "bike": "Bicycle"}
    imagenet = {"Bicycle": "name 671, x; name 444, x", "Bath towel": "name 434, x"}
    index, maps = {str(k): i for i, k in enumerate(order)}, source / "mappings"
    write_lines(maps / "folder_to_objectnet_label.json", [json.dumps(labels)])
    write_lines(maps / "objectnet_to_imagenet_1k.json", [json.dumps(imagenet)])
    write_lines(maps / "pytorch_to_imagenet_2012_id.json", [json.dumps(index)])
    write_lines(maps / "imagenet_to_label_2012_v2", [f"name {k}, x" for k in order])
    for folder in labels:
        image = Image.new("RGB", (50, 44), (255, 0, 0))
        image.paste((10, 200, 30), (2, 2, 48, 42))
        image.save(made(source / "images" / folder / "a.png"))
    run("objectnet", source, out)
    files, kept = sorted(out.rglob("*.png")), ["bike", "full_sized_towel"]
    assert [file.parent.name for file in files] == kept
    for image in map(Image.open, files):
        assert image.size == (46, 40) and image.getcolors() == [(46 * 40, (10, 200, 30))]
    assert read_table(out / "classnames.txt") == {folder: labels[folder] for folder in kept}
    assert list(read_table(out / "classes.txt").values()) == [
        f"{wnids[671]};{wnids[444]}", wnids[434]]
    before = files[1].stat()
    files[0].unlink()
    run("objectnet", source, out)
    assert files[0].exists() and files[1].stat().st_mtime_ns == before.st_mtime_ns
    write_lines(maps / "objectnet_to_imagenet_1k.json", ['{"Bicycle": "unicycle"}'])
    assert "unicycle" in error("objectnet", source, tmp_path / "b")
