# SPDX-License-Identifier: MIT
"""What pretrain.py makes of a tiny PACS and CIFAR-10: nothing leaks, and everything loads."""
import os

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import anchor
import calft
import pretrain
from conftest import run, write_images

DRAWN = ["art_painting", "cartoon", "sketch"]

@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """PACS with 6 images of 3 classes in each domain, CIFAR-10 with 7 to train on, 2 to test on."""
    folder = tmp_path_factory.mktemp("raw")
    for seed, domain in enumerate(["photo", *DRAWN]):
        write_images(folder / "PACS" / domain, ["dog", "guitar", "horse"], 6, seed)
    write_images(folder / "CIFAR" / "train", ["dog", "ship"], 7, 8)
    write_images(folder / "CIFAR" / "test", ["dog", "ship"], 2, 9)
    return folder

def make(raw, out, *flags):
    pretrain.main(["--pacs", f"{raw}/PACS", "--cifar", f"{raw}/CIFAR", "--out", str(out),
                   "--steps", "2", "--batch-size", "8", *flags])

@pytest.fixture(scope="module")
def made(raw, tmp_path_factory):
    """OUT, and the files that were pretrained on."""
    out, in_memory, seen = tmp_path_factory.mktemp("made") / "out", pretrain.in_memory, []
    def spy(images):
        seen.extend(os.path.realpath(os.fsdecode(path)) for path in images.paths)
        return in_memory(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "in_memory", spy)
        make(raw, out)
    return out, set(seen)

def originals(folder):
    """Where the links below a folder lead."""
    return {os.path.realpath(os.path.join(top, f)) for top, _, files in os.walk(folder)
            for f in files}

def test_nothing_leaks(raw, made):
    """What a table is about must not have been pretrained on."""
    out, seen = made
    pacs, cifar = raw / "PACS", raw / "CIFAR"
    parts = {name: originals(out / "root" / name) for name in ("train", "val", *DRAWN, "cifar10")}
    assert sorted(os.listdir(out / "root")) == sorted(parts)
    parts["pool"] = originals(out / "pool")
    whole = set().union(seen, *parts.values())
    assert sum(map(len, parts.values())) + len(seen) == len(whole)                  # all disjoint
    assert parts["train"] | parts["val"] == originals(pacs / "photo")
    assert parts["cifar10"] == originals(cifar / "test") and len(parts["val"]) == 3 * 2
    for d in DRAWN:                                             # a fifth of each class, rounded up
        assert parts[d] < originals(pacs / d) and len(parts[d]) == 3 * 2
    drawn = set().union(*(originals(pacs / d) - parts[d] for d in DRAWN))
    assert seen == drawn | (originals(cifar / "train") - parts["pool"])
    held = {str(pacs / line) for line in (out / "heldout.txt").read_text().splitlines()}
    assert held == parts["val"].union(*(parts[d] for d in DRAWN))
    images, texts = anchor.open_pool(str(out / "pool.tsv"))
    files = [os.fsdecode(path) for path in images.paths]
    assert {os.path.realpath(f) for f in files} == parts["pool"] and len(files) == 2 * 2
    assert all(f.split("/")[-2] in text for f, text in zip(files, texts))

def test_open_clip_and_calft_take_it(made, tmp_path):
    """BatchNorm learnt its statistics, and the table of tokens stayed as it was initialised."""
    out, _ = made
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{out}/clip")
    tensors = load_file(out / "clip" / "open_clip_model.safetensors")
    assert set(tensors) == set(model.state_dict()) and "visual.head.proj.weight" in tensors
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.26e6, rel=1e-3)
    assert tensors["visual.trunk.bn1.num_batches_tracked"] == 2
    torch.manual_seed(0)
    fresh = open_clip.model.CLIP(**pretrain.CONFIG["model_cfg"]).state_dict()
    same = {k for k in fresh if torch.equal(fresh[k], tensors[k])}
    assert "token_embedding.weight" in same and "positional_embedding" not in same
    results = run(calft, out / "root", f"local-dir:{out}/clip", tmp_path, steps=1)
    assert set(results["sets"]) == {"val", *DRAWN, "cifar10"}

@pytest.mark.parametrize("flag, value, words", [
    ("--pacs", "CIFAR", "CIFAR/photo is not a folder"), ("--out", "", "is there already"),
    ("--cifar", "PACS", "PACS/train is not a folder"), ("--steps", "0", "at least 1")])
def test_mistakes_are_one_line(raw, tmp_path, flag, value, words):
    """Nothing is written."""
    value = value if value == "0" else f"{raw}/{value}"
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        make(raw, tmp_path / "out", flag, value)
    assert not os.listdir(tmp_path)
