# SPDX-License-Identifier: MIT
"""Text and heads against open_clip, scores against torchmetrics, images against Pillow, crops
against their own coordinates, and the layout of ROOT rule by rule."""
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
from torchmetrics.functional.classification import (
    multiclass_accuracy, multiclass_calibration_error, multiclass_f1_score)

import common
from conftest import CLASSES, write_images

# ---- models, features, heads ---------------------------------------------------------------------
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_encode_text_is_open_clips_at_full_length(clip, custom_text, causal):
    """Compare tokens of any length with open_clip's 77: tokens without padding save most of the
    work, and if that changed anything, heads would be worse without a word. A tower that looks
    ahead sees the padding, so it gets all of it."""
    model, *_, tokenizer = common.load_model(clip("vit", custom_text), "", "cpu")
    texts = ["a", "a photo of a very large dog on a lawn.", "ant", "a " * 200]
    text = getattr(model, "text", model)
    if not causal:
        text.attn_mask = None
    lengths = []
    text.transformer.register_forward_hook(lambda module, args, x: lengths.append(x.shape[1]))
    for some in (texts[:3], texts):
        theirs = model.encode_text(tokenizer(some), normalize=True)
        for tokens in (tokenizer(some), common.tokenize(tokenizer, some)):
            ours = common.encode_text(model, tokens)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    longest = 16                                # start, ten words, a full stop, end: 13 of 16
    if not causal:
        longest = 77
    assert lengths == [77, 77, longest, 77, 77, 77]

def test_cut_padding_keeps_every_token(clip):
    """Cut random tokens at the longest row: one column less would lose its end-of-text token."""
    *_, tokenizer = common.load_model(clip(), "", "cpu")
    tokens = tokenizer(["a dog", "a very long dog", "ant"])
    cut = common.cut_padding(tokens)
    assert cut.shape == (3, 8)                              # start, four words, end: 6 of 8
    assert torch.equal(cut, tokens[:, :8])
    assert not tokens[:, 6:].any() and tokens[:, 5].any()

def test_head_is_open_clips_zero_shot_classifier(clip):
    """Compare with open_clip's head, which is (d, K): if they differ, zero-shot rows are not
    CLIP's. The 1040 prompts, of very different lengths, are more than one batch of ours."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    names = [" and ".join(CLASSES[:n % 5 + 1]) + " fish" * n for n in range(13)]
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    E = common.text_embeddings(model, tokenizer, names, templates)
    assert E.shape == (13, 80, 24)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(common.class_head(E), theirs.T, rtol=1e-5, atol=1e-6)
    text = tokenizer([templates[7](names[11])])
    theirs = model.encode_text(text, normalize=True)[0]
    torch.testing.assert_close(E[11, 7], theirs, rtol=1e-5, atol=1e-6)

def test_every_activation_trap_of_open_clip_is_caught(monkeypatch):
    """Refuse what open_clip would load into the wrong activation with a mere warning, and text
    towers of Hugging Face, which come first."""
    monkeypatch.delattr(open_clip, "create_model")          # others are stopped only by this
    refused = 0
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(name)
        of_weights = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        is_trap = of_weights != bool(config.get("quick_gelu", False))
        is_hugging_face = "hf_tokenizer_name" in config["text_cfg"]
        with pytest.raises(SystemExit) as e:
            common.load_model(name, tag)
        found = re.search("another activation|Hugging Face", e.value.code)
        assert bool(found) == (is_trap or is_hugging_face), name
        refused += is_trap
    assert refused >= 20

@pytest.mark.parametrize("kind, custom_text", [
    ("vit", False), ("vit", True), ("resnet", False), ("timm", False)])
def test_export_reloads_in_open_clip_bit_for_bit(tmp_path, clip, kind, custom_text):
    """Load an export by open_clip alone: otherwise the result of a run is of no use outside."""
    model, *_ = common.load_model(clip(kind, custom_text), "", "cpu")
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), 0.01)
    common.export(model, clip(kind, custom_text), str(tmp_path / "model"))
    again, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/model")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}/model")(["a dog", "a cat"])
    x = transform(Image.new("RGB", (50, 40))).expand(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(x, tokens), model(x, tokens), rtol=0, atol=0)

# ---- scores and the table ------------------------------------------------------------------------
def test_scores_are_torchmetrics():
    """Compare with torchmetrics: otherwise our tables cannot be compared with anybody's."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1700, 10, generator=g) * 2
    is_lucky = torch.rand(1700, generator=g) < 0.4
    labels = torch.where(is_lucky, logits.argmax(1), torch.randint(10, (1700,), generator=g))
    p = logits.softmax(1)
    top1 = float((logits.argmax(1) == labels).float().mean())
    batch_ece = sum(len(y) * float(multiclass_calibration_error(q, y, 10, n_bins=10))
                    for q, y in zip(p.split(512), labels.split(512))) / 1700
    expected = {
        "top1": top1,
        "top1_se": math.sqrt(top1 * (1 - top1) / 1700),
        "ece": float(multiclass_calibration_error(p, labels, 10, n_bins=15)),
        "mean_per_class": float(multiclass_accuracy(p, labels, 10, average="macro")),
        "macro_f1": float(multiclass_f1_score(p, labels, 10, average="macro")),
        "ece_batch10": batch_ece,
        "nll": float(torch.nn.functional.cross_entropy(logits, labels)),
        "brier": float((p - torch.eye(10)[labels]).square().sum(1).mean())}
    assert common.scores(logits, labels) == pytest.approx(expected, rel=1e-5, abs=1e-6)

