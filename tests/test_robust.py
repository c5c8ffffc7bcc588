# SPDX-License-Identifier: MIT
"""Promises kept by breaking things: kills, signals, full disks, two runs at once, bad images, bad flags, bad numbers."""
import fcntl
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import anchor
import calft
import carft
import common
import evaluate
from conftest import BASE, REPO, environment, log, run, weights, write_clip, write_images

SCRIPTS = {"calft": calft, "carft": carft, "anchor": anchor}


def command(name, root, model, out, *flags, steps, prefix=()):
    return [sys.executable, *prefix, f"{REPO}/{name}.py", "--data", str(root), "--model", model, "--out", str(out), "--max-steps",
            str(steps), *BASE, *flags]


def start(command, **kw):
    env = {**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())}      # as here: threads decide on rounding
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **kw)


def wait_for_lines(process, out, count):
    """Until log.jsonl has so many lines."""
    while process.poll() is None:
        if os.path.isfile(f"{out}/log.jsonl") and open(f"{out}/log.jsonl").read().count("\n") >= count:
            return
        time.sleep(0.005)


def assert_same_run(a, b):
    assert log(a) == log(b) and json.load(open(f"{a}/results.json")) == json.load(open(f"{b}/results.json"))
    x, y = weights(a), weights(b)
    assert all(torch.equal(x[k], y[k]) for k in x)


def fails(capsys, main, argv, code, *words):
    """One line on stderr with all the words, the exit code, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert e.value.code == code and len(err) == 1 and all(w in err[0] for w in words), (e.value.code, err, words)


# ---- kills

FLAGS = {"calft": ("--ema-every", "3", "--accum", "2"), "carft": (), "anchor": ()}

KILLED_IN_A_SAVE = """
import os, signal, sys, torch
sys.path.insert(0, {repo!r})
import common, {script}
save, calls = torch.save, []
def cut(state, f):
    calls.append(1)
    if len(calls) == 3:
        f.write(b"half of a checkpoint")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, f)
torch.save = cut
{script}.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", ["calft", "carft", "anchor"])
def test_killed_at_random_and_in_a_save(tiny_root, clip, tmp_path, captions, pool, name):
    """SIGKILL, twice, and the same command again: the bytes of the run that was not killed."""
    flags = [*FLAGS[name], *(["--captions", captions, "--pool", pool] if name == "anchor" else [])]
    run(SCRIPTS[name], tiny_root, clip(), tmp_path / "whole", *flags, "--save-every", "2", steps=12)
    out, saves = tmp_path / "killed", [*flags, "--save-every", "2"]
    with open(tmp_path / "cut.py", "w") as f:
        f.write(KILLED_IN_A_SAVE.format(repo=REPO, script=name))
    cut = command(name, tiny_root, clip(), out, *saves, steps=12)
    cut[1] = str(tmp_path / "cut.py")
    process = start(cut)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()[-2000:]
    assert open(out / "last.pt.tmp", "rb").read() == b"half of a checkpoint"
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    process = start(command(name, tiny_root, clip(), out, *saves, "--workers", "1", steps=12))
    wait_for_lines(process, out, random.Random(name).randint(4, 8))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run(SCRIPTS[name], tiny_root, clip(), out, *saves, steps=12)
    assert_same_run(tmp_path / "whole", out)


