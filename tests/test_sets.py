# SPDX-License-Identifier: MIT
"""torchvision's sets by NAME:FOLDER, small ones in torchvision's own formats on disk; its own readers are the judge."""
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import anchor
import calft
import carft
import common
import evaluate
from conftest import run, write_images
from test_common import read

CPU = torch.device("cpu")
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def dump(base, name, content):
    """Pickle content to base/name, as CIFAR is distributed; [name, checksum], as torchvision lists it."""
    (base / name).write_bytes(pickle.dumps(content))
    return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]


def write_cifar10(folder, monkeypatch, n=5):
    """Five training batches of n images and a test batch, pickled as they are distributed; checksums patched."""
    base, rng = folder / "cifar-10-batches-py", np.random.default_rng(0)
    base.mkdir(parents=True)
    batch = lambda: {"data": rng.integers(0, 256, (2 * n, 3072), dtype=np.uint8), "labels": (list(range(10)) * n)[:2 * n]}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [dump(base, f"data_batch_{i}", batch()) for i in range(1, 6)])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [dump(base, "test_batch", batch())])
    name, md5 = dump(base, "batches.meta", {"label_names": TEN})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})


def write_cifar100(folder, monkeypatch, n=4):
    """A training and a test file of n images of each of 100 classes, pickled as they are distributed."""
    base, rng = folder / "cifar-100-python", np.random.default_rng(0)
    base.mkdir(parents=True)
    for kind in ("train", "test"):
        content = {"data": rng.integers(0, 256, (100 * n, 3072), dtype=np.uint8), "fine_labels": list(range(100)) * n}
        monkeypatch.setattr(torchvision.datasets.CIFAR100, f"{kind}_list", [dump(base, kind, content)])
    name, md5 = dump(base, "meta", {"fine_label_names": [f"thing {k}" for k in range(100)]})
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": md5})


def write_food101(folder):
    base = folder / "food-101"
    (base / "meta").mkdir(parents=True)
    for s, split in enumerate(("train", "test")):
        listed = {kind: [f"{kind}/{10 * s + i}" for i in range(5 - s)] for kind in ("apple_pie", "waffles")}
        for k, files in enumerate(listed.values()):
            for i, file in enumerate(files):
                write_jpeg(base / "images" / f"{file}.jpg", 1000 + 100 * s + 10 * k + i)
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))


def write_jpeg(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_pets(folder):
    base, kinds = folder / "oxford-iiit-pet", ["Abyssinian", "american_bulldog", "Egyptian_Mau"]
    (base / "annotations" / "trimaps").mkdir(parents=True)
    for split, numbers in (("trainval", range(1, 7)), ("test", range(7, 10))):
        lines = []
        for k, kind in enumerate(kinds):
            for i in numbers:
                write_jpeg(base / "images" / f"{kind}_{i}.jpg", 100 * k + i)
                lines.append(f"{kind}_{i} {k + 1} 1 1")
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def write_dtd(folder):
    base = folder / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 11))):
        lines = []
        for k, kind in enumerate(("banded", "polka-dotted", "zigzagged")):
            for i in numbers:
                write_jpeg(base / "images" / kind / f"{kind}_{i}.jpg", 100 * k + i)
                lines.append(f"{kind}/{kind}_{i}.jpg")
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")


def write_aircraft(folder):
    base = folder / "fgvc-aircraft-2013b" / "data"
    (base / "images").mkdir(parents=True)
    variants = ["707-320", "A300B4", "DC-10"]
    (base / "variants.txt").write_text("\n".join(variants) + "\n")
    for s, split in enumerate(("train", "val", "test")):
        for k, _ in enumerate(variants):
            write_jpeg(base / "images" / f"{s}{k}.jpg", 10 * s + k)
        (base / f"images_variant_{split}.txt").write_text("".join(f"{s}{k} {v}\n" for k, v in enumerate(variants)))


@pytest.fixture
def sets(tmp_path, monkeypatch):
    write_cifar10(tmp_path / "sets", monkeypatch)
    write_pets(tmp_path / "sets")
    write_dtd(tmp_path / "sets")
    write_aircraft(tmp_path / "sets")
    write_cifar100(tmp_path / "sets", monkeypatch)
    write_food101(tmp_path / "sets")
    return tmp_path / "sets"


