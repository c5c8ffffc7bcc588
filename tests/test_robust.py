# SPDX-License-Identifier: MIT
"""Promises tested by breaking things: kills, a full disk, bad images, numbers and flags."""
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import anchor
import calft
import carft
import common
import evaluate
from conftest import (REPO, argv, assert_processes_are_one, assert_same_run, content, environment,
                      fails, log, run, weights, write_images)

SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor, "evaluate": evaluate}

def popen(command):
    """Start a command in a process group of its own."""
    return subprocess.Popen(command, cwd=REPO, env=environment(), text=True, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

def start(name, arguments, patch=""):
    """Start code `patch` and then a script's main."""
    code = f"import common, os, signal, sys, torch, {name}\n{patch}\n{name}.main(sys.argv[1:])"
    return popen([sys.executable, "-c", code, *arguments])

def end(process, code, seconds=300):
    """Return what a process says on stderr until it and its loaders end, which must be within these
    seconds and with this exit code."""
    try:
        error = process.communicate(timeout=seconds)[1]     # until nobody holds stderr any more
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, error
    return error

def kill(process, out, lines, number):
    """Send a signal to a process group as soon as log.jsonl has so many lines."""
    path = Path(out, "log.jsonl")
    while process.poll() is None and not (path.is_file() and path.read_text().count("\n") >= lines):
        time.sleep(0.005)
    os.killpg(process.pid, number)

def last_step(out):
    """Return the number of steps after which the last checkpoint was written."""
    return torch.load(f"{out}/last.pt", weights_only=True)["step"]

# ---- kills ---------------------------------------------------------------------------------------
IN_THE_THIRD_SAVE = """
save = torch.save
steps = []
def cut(state, f):
    steps.append(state["step"])
    if len(steps) == 3:
        os.write(f.fileno(), b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, f)
torch.save = cut
"""

IN_THE_SCORING_AFTER_AN_EPOCH = """
evaluate = common.evaluate
calls = []
def cut(*args):
    calls.append(args)
    if len(calls) == 2:                                     # the first is of the untuned model
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*args)
common.evaluate = cut
"""

@pytest.fixture(scope="module", autouse=True)
def failing(tiny_root, clip, tmp_path_factory):
    """Start a process with an error, which may take two minutes to end: beside other tests."""
    arguments = argv(tiny_root, clip(), tmp_path_factory.mktemp("failing"), "--workers", "2")
    return start("calft", arguments, patch="calft.orthogonality = lambda W: 1 / 0")

@pytest.mark.parametrize("name", ["calft", "anchor"])
def test_killed_while_it_saves(tiny_root, clip, tmp_path, captions, pool, name):
    """Cut a checkpoint in two, then start the same command again: it goes on from the one before,
    log included, and ends with the bytes of a run that was left alone."""
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    flags = {"calft": ["--ema-every", "3", "--accum", "2", "--precision", "fp16"],
             "anchor": ["--captions", captions, "--pool", pool]}[name]
    exports = {"calft": ["teacher"], "anchor": []}[name]
    run(SCRIPTS[name], tiny_root, clip(), whole, *flags, steps=12)
    arguments = argv(tiny_root, clip(), out, *flags, "--save-every", "2", steps=12)
    end(start(name, arguments, patch=IN_THE_THIRD_SAVE), -signal.SIGKILL)
    assert last_step(out) == 4
    assert len(log(out)) == 6
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 6, "lo')                          # a kill may cut a line, too
    SCRIPTS[name].main(arguments)
    assert_same_run(whole, out, *exports)

def test_killed_while_it_scores_val_and_while_it_trains(tiny_root, clip, tmp_path):
    """Kill CAR-FT twice: after a save in its scoring of val, and anywhere in a step, with a loader.
    Nothing is lost but the one line of the log that was not written yet."""
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    run(carft, tiny_root, clip(), whole, steps=24)
    arguments = argv(tiny_root, clip(), out, steps=24)
    at_epochs = [*arguments, "--save-every", "5"]
    end(start("carft", at_epochs, patch=IN_THE_SCORING_AFTER_AN_EPOCH), -signal.SIGKILL)
    assert last_step(out) == 5
    between = [*arguments, "--save-every", "7", "--workers", "1"]
    process = popen([sys.executable, "carft.py", *between])
    kill(process, out, random.randint(9, 11), signal.SIGKILL)           # after the save at 7 steps
    assert "Traceback" not in end(process, -signal.SIGKILL)
    assert 7 <= last_step(out) < 24
    assert 0 <= len(log(out)) - last_step(out) <= 7
    carft.main(between)
    of_val = log(whole, epochs=True)
    assert [line["step"] for line in of_val] == [4, 9, 14, 19]
    assert log(out, epochs=True) == of_val[1:]
    text = (whole / "log.jsonl").read_text().splitlines(True)
    (whole / "log.jsonl").write_text("".join(text[:5] + text[6:]))      # without val of step 4
    assert_same_run(whole, out)
    ours, of_whole = (evaluate.read_head(folder / "model")[0] for folder in (out, whole))
    assert torch.equal(ours, of_whole)

def test_ctrl_c(tiny_root, clip, tmp_path):
    """Press Ctrl-C in a run with loaders: all its processes end at once, and stderr has nothing but
    the progress bar. The same command continues, with the bits of a run that was left alone."""
    whole = tmp_path / "whole"
    out = tmp_path / "killed"
    run(calft, tiny_root, clip(), whole, steps=24)
    arguments = argv(tiny_root, clip(), out, "--save-every", "7", "--workers", "2", steps=24)
    process = popen([sys.executable, "calft.py", *arguments])
    kill(process, out, 9, signal.SIGINT)                    # after the save at 7 steps
    error = end(process, -signal.SIGINT, seconds=5)
    assert all(line.startswith("CaRot:") for line in error.splitlines() if line), error
    assert 7 <= last_step(out) < 24
    calft.main(arguments)
    assert_same_run(whole, out, "teacher")

@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_has_its_default_action_in_a_program_alone(monkeypatch, capsys, name):
    """Run each script as a program, and its main() as a notebook does, which catches Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        SCRIPTS[name].main()
    assert signal.getsignal(signal.SIGINT) == before
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(f"{REPO}/{name}.py", run_name="__main__")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)

KEEP_WHAT_A_KILL_WOULD_LEAVE = f"""
import shutil, sys
sys.path.insert(0, {REPO!r})
import calft, common
save = common.Run.save
def keep(self, step, saved):
    save(self, step, saved)
    if step == 7 and common.RANK == 0:
        shutil.copytree(self.path, str(self.path) + "-killed")
common.Run.save = keep
calft.main()
"""

def test_two_processes(tiny_root, clip, tmp_path):
    """Compare gradients, log and table with those of one process. What a kill in the middle leaves
    is continued, with the bits of the two that were left alone."""
    (tmp_path / "keep.py").write_text(KEEP_WHAT_A_KILL_WOULD_LEAVE)
    flags = ["--ema-every", "2", "--accum", "2", "--save-every", "7"]
    command = assert_processes_are_one(
        calft, tiny_root, clip(), tmp_path, *flags, steps=16, program=tmp_path / "keep.py")
    out = tmp_path / "two-killed"
    assert last_step(out) == 7 and not (out / "model").exists()
    end(popen([*command, "--out", out]), 0)
    assert_same_run(tmp_path / "two", out, "teacher")

# ---- the files of a run --------------------------------------------------------------------------
def test_a_full_disk_keeps_the_previous_checkpoint(tiny_root, clip, tmp_path, monkeypatch):
    """Leave no room for the second save: the first stays whole, and the run goes on from there."""
    save = common.Run.save
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    def full(self, step, saved):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, hard))
        try:
            save(self, step, saved)
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
    """Load a malicious pickle as a checkpoint and as --pretrained: such files are passed on."""
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
    """Refuse flags that alter a run, and other images or texts. Other flags are not refused, and
    the finished run prints its table again, scores nothing and writes nothing."""
    out = tmp_path / "out"
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    run(calft, root, clip(), out)
    before = content(out)
    arguments = argv(root, clip(), out)
    for flag, value, old in (("--lr", "0.5", "(lr 0.001)"), ("--seed", "3", "(seed 0)"),
                             ("--oc", "0.9", "(oc 0.2)"), ("--max-steps", "5", "(max-steps 4)")):
        fails(calft.main, [*arguments, flag, value], old, str(out), "--overwrite")
    fails(carft.main, arguments, "CaRot", "--overwrite")
    for file, text in (("classnames.txt", "ant\tpismire\n"), ("train/bee/more.png", ""),
                       ("templates.txt", "one {}.\n")):
        (root / file).write_text(text)
        fails(calft.main, arguments, "(training images and texts ", "--overwrite")
        os.remove(root / file)
    shutil.copy(f"{tiny_root}/templates.txt", root)
    monkeypatch.delattr(common, "image_features")
    monkeypatch.delattr(common, "export")
    free = "--workers 1 --log-every 2 --save-every 9 --eval-every 3 --accum 2 --compile"
    calft.main([*arguments, *free.split()])
    assert capsys.readouterr().out.count("fine-tuned") == 2
    assert content(out) == before

@pytest.mark.parametrize("file", ["results.json", "model/weights.bin", "last.pt"])
def test_a_folder_of_something_else_is_left_alone(tiny_root, clip, tmp_path, file):
    """Give a folder with such a file as --out: only --overwrite may delete what is not ours."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    before = content(tmp_path)
    fails(calft.main, argv(tiny_root, clip(), tmp_path, steps=2), str(tmp_path), "--overwrite")
    assert content(tmp_path) == before

def test_overwrite_leaves_nothing_of_the_old(tiny_root, clip, tmp_path, monkeypatch):
    """Overwrite runs, and cut that short: otherwise CAR-FT's head is used with CaRot's model, or a
    cut run shows another's result."""
    run(carft, tiny_root, clip(), tmp_path, steps=2)
    with monkeypatch.context() as m, pytest.raises(AttributeError):
        m.delattr(common.shutil, "rmtree")                  # cut while it removes
        run(calft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    fails(calft.main, argv(tiny_root, clip(), tmp_path, steps=2), "CAR-FT", "--overwrite")
    (tmp_path / "features.safetensors").write_bytes(b"of another pool")
    run(calft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    assert (tmp_path / "teacher").exists()
    _, about = evaluate.read_head(tmp_path / "model")
    assert not about["is_trained"]                          # it is not CAR-FT's
    monkeypatch.delattr(common.Run, "restore")
    with pytest.raises(AttributeError):
        run(carft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    assert sorted(os.listdir(tmp_path)) == [".lock", "args.json", "results.json"]
    assert "sets" not in common.read_json(tmp_path / "results.json")

# ---- bad images ----------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", [
    None, b"", b"text", b"P5 40 30 255\n", b"P5 60000 60000 255\n", b"P5 10000 10000 255\n",
    b"P5 30000 1 255\n"])
def test_images_that_cannot_be_read(tmp_path, monkeypatch, data):
    """Read them as black, without a crash; what is too large by its header is refused before it
    takes the memory."""
    path = tmp_path / "two\nlines.jpg"
    if data is not None:
        path.write_bytes(data)
    convert = Image.Image.convert
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda *a: decoded.append(a) or convert(*a))
    x, problem = common.read_image(str(path))
    assert problem and not x.any() and x.shape == (3, 8, 8)
    assert bool(decoded) == (data == b"P5 40 30 255\n")     # which is cut off: no pixels

@pytest.fixture
def wide_root(tmp_path):
    """Write a ROOT with 120 training images, one of which cannot be read."""
    write_images(tmp_path / "wide" / "train", ["ant", "bee"], 60, 1)
    write_images(tmp_path / "wide" / "val", ["ant", "bee"], 3, 2)
    (tmp_path / "wide" / "train" / "bee" / "17.png").write_bytes(b"broken")
    return tmp_path / "wide"

def train_images(root):
    """Return the TrainImages of a ROOT, uncropped."""
    args = common.given_flags(common.make_train_parser("test", "", "out", 1e-3), ["--data", root])
    images, _ = common.read_data(common.fill_in(*args))
    return common.TrainImages(images, torch.nn.Identity(), seed=3)

def test_the_next_image_stands_in(wide_root, clip, tmp_path, monkeypatch):
    """Train over an unreadable image: the next takes its place, label and all, each process says so
    once, and the run is the same with any number of workers."""
    def show(message, *_):
        with open(tmp_path / f"by-{os.getpid()}", "a") as f:
            f.write(f"{message}\n")
    for workers in ("0", "2"):
        with warnings.catch_warnings(), monkeypatch.context() as m:
            warnings.simplefilter("ignore")                 # those of deprecated functions
            warnings.simplefilter("default", UserWarning)   # as in a program: each text once
            m.setattr(warnings, "showwarning", show)
            run(calft, wide_root, clip(), tmp_path / workers, "--workers", workers, steps=40)
        said = [path.read_text() for path in tmp_path.glob("by-*")]
        assert 1 <= len(said) <= max(1, int(workers))
        for text in said:
            assert text == f"'{wide_root}/train/bee/17.png' cannot be read; " \
                "the next image takes its place\n"
        for path in tmp_path.glob("by-*"):
            path.unlink()
    assert_same_run(tmp_path / "0", tmp_path / "2")

    data = train_images(str(wide_root))
    bad = 60 + sorted(f"{i}.png" for i in range(60)).index("17.png")
    rows = []
    with pytest.warns(UserWarning, match="bee/17.png"):
        for index in range(360):                            # three epochs
            crop, label, row, _ = data[index]
            assert label == data.images.labels[row]
            assert torch.equal(crop, common.read_image(data.images.paths[row])[0])
            rows.append(row)
    times = np.bincount(rows, minlength=120)
    assert times[bad] == 0 and times[bad + 1] == 6
    assert np.delete(times, [bad, bad + 1]).tolist() == [3] * 118

@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_hundred_unreadable_images_in_a_row(wide_root, clip, tmp_path):
    """End with one line where a mount was lost or files are pointers of git-lfs, with loaders, too.
    After 99 the run goes on."""
    data = train_images(str(wide_root))
    for path in data.images.paths[1:]:
        Path(os.fsdecode(path)).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert data.read(21)[0] == 0                            # the last of a hundred
    with pytest.raises(OSError, match="100 training images in a row cannot be read.*/train/"):
        data.read(20)
    for workers in ("0", "2"):
        arguments = argv(wide_root, clip(), tmp_path / "out", "--workers", workers, steps=40)
        fails(calft.main, arguments, "100 training images in a row cannot be read", "/train/")

@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_in_scoring_ends_the_program(wide_root, clip, tmp_path, workers):
    """End by name, also with loaders, and before a run has trained on anything."""
    (wide_root / "val" / "bee" / "1.png").write_bytes(b"broken")
    message = f"'{wide_root}/val/bee/1.png' cannot be read; remove it"
    arguments = ["--data", str(wide_root), "--model", clip(), "--workers", workers]
    fails(evaluate.main, [*arguments, "--out", f"{tmp_path}/o"], message)
    fails(calft.main, argv(wide_root, clip(), tmp_path / "run", "--workers", workers), message)
    assert not os.path.exists(tmp_path / "run" / "last.pt")

def test_names_that_are_not_utf8(tiny_root, clip, tmp_path, capsys):
    """Train and score files, classes and sets with such names, which are printed as well as can
    be."""
    odd = os.fsdecode(b"caf\xe9")
    root = tmp_path / odd
    shutil.copytree(tiny_root, root)
    os.rename(root / "sketch", root / odd)
    for folder in ("train", "val", odd):
        os.rename(root / folder / "ant", root / folder / odd)
        os.rename(root / folder / odd / "0.png", root / folder / odd / f"{odd}.png")
    (root / "train" / f"empty {odd}").mkdir()
    results = run(carft, root, clip(), tmp_path / "out", steps=1)
    assert results["sets"][odd]["n"] == 15
    out = capsys.readouterr().out
    assert f"warning: {tmp_path}/caf?/train/empty caf? holds no image" in out
    assert out.count("\ncaf? ") == 1                        # in the table
    (root / "val" / odd / f"{odd}.png").write_bytes(b"broken")
    arguments = ["--data", str(root), "--model", clip(), "--workers", "0", "--out", f"{tmp_path}/o"]
    fails(evaluate.main, arguments, r"/val/caf\udce9/caf\udce9.png' cannot be read")

# ---- bad numbers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["calft", "anchor"])
def test_the_temperature_has_clips_bound(tiny_root, clip, tmp_path, captions, name):
    """Start from exp(logit_scale) = 150: it is cut to 100 after the first step. Without CLIP's own
    bound a model grows overconfident."""
    flags = {"calft": [], "anchor": ["--captions", captions]}[name]
    run(SCRIPTS[name], tiny_root, clip(tau=150), tmp_path, *flags, steps=1)
    tau = weights(tmp_path)["logit_scale"].exp().item()
    assert tau == pytest.approx(100, rel=1e-5)

def test_a_loss_that_is_not_finite(tiny_root, clip, tmp_path, monkeypatch):
    """End the run at the next logged step; last.pt stays finite."""
    orthogonality = calft.orthogonality
    factors = iter([1, 1, 1, 1, 1, float("nan"), 1, 1, 1, 1])
    monkeypatch.setattr(calft, "orthogonality", lambda W: orthogonality(W) * next(factors))
    flags = ["--save-every", "5", "--log-every", "6"]
    fails(calft.main, argv(tiny_root, clip(), tmp_path, *flags, steps=11), "not finite at step 6")
    monkeypatch.undo()
    assert last_step(tmp_path) == 5
    run(calft, tiny_root, clip(), tmp_path, *flags, steps=11)
    assert all(t.isfinite().all() for t in weights(tmp_path).values())

@pytest.mark.parametrize("gradient", [float("inf"), 1e25])
def test_what_is_not_finite_is_not_saved(tiny_root, clip, tmp_path, monkeypatch, gradient):
    """Break a gradient while the loss is still finite, or only its square, which AdamW keeps: the
    weight would then stand still for good."""
    average = common.average_gradients
    more = iter([0, 0, 0, gradient])
    def broken(parameters):
        parameters = list(parameters)
        average(parameters)
        parameters[0].grad.add_(next(more))
    monkeypatch.setattr(common, "average_gradients", broken)
    fails(calft.main, argv(tiny_root, clip(), tmp_path, "--save-every", "2"), "finite", "step 3")
    assert last_step(tmp_path) == 2

def test_an_exception_ends_a_process_with_loaders(failing):
    """End within two minutes: a process must not wait for loaders that wait for it."""
    assert "ZeroDivisionError" in end(failing, 1, seconds=120)

# ---- mistakes ------------------------------------------------------------------------------------
TEXTS = {"BADNAMES": ("classnames.txt", "ant the ant\n"),
         "BADTEMPLATES": ("templates.txt", "a photo\n"), "ONETEMPLATE": ("templates.txt", "a {}\n")}
MISTAKES = [                                                # flags, and words of the message
    ("calft --data /nowhere", "/nowhere"),
    ("calft --data TINY/train", "train/train"),
    ("calft --data BADNAMES", "classnames.txt", "folder<TAB>name"),
    ("calft --data BADTEMPLATES", "templates.txt", "{}"),
    ("calft --train train/ant", "train/ant", "no images"),
    ("calft --val other", "other", "fox"),
    ("calft --eval /nowhere", "/nowhere"),
    ("calft --eval TINY", "TINY/*"),
    ("calft --val-frac 1.5", "--val-frac"),
    ("calft --val-frac nan", "--val-frac"),
    ("calft --model ViT-B/16", "--model ViT-B/16 is unknown", "ViT-B-16,", "local-dir:PATH"),
    ("calft --model TINY", "local-dir:"),
    ("calft --model local-dir:/nowhere", "/nowhere"),
    ("calft --model ViT-B-16 --pretrained openai", "add or drop -quickgelu"),
    ("calft --model ViT-B-16 --pretrained nonsense", "nonsense"),
    ("calft --batch-size 1000", "--batch-size", "40"),
    ("calft --batch-size 0", "--batch-size 0"),
    ("calft --accum 3", "--accum"),
    ("calft --epochs 0.5", "--epochs"),
    ("calft --max-steps 0", "--max-steps 0"),
    ("calft --lr nan", "--lr nan"),
    ("calft --lr inf", "--lr inf"),
    ("calft --wd -0.1", "--wd -0.1"),
    ("calft --workers -1", "--workers -1"),
    ("calft --seed 99999999999999999999", "--seed"),
    (f"calft --seed {10 ** 79}", "--seed"),
    ("calft --sd", "--sd"),
    ("calft --learning-rate 1", "--learning-rate"),
    ("calft --out TINY/templates.txt", "templates.txt"),
    ("calft --out /proc/nothing", "/proc/nothing"),
    ("carft --data ONETEMPLATE", "templates.txt", "--lam 0"),
    ("anchor", "--captions", "--pool"),
    ("anchor --k 0", "--k 0"),
    ("evaluate --out TINY/templates.txt", "templates.txt")]

@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case[0][:40])
def test_mistakes(case, tiny_root, clip, tmp_path):
    """Make a mistake: it gets one line that names the culprit, and nothing is written. TINY stands
    for a ROOT, the names in TEXTS for one with such a file."""
    script, *given = case[0].replace("TINY", tiny_root).split()
    for name in set(given) & set(TEXTS):
        file, text = TEXTS[name]
        shutil.copytree(tiny_root, tmp_path / name)
        (tmp_path / name / file).write_text(text)
    given = [str(tmp_path / word) if word in TEXTS else word for word in given]
    arguments = argv(tiny_root, clip(), tmp_path / "out", *given)
    if script == "evaluate":                                # lacks the flags of training
        arguments = ["--data", tiny_root, "--model", clip(), "--workers", "0", *given]
    before = content(tiny_root), content(tmp_path)
    words = [word.replace("TINY", tiny_root) for word in case[1:]]
    fails(SCRIPTS[script].main, arguments, *words)
    assert (content(tiny_root), content(tmp_path)) == before
