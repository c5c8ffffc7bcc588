# SPDX-License-Identifier: MIT
"""Real folders as they are: each gives the right number, or one line, and nothing is lost."""
import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import anchor
import calft
import carft
import common
import evaluate
from conftest import (CLASSES, REPO, argv, content, environment, fails, log, run, weights,
                      write_images)
from test_common import paths, read

# ---- folders -------------------------------------------------------------------------------------
def link(target, path):
    """Make a link in a folder that may not exist yet."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.symlink(target, path)

def test_folders_below_a_class(tmp_path):
    """Walk the folders below a class as ImageFolder does, links included, in a set that has a class
    with images of its own. A folder of sets is no set."""
    root = tmp_path / "root"
    write_images(root / "train", ["a", "b", "a/more", "a/more/deep", "c/only/deep"], 2)
    write_images(tmp_path / "elsewhere", ["x"], 2)
    link(tmp_path / "elsewhere" / "x", root / "train" / "b" / "linked")
    write_images(root / "train" / "b", [".hidden"], 2)
    write_images(root / "imagenet-c" / "fog", ["1/a", "1/b", "2/a"], 1)
    write_images(root / "objectnet-1.0" / "images", ["a", "b"], 1)
    train, sets = read(root, val_frac=0.01)
    assert train.classes == ["a", "b", "c"] and list(sets) == ["val"]
    # ImageFolder skips no hidden folder, the one difference.
    files = (root / "train").rglob("*.png")
    expected = {file for file in files if ".hidden" not in str(file)}
    expected |= {root / "train" / "b" / "linked" / f"{i}.png" for i in range(2)}
    assert set(map(Path, paths(train) + paths(sets["val"]))) == expected
    assert len(train) + len(sets["val"]) == 12

def test_links_that_form_loops(tmp_path, capsys):
    """Enter each real folder once: links to oneself, to the set, to ROOT, and to one another."""
    write_images(tmp_path / "root" / "train", ["a", "b", "a/x", "a/y"], 2)
    train = tmp_path / "root" / "train"
    for name, target in (("a/self", train / "a"), ("a/set", train), ("a/root", tmp_path / "root"),
                         ("a/x/y", train / "a" / "y"), ("a/y/x", train / "a" / "x"),
                         ("loop", train / "loop"), ("a/loop.png/", "loop.png")):
        os.symlink(target, str(train / name).rstrip("/"))
    os.symlink("loop", tmp_path / "root" / "loop")
    os.remove(train / "a" / "loop.png")
    train, sets = read(tmp_path / "root", val_frac=0.01)
    assert (len(train) + len(sets["val"]), list(sets)) == (8, ["val"])

def test_folders_that_cannot_be_read(tiny_root, tmp_path, monkeypatch, capsys):
    """Skip with a warning what nobody asked for, such as lost+found; name what was asked for."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    (root / "lost+found").mkdir()
    scandir = os.scandir
    closed = root / "lost+found"
    def deny(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", deny)
    assert list(read(root)[1]) == ["val", "few", "other", "sketch"]
    assert f"{closed} is skipped: {closed} cannot be read (Permission denied)" in (
        capsys.readouterr().out)
    closed = root / "sketch" / "bee"                        # a part of it would be another set
    assert list(read(root)[1]) == ["val", "few", "other"]
    assert f"{root}/sketch is skipped: {closed} cannot be read" in capsys.readouterr().out
    for closed in (root / "train", root / "train" / "bee", root / "val" / "dog"):
        with pytest.raises(SystemExit, match=f"^error: .*{closed} cannot be read"):
            read(root)
    closed = root / "sketch"
    with pytest.raises(SystemExit, match="^error: .*sketch cannot be read"):
        read(root, eval=[str(root / "sketch")])

@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALIDATION"])
def test_val_by_another_name(tmp_path, name):
    """Ask for --val: otherwise val would be scored as a shift, and a fifth of train held out."""
    for folder in ("train", name, "sketch"):
        write_images(tmp_path / folder, ["a", "b"], 3)
    with pytest.raises(SystemExit, match=f"^error: .* did you mean --val {name}[?]$"):
        read(tmp_path)
    assert list(read(tmp_path, val=name)[1]) == ["val", "sketch"]
    assert list(read(tmp_path, train=["train", name])[1]) == ["val", "sketch"]
    write_images(tmp_path / "val", ["a", "b"], 3)
    assert list(read(tmp_path)[1]) == ["val", *sorted([name, "sketch"])]

def test_no_image_is_trained_on_and_scored(tiny_root, tmp_path):
    """Refuse --train and --val that name one folder, by any path, and score each shift once."""
    os.symlink(f"{tiny_root}/train", tmp_path / "again")
    again = os.path.relpath(tmp_path / "again", tiny_root)
    for flags in (dict(train=["train", "val"]), dict(val="train"), dict(train=["train", "train/"]),
                  dict(train=["val", "train"], val="./val"), dict(train=["train", again])):
        with pytest.raises(SystemExit, match="^error: --train .* --val .*: one folder is named tw"):
            read(tiny_root, **flags)
    sets = read(tiny_root, eval=[f"{tiny_root}/sketch", f"{tiny_root}/few/../sketch"])[1]
    assert list(sets) == ["val", "few", "other", "sketch"]
    with pytest.raises(SystemExit, match="^error: --eval .*train"):
        read(tiny_root, eval=[f"{tiny_root}/train"])

def test_names_that_two_classes_have(tmp_path, capsys):
    """Warn once that prompts cannot tell two classes apart, where prompts decide."""
    for name in ("train", "sketch", "new"):
        write_images(tmp_path / name, ["ship_1", "ship_2", "tree"], 2)
    write_images(tmp_path / "new", ["fox"], 2)
    read(tmp_path)
    assert "the same name" not in capsys.readouterr().out
    (tmp_path / "classnames.txt").write_text("ship_1\tship\nship_2\tship\n")
    read(tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "the same name" in line]
    assert [line.split(":")[1] for line in said] == [" train", " new"]
    assert all(line.endswith(": ship") for line in said)

def test_lines_that_belong_to_no_folder(tmp_path, capsys):
    """Warn with a count and an example of lines of classnames.txt and classes.txt that do nothing:
    a misspelt folder would keep its name."""
    for name in ("train", "sketch"):
        write_images(tmp_path / name, ["a", "b"], 2)
    write_images(tmp_path / "new", ["c"], 2)
    (tmp_path / "classnames.txt").write_text("a\tant\nc\tcat\nB\tbee\nC\tcow\n")
    (tmp_path / "sketch" / "classes.txt").write_text("b\ta\na\tb\nd\ta\n")
    (tmp_path / "new" / "classnames.txt").write_text("c\tcat\n")
    read(tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "there is no folder" in line]
    assert said == [
        f"warning: {tmp_path}/sketch/classes.txt: there is no folder for 1 of 3 lines, such as d",
        f"warning: {tmp_path}/classnames.txt: there is no folder for 2 of 4 lines, such as B"]

def test_one_image_a_class(tmp_path):
    """Say that nothing can be held out."""
    write_images(tmp_path / "train", ["a", "b"], 1)
    with pytest.raises(SystemExit, match="^error: .* one training image a class, .*; add val/$"):
        read(tmp_path)

# ---- images --------------------------------------------------------------------------------------
def as_file(x, form, path, **how):
    Image.fromarray(x).save(path, form, **how)

DEEP = {
    "tiff": lambda x, path: as_file(x * np.uint16(257), "TIFF", path),
    "tiff, compressed": lambda x, path: as_file(
        x * np.uint16(257), "TIFF", path, compression="tiff_lzw"),
    "tiff, big-endian": lambda x, path: as_file((x * np.uint16(257)).astype(">u2"), "TIFF", path),
    "png": lambda x, path: as_file(x * np.uint16(257), "PNG", path),
    "pgm": lambda x, path: path.write_bytes(
        b"P5 40 32 65535\n" + (x * np.uint16(257)).astype(">u2").tobytes()),
    "pgm of 12 bits": lambda x, path: path.write_bytes(
        b"P5 40 32 4095\n" + (x * 4095.0 / 255).astype(">u2").tobytes()),
    "ppm": lambda x, path: path.write_bytes(
        b"P6 40 32 65535\n" + (np.repeat(x, 3) * np.uint16(257)).astype(">u2").tobytes()),
    "plain pgm": lambda x, path: path.write_text(
        "P2 40 32 65535\n" + " ".join(str(257 * v) for v in x.ravel().tolist()))}

@pytest.mark.parametrize("name", DEEP)
def test_deep_images(tmp_path, name):
    """Scale 16 bits to 8: Pillow's convert("RGB") turns nearly all of them white."""
    x = np.random.default_rng(0).integers(0, 256, (32, 40), np.uint8)
    path = tmp_path / "deep.tif"
    DEEP[name](x, path)
    image, problem = common.read_image(str(path))
    assert not problem
    for channel in image:
        assert np.abs(channel.numpy().astype(int) - x).max() <= 1

@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_without_a_known_white_are_unreadable(tmp_path, dtype):
    """Refuse what cannot be scaled: the largest value of 32 bits or of a float is no white."""
    path = tmp_path / "deep.tif"
    as_file(np.full((8, 8), 77, dtype), "TIFF", path)
    assert common.read_image(str(path))[1] == "cannot be read"

def test_a_picture_that_is_too_long(tiny_root, clip, tmp_path):
    """Say so, as it can be read."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    Image.new("RGB", (1010, 10)).save(root / "val" / "bee" / "0.png")
    fails(calft.main, argv(root, clip(), tmp_path / "out"), "val/bee/0.png", "too long")

# ---- models --------------------------------------------------------------------------------------
def test_an_activation_that_a_file_does_not_say(clip, tmp_path, monkeypatch, capsys):
    """Ask the user to be sure where a model has a twin of the other activation."""
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **kw: 1 / 0)
    weights = tmp_path / "weights.pt"
    torch.save({}, weights)
    for name, twin in (("ViT-B-32", "ViT-B-32-quickgelu"), ("ViT-B-32-quickgelu", "ViT-B-32"),
                       ("ViT-S-32-alt", None)):
        with pytest.raises(SystemExit):
            common.load_model(name, str(weights))
        said = capsys.readouterr().out
        assert (f"is of {name}, not of {twin}" in said) == (twin is not None)
    with pytest.raises(SystemExit):
        common.load_model("ViT-B-32", "")
    assert capsys.readouterr().out == ""

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module."])
def test_names_of_compiled_and_parallel_models(clip, tmp_path, prefix):
    """Load weights whose names have the prefixes of torch.compile and DistributedDataParallel."""
    source = Path(clip().removeprefix("local-dir:"))
    state = load_file(source / "open_clip_model.safetensors")
    shutil.copy(source / "open_clip_config.json", tmp_path)
    named = {prefix + name: weight for name, weight in state.items()}
    save_file(named, tmp_path / "open_clip_model.safetensors")
    model, *_ = common.load_model(f"local-dir:{tmp_path}", "")
    assert all(torch.equal(model.state_dict()[name].cpu(), state[name]) for name in state)

def test_weights_of_another_model(clip, tmp_path):
    """Name a few of the weights that do not fit, not all."""
    source = Path(clip().removeprefix("local-dir:"))
    shutil.copy(source / "open_clip_config.json", tmp_path)
    state = load_file(source / "open_clip_model.safetensors")
    others = {f"other.{name}": weight for name, weight in state.items()}
    save_file(others, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(SystemExit, match="^error: .*Missing key.* ...$") as e:
        common.load_model(f"local-dir:{tmp_path}", "")
    assert len(e.value.code) < 500

@pytest.mark.parametrize("name, value", [
    ("logit_scale", float("nan")), ("logit_scale", float("inf")),
    ("token_embedding.weight", float("nan")), ("text_projection", float("inf")),
    ("ln_final.bias", float("nan")), ("visual.proj", float("nan"))])
@pytest.mark.parametrize("script", [calft, carft, evaluate])
def test_weights_that_are_not_finite(tiny_root, clip, tmp_path, script, name, value):
    """Say so, whichever tower they are in."""
    source = Path(clip().removeprefix("local-dir:"))
    shutil.copytree(source, tmp_path / "clip")
    state = load_file(source / "open_clip_model.safetensors")
    state[name] = torch.full_like(state[name], value)
    save_file(state, tmp_path / "clip" / "open_clip_model.safetensors")
    model = f"local-dir:{tmp_path}/clip"
    arguments = argv(tiny_root, model, tmp_path / "out")
    if script is evaluate:
        arguments = ["--data", tiny_root, "--model", model, "--out", f"{tmp_path}/out",
                     "--fit-temperature", "--sigma-min", "--skip-corrupt"]
    fails(script.main, arguments, "not finite")

# ---- runs ----------------------------------------------------------------------------------------
def test_a_run_goes_on_where_root_has_moved(tiny_root, clip, tmp_path):
    """Train a part, move ROOT, add a shift and drop an image of another: the run continues with the
    bits of one that was left alone, and scores what there is."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    run(calft, root, clip(), tmp_path / "whole", steps=6)
    arguments = argv(root, clip(), tmp_path / "out", "--save-every", "2", steps=6)
    save = common.Run.save
    class Killed(Exception):
        pass
    def killed(self, step, saved):
        save(self, step, saved)
        raise Killed
    with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
        m.setattr(common.Run, "save", killed)
        calft.main(arguments)
    os.rename(root, tmp_path / "moved")
    write_images(tmp_path / "moved" / "new", CLASSES, 3, 6)
    os.remove(tmp_path / "moved" / "sketch" / "bee" / "0.png")
    arguments[1] = str(tmp_path / "moved")
    calft.main(arguments)
    ours, whole = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    results = common.read_json(tmp_path / "out" / "results.json")
    for column in (results, results["zero_shot"]):
        assert list(column["sets"]) == ["val", "few", "new", "other", "sketch"]
        assert column["sets"]["sketch"]["n"] == 14
    assert common.read_json(tmp_path / "out" / "args.json")["data"] == str(tmp_path / "moved")
    evaluate.main(["--model", f"{tmp_path}/out", "--out", f"{tmp_path}/e"])

@pytest.mark.parametrize("script", [calft, carft])
def test_a_finished_run_scores_another_set(tiny_root, clip, tmp_path, capsys, script):
    """Start a finished run again with one set more: its table has that set on both sides, equal to
    a run that had it from the start. Weights stay."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    first = run(script, root, clip(), tmp_path / "out")
    before = weights(tmp_path / "out")
    write_images(tmp_path / "far" / "new", CLASSES, 3, 6)
    new = ["--eval", f"{tmp_path}/far/new"]
    capsys.readouterr()
    results = run(script, root, clip(), tmp_path / "out", *new)
    assert f"the sets to score have changed since {tmp_path}/out was scored" in (
        capsys.readouterr().out)
    assert results == run(script, root, clip(), tmp_path / "all", *new)
    assert list(results["sets"]) == [*first["sets"], "far/new"]
    assert all(torch.equal(before[name], w) for name, w in weights(tmp_path / "out").items())
    (tmp_path / "out" / "last.pt").unlink()
    fails(script.main, argv(root, clip(), tmp_path / "out"), "last.pt is gone", "evaluate.py")
    assert common.read_json(tmp_path / "out" / "results.json") == results

def test_damaged_files_are_named(tiny_root, clip, tmp_path):
    """Cut files short, as a full disk or a bad copy does: one line names the file."""
    out = tmp_path / "out"
    run(calft, tiny_root, clip(), out)
    whole = {name: (out / name).read_bytes() for name in ("last.pt", "args.json", "results.json")}
    for name, data in whole.items():
        for part in (data[:len(data) // 2], b"", b"\xff\xfe" + data):
            (out / name).write_bytes(part)
            fails(calft.main, argv(tiny_root, clip(), out), f"{out}/{name} is damaged", "remove it")
        (out / name).write_bytes(data)
    (out / "args.json").write_text("{")
    fails(evaluate.main, ["--model", str(out), "--out", f"{tmp_path}/e"], "args.json is damaged")
    (out / "args.json").write_bytes(whole["args.json"])
    (out / "results.json").write_text("[]"[:1])
    fails(evaluate.main, ["--mean", str(out), str(out)], "results.json is damaged")

def test_a_full_disk_under_the_log(tiny_root, clip, tmp_path, monkeypatch):
    """End the run with one line, and keep the checkpoint."""
    real = builtins.open
    class Full:
        def __init__(self, file):
            self.file = file
        def __enter__(self):
            return self
        def __exit__(self, *error):
            self.file.close()
        def write(self, text):
            raise OSError(28, "No space left on device")
    def full(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if mode == "a" and len(log(tmp_path)) == 3 else file
    monkeypatch.setattr(builtins, "open", full)
    arguments = argv(tiny_root, clip(), tmp_path, "--save-every", "2")
    fails(calft.main, arguments, f"{tmp_path}/log.jsonl cannot be written", "No space", "kept")
    monkeypatch.undo()
    calft.main(arguments)
    assert [line["step"] for line in log(tmp_path)] == [0, 1, 2, 3]

@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_print_everything(clip, tmp_path, encoding):
    """Print what it can: names in other alphabets, and the table's sign for standard errors."""
    root = tmp_path / "корень"
    for name in ("train", "val", "эскиз"):
        write_images(root / name, ["a", "b"], 2)
    command = [sys.executable, f"{REPO}/evaluate.py", "--data", root, "--model", clip(),
               "--out", tmp_path / "out", "--workers", "0"]
    done = subprocess.run(command, env={**environment(), "PYTHONIOENCODING": encoding},
                          capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert b"?????" in done.stdout and b"top-1" in done.stdout

def test_fips(tmp_path, monkeypatch):
    """Hold val out where md5 is forbidden for security."""
    write_images(tmp_path / "train", ["a", "b"], 5)
    held = paths(read(tmp_path)[1]["val"])
    md5 = common.hashlib.md5
    def fips(data, usedforsecurity=True):
        if usedforsecurity:
            raise ValueError("disabled for FIPS")
        return md5(data)
    monkeypatch.setattr(common.hashlib, "md5", fips)
    assert paths(read(tmp_path)[1]["val"]) == held

# ---- evaluate.py ---------------------------------------------------------------------------------
def test_scores_survive_folders_that_cannot_be_written(tiny_root, clip, tmp_path, monkeypatch):
    """Find that out before scoring."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "score", lambda *a: pytest.fail("scored"))
    flags = ["--data", tiny_root, "--model", clip()]
    for given in (["--out", f"{tmp_path}/file"], ["--out", f"{tmp_path}/file/below"],
                  ["--out", f"{tmp_path}/out", "--predictions", f"{tmp_path}/file"]):
        fails(evaluate.main, [*flags, *given], f"{tmp_path}/file", "cannot be written")

def test_the_table_comes_before_files(tiny_root, clip, tmp_path, monkeypatch, capsys):
    """Print the table even if the disk is full by then."""
    write = common.write
    def full(path, content, **metadata):
        if str(path).endswith("results.json"):
            common.fail("full")
        write(path, content, **metadata)
    monkeypatch.setattr(common, "write", full)
    fails(evaluate.main, ["--data", tiny_root, "--model", clip(), "--out", f"{tmp_path}/o"], "full")
    assert "shift mean" in capsys.readouterr().out

def test_earlier_results_are_kept(tiny_root, clip, tmp_path, capsys):
    """Score a second model into the same --out: both are in results.json. Of other sets the old
    file gets another name."""
    out = tmp_path / "out"
    flags = ["--data", tiny_root, "--out", str(out), "--model"]
    evaluate.main([*flags, clip()])
    first = common.read_json(out / "results.json")
    evaluate.main([*flags, clip("resnet")])
    both = common.read_json(out / "results.json")
    title, = first
    assert len(both) == 2 and both[title] == first[title]
    evaluate.main([*flags, clip(), "--val", "sketch"])
    third = common.read_json(out / "results.json")
    assert list(third) == [title] and third != first
    kept, = out.glob("results-*.json")
    assert common.read_json(kept) == both
    assert f"it is kept as {kept.name}" in capsys.readouterr().out

def test_predictions_of_similar_titles(tiny_root, clip, tmp_path, monkeypatch):
    """Write a/b and a_b into two folders."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/b", "a_b"):
        link(clip().removeprefix("local-dir:"), tmp_path / name)
    evaluate.main(["--data", tiny_root, "--predictions", "p", "--out", "o",
                   "--model", "local-dir:a/b", "local-dir:a_b"])
    assert len([entry for entry in os.scandir("p") if entry.is_dir()]) == 2

def test_sigma_min_of_one_image():
    assert evaluate.sigma_min(torch.randn(1, 8)) == 0

def test_runs_as_models(tiny_root, clip, tmp_path):
    """Score the teacher of a run by its folder; a run that has not finished is named so."""
    run(calft, tiny_root, clip(), tmp_path / "run", steps=2)
    flags = ["--out", f"{tmp_path}/e", "--workers", "0", "--model"]
    evaluate.main([*flags, f"{tmp_path}/run/teacher"])
    assert list(common.read_json(tmp_path / "e" / "results.json")) == [f"{tmp_path}/run/teacher"]
    shutil.rmtree(tmp_path / "run" / "model")
    fails(evaluate.main, [*flags, f"{tmp_path}/run"], "has not finished")

# ---- anchor.py -----------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ["nowhere/{}.png\ttext", "a text\tp/{}.png",
                                 "https://example.com/{}.png\ttext"])
