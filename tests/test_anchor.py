# SPDX-License-Identifier: MIT
"""anchor.py: captions, pools and retrieval against slow and plain ways, its run against a plain loop."""
import io
import json
import os
import re
import shutil
import tarfile
import types

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import anchor
import common
from conftest import TEXT, Cut, assert_continues_to_the_same_bytes, assert_processes_are_one, log, run, weights

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "cat", "dog", "sea_eel"]


# ---- retrieval

@pytest.mark.parametrize("n, m, k", [(5, 9, 1), (7, 70000, 3), (4100, 40, 5), (3, 2, 4)])
def test_retrieve_is_a_full_sort(n, m, k):
    """The scores of what is retrieved are the k greatest, whatever the order of ties. The sizes cross block bounds."""
    g = torch.Generator().manual_seed(0)
    query, pool = torch.randn(n, 4, generator=g), torch.randint(-3, 4, (m, 4), generator=g).float()      # many ties
    found = anchor.retrieve(query, pool, k)
    assert found.dtype == torch.long and found.shape == (n, min(k, m))
    scores = query @ pool.T
    expected = scores.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(scores.gather(1, found), expected, rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in found[:50].tolist())


def test_retrieve_from_half_precision():
    query, pool = torch.eye(3), torch.eye(3)[[2, 0, 1]].half()
    assert anchor.retrieve(query, pool, 1).squeeze(1).tolist() == [1, 2, 0]


# ---- pools

def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(seed):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_shards_are_read_back_byte_for_byte(tmp_path, monkeypatch):
    """img2dataset's shards: .jpg, .txt and .json members in any order, long names, texts missing."""
    long = "x" * 150                                            # needs a longer tar header
    write_shard(tmp_path / "00.tar", [("0001.txt", b"first"), ("0001.jpg", png(1)), ("0001.json", b"{}"),
                                      ("0002.jpg", png(2)), (f"{long}.jpg", png(3)), (f"{long}.txt", "drei\nzeilen".encode())])
    write_shard(tmp_path / "01.tar", [("0001.jpg", png(4)), ("0001.txt", b"other shard, same name"), ("0005.txt", b"no image"),
                                      ("0006.jpg", png(6)), ("0006.txt", b" ")])
    pool = anchor.open_pool(str(tmp_path / "{00..01}.tar"))
    assert pool.texts == ["first", "drei zeilen", "other shard, same name"]
    seen = []
    monkeypatch.setattr(common, "decode_image", lambda data, _: seen.append(bytes(data.numpy())) or data)
    for i in (2, 0, 1):                                         # random access
        pool.read(i)
    assert seen == [png(4), png(1), png(3)]
    pool.take([1]).read(0)
    assert seen[-1] == png(3) and pool.take([1]).texts == ["drei zeilen"]


def test_training_on_shards(tiny_root, clip, tmp_path):
    """Two shards are the pool; fewer pairs than the batch are all taken, every step."""
    for s in range(2):
        members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", png(10 * s + i)), ("txt", b"some text"))]
        write_shard(tmp_path / f"{s:05d}.tar", members)
    flags = ["--pool", str(tmp_path / "{00000..00001}.tar"), "--k", "6", "--workers", "1"]
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, steps=2)
    assert all(line["retrieved"] > 0 for line in log(tmp_path / "out"))


def test_a_tsv_pool(pool):
    pairs = anchor.open_pool(pool)
    assert len(pairs) == 23 and pairs.texts[3] == "pool picture 3"
    assert torch.equal(pairs.read(3), common.read_image(os.path.join(os.path.dirname(pool), "p", "3.png")))


