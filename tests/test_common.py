# SPDX-License-Identifier: MIT
"""Text and heads against open_clip, scores against torchmetrics, images against Pillow, ROOT's rules one by one."""
import io
import json
import math
import os
import types

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import common
from conftest import SHARED, write_images

CPU = torch.device("cpu")


# ---- text and heads

@pytest.mark.parametrize("kind, extra", [("vit", {}), ("vit", {"custom_text": True}), ("resnet", {}), ("timm", {})])
def test_encode_text_is_open_clips_at_full_length(clip, kind, extra):
    """Cutting at the longest prompt must change nothing: if it does, heads are silently worse."""
    model, *_, tokenizer = common.load_model(clip(kind, **extra), "", CPU)
    tokens = tokenizer(["a", "a photo of a very large dog on a lawn.", "ant", "a " * 200])
    for part in (tokens[:3], tokens):                           # cut, and at full length
        full = model.encode_text(part, normalize=True)
        torch.testing.assert_close(common.encode_text(model, part), full, rtol=1e-5, atol=1e-6)
    assert torch.allclose(common.encode_text(model, tokens).norm(dim=1), torch.ones(4))


def test_encode_text_cuts(clip):
    """The work is that of the longest prompt, not of 77 tokens."""
    model, *_, tokenizer = common.load_model(clip(), "", CPU)
    seen = []
    hook = model.transformer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    common.encode_text(model, tokenizer(["a dog", "a cat"]))
    hook.remove()
    assert seen[0][1] == 4                                      # start, a, dog, end


def test_encode_text_of_a_tower_that_looks_ahead_is_not_cut(clip):
    """Without a causal mask the padding is seen, so cutting would change the features."""
    name = clip("vit", custom_text=True)
    model, *_, tokenizer = common.load_model(name, "", CPU)
    model.text.attn_mask = None
    tokens = tokenizer(["a dog", "a cat"])
    torch.testing.assert_close(common.encode_text(model, tokens), model.encode_text(tokens, normalize=True))


def test_head_is_open_clips_zero_shot_classifier(clip):
    """open_clip's is (d, K) and without the logit scale."""
    model, *_, tokenizer = common.load_model(clip(), "", CPU)
    names, templates = ["ant", "bee", "sea eel"], open_clip.OPENAI_IMAGENET_TEMPLATES[:7]
    E = common.text_embeddings(model, tokenizer, names, templates)
    assert E.shape == (3, 7, 24)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(common.class_head(E), theirs.T, rtol=1e-5, atol=1e-6)
    strings = common.text_embeddings(model, tokenizer, names, [t("{}") for t in templates])
    torch.testing.assert_close(strings, E)


# ---- scores

@pytest.fixture
def predictions():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1700, 10, generator=g) * 2
    labels = torch.where(torch.rand(1700, generator=g) < 0.4, logits.argmax(1), torch.randint(10, (1700,), generator=g))
    return logits, labels


