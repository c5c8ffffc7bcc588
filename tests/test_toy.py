# SPDX-License-Identifier: MIT
"""The toy keeps its promises, so that what is measured on it means what the README says."""
import hashlib
import json
import os
import subprocess
import sys

import open_clip
import pytest

import calft
import evaluate
import toy
from conftest import REPO, environment


@pytest.fixture(scope="module")
def path():
    return toy.build()


def test_layout(path):
    """36 classes to train on, five styles as shifts, twelve unseen classes, captions and a pool beside ROOT."""
    root = os.path.join(path, "root")
    assert len(toy.SEEN) == 36 and len(toy.UNSEEN) == 12 and not set(toy.SEEN) & set(toy.UNSEEN)
    for word in toy.SHAPES + toy.PATTERNS:                      # what is unseen is the combination, not its parts
        assert any(word in c for c in toy.SEEN)
    for folder, (_, classes, count, _) in toy.SETS.items():
        names = sorted(os.listdir(f"{root}/{folder}"))
        assert names == sorted(c.replace(" ", "_") for c in classes)
        assert all(len(os.listdir(f"{root}/{folder}/{c}")) == count for c in names)
    lines = [line.rstrip("\n").split("\t") for line in open(f"{root}/captions.tsv")][1:]
    assert len(lines) == 3600
    for file, caption in lines[::97]:
        name = file.split("/")[1].replace("_", " ")
        assert os.path.isfile(f"{root}/{file}") and name in caption
        assert any(c in caption for c in toy.COLOURS) and any(s in caption for s in toy.SIZES)
    pairs = [line.rstrip("\n").split("\t") for line in open(f"{path}/pool/pool.tsv")][1:]
    assert len(pairs) == toy.POOL and all(os.path.isfile(f"{path}/pool/{file}") for file, _ in pairs[::97])


def test_every_template_has_a_style():
    styles = toy.style_templates()
    assert sum(map(len, styles.values())) == 80 and all(styles[s] for s in toy.STYLES)


def test_the_clip_is_small(path):
    model = open_clip.create_model(f"local-dir:{path}/clip")
    size = sum(p.numel() for name, p in model.named_parameters() if name != "token_embedding.weight")
    assert size < 5e6 and os.path.getsize(toy.WEIGHTS) <= 5e6


def test_the_same_bytes_each_time(path, tmp_path, monkeypatch):
    def digest(folder):
        out = hashlib.sha256()
        for top, dirs, files in os.walk(folder):
            dirs.sort()
            for f in sorted(files):
                out.update(f.encode() + open(os.path.join(top, f), "rb").read())
        return out.hexdigest()
    monkeypatch.setattr(toy, "where", lambda: str(tmp_path / "again"))
    assert digest(toy.build()) == digest(path)


def test_zero_shot_means_something_everywhere(path, tmp_path):
    evaluate.main(["--out", str(tmp_path)])
    scores, = json.load(open(tmp_path / "results.json")).values()
    top1 = {name: s["top1"] for name, s in scores["sets"].items()}
    assert 0.35 <= top1["val"] <= 0.80 and top1["unseen"] >= 0.40
    assert len(top1) == 7 and all(top1[style] >= 0.25 for style in toy.STYLES[1:])


def test_plain_fine_tuning_gains_on_val_and_loses_on_shifts(path, tmp_path):
    """What the toy is for: FLYP has something to win and something to lose, after two epochs of its five already."""
    calft.main(["--oc", "0", "--sd", "0", "--cross-fnorm", "0", "--epochs", "2", "--out", str(tmp_path)])
    tuned = json.load(open(tmp_path / "results.json"))
    before = tuned["zero_shot"]
    assert tuned["sets"]["val"]["top1"] >= before["sets"]["val"]["top1"] + 0.08
    assert tuned["shift_mean"]["top1"] <= before["shift_mean"]["top1"] - 0.05


@pytest.mark.parametrize("script", ["calft", "carft", "anchor"])
def test_scripts_run_on_it_by_default(path, tmp_path, script):
    done = subprocess.run([sys.executable, f"{script}.py", "--max-steps", "2", "--out", str(tmp_path)], cwd=REPO,
                          env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "fine-tuned" in done.stdout and "unseen *" in done.stdout, done.stderr
