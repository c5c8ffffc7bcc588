# SPDX-License-Identifier: MIT
"""anchor.py: captions, pools and retrieval by slow and plain ways, its run against a plain loop."""
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torchvision.io import encode_png

import anchor
import calft
import common
from conftest import TEXT, assert_processes_are_one, log, run, weights

def parse(root, *flags):
    args = common.flags("test:", "out").parse_args(["--data", str(root), "--workers", "0", *flags])
    args.k = 1
    return args

@pytest.fixture
def both(captions, pool):
    return ["--captions", captions, "--pool", pool]

@pytest.mark.parametrize("n, m, k", [(5, 9, 1), (7, 70000, 3), (4100, 40, 5), (3, 2, 4)])
def test_retrieve_is_a_full_sort(n, m, k):
    """What is retrieved has the k greatest scores, across the bounds of blocks and for any ties."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(n, 4, generator=g)
    pool = torch.randint(-3, 4, (m, 4), generator=g).half()     # many ties
    found, scores = anchor.retrieve(query, pool, k), query @ pool.float().T
    assert found.dtype == torch.long and found.shape == (n, min(k, m))
    torch.testing.assert_close(scores.gather(1, found), scores.sort(1, True).values[:, :k])
    assert all(len(set(row)) == len(row) for row in found[:50].tolist())

def test_nearest_pairs_by_hand(tiny_root, clip, pool, tmp_path, capsys):
    """Readable pairs nearest to any training image are taken, once, by features that are kept."""
    folder = Path(pool).parent / "p"
    (folder / "4.png").write_text("broken")
    (folder / "7.png").unlink()
    model, _, preprocess, _ = common.load_model(clip(), "")
    train, _ = common.read_data(args := parse(tiny_root))
    images, texts = anchor.open_pool(os.path.relpath(pool))     # paths are relative to the file
    assert len(images) == 23 and texts[3] == "pool picture 3"
    args.out = str(tmp_path)
    found = anchor.retrieve_pairs(images, train, model, preprocess, args)
    assert "of the 21 readable pairs among 23" in capsys.readouterr().out

    def features(paths):
        x = torch.stack([preprocess(common.read_image(str(path))[0]) for path in paths])
        return model.encode_image(common.to_input(model, x), normalize=True).half().float()
    whole = [i for i in range(23) if i not in (4, 7)]
    u, v = features(map(os.fsdecode, train.paths)), features(folder / f"{i}.png" for i in whole)
    scores = u @ v.T
    assert found == sorted({whole[k] for k in scores.argmax(1)}) and len(found) > 1
    shutil.rmtree(folder)
    assert anchor.retrieve_pairs(images, train, model, preprocess, args) == found

def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

def png(value):
    return bytes(encode_png(torch.full((3, 20, 30), value, dtype=torch.uint8)).numpy())

def test_shards_are_read_back_byte_for_byte(tiny_root, clip, tmp_path):
    """Of img2dataset's shards, members in any order, every image has its own bytes and text."""
    long = "x" * 150                                            # needs a longer tar header
    write_shard(tmp_path / "00.tar", [
        ("0001.txt", b"first"), ("0001.jpg", png(1)), ("0001.json", b"{}"), ("0002.jpg", png(2)),
        (f"{long}.jpg", png(3)), (f"{long}.txt", "drei\nzeilen".encode())])
    write_shard(tmp_path / "01.tar", [
        ("0001.jpg", png(4)), ("0001.txt", b"same name"), ("0005.txt", b"no image"),
        ("0006.jpg", png(6)), ("0006.txt", b" ")])
    images, texts = anchor.open_pool(f"{tmp_path}/{{00..01}}.tar")
    assert texts == ["first", "drei zeilen", "same name"]
    for i, value in ((2, 4), (0, 1), (1, 3)):
        file, offset, size = os.fsdecode(images.paths[i]).rsplit(":", 2)
        assert Path(file).read_bytes()[int(offset):][:int(size)] == png(value)
        assert (common.read_image(os.fsdecode(images.paths[i]))[0] == value).all()
    flags = ["--pool", f"{tmp_path}/{{00..01}}.tar", "--k", "6", "--workers", "1"]
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, steps=2)      # three pairs a step
    assert all(line["retrieved"] > 0 for line in log(tmp_path / "out"))