def test_fp16_scaler_is_resumed(tiny_root, clip, tmp_path, monkeypatch):
    from conftest import assert_continues_to_the_same_bytes
    assert_continues_to_the_same_bytes(calft, tiny_root, clip(), tmp_path, monkeypatch, "--precision", "fp16", "--accum", "2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_leave(tiny_root, clip, tmp_path, number):
    """Sent to the whole group, as schedulers do: workers stay, the run saves within a step and leaves with code 75."""
    steps, out = 150, tmp_path / "out"
    process = start(command("calft", tiny_root, clip(), out, "--workers", "1", "--save-every", "100000", steps=steps))
    wait_for_lines(process, out, 3)
    os.killpg(process.pid, number)
    err = process.communicate()[1]
    assert process.returncode == common.PREEMPTED == 75 and signal.Signals(number).name in err and "Traceback" not in err
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert 0 < step < steps and log(out)[-1]["step"] == step - 1
    if number == signal.SIGTERM:
        run(calft, tiny_root, clip(), out, "--save-every", "100000", steps=steps)
        run(calft, tiny_root, clip(), tmp_path / "whole", steps=steps)
        assert_same_run(tmp_path / "whole", out)


def test_torchrun_passes_sigterm_on_and_all_leave_together(tiny_root, clip, tmp_path):
    out = tmp_path / "out"
    launch = command("calft", tiny_root, clip(), out, "--save-every", "100000", steps=5000, prefix=(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(20000 + os.getpid() % 20000)))
    process = start(launch)
    wait_for_lines(process, out, 3)
    process.send_signal(signal.SIGTERM)
    err = process.communicate()[1]
    assert process.returncode not in (0, None) and "saved after step" in err, err[-2000:]
    state = torch.load(out / "last.pt", weights_only=True)
    assert 0 < state["step"] < 5000 and log(out)[-1]["step"] == state["step"] - 1


# ---- files

def test_another_run_at_work_in_out_is_refused(tiny_root, clip, tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys\nf = open(sys.argv[1], 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n"
                               "print('held', flush=True)\nsys.stdin.read()", str(tmp_path / ".lock")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    argv = command("calft", tiny_root, clip(), tmp_path, steps=1)[2:]
    fails(capsys, calft.main, argv, 2, "another run", str(tmp_path))
    holder.communicate("")
    calft.main(argv)
    with open(tmp_path / ".lock", "w") as f:                        # a finished run lets go
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_keeps_the_previous_checkpoint(tiny_root, clip, tmp_path, capsys, monkeypatch):
    """The second save finds no room: the first stays whole, and the run goes on from there."""
    save, soft = common.Log.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self, step, parts):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, soft[1]))
        save(self, step, parts)
    argv = command("calft", tiny_root, clip(), tmp_path, "--save-every", "2", steps=6)[2:]
    with monkeypatch.context() as m:
        m.setattr(common.Log, "save", full)
        try:
            fails(capsys, calft.main, argv, 1, "last.pt could not be written", "kept")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
    calft.main(argv)
    assert [line["step"] for line in log(tmp_path)] == list(range(6))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_crafted_file_executes_nothing(tiny_root, clip, tmp_path, capsys):
    """As checkpoint and as --pretrained."""
    out = tmp_path / "out"
    run(calft, tiny_root, clip(), out, "--save-every", "2", steps=2)
    os.remove(out / "results.json")
    argv = command("calft", tiny_root, clip(), out, "--save-every", "2", steps=2)[2:]
    for write in (lambda f: torch.save({"step": Attack(str(tmp_path / "pwned"))}, f),
                  lambda f: f.write(pickle.dumps(Attack(str(tmp_path / "pwned"))))):
        with open(out / "last.pt", "wb") as f:
            write(f)
        fails(capsys, calft.main, argv, 2, "last.pt")
        shutil.copy(out / "last.pt", tmp_path / "bad.pt")
        fails(capsys, calft.main, ["--data", tiny_root, "--model", "RN50", "--pretrained", tmp_path / "bad.pt", "--out",
                                   tmp_path / "o", "--batch-size", "8"], 1, "bad.pt")
    torch.save({"weights": torch.zeros(3)}, out / "last.pt")            # loads, and is something else
    fails(capsys, calft.main, argv, 2, "last.pt", "not a checkpoint")
    assert not os.path.exists(tmp_path / "pwned")


# ---- bad images

def jpeg(mode="RGB", size=(40, 30), **kw):
    file = io.BytesIO()
    Image.new(mode, size, kw.pop("color", 77)).save(file, "JPEG", **kw)
    return file.getvalue()


def png(image, form="PNG", **kw):
    file = io.BytesIO()
    image.save(file, form, **kw)
    return file.getvalue()


def palette():
    image = Image.new("P", (40, 30), 1)
    image.putpalette([0, 0, 0, 77, 78, 79])
    return png(image, transparency=1)


def animated(form):
    frames = [Image.new("RGB", (40, 30), (77 + i, 77, 77)) for i in range(3)]
    return png(frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {}))


