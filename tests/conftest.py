# SPDX-License-Identifier: MIT
"""Tiny roots and tiny CLIPs for the tests; ../shared/data is used where it is there."""
import json
import os
import sys

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
SHARED = os.path.join(os.path.dirname(REPO), "shared", "data")
sys.path[:0] = [REPO, HERE]

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