def test_ece_by_hand():
    """Compute two bins of 15 by hand: (0.62, 0.64) half right, 0.97 all right."""
    by_hand = 0.5 * abs(0.5 - 0.63) + 0.5 * 0.03
    assert common.ece([0.62, 0.64, 0.97, 0.97], [1, 0, 1, 1]) == pytest.approx(by_hand, abs=1e-9)
    assert common.ece([1.0, 1.0], [1, 1]) == 0
    assert common.ece([1.0, 1.0], [0, 0]) == 1
    assert common.ece(torch.tensor([0.5, 0.75]), torch.tensor([True, False]), bins=1) == 0.125

def test_the_largest_of_several_columns_counts(tiny_root, clip):
    """Score classes that cover two training classes: added up, they would lose to themselves.
    Training classes that the set lacks do not count."""
    model, *_, tokenizer = common.load_model(clip(), "", "cpu")
    few = read(tiny_root)[1]["few"]
    few.columns = [[1, 0], [3], [4, 2]]
    features = torch.randn(9, 24)
    head = torch.randn(5, 24)
    logits = common.set_logits(model, tokenizer, few, features, head)
    S = (model.logit_scale.exp() * features @ head.T).tolist()
    by_hand = [[max(row[1], row[0]), row[3], max(row[4], row[2])] for row in S]
    torch.testing.assert_close(logits, torch.tensor(by_hand))

def test_the_table_by_hand(tiny_root):
    """Read the table as a user does: the kind of head, percent, and a mean over shifts alone."""
    _, sets = read(tiny_root)
    columns = {}
    for title, right in (("zero-shot", 3), ("fine-tuned", 6)):
        scores_of = {}
        for s in sets.values():
            labels = torch.from_numpy(s.labels)
            predicted = labels.clone()
            predicted[right:] = (labels[right:] + 1) % len(s.classes)
            logits = 100.0 * torch.nn.functional.one_hot(predicted, len(s.classes))
            scores_of[s.name] = common.score_set(s, logits, labels)
        columns[title] = common.summary(list(sets.values()), scores_of)
    assert [line.split() for line in common.table(columns).splitlines()] == [
        ["zero-shot", "fine-tuned"],
        ["set", "images", "head", *["top-1", "±", "se", "ECE"] * 2],
        ["val", "15", "all", "20.00", "±10.3", "80.00", "40.00", "±12.6", "60.00"],
        ["few", "9", "subset", "33.33", "±15.7", "66.67", "66.67", "±15.7", "33.33"],
        ["other", "9", "zero-shot", "33.33", "±15.7", "66.67", "66.67", "±15.7", "33.33"],
        ["sketch", "15", "all", "20.00", "±10.3", "80.00", "40.00", "±12.6", "60.00"],
        ["shift", "mean", "26.67", "73.33", "53.33", "46.67"]]

