# SPDX-License-Identifier: MIT
"""Promises tested by breaking things: kills, a full disk, bad images, numbers and flags."""
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import anchor
import calft
import carft
import common
import evaluate
from conftest import (REPO, argv, assert_processes_are_one, assert_same_run, environment, log, run,
                      weights, write_images)

SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor}

def popen(command):
    """Start a command in a process group of its own."""
    return subprocess.Popen(command, cwd=REPO, env=environment(), text=True, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

def start(name, arguments, patch=""):
    """Start code `patch` and then a script's main."""
    code = f"import common, os, signal, sys, torch, {name}\n{patch}\n{name}.main(sys.argv[1:])"
    return popen([sys.executable, "-c", code, *arguments])

def end(process, code):
    """What a process says on stderr until it ends, with this exit code."""
    error = process.communicate(timeout=120)[1]
    assert process.returncode == code, error
    return error

def kill(process, out, lines, number):
    """Send a signal to a process group as soon as log.jsonl has so many lines."""
    path = Path(out, "log.jsonl")
    while process.poll() is None and not (path.is_file() and path.read_text().count("\n") >= lines):
        time.sleep(0.005)
    os.killpg(process.pid, number)

def fails(main, arguments, *words):
    """main ends the program with one line that has all the words."""
    with pytest.raises(SystemExit, match=r"^error: .*\Z") as e:
        main(arguments)
    assert all(word in e.value.code for word in words), e.value.code

def last_step(out):
    return torch.load(f"{out}/last.pt", weights_only=True)["step"]

def content(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}

IN_THE_THIRD_SAVE = """
save, kills = torch.save, iter([False, False, True])
def cut(state, f):
    if next(kills):
        os.write(f.fileno(), b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, f)
torch.save = cut
"""

IN_THE_FIRST_EPOCHS_SCORING = """
evaluate, kills = common.evaluate, iter([None, lambda *_: os.kill(os.getpid(), signal.SIGKILL)])
common.evaluate = lambda *a: (next(kills) or evaluate)(*a)
"""

@pytest.fixture(scope="module", autouse=True)
def failing(tiny_root, clip, tmp_path_factory):
    """A process with an error, which may take two minutes to end: it does so beside other tests."""
    arguments = argv(tiny_root, clip(), tmp_path_factory.mktemp("failing"), "--workers", "2")
    return start("calft", arguments, patch="calft.orthogonality = lambda W: 1 / 0")

@pytest.mark.parametrize("name", ["calft", "carft", "anchor"])
def test_killed_at_any_moment(tiny_root, clip, tmp_path, captions, pool, name):
    """The same command again gives the bytes of the run that was not killed. A SIGTERM to the group
    reaches loaders too: they live on, so that the run saves at the end of its step and leaves."""
    flags = {"calft": ["--ema-every", "3", "--accum", "2", "--precision", "fp16"], "carft": [],
             "anchor": ["--captions", captions, "--pool", pool]}[name]
    out, whole = tmp_path / "killed", tmp_path / "whole"
    run(SCRIPTS[name], tiny_root, clip(), whole, *flags, steps=24)
    arguments = argv(tiny_root, clip(), out, *flags, "--save-every", "2", steps=24)
    cut = (IN_THE_FIRST_EPOCHS_SCORING, 5) if name == "carft" else (IN_THE_THIRD_SAVE, 4)
    end(start(name, arguments, patch=cut[0]), -signal.SIGKILL)
    assert last_step(out) == cut[1]
    if name != "anchor":
        process = start(name, [*arguments, "--workers", "1"])
        number, code = (signal.SIGKILL, -9) if name == "calft" else (signal.SIGTERM, 1)
        kill(process, out, random.randint(8, 10), number)   # seven lines are there
        error = end(process, code)
        assert 6 <= last_step(out) < 24 and "Traceback" not in error
        assert ("stopped by SIGTERM after step" in error) == (name == "carft")
    SCRIPTS[name].main(arguments)
    assert_same_run(whole, out, *["teacher"] * (name == "calft"))
    for head in out.glob("head.safetensors"):               # CAR-FT's
        assert head.read_bytes() == (whole / head.name).read_bytes()

def test_two_processes(tiny_root, clip, tmp_path):
    """Gradients, log and table are those of one process; SIGTERM and a resume change nothing."""
    out, flags = tmp_path / "out", ["--ema-every", "2", "--accum", "2"]
    command = assert_processes_are_one(calft, tiny_root, clip(), tmp_path, *flags, steps=20)
    process = popen([*command, "--out", out])
    kill(process, out, 3, signal.SIGTERM)
    assert "stopped by SIGTERM after step" in end(process, 1)
    assert 0 < last_step(out) < 20 and len(log(out)) == last_step(out)
    end(popen([*command, "--out", out]), 0)
    assert_same_run(tmp_path / "two", out, "teacher")

def test_a_full_disk_keeps_the_previous_checkpoint(tiny_root, clip, tmp_path, monkeypatch):
    """The second save finds no room: the first stays whole, and the run goes on from there."""
    save, (soft, hard) = common.Run.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(self, step, parts):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000 if step == 4 else soft, hard))
        try:
            save(self, step, parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(common.Run, "save", full)
    arguments = argv(tiny_root, clip(), tmp_path, "--save-every", "2", steps=6)
    fails(calft.main, arguments, "last.pt cannot be written", "kept")
    monkeypatch.undo()
    assert last_step(tmp_path) == 2
    calft.main(arguments)
    assert [line["step"] for line in log(tmp_path)] == list(range(6))

class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def test_a_crafted_file_executes_nothing(tiny_root, clip, tmp_path, monkeypatch):
    """Neither as a checkpoint nor as --pretrained: such files are passed on."""
    monkeypatch.chdir(tmp_path)
    run(calft, tiny_root, clip(), "out", steps=2)
    os.remove("out/results.json")
    torch.save({"step": Attack()}, "out/last.pt")
    for arguments in (argv(tiny_root, clip(), "out", steps=2),
                      argv(tiny_root, "ViT-S-32-alt", "o", "--pretrained", "out/last.pt")):
        with pytest.raises((SystemExit, pickle.UnpicklingError)):
            calft.main(arguments)
    assert os.listdir() == ["out"]

def test_nothing_of_another_run_is_overwritten(tiny_root, clip, tmp_path, monkeypatch, capsys):
    """Flags that alter a run, images and texts are refused; other flags are not, and the finished
    run prints its table again, scores nothing and writes nothing."""
    out, root = tmp_path / "out", tmp_path / "root"
    shutil.copytree(tiny_root, root)
    run(calft, root, clip(), out)
    before, arguments = content(out), argv(root, clip(), out)
    for flag, value in (("--lr", "0.5"), ("--seed", "3"), ("--oc", "0.9"), ("--max-steps", "5")):
        fails(calft.main, [*arguments, flag, value], f" {flag[2:]} ", str(out), "--overwrite")
    fails(carft.main, arguments, "CaRot", "--overwrite")
    for file, text in (("classnames.txt", "ant\tpismire\n"), ("few/bee/more.png", ""),
                       ("templates.txt", "one {}.\n")):
        (root / file).write_text(text)
        fails(calft.main, arguments, "--overwrite")
        os.remove(root / file)
    shutil.copy(f"{tiny_root}/templates.txt", root)
    monkeypatch.delattr(common, "image_features")
    monkeypatch.delattr(common, "export")
    calft.main([*arguments, *"--workers 1 --log-every 2 --save-every 9 --accum 2".split()])
    assert capsys.readouterr().out.count("fine-tuned") == 2
    assert content(out) == before
    os.remove(out / "args.json")
    fails(calft.main, arguments, "another run: ", "--overwrite")

def test_overwrite_leaves_nothing_of_the_old(tiny_root, clip, tmp_path, monkeypatch):
    """Else CAR-FT's head is used with CaRot's model, or a cut run shows another's result."""
    run(carft, tiny_root, clip(), tmp_path, steps=2)
    with monkeypatch.context() as m, pytest.raises(AttributeError):
        m.delattr(common.shutil, "rmtree")                  # cut while it removes
        run(calft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    fails(calft.main, argv(tiny_root, clip(), tmp_path, steps=2), "CAR-FT", "--overwrite")
    (tmp_path / "features.safetensors").write_bytes(b"of another pool")
    run(calft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    assert (tmp_path / "teacher").exists() and not (tmp_path / "head.safetensors").exists()
    monkeypatch.delattr(common.Run, "restore")
    with pytest.raises(AttributeError):
        run(carft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    assert sorted(os.listdir(tmp_path)) == ["args.json", "results.json"]
    assert "sets" not in common.read_json(tmp_path / "results.json")

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", [
    None, b"", b"text", b"P5 40 30 255\n", b"P5 60000 60000 255\n", b"P5 10000 10000 255\n",
    b"P5 30000 1 255\n"])
def test_images_that_cannot_be_read(tmp_path, monkeypatch, data):
    """Black, without a crash; what is too large by its header, before it takes the memory."""
    path, decoded = tmp_path / "two\nlines.jpg", []
    if data is not None:
        path.write_bytes(data)
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda *a: decoded.append(a) or convert(*a))
    x, readable = common.read_image(str(path))
    assert not readable and not x.any() and x.shape == (3, 8, 8)
    assert bool(decoded) == (data == b"P5 40 30 255\n")     # which is cut off: no pixels

@pytest.fixture
def wide_root(tmp_path):
    """A ROOT with 120 training images, one of which cannot be read."""
    write_images(tmp_path / "wide" / "train", ["ant", "bee"], 60, 1)
    write_images(tmp_path / "wide" / "val", ["ant", "bee"], 3, 2)
    (tmp_path / "wide" / "train" / "bee" / "17.png").write_bytes(b"broken")
    return tmp_path / "wide"

def test_the_next_image_stands_in(wide_root, clip, tmp_path, capsys):
    """It is named once, and the run is the same with any number of loaders; over 1 % end it."""
    for out, workers in (("a", "0"), ("b", "2")):
        run(calft, wide_root, clip(), tmp_path / out, "--workers", workers, steps=40)
        assert capsys.readouterr().err.count("bee/17.png") == 1
    assert_same_run(tmp_path / "a", tmp_path / "b")
    files, labels = common.flatten(common.scan(f"{wide_root}/train"), ["ant", "bee"])
    train = common.ImageSet("train", [], [], [], None, files, labels)
    data, stood_in = common.TrainImages(train, torch.nn.Identity(), 3), []
    for place in range(360):
        crop, label, row, _, failed = data[place]
        assert label == labels[row] and torch.equal(crop, common.read_image(files[row])[0])
        stood_in += [failed, row] if failed >= 0 else []
    bad = files.tolist().index(os.fsencode(wide_root / "train" / "bee" / "17.png"))
    assert stood_in == [bad, bad + 1] * 3
    for names in (["ant/1.png"], [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(60)]):
        for name in names:                                  # one more; all, as pointers of git-lfs
            (wide_root / "train" / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
        arguments = argv(wide_root, clip(), tmp_path / "c", steps=40)
        fails(calft.main, arguments, "over 1 %", "/train/")

def test_an_unreadable_image_in_scoring_ends_the_program(wide_root, clip, tmp_path):
    """By name, also with loaders."""
    (wide_root / "val" / "bee" / "1.png").write_bytes(b"broken")
    arguments = ["--data", str(wide_root), "--model", clip(), "--workers", "2", "--out", "o"]
    fails(evaluate.main, arguments, f"error: {wide_root}/val/bee/1.png cannot be read")

def test_a_loss_that_is_not_finite(tiny_root, clip, tmp_path, monkeypatch):
    """It ends the run at the next logged step; last.pt stays finite."""
    orthogonality, factors = calft.orthogonality, iter([1, 1, 1, 1, 1, float("nan"), 1, 1, 1, 1])
    monkeypatch.setattr(calft, "orthogonality", lambda W: orthogonality(W) * next(factors))
    flags = ["--save-every", "5", "--log-every", "6"]
    fails(calft.main, argv(tiny_root, clip(), tmp_path, *flags, steps=11), "not finite at step 6")
    monkeypatch.undo()
    assert last_step(tmp_path) == 5
    run(calft, tiny_root, clip(), tmp_path, *flags, steps=11)
    assert all(t.isfinite().all() for t in weights(tmp_path).values())

@pytest.mark.parametrize("gradient", [float("inf"), 1e25])
def test_what_is_not_finite_is_not_saved(tiny_root, clip, tmp_path, monkeypatch, gradient):
    """The loss is still finite, only its gradient is not, or what AdamW keeps of its square: the
    weight then stands still for good."""
    average, more = common.average_gradients, iter([0, 0, 0, gradient])
    def broken(parameters):
        parameters = list(parameters)
        average(parameters)
        parameters[0].grad.add_(next(more))
    monkeypatch.setattr(common, "average_gradients", broken)
    fails(calft.main, argv(tiny_root, clip(), tmp_path, "--save-every", "2"), "finite", "step 3")
    assert last_step(tmp_path) == 2

def test_an_exception_ends_a_process_with_loaders(failing):
    """Within two minutes: it must not wait for loaders that wait for it."""
    assert "ZeroDivisionError" in end(failing, 1)

TEXTS = {"BADNAMES": ("classnames.txt", "ant the ant\n"),
         "BADTEMPLATES": ("templates.txt", "a photo\n"), "ONETEMPLATE": ("templates.txt", "a {}\n")}
MISTAKES = [                                                # flags, and words of the message
    ("calft --data /nowhere", "/nowhere"),
    ("calft --data TINY/train", "train/train"),
    ("calft --data BADNAMES", "classnames.txt", "folder<TAB>name"),
    ("calft --data BADTEMPLATES", "templates.txt", "{}"),
    ("calft --train train/ant", "train/ant", "two classes"),
    ("calft --val other", "other", "fox"),
    ("calft --eval /nowhere", "/nowhere"),
    ("calft --val-frac 1.5", "--val-frac"),
    ("calft --model ViT-B/16", "ViT-B/16", "ViT-B-16-quickgelu,"),
    ("calft --model TINY", "local-dir:"),
    ("calft --model local-dir:/nowhere", "/nowhere"),
    ("calft --model ViT-B-16 --pretrained openai", "add or drop -quickgelu"),
    ("calft --model ViT-B-16 --pretrained nonsense", "nonsense"),
    ("calft --batch-size 1000", "--batch-size", "40"),
    ("calft --accum 3", "--accum"),
    ("calft --model RESNET --grad-checkpointing", "--grad-checkpointing; give --accum"),
    ("calft --epochs 0.5", "--epochs"),
    ("calft --lr nan", "--lr"),
    ("calft --seed 99999999999999999999", "--seed"),
    ("calft --sd", "--sd"),
    ("calft --learning-rate 1", "--learning-rate"),
    ("calft --out TINY/templates.txt", "templates.txt"),
    ("calft --out /proc/nothing", "/proc/nothing"),
    ("carft --data ONETEMPLATE", "templates.txt", "--lam 0"),
    ("anchor", "--captions", "--pool")]

@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case[0])
def test_mistakes(case, tiny_root, clip, tmp_path):
    """One line that names the culprit, and nothing is written. TINY stands for a ROOT, the names in
    TEXTS for one with such a file, RESNET for a model."""
    script, *given = case[0].replace("TINY", tiny_root).replace("RESNET", clip("resnet")).split()
    for name in set(given) & set(TEXTS):
        shutil.copytree(tiny_root, tmp_path / name)
        (tmp_path / name / TEXTS[name][0]).write_text(TEXTS[name][1])
    given = [str(tmp_path / word) if word in TEXTS else word for word in given]
    before = content(tiny_root), content(tmp_path)
    fails(SCRIPTS[script].main, argv(tiny_root, clip(), tmp_path / "out", *given), *case[1:])
    assert (content(tiny_root), content(tmp_path)) == before
