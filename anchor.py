# SPDX-License-Identifier: MIT
"""ARF: anchor-based robust fine-tuning of CLIP (Han et al., CVPR 2024, arXiv 2404.06244).

    loss = CE2(tau u v^T) + cap * CE2(tau u c^T) + ret * CE2(tau a b^T)

    CE2(S)         (CE(S) + CE(S^T)) / 2, CLIP's contrastive loss: row i belongs to column i
    u, v (N, d)    features of a batch of images and of their class names in a random template
    c (N, d)       features of captions of the same images: the text-compensated anchor
    a, b (R, d)    features of R image-text pairs: the image-text-pair anchor. Pairs are retrieved
                   once, before training; each step draws R = N of them, or all if fewer than N
    tau            exp(logit_scale). All features are L2-normalised, by the model being tuned

"a photo of a [CLASS]" says little, and tuning on it alone forgets the rest. The anchors are richer
text to contrast with: captions, and pairs like those of CLIP's pretraining. Both towers and tau are
trained; the result is a CLIP. No code was released. From the paper: the three terms, a pretrained
captioner (BLIP-2: tests/captions.py), and pairs retrieved for the task. Ours: weights of 1, the
pair nearest to each image (k = 1) by untuned image features, FLYP's recipe (Goyal et al., 2023).

    python anchor.py                                               # the toy
    python anchor.py --data /imagenet --captions captions.tsv --pool cc3m/pool.tsv
    python anchor.py --cap 0 --ret 0 --out out/flyp                # the baseline FLYP: no anchors
"""
import common                                               # before torch, see its first lines

import copy
import itertools
import math
import os
import signal
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file

# ---- the anchors: captions, and pairs that are retrieved from a pool -----------------------------
def read_captions(path, images, root):
    """Return the captions of every image of a set, [[caption, ...], ...], from a file whose lines
    are a path in ROOT, a tab, a caption. Every image needs one; lines of other images are
    skipped."""
    captions = {os.path.normpath(os.fsdecode(file)): [] for file in images.paths}
    for file, text in common.read_rows(path, "path", "caption"):
        file = os.path.normpath(f"{root}/{file}")
        if file in captions:
            captions[file].append(text)
        elif not os.path.isfile(file):
            common.fail(f"{path}: there is no image {file}")
    for file, texts in captions.items():
        if not texts:
            common.fail(f"{path}, if there is such a file, has no caption for {file}; "
                        "tests/captions.py writes captions")
    return list(captions.values())

def read_pool(path):
    """Return the image-text pairs of a file whose lines are a path from the file's folder, a tab, a
    text: an ImageSet of m images, and their m texts."""
    rows = common.read_rows(path, "path", "text")
    if not rows:
        common.fail(f"--pool {path} does not exist or holds no pairs; expected path<TAB>text")
    folder = os.path.dirname(os.path.abspath(path))
    files = np.array([os.fsencode(os.path.join(folder, file)) for file, _ in rows])
    if all(common.read_image(file)[1] for file in files[:20]):          # before hours of features
        common.fail(f"--pool {path}: none of its first images can be read, such as "
                    f"{os.fsdecode(files[0])!r}; expected path<TAB>text")
    pool = common.ImageSet("pool", [], [], [], files, np.zeros(len(files)), None, "", False)
    return pool, [text for _, text in rows]

@torch.no_grad()
def retrieve(query, pool, k):
    """Return for each row of query (n, d) the indices of the k rows of pool (m, d) with the largest
    inner products, best first: int64 (n, k), on the device of query.

    Brute force, exact, in float32, by blocks of 4096 x 32768 scores (0.5 GiB). ImageNet against
    CC3M (n = 1.28, m = 3.3 million, d = 512) takes 10.5 hours on two CPU cores (extrapolated from a
    block), or two minutes at 40 TFLOP/s (computed)."""
    k = min(k, len(pool))
    best_scores = torch.full((len(query), k), -math.inf, device=query.device)
    best = torch.full((len(query), k), -1, device=query.device)
    for start in range(0, len(pool), 32768):
        block = pool[start:start + 32768].to(query.device).float()                  # (32768, d)
        for rows in torch.arange(len(query), device=query.device).split(4096):
            found = (query[rows].float() @ block.T).topk(min(k, len(block)))        # (4096, k)
            scores = torch.cat([best_scores[rows], found.values], dim=1)            # (4096, 2k)
            indices = torch.cat([best[rows], start + found.indices], dim=1)         # (4096, 2k)
            best_scores[rows], order = scores.topk(k)
            best[rows] = indices.gather(1, order)
    return best