# ---- images --------------------------------------------------------------------------------------
def test_batches_hold_each_image_once_an_epoch(tiny_root, monkeypatch):
    """Follow the rows of 20 batches: every epoch has an order of its own, wherever a run starts,
    and two processes together see the batches of one. Otherwise a resumed run, or one on a second
    GPU, is another run."""
    train, _ = read(tiny_root)
    args = types.SimpleNamespace(batch_size=12, seed=3, workers=0)

    def rows(first_step=0):
        batches = common.train_loader(train, torch.nn.Identity(), args, first_step, 20)
        return [row.tolist() for _, _, row, _ in batches]
    whole = rows()
    epochs = [sum(whole, [])[40 * e:40 * e + 40] for e in range(6)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert rows(first_step=7) == whole[7:]
    monkeypatch.setattr(common, "WORLD", 2)
    first = rows()
    monkeypatch.setattr(common, "RANK", 1)
    second = rows()
    assert [[i for pair in zip(a, b) for i in pair] for a, b in zip(first, second)] == whole
    args.seed = 4
    assert rows() != second

def test_augmentation_depends_on_seed_epoch_and_row_alone(tiny_root, clip):
    """Draw the same items in other orders: if crops changed, workers or a resume would change a
    run. Nobody else's randomness is touched."""
    train, _ = read(tiny_root)
    _, crop, *_ = common.load_model(clip(), "", "cpu")
    state = torch.get_rng_state()

    def items(seed, indices):
        data = common.TrainImages(train, crop, seed)
        drawn = [data[index] for index in indices]
        assert all(label == train.labels[row] for _, label, row, _ in drawn)
        return {row: (draw, x.tolist()) for x, _, row, draw in drawn}
    ours = items(0, range(40, 80))
    assert ours == {**items(0, [99, *range(79, 60, -1)]), **items(0, range(60, 39, -1))}
    for other in (items(1, range(40, 80)), items(0, range(80, 120))):
        assert not any(mine == its for row in ours for mine, its in zip(ours[row], other[row]))
    assert torch.equal(state, torch.get_rng_state())

@pytest.mark.parametrize("W, H, narrowest, widest", [
    (256, 192, 0.9 * 4 / 3, 4 / 3), (192, 256, 3 / 4, 3 / 4 / 0.9), (200, 200, 0.9, 1 / 0.9)])
def test_a_crop_keeps_nine_tenths_of_an_image(tmp_path, clip, W, H, narrowest, widest):
    """Measure crops of an image whose red is x and whose green is y: the slopes of these tell what
    a crop holds. Crops of 8 % of the area, which training from scratch uses, would cost a tuned
    CLIP accuracy. The ratio of a crop's sides is between 3/4 and 4/3, limits that the first two
    images reach."""
    y, x = np.mgrid[:H, :W]
    path = tmp_path / "coordinates.png"
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(path)
    images = common.ImageSet("train", ["a"], ["a"], ["{}"], np.array([os.fsencode(path)]),
                             np.array([0]), [[0]], "all", False)
    _, preprocess_train, *_ = common.load_model(clip(), "", "cpu")
    data = common.TrainImages(images, preprocess_train, seed=0)
    middles = np.arange(4, 28) + 0.5                        # of pixels whose ramp the edges leave
    boxes = []
    for index in range(300):                                # 300 epochs of the one image
        red, green, _ = data[index][0].numpy().astype(float)            # (32, 32) each
        x_slope, x_start = np.polyfit(middles, red.mean(0)[4:28], 1)
        y_slope, y_start = np.polyfit(middles, green.mean(1)[4:28], 1)
        boxes.append([x_start + 0.5, y_start + 0.5, 32 * x_slope, 32 * y_slope])
    left, top, w, h = np.array(boxes).T
    area = w * h / (W * H)
    assert 0.89 < area.min() < 0.92
    assert 0.99 < area.max() < 1.01
    assert narrowest - 0.01 < (w / h).min() < narrowest + 0.04
    assert widest - 0.04 < (w / h).max() < widest + 0.01
    assert min(left.min(), top.min()) > -1
    assert max((left + w).max() - W, (top + h).max() - H) < 1
    assert min(np.ptp(left) / W, np.ptp(top) / H) > 0.03

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
    """Read every kind of file as the RGB that Pillow sees; at 16 bits Pillow itself fails."""
    mode, form, how = ODD[name]
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))).convert(mode)
    if name == "deep.png":
        Image.fromarray(np.uint16(image) * 257).save(tmp_path / name, form)
    else:
        image.save(tmp_path / name, form, **how)
        image = Image.open(tmp_path / name)
    x, problem = common.read_image(str(tmp_path / name))
    expected = np.asarray(image.convert("RGB"))
    assert not problem and x.dtype == torch.uint8 and x.shape == (3, 32, 40)
    assert np.abs(x.permute(1, 2, 0).numpy().astype(int) - expected).mean() <= 1