def bomb():
    """A PNG of a few kilobytes that says it is 60000 x 60000."""
    data = bytearray(png(Image.new("L", (8, 8))))
    import struct
    import zlib
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def rotated():
    image = Image.new("RGB", (40, 30), (77, 77, 77))
    exif = image.getexif()
    exif[0x0112] = 6
    return png(image, "JPEG", exif=exif)


ZOO = {                                                             # the README's table: what is read, and as what shape
    "cmyk.jpg": (jpeg("CMYK"), (30, 40)), "grey.jpg": (jpeg("L"), (30, 40)),
    "deep.png": (png(Image.fromarray(np.full((30, 40), 77 * 257, np.uint16))), (30, 40)),
    "palette.png": (palette(), (30, 40)), "animated.gif": (animated("GIF"), (30, 40)), "animated.webp": (animated("WEBP"), (30, 40)),
    "rotated.jpg": (rotated(), (30, 40)), "one.png": (png(Image.new("RGB", (1, 1), (77, 77, 77))), (1, 1)),
    "naïve\nname.png": (png(Image.new("RGB", (40, 30), (77, 77, 77))), (30, 40)), "png.jpeg": (png(Image.new("L", (40, 30), 77)), (30, 40)),
    "truncated.jpg": (jpeg(size=(400, 300))[:400], None), "empty.jpg": (b"", None), "text.jpg": (b"not an image", None),
    "wide.png": (png(Image.new("L", (30000, 1))), None), "bomb.png": (bomb(), None),
}


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(tmp_path, name):
    data, shape = ZOO[name]
    (tmp_path / name).write_bytes(data)
    if shape:
        x = common.read_image(str(tmp_path / name))
        assert x.dtype == torch.uint8 and tuple(x.shape) == (3, *shape)
        if name != "cmyk.jpg":
            assert (x.float() - 77).abs().max() <= 3
    else:
        with pytest.raises(common.Abort) as e:
            common.read_image(str(tmp_path / name))
        assert e.value.code == 1 and name in str(e.value) and "\n" not in str(e.value)


def test_links_folders_and_permissions(tmp_path):
    """A broken link cannot be read; a folder named x.jpg is a folder; so is what may not be opened (unless by root)."""
    write_images(str(tmp_path / "train"), ["a", "b"], 2)
    os.symlink(tmp_path / "nowhere.png", tmp_path / "train" / "a" / "link.png")
    (tmp_path / "train" / "a" / "x.jpg").mkdir()
    images = common._scan(str(tmp_path / "train"), str(tmp_path))
    assert [images.file(i) for i in range(3)] == ["train/a/0.png", "train/a/1.png", "train/a/link.png"]
    with pytest.raises(common.Abort, match="link.png: not readable as an image .FileNotFound"):
        images.read(2)
    os.chmod(tmp_path / "train" / "b" / "0.png", 0)
    if os.geteuid():
        with pytest.raises(common.Abort, match="b/0.png: not readable as an image .Permission"):
            images.read(3)


@pytest.fixture(scope="module")
def wide_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    write_images(str(root / "train"), ["ant", "bee"], 60, 1)
    write_images(str(root / "val"), ["ant", "bee"], 3, 2)
    (root / "templates.txt").write_text("a photo of a {}.\nart of a {}.\n")
    return root


def test_bad_training_images_are_replaced(wide_root, clip, tmp_path, capsys):
    """Named once, counted in the log, the same whatever the workers and over a resume; above 1 % the run stops."""
    shutil.copytree(wide_root, tmp_path / "root")
    bad = tmp_path / "root" / "train" / "bee" / "17.png"
    bad.write_bytes(b"broken")
    for out, flags in (("a", ["--workers", "0"]), ("b", ["--workers", "2"])):
        run(calft, tmp_path / "root", clip(), tmp_path / out, *flags, steps=40)
        err = capsys.readouterr().err
        assert err.count("bee/17.png") == 1 and "another image takes its place" in err
    assert_same_run(tmp_path / "a", tmp_path / "b")
    counts = [line.get("unreadable", 0) for line in log(tmp_path / "a")]
    assert counts[0] == 0 and counts[-1] == 1 and counts == sorted(counts)
    for name in ("1.png", "2.png"):
        (tmp_path / "root" / "train" / "ant" / name).write_bytes(b"broken")
    argv = command("calft", tmp_path / "root", clip(), tmp_path / "c", steps=40)[2:]
    fails(capsys, calft.main, argv, 1, "2 of 120", "1 %", str(tmp_path))


