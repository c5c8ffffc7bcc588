# SPDX-License-Identifier: MIT
"""What pretrain.py makes of a tiny PACS and CIFAR-10: nothing leaks, and everything loads."""
import os

import anchor
import calft
import pretrain
from conftest import run, write_images

DRAWN = ["art_painting", "cartoon", "sketch"]

def originals(folder):
    """Return the files to which the links below a folder lead."""
    found = set()
    for top, _, files in os.walk(folder):
        found.update(os.path.realpath(os.path.join(top, file)) for file in files)
    return found

def test_nothing_leaks(tmp_path, monkeypatch):
    """What a table is about must not have been pretrained on, and calft.py takes what is made."""
    pacs = tmp_path / "PACS"
    cifar = tmp_path / "CIFAR"
    out = tmp_path / "OUT"
    for seed, domain in enumerate(["photo", *DRAWN]):
        write_images(pacs / domain, ["dog", "guitar", "horse"], 6, seed)
    write_images(cifar / "train", ["dog", "ship"], 7, 8)
    write_images(cifar / "test", ["dog", "ship"], 2, 9)
    in_memory = pretrain.in_memory
    seen = set()
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
    assert parts["cifar10"] == originals(cifar / "test")
    assert len(parts["val"]) == 3 * 2
    for d in DRAWN:                                         # a fifth of each class, rounded up
        assert parts[d] < originals(pacs / d) and len(parts[d]) == 3 * 2
    drawn = set().union(*(originals(pacs / d) - parts[d] for d in DRAWN))
    assert seen == drawn | (originals(cifar / "train") - parts["pool"])
    images, texts = anchor.read_pool(str(out / "pool.tsv"))
    files = [os.fsdecode(path) for path in images.paths]
    assert {os.path.realpath(file) for file in files} == parts["pool"]
    assert len(files) == 2 * 2
    assert all(file.split("/")[-2] in text for file, text in zip(files, texts))
    results = run(calft, out / "root", f"local-dir:{out}/clip", tmp_path / "run", steps=1)
    assert set(results["sets"]) == {"val", *DRAWN, "cifar10"}
