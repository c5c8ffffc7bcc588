# SPDX-License-Identifier: MIT
"""folders.py on small sets as torchvision, ObjectNet, WILDS, CoOp and img2dataset have them.

Torchvision's own readers are the judge of its sets, and common.py's reader of TSVs is of pools.
cars and flowers102 are left out, because their files need scipy; cifar100 is read as cifar10 is.
"""
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile
import types
import zlib

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets

import common
import folders
from conftest import parse
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
    """Every image in its class and split, linked; a second call does not need the download. Every
    name has a folder."""
    out = tmp_path / "out"
    run(name, out, "--download", sets)
    names = read_table(out / "classnames.txt")
    assert sorted(names.values()) == sorted(called)
    assert not any(set(folder) & set(" /?") for folder in names)
    assert {path.name for path in out.glob("*/*")} == names.keys()
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
    assert "objectnet, pool, ucf101 give DIR OUT" in error("objectnet", out)
    assert "OUT alone" in error("dtd", out, out)
    assert "invalid choice: 'imagenet'" in error("imagenet", out)

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
    (out / "classes.txt").unlink()
    run("objectnet", source, out)
    assert files[0].exists() and files[1].stat().st_mtime_ns == before.st_mtime_ns
    write_lines(maps / "objectnet_to_imagenet_1k.json", ['{"Bicycle": "unicycle"}'])
    assert "unicycle" in error("objectnet", source, tmp_path / "b")

def test_objectnet_lacks_a_class(tmp_path):
    """A class without images is said, and not listed in classes.txt as if it had a folder."""
    source, out = tmp_path / "objectnet-1.0", tmp_path / "out"
    maps = source / "mappings"
    write_lines(maps / "folder_to_objectnet_label.json", ['{"bike": "Bicycle"}'])
    write_lines(maps / "objectnet_to_imagenet_1k.json", ['{"Bicycle": "bicycle"}'])
    write_lines(maps / "pytorch_to_imagenet_2012_id.json", ['{"0": 0}'])
    write_lines(maps / "imagenet_to_label_2012_v2", ["bicycle"])
    made(source / "images" / "bike" / "._a.png").write_bytes(b"AppleDouble")
    assert f"no *.png in {source}/images/bike" in error("objectnet", source, out)
    assert not out.exists()

def write_iwildcam(base):
    """WILDS's iWildCam, one image for each row: two classes have the same name, and "birds" none of
    the images."""
    write_lines(base / "categories.csv", [
        "y,category_id,name", "0,0,empty", "2,9,mazama temama", "10,99,mazama temama",
        "99999,5,birds"])
    rows = [f"{split},{y}" for split in ("train", "id_val", "id_test") for y in (0, 2, 10)]
    rows += ["val,0", "val,10", "test,2"]
    lines = [f'{i},{row},7,"2013-06-05 05:44:19.000",{i}.jpg' for i, row in enumerate(rows)]
    write_lines(base / "metadata.csv", [",split,y,category_id,datetime,filename", *lines])
    write_jpegs(base / "train", [f"{i}.jpg" for i in range(len(rows))])

def test_iwildcam(tmp_path):
    """Every image is in the folder of its split and label, and the scripts read that as WILDS means
    it: class k is label k, val and test are of the training cameras, the others are shifts."""
    source, out = tmp_path / "iwildcam_v2.0", tmp_path / "out"
    write_iwildcam(source)
    run("iwildcam", source, out)
    empty, first, second = "000_empty", "002_mazama_temama", "010_mazama_temama"
    placed = {int(file.stem): str(file.parent.relative_to(out)) for file in out.glob("*/*/*")}
    parts = [*["train"] * 3, *["val"] * 3, *["test"] * 3, "ood_val", "ood_val", "ood_test"]
    classes = [empty, first, second] * 3 + [empty, second, first]
    assert placed == {i: f"{part}/{c}" for i, (part, c) in enumerate(zip(parts, classes))}
    assert all(file.stat().st_nlink == 2 for file in out.glob("*/*/*"))
    assert read_table(out / "classnames.txt") == {
        empty: "empty", first: "mazama temama", second: "mazama temama"}
    assert (out / "templates.txt").read_text() == "a photo of {}.\n{} in the wild.\n"
    train, sets = common.read_data(parse("--data", str(out)))
    assert train.classes == [empty, first, second]
    assert {images.name: (images.head, images.is_shift) for images in sets} == {
        "val": ("all", False), "test": ("all", False), "ood_test": ("subset", True),
        "ood_val": ("subset", True)}
    shutil.rmtree(source)
    run("iwildcam", source, out)                            # it is finished

