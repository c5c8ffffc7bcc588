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
captioner (BLIP-2; here open_clip's CoCa), and pairs retrieved for the task. Ours: weights of 1, the
pair nearest to each image (k = 1) by untuned image features, FLYP's recipe (Goyal et al., 2023).

    python anchor.py                                               # the toy
    python anchor.py --data /imagenet --captions captions.tsv --pool '/cc3m/{00000..00331}.tar'
    python anchor.py --data ROOT --caption-model coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k
    python anchor.py --cap 0 --ret 0 --out out/flyp                # the baseline FLYP: no anchors
"""
import itertools
import math
import os
import re
import sys
import tarfile
from dataclasses import replace

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import common

# ---- text-compensated anchor: captions of the training images ------------------------------------
def read_captions(path, images, root):
    """Captions of every image of a set, [[caption, ...], ...]. Each line of the file: a path in
    ROOT, a tab, a caption; at least one for each image. Lines of other images are passed over."""
    captions = {os.fsdecode(p): [] for p in images.paths}
    for file, text in common.read_rows(path, "path", "caption"):
        file = os.path.join(root, file)
        if file in captions:
            captions[file].append(text)
        elif not os.path.isfile(file):
            sys.exit(f"error: {path}: there is no image {file}")
    without = [file for file, texts in captions.items() if not texts]
    if without:
        sys.exit(f"error: {path} has no caption for {len(without)} images, such as {without[0]}")
    return list(captions.values())

@torch.no_grad()
def greedy_captions(coca, images, length=30, start=49406, end=49407):
    """Greedy decoding: normalised images (n, 3, S, S) -> tokens (n, at most length), 0 after the
    end token. Each image is encoded once. open_clip's own `generate` fails with transformers 5."""
    latent, embeddings = coca._encode_image(images)
    tokens = torch.full((len(images), 1), start, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    while tokens.shape[1] < length and not ended.all():
        out = coca(None, tokens, image_latent=latent, image_embs=embeddings, output_labels=False)
        following = out["logits"][:, -1].argmax(-1).masked_fill(ended, 0)           # (n,)
        tokens, ended = torch.cat([tokens, following[:, None]], 1), ended | (following == end)
    return tokens

def write_captions(path, name, images, args):
    """Caption a set by open_clip's CoCa `name` (NAME:TAG). Lines are appended to `path` as they
    come; started again, it goes on after the last whole line."""
    names = [os.path.relpath(os.fsdecode(p), args.data) for p in images.paths]
    lines = header = [f"path\tcaption by {name}\n"]
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace", newline="\n") as f:
            lines = [line for line in f if line.endswith("\n")] or header
    done = len(lines) - 1
    if lines[:1] != header or [line.split("\t")[0] for line in lines[1:]] != names[:done]:
        sys.exit(f"error: {path} is not by this --caption-model on these images; give another "
                 "--captions, or this one without --caption-model")
    with common.replacing(path) as f:                       # drops a line that a kill has cut
        f.write("".join(lines).encode())
    if done == len(images):
        return
    model, tag = (name, "") if name.startswith("local-dir:") else name.split(":", 1)
    coca, _, preprocess, tokenizer = common.load_model(model, tag)
    if not hasattr(coca, "text_decoder"):
        sys.exit(f"error: --caption-model {name} is no CoCa, so it cannot write")
    batches = common.loader(common.EvalImages([images], [preprocess]), args.batch_size,
                            range(done, len(images)), args)
    with open(path, "a", encoding="utf-8", newline="\n") as f:
        for (x,), failed in tqdm(batches, "captions"):
            with common.autocast(args.precision):
                tokens = greedy_captions(coca, common.to_input(coca, x)).tolist()
            for row, unreadable in zip(tokens, (failed >= 0).tolist()):
                row = row[1:row.index(49407)] if 49407 in row else row[1:]
                text = " ".join(tokenizer.decode(row).split()) if not unreadable else ""
                f.write(f"{names[done]}\t{text or 'an image'}\n")
                done += 1
            f.flush()

# ---- image-text-pair anchor: a pool, and what is retrieved from it -------------------------------
def open_pool(pattern):
    """The image-text pairs of --pool, (ImageSet of m images, m texts). --pool: a TSV of path (in
    the TSV's folder) and text, or img2dataset's shards, "x/{000..331}.tar"."""
    pairs, shards, base = [], [pattern], os.path.dirname(os.path.abspath(pattern))
    if not pattern.endswith(".tar"):
        rows, shards = common.read_rows(pattern, "path", "text"), []
        pairs = [(os.path.join(base, path), text) for path, text in rows]
    elif numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        shards = [pattern.replace(numbers[0], f"{s:0{len(first)}}")
                  for s in range(int(first), int(last) + 1)]
    for shard in tqdm(shards, "indexing the pool", leave=False, disable=common.RANK > 0):
        images, texts = {}, {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    stem, kind = os.path.splitext(member.name)
                    if kind.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                        images[stem] = f"{shard}:{member.offset_data}:{member.size}"
                    elif kind == ".txt":
                        texts[stem] = " ".join(tar.extractfile(member).read().decode().split())
        except (OSError, ValueError, tarfile.TarError) as e:
            sys.exit(f"error: --pool: {shard} cannot be read as an uncompressed tar ({e})")
        pairs += [(images[stem], texts[stem]) for stem in images if texts.get(stem)]
    if not pairs:
        sys.exit(f"error: --pool {pattern} holds no pairs of an image and a text")
    files = np.array([os.fsencode(path) for path, _ in pairs])
    pool = common.ImageSet("pool", [], [], [], None, files, np.zeros(len(files), int))
    return pool, [text for _, text in pairs]

@torch.no_grad()
def retrieve(query, pool, k):
    """For each row of query (n, d) the indices of the k rows of pool (m, d) with greatest inner
    product, best first: int64 (n, k). Exact brute force in float32 on query's device, by blocks of
    4096 x 32768 scores (0.5 GiB). ImageNet against CC3M (n = 1.28, m = 3.3 million, d = 512): 10.5
    hours on two CPU cores (extrapolated from a block), two minutes at 40 TFLOP/s (computed)."""
    k = min(k, len(pool))
    best = torch.full((len(query), k), -math.inf, device=query.device)
    index = torch.full((len(query), k), -1, device=query.device)
    for start in range(0, len(pool), 32768):
        block = pool[start:start + 32768].to(query.device).float()                  # (32768, d)
        for rows in torch.arange(len(query), device=query.device).split(4096):
            top, at = (query[rows].float() @ block.T).topk(min(k, len(block)))      # (4096, k)
            best[rows], order = torch.cat([best[rows], top], 1).topk(k)
            index[rows] = torch.cat([index[rows], at + start], 1).gather(1, order)
    return index

def retrieve_pairs(pool, train, model, preprocess, args):
    """Rows of the pool that are among the k nearest of a training image, by image features of the
    untuned model, which are kept in --out. Unreadable images are left out and counted."""
    path = os.path.join(args.out, "features.safetensors")
    if os.path.isfile(path):
        features = load_file(path)
    else:
        (of_train, of_pool), = common.image_features(
            [model], [preprocess], [train, pool], args, "features for retrieval", skip=True,
            precision=args.precision)                                               # (n, d), (m, d)
        features = {"train": of_train.half(), "pool": of_pool.half()}
        common.write(path, features)
    readable = (~features["pool"][:, 0].isnan()).nonzero().squeeze(1)               # (m',)
    query = features["train"][~features["train"][:, 0].isnan()].to(common.DEVICE)   # (n', d)
    near = readable[retrieve(query, features["pool"][readable], args.k).unique().cpu()]
    common.say(f"retrieved {len(near)} of the {len(readable)} readable pairs among {len(pool)}")
    return near.tolist()

def cosine_lr(step, total, warmup, peak):
    """Learning rate: linear up to `peak` over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.flags(__doc__, "out/anchor", epochs=10, lr=1e-5, wd=0.1, warmup=500)   # FLYP's
    add = parser.add_argument_group("ARF").add_argument
    add("--captions", metavar="FILE", help="captions of training images: path in ROOT<TAB>caption")
    add("--caption-model", metavar="NAME:TAG", help="CoCa that writes them (to OUT/captions.tsv)")
    add("--pool", metavar="FILE", help="image-text pairs: path<TAB>text, or 'x/{000..331}.tar'")
    add("--k", type=common.positive_int, default=1, help="pairs for each image (%(default)s)")
    add("--cap", type=common.weight, default=1.0, help="weight of the captions (%(default)s)")
    add("--ret", type=common.weight, default=1.0, help="weight of the pairs (%(default)s)")
    args = common.start(parser, argv)                       # without --data: draws the toy

    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    use_cap, use_ret = args.cap and (args.captions or args.caption_model), args.ret and args.pool
    if (args.cap or args.ret) and not (use_cap or use_ret):
        sys.exit("error: ARF needs --captions, --caption-model or --pool; --cap 0 --ret 0 is FLYP")
    if args.caption_model and (common.WORLD > 1 or ":" not in args.caption_model):
        sys.exit("error: --caption-model needs a tag, as coca_ViT-L-14:TAG, and a single process")
    captions, pools, pool_texts = [], [], []
    if use_cap:
        file = args.captions or os.path.join(args.out, "captions.tsv")
        if args.caption_model:
            write_captions(file, args.caption_model, train, args)
        captions = read_captions(file, train, args.data)
    if use_ret:
        pool, pool_texts = open_pool(args.pool)
        pools = [pool]
    torch.manual_seed(args.seed)                            # for random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    tokens = common.prompts(tokenizer, train.classnames, train.templates)           # (K, M, L)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    common.prepare_towers(model, args)                      # --compile, --grad-checkpointing

    run = common.Run(args, [train, *sets, *pools], captions, pool_texts)
    if "sets" in run.results:                               # --out holds this run, finished
        return run.report()
    if not run.results:                                     # here, so that a bad file shows early
        run.add_results({"zero_shot": common.evaluate(model, tokenizer, preprocess, sets, args)})
    if use_cap:
        caption_tokens = common.tokenize(tokenizer, list(itertools.chain(*captions)))
        count = torch.tensor([len(c) for c in captions])    # (n,): captions of each image
        first = count.cumsum(0) - count                     # (n,): row of the first of them
    pair_loader = itertools.repeat(None)
    if use_ret:
        near = retrieve_pairs(pool, train, model, preprocess, args)
        pairs = replace(pool, paths=pool.paths[near], labels=pool.labels[near])
        pair_tokens = common.tokenize(tokenizer, [pool_texts[i] for i in near])
        R = min(args.batch_size, len(pairs) // common.WORLD * common.WORLD)
        if not R:
            sys.exit(f"error: {len(pairs)} pairs are too few for the processes; give a greater --k")
        seed = args.seed + 2 ** 63                          # no --seed is that great
        pair_loader = common.train_loader(pairs, crop, args, run.start, total, R, seed)
    run.restore(parts)                                      # after retrieval by the untuned model

    # the loop; this process has n = N / WORLD images of a batch, and r = R / WORLD pairs
    loader, M = common.train_loader(train, crop, args, run.start, total), len(train.templates)
    for step, (batch, pair_batch) in run.steps(zip(loader, pair_loader), total):
        seen = step * args.batch_size                       # score val when an epoch has ended:
        if step and args.eval_every and seen % (args.eval_every * len(train)) < args.batch_size:
            run.save(step, parts)                           # a signal may end a long scoring
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args)
            run.log(step=step - 1, **{f"val_{k}": val["sets"]["val"][k] for k in ("top1", "ece")})
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total, args.warmup, args.lr)
        images, labels, rows, draws = batch
        template, caption = draws % M, draws // M                                   # (n,)
        images, tau = common.to_input(model, images), model.logit_scale.exp()       # (n, 3, H, W)
        with common.autocast(args.precision):
            u = common.encode_image(model, images, args.accum)                      # (n, d)
            v = common.encode_text(model, tokens[labels, template], args.accum)     # (n, d)
        loss = common.contrastive_loss(u, v, tau)
        terms = {"contrastive": loss}
        if use_cap:
            caption = first[rows] + caption % count[rows]                           # (n,)
            with common.autocast(args.precision):
                c = common.encode_text(model, caption_tokens[caption], args.accum)  # (n, d)
            terms["captions"] = common.contrastive_loss(u, c, tau)
            loss = loss + args.cap * terms["captions"]
        if use_ret:
            pair_images, _, pair, _ = pair_batch                                    # pair (r,)
            with common.autocast(args.precision):
                a = common.encode_image(model, common.to_input(model, pair_images), args.accum)
                b = common.encode_text(model, pair_tokens[pair], args.accum)        # (r, d)
            terms["retrieved"] = common.contrastive_loss(a, b, tau)
            loss = loss + args.ret * terms["retrieved"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))     # CLIP's own bound

        if step % args.log_every == 0 or step + 1 == total:
            run.log(step=step, loss=loss, **terms, lr=group["lr"])
        if (step + 1) % args.save_every == 0 or step + 1 == total or run.stopped:
            run.save(step + 1, parts)

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args))
    run.report()

if __name__ == "__main__":
    main()
