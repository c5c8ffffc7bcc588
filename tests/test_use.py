# SPDX-License-Identifier: MIT
"""Test what runs are for: heads without a text tower, the classes of pictures that nobody labelled,
training on a few images a class, and scores of uneven classes. Images of 32 x 32 pixels are not
resized, so open_clip's own transform gives the same numbers as ours."""
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

import anchor
import calft
import carft
import common
import evaluate
from conftest import (CLASSES, REPO, argv, environment, fails, parse, run, weights, write_images)

SCRIPTS = {"calft": (calft,), "carft": (carft,), "anchor": (anchor, "--cap=0", "--ret=0")}
NAMES = ["ant", "bee", "cat", "dog", "sea eel"]

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a ROOT of five classes: train, val, a shift, and one that lacks classes."""
    root = tmp_path_factory.mktemp("use") / "root"
    for seed, (name, count) in enumerate({"train": 8, "val": 5, "sketch": 7}.items()):
        write_images(root / name, CLASSES, count, seed, size=(32, 32))
    write_images(root / "few", CLASSES[1:4], 6, 3, size=(32, 32))
    (root / "templates.txt").write_text("a photo of a {}.\na sketch of the {}.\n")
    return root

@pytest.fixture(scope="module")
def runs(root, clip, tmp_path_factory):
    """Tune a model by each script. Return {script: folder of the run}."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (script, *flags) in SCRIPTS.items():
        run(script, root, clip(tau=40), folder / name, "--lr", "2e-3", *flags)
    return {name: str(folder / name) for name in SCRIPTS}

def score(out, *flags):
    """Run evaluate.py on one model. Return its scores by set, and what --predictions wrote of each
    set."""
    evaluate.main(["--out", f"{out}/e", "--predictions", f"{out}/p", "--workers", "0", *flags])
    column, = common.read_json(f"{out}/e/results.json").values()
    return column["sets"], {file.stem: np.load(file) for file in Path(out).glob("p/*/*.npz")}

def probabilities(out, paths, T=1):
    """Return softmax(exp(logit_scale) u W_cls^T / T) (n, K) of pictures, by a run's image tower and
    its head.safetensors. No text tower is made, and no tokenizer."""
    visual = open_clip.create_model(f"local-dir:{out}/model", load_weights=False).visual.eval()
    tower = {name.removeprefix("visual."): weight for name, weight in weights(out).items()
             if name.startswith("visual.")}
    visual.load_state_dict(tower)
    transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    head = load_file(f"{out}/head.safetensors")
    with torch.no_grad():
        u = visual(torch.stack([transform(Image.open(path)) for path in paths]))
        u = u / u.norm(dim=1, keepdim=True)
        return (head["logit_scale"].exp() * u @ head["W_cls"].T / T).softmax(1)

# ---- heads ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_head_needs_no_text_tower(runs, tmp_path, name):
    """Classify val by the image tower and head.safetensors alone: they give the run's own scores
    and evaluate.py's confidences, or the file is of no use to a program without a text tower."""
    with safe_open(f"{runs[name]}/head.safetensors", "pt") as f:
        about = {key: json.loads(value) for key, value in f.metadata().items()}
        assert sorted(f.keys()) == ["W_cls", "logit_scale"]
        assert f.get_tensor("W_cls").shape == (5, 24)
    assert about == {"classes": CLASSES, "classnames": NAMES, "is_trained": name == "carft"}
    _, said = score(tmp_path, "--model", runs[name])
    p = probabilities(runs[name], said["val"]["path"])
    np.testing.assert_allclose(p.amax(1), said["val"]["confidence"], rtol=0, atol=1e-5)
    assert p.argmax(1).tolist() == said["val"]["prediction"].tolist()
    assert p.amax(1).std() > 0.01                           # otherwise any head would do
    nll = -p[torch.arange(len(p)), said["val"]["label"]].log().mean().item()
    of_run = common.read_json(f"{runs[name]}/results.json")["sets"]["val"]
    assert nll == pytest.approx(of_run["nll"], abs=1e-5)

