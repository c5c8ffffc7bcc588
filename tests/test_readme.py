# SPDX-License-Identifier: MIT
"""What the README says is run: its commands on small stand-ins, its Python, and its toy's table."""
import io
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as parse_torchrun

import anchor
import calft
import captions
import carft
import common
import evaluate
import folders
from conftest import REPO, write_images

TEXT = Path(REPO, "README.md").read_text()
SCRIPTS = {"calft.py": calft, "carft.py": carft, "anchor.py": anchor, "evaluate.py": evaluate}
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
OURS = re.compile("(python|torchrun).* (calft|carft|anchor|evaluate).py")
COMMANDS = [line for line in LINES if OURS.match(line)]
TOOLS = [line for line in LINES if line.startswith("python tests/")]
POOL, = [line for line in TOOLS if "folders.py pool" in line]
CAPTIONS, = [line for line in TOOLS if "captions.py" in line]
SMALL = "--max-steps 1 --batch-size 8 --workers 0 --warmup 0".split()

def stand_in(line):
    """Return the words of a command, with folders of the page's that do not begin with / ."""
    line = line.replace("/imagenet", "ROOT").replace("/cc3m/{00000..00331}", "{00000..00001}")
    return shlex.split(line)

def write_shard(path, images):
    """Write a tar as img2dataset does: each image beside a text of the same name."""
    with tarfile.open(path, "w") as tar:
        for image in images:
            text = f"text of {image.parent.name}".encode()
            for name, data in ((image.name, image.read_bytes()), (f"{image.stem}.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

@pytest.fixture(scope="module")
def place(tiny_root, clip, tmp_path_factory):
    """Go to a folder with all that the commands name: ROOT, PACS, captions, a pool that the page's
    own command made, and finished runs."""
    top = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_root, top / "ROOT")
    for seed, domain in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        write_images(top / "PACS" / domain, ["ant", "bee"], 8, seed)
    write_images(top / "SETS" / "cifar100" / "test", ["fox", "hen"], 2)
    names = [str(path.relative_to(top / "ROOT")) for path in (top / "ROOT/train").rglob("*.png")]
    (top / "captions.tsv").write_text("\n".join(f"{name}\ta picture of it" for name in names))
    for i, c in enumerate(("ant", "bee")):
        write_shard(top / f"{i:05d}.tar", sorted((top / "PACS/photo" / c).iterdir()))
    here = os.getcwd()
    os.chdir(top)
    folders.main(stand_in(POOL)[2:])
    runs = {"calft": calft, "flyp": calft, "carft": carft, "seed0": calft, "seed1": calft,
            "seed2": calft}
    for out, script in runs.items():
        script.main(["--data", "ROOT", "--model", clip(), "--out", f"out/{out}", *SMALL])
    shutil.copytree(top / "PACS/photo/ant", top / "PICTURES")
    shutil.copy(top / "PACS/photo/ant/0.png", top / "picture.jpg")
    yield top
    os.chdir(here)

@pytest.mark.parametrize("line", COMMANDS)
def test_commands(place, clip, line, tmp_path, capsys):
    """A command that fails as it stands on the page is the first thing a stranger meets."""
    words = stand_in(line)
    if words[0] == "torchrun":
        words = ["python", *words_of_script(words)]
    script = SCRIPTS[words[1]]
    flags = [word for word in words[2:] if word not in ("--compile", ">", "classes.csv")]
    flags = [clip() if word == "ViT-B-16-quickgelu" else word for word in flags]
    if script is not evaluate:
        if "--data" not in flags:
            flags += ["--data", "ROOT"]
        script.main([*flags, "--model", clip(), *SMALL, "--out", str(tmp_path)])
        assert "sets" in common.read_json(tmp_path / "results.json")
    elif "--mean" in flags:
        evaluate.main(flags)
    elif "--predict" in flags:
        capsys.readouterr()
        evaluate.main([*flags, "--workers", "0"])
        assert capsys.readouterr().out.count("\n") == 9     # a header, and eight pictures
    else:
        evaluate.main([*flags, "--workers", "0", "--out", str(tmp_path)])
        assert common.read_json(tmp_path / "results.json")

def words_of_script(words):
    """Return the script and its flags out of the words of a torchrun command for one machine."""
    args = parse_torchrun(words[1:])
    assert args.standalone                                  # otherwise two runs share a port
    assert int(args.nproc_per_node) > 1
    return [args.training_script, *args.training_script_args]

def test_tools(place, tmp_path, monkeypatch):
    """The commands that prepare data name sets and folders that folders.py takes."""
    called = []
    for name in ("torchvision_set", "objectnet", "iwildcam", "ucf101"):
        monkeypatch.setattr(folders, name, lambda *given: called.append(given))
    for line in TOOLS:
        script, *flags = stand_in(line)[1:]
        assert script in ("tests/folders.py", "tests/captions.py")
        if script == "tests/folders.py" and line != POOL:
            folders.main(flags)
    assert len(called) == len(TOOLS) - 2 > 0
    pairs, texts = anchor.read_pool("POOL/pool.tsv")        # of the page's command, by `place`
    assert len(pairs) == 16 and all(map(os.path.isfile, pairs.paths))
    assert texts == ["text of ant"] * 8 + ["text of bee"] * 8

def test_captions(place, tmp_path, monkeypatch):
    """The captions' command reads its images and comes as far as its model, which is large."""
    def load_captioner(name, device, dtype):
        raise SystemExit(f"the model is {name}")
    monkeypatch.setattr(captions, "load_captioner", load_captioner)
    flags = stand_in(CAPTIONS)[2:]
    with pytest.raises(SystemExit, match="^the model is Salesforce/blip2-opt-2.7b$"):
        captions.main([*flags, "--out", str(tmp_path / "captions.tsv")])

def test_all_commands_are_known():
    """A line that no test above runs is one that installs or tests."""
    install, test = [line for line in LINES if line not in COMMANDS + TOOLS]
    assert install == "pip install -r requirements.txt && python calft.py"
    assert test == "pip install -r requirements.txt -r tests/requirements.txt && pytest -q tests"
    assert len(COMMANDS) >= 12

def test_python(place):
    """What a user pastes into a project loads the model that a run exported."""
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        exec(block, {})

def test_the_toys_table(tmp_path, monkeypatch, capsys):
    """The commands print the table of the README to every digit (float32 on an x86 CPU)."""
    monkeypatch.chdir(tmp_path)
    tune, score = [line for line in LINES if line.endswith(("out/flyp", "out/flyp out/calft"))]
    calft.main(["--eval-every", "0"])
    calft.main([*shlex.split(tune)[2:], "--eval-every", "0"])
    evaluate.main(shlex.split(score)[2:])
    shown = re.search(r"```\n( +zero-shot.*?)```", TEXT, re.DOTALL)[1]
    assert shown in capsys.readouterr().out

@pytest.mark.parametrize("script", [carft, anchor, evaluate])
def test_scripts_run_without_flags(tmp_path, capsys, script):
    """A stranger's first command ends with the table, of the toy."""
    flags = ["--out", str(tmp_path)]
    if script is not evaluate:
        flags += ["--max-steps", "2"]
    script.main(flags)
    out = capsys.readouterr().out
    assert re.search(r"\nset +images +head +top-1 +± se +ECE", out)
    assert re.search(r"\nunseen +480 +zero-shot ", out)

def test_the_page_is_short():
    """A page that nobody reads to its end hides what it says there."""
    lines = TEXT.splitlines()
    assert len(lines) <= 260
    free = ("|", "![", "python")                            # tables, pictures and commands
    wide = [line for line in lines if len(line) > 100 and not line.startswith(free)]
    assert not wide
    assert not re.findall(r"^[A-Z]+$", TEXT, re.MULTILINE)  # a table that is still to be filled in

def test_links_lead_somewhere():
    """A link to a file leads to a file, and one to a heading to a heading."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", TEXT)
    assert links
    for file, heading in links:
        target = Path(REPO, file or "README.md")
        assert target.exists(), file
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            plain = [re.sub(r"[^\w -]", "", text).lower() for text in headings]
            assert heading in [text.replace(" ", "-") for text in plain], heading