def test_evaluation_transform_is_open_clips(tmp_path, clip):
    """Compare pixels with open_clip's: within a grey level, or every score is another one."""
    write_images(tmp_path, ["a"], 5, size=(61, 47))
    write_images(tmp_path, ["b"], 5, size=(20, 90))
    model, _, preprocess, _ = common.load_model(clip(), "", "cpu")
    _, _, their_preprocess = open_clip.create_model_and_transforms(clip())
    std = torch.tensor(model.visual.preprocess_cfg["std"]).view(3, 1, 1)
    differences = []
    for path in tmp_path.glob("*/*"):
        ours = common.to_input(model, preprocess(common.read_image(str(path))[0])[None])
        theirs = their_preprocess(Image.open(path))[None]
        differences.append(float(((ours - theirs) * std).abs().mean()))
    assert len(differences) == 10
    assert np.mean(differences) <= 1 / 255

# ---- the layout of ROOT --------------------------------------------------------------------------
def read(root, **flags):
    """Return the data of ROOT: (train, {name: set})."""
    args = dict(data=str(root), train=["train"], val=None, val_frac=0.2, eval=[], seed=0)
    train, sets = common.read_data(types.SimpleNamespace(**{**args, **flags}))
    assert sets[0].name == "val"
    assert len({s.name for s in sets}) == len(sets)
    return train, {s.name: s for s in sets}

def paths(images):
    """Return the paths of a set as text."""
    return [os.fsdecode(path) for path in images.paths]

def test_root(tiny_root):
    """Read val first, then every other image folder by name, with the columns of its classes."""
    train, sets = read(tiny_root)
    assert train.classes == CLASSES
    assert train.classnames == [*CLASSES[:4], "sea eel"]
    assert train.templates == ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    assert len(train) == 40
    assert os.fsdecode(train.paths[8]) == f"{tiny_root}/train/bee/0.png"
    assert train.labels.tolist() == [k for k in range(5) for _ in range(8)]
    every = [[0], [1], [2], [3], [4]]
    assert [(name, len(s), s.columns, s.head, s.is_shift) for name, s in sets.items()] == [
        ("val", 15, every, "all", False), ("few", 9, [[1], [3], [4]], "subset", True),
        ("other", 9, None, "zero-shot", False), ("sketch", 15, every, "all", True)]

def test_texts(tmp_path):
    """Take class names from classnames.txt, then from OpenAI's list of wnids, then from folders,
    and templates from templates.txt, then OpenAI's 80. A set with new classes takes those beside
    it, then those of its parent, then ROOT's templates."""
    write_images(tmp_path / "root" / "train", ["n01440764", "n02007558", "hot_dog"])
    write_images(tmp_path / "root" / "zoo", ["n01440764", "x_y"])
    write_images(tmp_path / "far" / "zoo", ["n01440764", "x_y"])

    def texts(name):
        s = read(tmp_path / "root", eval=[str(tmp_path / "far" / "zoo")])[1][name]
        return s.classnames, len(s.templates)
    assert texts("val") == (["hot dog", "tench", "flamingo"], 80)
    (tmp_path / "root" / "classnames.txt").write_text("n02007558\tpink bird\nx_y\tex\n")
    assert texts("val") == (["hot dog", "tench", "pink bird"], 80)
    assert texts("zoo") == (["tench", "ex"], 80)
    assert texts("far/zoo") == (["tench", "x y"], 80)
    (tmp_path / "root" / "templates.txt").write_text("a {}.\n\nthe {}\n")
    (tmp_path / "far" / "classnames.txt").write_text("x_y\tfar\n")
    assert texts("far/zoo") == (["tench", "far"], 2)
    assert texts("zoo") == (["tench", "ex"], 2)
    (tmp_path / "far" / "zoo" / "classnames.txt").write_text("x_y\tnear\n")
    (tmp_path / "far" / "zoo" / "templates.txt").write_text("my {}\n")
    assert texts("far/zoo") == (["tench", "near"], 1)