def test_scores_are_torchmetrics(predictions):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error
    logits, labels = predictions
    got = common.scores(logits, labels)
    p = logits.softmax(1)
    assert got["top1"] == pytest.approx(float(multiclass_accuracy(p, labels, 10, average="micro")), abs=1e-6)
    assert got["top1_se"] == pytest.approx(math.sqrt(got["top1"] * (1 - got["top1"]) / 1700))
    assert got["ece"] == pytest.approx(float(multiclass_calibration_error(p, labels, 10, n_bins=15)), abs=1e-6)
    assert got["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    one_hot = torch.nn.functional.one_hot(labels, 10)
    assert got["brier"] == pytest.approx(float((p - one_hot).square().sum(1).mean()), rel=1e-5)
    batches = [multiclass_calibration_error(p[i:i + 512], labels[i:i + 512], 10, n_bins=10) for i in range(0, 1700, 512)]
    sizes = [512, 512, 512, 164]
    assert got["ece_batch10"] == pytest.approx(sum(float(e) * n for e, n in zip(batches, sizes)) / 1700, abs=1e-6)


def test_ece_by_hand():
    """Two bins of 15: (0.62, 0.64) half right, 0.97 all right."""
    confidence, correct = [0.62, 0.64, 0.97, 0.97], [1, 0, 1, 1]
    assert common.ece(confidence, correct) == pytest.approx(0.5 * abs(0.5 - 0.63) + 0.5 * 0.03, abs=1e-9)
    assert common.ece([1.0, 1.0], [1, 1]) == 0
    assert common.ece([1.0, 1.0], [0, 0]) == 1
    assert common.ece(torch.tensor([0.55, 0.85]), torch.tensor([True, False]), bins=1) == pytest.approx(0.2, abs=1e-6)


def test_ece_of_calibrated_predictions_is_small_on_the_whole_set_only():
    """The batch average reads a calibrated model as badly calibrated: why it has a name of its own."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 50000)
    correct = rng.uniform(size=50000) < confidence
    assert common.ece(confidence, correct) < 0.011
    batches = [common.ece(confidence[i:i + 64], correct[i:i + 64], 10) for i in range(0, 50000, 64)]
    assert np.mean(batches) > 0.05


# ---- schedule and batches

def test_cosine_lr():
    assert common.cosine_lr(0, 100, 10, 2.0) == pytest.approx(0.2)
    assert common.cosine_lr(9, 100, 10, 2.0) == pytest.approx(2.0)
    assert common.cosine_lr(10, 100, 10, 2.0) == pytest.approx(2.0)
    assert common.cosine_lr(55, 100, 10, 2.0) == pytest.approx(1.0)
    assert common.cosine_lr(100, 100, 10, 2.0) == pytest.approx(0.0)


def test_batches_hold_each_image_once_an_epoch(monkeypatch):
    """17 images, batches of 5: ten epochs are 34 steps, every epoch an order of its own, ranks cut the same batches."""
    run = [item for batch in common.batches(17, 5, 34, seed=3) for item in batch]
    for epoch in range(10):
        assert sorted(i for e, i in run if e == epoch) == list(range(17))
    assert [i for e, i in run if e == 0] != [i for e, i in run if e == 1]
    late = [item for batch in common.batches(17, 5, 34, seed=3, start=20) for item in batch]
    assert late == run[100:]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(common, "rank_world", lambda: (rank, 2))
        shares.append(list(common.batches(17, 4, 40, seed=3)))
    monkeypatch.undo()
    whole = list(common.batches(17, 4, 40, seed=3))
    assert [a + b for a, b in zip(*shares)] == whole


def test_augmentation_depends_on_seed_epoch_and_index_alone(tiny_root, clip):
    _, preprocess, *_ = common.load_model(clip(), "", CPU)
    root = read(tiny_root)

    def item(seed, epoch, i):
        return common.TrainImages(root.train, preprocess, seed)[epoch, i]
    first, state = item(0, 1, 2), torch.get_rng_state()
    torch.rand(100)
    item(0, 5, 3)
    again = item(0, 1, 2)
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:] and first[2] == 2
    for other in (item(1, 1, 2), item(0, 2, 2)):
        assert not torch.equal(first[0], other[0]) and first[3] != other[3]
    torch.set_rng_state(state)
    item(0, 0, 0)
    assert torch.equal(state, torch.get_rng_state())            # nobody else's randomness is touched


# ---- images

def encoded(image, fmt, **kw):
    data = io.BytesIO()
    image.save(data, fmt, **kw)
    return data.getvalue()


def odd_images():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(np.kron(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
    grey16 = (np.arange(32 * 40).reshape(32, 40) * 51).astype(np.uint16)
    second = Image.new("RGB", rgb.size, (1, 2, 3))
    yield "plain.jpg", encoded(rgb, "JPEG", quality=95), rgb
    yield "grey.jpg", encoded(rgb.convert("L"), "JPEG", quality=95), rgb.convert("L")
    yield "cmyk.jpg", encoded(rgb.convert("CMYK"), "JPEG", quality=95), rgb
    yield "really_a_png.JPEG", encoded(rgb, "PNG"), rgb
    yield "palette.png", encoded(rgb.quantize(20), "PNG"), rgb.quantize(20)
    yield "alpha.png", encoded(rgb.convert("RGBA"), "PNG"), rgb
    yield "grey16.png", encoded(Image.fromarray(grey16), "PNG"), Image.fromarray((grey16 / 257).round().astype(np.uint8))
    yield "lossless.webp", encoded(rgb, "WEBP", lossless=True), rgb
    yield "moving.webp", encoded(rgb, "WEBP", lossless=True, save_all=True, append_images=[second]), rgb
    yield "bitmap.bmp", encoded(rgb, "BMP"), rgb


@pytest.mark.parametrize("name, data, expected", list(odd_images()), ids=[o[0] for o in odd_images()])
def test_read_image(tmp_path, name, data, expected):
    """Whatever an image folder holds becomes the RGB that Pillow sees. ImageNet has CMYK files and a PNG named .JPEG."""
    (tmp_path / name).write_bytes(data)
    x = common.read_image(str(tmp_path / name))
    assert x.dtype == torch.uint8 and x.shape == (3, 32, 40)
    expected = np.asarray(expected.convert("RGB")).transpose(2, 0, 1)
    limit = 10 if name.endswith(".jpg") else 1          # JPEG loses a little
    assert np.abs(x.numpy().astype(int) - expected).mean() <= limit


def test_read_image_names_a_broken_file(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"not an image")
    with pytest.raises(common.Abort, match="x.jpg: not readable as an image") as e:
        common.read_image(str(tmp_path / "x.jpg"))
    assert e.value.code == 1


def compare_with_open_clip(paths, name, size):
    """(mean absolute difference of the network's input in pixel units, smallest feature cosine)"""
    model, _, preprocess, _ = common.load_model(name, "", CPU)
    _, _, theirs = open_clip.create_model_and_transforms(name)
    prepare, differences, cosines = common.to_input(model, CPU), [], []
    std = torch.tensor(model.visual.preprocess_cfg["std"]).view(3, 1, 1)
    for path in paths:
        ours = prepare(preprocess(common.read_image(path))[None])
        pil = theirs(Image.open(path))[None]
        assert ours.shape == pil.shape
        differences.append(float(((ours - pil) * std).abs().mean()))
        cosines.append(float((common.encode_image(model, ours) * common.encode_image(model, pil)).sum().detach()))
    return np.mean(differences), min(cosines)


def test_evaluation_transform_is_open_clips(tmp_path, clip):
    write_images(str(tmp_path), ["a", "b"], 5, size=(61, 47))
    write_images(str(tmp_path), ["c"], 5, size=(20, 90))
    paths = [os.path.join(tmp_path, c, f"{i}.png") for c in "abc" for i in range(5)]
    difference, cosine = compare_with_open_clip(paths, clip(), 32)
    assert difference <= 1 / 255 and cosine >= 0.999


@pytest.mark.skipif(not os.path.isdir(f"{SHARED}/imagenet-original"), reason="no ../shared/data here")
def test_evaluation_transform_is_open_clips_on_photographs(clip):
    paths = [os.path.join(top, f) for top, _, fs in sorted(os.walk(f"{SHARED}/imagenet-original")) for f in sorted(fs)]
    difference, cosine = compare_with_open_clip([p for p in paths if p.lower().endswith((".jpeg", ".jpg"))],
                                                f"local-dir:{SHARED}/pacs-clip", 64)
    print(f"mean absolute difference {255 * difference:.3f}/255, smallest cosine {cosine:.5f}")
    assert difference <= 1 / 255 and cosine >= 0.999


# ---- ROOT

def read(data, need_train=True, **kw):
    args = dict(data=str(data), train=["train"], val=None, val_frac=0.2, eval=[], seed=0)
    return common.read_root(types.SimpleNamespace(**{**args, **kw}), need_train)


def test_root(tiny_root):
    root = read(tiny_root)
    assert root.classes == ["ant", "bee", "cat", "dog", "sea_eel"]
    assert root.classnames == ["ant", "bee", "cat", "dog", "sea eel"]
    assert (len(root.train), len(root.val)) == (40, 15)
    assert [(s.name, s.columns) for s in root.shifts] == [
        ("few", [[1], [3], [4]]), ("other", None), ("sketch", [[0], [1], [2], [3], [4]])]
    assert root.shifts[1].classnames == ["bee", "fox", "hen"]   # one class not trained on: its own zero-shot head
    assert root.templates == ["a photo of a {}.", "a sketch of the {}.", "art of a {}."]
    assert root.train.path(0) == f"{tiny_root}/train/ant/0.png"
    only_names = read(tiny_root, need_train=False)
    assert only_names.train is None and only_names.classes == root.classes


def test_classnames_txt_wins_over_wnids_over_folders(tmp_path):
    write_images(str(tmp_path / "train"), ["n01440764", "n02007558", "hot_dog"])
    root = read(tmp_path)
    assert root.classnames == ["hot dog", "tench", "flamingo"]
    assert len(root.templates) == 80
    (tmp_path / "classnames.txt").write_text("n02007558\tpink bird\n")
    assert read(tmp_path).classnames == ["hot dog", "tench", "pink bird"]
    (tmp_path / "classnames.txt").write_text("n02007558 pink bird\n")
    with pytest.raises(common.Abort, match="classnames.txt line 1"):
        read(tmp_path)


def test_digit_folders_are_indices_and_not_strings(tmp_path):
    """ImageNet-V2: folder 10 is class 10, though as a string it sorts third."""
    classes = [f"c{k:02d}" for k in range(12)]
    write_images(str(tmp_path / "train"), classes)
    write_images(str(tmp_path / "v2"), [str(k) for k in range(12)], 1)
    write_images(str(tmp_path / "ten"), [str(k) for k in range(10)], 1)
    v2, ten = {s.name: s for s in read(tmp_path).shifts}["v2"], {s.name: s for s in read(tmp_path).shifts}["ten"]
    assert v2.classes[:3] == ["0", "1", "10"] and v2.columns[:3] == [[0], [1], [10]]
    for i in range(len(v2)):
        assert v2.columns[v2.labels[i]] == [int(v2.path(i).split("/")[-2])]
    assert ten.columns is None                                  # not exactly 0..11: ten classes called 0..9


def test_validation_held_out_by_seed_per_class_and_folder(tmp_path):
    write_images(str(tmp_path / "photo"), ["a", "b"], 10)
    write_images(str(tmp_path / "art"), ["a", "b"], 5)
    write_images(str(tmp_path / "sketch"), ["a", "b"], 2)
    root = read(tmp_path, train=["photo", "art"])
    held = [root.val.path(i) for i in range(len(root.val))]
    for folder, count in (("photo/a", 2), ("photo/b", 2), ("art/a", 1), ("art/b", 1)):
        assert sum(f"/{folder}/" in h for h in held) == count
    kept = {root.train.path(i) for i in range(len(root.train))}
    assert len(kept) == 24 and not kept & set(held)
    assert [s.name for s in root.shifts] == ["sketch"]
    again = read(tmp_path, train=["photo", "art"], need_train=False)
    assert [again.val.path(i) for i in range(6)] == held
    other = read(tmp_path, train=["photo", "art"], seed=1)
    assert [other.val.path(i) for i in range(6)] != held


def test_eval_folders_elsewhere(tmp_path, tiny_root):
    write_images(str(tmp_path / "elsewhere" / "sketch"), ["ant", "bee"])
    write_images(str(tmp_path / "elsewhere" / "zoo"), ["n01440764", "x_y"])
    (tmp_path / "elsewhere" / "classnames.txt").write_text("x_y\tex why\n")
    root = read(tiny_root, eval=[str(tmp_path / "elsewhere" / "sketch"), str(tmp_path / "elsewhere" / "zoo")])
    names = [s.name for s in root.shifts]
    assert len(set(names)) == 5 and names[-1] == "zoo"
    assert root.shifts[-1].classnames == ["tench", "ex why"]


def write_objectnet(path, folders, labels, to_imagenet, border=(255, 0, 0)):
    """The format of the data set's own mapping files; images with the 2-pixel border."""
    from timm.data import ImageNetInfo
    names = [f"imagenet name {wnid}" for wnid in ImageNetInfo().label_names()]
    order = list(np.random.default_rng(0).permutation(1000))    # line i of the file is not model index i
    os.makedirs(f"{path}/mappings")
    json.dump(dict(zip(folders, labels)), open(f"{path}/mappings/folder_to_objectnet_label.json", "w"))
    json.dump({label: "; ".join(names[k] for k in ks) for label, ks in to_imagenet.items()},
              open(f"{path}/mappings/objectnet_to_imagenet_1k.json", "w"))
    open(f"{path}/mappings/imagenet_to_label_2012_v2", "w").write("\n".join(names[k] for k in order) + "\n")
    json.dump({str(k): i for i, k in enumerate(int(k) for k in order)},
              open(f"{path}/mappings/pytorch_to_imagenet_2012_id.json", "w"))
    for folder in folders:
        os.makedirs(f"{path}/images/{folder}")
        image = Image.new("RGB", (50, 44), border)
        image.paste((10, 200, 30), (2, 2, 48, 42))
        image.save(f"{path}/images/{folder}/a.png")


@pytest.fixture(scope="module")
def imagenet_like(tmp_path_factory):
    """A ROOT with ImageNet's 1000 wnids, an image each."""
    from timm.data import ImageNetInfo
    root = tmp_path_factory.mktemp("imagenet")
    for wnid in ImageNetInfo().label_names():
        os.makedirs(root / "val" / wnid)
        Image.new("RGB", (8, 8)).save(root / "val" / wnid / "0.png")
    os.symlink(root / "val", root / "train")
    (root / "templates.txt").write_text("a photo of a {}.\n")
    return root


def test_objectnet(imagenet_like, tmp_path):
    """Snake-named folders whose labels do not slugify, many-to-one columns, classes that ImageNet lacks, the border."""
    folders, labels = ["air_freshener", "full_sized_towel", "bicycle"], ["Air freshener", "Bath towel", "Bicycle"]
    write_objectnet(str(tmp_path / "objectnet-1.0"), folders, labels, {"Bath towel": [434], "Bicycle": [671, 444]})
    for path in (tmp_path / "objectnet-1.0", tmp_path / "objectnet-1.0" / "images"):
        images, = read(imagenet_like, need_train=False, eval=[str(path)]).shifts
        assert images.classes == ["bicycle", "full_sized_towel"] and images.columns == [[671, 444], [434]]
        assert [images.file(i) for i in range(len(images))] == ["images/bicycle/a.png", "images/full_sized_towel/a.png"]
        assert images.labels.tolist() == [0, 1]
        x = images.read(0)
        assert x.shape == (3, 40, 46) and not (x[0] == 255).any()
    os.remove(tmp_path / "objectnet-1.0" / "mappings" / "pytorch_to_imagenet_2012_id.json")
    with pytest.raises(common.Abort, match="pytorch_to_imagenet_2012_id.json cannot be read"):
        read(imagenet_like, need_train=False, eval=[str(tmp_path / "objectnet-1.0")])


def test_imagenets_shifts_by_wnid(imagenet_like, tmp_path):
    """Sketch and the V2 that circulates with wnids have all classes; -R and -A the subsets that timm lists."""
    from importlib import resources

    from timm.data import ImageNetInfo
    wnids = ImageNetInfo().label_names()
    subset = (resources.files("timm") / "data" / "_info" / "imagenet_r_synsets.txt").read_text().split()
    for name, classes in (("imagenetv2-matched-frequency", wnids), ("sketch", wnids), ("imagenet-r", subset)):
        for c in classes:
            os.makedirs(tmp_path / name / c)
            Image.new("RGB", (8, 8)).save(tmp_path / name / c / "0.png")
    v2, sketch, r = read(imagenet_like, need_train=False, eval=[
        str(tmp_path / name) for name in ("imagenetv2-matched-frequency", "sketch", "imagenet-r")]).shifts
    for images in (v2, sketch):
        assert images.columns == [[k] for k in range(1000)] and images.classnames == list(open_clip.IMAGENET_CLASSNAMES)
    assert len(r.classes) == 200 and [wnids[k] for k, in r.columns] == r.classes == sorted(subset)


def test_objectnet_for_other_classes_is_zero_shot(tiny_root, tmp_path):
    write_objectnet(str(tmp_path / "objectnet-1.0"), ["full_sized_towel", "bicycle"], ["Bath towel", "Bicycle"], {})
    images = read(tiny_root, eval=[str(tmp_path / "objectnet-1.0")]).shifts[-1]
    assert images.columns is None and images.classnames == ["Bicycle", "Bath towel"]


def test_the_greatest_of_several_columns_counts(tiny_root, clip, tmp_path):
    """By hand, one image at a time."""
    model, _, preprocess, tokenizer = common.load_model(clip(), "", CPU)
    root = read(tiny_root)
    shift = [s for s in root.shifts if s.name == "few"][0]
    shift.columns, root.shifts = [[1, 0], [3], [4, 2]], [shift]
    args = types.SimpleNamespace(batch_size=4, workers=0, precision="fp32", out=str(tmp_path))
    got = common.evaluate(model, tokenizer, preprocess, root, args, CPU)["sets"]["few"]
    with torch.no_grad():
        head = common.class_head(common.text_embeddings(model, tokenizer, root.classnames, root.templates))
        x = common.to_input(model, CPU)(torch.stack([preprocess(shift.read(i)) for i in range(9)]))
        S = model.logit_scale.exp() * common.encode_image(model, x) @ head.T
        losses = []
        for row, label in zip(S.tolist(), shift.labels):
            three = [max(row[1], row[0]), row[3], max(row[4], row[2])]
            losses.append(math.log(sum(map(math.exp, three))) - three[label])
    assert got["nll"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_folder_of_image_folders(tiny_root, clip, tmp_path):
    """ImageNet-C: corruption/severity/class. A mean per corruption and over all, and one voice in the shift mean."""
    for corruption, severities in (("fog", "123"), ("snow", "5")):
        for severity in severities:
            write_images(str(tmp_path / "imagenet-c" / corruption / severity), ["ant", "bee", "cat", "dog", "sea_eel"], 2,
                         seed=int(severity))
    root = read(tiny_root, eval=[str(tmp_path / "imagenet-c")])
    model, _, preprocess, tokenizer = common.load_model(clip(), "", CPU)
    args = types.SimpleNamespace(batch_size=64, workers=0, precision="fp32", out=str(tmp_path / "out"))
    got = common.evaluate(model, tokenizer, preprocess, root, args, CPU)
    top1 = {name: s["top1"] for name, s in got["sets"].items()}
    fog = [top1[f"imagenet-c/fog/{i}"] for i in (1, 2, 3)]
    assert set(got["means"]) == {"imagenet-c", "imagenet-c/fog", "imagenet-c/snow"}
    assert got["means"]["imagenet-c/fog"]["top1"] == pytest.approx(np.mean(fog))
    both = np.mean([*fog, top1["imagenet-c/snow/5"]])
    assert got["means"]["imagenet-c"]["top1"] == pytest.approx(both)
    assert got["shift_mean"]["top1"] == pytest.approx(np.mean([top1["few"], top1["sketch"], both]))
    assert "mean imagenet-c/fog" in common.table({"one": got})


def test_imagenet_r_and_a_by_timms_lists(imagenet_like, tmp_path):
    """200 of the 1000 logits each, and not the same 200."""
    from importlib.resources import files
    columns = []
    for name in ("imagenet_r", "imagenet_a"):
        wnids = files("timm.data").joinpath("_info", f"{name}_synsets.txt").read_text().split()
        for wnid in wnids:
            os.makedirs(tmp_path / name / wnid)
            Image.new("RGB", (8, 8)).save(tmp_path / name / wnid / "0.png")
        images, = read(imagenet_like, need_train=False, eval=[str(tmp_path / name)]).shifts
        assert len(images.columns) == 200 and images.classes == sorted(wnids)
        root_classes = sorted(os.listdir(imagenet_like / "val"))
        assert [root_classes[k] for k, in images.columns] == images.classes
        columns.append({k for k, in images.columns})
    assert columns[0] != columns[1]


@pytest.mark.parametrize("make, message", [
    (lambda d: None, "is not a folder"),
    (lambda d: write_images(f"{d}/val", ["a", "b"]), "has no folder train"),
    (lambda d: (write_images(f"{d}/train", ["a", "b"]), os.makedirs(f"{d}/train/c")), "train/c holds no image"),
    (lambda d: write_images(f"{d}/train", ["a"]), "classification needs two"),
    (lambda d: (write_images(f"{d}/train", ["a", "b"]), write_images(f"{d}/val", ["a", "z"])), "lacks: z"),
    (lambda d: (write_images(f"{d}/train", ["a", "b"], 1)), "too few images"),
    (lambda d: (write_images(f"{d}/train", ["a", "b"]), open(f"{d}/templates.txt", "w").write("a photo\n")), "templates.txt"),
], ids=["missing", "no-train", "empty-class", "one-class", "val-lacks", "too-few", "templates"])
def test_bad_roots(tmp_path, make, message):
    make(str(tmp_path / "root"))
    with pytest.raises(common.Abort, match=message) as e:
        read(tmp_path / "root")
    assert e.value.code == 2 and "\n" not in str(e.value)


# ---- models

@pytest.mark.parametrize("name, pretrained, message", [
    ("ViT-B/16", "openai", "did you mean ViT-B-16"),
    ("ViT-B-16", "openai", "use --model ViT-B-16-quickgelu"),
    ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "--pretrained laion2b_s34b_b88k"),
    ("ViT-B-16", "nonsense", "nonsense is neither a file nor a tag"),
    ("no-such-model", "openai", "is not a model of open_clip"),
    ("local-dir:/no/such/folder", "", "/no/such/folder/open_clip_config.json"),
    ("roberta-ViT-B-32", "", "Hugging Face tokenizer"),
])
def test_bad_models(name, pretrained, message):
    with pytest.raises(common.Abort, match=message) as e:
        common.load_model(name, pretrained, CPU)
    assert e.value.code == 2 and "\n" not in str(e.value)


def test_every_activation_trap_of_open_clip_is_caught():
    """Whatever tag open_clip would load into the wrong activation with a mere warning, we refuse."""
    trapped = 0
    for name, tag in open_clip.list_pretrained():
        wants = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
        has = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        if wants != has:
            trapped += 1
            with pytest.raises(common.Abort, match="has the other activation"):
                common._check_name(name, tag)
        else:
            common._check_name(name, tag)
    assert trapped >= 20


def test_random_weights_and_weights_file(tmp_path, clip):
    torch.manual_seed(0)
    model, *_ = common.load_model("RN50", "", CPU)
    assert not model.training and model.logit_scale.dtype == torch.float32
    torch.save(model.state_dict(), tmp_path / "rn50.pt")
    again, *_ = common.load_model("RN50", str(tmp_path / "rn50.pt"), CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("kind, extra", [("vit", {}), ("vit", {"custom_text": True}), ("resnet", {}), ("timm", {})])
def test_export_reloads_in_open_clip_bit_for_bit(tmp_path, clip, kind, extra):
    model, _, preprocess, _ = common.load_model(clip(kind, **extra), "", CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    common.export(model, clip(kind, **extra), str(tmp_path / "model"))
    again, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}/model")
    again.eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(x), again.encode_image(x))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}/model")(["a dog", "a cat"])
    assert torch.equal(model.encode_text(tokens), again.encode_text(tokens))
    assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert torch.equal(again.logit_scale, model.logit_scale)