@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("file", ["templates.txt", "classnames.txt"])
def test_only_a_trained_head_outlives_other_texts(root, runs, tmp_path, name, file):
    """Score runs on a ROOT whose texts have changed: the head that carft.py trained stays what it
    is, and any other is computed anew by the text tower. A zero-shot head read from a file would
    hide that the prompts are others."""
    before, _ = score(tmp_path / "a", "--model", runs[name])
    shutil.copytree(root, tmp_path / "root")
    text = {"templates.txt": "{}\n", "classnames.txt": "ant\ta large green ant\nbee\tzebra\n"}
    (tmp_path / "root" / file).write_text(text[file])
    after, said = score(tmp_path / "b", "--model", runs[name], "--data", f"{tmp_path}/root")
    if name == "carft":
        assert after == before
        return
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{runs[name]}/model")
    names = NAMES
    templates = ["a photo of a {}.", "a sketch of the {}."]
    if file == "templates.txt":
        templates = ["{}"]
    else:
        names = ["a large green ant", "zebra", *NAMES[2:]]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{runs[name]}/model")
    W = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, names, templates)
    x = torch.stack([transform(Image.open(path)) for path in said["val"]["path"]])
    with torch.no_grad():
        p = (model.logit_scale.exp() * model.encode_image(x, normalize=True) @ W).softmax(1)
    np.testing.assert_allclose(p.amax(1), said["val"]["confidence"], rtol=0, atol=1e-5)
    assert after["val"]["nll"] != pytest.approx(before["val"]["nll"], rel=1e-3)

def put_head(out, **about):
    """Write a head of two swapped classes into a run's folder, and return the one it had."""
    with safe_open(f"{out}/head.safetensors", "pt") as f:
        old = f.metadata()
        head = {key: f.get_tensor(key) for key in f.keys()}
    W_cls = head["W_cls"].clone()
    head["W_cls"] = W_cls[[1, 0, 2, 3, 4]]
    common.write(f"{out}/head.safetensors", head, **{**old, **about})
    return W_cls

def test_a_teacher_never_has_its_students_head(root, runs, tmp_path):
    """Put a trained head into the folder of a run with a teacher: it classifies the images of the
    student, and none of the teacher. --predict has no head for a teacher, and says so."""
    out = tmp_path / "run"
    shutil.copytree(runs["calft"], out)
    before, _ = score(tmp_path / "a", "--model", f"{out}/teacher")
    student, _ = score(tmp_path / "b", "--model", f"{out}")
    put_head(out, is_trained="true")
    assert score(tmp_path / "c", "--model", f"{out}/teacher")[0] == before
    assert score(tmp_path / "d", "--model", f"{out}")[0]["val"]["nll"] != student["val"]["nll"]
    fails(evaluate.main, ["--model", f"{out}/teacher", "--predict", str(root)], "--predict",
          "head.safetensors")

def test_wise_mixes_the_head_of_the_file(root, runs, clip, tmp_path):
    """Swap two rows of a trained head, and mix it with the zero-shot head by hand: --wise takes the
    file's head, at the weight of the tower's."""
    out = tmp_path / "run"
    shutil.copytree(runs["carft"], out)
    tuned_head = put_head(out)[[1, 0, 2, 3, 4]]
    _, said = score(tmp_path, "--model", f"{out}", "--wise", "0.75")
    base, _, transform = open_clip.create_model_and_transforms(clip(tau=40))
    tokenizer = open_clip.get_tokenizer(clip(tau=40))
    templates = ["a photo of a {}.", "a sketch of the {}."]
    W = open_clip.build_zero_shot_classifier(base.eval(), tokenizer, NAMES, templates)
    head = 0.25 * W + 0.75 * tuned_head.T
    tuned = weights(out)
    base.load_state_dict({name: 0.25 * w + 0.75 * tuned[name]
                          for name, w in base.state_dict().items()})
    x = torch.stack([transform(Image.open(path)) for path in said["val"]["path"]])
    with torch.no_grad():
        p = (base.logit_scale.exp() * base.encode_image(x, normalize=True) @ head).softmax(1)
    np.testing.assert_allclose(p.amax(1), said["val"]["confidence"], rtol=0, atol=1e-5)

