# SPDX-License-Identifier: MIT
"""Tiny roots and tiny CLIPs for the tests; ../shared/data is used where it is there."""
import json
import os
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
SHARED = os.path.join(os.path.dirname(REPO), "shared", "data")
sys.path[:0] = [REPO, HERE]
import common  # noqa: E402

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    "timm": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
    "attention-pool": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
}


def write_clip(path, kind="vit", seed=0, **extra):
    """A random CLIP as a local-dir; its name for --model."""
    dim = 64 if kind == "attention-pool" else 24
    vision = dict(VISION[kind])
    if kind == "attention-pool":
        vision["image_size"] = 160
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": TEXT, **extra}
    torch.manual_seed(seed)
    custom = {k: v for k, v in config.items() if k != "custom_text"}
    cls = open_clip.CustomTextCLIP if extra.get("custom_text") else open_clip.CLIP
    model = cls(**json.loads(json.dumps(custom)))
    for p in model.parameters():                                # zero-initialised layers would hide faults
        if p.ndim > 0 and not p.detach().any():
            torch.nn.init.normal_(p, std=0.1)
    os.makedirs(path, exist_ok=True)
    save_file(model.state_dict(), os.path.join(path, "open_clip_model.safetensors"))
    with open(os.path.join(path, "open_clip_config.json"), "w") as f:
        json.dump({"model_cfg": config, "preprocess_cfg": {"size": vision["image_size"]}}, f)
    return f"local-dir:{path}"


def write_images(folder, classes, count=3, seed=0, size=(40, 36)):
    """folder/<class>/<i>.png, each class with a colour of its own."""
    rng = np.random.default_rng(seed)
    for k, c in enumerate(classes):
        os.makedirs(os.path.join(folder, c), exist_ok=True)
        for i in range(count):
            base = np.array([37 * k % 256, 91 * k % 256, 150 * k % 256])
            pixels = np.clip(base + rng.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(os.path.join(folder, c, f"{i}.png"))


BASE = ["--batch-size", "8", "--lr", "1e-3", "--warmup", "2", "--epochs", "100", "--workers", "0", "--log-every", "1"]


def run(script, root, model, out, *flags, steps=4):
    """A few steps of a script on a tiny root; its results.json."""
    script.main(["--data", str(root), "--model", model, "--out", str(out), "--max-steps", str(steps), *BASE, *flags])
    return json.load(open(f"{out}/results.json"))


def weights(out, which="model"):
    return load_file(f"{out}/{which}/open_clip_model.safetensors")


def log(out):
    """log.jsonl without its timings."""
    lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
    for line in lines:
        del line["images_per_s"]
    return lines


SPY = """
import sys, torch
sys.path.insert(0, {repo!r})
import common, {script}
average = common.average_gradients
def spy(parameters):
    parameters = list(parameters)
    average(parameters)
    if common.rank_world()[0] == 0 and not hasattr(spy, "done"):
        spy.done = torch.save([p.grad for p in parameters], {file!r}) or True
common.average_gradients = spy
{script}.main(sys.argv[1:])
"""


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def assert_processes_are_one(script, root, model, tmp_path, *flags, most=3):
    """torchrun with two processes, and with four and --accum 2: the first step's gradients of one process at the same
    global batch, its losses, its table."""
    results, grads = [], []
    for n in (1, 2, 4)[:most]:
        code, file, out = tmp_path / f"spy{n}.py", str(tmp_path / f"grads{n}.pt"), str(tmp_path / f"out{n}")
        code.write_text(SPY.format(repo=REPO, file=file, script=script))
        launch = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n),
                                                  "--master_port", str(20000 + os.getpid() % 20000)]
        done = subprocess.run([*launch, str(code), "--data", root, "--model", model, "--max-steps", "5", *BASE, "--out", out,
                               *flags, *["--accum", "2"] * (n == 4)], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        grads.append(torch.load(file, weights_only=True))
        results.append(json.load(open(f"{out}/results.json")))
    for n, others, result in zip((2, 4), grads[1:], results[1:]):
        whole = torch.stack([one.norm() for one in grads[0] if one is not None]).norm()
        for one, other in zip(grads[0], others, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (one - other).norm() <= 1e-5 * (one.norm() + 1e-3 * whole)
        for a, b in zip(log(tmp_path / "out1"), log(tmp_path / f"out{n}"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
        for name, s in results[0]["sets"].items():
            assert s["n"] == result["sets"][name]["n"]
            assert abs(s["top1"] - result["sets"][name]["top1"]) <= 0.005
            assert s["nll"] == pytest.approx(result["sets"][name]["nll"], rel=1e-3)


class Cut(Exception):
    """Stands for a kill."""


def assert_continues_to_the_same_bytes(script, root, model, tmp_path, monkeypatch, *flags, exports=("model",)):
    """A run cut in step 4, past the checkpoint of step 3, and started again, is the uninterrupted run."""
    whole = run(script, root, model, tmp_path / "whole", *flags, steps=7)
    lr = common.cosine_lr

    def cut(step, *a):
        if step == 5:
            raise Cut
        return lr(step, *a)
    monkeypatch.setattr(common, "cosine_lr", cut)
    with pytest.raises(Cut):
        run(script, root, model, tmp_path / "cut", *flags, "--save-every", "3", steps=7)
    monkeypatch.setattr(common, "cosine_lr", lr)
    assert not os.path.exists(tmp_path / "cut" / "model")
    resumed = run(script, root, model, tmp_path / "cut", *flags, "--save-every", "3", "--workers", "1", steps=7)
    assert whole == resumed and log(tmp_path / "whole") == log(tmp_path / "cut")
    for which in exports:
        a, b = weights(tmp_path / "whole", which), weights(tmp_path / "cut", which)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """clip(kind, **model_cfg) -> name of a tiny random CLIP."""
    made = {}

    def make(kind="vit", **extra):
        key = json.dumps([kind, extra])
        if key not in made:
            made[key] = write_clip(str(tmp_path_factory.mktemp("clip")), kind, **extra)
        return made[key]
    return make


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A ROOT of five classes: train, val, a shift, a shift of a subset, and a set with classes not trained on."""
    root = str(tmp_path_factory.mktemp("tiny") / "root")
    classes = ["ant", "bee", "cat", "dog", "sea_eel"]
    write_images(f"{root}/train", classes, 8, 1)
    write_images(f"{root}/val", classes, 3, 2)
    write_images(f"{root}/sketch", classes, 3, 3)
    write_images(f"{root}/few", ["bee", "dog", "sea_eel"], 3, 4)
    write_images(f"{root}/other", ["bee", "fox", "hen"], 3, 5)
    with open(f"{root}/templates.txt", "w") as f:
        f.write("a photo of a {}.\na sketch of the {}.\nart of a {}.\n")
    return root


@pytest.fixture
def captions(tiny_root, tmp_path):
    """Two captions of the first image of each class, one of the others."""
    lines = ["path\tcaption"]
    for c in ["ant", "bee", "cat", "dog", "sea_eel"]:
        for i in range(8):
            lines += [f"train/{c}/{i}.png\tone {c} number {i} in the garden"]
        lines += [f"train/{c}/0.png\tanother view of the {c}"]
    path = tmp_path / "captions.tsv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def pool(tmp_path):
    """23 pairs in a TSV."""
    write_images(str(tmp_path / "pool"), ["p"], 23, seed=9)
    path = tmp_path / "pool" / "pool.tsv"
    path.write_text("path\ttext\n" + "".join(f"p/{i}.png\tpool picture {i}\n" for i in range(23)))
    return str(path)