def test_what_takes_the_place_is_a_function_of_seed_epoch_and_index(wide_root, tmp_path):
    shutil.copytree(wide_root, tmp_path / "root")
    (tmp_path / "root" / "train" / "bee" / "17.png").write_bytes(b"broken")
    images = common._scan(str(tmp_path / "root" / "train"), str(tmp_path / "root"))
    row = [images.file(i) for i in range(120)].index("train/bee/17.png")
    data = common.TrainImages(images, lambda x: x, seed=3)
    for epoch in (0, 1, 2):
        x, label, i, _, error = data[epoch, row]
        assert i != row and "17.png" in error and label == images.labels[i] and torch.equal(x, images.read(i))
        assert data[epoch, row][2] == i
    assert len({data[epoch, row][2] for epoch in range(9)}) > 3


# ---- bad numbers

def test_a_loss_that_is_not_finite(tiny_root, clip, tmp_path, capsys, monkeypatch):
    """Stops within a step, names the batch's images, and keeps the checkpoint from before."""
    orthogonality, calls = calft.orthogonality, []

    def broken(W):
        calls.append(1)
        return orthogonality(W) * (float("nan") if len(calls) == 6 else 1)
    argv = command("calft", tiny_root, clip(), tmp_path, "--save-every", "3", "--log-every", "100", steps=20)[2:]
    with monkeypatch.context() as m:
        m.setattr(calft, "orthogonality", broken)
        fails(capsys, calft.main, argv, 1, "step 5", "nonfinite.txt", ".png")
    assert len(calls) in (6, 7) and torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 3
    listed = open(tmp_path / "nonfinite.txt").read().splitlines()
    order = np.random.default_rng([0, 1]).permutation(40)[:8]           # 40 images, batches of 8: step 5 begins epoch 1
    images = common._scan(f"{tiny_root}/train", tiny_root)
    assert listed == ["step 5, process 0", *(images.path(i) for i in order)]
    calft.main(argv)                                                     # and goes on from there
    assert all(t.isfinite().all() for t in weights(tmp_path).values())


@pytest.mark.parametrize("gradient", [float("inf"), 1e25])
def test_weights_that_are_not_finite_are_not_saved(tiny_root, clip, tmp_path, capsys, monkeypatch, gradient):
    """The loss of the step is still finite, only its gradient is not, or what AdamW keeps of its square (the weight
    then stands still for good)."""
    average, calls = common.average_gradients, []

    def broken(parameters):
        parameters = list(parameters)
        average(parameters)
        calls.append(1)
        if len(calls) == 4:
            parameters[0].grad.fill_(gradient)
    argv = command("calft", tiny_root, clip(), tmp_path, "--save-every", "2", steps=20)[2:]
    monkeypatch.setattr(common, "average_gradients", broken)
    fails(capsys, calft.main, argv, 1, "not finite after step 3", str(tmp_path))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2


def test_a_model_that_is_not_finite_is_refused(tiny_root, tmp_path, capsys):
    name = write_clip(str(tmp_path / "clip"))
    file = str(tmp_path / "clip" / "open_clip_model.safetensors")
    state = load_file(file)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, file)
    fails(capsys, calft.main, command("calft", tiny_root, name, tmp_path / "o", steps=1)[2:], 1, "not finite", name)


def test_out_of_gpu_memory_says_what_helps(tiny_root, clip, tmp_path, capsys, monkeypatch):
    def full(*a):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
    monkeypatch.setattr(common, "train_loader", full)
    fails(capsys, calft.main, command("calft", tiny_root, clip(), tmp_path, steps=1)[2:], 1, "2.00 GiB", "--accum 2", "1/2",
          "--grad-checkpointing")


# ---- bad flags: (script, flags, exit code, words); TINY is a ROOT, CLIP a model, OUT a folder