# ---- the classes of pictures ---------------------------------------------------------------------
def predict(capsys, *flags):
    """Run evaluate.py --predict. Return the rows of the CSV on stdout, as {column: value} but for
    runners-up, [(class, confidence), ...] by path, and what is on stderr."""
    capsys.readouterr()
    evaluate.main(["--workers", "0", *flags])
    out, error = capsys.readouterr()
    header, *rows = csv.reader(io.StringIO(out, newline=""))
    assert header == ["path", *["class", "confidence"] * (len(header) // 2)]
    assert all(len(row) == len(header) for row in rows)
    found = {}
    for path, *cells in rows:
        assert path not in found
        found[path] = list(zip(cells[::2], map(float, cells[1::2])))
    return found, error

@pytest.mark.parametrize("name", SCRIPTS)
def test_predict_is_scoring(root, runs, tmp_path, capsys, name):
    """Compare the CSV with a softmax by hand, and with what scoring val says of the same images.
    The run's ROOT, its last.pt, and the name of the folder that the images lie in do not count."""
    _, said = score(tmp_path, "--model", runs[name])
    out = tmp_path / "run"
    shutil.copytree(runs[name], out)
    (out / "last.pt").unlink()
    common.write(out / "args.json", {**common.read_json(out / "args.json"), "data": "/gone"})
    found, _ = predict(capsys, "--model", str(out), "--predict", f"{root}/val", "--top", "5")
    assert list(found) == said["val"]["path"].tolist()
    p = probabilities(out, found)
    for best, expected, confidence in zip(found.values(), p, said["val"]["confidence"]):
        assert dict(best) == pytest.approx(dict(zip(NAMES, expected.tolist())), abs=1e-5)
        shown = [x for _, x in best]
        assert shown == sorted(shown, reverse=True)
        assert shown[0] == pytest.approx(confidence, abs=1e-5)
    first, _ = predict(capsys, "--model", str(out), "--predict", f"{root}/val", "--batch-size", "4")
    assert list(first) == list(found)
    for path, ((c, confidence),) in first.items():          # of one class
        assert (c, pytest.approx(confidence, abs=2e-6)) == found[path][0]
    file = f"{root}/val/ant/0.png"
    every, _ = predict(capsys, "--model", str(out), "--predict", file, "--top", "9")
    assert list(every) == [file]
    assert dict(every[file]) == pytest.approx(dict(found[file]), abs=2e-6)

def test_predict_at_a_fitted_temperature(root, runs, tmp_path, capsys):
    """Divide the logits by the T that scoring fits on val of the run's ROOT."""
    flags = ["--model", runs["carft"], "--fit-temperature", "--workers", "0"]
    evaluate.main([*flags, "--out", f"{tmp_path}/e"])
    *_, at_T = common.read_json(tmp_path / "e" / "results.json").values()
    assert at_T["temperature"] != pytest.approx(1, abs=0.1)
    found, error = predict(capsys, *flags, "--predict", f"{root}/sketch", "--top", "5")
    assert f"{at_T['temperature']:<8.3g} T of {runs['carft']}\n" in error
    p = probabilities(runs["carft"], found, at_T["temperature"])
    for best, expected in zip(found.values(), p, strict=True):
        assert dict(best) == pytest.approx(dict(zip(NAMES, expected.tolist())), abs=1e-4)

def test_a_folder_of_anything(runs, tmp_path, capsys, monkeypatch):
    """Predict a folder as cameras leave it: pictures at any depth are named as they were given, and
    what cannot be read is named on stderr. Hidden files count only where they are named."""
    monkeypatch.chdir(tmp_path)
    write_images("p", ["", "2024/may", "2024/.thumbs", ".hidden"], 2)
    shutil.copy("p/0.png", "p/2024/SHOUTING.PNG")
    shutil.copy("p/0.png", "p/.secret.png")
    shutil.copy("p/0.png", "no-suffix")
    Path("p/2024/broken.jpg").write_bytes(b"no image")
    Path("p/2024/empty.png").touch()
    Path("p/2024/notes.txt").write_text("no image")
    os.symlink("gone.png", "p/dangling.png")
    os.symlink("..", "p/2024/loop")
    given = ["p", "p/.secret.png", "no-suffix", "p/2024/notes.txt"]
    found, error = predict(capsys, "--model", runs["carft"], "--predict", *given)
    assert sorted(found) == sorted([
        "p/0.png", "p/1.png", "p/2024/SHOUTING.PNG", "p/2024/may/0.png", "p/2024/may/1.png",
        "p/.secret.png", "no-suffix"])
    named = [line for line in error.splitlines() if line.startswith("skipped, not readable: ")]
    assert sorted(line.split(": ")[1] for line in named) == [
        "p/2024/broken.jpg", "p/2024/empty.png", "p/2024/notes.txt", "p/dangling.png"]

def test_file_names_that_a_csv_must_quote(runs, tmp_path, capsysbinary):
    """Read the CSV back: a comma, a quote, a line break and a byte that is not UTF-8 in a file name
    neither end the program nor move a cell."""
    names = [b"a, b.png", b'c "d".png', b"e\nf.png", b"g \xff.png"]
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "png")
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(picture.getvalue())
    evaluate.main(["--model", runs["carft"], "--workers", "0", "--predict", str(tmp_path)])
    out = capsysbinary.readouterr().out.decode(errors="replace")
    header, *rows = csv.reader(io.StringIO(out, newline=""))
    assert len({(name, confidence) for _, name, confidence in rows}) == 1
    assert [os.path.basename(path) for path, _, _ in rows[:3]] == [n.decode() for n in names[:3]]
    last, = (path for path, _, _ in rows[3:])
    assert last.startswith(f"{tmp_path}/g ") and last.endswith(".png")

def test_stdout_is_the_csv_alone(root, runs, capsys, monkeypatch):
    """Send every message to stderr: those of a start by Slurm, of reading ROOT and of T too, so
    that > keeps a file that can be read."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    flags = ["--model", runs["calft"], "--fit-temperature", "--predict", f"{root}/few/bee/0.png"]
    found, error = predict(capsys, *flags)
    assert list(found) == [f"{root}/few/bee/0.png"]
    for message in ("warning: Slurm", "reading the image folders of", " T of "):
        assert message in error

def test_head_of_the_csv(root, runs):
    """Read one line of the CSV and leave, as `| head -1` does: the program ends without a
    traceback."""
    command = [sys.executable, "-u", "evaluate.py", "--model", runs["carft"], "--workers", "0",
               "--batch-size", "1", "--predict", str(root)]
    process = subprocess.Popen(command, cwd=REPO, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("path,class,confidence")
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() != 0
    assert "Traceback" not in error and "BrokenPipe" not in error, error

def test_a_large_folder_fills_no_memory(runs, tmp_path, capsys, monkeypatch):
    """Predict 400 files, one of eight of which is broken, in batches of 16: the rows of a batch are
    written before the next is read, and no more than two batches are in memory at a time."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for i in range(400):
        (tmp_path / f"{i:03d}.png").write_bytes(b"broken" if i % 8 == 3 else picture.getvalue())
    read = common.read_image
    to_input = common.to_input
    n_read = []
    n_done = []
    alive = weakref.WeakSet()
    def count_reads(path):
        n_read.append(path)
        return read(path)

    def count_batches(model, images):
        assert len(images) == 16
        alive.add(images)
        assert len(alive) <= 2
        out, error = capsys.readouterr()
        n_done.append(out.count(str(tmp_path)) + error.count("skipped, not readable: "))
        assert len(n_read) - sum(n_done) <= 16
        return to_input(model, images)
    monkeypatch.setattr(common, "read_image", count_reads)
    monkeypatch.setattr(common, "to_input", count_batches)
    evaluate.main(["--model", runs["carft"], "--workers", "0", "--batch-size", "16",
                   "--predict", str(tmp_path)])
    out, error = capsys.readouterr()
    n_done.append(out.count(str(tmp_path)) + error.count("skipped, not readable: "))
    assert n_done == [0] + 25 * [16]

def test_what_predict_refuses(root, runs, clip, tmp_path, monkeypatch):
    """Say in one line what --predict cannot do. A header without rows, or the answer of another
    model than the one asked for, would pass for a result."""
    out = runs["carft"]
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    def refuses(flags, *words):
        fails(evaluate.main, ["--workers", "0", *flags], *words)
    refuses(["--predict", str(root), "--model", clip()], "--predict", "run")
    refuses(["--predict", str(root), "--model", "ViT-B-32"], "--predict", "run")
    refuses(["--predict", str(root)], "--predict", "run")
    refuses(["--predict", str(root), "--model", out, runs["calft"]], "one run")
    refuses(["--predict", str(root), "--model", out, clip()], "one run")
    refuses(["--predict", f"{tmp_path}/none", "--model", out], f"{tmp_path}/none is neither")
    refuses(["--predict", f"{tmp_path}/empty", "--model", out], f"{tmp_path}/empty")
    refuses(["--predict", str(root), f"{tmp_path}/empty", "--model", out], f"{tmp_path}/empty")
    refuses(["--predict", str(root), "--model", out, "--top", "0"], "--top 0")
    refuses(["--predict", str(root), "--model", out, "--wise", "0.5"], "--wise")
    shutil.copytree(out, tmp_path / "old")
    (tmp_path / "old" / "head.safetensors").unlink()
    refuses(["--predict", str(root), "--model", f"{tmp_path}/old"], "head.safetensors")
    scandir = os.scandir
    def locked(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    refuses(["--predict", f"{root}/val", "--model", out], "val/bee", "Permission denied")

def test_a_temperature_needs_the_root_of_the_run(clip, tmp_path):
    """Refuse a T where the run's ROOT is gone, has other classes now, or where other images are
    held out as val than the run was not tuned on."""
    write_images(tmp_path / "root" / "train", ["cat", "dog"], 10, size=(32, 32))
    run(carft, tmp_path / "root", clip(), tmp_path / "run", steps=1)
    picture = f"{tmp_path}/root/train/cat/0.png"
    flags = ["--workers", "0", "--fit-temperature", "--model", f"{tmp_path}/run", "--predict"]
    evaluate.main([*flags, picture])
    fails(evaluate.main, [*flags, picture, "--seed", "1"], "seed 0")
    write_images(tmp_path / "other" / "train", ["cat", "hen"], 10, size=(32, 32))
    fails(evaluate.main, [*flags, picture, "--data", f"{tmp_path}/other"], "other classes")
    write_images(tmp_path / "root" / "train", ["owl"], 10, size=(32, 32))
    fails(evaluate.main, [*flags, picture], f"{tmp_path}/root has other classes")
    shutil.move(tmp_path / "root", tmp_path / "moved")
    picture = f"{tmp_path}/moved/train/cat/0.png"
    fails(evaluate.main, [*flags, picture], f"{tmp_path}/root/train cannot be read")
    evaluate.main([*flags[:2], *flags[3:], picture])        # without a T it needs no ROOT

# ---- few images a class --------------------------------------------------------------------------
def read(root, *flags):
    """Return the files that are trained on, {class: set of names}, and those of val, both of a ROOT
    as the training scripts read it."""
    train, sets = common.read_data(parse("--data", str(root), *flags))
    found = []
    for images in (train, sets[0]):
        names = {c: set() for c in images.classes}
        for path, label in zip(images.paths, images.labels, strict=True):
            c, name = os.fsdecode(path).split("/")[-2:]
            assert c == images.classes[label] and name not in names[c]
            names[c].add(name)
        found.append(names)
    return found

def test_shots_are_the_first_of_the_order_that_val_frac_has(tmp_path, capsys):
    """Draw by the hash of names, so that 4 shots are among the 8 and one file more moves one of
    them: otherwise curves over shots compare different images. val is held out before, so it is
    the same for any number of shots."""
    write_images(tmp_path, ["train/a", "train/b"], 20, size=(2, 2))
    whole, val = read(tmp_path)
    drawn = {}
    for shots in (1, 4, 8):
        drawn[shots], of_val = read(tmp_path, "--shots", str(shots))
        assert of_val == val
        for c in "ab":
            assert len(drawn[shots][c]) == shots
            assert drawn[shots][c] < whole[c]
            assert not drawn[shots][c] & val[c]
    for c in "ab":
        assert drawn[1][c] < drawn[4][c] < drawn[8][c]
        # 0.2 of 20 are 4 for val; 0.4 are 4 more, the first of the rest.
        assert drawn[4][c] == read(tmp_path, "--val-frac", "0.4")[1][c] - val[c]
    assert "warning: --shots" not in capsys.readouterr().out
    shutil.copytree(tmp_path / "train", tmp_path / "val")   # now nothing is held out
    for c in "ab":
        assert read(tmp_path, "--shots", "4")[0][c] == val[c]
    assert read(tmp_path, "--shots", "4", "--seed", "1")[0] != val
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "train/a/more.png")
    more = read(tmp_path, "--shots", "4")[0]["a"]
    assert len(more) == 4 and len(more - val["a"]) <= 1

def test_fewer_images_than_shots(tmp_path, capsys):
    """Train on all images of a class that has fewer, with one line for all such classes."""
    for c, count in {"a": 3, "b": 5, "c": 9, "d": 4}.items():
        write_images(tmp_path / "train", [c], count, size=(2, 2))
    write_images(tmp_path / "val", "abcd", 1, size=(2, 2))
    train, _ = read(tmp_path, "--shots", "5")
    assert [len(names) for names in train.values()] == [3, 5, 5, 4]
    warned = [line for line in capsys.readouterr().out.splitlines() if "--shots" in line]
    assert len(warned) == 1
    assert warned[0].startswith("warning: --shots 5: 2 classes have fewer images, such as a")
    train, _ = read(tmp_path, "--shots", "0")               # all
    assert [len(names) for names in train.values()] == [3, 5, 9, 4]

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_of_few_shots(clip, tmp_path, monkeypatch, name):
    """Train on the shots and nothing else, and score the run on the val that it held out. args.json
    says how many they were; another number is another run."""
    script, *flags = SCRIPTS[name]
    write_images(tmp_path / "root" / "train", "ab", 10, size=(32, 32))
    expected, _ = read(tmp_path / "root", "--shots", "4")
    seen = set()
    loader = common.train_loader
    def spy(images, *args):
        for batch in loader(images, *args):
            seen.update(os.fsdecode(images.paths[row])[-7:] for row in batch[2])
            yield batch
    monkeypatch.setattr(common, "train_loader", spy)
    results = run(script, tmp_path / "root", clip(), tmp_path / "run", "--shots", "4", *flags)
    assert seen == {f"{c}/{name}" for c in "ab" for name in expected[c]}
    assert common.read_json(tmp_path / "run" / "args.json")["shots"] == 4
    ours, said = score(tmp_path, "--model", f"{tmp_path}/run")
    assert ours["val"]["n"] == 4
    assert ours["val"]["nll"] == pytest.approx(results["sets"]["val"]["nll"], rel=1e-5)
    assert not seen & {path[-7:] for path in said["val"]["path"]}
    again = argv(tmp_path / "root", clip(), tmp_path / "run", *flags)
    for shots in (["--shots", "5"], []):
        fails(script.main, [*again, *shots], "other settings", "shots 4")

def test_captions_of_images_that_are_no_shots(tmp_path, root, clip, captions):
    """Train ARF on shots with the captions of the whole training set: those of other images do not
    count."""
    run(anchor, root, clip(), tmp_path / "run", "--captions", captions, "--shots", "4", steps=1)

# ---- scores of uneven classes --------------------------------------------------------------------
def naive(labels, predictions):
    """Return the mean recall and the mean F1 of the classes that the labels have, image by
    image."""
    recalls = []
    f1s = []
    for k in sorted(set(labels)):
        both = [(y == k, p == k) for y, p in zip(labels, predictions, strict=True)]
        hits = both.count((True, True))
        recall = hits / (hits + both.count((True, False)))
        precision = 0
        if hits:
            precision = hits / (hits + both.count((False, True)))
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0)
    return {"mean_per_class": sum(recalls) / len(recalls), "macro_f1": sum(f1s) / len(f1s)}

