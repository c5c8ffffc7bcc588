# SPDX-License-Identifier: MIT
"""What pretrain.py makes of a tiny PACS and CIFAR-10: nothing leaks, and everything loads."""
import os

import anchor
import calft
import pretrain
from conftest import run, write_images

DRAWN = ["art_painting", "cartoon", "sketch"]

def originals(folder):
    """Where the links below a folder lead."""
    return {os.path.realpath(os.path.join(top, f)) for top, _, files in os.walk(folder)
            for f in files}

def test_nothing_leaks(tmp_path, monkeypatch):
    """What a table is about must not have been pretrained on, and calft.py takes what is made."""
    pacs, cifar, out = tmp_path / "PACS", tmp_path / "CIFAR", tmp_path / "OUT"
    for seed, domain in enumerate(["photo", *DRAWN]):
        write_images(pacs / domain, ["dog", "guitar", "horse"], 6, seed)
    write_images(cifar / "train", ["dog", "ship"], 7, 8)
    write_images(cifar / "test", ["dog", "ship"], 2, 9)
    in_memory, seen = pretrain.in_memory, set()
    def spy(images):
        seen.update(os.path.realpath(os.fsdecode(path)) for path in images.paths)
        return in_memory(images)
    monkeypatch.setattr(pretrain, "in_memory", spy)
    pretrain.main(["--pacs", str(pacs), "--cifar", str(cifar), "--out", str(out), "--steps", "2",
                   "--batch-size", "8"])
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
    images, texts = anchor.open_pool(str(out / "pool.tsv"))
    files = [os.fsdecode(path) for path in images.paths]
    assert {os.path.realpath(f) for f in files} == parts["pool"] and len(files) == 2 * 2
    assert all(f.split("/")[-2] in text for f, text in zip(files, texts))
    results = run(calft, out / "root", f"local-dir:{out}/clip", tmp_path / "run", steps=1)
    assert set(results["sets"]) == {"val", *DRAWN, "cifar10"}
