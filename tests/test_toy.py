# SPDX-License-Identifier: MIT
"""The toy keeps its promises, so that what is measured on it means what README says."""
from pathlib import Path

import open_clip
import pytest

import anchor
import calft
import carft
import common
import evaluate
import toy

@pytest.fixture(scope="module")
def path():
    return Path(toy.build())

def test_layout(path):
    """36 classes to train on, five styles as shifts, twelve unseen classes, captions and a pool."""
    root, pool = path / "root", path / "pool"
    assert len(toy.SEEN) == 36 and len(toy.UNSEEN) == 12 and not set(toy.SEEN) & set(toy.UNSEEN)
    assert set(" ".join(toy.SEEN).split()) == {*toy.SHAPES, *toy.PATTERNS}
    for name, (_, classes, count, _) in toy.SETS.items():
        found = {c.name.replace("_", " "): len(list(c.iterdir())) for c in (root / name).iterdir()}
        assert found == dict.fromkeys(classes, count)
    lines = [line.split("\t") for line in (root / "captions.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 36 * 100
    for file, caption in lines[::97]:
        assert (root / file).is_file() and file.split("/")[1].replace("_", " ") in caption
        assert any(c in caption for c in toy.COLOURS) and any(s in caption for s in toy.SIZES)
    pairs = [line.split("\t") for line in (pool / "pool.tsv").read_text().splitlines()[1:]]
    assert len(pairs) == toy.POOL and all((pool / file).is_file() for file, _ in pairs[::97])

def test_every_template_has_a_style():
    """A template without a style would never be said of an image in pretraining."""
    styles = toy.style_templates()
    assert sum(map(len, styles.values())) == 80 and all(styles[s] for s in toy.STYLES)

def test_the_clip_is_small(path):
    """It is in the repository, so 5 MB are the most."""
    model = open_clip.create_model(f"local-dir:{path}/clip")
    size = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()
    assert size < 5e6 and Path(toy.WEIGHTS).stat().st_size <= 5e6

def test_the_same_bytes_each_time(path, tmp_path, monkeypatch):
    """Numbers on the toy can be compared only where the toy is the same."""
    def content(folder):
        return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    monkeypatch.setattr(toy, "where", lambda: str(tmp_path / "again"))
    assert content(Path(toy.build())) == content(path)

def test_zero_shot_means_something_everywhere(path, tmp_path):
    """The pretrained CLIP knows all styles and all classes, and val leaves something to gain."""
    evaluate.main(["--out", str(tmp_path)])
    scores, = common.read_json(tmp_path / "results.json").values()
    top1 = {name: s["top1"] for name, s in scores["sets"].items()}
    assert 0.35 <= top1["val"] <= 0.80 and top1["unseen"] >= 0.40
    assert len(top1) == 7 and all(top1[style] >= 0.25 for style in toy.STYLES[1:])

def test_plain_fine_tuning_gains_on_val_and_loses_on_shifts(path, tmp_path):
    """FLYP has something to win and to lose, after one epoch of its five: what the toy is for."""
    flags = "--oc 0 --sd 0 --cross-fnorm 0 --epochs 1 --eval-every 0 --out".split()
    calft.main([*flags, str(tmp_path)])
    after = common.read_json(tmp_path / "results.json")
    before = after["zero_shot"]
    assert after["sets"]["val"]["top1"] >= before["sets"]["val"]["top1"] + 0.08
    assert after["shift_mean"]["top1"] <= before["shift_mean"]["top1"] - 0.05

@pytest.mark.parametrize("script", [carft, anchor])
def test_scripts_run_on_it_by_default(path, tmp_path, capsys, script):
    """A stranger's first command, without flags, ends with the table."""
    script.main(["--max-steps", "2", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    assert all(word in table for word in ("zero-shot", "fine-tuned", "unseen *"))