def retrieve_pairs(pool, train, model, preprocess, args):
    """Return the rows of the pool that are among the k nearest of a training image, by image
    features of the untuned model, which are kept in --out. Unreadable images are left out."""
    path = f"{args.out}/features.safetensors"
    features = {}
    if os.path.isfile(path):
        features = load_file(path)
    for images in (train, pool):
        rows = list(range(len(images)))                     # those without a feature
        if images.name in features:
            rows = features[images.name][:, 0].isnan().nonzero().squeeze(1).tolist()
        if rows:
            part = replace(images, paths=images.paths[rows], labels=images.labels[rows])
            u, = common.image_features(                     # (n, d) or (m, d), NaN if unreadable
                [model], [preprocess], part, args, skip_corrupt=True, precision=args.precision)
            features.setdefault(images.name, u.half())[rows] = u.half()
            common.write(path, features)
    readable = (~features["pool"][:, 0].isnan()).nonzero().squeeze(1)               # (m',)
    query = features["train"][~features["train"][:, 0].isnan()].to(common.DEVICE)   # (n', d)
    nearest = retrieve(query, features["pool"][readable], args.k)                   # (n', k)
    rows = readable[nearest.unique().cpu()]
    common.say(f"retrieved {len(rows)} of the {len(readable)} readable pairs among {len(pool)}")
    return rows.tolist()

def texts_of(tokens, rows):
    """Return tokens[rows] (n, L), of a table of tokens on the CPU, on the device. They are cut at
    the longest of them, as texts differ widely in length."""
    batch = common.cut_padding(tokens[rows])
    if common.DEVICE.type == "cuda":
        batch = batch.pin_memory()                          # otherwise the copy waits for the GPU
    return batch.to(common.DEVICE, non_blocking=True)

