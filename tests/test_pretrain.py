# SPDX-License-Identifier: MIT
"""What pretrain.py makes of a tiny PACS and CIFAR-10: nothing leaks, everything loads, and again it is the same."""
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import anchor
import calft
import pretrain
from conftest import run
from test_sets import TEN, write_cifar10, write_jpeg

CLASSES = ["dog", "guitar", "horse"]
DRAWN = ["art_painting", "cartoon", "sketch"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """PACS with 6 images of each of 3 classes in each domain, CIFAR-10 with 7 to train on and 2 to test on."""
    folder = tmp_path_factory.mktemp("raw")
    sets = [(f"PACS/{d}/{c}", 6) for d in ["photo", *DRAWN] for c in CLASSES]
    sets += [(f"CIFAR/{part}/{c}", n) for part, n in (("train", 7), ("test", 2)) for c in ("dog", "ship")]
    for seed, (name, n) in enumerate(sets):
        for i in range(n):
            write_jpeg(folder / name / f"{i}.jpg", 100 * seed + i)
    return folder


def make(raw, out, *flags):
    pretrain.main(["--pacs", f"{raw}/PACS", "--cifar", f"{raw}/CIFAR", "--out", str(out), "--steps", "2",
                   "--batch-size", "8", *flags])


@pytest.fixture(scope="module")
def made(raw, tmp_path_factory):
    """OUT, and the files that were pretrained on."""
    out, read, seen = tmp_path_factory.mktemp("made") / "out", pretrain.in_memory, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "in_memory", lambda x: seen.extend(map(x.path, range(len(x)))) or read(x))
        make(raw, out)
    return out, seen


def originals(folder):
    """Where the links below a folder lead."""
    return {os.path.realpath(os.path.join(top, f)) for top, _, files in os.walk(folder) for f in files}


def test_nothing_leaks(raw, made):
    out, seen = made
    seen = {os.path.realpath(path) for path in seen}
    pacs, cifar = raw.resolve() / "PACS", raw.resolve() / "CIFAR"
    parts = {name: originals(out / "root" / name) for name in ("train", "val", *DRAWN, "cifar10")}
    assert sorted(os.listdir(out / "root")) == sorted(parts)
    parts["pool"] = originals(out / "pool")
    assert sum(map(len, parts.values())) + len(seen) == len(set().union(seen, *parts.values()))      # all disjoint
    assert parts["train"] | parts["val"] == originals(pacs / "photo") and len(parts["val"]) == 3 * 2
    assert parts["cifar10"] == originals(cifar / "test")
    for d in DRAWN:                                             # a fifth of each class, rounded up
        assert parts[d] < originals(pacs / d) and len(parts[d]) == 3 * 2
    drawn = set().union(*(originals(pacs / d) - parts[d] for d in DRAWN))
    assert seen == drawn | (originals(cifar / "train") - parts["pool"]) and len(parts["pool"]) == 2 * 2
    held = {str(pacs / line) for line in (out / "heldout.txt").read_text().split("\n")[:-1]}
    assert held == parts["val"].union(*(parts[d] for d in DRAWN))
    pairs = anchor.open_pool(str(out / "pool.tsv"))
    assert len(pairs) == 4 and pairs.read(3).shape == (3, 40, 50)
    files = [os.fsdecode(bytes(f)) for f in pairs.files]
    assert {os.path.realpath(f) for f in files} == parts["pool"]
    assert all(f.split("/")[-2] in text for f, text in zip(files, pairs.texts))


def test_open_clip_and_calft_take_it(made, tmp_path):
    out, _ = made
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{out}/clip")
    tensors = load_file(out / "clip" / "open_clip_model.safetensors")
    assert set(tensors) == set(model.state_dict()) and "visual.head.proj.weight" in tensors
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.26e6, rel=1e-3)
    assert tensors["visual.trunk.bn1.num_batches_tracked"] == 2                  # BatchNorm learnt its statistics
    torch.manual_seed(0)
    fresh = open_clip.model.CLIP(**pretrain.CONFIG["model_cfg"]).state_dict()
    same = {k for k in fresh if torch.equal(fresh[k], tensors[k])}
    assert "token_embedding.weight" in same and not {"positional_embedding", "visual.head.proj.weight"} & same
    results = run(calft, out / "root", f"local-dir:{out}/clip", tmp_path, steps=1)
    assert set(results["sets"]) == {"val", *DRAWN, "cifar10"} and results["sets"]["cifar10"]["head"] == "zero-shot"


def test_the_same_seed_the_same_bytes(raw, made, tmp_path):
    make(raw, tmp_path / "again")
    make(raw, tmp_path / "other", "--seed", "1")
    for name in ("clip/open_clip_model.safetensors", "clip/open_clip_config.json", "pool.tsv", "heldout.txt"):
        one, again, other = ((out / name).read_bytes() for out in (made[0], tmp_path / "again", tmp_path / "other"))
        assert one == again and (one != other or name.endswith("json"))
    assert sorted(os.listdir(tmp_path)) == ["again", "other"]


def test_torchvisions_cifar10(raw, tmp_path, monkeypatch):
    """As cifar10:FOLDER, and where links cannot be made."""
    write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(os, "symlink", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    make(raw, tmp_path / "out", "--cifar", f"cifar10:{tmp_path}")
    assert sorted(os.listdir(tmp_path / "out/root/cifar10")) == sorted(os.listdir(tmp_path / "out/pool")) == TEN
    assert len(anchor.open_pool(str(tmp_path / "out/pool.tsv"))) == 10
    assert (tmp_path / "out/root/val/dog").is_dir() and originals(tmp_path / "out/root/val") < originals(tmp_path)


def test_losses_targets_are_spread():
    """Of four pairs, two alike: their targets are a half each, those of the others one."""
    S, target = torch.randn(4, 4).double(), torch.eye(4).double()
    target[:2, :2] = 0.5
    wanted = -(target * (S.log_softmax(1) + S.log_softmax(0))).sum() / 8
    assert pretrain.spread_loss(S, torch.tensor([5, 5, 1, 2])).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_augmentation():
    """Crops of the image itself or of its mirror image, as it is or grey."""
    x = torch.randint(0, 256, (200, 3, 72, 72), dtype=torch.uint8)
    flipped = grey = 0
    for image, crop in zip(x, pretrain.augment(x, torch.Generator().manual_seed(0))):
        if torch.equal(crop[0], crop[1]):
            grey += 1
            image = pretrain.VF.rgb_to_grayscale(image, 3)
        found = [torch.equal(crop, view[:, i:i + 64, j:j + 64]) for view in (image, image.flip(2)) for i in range(9)
                 for j in range(9)]
        assert sum(found) == 1
        flipped += found.index(True) >= 81
    assert 75 <= flipped <= 125 and 40 <= grey <= 80


@pytest.mark.parametrize("flags, words", [
    (["--pacs", "{raw}/CIFAR"], "CIFAR/photo is not a folder"),
    (["--cifar", "{raw}/PACS"], "PACS/train is not a folder"),
    (["--out", "{raw}"], "is there already"),
    (["--steps", "0"], "--steps must be at least 1"),
])
def test_mistakes_are_one_line(raw, tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as e:
        make(raw, tmp_path / "out", *(flag.format(raw=raw) for flag in flags))
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1 and words in error and not os.listdir(tmp_path)