@pytest.mark.parametrize("make, message", [
    (lambda d: f"{d}/none.tsv", "none.tsv cannot be read"),
    (lambda d: (open(f"{d}/a.tsv", "w").write("path\ttext\n"), f"{d}/a.tsv")[1], "holds no pairs"),
    (lambda d: (open(f"{d}/a.tsv", "w").write("path\ttext\nx.jpg\n"), f"{d}/a.tsv")[1], "line 2"),
    (lambda d: f"{d}/" + "{0..2}.tar", "0.tar cannot be read"),
    (lambda d: (open(f"{d}/a.tar", "w").write("no tar"), f"{d}/a.tar")[1], "a.tar cannot be read"),
    (lambda d: (write_shard(f"{d}/a.tar", [("a.txt", b"x")]), f"{d}/a.tar")[1], "holds no pairs"),
])
def test_bad_pools(tmp_path, make, message):
    with pytest.raises(common.Abort, match=message) as e:
        anchor.open_pool(make(str(tmp_path)))
    assert e.value.code == 2


def test_nearest_pairs_are_taken_once_and_unreadable_ones_left_out(tiny_root, clip, pool, tmp_path, capsys):
    """By hand: the nearest readable image of each training image, by the untuned model."""
    folder = os.path.join(os.path.dirname(pool), "p")
    open(f"{folder}/4.png", "w").write("broken")
    os.remove(f"{folder}/7.png")
    os.makedirs(tmp_path / "out")
    model, _, preprocess, _ = common.load_model(clip(), "", CPU)
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0, workers=0, k=1,
                                 model=clip(), pretrained="", precision="fp32", batch_size=8, out=str(tmp_path / "out"),
                                 pool=pool)
    images, pairs = common.read_root(args).train, anchor.open_pool(pool)
    got = anchor.retrieved_pairs(pairs, images, model, preprocess, args, CPU)
    assert "2 of the pool's 23 images cannot be read" in capsys.readouterr().out

    def feature(path):
        return common.encode_image(model, common.to_input(model, CPU)(preprocess(common.read_image(path))[None]))[0]
    with torch.no_grad():
        candidates = [i for i in range(23) if i not in (4, 7)]
        features = torch.stack([feature(f"{folder}/{i}.png") for i in candidates]).half().float()
        nearest = {candidates[int((features @ feature(images.path(i)).half().float()).argmax())] for i in range(len(images))}
    assert len(got) == len(set(got.texts)) and {int(text.split()[-1]) for text in got.texts} == nearest


def test_features_are_cached_until_something_changes(tiny_root, clip, pool, captions, tmp_path, monkeypatch):
    titles, features = [], common.image_features
    monkeypatch.setattr(common, "image_features", lambda *a, **k: titles.append(a[5] if len(a) > 5 else "")
                        or features(*a, **k))
    flags = ["--pool", pool]
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, steps=1)
    assert titles.count("features: pool") == titles.count("features: train") == 1
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, "--overwrite", steps=1)
    assert titles.count("features: pool") == titles.count("features: train") == 1
    shutil.copy(os.path.dirname(pool) + "/p/1.png", os.path.dirname(pool) + "/p/2.png")
    run(anchor, tiny_root, clip(), tmp_path / "out", *flags, "--overwrite", steps=1)
    assert titles.count("features: pool") == 2 and titles.count("features: train") == 1


# ---- captions

def test_captions_of_odd_images(tiny_root, tmp_path, capsys):
    """An unreadable image gets a caption that says nothing; a name that cannot be a line is refused first."""
    shutil.copytree(tiny_root, tmp_path / "root")
    (tmp_path / "root" / "train" / "ant" / "1.png").write_bytes(b"broken")
    args = types.SimpleNamespace(data=str(tmp_path / "root"), train=["train"], val=None, val_frac=0.2, eval=[], seed=0, batch_size=8,
                                 workers=0, precision="fp32")
    images, name = common.read_root(args).train, write_coca(str(tmp_path / "coca"))
    anchor.write_captions(str(tmp_path / "c.tsv"), name, images, args, CPU)
    assert "train/ant/1.png\tan image\n" in open(tmp_path / "c.tsv").read()
    assert len(anchor.read_captions(str(tmp_path / "c.tsv"), images)) == 40
    for i, odd in enumerate(("2\n.png", "2\r.png", "2\t.png")):     # each would tear a line of the file
        os.rename(tmp_path / "root" / "train" / "ant" / f"{i}.png", tmp_path / "root" / "train" / "ant" / odd)
        with pytest.raises(common.Abort, match="rename"):
            anchor.write_captions(str(tmp_path / "d.tsv"), name, common.read_root(args).train, args, CPU)
        os.rename(tmp_path / "root" / "train" / "ant" / odd, tmp_path / "root" / "train" / "ant" / f"{i}.png")