BAD = [
    ("calft", ["--data", "/nowhere"], 2, "--data", "/nowhere"),
    ("calft", ["--data", "TINY/templates.txt"], 2, "not a folder"),
    ("calft", ["--data", "EMPTY"], 2, "train", "--train"),
    ("calft", ["--data", "ONECLASS"], 2, "two"),
    ("calft", ["--data", "NOIMAGES"], 2, "NOIMAGES", "no image"),
    ("calft", ["--data", "SAMENAMES"], 2, "SAMENAMES", "hot dog"),
    ("calft", ["--data", "BADTEMPLATES"], 2, "templates.txt", "{}"),
    ("calft", ["--data", "BADNAMES"], 2, "classnames.txt", "line 1"),
    ("calft", ["--data", "EXTRAVAL"], 2, "--val", "zebra"),
    ("calft", ["--data", "stl10:TINY"], 2, "cifar10"),
    ("calft", ["--train", "nothing"], 2, "nothing"),
    ("calft", ["--val", "nothing"], 2, "nothing"),
    ("calft", ["--eval", "/nowhere"], 2, "/nowhere"),
    ("calft", ["--eval", "food101:/nowhere"], 2, "/nowhere"),
    ("calft", ["--val-frac", "0"], 2, "--val-frac"),
    ("calft", ["--val-frac", "1.5"], 2, "--val-frac"),
    ("calft", ["--model", "ViT-B/16"], 2, "ViT-B-16"),
    ("calft", ["--model", "nonsense"], 2, "nonsense"),
    ("calft", ["--model", "local-dir:/nowhere"], 2, "open_clip_config.json"),
    ("calft", ["--model", "TINY"], 2, "local-dir:"),
    ("calft", ["--model", "ViT-B-16", "--pretrained", "openai"], 2, "ViT-B-16-quickgelu"),
    ("calft", ["--model", "ViT-B-16", "--pretrained", "nonsense"], 2, "nonsense"),
    ("calft", ["--model", "ViT-B-16-SigLIP", "--pretrained", "webli"], 2, "tokenizer"),
    ("calft", ["--batch-size", "0"], 2, "--batch-size"),
    ("calft", ["--batch-size", "-8"], 2, "--batch-size"),
    ("calft", ["--batch-size", "1000"], 2, "--batch-size", "40"),
    ("calft", ["--batch-size", "8", "--accum", "3"], 2, "--accum 3"),
    ("calft", ["--accum", "0"], 2, "--accum"),
    ("calft", ["--epochs", "0"], 2, "--epochs"),
    ("calft", ["--max-steps", "0"], 2, "--max-steps"),
    ("calft", ["--lr", "-1"], 2, "--lr"),
    ("calft", ["--lr", "nan"], 2, "--lr"),
    ("calft", ["--wd", "inf"], 2, "--wd"),
    ("calft", ["--warmup", "-1"], 2, "--warmup"),
    ("calft", ["--workers", "-1"], 2, "--workers"),
    ("calft", ["--seed", "-1"], 2, "--seed"),
    ("calft", ["--seed", "99999999999999999999"], 2, "--seed"),
    ("calft", ["--log-every", "0"], 2, "--log-every"),
    ("calft", ["--save-every", "0"], 2, "--save-every"),
    ("calft", ["--ema-every", "0"], 2, "--ema-every"),
    ("calft", ["--sd", "-1"], 2, "--sd"),
    ("calft", ["--oc", "nan"], 2, "--oc"),
    ("calft", ["--out", "TINY/templates.txt"], 2, "--out"),
    ("calft", ["--out", "/proc/nothing"], 2, "--out"),
    ("carft", ["--data", "ONETEMPLATE"], 2, "templates.txt", "--lam 0"),
    ("carft", ["--lam", "inf"], 2, "--lam"),
    ("anchor", [], 2, "--captions", "--pool"),
    ("anchor", ["--captions", "/nowhere.tsv"], 2, "/nowhere.tsv"),
    ("anchor", ["--pool", "/nowhere.tsv"], 2, "/nowhere.tsv"),
    ("anchor", ["--pool", "/nowhere.tar"], 2, "/nowhere.tar"),
    ("anchor", ["--pool", "TINY/templates.txt"], 2, "templates.txt line 1"),
    ("anchor", ["--k", "0", "--pool", "x"], 2, "--k"),
    ("anchor", ["--cap", "-1"], 2, "--cap"),
    ("anchor", ["--caption-model", "coca_ViT-B-32"], 2, "--caption-model", "tag"),
    ("evaluate", ["--wise", "0.5"], 2, "--wise"),
    ("evaluate", ["--model", "nonsense"], 2, "nonsense"),
    ("evaluate", ["--wise", "nan"], 2, "--wise"),
]


