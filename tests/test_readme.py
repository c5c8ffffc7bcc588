# SPDX-License-Identifier: MIT
"""What the README says is run: its commands on small stand-ins, its Python, and its toy's table."""
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import anchor
import calft
import carft
import common
import evaluate
import folders
from conftest import REPO, write_images
from test_anchor import png, write_shard

TEXT = Path(REPO, "README.md").read_text()
SCRIPTS = {"calft.py": calft, "carft.py": carft, "anchor.py": anchor, "evaluate.py": evaluate}
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
OURS = re.compile("(python|torchrun).* (calft|carft|anchor|evaluate).py")
COMMANDS = [line for line in LINES if OURS.match(line)]
SMALL = "--max-steps 1 --batch-size 8 --workers 0 --warmup 0".split()

@pytest.fixture(scope="module")
def place(tiny_root, clip, tmp_path_factory):
    """A folder with all that the commands name: ROOT, PACS, captions, shards, and finished runs."""
    top = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_root, top / "ROOT")
    for seed, domain in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        write_images(top / "PACS" / domain, ["ant", "bee"], 8, seed)
    write_images(top / "SETS" / "cifar100" / "test", ["fox", "hen"], 2)
    names = [str(path.relative_to(top / "ROOT")) for path in (top / "ROOT/train").rglob("*.png")]
    (top / "captions.tsv").write_text("\n".join(f"{name}\ta picture of it" for name in names))
    for shard in range(2):
        members = [(f"{i}.{kind}", data) for i in range(4)
                   for kind, data in (("png", png(10 * shard + i)), ("txt", b"some text"))]
        write_shard(top / f"{shard:05d}.tar", members)
    here = os.getcwd()
    os.chdir(top)
    for script, outs in ((calft, ["calft", "seed0", "seed1", "seed2"]), (carft, ["carft"])):
        for out in outs:
            script.main(["--data", "ROOT", "--model", clip(), "--out", f"out/{out}", *SMALL])
    yield top
    os.chdir(here)

@pytest.mark.parametrize("line", COMMANDS)
def test_commands(place, clip, line, tmp_path):
    """A command that fails as it stands on the page is the first thing a stranger meets."""
    line = line.replace("/imagenet", "ROOT").replace("/cc3m/{00000..00331}", "{00000..00001}")
    words = shlex.split(line)
    while words[0] not in SCRIPTS:                              # python, or torchrun and its flags
        words.pop(0)
    script, flags = SCRIPTS[words[0]], [word for word in words[1:] if word != "--compile"]
    flags = [clip() if word == "ViT-B-16-quickgelu" else word for word in flags]
    if script is evaluate:
        flags += [] if "--mean" in flags else ["--workers", "0", "--out", str(tmp_path)]
    else:
        if "--data" not in flags:
            flags += ["--data", "ROOT"]
        flags += ["--model", clip(), *SMALL, "--out", str(tmp_path)]
    script.main(flags)
    if script is not evaluate:
        assert "sets" in common.read_json(tmp_path / "results.json")

def test_all_commands_are_known():
    """The others are those that install, test and prepare data."""
    install, test, *others = [line for line in LINES if line not in COMMANDS]
    assert install == "pip install -r requirements.txt && python calft.py"
    assert test.endswith("-r tests/requirements.txt && pytest -q tests") and len(COMMANDS) >= 12
    for line in others:
        script, name = shlex.split(line)[1:3]
        assert script == "tests/folders.py" and name in [*folders.SETS, "objectnet"]

def test_python(place):
    """What a user pastes into a project loads the model that a run exported."""
    for block in [block for kind, block in BLOCKS if kind == "python"]:
        exec(block, {})

def test_the_toys_table(tmp_path, capsys):
    """`python calft.py` prints the table of the README to every digit (float32 on an x86 CPU)."""
    calft.main(["--out", str(tmp_path), "--eval-every", "0"])
    shown = re.search(r"```\n( +zero-shot.*?)```", TEXT, re.DOTALL)[1]
    ours = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in shown.splitlines():
        assert line.split() in ours, line

@pytest.mark.parametrize("script", [carft, anchor, evaluate])
def test_scripts_run_without_flags(tmp_path, capsys, script):
    """A stranger's first command ends with the table, of the toy."""
    steps = [] if script is evaluate else ["--max-steps", "2"]
    script.main([*steps, "--out", str(tmp_path)])
    assert "unseen *" in capsys.readouterr().out

def test_the_page_is_short():
    """220 lines, and each of its links to a file leads somewhere."""
    assert len(TEXT.splitlines()) <= 220
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert Path(REPO, link).exists(), link