def test_captions(tiny_root, captions):
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0)
    images = common.read_root(args).train
    read = anchor.read_captions(captions, images)
    assert len(read) == 40 and read[8] == ["one bee number 0 in the garden", "another view of the bee"]


@pytest.mark.parametrize("line, message", [
    ("train/ant/99.png\tno such image", "line 47: there is no image .*train/ant/99.png"),
    ("train/ant/0.png\tanother view of the ant", "line 47: the same caption twice for train/ant/0.png"),
    ("train/ant/0.png\t", "line 47: expected path<TAB>caption"),
    ("train/ant/0.png no tab", "line 47: expected path<TAB>caption"),
    ("train/ant/0.png\ta\tb", "line 47: expected path<TAB>caption"),
    ("\ta caption of nothing", "line 47: expected path<TAB>caption"),
    ("headless", "line 1: expected the header"),
    (None, "no caption for 1 training images, train/sea_eel/7.png first"),
])
def test_bad_captions(tiny_root, clip, captions, tmp_path, capsys, line, message):
    if line is None:
        text = open(captions).read().replace("train/sea_eel/7.png\tone sea_eel number 7 in the garden\n", "")
    else:
        text = open(captions).read() + line + "\n"
    if line == "headless":
        text = open(captions).read().replace("path\tcaption\n", "")
    open(captions, "w").write(text)
    with pytest.raises(SystemExit) as e:
        run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions)
    err = capsys.readouterr().err
    assert e.value.code == 2 and re.search(message, err) and err.count("\n") == 1 and not os.path.exists(tmp_path / "out")


def write_coca(path):
    """A tiny random CoCa as a local-dir."""
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16,
              "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
              "text_cfg": {**TEXT, "context_length": 30, "layers": 1, "embed_cls": True, "output_tokens": True},
              "multimodal_cfg": {"context_length": 30, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
              "custom_text": True}
    torch.manual_seed(0)
    model = open_clip.CoCa(**{k: v for k, v in json.loads(json.dumps(config)).items() if k != "custom_text"})
    with torch.no_grad():
        for p in model.parameters():                            # so that images differ in what is said of them
            if p.ndim > 1:
                torch.nn.init.normal_(p)
    os.makedirs(path)
    save_file(model.state_dict(), f"{path}/open_clip_model.safetensors")
    with open(f"{path}/open_clip_config.json", "w") as f:
        json.dump({"model_cfg": config, "preprocess_cfg": {"size": 32}}, f)
    return f"local-dir:{path}"


def test_greedy_captions_token_by_token(tmp_path):
    """Against a loop that feeds one image and all tokens so far, from pixels, each time."""
    coca, *_ = common.load_model(write_coca(str(tmp_path / "coca")), "", CPU)
    images = torch.randn(5, 3, 32, 32)
    naive = []
    with torch.no_grad():
        for image in images:
            tokens = [49406]
            while len(tokens) < 12:
                tokens.append(int(coca(image[None], torch.tensor([tokens]), output_labels=False)["logits"][0, -1].argmax()))
            naive.append(tokens)
    assert len({tuple(t) for t in naive}) > 1
    assert anchor.greedy_captions(coca, images, length=12).tolist() == naive
    end = naive[0][4]                                           # a token that is said: now it ends a caption
    expected = []
    for tokens in naive:
        cut = tokens.index(end) + 1 if end in tokens else 12
        expected.append(tokens[:cut] + [0] * (12 - cut))
    got = anchor.greedy_captions(coca, images, length=12, end=end)
    assert got.tolist() == [t[:got.shape[1]] for t in expected]