@pytest.fixture(scope="module")
def broken_roots(tmp_path_factory):
    top = tmp_path_factory.mktemp("broken")
    for name in ("ONECLASS", "NOIMAGES", "SAMENAMES", "BADTEMPLATES", "BADNAMES", "EXTRAVAL", "ONETEMPLATE"):
        write_images(str(top / name / "train"), ["ant"] if name == "ONECLASS" else ["ant", "bee"], 20)
        write_images(str(top / name / "val"), ["ant"], 1)
    (top / "EMPTY").mkdir()
    (top / "NOIMAGES" / "train" / "cat").mkdir()
    (top / "SAMENAMES" / "classnames.txt").write_text("ant\thot dog\nbee\thot dog\n")
    (top / "BADTEMPLATES" / "templates.txt").write_text("a photo\n")
    (top / "BADNAMES" / "classnames.txt").write_text("ant the ant\n")
    write_images(str(top / "EXTRAVAL" / "val"), ["zebra"], 1)
    (top / "ONETEMPLATE" / "templates.txt").write_text("a {}\n")
    return top


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]} {' '.join(case[1])}")
def test_bad_flags(case, tiny_root, clip, tmp_path, broken_roots, capsys):
    """One line that names the culprit, the exit code, and nothing written."""
    script, given, code, *words = case
    place = lambda s: s.replace("TINY", tiny_root) if "TINY" in s else str(broken_roots / s) if s.isupper() else s
    argv = {"--data": tiny_root, "--model": clip(), "--out": str(tmp_path / "out"), "--workers": "0", "--batch-size": "8"}
    if script != "evaluate":
        argv["--max-steps"] = "1"
    given = [place(g) for g in given]
    for flag, value in zip(given[::2], given[1::2]):
        argv[flag] = value
    main = {**SCRIPTS, "evaluate": evaluate}[script].main
    before = {f: os.stat(os.path.join(top, f)).st_mtime_ns for top, _, files in os.walk(tiny_root) for f in files}
    fails(capsys, main, [x for pair in argv.items() for x in pair], code, *(place(w) if w.isupper() else w for w in words))
    assert before == {f: os.stat(os.path.join(top, f)).st_mtime_ns for top, _, files in os.walk(tiny_root) for f in files}
    left = os.listdir(tmp_path / "out") if os.path.isdir(tmp_path / "out") else []
    assert set(left) <= {".lock"}


def test_nothing_of_another_run_is_overwritten(tiny_root, clip, tmp_path, capsys):
    """Flags that alter a run are refused by name, others not; --no-resume and --overwrite begin anew."""
    run(calft, tiny_root, clip(), tmp_path, "--save-every", "2", steps=4)
    before = {f: (tmp_path / f).read_bytes() for f in ("last.pt", "results.json", "log.jsonl", "args.json")}
    base = command("calft", tiny_root, clip(), tmp_path, "--save-every", "2", steps=4)[2:]
    for flag, value in (("--lr", "0.5"), ("--seed", "3"), ("--oc", "0.9"), ("--batch-size", "4"), ("--max-steps", "5")):
        fails(capsys, calft.main, [*base, flag, value], 2, flag, "--overwrite")
    fails(capsys, calft.main, [*base, "--lr", "0.5", "--no-resume"], 2, "--lr")
    assert before == {f: (tmp_path / f).read_bytes() for f in before}
    calft.main([*base, "--workers", "1", "--log-every", "2", "--save-every", "9", "--accum", "2"])      # finished: shows its table
    assert before == {f: (tmp_path / f).read_bytes() for f in before}
    os.remove(tmp_path / "last.pt")
    calft.main([*base, "--no-resume"])
    assert os.path.isfile(tmp_path / "last.pt") and (tmp_path / "results.json").read_bytes() == before["results.json"]