def test_a_pool_without_images(tiny_root, clip, tmp_path, monkeypatch, pool, row):
    """Try the first images before any feature is computed."""
    Path(pool).write_text("".join(row.format(i) + "\n" for i in range(30)))
    monkeypatch.setattr(common, "load_model", lambda *a: pytest.fail("too late"))
    fails(anchor.main, argv(tiny_root, clip(), tmp_path / "out", "--pool", pool), pool,
          "none of its first images can be read", "path<TAB>text")

def test_features_of_unreadable_images_are_computed_again(tiny_root, clip, tmp_path, pool):
    """Mend an unreadable image of the pool: its feature is computed by the next start, and no
    other."""
    path = Path(pool).parent / "p" / "7.png"
    whole = path.read_bytes()
    path.write_bytes(b"broken")
    out = tmp_path / "out"
    arguments = argv(tiny_root, clip(), out, "--pool", pool)
    anchor.main(arguments)
    broken = load_file(out / "features.safetensors")
    assert broken["pool"][:, 0].isnan().nonzero().flatten().tolist() == [7]
    path.write_bytes(whole)
    os.remove(out / "results.json")
    seen = []
    read_image = common.read_image
    with pytest.MonkeyPatch.context() as m:
        m.setattr(common, "read_image", lambda path: seen.append(path) or read_image(path))
        anchor.main(arguments)
    mended = load_file(out / "features.safetensors")
    assert not mended["pool"].isnan().any()
    readable = [row for row in range(23) if row != 7]
    assert torch.equal(mended["pool"][readable], broken["pool"][readable])
    run(anchor, tiny_root, clip(), tmp_path / "fresh", "--pool", pool)
    fresh = load_file(tmp_path / "fresh" / "features.safetensors")
    torch.testing.assert_close(mended["pool"], fresh["pool"], rtol=0, atol=1e-3)