def test_which_training_class_a_folder_is(tmp_path):
    """Take digits 0 to K-1 as numbers, though as a string 10 comes third (ImageNet-V2). classes.txt
    goes before both, and may name several classes, or one that was not trained on."""
    classes = [f"c{k:02d}" for k in range(12)]
    write_images(tmp_path / "train", classes, 1)
    write_images(tmp_path / "val", classes, 1)
    write_images(tmp_path / "test", classes, 1)
    write_images(tmp_path / "v2", map(str, range(12)), 1)
    write_images(tmp_path / "ten", map(str, range(10)), 1)
    write_images(tmp_path / "joined", ["c03", "cups", "7"], 1)
    (tmp_path / "joined" / "classes.txt").write_text("cups\tc01; c02\nc03\tc04\n7\tc07\n")
    sets = read(tmp_path)[1]
    v2 = sets["v2"]
    folders = [int(path.split("/")[-2]) for path in paths(v2)]
    assert [v2.columns[k] for k in v2.labels] == [[folder] for folder in folders]
    assert folders[2] == 10 and v2.head == "all" and v2.is_shift
    assert sets["ten"].columns == [[k] for k in range(10)] and sets["ten"].head == "subset"
    joined = sets["joined"]
    assert joined.classes == ["7", "c03", "cups"]
    assert joined.columns == [[7], [4], [1, 2]]
    assert joined.head == "subset" and joined.is_shift
    assert sets["test"].columns and not sets["test"].is_shift     # as training is distributed
    (tmp_path / "v2" / "classes.txt").write_text("0\tc05\n5\tc00\n")       # goes before numbers
    columns = dict(zip(v2.classes, read(tmp_path)[1]["v2"].columns))
    assert [columns[folder] for folder in "057"] == [[5], [0], [7]]
    (tmp_path / "joined" / "classes.txt").write_text("cups\tmug\n7\tc07\n")
    joined = read(tmp_path)[1]["joined"]
    assert joined.columns is None and not joined.is_shift

def test_imagenets_shifts_by_wnid(tmp_path):
    """Match the 200 wnids of ImageNet-R and -A to as many of the 1000 logits."""
    lists = {"val": ImageNetInfo().label_names()}
    for name in ("imagenet_r", "imagenet_a"):
        text = files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text()
        lists[name] = sorted(text.split())
    for name, classes in lists.items():
        write_images(tmp_path / name, classes, 1, size=(2, 2))
    sets = read(tmp_path, train=[])[1]
    assert sets["val"].classnames == list(open_clip.IMAGENET_CLASSNAMES)
    for name in ("imagenet_r", "imagenet_a"):
        assert len(sets[name].columns) == 200
        assert sets[name].classes == lists[name]
        assert [lists["val"][k] for k, in sets[name].columns] == lists[name]

NUMBERS = [str(k) for k in range(12)]
NAMES = [f"c{k:02d}" for k in range(12)]

@pytest.mark.parametrize("trained, folders, expected", [
    (NUMBERS, NUMBERS, NUMBERS),                            # when sorted, 10 is the third
    ("0123456", "012345", "012345"),
    ("234", "432", "432"),
    (["1", "2", "x"], ["01", "002", "x"], ["1", "2", "x"]),
    (["01", "02", "10"], ["1", "2", "10"], ["01", "02", "10"]),
    (NAMES, NUMBERS, NAMES),
    (NAMES, ["3", "7"], ["c03", "c07"]),
    (NAMES, ["00", "03", "11"], ["c00", "c03", "c11"]),
    ("1234567", "0123456", "0"),                            # what no number fits is named
    ("234", "012", "0"), (["0", "1", "10"], "012", "2"), (NAMES, NUMBERS[1:] + ["12"], "12"),
    (NAMES, ["0", "1", "c02"], "0"), (NAMES, NUMBERS + ["zebra"], "0"), ("12", "123", "3")])