def test_a_run_begun_anew_leaves_nothing_of_the_old(tiny_root, clip, tmp_path, monkeypatch):
    """CAR-FT's head would be used with CaRot's model; a model from before would pass for one that was never trained."""
    run(carft, tiny_root, clip(), tmp_path, steps=2)
    new = run(calft, tiny_root, clip(), tmp_path, "--overwrite", steps=2)
    evaluate.main(["--data", tiny_root, "--model", str(tmp_path), "--out", str(tmp_path / "e"), "--workers", "0"])
    scores, = json.load(open(tmp_path / "e" / "results.json")).values()
    assert scores["sets"]["val"]["nll"] == pytest.approx(new["sets"]["val"]["nll"], rel=1e-4)
    monkeypatch.setattr(common, "train_loader", lambda *a: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run(calft, tiny_root, clip(), tmp_path, "--overwrite", "--seed", "5", steps=2)
    assert not (tmp_path / "model").exists() and not (tmp_path / "teacher").exists()


def test_a_finished_run_without_its_checkpoint_keeps_its_log(tiny_root, clip, tmp_path):
    run(calft, tiny_root, clip(), tmp_path, steps=3)
    os.remove(tmp_path / "last.pt")
    run(calft, tiny_root, clip(), tmp_path, steps=3)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 2]


def test_a_log_torn_by_a_power_cut(tiny_root, clip, tmp_path):
    run(calft, tiny_root, clip(), tmp_path, "--save-every", "2", steps=4)
    os.remove(tmp_path / "results.json")
    for end in (b"\0" * 40 + b"\n", b'{"step": 3, "lo'):
        with open(tmp_path / "log.jsonl", "ab") as f:
            f.write(end)
        run(calft, tiny_root, clip(), tmp_path, "--save-every", "2", steps=4)
        os.remove(tmp_path / "results.json")
        assert [line["step"] for line in log(tmp_path)] == [0, 1, 2, 3]


def test_other_texts_and_another_scripts_checkpoint_are_refused(tiny_root, clip, tmp_path, capsys):
    shutil.copytree(tiny_root, tmp_path / "root")
    out = tmp_path / "out"
    run(calft, tmp_path / "root", clip(), out, steps=2)
    argv = command("calft", tmp_path / "root", clip(), out, steps=2)[2:]
    for file, text in (("templates.txt", "one {}.\n"), ("classnames.txt", "ant\tpismire\n")):
        old = (tmp_path / "root" / file).read_text() if (tmp_path / "root" / file).exists() else None
        (tmp_path / "root" / file).write_text(text)
        fails(capsys, calft.main, argv, 2, "templates", "--overwrite")
        (tmp_path / "root" / file).write_text(old) if old else os.remove(tmp_path / "root" / file)
    run(carft, tmp_path / "root", clip(), tmp_path / "other", steps=2)
    shutil.copy(tmp_path / "other" / "last.pt", out / "last.pt")
    os.remove(out / "results.json")
    fails(capsys, calft.main, argv, 2, "last.pt", "not a checkpoint of this script")


@pytest.mark.parametrize("name", ["calft", "evaluate"])
def test_an_error_in_a_worker_ends_the_process(tiny_root, clip, tmp_path, name):
    """A real process: it must not wait for workers that wait for it."""
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "sketch" / "bee" / "1.png").write_bytes(b"broken")
    argv = [sys.executable, f"{REPO}/{name}.py", "--data", str(tmp_path / "root"), "--model", clip(), "--out", str(tmp_path / "o"),
            "--batch-size", "8", "--workers", "2"]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "sketch/bee/1.png: not readable" in done.stderr and "Traceback" not in done.stderr


def test_bad_images_are_counted_once_by_two_processes(wide_root, clip, tmp_path):
    shutil.copytree(wide_root, tmp_path / "root")
    (tmp_path / "root" / "train" / "bee" / "17.png").write_bytes(b"broken")
    launch = command("calft", tmp_path / "root", clip(), tmp_path / "two", steps=45, prefix=(
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(20000 + os.getpid() % 20000)))
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert log(tmp_path / "two")[-1]["unreadable"] == 1
    assert len(torch.load(tmp_path / "two" / "last.pt", weights_only=True)["bad"]) == 1


def test_long_prompts_are_cut_with_a_warning(tiny_root, clip, tmp_path, capsys):
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "templates.txt").write_text("a photo of a {}\n" + "very " * 90 + "{}\n")
    run(calft, tmp_path / "root", clip(), tmp_path / "out", steps=1)
    assert "5 prompts fill all 77 tokens" in capsys.readouterr().out
