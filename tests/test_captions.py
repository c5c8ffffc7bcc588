# SPDX-License-Identifier: MIT
"""captions.py with tiny random captioners, against plain calls of transformers for one image."""
import os
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import anchor
import common
from conftest import CLASSES, write_images

transformers = pytest.importorskip("transformers")
import captions as tool  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402

TOKENS = ["<s>", "<pad>", "</s>", "<image>", "<unk>"]
WORDS = "a an the dog cat ant bee red blue old new big small photo of on in with and runs".split()
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": 25}

def write_captioner(kind, folder):
    """Write a tiny random BLIP or BLIP-2 with its processor, and return its name for --model."""
    vocabulary = {word: i for i, word in enumerate(TOKENS + WORDS)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"})
    pixels = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "blip2":
        processor = transformers.Blip2Processor(pixels, tokenizer, num_query_tokens=4)
        text = transformers.OPTConfig(
            hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=64, **IDS)
        model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
            vision_config=vision, qformer_config={**SIZES, "vocab_size": 10}, text_config=text,
            num_query_tokens=4, image_token_index=3))
    else:
        processor = transformers.BlipProcessor(pixels, tokenizer)
        text = {**SIZES, **IDS, "sep_token_id": 2, "max_position_embeddings": 64,
                "encoder_hidden_size": 16}
        model = transformers.BlipForConditionalGeneration(transformers.BlipConfig(
            vision_config=vision, text_config=text))
    for p in model.parameters():                            # so that images differ in captions
        if p.ndim > 1:
            torch.nn.init.normal_(p)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="module")
def captioners(tmp_path_factory):
    """The names of two captioners, by kind."""
    folder = tmp_path_factory.mktemp("captioners")
    return {kind: write_captioner(kind, folder / kind) for kind in ("blip2", "blip")}

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A ROOT with folders below a class folder, and with files that are not training images."""
    root = tmp_path_factory.mktemp("root")
    write_images(root / "train", CLASSES, 4, seed=1)
    write_images(root / "train", ["cat/sub folder", ".hidden", "dog/.hidden"], 2, seed=2)
    shutil.copy(root / "train/ant/0.png", root / "train/ant/.1.png")
    shutil.copy(root / "train/ant/0.png", root / "train/0.png")
    (root / "train/ant/notes.txt").write_text("no image")
    write_images(root / "more", ["ant"], 2, seed=3)
    return root

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing is looked up on the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

def run(*argv):
    tool.main(["--batch-size", "7", "--workers", "0", *map(str, argv)])

def error(*argv):
    """Return the error line of a command that fails."""
    with pytest.raises(SystemExit) as e:
        run(*argv)
    assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    return e.value.code

def training_images(root, *folders):
    """Return an ImageSet's paths for the visible images of the class folders."""
    found = [path for folder in folders for path in (root / folder).glob("*/**/*.png")]
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return types.SimpleNamespace(paths=np.array(sorted(map(os.fsencode, shown))))

def plain_captions(name, paths, dtype=torch.float32):
    """Caption one image at a time, by the class of the checkpoint's own kind."""
    kind = "Blip2" if name.endswith("2") else "Blip"
    processor = getattr(transformers, f"{kind}Processor").from_pretrained(name)
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = cls.from_pretrained(name, dtype=dtype).eval()
    texts = []
    for path in paths:
        inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt").to(dtype)
        tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        texts.append(processor.decode(tokens[0], skip_special_tokens=True).strip())
    return texts

@pytest.mark.parametrize("kind", ["blip2", "blip"])
def test_captions_are_those_of_plain_calls(root, captioners, tmp_path, kind):
    """anchor.py accepts the file, and every image has the caption that the captioner gives it."""
    out = tmp_path / "new" / "captions.tsv"
    run("--data", root, "--train", "train", "more", "--model", captioners[kind], "--out", out)
    images = training_images(root, "train", "more")
    captions = anchor.read_captions(out, images, root)
    expected = plain_captions(captioners[kind], [os.fsdecode(path) for path in images.paths])
    assert captions == [[text] for text in expected]
    assert len(captions) == 24 and len(set(expected)) > 10
    lines = out.read_text().splitlines()
    assert lines[0] == f"path\tcaption by {captioners[kind]}" and len(lines) == 25
    assert lines[1].startswith("train/ant/0.png\t")