def assert_is(images, dataset, names):
    """The images, labels and class names of torchvision's own data set, in some order of classes."""
    assert len(images) == len(dataset) and [images.classnames[k] for k in images.labels] == [names[y] for _, y in dataset]
    for i in (0, len(dataset) - 1):
        theirs = np.asarray(dataset[i][0].convert("RGB")).astype(int)
        assert np.abs(images.read(i).permute(1, 2, 0).numpy() - theirs).max() <= 3             # another JPEG decoder


def test_evaluated_by_their_test_split(sets, tiny_root):
    root = read(tiny_root, eval=[f"{name}:{sets}" for name in ("cifar10", "pets", "dtd", "aircraft", "cifar100", "food101")])
    found = {s.name: s for s in root.shifts}
    ours = torchvision.datasets
    assert_is(found["cifar10"], ours.CIFAR10(sets, train=False), TEN)
    assert_is(found["pets"], ours.OxfordIIITPet(sets, "test"), ["Abyssinian", "American Bulldog", "Egyptian Mau"])
    assert_is(found["dtd"], ours.DTD(sets, "test"), ["banded", "polka-dotted", "zigzagged"])
    assert_is(found["aircraft"], ours.FGVCAircraft(sets, "test"), ["707-320", "A300B4", "DC-10"])
    assert_is(found["cifar100"], ours.CIFAR100(sets, train=False), [f"thing {k}" for k in range(100)])
    assert_is(found["food101"], ours.Food101(sets, "test"), ["apple pie", "waffles"])
    assert found["pets"].columns is None and found["pets"].templates == ["a photo of a {}, a type of pet."]


def test_trained_on_by_their_own_splits(sets):
    """dtd has a val split; cifar10 and pets have none, so some of training is held out."""
    root = read(f"dtd:{sets}")
    for images, split in ((root.train, "train"), (root.val, "val"), (root.shifts[0], "test")):
        assert_is(images, torchvision.datasets.DTD(sets, split), ["banded", "polka-dotted", "zigzagged"])
    assert root.shifts[0].name == root.test == "test" and len(root.val) == 6
    assert len(root.templates) == 80 and root.shifts[0].columns == [[0], [1], [2]]

    root = read(f"cifar10:{sets}")
    train = torchvision.datasets.CIFAR10(sets, train=True)
    rows = {images.file(i): (images.read(i), images.classnames[images.labels[i]])
            for images in (root.train, root.val) for i in range(len(images))}
    assert len(root.val) == 10 and len(rows) == len(train) == 50
    for i in range(50):
        pixels, name = rows[f"cifar10:train/{i}"]
        assert (pixels.permute(1, 2, 0).numpy() == train.data[i]).all() and name == TEN[train.targets[i]]
    assert [len(read(f"pets:{sets}").train), len(read(f"pets:{sets}").val)] == [15, 3]


def test_captions_of_a_set_without_files(sets, tmp_path):
    """Of CIFAR's whole training split, held-out images too: those are passed over, other names are not."""
    images = read(f"cifar10:{sets}").train
    (tmp_path / "c.tsv").write_text("path\tcaption\n" + "".join(f"cifar10:train/{i}\tpicture {i}\n" for i in range(50)))
    captions = anchor.read_captions(str(tmp_path / "c.tsv"), images)
    assert captions == [[f"picture {images.file(i).split('/')[1]}"] for i in range(len(images))] and len(images) == 40
    with open(tmp_path / "c.tsv", "a") as f:
        f.write("cifar10:test/0\tnot of the training split\n")
    with pytest.raises(common.Abort, match="there is no image"):
        anchor.read_captions(str(tmp_path / "c.tsv"), images)


def test_joined_with_folders_and_as_val(sets, tmp_path):
    write_images(str(tmp_path / "photos"), ["banded", "zigzagged", "dog"], 4)
    root = read(f"dtd:{sets}", train=[f"dtd:{sets}", str(tmp_path / "photos"), f"cifar10:{sets}"])
    assert len(root.train) == 18 + 12 + 50 and "polka-dotted" in root.classes and "dog" in root.classes
    for i in range(len(root.train)):
        root.train.read(i)
    dogs = [root.train.file(i) for i in range(len(root.train)) if root.train.labels[i] == root.classes.index("dog")]
    assert any("photos" in f for f in dogs) and any("cifar10" in f for f in dogs)
    write_images(str(tmp_path / "ROOT" / "val"), ["cat", "dog"], 2)
    root = read(tmp_path / "ROOT", train=[f"cifar10:{sets}"])        # another folder than ROOT's
    assert len(root.train) == 50 and root.train.read(7).shape == (3, 32, 32)
    assert read(f"dtd:{sets}", val=f"dtd:{sets}", need_train=False).classes == ["banded", "polka-dotted", "zigzagged"]