def cosine_lr(step, total, warmup, peak):
    """Return the learning rate: a linear rise to `peak`, then a cosine to 0 at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.make_train_parser("ARF", __doc__, "out/anchor", lr=1e-5)
    group = parser.add_argument_group("ARF")
    group.add_argument("--captions", metavar="FILE", help="lines of path in ROOT<TAB>caption")
    group.add_argument("--pool", metavar="FILE", help="image-text pairs, lines of path<TAB>text")
    common.add_number(group, "--k", 1, "pairs to retrieve for each training image")
    common.add_number(group, "--cap", 1.0, "weight of the captions")
    common.add_number(group, "--ret", 1.0, "weight of the retrieved pairs")
    args = common.fill_in(*common.given_flags(parser, argv))            # without --data: the toy
    common.start_processes()

    # data, anchors, model, optimiser
    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    use_captions = args.cap > 0 and args.captions is not None
    use_pairs = args.ret > 0 and args.pool is not None
    if (args.cap or args.ret) and not (use_captions or use_pairs):
        common.fail("ARF needs --captions or --pool; --cap 0 --ret 0 is FLYP")
    anchors = []
    if use_captions:
        captions = read_captions(args.captions, train, args.data)
        anchors.append(captions)
    if use_pairs:
        pool, pool_texts = read_pool(args.pool)
        anchors.append([common.digest(pool), pool_texts])
    torch.manual_seed(args.seed)                            # seeds random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    # The towers train in eval mode: BatchNorm keeps its statistics, and nothing is dropped.
    tokens = common.prompts(tokenizer, train.classnames, train.templates)           # (K, M, L)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    saved = {"model": model, "optimizer": optimizer, "scaler": scaler}      # what last.pt holds
    common.prepare_towers(model, args)

    run = common.Run(args, train, sets, *anchors)
    if "sets" in run.results:                               # the run in --out has ended
        return run.report()
    if "zero_shot" not in run.results:                      # unreadable images are found early
        zero_shot = common.evaluate(model, tokenizer, preprocess, sets, args)
        run.add_results({"zero_shot": zero_shot})
    if use_captions:
        caption_tokens = common.tokenize(tokenizer, list(itertools.chain(*captions)))
        n_captions = torch.tensor([len(texts) for texts in captions])   # (n,) of each image
        first_caption = n_captions.cumsum(0) - n_captions   # (n,) row in caption_tokens
    pair_batches = itertools.repeat(None)
    if use_pairs:
        rows = retrieve_pairs(pool, train, model, preprocess, args)
        pairs = replace(pool, paths=pool.paths[rows], labels=pool.labels[rows])
        pair_tokens = common.tokenize(tokenizer, [pool_texts[row] for row in rows])
        R = min(args.batch_size, len(pairs) // common.WORLD * common.WORLD)
        if not R:
            common.fail(f"{len(pairs)} retrieved pairs are too few; give a larger --k")
        pair_args = copy.copy(args)
        pair_args.batch_size = R
        pair_args.workers = args.workers // 2               # there are two loaders
        args.workers -= pair_args.workers
        pair_args.seed += 2 ** 63                           # no --seed is that large
        pair_batches = common.train_loader(pairs, crop, pair_args, run.first_step, total)
    run.restore(saved)                                      # after retrieval by the untuned model

    # the loop; this process has n = N / WORLD images of each batch, and r = R / WORLD pairs
    batches = common.train_loader(train, crop, args, run.first_step, total)
    M = len(train.templates)
    for step, (batch, pair_batch) in run.steps(zip(batches, pair_batches), total):
        lr = cosine_lr(step, total, args.warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images, labels, rows, draws = batch
        images = common.to_input(model, images)                                     # (n, 3, S, S)
        template_id = draws % M                             # one random number draws the template
        text = texts_of(tokens, (labels, template_id))      # and the caption           (n, L)
        tau = model.logit_scale.exp()

        with common.autocast(args.precision):
            u = common.encode_image(model, images, args.accum)                      # (n, d)
            v = common.encode_text(model, text, args.accum)                         # (n, d)
        terms = {"contrastive": common.contrastive_loss(u, v, tau)}
        loss = terms["contrastive"]
        if use_captions:
            caption_id = draws // M % n_captions[rows]                              # (n,)
            text = texts_of(caption_tokens, first_caption[rows] + caption_id)       # (n, L)
            with common.autocast(args.precision):
                c = common.encode_text(model, text, args.accum)                     # (n, d)
            terms["captions"] = common.contrastive_loss(u, c, tau)
            loss = loss + args.cap * terms["captions"]
        if use_pairs:
            pair_images, _, pair_rows, _ = pair_batch                               # r of each
            pair_images = common.to_input(model, pair_images)                       # (r, 3, S, S)
            text = texts_of(pair_tokens, pair_rows)                                 # (r, L)
            with common.autocast(args.precision):
                a = common.encode_image(model, pair_images, args.accum)             # (r, d)
                b = common.encode_text(model, text, args.accum)                     # (r, d)
            terms["retrieved"] = common.contrastive_loss(a, b, tau)
            loss = loss + args.ret * terms["retrieved"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))     # CLIP's own bound

        is_last = step + 1 == total
        if step % args.log_every == 0 or is_last:
            run.log(step, loss=loss, **terms, lr=lr)
        if (step + 1) % args.save_every == 0 or is_last:
            run.save(step + 1, saved)                       # first: the run may be killed below
        if common.epoch_ended(step, total, len(train), args):
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args)["sets"]["val"]
            run.log(step, val_top1=val["top1"], val_ece=val["ece"])

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    head = common.zero_shot_head(model, tokenizer, train)
    common.export_head(head, model, train, run.path / "head.safetensors", is_trained=False)
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args, head))
    run.report()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends the run at once
    main()
    common.end_processes()
