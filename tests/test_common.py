# SPDX-License-Identifier: MIT
"""Text and heads against open_clip, scores against torchmetrics, images against Pillow, and the
layout of ROOT rule by rule."""
import math
import os
import re
import types
from importlib.resources import files

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchmetrics.functional.classification import multiclass_calibration_error

import common
from conftest import CLASSES, write_images

@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_encode_text_is_open_clips_at_full_length(clip, custom_text, causal):
    """Cutting at the longest prompt saves most of the work and must change nothing, or heads are
    silently worse. A tower that looks ahead sees the padding, so it is not cut."""
    model, *_, tokenizer = common.load_model(clip("vit", custom_text), "", "cpu")
    texts, seen = ["a", "a photo of a very large dog on a lawn.", "ant", "a " * 200], []
    text = getattr(model, "text", model)
    text.transformer.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    text.attn_mask = text.attn_mask if causal else None
    for part in (texts[:3], texts):
        theirs = model.encode_text(tokenizer(part), normalize=True)
        for tokens in (tokenizer(part), common.tokenize(tokenizer, part)):
            ours = common.encode_text(model, tokens)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    cut = 13 if causal else 77                              # start, ten words, a full stop, end
    assert seen == [77, cut, cut, 77, 77, 77]

def test_head_is_open_clips_zero_shot_classifier(clip):
    """Else zero-shot rows are not CLIP's. open_clip's head is (d, K), without the logit scale."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    names, templates = ["ant", "bee", "sea eel"], open_clip.OPENAI_IMAGENET_TEMPLATES[:7]
    E = common.text_embeddings(model, tokenizer, names, templates)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(common.class_head(E), theirs.T, rtol=1e-5, atol=1e-6)

def test_scores_are_torchmetrics():
    """Else our tables cannot be compared with anybody's."""
    g = torch.Generator().manual_seed(0)
    logits, lucky = torch.randn(1700, 10, generator=g) * 2, torch.rand(1700, generator=g) < 0.4
    labels = torch.where(lucky, logits.argmax(1), torch.randint(10, (1700,), generator=g))
    p, top1 = logits.softmax(1), float((logits.argmax(1) == labels).float().mean())
    batch_ece = sum(len(y) * float(multiclass_calibration_error(q, y, 10, n_bins=10))
                    for q, y in zip(p.split(512), labels.split(512))) / 1700
    assert common.scores(logits, labels) == pytest.approx({
        "top1": top1, "top1_se": math.sqrt(top1 * (1 - top1) / 1700),
        "ece": float(multiclass_calibration_error(p, labels, 10, n_bins=15)),
        "ece_batch10": batch_ece, "nll": float(torch.nn.functional.cross_entropy(logits, labels)),
        "brier": float((p - torch.eye(10)[labels]).square().sum(1).mean())}, rel=1e-5, abs=1e-6)

def test_ece_by_hand():
    """Two bins of 15: (0.62, 0.64) half right, 0.97 all right."""
    by_hand = 0.5 * abs(0.5 - 0.63) + 0.5 * 0.03
    assert common.ece([0.62, 0.64, 0.97, 0.97], [1, 0, 1, 1]) == pytest.approx(by_hand, abs=1e-9)
    assert common.ece([1.0, 1.0], [1, 1]) == 0 and common.ece([1.0, 1.0], [0, 0]) == 1
    assert common.ece(torch.tensor([0.5, 0.75]), torch.tensor([True, False]), bins=1) == 0.125