@pytest.mark.parametrize("file, text, message", [
    ("no.tsv", None, "no.tsv cannot be read"), ("a.tsv", "path\ttext\n", "holds no pairs"),
    ("a.tsv", "path\ttext\nx.jpg\n", "expected path<TAB>text, found 'x.jpg'"),
    ("{0..2}.tar", None, "0.tar cannot be read"), ("a.tar", "no tar", "a.tar cannot be read")])
def test_bad_pools(tmp_path, file, text, message):
    """A pool that cannot be used is one line that names it, before anything is trained."""
    if text:
        (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*$"):
        anchor.open_pool(f"{tmp_path}/{file}")

@pytest.mark.parametrize("old, new, message", [
    ("train/cat/3.png\tone cat number 3 in the garden\n", "", "no caption for 1 images, .*/cat/3"),
    ("cat/3.png", "cat/99.png", "there is no image .*train/cat/99.png"),
    ("\tone cat number 3", " one cat", "expected path<TAB>caption, found 'train/cat/3.png")])
def test_bad_captions(tiny_root, clip, captions, tmp_path, old, new, message):
    """A file of captions that does not fit is one line that names the fault; nothing is written."""
    text = Path(captions).read_text()
    assert text.count(old) == 1
    Path(captions).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*$"):
        run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions)
    assert not os.path.exists(tmp_path / "out")

def write_coca(path):
    """A tiny random CoCa as a local-dir."""
    text = {**TEXT, "context_length": 30, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16,
              "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    config = {"embed_dim": 16, "vision_cfg": vision, "multimodal_cfg": text,
              "text_cfg": {**text, "embed_cls": True, "output_tokens": True}}
    torch.manual_seed(0)
    model = open_clip.CoCa(**json.loads(json.dumps(config)))
    for p in model.parameters():                                # so that images differ in captions
        if p.ndim > 1:
            torch.nn.init.normal_(p)
    path.mkdir()
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    about = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {"size": 32}}
    (path / "open_clip_config.json").write_text(json.dumps(about))
    return f"local-dir:{path}"

def test_greedy_captions_token_by_token(tmp_path):
    """A loop that feeds one image, from pixels, and all tokens so far says the same."""
    coca, *_ = common.load_model(write_coca(tmp_path / "coca"), "")
    images, naive = torch.randn(5, 3, 32, 32), [[49406] for _ in range(5)]
    with torch.no_grad():
        for tokens, image in zip(naive, images):
            while len(tokens) < 12:
                out = coca(image[None], torch.tensor([tokens]), output_labels=False)
                tokens.append(int(out["logits"][0, -1].argmax()))
    assert len(set(map(tuple, naive))) > 1
    assert anchor.greedy_captions(coca, images, length=12).tolist() == naive
    end = naive[0][4]                                           # said by one, now it ends a caption
    cut = [row[:row.index(end) + 1] if end in row else row for row in naive]
    got = anchor.greedy_captions(coca, images, length=12, end=end).tolist()
    assert got == [(row + [0] * 12)[:max(map(len, cut))] for row in cut]

def test_captions_of_odd_images(tiny_root, tmp_path):
    """An unreadable image gets a caption that says nothing."""
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "train" / "ant" / "1.png").write_bytes(b"broken")
    name, args, file = write_coca(tmp_path / "coca"), parse(tmp_path / "root"), f"{tmp_path}/c.tsv"
    train = common.read_data(args)[0]
    images = replace(train, paths=train.paths[:2], labels=train.labels[:2])
    anchor.write_captions(file, name, images, args)
    first, second = anchor.read_captions(file, images, args.data)
    assert second == ["an image"] != first

def test_a_caption_model_goes_on_after_a_kill(tiny_root, clip, captions, tmp_path, monkeypatch):
    """Captions are on the disk batch by batch, are never made twice, nor used if another's."""
    name, file = write_coca(tmp_path / "coca"), tmp_path / "out" / "captions.tsv"
    flags, greedy, lines = ["--ret", "0", "--caption-model"], anchor.greedy_captions, []

    def spy(*a):
        lines.append(file.read_text().count("\n"))
        return greedy(*a)
    monkeypatch.setattr(anchor, "greedy_captions", spy)
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, name, steps=1)
    whole = file.read_text()
    assert lines == [1, 9, 17, 25, 33] and whole.count("\n") == 41
    assert whole.startswith(f"path\tcaption by {name}\ntrain/ant/0.png\t")
    file.write_text("".join(whole.splitlines(True)[:17]) + "train/cat/0.png\thalf a li")
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, name, "--overwrite", steps=1)
    assert file.read_text() == whole and lines[5:] == [17, 25, 33]
    before = Path(captions).read_text()
    for by, message in ((name, "is not by this --caption-model"), ("coca_ViT-L-14", "needs a tag")):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run(anchor, tiny_root, clip(), tmp_path / "new", *flags, by, "--captions", captions)
    assert Path(captions).read_text() == before