def test_a_caption_model_writes_the_file_and_goes_on_after_a_kill(tiny_root, clip, tmp_path, monkeypatch):
    name = write_coca(str(tmp_path / "coca"))
    flags = ["--caption-model", name, "--ret", "0"]
    run(anchor, tiny_root, clip(), tmp_path / "whole", *flags, steps=1)
    whole = open(tmp_path / "whole" / "captions.tsv").read()
    assert len(whole.splitlines()) == 41 and whole.startswith(f"path\tcaption by {name}\ntrain/ant/0.png\t")
    greedy, calls = anchor.greedy_captions, []

    def cut(*a, **k):
        calls.append(1)
        if len(calls) == 3:
            raise Cut
        return greedy(*a, **k)
    monkeypatch.setattr(anchor, "greedy_captions", cut)
    with pytest.raises(Cut):
        run(anchor, tiny_root, clip(), tmp_path / "cut", *flags, steps=1)
    partial = tmp_path / "cut" / "captions.tsv.partial"
    assert len(open(partial).readlines()) == 17                 # a header and two batches of eight
    with open(partial, "a") as f:
        f.write("train/cat/0.png\thalf a li")                   # the line that the kill cut
    calls[:] = [1] * 3
    run(anchor, tiny_root, clip(), tmp_path / "cut", *flags, steps=1)
    assert open(tmp_path / "cut" / "captions.tsv").read() == whole and not os.path.exists(partial)
    os.rename(tmp_path / "whole", tmp_path / "moved")           # a run may be moved, as --out changes no run
    run(anchor, tiny_root, clip(), tmp_path / "moved", *flags, steps=1)
    assert len(calls) - 3 == 3                                  # what was done is not done again


def test_captions_of_another_captioner_are_refused(tiny_root, clip, captions, tmp_path, capsys):
    """--caption-model is never accepted and then ignored."""
    name = write_coca(str(tmp_path / "coca"))
    before = open(captions).read()
    for flags, culprit in ((["--caption-model", name, "--captions", captions], "is not by --caption-model"),
                           (["--caption-model", "coca_ViT-L-14"], "needs a tag")):
        with pytest.raises(SystemExit) as e:
            run(anchor, tiny_root, clip(), tmp_path / "out", *flags)
        assert e.value.code == 2 and culprit in capsys.readouterr().err
        assert open(captions).read() == before and not os.path.exists(tmp_path / "out")


# ---- the run