def test_the_greatest_of_several_columns_counts(tiny_root, clip):
    """Else a class that stands for two loses to itself. Other training classes do not count."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    few, u, head = read(tiny_root)[1]["few"], torch.randn(9, 24), torch.randn(5, 24)
    few.columns = [[1, 0], [3], [4, 2]]
    (_, logits, _, about), = common.set_logits(model, tokenizer, [few], [u], head)
    S = (model.logit_scale.exp() * u @ head.T).tolist()
    by_hand = [[max(row[1], row[0]), row[3], max(row[4], row[2])] for row in S]
    assert about["head"] == "subset" and torch.allclose(logits, torch.tensor(by_hand))

def test_batches_hold_each_image_once_an_epoch(tiny_root, monkeypatch):
    """Every epoch has an order of its own, wherever a run starts, and two processes together see
    the batches of one. Else a resumed run or a second GPU is another run."""
    train, args = read(tiny_root)[0], types.SimpleNamespace(batch_size=12, seed=3, workers=0)

    def rows(start=0):
        batches = common.train_loader(train, torch.nn.Identity(), args, start, 20)
        return [row.tolist() for _, _, row, _ in batches]
    whole = rows()
    epochs = [sum(whole, [])[40 * e:40 * e + 40] for e in range(6)]
    assert all(sorted(e) == list(range(40)) for e in epochs) and len(set(map(tuple, epochs))) == 6
    assert rows(start=7) == whole[7:]
    monkeypatch.setattr(common, "WORLD", 2)
    first = rows()
    monkeypatch.setattr(common, "RANK", 1)
    second = rows()
    assert [[i for pair in zip(a, b) for i in pair] for a, b in zip(first, second)] == whole
    args.seed = 4
    assert rows() != second

def test_augmentation_depends_on_seed_epoch_and_row_alone(tiny_root, clip):
    """Else workers or a resume change a run. Nobody else's randomness is touched."""
    train, _ = read(tiny_root)
    _, crop, *_ = common.load_model(clip(), "", "cpu")
    state = torch.get_rng_state()

    def items(seed, places):
        data = common.TrainImages(train, crop, seed)
        return {row: (draw, x.tolist()) for x, _, row, draw, _ in map(data.__getitem__, places)}
    ours = items(0, range(40, 80))
    assert ours == {**items(0, [99, *range(79, 60, -1)]), **items(0, range(60, 39, -1))}
    for other in (items(1, range(40, 80)), items(0, range(80, 120))):
        assert not any(mine == its for row in ours for mine, its in zip(ours[row], other[row]))
    assert torch.equal(state, torch.get_rng_state())

MORE = {"save_all": True, "append_images": [Image.new("RGB", (40, 32))]}
TURNED = Image.Exif()
TURNED[0x0112] = 6                                          # orientation: ignored, as by open_clip
ODD = {
    "plain.jpg": ("RGB", "JPEG", {}), "grey.jpg": ("L", "JPEG", {}), "deep.png": ("L", "PNG", {}),
    "cmyk.jpg": ("CMYK", "JPEG", {}), "turned.jpg": ("RGB", "JPEG", {"exif": TURNED}),
    "really_a_png.JPEG": ("RGB", "PNG", {}), "palette.png": ("P", "PNG", {"transparency": 1}),
    "alpha.png": ("RGBA", "PNG", {}), "naïve\n.bmp": ("RGB", "BMP", {}),
    "moving.gif": ("P", "GIF", MORE), "moving.webp": ("RGB", "WEBP", {"lossless": True, **MORE})}

@pytest.mark.parametrize("name", ODD)
def test_read_image(tmp_path, name):
    """Whatever a folder holds becomes the RGB that Pillow sees; at 16 bits Pillow itself fails."""
    mode, form, how = ODD[name]
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))).convert(mode)
    file = Image.fromarray(np.uint16(image) * 257) if name == "deep.png" else image
    file.save(tmp_path / name, form, **how)
    image = image if name == "deep.png" else Image.open(tmp_path / name)
    x, readable = common.read_image(str(tmp_path / name))
    expected = np.asarray(image.convert("RGB"))
    assert readable and x.dtype == torch.uint8 and x.shape == (3, 32, 40)
    assert np.abs(x.permute(1, 2, 0).numpy().astype(int) - expected).mean() <= 1

def test_evaluation_transform_is_open_clips(tmp_path, clip):
    """Within a grey level, or every score is another one."""
    write_images(tmp_path, ["a"], 5, size=(61, 47))
    write_images(tmp_path, ["b"], 5, size=(20, 90))
    model, _, preprocess, _ = common.load_model(clip(), "", "cpu")
    _, _, their_preprocess = open_clip.create_model_and_transforms(clip())
    std, differences = torch.tensor(model.visual.preprocess_cfg["std"]).view(3, 1, 1), []
    for path in tmp_path.glob("*/*"):
        ours = common.to_input(model, preprocess(common.read_image(str(path))[0])[None])
        theirs = their_preprocess(Image.open(path))[None]
        differences.append(float(((ours - theirs) * std).abs().mean()))
    assert np.mean(differences) <= 1 / 255

def read(root, **flags):
    """The data of ROOT: (train, {name: set})."""
    args = dict(data=str(root), train=["train"], val=None, val_frac=0.2, eval=[], seed=0)
    train, sets = common.read_data(types.SimpleNamespace(**{**args, **flags}))
    assert sets[0].name == "val" and len({s.name for s in sets}) == len(sets)
    return train, {s.name: s for s in sets}

def paths(images):
    return [os.fsdecode(path) for path in images.paths]

