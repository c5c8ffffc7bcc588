# SPDX-License-Identifier: MIT
"""The toy keeps its promises, so that what is measured on it means what README says."""
from pathlib import Path

import pytest

import anchor
import carft
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

@pytest.mark.parametrize("script", [carft, anchor, evaluate])
def test_scripts_run_on_it_by_default(path, tmp_path, capsys, script):
    """A stranger's first command, without flags, ends with the table."""
    steps = [] if script is evaluate else ["--max-steps", "2"]
    script.main([*steps, "--out", str(tmp_path)])
    assert "unseen *" in capsys.readouterr().out