def test_numbers(tmp_path, capsys, trained, folders, expected):
    """Match digits with training classes that are numbers, by value, or as indices of names. As
    names of new classes, or off by one, they would be scored silently wrong."""
    write_images(tmp_path / "train", trained, 2, size=(2, 2))
    write_images(tmp_path / "shift", folders, 1, size=(2, 2))
    if isinstance(expected, str) and len(expected) < 3:
        with pytest.raises(SystemExit, match=f"^error: .*/shift/{expected} .*/shift/classes.txt "
                           ".*/shift/classnames.txt$"):
            read(tmp_path)
        return
    train, sets = read(tmp_path)
    shift = sets["shift"]
    covered = {c: train.classes[k] for c, (k,) in zip(shift.classes, shift.columns)}
    assert covered == dict(zip(folders, expected))
    said = " its folders are indices of the training classes; 0"
    assert (said in capsys.readouterr().out) == (trained == NAMES and "3" != folders[0])

def test_numbers_that_are_names(tmp_path):
    """Take digits that a classnames.txt lists for names, and those in classes.txt as it says."""
    write_images(tmp_path / "train", "abc", 2, size=(2, 2))
    write_images(tmp_path / "shift", "0123", 1, size=(2, 2))
    (tmp_path / "shift" / "classnames.txt").write_text("".join(f"{k}\tno {k}\n" for k in range(4)))
    shift = read(tmp_path)[1]["shift"]
    assert shift.columns is None and shift.classnames == ["no 0", "no 1", "no 2", "no 3"]
    os.rename(tmp_path / "shift" / "classnames.txt", tmp_path / "classnames.txt")
    assert read(tmp_path)[1]["shift"].columns is None
    os.remove(tmp_path / "classnames.txt")
    (tmp_path / "shift" / "classes.txt").write_text("3\ta;b\n0\tc\n1\td\n2\te\n")
    assert read(tmp_path)[1]["shift"].columns is None
    (tmp_path / "shift" / "classes.txt").write_text("3\ta\n0\tc\n")
    shift = read(tmp_path)[1]["shift"]                      # 1 and 2 are indices
    assert shift.classes == ["0", "1", "3"] and shift.columns == [[2], [1], [0]]
    assert shift.labels.tolist() == [0, 0, 1, 2]

def test_folders_of_one_class(tmp_path):
    """Count folders that cover the same training classes as one class, whose images are those of
    all: two columns of one class would never agree which is the largest."""
    write_images(tmp_path / "train", ["cat", "dog", "eel"], 2, size=(2, 2))
    write_images(tmp_path / "pets", ["cat", "hound", "siamese", "tabby"], 2, size=(2, 2))
    write_images(tmp_path / "new", ["fox", "siamese", "tabby"], 2, size=(2, 2))
    lines = "tabby\tcat\nsiamese\tcat; cat\nhound\teel;dog\n"
    (tmp_path / "pets" / "classes.txt").write_text(lines)
    (tmp_path / "new" / "classes.txt").write_text("tabby\tcat\nsiamese\tcat\n")
    sets = read(tmp_path)[1]
    pets = sets["pets"]
    assert pets.classes == ["cat", "hound"] and pets.columns == [[0], [1, 2]]
    assert [path.split("/")[-2] for path in paths(pets)] == [
        "cat", "cat", "siamese", "siamese", "tabby", "tabby", "hound", "hound"]
    assert pets.labels.tolist() == [0] * 6 + [1] * 2
    assert sets["new"].columns is None and sets["new"].labels.tolist() == [0, 0, 1, 1, 1, 1]
    (tmp_path / "pets" / "classes.txt").write_text(lines + "tabby\tcat; dog\n")
    with pytest.raises(SystemExit, match="pets/classes.txt: cat and cat;dog overlap$"):
        read(tmp_path)