def is_shift(images):
    """Whether the set takes part in the shift mean."""
    scores = {images.name: {"top1": 1.0, "ece": 0.0}}
    return common.summary([images], scores)["shift_mean"] is not None

def test_root(tiny_root):
    """val first, then every other image folder by name, with the columns of its classes."""
    train, sets = read(tiny_root)
    assert train.classes == CLASSES and train.classnames == [*CLASSES[:4], "sea eel"]
    assert train.templates == ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    assert len(train) == 40 and os.fsdecode(train.paths[8]) == f"{tiny_root}/train/bee/0.png"
    assert train.labels.tolist() == [k for k in range(5) for _ in range(8)]
    assert [(name, len(s), s.columns, is_shift(s)) for name, s in sets.items()] == [
        ("val", 15, [[0], [1], [2], [3], [4]], False), ("few", 9, [[1], [3], [4]], True),
        ("other", 9, None, False), ("sketch", 15, [[0], [1], [2], [3], [4]], True)]

def test_texts(tmp_path):
    """classnames.txt > OpenAI's names of wnids > folders; templates.txt > OpenAI's 80. A set with
    new classes takes those beside it, then those of its parent, then ROOT's templates."""
    write_images(tmp_path / "root" / "train", ["n01440764", "n02007558", "hot_dog"])
    write_images(tmp_path / "root" / "zoo", ["n01440764", "x_y"])
    write_images(tmp_path / "far" / "zoo", ["n01440764", "x_y"])

    def names(name):
        s = read(tmp_path / "root", eval=[str(tmp_path / "far" / "zoo")])[1][name]
        return s.classnames, len(s.templates)
    assert names("val") == (["hot dog", "tench", "flamingo"], 80)
    (tmp_path / "root" / "classnames.txt").write_text("n02007558\tpink bird\nx_y\tex\n")
    assert names("val") == (["hot dog", "tench", "pink bird"], 80)
    assert names("zoo") == (["tench", "ex"], 80) and names("far/zoo") == (["tench", "x y"], 80)
    (tmp_path / "root" / "templates.txt").write_text("a {}.\n\nthe {}\n")
    (tmp_path / "far" / "classnames.txt").write_text("x_y\tfar\n")
    assert names("far/zoo") == (["tench", "far"], 2) and names("zoo") == (["tench", "ex"], 2)
    (tmp_path / "far" / "zoo" / "classnames.txt").write_text("x_y\tnear\n")
    (tmp_path / "far" / "zoo" / "templates.txt").write_text("my {}\n")
    assert names("far/zoo") == (["tench", "near"], 1)

def test_which_training_class_a_folder_is(tmp_path):
    """Digits 0 to K-1 are numbers, though as a string 10 comes third (ImageNet-V2). classes.txt
    goes before both, may name several classes, and one that was not trained on."""
    classes = [f"c{k:02d}" for k in range(12)]
    for name, folders in (("train", classes), ("val", classes), ("test", classes),
                          ("v2", map(str, range(12))), ("ten", map(str, range(10))),
                          ("joined", ["c03", "cups", "7"])):
        write_images(tmp_path / name, folders, 1)
    (tmp_path / "joined" / "classes.txt").write_text("cups\tc01; c02\nc03\tc04\n7\tc07\n")
    sets = read(tmp_path)[1]
    v2, joined = sets["v2"], sets["joined"]
    folder = [int(path.split("/")[-2]) for path in paths(v2)]
    assert [v2.columns[k] for k in v2.labels] == [[k] for k in folder] and folder[2] == 10
    assert is_shift(v2) and sets["ten"].columns is None
    assert (joined.classes, joined.columns) == (["7", "c03", "cups"], [[7], [4], [1, 2]])
    assert sets["test"].columns and not is_shift(sets["test"])    # as training is distributed
    (tmp_path / "v2" / "classes.txt").write_text("0\tc05\n5\tc00\n")         # goes before numbers
    columns = dict(zip(v2.classes, read(tmp_path)[1]["v2"].columns))
    assert (columns["0"], columns["5"], columns["7"]) == ([5], [0], [7])
    (tmp_path / "joined" / "classes.txt").write_text("cups\tmug\n7\tc07\n")
    assert read(tmp_path)[1]["joined"].columns is None

