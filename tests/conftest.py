# SPDX-License-Identifier: MIT
"""Tiny roots and tiny CLIPs for the tests."""
import os
import sys

# Before torch is imported: threads that wait should sleep, and so do those of child processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# All tests run on the CPU. Only test_cuda.py, named alone, has the card.
named = [argument.split("::")[0] for argument in sys.argv[1:]]
if {os.path.basename(path) for path in named if os.path.exists(path)} != {"test_cuda.py"}:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import functools
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, REPO)
import common  # noqa: E402

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "timm": {"image_size": 32, "timm_model_name": "test_resnet"},
    "attention-pool": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map",
                       "timm_proj": "none"}}
CLASSES = ["ant", "bee", "cat", "dog", "sea_eel"]
BASE = "--batch-size 8 --lr 1e-3 --warmup 2 --epochs 100 --workers 0 --log-every 1".split()

def write_clip(path, kind="vit", seed=0, custom_text=False, tau=None):
    """Write a random CLIP as a local-dir, and return its name for --model. tau is its temperature,
    exp(logit_scale); None: open_clip's 1 / 0.07."""
    config = {"embed_dim": 24, "vision_cfg": VISION[kind], "text_cfg": TEXT,
              "custom_text": custom_text}
    if kind == "attention-pool":
        config["embed_dim"] = 64
    os.makedirs(path, exist_ok=True)
    about = {"model_cfg": config, "preprocess_cfg": {"size": VISION[kind]["image_size"]}}
    Path(path, "open_clip_config.json").write_text(json.dumps(about))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    for p in model.parameters():                            # layers of zeros would hide faults
        if p.ndim > 0 and not p.detach().any():
            torch.nn.init.normal_(p, std=0.1)
    if tau is not None:
        torch.nn.init.constant_(model.logit_scale, math.log(tau))
    save_file(model.state_dict(), f"{path}/open_clip_model.safetensors")
    return f"local-dir:{path}"

def write_images(folder, classes, count=3, seed=0, size=(40, 36)):
    """Write folder/<class>/<i>.png of size (H, W), each class in a colour of its own."""
    rng = np.random.default_rng(seed)
    for k, c in enumerate(classes):
        os.makedirs(os.path.join(folder, c), exist_ok=True)
        for i in range(count):
            pixels = np.array([37 * k, 91 * k, 150 * k]) % 256 + rng.normal(0, 40, (*size, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(f"{folder}/{c}/{i}.png")

def argv(root, model, out, *flags, steps=4):
    """Return the flags of a run of a few steps on a tiny root, by BASE's recipe."""
    return ["--data", str(root), "--model", model, "--out", str(out), "--max-steps", str(steps),
            *BASE, *flags]

def parse(*flags):
    """Return the args of a training script with BASE's recipe, as its main() has them."""
    parser = common.make_train_parser("test", "about", "out", 1e-3)
    return common.fill_in(*common.given_flags(parser, [*BASE, *flags]))

def run(script, root, model, out, *flags, steps=4):
    """Run a few steps of a script on a tiny root, and return its results.json."""
    script.main(argv(root, model, out, *flags, steps=steps))
    return common.read_json(f"{out}/results.json")

def weights(out, which="model"):
    """Return {name: tensor} of the model that a run exported."""
    return load_file(f"{out}/{which}/open_clip_model.safetensors")

def log(out, epochs=False):
    """Return the lines of log.jsonl without their timings: those of steps, or those of val."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if ("val_top1" in line) == epochs]
    return [{k: line[k] for k in line if k != "images_per_s"} for line in lines]

def fails(main, arguments, *words):
    """Assert that main ends the program with one line that has all the words."""
    with pytest.raises(SystemExit, match=r"^error: .*\Z") as e:
        main(arguments)
    assert all(word in e.value.code for word in words), e.value.code

def content(folder):
    """Return {path: bytes} of all files with a suffix in a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()}

def environment():
    """Return the environment of a process that rounds as this one does: on as many threads."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}

def torchrun(n):
    """Return the command that starts n processes of a script."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n),
            "--master_port", str(20000 + os.getpid() % 20000)]