def test_training_is_a_plain_loop(tiny_root, clip, captions, pool, tmp_path):
    """Four steps of ARF written out: the terms' weights, the drawn captions, the retrieved batch."""
    run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions, "--pool", pool, "--cap", "0.5", "--ret", "2")
    model = open_clip.create_model(clip()).eval()
    tokenizer = open_clip.get_tokenizer(clip())
    args = types.SimpleNamespace(data=tiny_root, train=["train"], val=None, val_frac=0.2, eval=[], seed=0, batch_size=8,
                                 workers=0, k=1, model=clip(), pretrained="", precision="fp32", out=str(tmp_path / "out"))
    root = common.read_root(args)
    _, preprocess_train, preprocess, _ = common.load_model(clip(), "", CPU)
    pairs = anchor.retrieved_pairs(anchor.open_pool(pool), root.train, model, preprocess, args, CPU)
    R = min(8, len(pairs))
    read = anchor.read_captions(captions, root.train)
    loaders = zip(common.train_loader(root.train, preprocess_train, args, 4, CPU),
                  common.train_loader(pairs, preprocess_train, args, 4, CPU, batch_size=R, seed=2**63))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    for step, ((x, y, index, draw), (x_r, _, index_r, _)) in enumerate(loaders):
        u = model.encode_image((x / 255 - mean) / std, normalize=True)
        u_r = model.encode_image((x_r / 255 - mean) / std, normalize=True)

        def contrast(u, texts):
            S = model.logit_scale.exp() * u @ model.encode_text(tokenizer(texts), normalize=True).T
            return (F.cross_entropy(S, torch.arange(len(S))) + F.cross_entropy(S.T, torch.arange(len(S)))) / 2
        classes = [root.templates[d % 3].replace("{}", root.classnames[k]) for k, d in zip(y.tolist(), draw.tolist())]
        said = [read[i][d // 3 % len(read[i])] for i, d in zip(index.tolist(), draw.tolist())]
        terms = [contrast(u, classes), contrast(u, said), contrast(u_r, [pairs.texts[i] for i in index_r.tolist()])]
        loss = terms[0] + 0.5 * terms[1] + 2 * terms[2]
        line = log(tmp_path / "out")[step]
        assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        for name, term in zip(("contrastive", "captions", "retrieved"), terms):
            assert line[name] == pytest.approx(float(term.detach()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = [0.5e-3, 1e-3, 1e-3, 0.5e-3][step]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ours = open_clip.create_model(f"local-dir:{tmp_path}/out/model").eval()
    torch.testing.assert_close(ours.encode_image(x / 255), model.encode_image(x / 255), rtol=1e-4, atol=1e-4)


def test_zeros(tiny_root, clip, captions, pool, tmp_path, capsys):
    """Zeroing both weights is FLYP to the byte; each alone is the paper's ablation, and says so where a file is missing."""
    import calft
    run(calft, tiny_root, clip(), tmp_path / "flyp", "--oc", "0", "--sd", "0", "--cross-fnorm", "0")
    run(anchor, tiny_root, clip(), tmp_path / "zero", "--captions", captions, "--pool", pool, "--cap", "0", "--ret", "0")
    a, b = weights(tmp_path / "flyp"), weights(tmp_path / "zero")
    assert all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    run(anchor, tiny_root, clip(), tmp_path / "cap", "--captions", captions)
    assert "no --pool: the text-compensated anchor alone" in capsys.readouterr().out
    assert set(log(tmp_path / "cap")[0]) == {"step", "loss", "lr", "contrastive", "captions"}
    run(anchor, tiny_root, clip(), tmp_path / "ret", "--pool", pool)
    assert "no --captions: the image-text-pair anchor alone" in capsys.readouterr().out
    assert set(log(tmp_path / "ret")[0]) == {"step", "loss", "lr", "contrastive", "retrieved"}


def test_no_image_is_encoded_twice(tiny_root, clip, captions, pool, tmp_path, monkeypatch):
    counts, encode_image = [], common.encode_image
    monkeypatch.setattr(common, "encode_image", lambda m, x, *a: counts.append(
        (len(x), torch.is_grad_enabled())) or encode_image(m, x, *a))
    run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions, "--pool", pool, steps=3)
    trained = [n for n, grad in counts if grad]
    assert len(trained) == 6 and trained[0::2] == [8, 8, 8]     # a batch and a retrieved batch a step


def test_without_anchors_it_says_what_is_missing(tiny_root, clip, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(anchor, tiny_root, clip(), tmp_path / "out")
    err = capsys.readouterr().err
    assert e.value.code == 2 and "--captions" in err and "--pool" in err and "--caption-model" in err
    assert err.count("\n") == 1 and not os.path.exists(tmp_path / "out")


def test_an_interrupted_run_continues_to_the_same_bytes(tiny_root, clip, captions, pool, tmp_path, monkeypatch):
    assert_continues_to_the_same_bytes(anchor, tiny_root, clip(), tmp_path, monkeypatch, "--captions", captions, "--pool", pool)


def test_two_processes_are_one(tiny_root, clip, captions, pool, tmp_path):
    assert_processes_are_one("anchor", tiny_root, clip(), tmp_path, "--captions", captions, "--pool", pool, "--k", "2")