def test_english_names_of_iwildcam(tmp_path):
    """labels.csv of WiSE-FT gives the names in prompts, and no other folders."""
    write_iwildcam(tmp_path / "in")
    write_lines(tmp_path / "in/labels.csv", [
        "y,category_id,name,english", "0,0,empty,empty", "2,9,mazama temama,red brocket",
        "10,99,mazama temama,Günther's deer", "99999,5,birds,birds"])
    run("iwildcam", tmp_path / "in", tmp_path / "out")
    assert read_table(tmp_path / "out/classnames.txt") == {
        "000_empty": "empty", "002_mazama_temama": "red brocket",
        "010_mazama_temama": "Günther's deer"}

@pytest.mark.parametrize("file, old, new, said", [
    ("metadata.csv", None, None, "/metadata.csv cannot be read ("),
    ("categories.csv", None, None, "/categories.csv cannot be read ("),
    ("metadata.csv", b"filename", b"file", "/metadata.csv: expected split, y, filename in each"),
    ("metadata.csv", b",11.jpg\n", b"", "/metadata.csv: expected split, y, filename in each"),
    ("metadata.csv", b"0,train", b"0,extra", "/metadata.csv: split extra or y 0 is unknown"),
    ("categories.csv", b"10,99,mazama temama\n", b"", "/metadata.csv: split train or y 10 is"),
    ("categories.csv", b"birds", b"\xff", "/categories.csv cannot be read ("),
    ("train/3.jpg", None, None, "1 of 12 images are missing, such as ")])
def test_bad_iwildcam(tmp_path, file, old, new, said):
    """What is missing or damaged is one line that names the file, and nothing is written."""
    source, out = tmp_path / "in", tmp_path / "out"
    write_iwildcam(source)
    if old is None:
        (source / file).unlink()
    else:
        (source / file).write_bytes((source / file).read_bytes().replace(old, new))
    line = error("iwildcam", source, out)
    assert said in line and (file in line or file == "categories.csv")
    assert not out.exists()

def test_ucf101(tmp_path):
    """Middle frames go where the first split's lists put their videos, under the words of their
    action; a frame that is missing is said, and so is a list that is none."""
    source, out = tmp_path / "in", tmp_path / "out"
    lists, frames = source / "ucfTrainTestlist", source / "UCF-101-midframes"
    train = ["TaiChi/v_TaiChi_g08_c01.avi 91", "HandstandPushups/v_HandStandPushups_g08_c01.avi 37"]
    write_lines(lists / "trainlist01.txt", train)
    write_lines(lists / "testlist01.txt", ["TaiChi/v_TaiChi_g01_c01.avi\r"])
    files = ["Tai_Chi/v_TaiChi_g08_c01.jpg", "Handstand_Pushups/v_HandStandPushups_g08_c01.jpg",
             "Tai_Chi/v_TaiChi_g01_c01.jpg"]
    write_jpegs(frames, files)
    run("ucf101", source, out)
    assert {str(file.relative_to(out)) for file in out.rglob("*.jpg")} == {
        f"train/{files[0]}", f"train/{files[1]}", f"test/{files[2]}"}
    assert read_table(out / "classnames.txt") == {
        "Handstand_Pushups": "Hand Stand Pushups", "Tai_Chi": "Tai Chi"}
    templates = (out / "templates.txt").read_text().splitlines()
    assert len(set(templates)) == 48 and "a photo of the person doing {}." in templates
    (frames / files[1]).unlink()
    assert f"1 of 3 images are missing, such as {frames / files[1]}" in error(
        "ucf101", source, tmp_path / "b")
    write_lines(lists / "testlist01.txt", ["<html>"])
    assert "testlist01.txt: expected lines such as" in error("ucf101", source, tmp_path / "b")
    assert not (tmp_path / "b").exists()