def test_val_held_out(tmp_path):
    """Hold out a part of each class where there is no val/, drawn by seed, so that one file more
    moves no other: otherwise val would hold training images when a run is evaluated."""
    write_images(tmp_path / "photo", ["a", "b"], 10)
    write_images(tmp_path / "art", ["a", "b", "rare"], 5)
    write_images(tmp_path / "art", ["single"], 1)
    write_images(tmp_path / "sketch", ["a", "b"], 2)
    flags = {"train": ["photo", "art"]}
    train, sets = read(tmp_path, **flags)
    held = paths(sets["val"])
    kept = paths(train)
    assert list(sets) == ["val", "sketch"]
    assert np.bincount(sets["val"].labels, minlength=4).tolist() == [3, 3, 1, 0]
    assert np.bincount(train.labels).tolist() == [12, 12, 4, 1]          # one is left to train on
    assert len(set(held) | set(kept)) == 36
    assert paths(read(tmp_path, seed=1, **flags)[1]["val"]) != held
    half = read(tmp_path, val_frac=0.5, **flags)[1]["val"]
    assert np.bincount(half.labels, minlength=4).tolist() == [8, 8, 3, 0]
    Image.new("RGB", (8, 8)).save(tmp_path / "photo" / "a" / "more.png")
    assert set(held) < set(paths(read(tmp_path, **flags)[1]["val"]))
    assert len(read(tmp_path, val="sketch", **flags)[0]) == 37

def test_what_is_skipped(tmp_path, capsys):
    """Skip an empty class, and a folder of ROOT that is no image folder, with one line each; hidden
    files and folders and other suffixes without."""
    write_images(tmp_path / "train", ["a", "b", ".cache", "a/.thumbs"])
    (tmp_path / "train" / "empty").mkdir()
    write_images(tmp_path / "imagenet-c" / "fog", ["a", "b"])
    write_images(tmp_path / ".hidden", ["a", "b"])
    for name in ("._0.png", "notes.txt"):
        (tmp_path / "train" / "a" / name).write_bytes(b"no image")
    train, sets = read(tmp_path)
    assert train.classes == ["a", "b"]
    assert (len(train), len(sets["val"])) == (4, 2)
    assert list(sets) == ["val"]
    said = [line for line in capsys.readouterr().out.splitlines() if " is skipped" in line]
    assert said == [
        f"warning: {tmp_path}/train/empty holds no image and is skipped",
        f"warning: {tmp_path}/imagenet-c is skipped: no images in {tmp_path}/imagenet-c/<class>/"]

def test_eval_elsewhere(tmp_path, tiny_root):
    """Call what --eval names by parent and name, and score each folder once. A folder of image
    folders is refused: the shell expands DIR/*."""
    for name in ("zoo", "sketch", "test", "c/fog/1", "c/fog/2", "c/snow/5", "other/c/snow/5"):
        write_images(tmp_path / "far" / name, ["ant", "bee"], 1)
    far = tmp_path / "far"
    places = [far / "zoo", far / "sketch", far / "test", *sorted(far.glob("c/*/*"))]
    places += [far / "zoo", f"{tiny_root}/sketch", f"{tiny_root}/val"]
    sets = read(tiny_root, eval=[str(place) for place in places])[1]
    assert list(sets) == [
        "val", "few", "other", "sketch", "far/zoo", "far/sketch", "far/test", "fog/1", "fog/2",
        "snow/5"]
    assert paths(sets["sketch"])[0] == f"{tiny_root}/sketch/ant/0.png"
    assert paths(sets["far/sketch"])[0] == f"{far}/sketch/ant/0.png"
    assert all(s.is_shift for s in list(sets.values())[4:])
    assert sets["snow/5"].columns == [[0], [1]]
    same = [str(far / "c" / "snow" / "5"), str(far / "other" / "c" / "snow" / "5")]
    with pytest.raises(SystemExit, match="error: --eval: two folders have the same name"):
        read(tiny_root, eval=same)
    with pytest.raises(SystemExit, match=r"^error: .*far/c/fog: no images in .* give .*/fog/\*$"):
        read(tiny_root, eval=[str(far / "c" / "fog")])