@pytest.mark.parametrize("old, new", [("train/", "./train/"), ("train/", "train//"),
                                      ("train/cat/", "train/dog/../cat/")])
def test_paths_of_captions(tiny_root, captions, old, new):
    """Find the same image by another way to write its path."""
    train, _ = read(tiny_root)
    expected = anchor.read_captions(captions, train, tiny_root)
    Path(captions).write_text(Path(captions).read_text().replace(old, new))
    assert anchor.read_captions(captions, train, tiny_root) == expected

# ---- a busy machine ------------------------------------------------------------------------------
def test_threads_that_wait_sleep():
    """Import a script: the policy is set before libgomp is loaded, which reads it once. So each
    program imports common before torch, and numpy's friends."""
    given = environment()
    del given["OMP_WAIT_POLICY"]
    code = "import calft, torch; torch.ones(8).sum()"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=REPO,
                          env={**given, "OMP_DISPLAY_ENV": "true"})
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr, done.stderr
    for name in ("calft", "carft", "anchor", "evaluate", "tests/toy", "tests/loops"):
        lines = Path(REPO, f"{name}.py").read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        third_party = [module for module in imports if module.split(".")[0] in ("torch", "numpy")]
        assert imports.index("common") < imports.index(third_party[0])

@pytest.mark.parametrize("local, threads, workers", [(1, 8, 0), (1, 2, 6), (2, 1, 3), (8, 1, 0)])
def test_workers_and_threads_share_the_cores(monkeypatch, local, threads, workers):
    """Give a process its share of the cores that it may use: threads and loaders together."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert common.make_parser("", "out").get_default("workers") == workers
    monkeypatch.setattr(common, "DEVICE", torch.device("meta"))
    assert common.make_parser("", "out").get_default("workers") == 8 // local
