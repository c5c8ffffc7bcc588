# SPDX-License-Identifier: MIT
"""Test anchor.py: its captions, pools and retrieval by slow and plain ways, its run against a plain
loop."""
import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy

import anchor
import calft
import common
from conftest import CLASSES, assert_processes_are_one, log, parse, run, weights

def parse_k(root, k, out):
    """Return the args of a run on a ROOT that retrieves k pairs for each image."""
    args = parse("--data", str(root), "--out", str(out))
    args.k = k
    return args

@pytest.fixture
def both(captions, pool):
    """Return the flags that name captions and a pool."""
    return ["--captions", captions, "--pool", pool]

# ---- captions and pools --------------------------------------------------------------------------
@pytest.mark.parametrize("n, m, k", [(5, 9, 1), (7, 70000, 3), (4100, 40, 5), (3, 2, 4)])
def test_retrieve_is_a_full_sort(n, m, k):
    """Sort all scores: those retrieved are the k largest, across the bounds of blocks and for any
    ties, and no row is retrieved twice for one image."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(n, 4, generator=g)
    pool = torch.randint(-3, 4, (m, 4), generator=g).half()             # many ties
    found = anchor.retrieve(query, pool, k)
    assert found.dtype == torch.long and found.shape == (n, min(k, m))
    scores = query @ pool.float().T
    largest = scores.sort(1, descending=True).values[:, :k]
    torch.testing.assert_close(scores.gather(1, found), largest)
    for row in found[:50].tolist():
        assert len(set(row)) == len(row)

@pytest.mark.parametrize("k", [1, 3])
def test_nearest_pairs_by_hand(tiny_root, clip, pool, tmp_path, monkeypatch, capsys, k):
    """Compute which readable pairs are nearest to a readable training image. They are found once,
    and again by the features that are kept in --out."""
    root = tmp_path / "root"
    shutil.copytree(tiny_root, root)
    (root / "train" / "ant" / "0.png").write_text("broken")
    folder = Path(pool).parent / "p"
    (folder / "4.png").write_text("broken")
    (folder / "7.png").unlink()
    model, _, preprocess, _ = common.load_model(clip(), "")
    args = parse_k(root, k, tmp_path / "out")
    train, _ = common.read_data(args)
    images, texts = anchor.read_pool(os.path.relpath(pool))             # from the file's folder
    assert len(images) == 23
    assert texts[3] == "pool picture 3"
    retrieve = anchor.retrieve
    def spy(query, pool, k):
        assert len(query) == 39                             # NaN would be near to any pair
        assert query.isfinite().all() and pool.isfinite().all()
        return retrieve(query, pool, k)
    monkeypatch.setattr(anchor, "retrieve", spy)
    found = anchor.retrieve_pairs(images, train, model, preprocess, args)
    assert f"retrieved {len(found)} of the 21 readable pairs among 23" in capsys.readouterr().out

    def features(paths):
        x = torch.stack([preprocess(common.read_image(path)[0]) for path in paths])
        with torch.no_grad():
            u = model.encode_image(common.to_input(model, x), normalize=True)
        return u.half().float()
    readable = [i for i in range(23) if i not in (4, 7)]
    u = features([path for path in train.paths if not path.endswith(b"/train/ant/0.png")])
    assert len(u) == 39
    v = features([str(folder / f"{i}.png") for i in readable])
    nearest = (u @ v.T).argsort(1, descending=True)[:, :k]                          # (39, k)
    assert found == sorted({readable[column] for column in nearest.flatten().tolist()})
    assert len(found) > 1
    shutil.rmtree(folder)
    assert anchor.retrieve_pairs(images, train, model, preprocess, args) == found

def test_captions_by_hand(tiny_root, captions):
    """Read several captions of an image, in any order of lines. Lines of other images of ROOT are
    skipped."""
    with open(captions, "a") as f:
        f.write("val/ant/0.png\tone of val\n")
    train, _ = common.read_data(parse("--data", tiny_root))
    expected = []
    for c in CLASSES:
        for i in range(8):
            expected.append([f"one {c} number {i} in the garden"])
            if i == 0:
                expected[-1].append(f"another view of the {c}")
    assert anchor.read_captions(captions, train, tiny_root) == expected

@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [0, 0]])
def test_texts_are_cut_at_the_longest_of_a_batch(clip, rows):
    """Cut rows of a table of tokens: a column less would lose an end of text, one more costs
    time."""
    *_, tokenizer = common.load_model(clip(), "")
    texts = ["a dog", "a dog that runs in the garden of a house", "a dog that runs"]
    tokens = common.tokenize(tokenizer, texts)
    batch = anchor.texts_of(tokens, torch.tensor(rows))
    assert batch.device.type == common.DEVICE.type
    expected = common.tokenize(tokenizer, [texts[row] for row in rows])
    assert torch.equal(batch.cpu(), expected)

@pytest.mark.parametrize("text, message", [
    (None, "pool.tsv does not exist or holds no pairs; expected path<TAB>text"),
    (b"path\ttext\n", "pool.tsv does not exist or holds no pairs"),
    (b"path\ttext\nx.jpg\n", "pool.tsv: expected path<TAB>text, found 'x.jpg'"),
    (b"path\ttext\nx.jpg\t \n", "pool.tsv: expected path<TAB>text, found 'x.jpg"),
    (b"x.jpg\tcaf\xe9\n", "pool.tsv cannot be read as text")])
def test_bad_pools(tiny_root, clip, tmp_path, text, message):
    """Give a pool that cannot be used: one line names it, before anything is written."""
    path = tmp_path / "pool.tsv"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.*\Z"):
        run(anchor, tiny_root, clip(), tmp_path / "out", "--pool", str(path))
    assert not os.path.exists(tmp_path / "out")

@pytest.mark.parametrize("old, new, message", [
    ("train/cat/3.png\tone cat number 3 in the garden\n", "",
     "has no caption for .*/train/cat/3.png; tests/captions.py"),
    ("cat/3.png", "cat/99.png", "there is no image .*/train/cat/99.png"),
    ("\tone cat number 3", " one cat", "expected path<TAB>caption, found 'train/cat/3.png")])
def test_bad_captions(tiny_root, clip, captions, tmp_path, old, new, message):
    """Give captions that do not fit: one line names the fault, before anything is written."""
    text = Path(captions).read_text()
    assert text.count(old) == 1
    Path(captions).write_text(text.replace(old, new))
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.*\Z"):
        run(anchor, tiny_root, clip(), tmp_path / "out", "--captions", captions)
    assert not os.path.exists(tmp_path / "out")

# ---- the run -------------------------------------------------------------------------------------
def test_training_is_a_plain_loop(tiny_root, clip, captions, pool, both, tmp_path, monkeypatch):
    """Take four steps by open_clip and stock AdamW: otherwise what we train is not ARF. A step has
    one forward pass of the batch, and one of the pairs."""
    encode_image = common.encode_image
    trained_on = []
    def spy(model, images, accum=1):
        if torch.is_grad_enabled():
            trained_on.append(len(images))
        return encode_image(model, images, accum)
    monkeypatch.setattr(common, "encode_image", spy)
    run(anchor, tiny_root, clip(), tmp_path / "out", *both, "--cap", "0.5", "--ret", "2")
    model, _, transform = open_clip.create_model_and_transforms(clip())
    model.eval()
    normalize = transform.transforms[-1]
    tokenizer = open_clip.get_tokenizer(clip())
    args = parse_k(tiny_root, 1, tmp_path / "features")
    train, _ = common.read_data(args)
    images, pool_texts = anchor.read_pool(pool)
    untuned, crop, preprocess, _ = common.load_model(clip(), "")
    nearest = anchor.retrieve_pairs(images, train, untuned, preprocess, args)
    captions_of = anchor.read_captions(captions, train, tiny_root)
    pairs = replace(images, paths=images.paths[nearest], labels=images.labels[nearest])
    R = min(8, len(nearest))
    pair_args = copy.copy(args)
    pair_args.batch_size = R
    pair_args.seed = 2 ** 63                                # draws of their own
    batches = common.train_loader(train, crop, args, 0, 4)
    pair_batches = common.train_loader(pairs, crop, pair_args, 0, 4)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    def contrast(x, texts):
        u, v, tau = model(normalize(x / 255), tokenizer(texts))
        S = tau * u @ v.T
        target = torch.arange(len(x))
        return (cross_entropy(S, target) + cross_entropy(S.T, target)) / 2
    lrs = [0.5e-3, 1e-3, 1e-3, 0.5e-3]
    lines = log(tmp_path / "out")
    for batch, pair_batch, lr, line in zip(batches, pair_batches, lrs, lines, strict=True):
        x, labels, rows, draws = batch
        prompts = []
        drawn = []
        for label, row, draw in zip(labels, rows, draws):
            prompts.append(train.templates[draw % 3].replace("{}", train.classnames[label]))
            drawn.append(captions_of[row][draw // 3 % len(captions_of[row])])
        pair_x, _, pair_rows, _ = pair_batch
        terms = {
            "contrastive": contrast(x, prompts),
            "captions": contrast(x, drawn),
            "retrieved": contrast(pair_x, [pool_texts[nearest[row]] for row in pair_rows])}
        loss = terms["contrastive"] + 0.5 * terms["captions"] + 2 * terms["retrieved"]
        for name, value in {**terms, "loss": loss}.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert trained_on == [8, R] * 4
    ours = open_clip.create_model(f"local-dir:{tmp_path}/out/model").eval()
    x = normalize(x / 255)
    tokens = tokenizer(prompts)
    torch.testing.assert_close(ours(x, tokens), model(x, tokens), rtol=1e-4, atol=1e-4)

def test_zeros_and_ablations(tiny_root, clip, both, tmp_path):
    """Leave terms out. Without both weights it is FLYP to the byte, which calft.py is without its
    terms and its teacher. Without a file its term is absent."""
    run(calft, tiny_root, clip(), tmp_path / "flyp", "--oc=0", "--sd=0", "--cross-fnorm=0")
    run(anchor, tiny_root, clip(), tmp_path / "zero", *both, "--cap=0", "--ret=0")
    run(anchor, tiny_root, clip(), tmp_path / "no-files", "--cap=0", "--ret=0")
    flyp = weights(tmp_path / "flyp")
    for name in ("zero", "no-files"):
        zero = weights(tmp_path / name)
        assert all(torch.equal(flyp[k], zero[k]) for k in flyp)
    assert not (tmp_path / "flyp" / "teacher").exists()
    assert all(line["loss"] == line["contrastive"] for line in log(tmp_path / "flyp"))
    for flags, term in ((both[:2], "captions"), (both[2:], "retrieved")):
        run(anchor, tiny_root, clip(), tmp_path / term, *flags, steps=1)
        assert set(log(tmp_path / term)[0]) == {"step", "loss", "lr", "contrastive", term}

def test_two_processes_are_one(tiny_root, clip, both, tmp_path):
    """Share a batch between two processes: gradients, log and table are those of one."""
    assert_processes_are_one(anchor, tiny_root, clip(), tmp_path, *both, "--k", "2")