def png(value, size=(30, 20)):
    """The bytes of a grey image."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()

def write_shard(path, members):
    """Write a tar of (name, bytes), or (name, kind, target of a link) for what is not a file."""
    with tarfile.open(made(path), "w") as tar:
        for name, *content in members:
            info = tarfile.TarInfo(name)
            if len(content) == 1:
                info.size = len(content[0])
                tar.addfile(info, io.BytesIO(content[0]))
            else:
                info.type, info.linkname = content
                tar.addfile(info)

def read_pool(out):
    """What anchor.py finds: the bytes and the text of each pair, by the path in the TSV."""
    rows = common.read_rows(out / "pool.tsv", "path", "text")
    return {path: ((out / path).read_bytes(), text) for path, text in rows}

def write_folders(base):
    """The two folders of an img2dataset download of format "files", with what it must not read."""
    for path, data in [
            ("00000/000000000.jpg", b"A"), ("00000/000000000.txt", b"first"),
            ("00000/000000000.json", b"{}"), ("00000.parquet", b""), ("00000_stats.json", b"{}"),
            ("00000/000000001.webp", b"B"),
            ("00000/000000001.txt", "drei\nzeilen\tund \u00e4".encode()),
            ("00000/000000002.jpg", b"no text"), ("00000/000000003.txt", b"no image"),
            ("00000/000000004.png", b"blank text"), ("00000/000000004.txt", b" \r\n"),
            ("00000/000000005.jpg", b"its text is a folder"), ("00000/000000005.txt/x", b""),
            ("00000/._000000000.jpg", b"AppleDouble"), ("00000/._000000000.txt", b"not a text"),
            ("00000/000000006.txt", b"its image is a link to nothing"),
            ("00000/000000008.jpg", b"its text is a link to nothing"),
            ("00000/000000009.jpg", b"its text is empty"), ("00000/000000009.txt", b""),
            ("00001/000000001.jpg", b"E"), ("00001/000000001.txt", b"\xef\xbb\xbfmarked"),
            ("00000/000000007.jpg/x", b""), ("00000/000000007.txt", b"its image is a folder"),
            ("00001/000000000.JPEG", b"C"), ("00001/000000000.txt", b"not UTF-8: \xff"),
            (".hidden/000000000.jpg", b"D"), (".hidden/000000000.txt", b"hidden")]:
        made(base / path).write_bytes(data)
    (base / "00000/000000006.jpg").symlink_to("nowhere.jpg")
    (base / "00000/000000008.txt").symlink_to("nowhere.txt")

def test_a_pool_of_folders(tmp_path):
    """Images with a text are listed where they are, from an OUT anywhere, and nothing is copied."""
    source = tmp_path / "cc3m"
    write_folders(source)
    (tmp_path / "far/off").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/off")
    expected = [("00000/000000000.jpg", b"A", "first"),
                ("00000/000000001.webp", b"B", "drei zeilen und \u00e4"),
                ("00001/000000000.JPEG", b"C", "not UTF-8: \ufffd"),
                ("00001/000000001.jpg", b"E", "marked")]
    for out, base in ((tmp_path / "new/pool", "../../cc3m/"), (tmp_path / "link", "../../cc3m/"),
                      (source, ""), (source / "pool", "../")):
        run("pool", source, out)
        assert read_pool(out) == {base + name: (data, text) for name, data, text in expected}
        assert list(read_pool(out)) == [base + name for name, _, _ in expected]
    assert os.listdir(tmp_path / "new/pool") == ["pool.tsv"]

def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """os.walk would leave it out, and a pool without it would pass for whole."""
    write_folders(tmp_path / "in")
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("00001"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuses)
    line = error("pool", tmp_path / "in", tmp_path / "out")
    assert f"Permission denied: '{tmp_path}/in/00001'" in line
    assert not (tmp_path / "out/pool.tsv").exists()

def test_a_pool_of_tars(tmp_path, monkeypatch):
    """Members in any order: every image has its own bytes and text, and tars do not mix."""
    long = "x" * 150                                        # needs a longer tar header
    source, out = tmp_path / "cc3m", tmp_path / "pool"
    write_shard(source / "08.tar", [
        ("0001.txt", b"first"), ("0001.jpg", png(1)), ("0001.json", b"{}"), ("0002.jpg", png(2)),
        (f"{long}.jpg", png(3)), (f"{long}.txt", "drei\nzeilen".encode())])
    write_shard(source / "09.tar", [
        ("0001.jpg", png(4)), ("0001.txt", b"same name"), ("0005.txt", b"no image"),
        ("0006.jpg", png(6)), ("0006.txt", b" ")])
    write_shard(source / "10.tar", [
        ("./a/1.webp", png(7)), ("./a/1.txt", b"tab\there"), ("b/1.png", png(8)),
        ("b/1.txt", b"\xff"), ("c.jpg", png(9)), ("c.txt", b"old"), ("c.jpg", png(10)),
        ("c.txt", b"new")])
    expected = {"08/0001.jpg": (png(1), "first"), f"08/{long}.jpg": (png(3), "drei zeilen"),
                "09/0001.jpg": (png(4), "same name"), "10/a/1.webp": (png(7), "tab here"),
                "10/b/1.png": (png(8), "\ufffd"), "10/c.jpg": (png(10), "new")}
    run("pool", source / "{08..10}.tar", out)
    assert read_pool(out) == expected and list(read_pool(out)) == list(expected)
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    assert sorted(files) == sorted([*expected, "pool.tsv"])     # no image without a text
    run("pool", source / "09.tar", tmp_path / "one")
    assert read_pool(tmp_path / "one") == {"09/0001.jpg": expected["09/0001.jpg"]}
    (source / "._08.tar").write_bytes(b"AppleDouble")
    run("pool", source, source)
    assert read_pool(source) == expected
    monkeypatch.chdir(source)
    run("pool", "{08..10}.tar", "here")
    assert read_pool(source / "here") == expected

def test_strange_members_of_tars(tmp_path):
    """Nothing is written outside OUT, and what is not a visible file is never part of a pair."""
    secret, out = tmp_path / "secret.jpg", tmp_path / "deep/er/pool"
    secret.write_bytes(png(3))
    members = [("good.jpg", png(1)), ("good.txt", b"good")]
    for stem in ("../up", "../../up", "a/../../../up", f"{tmp_path}/absolute", "._apple", ".a/b",
                 "a/._b", "tab\there", "line\nbreak", "surrogate\udcff"):
        members += [(f"{stem}.jpg", png(2)), (f"{stem}.txt", b"bad")]
    write_shard(tmp_path / "in/00000.tar", [
        *members, ("folder.txt", tarfile.DIRTYPE, ""), ("folder.jpg", tarfile.DIRTYPE, ""),
        ("soft.jpg", tarfile.SYMTYPE, str(secret)), ("soft.txt", b"to a secret"),
        ("hard.jpg", tarfile.LNKTYPE, "good.jpg"), ("hard.txt", b"to an image"),
        ("good.txt", tarfile.DIRTYPE, ""), ("folder.jpg", png(4)), ("folder.txt", b"real"),
        ("a", tarfile.SYMTYPE, str(tmp_path)), ("a/b.jpg", png(5)), ("a/b.txt", b"in a folder")])
    run("pool", tmp_path / "in/00000.tar", out)
    assert read_pool(out) == {
        "00000/good.jpg": (png(1), "good"), "00000/folder.jpg": (png(4), "real"),
        "00000/a/b.jpg": (png(5), "in a folder")}
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {secret, tmp_path / "in/00000.tar", out / "pool.tsv",
                     *[out / path for path in read_pool(out)]}

def test_a_cut_tar_is_refused(tmp_path):
    """Cut anywhere before its end, a tar is refused by name, and the TSV is not written."""
    whole, cut, out = tmp_path / "whole.tar", tmp_path / "cut.tar", tmp_path / "out"
    write_shard(whole, [("0.jpg", png(1)), ("0.txt", b"text"), (f"{'x' * 150}.jpg", png(2)),
                        ("1.jpg", png(3)), ("1.txt", b"more")])
    data = whole.read_bytes()
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512        # of the last member
    for size in [*range(0, end + 1, 512), *range(100, end, 512), end + 511]:
        cut.write_bytes(data[:size])
        assert f"{cut} cannot be unpacked (" in error("pool", cut, out)
        assert not list(out.rglob("*.*"))                   # no image of a shard that is refused
    broken = bytearray(data)
    start = data.index(b"1.jpg")
    broken[start + 148:start + 156] = b"7777777\0"          # the checksum of a header
    cut.write_bytes(broken)
    assert f"{cut} cannot be unpacked (" in error("pool", cut, out)
    assert not (out / "pool.tsv").exists()
    cut.write_bytes(data)
    run("pool", cut, out)
    assert len(read_pool(out)) == 2

def test_a_cut_tar_among_others(tmp_path):
    """One bad shard stops the whole pool; without it the same command finishes. A shard without
    members is whole: img2dataset writes one where no download succeeded."""
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("0", "1", "2"):
        write_shard(source / f"{name}.tar", [("a.jpg", png(1)), ("a.txt", name.encode())])
    write_shard(source / "3.tar", [])
    os.truncate(source / "1.tar", 700)
    line = error("pool", source, out)
    assert f"{source}/1.tar cannot be unpacked (" in line and "again or remove it" in line
    assert not (out / "pool.tsv").exists() and not (out / "1").exists()
    (source / "1.tar").unlink()
    run("pool", source, out)
    assert read_pool(out) == {"0/a.jpg": (png(1), "0"), "2/a.jpg": (png(1), "2")}

def test_a_half_written_pool_is_finished(tmp_path, monkeypatch):
    """Images that are there stay, one that a kill has cut is written anew, and a finished pool is
    left alone."""
    source, out, replace = tmp_path / "in", tmp_path / "out", pathlib.Path.replace
    images = {f"{i}.jpg": png(i) for i in range(5)}
    texts = [(f"{i}.txt", b"text") for i in range(5)]
    for shard in ("0.tar", "1.tar"):
        write_shard(source / shard, [*images.items(), *texts])

    def fails_at_3(part, target):
        return fails() if target.name == "3.jpg" else replace(part, target)
    monkeypatch.setattr(pathlib.Path, "replace", fails_at_3)
    assert "in/0.tar cannot be unpacked (not here)" in error("pool", source, out)
    monkeypatch.undo()
    assert not (out / "pool.tsv").exists()
    (out / "0/3.jpg.part").write_bytes(b"half a file")
    before = {path: path.stat() for path in out.rglob("*.jpg")}
    run("pool", source, out)
    assert read_pool(out) == {
        f"{shard}/{name}": (data, "text") for shard in "01" for name, data in images.items()}
    assert {path.name for path in before} == {"0.jpg", "1.jpg", "2.jpg"}
    assert all(path.stat() == seen for path, seen in before.items())
    assert not list(out.rglob("*.part"))
    (out / "pool.tsv").unlink()
    (out / "0/2.jpg").write_bytes(b"of another pool")
    run("pool", source, out)
    assert read_pool(out)["0/2.jpg"] == (png(2), "text")
    shutil.rmtree(source)
    finished = (out / "pool.tsv").stat()
    run("pool", source, out)
    assert (out / "pool.tsv").stat() == finished

def test_bad_pools(tmp_path):
    """What cannot be a pool is one line that names it."""
    out = tmp_path / "out"
    write_shard(tmp_path / "0/a.tar", [("0.jpg", png(0)), ("1.txt", b"text")])
    write_shard(tmp_path / "1/a.tar", [("0.jpg", png(0)), ("0.txt", b"text")])
    (tmp_path / "text.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "nowhere.tar", "text.tar", "{7..9}.tar"):
        file = name.replace("{7..9}", "7")
        assert f"{tmp_path}/{file} cannot be unpacked (" in error("pool", tmp_path / name, out)
    for name in ("empty", "0/a.tar", "0"):
        assert f"{tmp_path}/{name} holds no pairs" in error("pool", tmp_path / name, out)
    assert "No such file or directory: '" in error("pool", tmp_path / "{2..1}.tar", out)
    assert "two tars are called a.tar" in error("pool", tmp_path / "{0..1}/a.tar", out)
    assert "in quotes" in error("pool", out) and "in quotes" in error("pool", out, out, out)
    (tmp_path / "file").write_text("")
    assert "FileExistsError" in error("pool", tmp_path / "0", tmp_path / "file")
    assert not (out / "pool.tsv").exists()