def assert_processes_are_one(script, root, model, tmp_path, *flags, steps=5, program=None):
    """Assert that two processes of torchrun have the gradients, the losses and the table of one
    process at the same global batch. Return the command of the two, whose --out is
    tmp_path / "two". program is a file to run instead of the script's own."""
    if program is None:
        program = f"{REPO}/{script.__name__}.py"
    run(script, root, model, tmp_path / "one", *flags, steps=steps)
    arguments = argv(root, model, tmp_path / "two", *flags, steps=steps)
    command = [*torchrun(2), program, *arguments]
    subprocess.run(command, env=environment(), check=True)
    lines = []
    tables = []
    averages = []                                           # Adam's, over all steps' gradients
    for out in (tmp_path / "one", tmp_path / "two"):
        lines.append(log(out) + log(out, epochs=True))
        tables.append(common.read_json(out / "results.json")["sets"])
        state = torch.load(out / "last.pt", weights_only=True)["optimizer"]["state"]
        averages.append([state[k]["exp_avg"] for k in state])
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    for name, s in tables[0].items():
        other = tables[1][name]
        assert s["n"] == other["n"] and abs(s["top1"] - other["top1"]) <= 0.005
        assert s["nll"] == pytest.approx(other["nll"], rel=1e-3)
    whole = torch.stack([a.norm() for a in averages[0]]).norm()
    for a, b in zip(*averages, strict=True):
        assert (a - b).norm() <= 1e-4 * (a.norm() + 1e-3 * whole)
    return command

def assert_same_run(a, b, *exports):
    """Assert that two runs have the same log, results and exported weights, bit for bit."""
    assert log(a) == log(b)
    assert log(a, epochs=True) == log(b, epochs=True)
    assert common.read_json(f"{a}/results.json") == common.read_json(f"{b}/results.json")
    for which in ("model", *exports):
        ours = weights(a, which)
        theirs = weights(b, which)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)

@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Return clip(kind, ...), which returns the name of a tiny random CLIP of write_clip's."""
    return functools.cache(lambda *a, **kw: write_clip(tmp_path_factory.mktemp("clip"), *a, **kw))

@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """Write a ROOT of five classes: train, val, a shift, one of some classes, a set of others."""
    root = str(tmp_path_factory.mktemp("tiny") / "root")
    write_images(f"{root}/train", CLASSES, 8, 1)
    write_images(f"{root}/val", CLASSES, 3, 2)
    write_images(f"{root}/sketch", CLASSES, 3, 3)
    write_images(f"{root}/few", ["bee", "dog", "sea_eel"], 3, 4)
    write_images(f"{root}/other", ["bee", "fox", "hen"], 3, 5)
    Path(root, "templates.txt").write_text("a photo of a {}.\na sketch of the {}.\nart of a {}.\n")
    return root

@pytest.fixture
def captions(tmp_path):
    """Write captions of the training images: two of the first of each class, one of the others."""
    rows = [f"{c}/{i}.png\tone {c} number {i} in the garden" for c in CLASSES for i in range(8)]
    rows += [f"{c}/0.png\tanother view of the {c}" for c in CLASSES]
    (tmp_path / "captions.tsv").write_text("\ntrain/".join(["path\tcaption", *rows]) + "\n")
    return str(tmp_path / "captions.tsv")

@pytest.fixture
def pool(tmp_path):
    """Write a pool of 23 image-text pairs as a TSV, and return its path."""
    write_images(tmp_path / "pool", ["p"], 23, seed=9)
    path = tmp_path / "pool" / "pool.tsv"
    path.write_text("path\ttext\n" + "".join(f"p/{i}.png\tpool picture {i}\n" for i in range(23)))
    return str(path)