def uneven(n, K, g):
    """Return logits (n, K) and labels (n,) of uneven classes, half of which are right."""
    labels = (torch.rand(n, generator=g).square() * K).long()
    logits = torch.randn(n, K, generator=g)
    logits[torch.arange(n), labels] += 1.5
    return logits, labels

def test_macro_scores_are_torchmetrics():
    """Compare with torchmetrics where every class has an image, some of them many more."""
    logits, labels = uneven(2000, 12, torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=12)
    assert 20 < counts.min() < counts.max() / 3
    ours = common.scores(logits, labels)
    recall = multiclass_accuracy(logits, labels, 12, average="macro")
    f1 = multiclass_f1_score(logits, labels, 12, average="macro")
    assert ours["mean_per_class"] == pytest.approx(recall.item(), rel=1e-6)
    assert ours["macro_f1"] == pytest.approx(f1.item(), rel=1e-6)
    assert len({round(ours[key], 3) for key in ("top1", "mean_per_class", "macro_f1")}) == 3

def test_classes_without_images_do_not_count():
    """Average over the classes that the labels have, as WILDS does. Predictions of a class without
    images are wrong, and lower no mean but by that."""
    g = torch.Generator().manual_seed(1)
    for n, K in ((7, 9), (60, 30), (300, 40)):
        logits, labels = uneven(n, K, g)
        labels[labels == 2] = 0
        predictions = logits.argmax(1)
        assert set(predictions.tolist()) - set(labels.tolist())
        ours = common.scores(logits, labels)
        expected = naive(labels.tolist(), predictions.tolist())
        assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-12)
        is_there = labels.bincount(minlength=K) > 0
        recall = multiclass_accuracy(logits, labels, K, average="none")[is_there].mean()
        assert ours["mean_per_class"] == pytest.approx(recall.item(), rel=1e-6)
    ours = common.scores(torch.eye(5)[[1, 1, 3]], torch.tensor([0, 0, 2]))          # none right
    assert (ours["mean_per_class"], ours["macro_f1"]) == (0, 0)

