# SPDX-License-Identifier: MIT
"""ARF: anchor-based robust fine-tuning of CLIP (Han et al., CVPR 2024, arXiv 2404.06244).

    loss = CE2(tau u v^T) + cap * CE2(tau u c^T) + ret * CE2(tau a b^T)

    CE2(S)               (CE(S) + CE(S^T)) / 2, CLIP's contrastive loss: row i belongs to column i
    u, v (N, d)          features of a batch of images, and of their class prompts, a template drawn anew each epoch
    c (N, d)             features of captions of the same images, one drawn of each image's: text-compensated anchor
    a, b (R, d)          features of a batch of pairs, images and their texts, that were retrieved from a pool before
                         training, drawn independently of u: image-text-pair anchor; R = N, or all if they are fewer
    tau                  exp(logit_scale). All features are L2-normalised and by the model being tuned

"a photo of a [CLASS]" says little, and tuning on it alone forgets the rest. The anchors are richer text, to contrast
with while tuning: captions by a captioner, and pairs like those of CLIP's pretraining, chosen by their similarity to
the training images. Both towers and tau are trained; the whole CLIP is evaluated by its zero-shot head, and exported.

From the paper's text: the three terms, a pretrained captioner (BLIP-2; here open_clip's CoCa), retrieval for the
downstream task. Our choices, as no code was released: weights of 1 (--cap, --ret), retrieval of the k = 1 nearest by
the untuned model's image features, and the recipe, which is that of FLYP (Goyal et al., 2023).
Measured (README): 31.9 % top-1 on the toy's shifts, where FLYP has 30.4; on those of PACS, with a pool alone and two
small CLIPs, 59.7 and 62.8, where FLYP has 60.5 and 60.8 at the same learning rate.

    python anchor.py                                                         # the toy with its captions and pool
    python anchor.py --data /imagenet --captions captions.tsv --pool '/cc3m/{00000..00331}.tar' --out out/arf
    python anchor.py --data /imagenet --caption-model coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k --out out/cap
    torchrun --nproc_per_node 8 anchor.py --data /imagenet --captions captions.tsv --out out/arf8     # eight GPUs
    python anchor.py --cap 0 --ret 0 --out out/flyp                          # FLYP, the first term alone: baseline
"""
import itertools
import math
import os
import re
import tarfile

import numpy as np
import torch
from tqdm import tqdm

import common


# ---- text-compensated anchors: captions of the training images -----------------------------------------------------

def read_captions(path, images):
    """Captions of every image of `images` (common.Images): [[caption, ...], ...]. Raises Abort.

    The file: a header line, path<TAB>caption, then such lines, paths relative to ROOT (absolute if a training folder
    is elsewhere), one or more for each image; those of other images, as held out for val, are passed over.
    """
    index, captions = {images.file(i): i for i in range(len(images))}, [[] for _ in range(len(images))]
    for line, (file, text) in read_tsv(path, "path<TAB>caption"):
        if file in index:
            if text in captions[index[file]]:
                raise common.Abort(f"{path} line {line}: the same caption twice for {file}")
            captions[index[file]].append(text)
        elif file.rpartition("/")[0] not in images.pixels and not os.path.isfile(os.path.join(images.base, file)):
            raise common.Abort(f"{path} line {line}: there is no image {os.path.join(images.base, file)}")
    without = [i for i, c in enumerate(captions) if not c]
    if without:
        raise common.Abort(f"{path} has no caption for {len(without)} training images, {images.file(without[0])} first")
    return captions


def read_tsv(path, expected):
    """Lines 2, 3, ... of a file of two tab-separated columns: (line number, (left, right)). Raises Abort."""
    lines = common.read_lines(path)
    if lines[0].split("\t")[0].strip() != "path":
        raise common.Abort(f"{path} line 1: expected the header {expected}, found {lines[0][:80]!r}")
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) != 2 or not all(parts):
                raise common.Abort(f"{path} line {number}: expected {expected}, found {line[:80]!r}")
            yield number, parts


START, END = 49406, 49407                                            # tokens that open and close a text of CLIP's