def test_training_is_a_plain_loop(tiny_root, clip, captions, pool, both, tmp_path, monkeypatch):
    """Four steps by open_clip and stock AdamW are ours, with one forward of batch and of pairs."""
    trained, encode_image = [], common.encode_image

    def spy(model, x, *a):
        trained.extend([len(x)] * torch.is_grad_enabled())
        return encode_image(model, x, *a)
    monkeypatch.setattr(common, "encode_image", spy)
    run(anchor, tiny_root, clip(), tmp_path, *both, "--cap", "0.5", "--ret", "2")
    model, _, transform = open_clip.create_model_and_transforms(clip())
    tokenizer, normalize = open_clip.get_tokenizer(clip()), transform.transforms[-1]
    args, (images, texts) = parse(tiny_root, "--batch-size", "8"), anchor.open_pool(pool)
    train, _ = common.read_data(args)
    ours, crop, preprocess, _ = common.load_model(clip(), "")
    args.out = str(tmp_path / "features")
    near = anchor.retrieve_pairs(images, train, ours, preprocess, args)
    said, R = anchor.read_captions(captions, train, tiny_root), min(8, len(near))
    batches = common.train_loader(train, crop, args, 0, 4)
    pairs = replace(images, paths=images.paths[near], labels=images.labels[near])
    pairs = common.train_loader(pairs, crop, args, 0, 4, R, 2 ** 63)
    steps = zip(batches, pairs, [0.5e-3, 1e-3, 1e-3, 0.5e-3], log(tmp_path), strict=True)
    optimizer = torch.optim.AdamW(model.eval().parameters(), weight_decay=0.1)

    def contrast(x, texts):
        u, v, tau = model(normalize(x / 255), tokenizer(texts))
        S, target = tau * u @ v.T, torch.arange(len(x))
        return (cross_entropy(S, target) + cross_entropy(S.T, target)) / 2
    for (x, y, rows, draws), (a, _, b, _), lr, line in steps:
        text = [train.templates[d % 3].replace("{}", train.classnames[k]) for k, d in zip(y, draws)]
        drawn = [said[i][d // 3 % len(said[i])] for i, d in zip(rows, draws)]
        terms = contrast(x, text), contrast(x, drawn), contrast(a, [texts[near[i]] for i in b])
        loss = terms[0] + 0.5 * terms[1] + 2 * terms[2]
        logged = [line[name] for name in ("contrastive", "captions", "retrieved", "loss")]
        assert logged == pytest.approx([value.item() for value in (*terms, loss)], rel=1e-4)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert trained == [8, R] * 4

def test_zeros_and_ablations(tiny_root, clip, both, tmp_path):
    """Without both weights it is FLYP to the byte, calft.py without its terms and its teacher;
    without a file its term is absent."""
    run(calft, tiny_root, clip(), tmp_path / "flyp", "--oc=0", "--sd=0", "--cross-fnorm=0")
    run(anchor, tiny_root, clip(), tmp_path / "zero", *both, "--cap=0", "--ret=0")
    a, b = weights(tmp_path / "flyp"), weights(tmp_path / "zero")
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path / "flyp" / "teacher").exists()
    assert all(line["loss"] == line["contrastive"] for line in log(tmp_path / "flyp"))
    for flags, term in ((both[:2], "captions"), (both[2:], "retrieved")):
        run(anchor, tiny_root, clip(), tmp_path / term, *flags, steps=1)
        assert set(log(tmp_path / term)[0]) == {"step", "loss", "lr", "contrastive", term}

def test_two_processes_are_one(tiny_root, clip, both, tmp_path):
    """Gradients, log and table do not depend on how many processes share a batch."""
    assert_processes_are_one(anchor, tiny_root, clip(), tmp_path, *both, "--k", "2")