@pytest.mark.parametrize("script, name", [(calft, "cifar10"), (carft, "dtd")])
def test_a_run_on_a_set(sets, clip, tmp_path, script, name):
    r = run(script, f"{name}:{sets}", clip(), tmp_path / "out", "--eval", f"pets:{sets}", steps=2)
    assert list(r["sets"]) == ["val", "test", "pets"] and r["shift_mean"] is None
    assert r["sets"]["test"]["head"] == "all" and r["sets"]["pets"]["head"] == "zero-shot"
    evaluate.main(["--data", f"{name}:{sets}", "--eval", f"pets:{sets}", "--model", str(tmp_path / "out"), "--out",
                   str(tmp_path / "e"), "--workers", "0"])
    again, = json.load(open(tmp_path / "e" / "results.json")).values()
    for s in r["sets"]:
        assert again["sets"][s]["nll"] == pytest.approx(r["sets"][s]["nll"], rel=1e-4)


def test_zero_shot_has_the_sets_own_template(sets, clip, tiny_root, tmp_path):
    """Scores by hand: pets with its own prompt, and 80 prompts where it is what was trained on."""
    name, (train, *_) = clip(), (read(f"pets:{sets}").templates,)
    evaluate.main(["--data", tiny_root, "--eval", f"pets:{sets}", "--model", name, "--out", str(tmp_path / "a"), "--workers", "0"])
    evaluate.main(["--data", f"pets:{sets}", "--model", name, "--out", str(tmp_path / "b"), "--workers", "0"])
    model, _, preprocess, tokenizer = common.load_model(name, "", CPU)
    pets = torchvision.datasets.OxfordIIITPet(sets, "test")
    images, = read(tiny_root, eval=[f"pets:{sets}"]).shifts[-1:]
    for out, which, templates in (("a", "pets", ["a photo of a {}, a type of pet."]), ("b", "test", train)):
        with torch.no_grad():
            W = common.class_head(common.text_embeddings(model, tokenizer, pets.classes, templates))
            x = common.to_input(model, CPU)(torch.stack([preprocess(images.read(i)) for i in range(9)]))
            logits = model.logit_scale.exp() * common.encode_image(model, x) @ W.T
        nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor([y for _, y in pets])))
        got, = json.load(open(tmp_path / out / "results.json")).values()
        assert got["sets"][which]["nll"] == pytest.approx(nll, rel=1e-4)


def test_what_is_missing_is_said(sets, tiny_root, tmp_path, monkeypatch, capsys):
    def fails(*words, **kw):
        with pytest.raises(common.Abort) as e:
            read(tiny_root, **kw)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), e.value
    fails("food101:/nowhere/at/all", "not a folder", eval=["food101:/nowhere/at/all"])
    fails("stl10:", "not a folder", eval=[f"stl10:{sets}"])
    fails("no val split", val=f"pets:{sets}")
    monkeypatch.setattr(torchvision.datasets.Food101, "_download", lambda self: (_ for _ in ()).throw(OSError("no network")))
    fails("Food101", str(tmp_path), "no network", eval=[f"food101:{tmp_path}"])
    assert "downloading" in capsys.readouterr().out
    find_spec = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name))
    fails("pip install scipy", eval=[f"flowers102:{sets}"])
    with pytest.raises(common.Abort, match="cifar10, cifar100, food101"):
        read(f"stl10:{sets}")


def test_downloaded_where_allowed(tmp_path, tiny_root, monkeypatch):
    """What torchvision's download leaves is used, and is not fetched twice."""
    fetched = []
    monkeypatch.setattr(torchvision.datasets.DTD, "_download", lambda self: fetched.append(1) or write_dtd(tmp_path))
    for _ in range(2):
        assert len(read(tiny_root, eval=[f"dtd:{tmp_path}"]).shifts[-1]) == 9
    assert len(fetched) == 1 and os.path.isdir(tmp_path / "dtd")