def test_bfloat16(root, captioners):
    """On a card the weights are bfloat16. All parts of a BLIP-2 must take that."""
    processor, model = tool.load_captioner(captioners["blip2"], "cpu", torch.bfloat16)
    files = sorted((root / "train" / "dog").glob("*.png"))
    pixels, problems = tool.decode(files, processor)
    expected = plain_captions(captioners["blip2"], files, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert tool.describe(model, processor, pixels) == expected and problems == [""] * 4

def test_a_kill_loses_nothing(root, captioners, tmp_path, monkeypatch, capsys):
    """Cut in a line, the file is finished to the same bytes; only what was missing is captioned.
    A finished file is left alone."""
    command = ["--data", root, "--model", captioners["blip2"], "--out", tmp_path / "c.tsv"]
    describe, seen = tool.describe, []

    def spy(model, processor, pixels):
        seen.append((len(pixels), (tmp_path / "c.tsv").read_bytes().count(b"\n")))
        return describe(model, processor, pixels)
    monkeypatch.setattr(tool, "describe", spy)
    run(*command)
    whole = (tmp_path / "c.tsv").read_bytes()
    assert seen == [(7, 0), (7, 8), (7, 15), (1, 22)]       # lines are on the disk batch by batch
    lines = whole.splitlines(keepends=True)
    for cut in (lines[10][:-5], lines[10][:7], b""):
        (tmp_path / "c.tsv").write_bytes(b"".join(lines[:10]) + cut)
        seen.clear()
        run(*command)
        assert (tmp_path / "c.tsv").read_bytes() == whole
        assert seen == [(7, 10), (6, 17)]
    monkeypatch.setitem(sys.modules, "transformers", None)  # it is not needed any more
    run(*command)
    assert (tmp_path / "c.tsv").read_bytes() == whole
    assert "finished already: it has 22 captions" in capsys.readouterr().out

def test_another_file_is_refused(root, captioners, tmp_path):
    """A file of another captioner, of other images or of anything else is never continued."""
    out = tmp_path / "captions.tsv"
    command = ["--data", root, "--model", captioners["blip"], "--out", out]
    run(*command)
    header, *lines = out.read_text().splitlines(keepends=True)
    texts = ["".join(lines), header + "".join(reversed(lines)), "my only notes", "my\nnotes\n",
             header + "".join(lines[1:]), header + "".join(lines) + "train/zebra/0.png\ta zebra\n",
             f"path\tcaption by {captioners['blip2']}\n" + "".join(lines[:5])]
    for text in texts:
        out.write_text(text)
        assert "does not hold captions of these images" in error(*command)
        assert out.read_text() == text
    assert "cannot be written (Is a directory)" in error(*command[:-1], tmp_path)

def test_unreadable_images(root, captioners, tmp_path, capsys):
    """They are named on stderr and say "an image"; captions of the others stay in their places."""
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    (copy / "train/bee/1.png").write_bytes(b"broken")
    half = (copy / "train/cat/3.png").read_bytes()
    (copy / "train/cat/3.png").write_bytes(half[:len(half) // 2])
    (copy / "train/dog/0.png").unlink()
    (copy / "train/dog/0.png").symlink_to("nowhere.png")
    for where in (root, copy):
        out = tmp_path / f"{where.name}.tsv"
        run("--data", where, "--model", captioners["blip2"], "--out", out, "--workers", "2")
    whole, broken = [dict(common.read_rows(tmp_path / f"{name}.tsv", "path", "caption"))
                     for name in (root.name, "root")]
    unreadable = ["train/bee/1.png", "train/cat/3.png", "train/dog/0.png"]
    assert broken == {**whole, **dict.fromkeys(unreadable, "an image")}
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 3
    for line, path in zip(warnings, unreadable):
        assert f"warning: {path} cannot be read (" in line

def test_a_caption_is_one_line():
    """White space is collapsed, and a captioner that says nothing still gives a caption."""
    model = types.SimpleNamespace(device="cpu", dtype=torch.float32, generate=lambda **kw: None)
    texts = ["  a\tdog\r\nruns ", " \n", ""]
    processor = types.SimpleNamespace(batch_decode=lambda *a, **kw: texts)
    captions = tool.describe(model, processor, torch.zeros(3, 3, 8, 8))
    assert captions == ["a dog runs", "an image", "an image"]

def test_a_pool_of_images(root, captioners, tmp_path):
    """The images of a TSV get captions in a file that is a pool in its own folder."""
    listed = root / "more" / "pool.tsv"
    listed.write_text("path\ttext\nant/1.png\t\n../train/bee/0.png\tIMG_4711\nant/0.png\n\n")
    (tmp_path / "link").symlink_to(root / "more")
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "here").symlink_to(tmp_path / "far" / "off")
    images = [root / "more/ant/1.png", root / "train/bee/0.png", root / "more/ant/0.png"]
    expected = plain_captions(captioners["blip"], images)
    for out in (root / "more" / "captions.tsv", tmp_path / "here" / "captions.tsv"):
        run("--images", tmp_path / "link" / "pool.tsv", "--model", captioners["blip"], "--out", out)
        rows = common.read_rows(out, "path", "text")
        assert [text for _, text in rows] == expected
        assert all((out.parent / path).samefile(file) for (path, _), file in zip(rows, images))
    assert common.read_rows(root / "more/captions.tsv", "path", "text")[0][0] == "ant/1.png"

def test_mistakes(root, captioners, tmp_path, monkeypatch):
    """Every mistake is one line that says what was expected."""
    out, data = ["--out", tmp_path / "c.tsv"], ["--data", root]
    assert "--data --images is required" in error(*out)
    assert "not allowed with" in error(*data, "--images", "x.tsv", *out)
    assert "has no class folders; expected" in error("--data", tmp_path / "nowhere", *out)
    assert "has no class folders; expected" in error(*data, "--train", "more/ant", *out)
    assert "--images no.tsv cannot be read" in error("--images", "no.tsv", *out)
    (tmp_path / "empty.tsv").write_text("path\ttext\n")
    assert "empty.tsv holds no images" in error("--images", tmp_path / "empty.tsv", *out)
    (tmp_path / "train/a\tb").mkdir(parents=True)
    shutil.copy(root / "train/ant/0.png", tmp_path / "train/a\tb/0.png")
    assert "rename that file" in error("--data", tmp_path, *out)
    assert "at least 1" in error(*data, *out, "--workers", "-1")
    assert "expected a BLIP or BLIP-2" in error(*data, "--model", tmp_path, *out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(captioners["blip"])
    clip = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
    clip.save_pretrained(tmp_path / "other")
    assert "it is another kind of model" in error(*data, "--model", tmp_path / "other", *out)
    assert "--model Salesforce/blip2-opt-2.7b cannot be loaded" in error(*data, *out)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in error(*data, *out)
    assert not (tmp_path / "c.tsv").exists()