def test_results_have_the_macro_scores_of_each_set(root, runs, tmp_path):
    """Count the files of --predictions image by image: results.json of a run, of its untuned model
    and of evaluate.py have the same means, for sets with and without all classes."""
    ours, said = score(tmp_path, "--model", runs["carft"])
    of_run = common.read_json(f"{runs['carft']}/results.json")
    assert sorted(said) == sorted(ours) == ["few", "sketch", "val"]
    for name, s in ours.items():
        expected = naive(said[name]["label"].tolist(), said[name]["prediction"].tolist())
        assert {key: s[key] for key in expected} == pytest.approx(expected, abs=1e-9)
        assert {key: of_run["sets"][name][key] for key in expected} == pytest.approx(expected)
        assert 0 <= of_run["zero_shot"]["sets"][name]["macro_f1"] <= 1

def test_mean_of_any_metric(tmp_path, capsys):
    """Print other columns of --mean by --metric. A name that no results.json has ends in one line,
    as an empty column would be taken for a failure of the runs."""
    values = {"a": (0.1, 0.2, 0.3, 0.4), "b": (0.2, 0.25, 0.5, 0.46)}
    keys = ["top1", "ece", "mean_per_class", "macro_f1"]
    for name, numbers in values.items():
        sets = {"val": {"n": 9, "head": "all", **dict(zip(keys, numbers))}}
        mean = dict(zip(keys[:2], numbers))
        common.write(tmp_path / name / "results.json", {"sets": sets, "shift_mean": mean})
    expected = {"top1": "15.00 ±7.1", "ece": "22.50 ±3.5", "mean_per_class": "40.00 ±14.1",
                "macro_f1": "43.00 ±4.2"}
    def show(*flags):
        evaluate.main(["--mean", f"{tmp_path}/a", f"{tmp_path}/b", *flags])
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for shown, flags in ((["top1", "ece"], []),
                         (["macro_f1", "mean_per_class"],
                          ["--metric", "macro_f1", "mean_per_class"]),
                         (["ece", "macro_f1"], ["--metric", "ece", "macro_f1"])):
        of_val = " ".join(expected[key] for key in shown)
        of_shifts = " ".join(expected[key] for key in shown if key in keys[:2])
        title, header, *lines = show(*flags)
        assert title.startswith("2 runs")
        assert header == " ".join(["set", *shown])
        assert lines == [f"val {of_val}", f"shift mean {of_shifts}".strip()]
    for unknown in ("mean_per_clas", "head", "top-1"):
        with pytest.raises(SystemExit, match=rf"^error: .*{unknown}.*\Z"):
            show("--metric", "top1", unknown)