def test_val_held_out(tmp_path):
    """Without val/ a part of each class is held out, drawn by seed; a file more moves no other.
    Else val would hold training images when a run is evaluated."""
    write_images(tmp_path / "photo", ["a", "b"], 10)
    write_images(tmp_path / "art", ["a", "b", "rare"], 5)
    write_images(tmp_path / "sketch", ["a", "b"], 2)
    flags = {"train": ["photo", "art"]}
    train, sets = read(tmp_path, **flags)
    held, kept = paths(sets["val"]), paths(train)
    assert np.bincount(sets["val"].labels).tolist() == [3, 3, 1] and list(sets) == ["val", "sketch"]
    assert len(kept) == 28 and not set(held) & set(kept)
    assert paths(read(tmp_path, seed=1, **flags)[1]["val"]) != held
    assert np.bincount(read(tmp_path, val_frac=0.5, **flags)[1]["val"].labels).tolist() == [8, 8, 3]
    Image.new("RGB", (8, 8)).save(tmp_path / "photo" / "a" / "more.png")
    assert set(held) < set(paths(read(tmp_path, **flags)[1]["val"]))
    assert len(read(tmp_path, val="sketch", **flags)[0]) == 36

def test_what_is_passed_over(tmp_path, capsys):
    """An empty class with a warning; hidden files and folders and other suffixes without."""
    write_images(tmp_path / "train", ["a", "b", ".cache", "a/.thumbs"])
    (tmp_path / "train" / "empty").mkdir()
    for name in ("._0.png", "notes.txt"):
        (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    train, sets = read(tmp_path)
    assert train.classes == ["a", "b"] and (len(train), len(sets["val"])) == (4, 2)
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == [f"warning: {tmp_path}/train/empty holds no image and is passed over"]

def test_eval_elsewhere(tmp_path, tiny_root):
    """A name that is taken gets that of its parent; a folder of image folders is each of them."""
    for name in ("zoo", "sketch", "test", "c/fog/1", "c/fog/2", "c/snow/5", "other/c/snow/5"):
        write_images(tmp_path / "far" / name, ["ant", "bee"], 1)
    far = [str(tmp_path / "far" / name) for name in ("zoo", "sketch", "test", "c", "other/c")]
    sets = read(tiny_root, eval=far[:4])[1]
    assert list(sets)[4:] == ["zoo", "far/sketch", "far/test", "c/fog/1", "c/fog/2", "c/snow/5"]
    assert is_shift(sets["far/test"]) and sets["c/snow/5"].columns == [[0], [1]]
    assert list(read(tiny_root, eval=far[3:])[1])[-1] == "other/c/snow/5"
    with pytest.raises(SystemExit, match="error: --eval: two folders have the same name"):
        read(tiny_root, eval=[far[0], far[1], far[1]])

def test_imagenets_shifts_by_wnid(tmp_path):
    """-R and -A have 200 of the 1000 logits each."""
    lists = {"val": ImageNetInfo().label_names()}
    for name in ("imagenet_r", "imagenet_a"):
        text = files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text()
        lists[name] = sorted(text.split())
    for name, classes in lists.items():
        write_images(tmp_path / name, classes, 1, size=(2, 2))
    sets = read(tmp_path, train=["val"])[1]
    assert sets["val"].classnames == list(open_clip.IMAGENET_CLASSNAMES)
    for name in ("imagenet_r", "imagenet_a"):
        assert len(sets[name].columns) == 200 and sets[name].classes == lists[name]
        assert [lists["val"][k] for k, in sets[name].columns] == lists[name]

def test_every_activation_trap_of_open_clip_is_caught(monkeypatch):
    """What open_clip would load into the wrong activation with a mere warning is refused, and so
    is a text tower of Hugging Face, which comes first."""
    monkeypatch.delattr(open_clip, "create_model")          # others are stopped only by this
    refused = 0
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        wants = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        trap = wants != bool(config.get("quick_gelu", False))
        hugging_face = "hf_tokenizer_name" in config["text_cfg"]
        with pytest.raises(SystemExit) as e:
            common.load_model(name, tag)
        found = re.search("another activation|Hugging Face", e.value.code)
        assert bool(found) == (trap or hugging_face), name
        refused += trap
    assert refused >= 20

@pytest.mark.parametrize("kind, custom_text", [
    ("vit", False), ("vit", True), ("resnet", False), ("timm", False)])
def test_export_reloads_in_open_clip_bit_for_bit(tmp_path, clip, kind, custom_text):
    """Else the result of a run is of no use outside."""
    model, *_ = common.load_model(clip(kind, custom_text), "", "cpu")
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), 0.01)
    common.export(model, clip(kind, custom_text), str(tmp_path / "model"))
    again, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/model")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}/model")(["a dog", "a cat"])
    x = transform(Image.new("RGB", (50, 40))).expand(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(x, tokens), model(x, tokens), rtol=0, atol=0)