@torch.no_grad()
def greedy_captions(coca, images, length=30, start=START, end=END):
    """Greedy decoding: normalised images (N, 3, S, S) -> tokens (N, at most length), 0 after the end token.

    Each image is encoded once. open_clip's own `generate` needs names that transformers 5 no longer has.
    """
    latent, embeddings = coca._encode_image(images)
    tokens = torch.full((len(images), 1), start, device=images.device)
    ended = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    while tokens.shape[1] < length and not ended.all():
        logits = coca(None, tokens, image_latent=latent, image_embs=embeddings, output_labels=False)["logits"]
        following = logits[:, -1].argmax(-1).masked_fill(ended, 0)                                 # (N,)
        tokens, ended = torch.cat([tokens, following[:, None]], 1), ended | (following == end)
    return tokens


def check_captioner(path, name):
    """Raises Abort where `write_captions` could not do its work, as far as that shows without loading the model."""
    for file in (path, path + ".partial"):
        if os.path.isfile(file):
            with open(file, encoding="utf-8", errors="replace", newline="\n") as f:
                if f.readline() != f"path\tcaption by {name}\n":
                    raise common.Abort(f"{file} exists and is not by --caption-model {name}; name another file with "
                                       "--captions, or drop --caption-model to use what is there")
    if not name.startswith("local-dir:") and ":" not in name:
        raise common.Abort(f"--caption-model {name} needs a tag: coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k")
    if torch.distributed.is_initialized() and not os.path.isfile(path):
        raise common.Abort("--caption-model works in one process; run it once without torchrun, then give --captions")


def write_captions(path, name, images, args, device):
    """Caption every image of `images` by open_clip's CoCa `name` (NAME:TAG), in batches, to `path`. Raises Abort.

    Lines go to path.partial as they come; after a kill the next call goes on behind the last whole line. The header
    names the captioner; a finished file is left as it is.
    """
    if os.path.isfile(path):
        return
    partial, header = path + ".partial", f"path\tcaption by {name}\n"
    model, tag = (name, "") if name.startswith("local-dir:") else name.split(":", 1)
    strange = [f for f in images.files.tolist() if set(f) & set(b"\t\r\n") or f.decode(errors="ignore").encode() != f]
    if strange:
        raise common.Abort(f"--caption-model: {os.fsdecode(strange[0])!r} cannot stand in {path}: it has a tab or a "
                           "line break, or is not UTF-8; rename it")
    coca, _, preprocess, tokenizer = common.load_model(model, tag, device)
    if not hasattr(coca, "text_decoder"):
        raise common.Abort(f"--caption-model {name} cannot write; it must be a CoCa")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    whole = [header]
    if os.path.isfile(partial):
        with open(partial, encoding="utf-8", newline="\n") as f:
            whole = [line for line in f if line.endswith("\n")]
        if [line.split("\t")[0] for line in whole[1:]] != [images.file(i) for i in range(len(whole) - 1)]:
            raise common.Abort(f"{partial} is of other training images; remove it to begin anew")
    with common.replacing(partial) as f:
        f.write("".join(whole).encode())
    done, prepare = len(whole) - 1, common.to_input(coca, device)
    todo = common.EvalImages(images.take(np.arange(done, len(images)), "train"), [preprocess], skip=True)
    loader = torch.utils.data.DataLoader(todo, args.batch_size, num_workers=args.workers,
                                         worker_init_fn=common.quiet_worker)
    with open(partial, "a", encoding="utf-8", newline="\n") as f, \
            tqdm(total=len(images), initial=done, desc="captions", unit="image") as bar:
        for (x,), readable in loader:
            with common.autocast(device, args.precision):
                tokens = greedy_captions(coca, prepare(x)).tolist()
            for row, known in zip(tokens, readable.tolist()):        # "an image": for the unreadable and the wordless
                text = tokenizer.decode(row[1:row.index(END) if END in row else None]) if known else ""
                f.write(f"{images.file(done)}\t{' '.join(text.split()) or 'an image'}\n")
                done += 1
            f.flush()
            bar.update(len(x))
    os.replace(partial, path)


# ---- image-text-pair anchors: a pool, and what is retrieved from it ------------------------------------------------

class Pairs(torch.utils.data.Dataset):
    """Image-text pairs. where (m, 3) long holds each image's file number, offset and size in bytes (-1: all of it)."""

    def __init__(self, files, where, texts):
        self.files, self.where, self.texts = np.array([os.fsencode(f) for f in files]), where, texts
        self.labels, self.bad = np.zeros(len(texts), np.int64), []   # as Images has them, so loaders take both

    def __len__(self):
        return len(self.texts)

    def read(self, i):
        file, offset, size = self.where[i].tolist()
        return common.read_image(os.fsdecode(bytes(self.files[file])), offset, size)

    def take(self, keep):
        return Pairs(self.files, self.where[keep], [self.texts[i] for i in keep])


def open_pool(pattern):
    """The Pairs of --pool: a TSV of path (relative to it) and text, or img2dataset's shards. Raises Abort."""
    if not pattern.endswith(".tar"):
        base = os.path.dirname(os.path.abspath(pattern))
        lines = [pair for _, pair in read_tsv(pattern, "path<TAB>text")]
        if not lines:
            raise common.Abort(f"--pool {pattern} holds no pairs (a header line, then path<TAB>text)")
        where = np.array([(i, 0, -1) for i in range(len(lines))])
        return Pairs([os.path.join(base, file) for file, _ in lines], where, [text for _, text in lines])
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    shards = [pattern] if not numbers else [
        pattern.replace(numbers[0], str(n).zfill(len(numbers[1]))) for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    where, texts = [], []
    for s, shard in enumerate(tqdm(shards, "indexing the pool", unit="shard", disable=common.rank_world()[0] != 0)):
        try:
            with tarfile.open(shard, "r:") as tar, open(shard, "rb") as f:
                images, captions = {}, {}
                for member in tar:
                    stem, kind = os.path.splitext(member.name)
                    if kind.lower() in (".jpg", ".jpeg", ".png", ".webp"):
                        images[stem] = (s, member.offset_data, member.size)
                    elif kind == ".txt":
                        f.seek(member.offset_data)
                        captions[stem] = " ".join(f.read(member.size).decode("utf-8", "replace").split())
        except (OSError, tarfile.TarError) as e:
            raise common.Abort(f"--pool: {shard} cannot be read as an uncompressed tar ({e})")
        both = [stem for stem in images if captions.get(stem)]       # img2dataset leaves no caption empty, others do
        where += [images[stem] for stem in both]
        texts += [captions[stem] for stem in both]
    if not texts:
        raise common.Abort(f"--pool {pattern} holds no pairs of an image and a .txt member")
    return Pairs(shards, np.array(where), texts)


@torch.no_grad()
def retrieve(query, pool, k):
    """Indices of the k rows of pool (m, d) with the greatest inner products with each row of query (n, d): (n, k)
    long, the best first; by comparing all, in float32.

    In blocks of 4096 x 32768 scores (0.5 GiB) on the device of `query`; each block of the pool goes there once.
    ImageNet against CC3M (n = 1.28, m = 3.3 million, d = 512) is 31,600 blocks of 1.2 s on two CPU cores (measured, AMD
    EPYC), 10.5 hours; at 40 TFLOP/s a GPU would need two minutes (computed).
    """
    k = min(k, len(pool))
    best = torch.full((len(query), k), -math.inf, device=query.device)
    index = torch.full((len(query), k), -1, device=query.device)
    for start in range(0, len(pool), 32768):
        block = pool[start:start + 32768].to(query.device).float()                                 # (32768, d)
        for rows in torch.arange(len(query), device=query.device).split(4096):
            top, at = (query[rows].float() @ block.T).topk(min(k, len(block)))                     # (4096, k)
            best[rows], order = torch.cat([best[rows], top], 1).topk(k)
            index[rows] = torch.cat([index[rows], at + start], 1).gather(1, order)
    return index


def cached_features(name, files, images, model, preprocess, args, device):
    """Image features (n, d) by the untuned model, float16, NaN where unreadable. Made once: --out keeps them in
    <name>_features.safetensors for as long as the model and the files' sizes and times are the same."""
    def stat(file):
        s = os.stat(file) if os.path.exists(file) else None
        return file, s and (s.st_size, s.st_mtime_ns)

    def make():
        (features,), = common.image_features([model], [preprocess], [images], args, device, f"features: {name}",
                                             skip=True, dtype=torch.float16, precision=args.precision)
        return features
    digest = common.sha256(model.visual, args.precision, *model.visual.state_dict().values(), *map(stat, files))
    return common.cached(os.path.join(args.out, f"{name}_features.safetensors"), digest, make)


def retrieved_pairs(pool, images, model, preprocess, args, device):
    """The Pairs of `pool` that are among the k nearest of any image of `images` (common.Images), each once.

    Unreadable images of the pool are counted and left out. Raises Abort where none is left.
    """
    rest = model, preprocess, args, device
    query = cached_features("train", [images.path(i) for i in range(len(images))], images, *rest)  # (n, d)
    features = cached_features("pool", [os.fsdecode(bytes(f)) for f in pool.files], pool, *rest)   # (m, d)
    readable = (~features[:, 0].isnan()).nonzero().squeeze(1)        # NaN: an unreadable image      (m',)
    if not len(readable):
        raise common.Abort(f"--pool {args.pool}: none of its {len(pool)} images can be read", code=1)
    nearest = retrieve(query[~query[:, 0].isnan()].to(device), features[readable], args.k)        # (n', k)
    kept = readable[nearest.unique().cpu()].tolist()
    if common.rank_world()[0] == 0:
        if len(readable) < len(pool):
            print(f"warning: {len(pool) - len(readable)} of the pool's {len(pool)} images cannot be read; left out")
        print(f"retrieved {len(kept)} pairs of {len(readable)} for {len(images)} training images, k = {args.k}")
    return pool.take(kept)


# ---- the run -------------------------------------------------------------------------------------------------------

@common.cli
def main(argv=None):
    parser = common.flags(__doc__, out="out/anchor")                 # --data, --model, --batch-size, --accum, ...
    add = parser.add_argument
    # recipe: FLYP's, with --batch-size 512; not verified for ARF
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--max-steps", type=int, help="stop (and end the schedule) after this many steps")
    add("--lr", type=float, default=1e-5, help="peak learning rate of AdamW")
    add("--wd", type=float, default=0.1, help="weight decay, on every parameter")
    add("--warmup", type=int, default=500, help="steps of linear warm-up, then cosine to 0")
    # ARF
    add("--captions", metavar="FILE", help="captions of the training images: a header, then path in ROOT<TAB>caption")
    add("--caption-model", metavar="NAME:TAG", help="an open_clip CoCa, or local-dir:PATH, to write the file "
        "--captions (default: OUT/captions.tsv) where there is none")
    add("--pool", metavar="FILE", help="image-text pairs: a TSV (header, then path<TAB>text) or 'x/{000..331}.tar'")
    add("--k", type=int, default=1, help="pairs retrieved for each training image")
    add("--cap", type=float, default=1.0, help="weight of the captions' contrastive loss")
    add("--ret", type=float, default=1.0, help="weight of the retrieved pairs' contrastive loss")

    device = common.setup()
    args = common.parse(parser, device, argv)
    out = lambda name: os.path.join(args.out, name)

    # data, model, optimiser
    root = common.read_root(args)
    total = common.total_steps(args, len(root.train))
    captions_file = args.captions or (out("captions.tsv") if args.caption_model else None)
    use_cap, use_ret = bool(args.cap and captions_file), bool(args.ret and args.pool)
    if (args.cap or args.ret) and not (use_cap or use_ret):
        raise common.Abort("ARF needs anchors: captions of the training images (--captions FILE, or --caption-model to "
                           "write them) or a pool of image-text pairs (--pool FILE); --cap 0 --ret 0 is FLYP")
    if common.rank_world()[0] == 0 and ((args.cap and not use_cap) or (args.ret and not use_ret)):
        print("no --pool: the text-compensated anchor alone" if use_cap else
              "no --captions: the image-text-pair anchor alone")
    if use_cap and args.caption_model:
        check_captioner(captions_file, args.caption_model)           # captions are written once all else is known good
    captions = read_captions(captions_file, root.train) if use_cap and not args.caption_model else None
    pool = open_pool(args.pool) if use_ret else None
    torch.manual_seed(args.seed)                                     # of weights that are not pretrained
    model, preprocess_train, preprocess_val, tokenizer = common.load_model(args.model, args.pretrained, device)
    tokens = common.prompts(tokenizer, root.classnames, root.templates)            # (K classes, M templates, L tokens)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.wd, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    common.prepare_towers(model, args)

    # a new run, or the one that --out holds
    state, results = common.begin(args, root, None if args.caption_model else args.captions, args.pool)
    if "sets" in results:                                            # finished
        return common.report(results)
    if "zero_shot" not in results:                                   # before training: an unreadable set shows now
        results["zero_shot"] = common.evaluate(model, tokenizer, preprocess_val, root, args, device, title="zero-shot")
        common.write_json(out("results.json"), results)
    if use_cap and args.caption_model:
        write_captions(captions_file, args.caption_model, root.train, args, device)
        captions = read_captions(captions_file, root.train)
    if use_ret:                                                      # by the untuned model, so before a state is loaded
        pairs = retrieved_pairs(pool, root.train, model, preprocess_val, args, device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = common.restore(state, parts)

    # the loop; each process has n = N / processes images of a batch, and r = R / processes pairs
    M, prepare = len(root.templates), common.to_input(model, device)
    loader = common.train_loader(root.train, preprocess_train, args, total, device, start)
    pair_loader = itertools.repeat(None)
    if use_ret:
        world = common.rank_world()[1]
        R = min(args.batch_size, len(pairs) // world * world)
        if not R:
            raise common.Abort(f"{len(pairs)} retrieved pairs are too few for {world} processes; give a greater --k")
        pair_loader = common.train_loader(pairs, preprocess_train, args, total, device, start, batch_size=R,
                                          seed=args.seed + 2 ** 63)  # no run's own draws: --seed is below
    log = common.Log(args, root.train, total, start, "ARF")
    for step, (images, labels, index, draws), retrieved in zip(range(start, total), loader, pair_loader):
        lr = common.cosine_lr(step, total, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, tau = prepare(images), model.logit_scale.exp()                                     # (n, 3, H, W), ()
        text = tokens[labels, draws % M]                             # draws (n,): random integers   (n, L)

        with common.autocast(device, args.precision):
            u = common.encode_image(model, images, args.accum)                                     # (n, d)
            v = common.encode_text(model, text, args.accum)                                        # (n, d)
        terms = {"contrastive": common.contrastive_loss(u, v, tau)}  # of all processes' rows, as the two below
        loss = terms["contrastive"]                                                                # scalar
        if use_cap:                                                  # draws % M chose the template, the rest a caption
            drawn = [captions[i][draw // M % len(captions[i])] for i, draw in zip(index.tolist(), draws.tolist())]
            with common.autocast(device, args.precision):
                c = common.encode_text(model, tokenizer(drawn), args.accum)                        # (n, d)
            terms["captions"] = common.contrastive_loss(u, c, tau)
            loss = loss + args.cap * terms["captions"]
        if use_ret:
            pair_images, _, pair_index, _ = retrieved                                              # (r, 3, H, W), (r,)
            pair_text = tokenizer([pairs.texts[i] for i in pair_index])                            # (r, L)
            with common.autocast(device, args.precision):
                a = common.encode_image(model, prepare(pair_images), args.accum)                   # (r, d)
                b = common.encode_text(model, pair_text, args.accum)                               # (r, d)
            terms["retrieved"] = common.contrastive_loss(a, b, tau)
            loss = loss + args.ret * terms["retrieved"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))              # CLIP's own bound

        if log.step(step, lr, {"loss": loss, **terms}, index):       # true if a checkpoint is due
            log.save(step + 1, parts)
    log.close()

    # export first: whatever evaluation stumbles over, the model is there
    common.export(model, args.model, out("model"))
    results.update(common.evaluate(model, tokenizer, preprocess_val, root, args, device))
    common.write_json(out("results.json"), results)
    common.report(results)


if __name__ == "__main__":
    main()
