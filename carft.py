# SPDX-License-Identifier: MIT
"""CAR-FT: context-aware robust fine-tuning of CLIP (Mao et al., 2022, arXiv 2211.16175).

    loss = CE(tau u W_cls^T, y) + lam * KL(p0 || p)

    u, u0 (N, d)     L2-normalised features of images, by the model being tuned and the untuned one
    y (N,)           their classes; tau = exp(logit_scale), fixed
    E (K, M, d)      text features of K classes in M templates, by the untuned model
    W_cls (K, d)     normalised mean of E over templates: the classifier, trained from this start
    W_ctx (M, d)     normalised mean of E over classes: a classifier of contexts, fixed
    p, p0 (N, M)     softmax(tau u W_ctx^T), softmax(tau u0 W_ctx^T)

Plain fine-tuning forgets which context an image is in ("a sketch of a", "a photo of a"), and loses
robustness with it; the KL term keeps the untuned model's view. The image tower and W_cls are
trained; the text tower only makes E, and the heads of sets with other classes. No code was
released: our choices are the direction of the KL (--reverse-kl turns it), lam = 1, the fixed tau,
not normalising W_cls again in training, and FLYP's recipe (Goyal et al., 2023).

    python carft.py                                                # the toy
    torchrun --nproc_per_node 8 carft.py --data /imagenet          # ImageNet, on eight GPUs
    python carft.py --lam 0 --out out/ft                           # the baseline FT, CE alone
"""
import copy
import json
import math
import sys

import torch
import torch.nn.functional as F

import common

# ---- the loss ------------------------------------------------------------------------------------
def context_head(E):
    """W_ctx (M, d) of text features E (K, M, d): the normalised mean over classes."""
    return F.normalize(E.mean(0), dim=-1)

def context_kl(zero_shot_logits, logits):
    """KL(p0 || p) of logits (N, M), mean over the batch: scalar. Swap the two for KL(p || p0)."""
    log_p0, log_p = zero_shot_logits.log_softmax(-1), logits.log_softmax(-1)        # (N, M)
    return (log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()

def cosine_lr(step, total, warmup, peak):
    """Learning rate: linear up to `peak` over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.flags(__doc__, "out/carft", epochs=10, lr=1e-5, wd=0.1, warmup=500)   # FLYP's
    add = parser.add_argument_group("CAR-FT").add_argument
    add("--lam", type=common.weight, default=1.0, help="weight of KL; 0: plain FT (%(default)s)")
    add("--reverse-kl", action="store_true", help="KL(p || p0) instead of KL(p0 || p)")
    args = common.start(parser, argv)                       # without --data: draws the toy

    # data, model, heads, optimiser
    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    if args.lam and len(train.templates) < 2:
        sys.exit(f"error: {args.data}/templates.txt has a single template; add more, or --lam 0")
    torch.manual_seed(args.seed)                            # for random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    E = common.text_embeddings(model, tokenizer, train.classnames, train.templates)  # (K, M, d)
    W_cls = torch.nn.Parameter(common.class_head(E))                                # (K, d)
    W_ctx = context_head(E)                                                         # (M, d)
    tau = model.logit_scale.exp().detach()
    untuned = copy.deepcopy(model).requires_grad_(False) if args.lam else None      # for u0
    model.requires_grad_(False).visual.requires_grad_(True)
    trained = [*model.visual.parameters(), W_cls]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    parts = {"visual": model.visual, "head": torch.nn.ParameterList([W_cls]),
             "optimizer": optimizer, "scaler": scaler}
    common.prepare_towers(model, args)                      # --compile, --grad-checkpointing
    if args.lam:
        common.prepare_towers(untuned, args)

    run = common.Run(args, [train, *sets])
    if "sets" in run.results:                               # --out holds this run, finished
        return run.report()
    if not run.results:                                     # here, so that a bad file shows early
        zero_shot = common.evaluate(model, tokenizer, preprocess, sets, args, W_cls)
        run.add_results({"zero_shot": zero_shot})
    run.restore(parts)                                      # the checkpoint, if there is one

    # the loop; this process has n = N / WORLD images of a batch
    loader = common.train_loader(train, crop, args, run.start, total)
    for step, (images, labels, _, _) in run.steps(loader, total):
        seen = step * args.batch_size                       # score val when an epoch has ended:
        if step and args.eval_every and seen % (args.eval_every * len(train)) < args.batch_size:
            run.save(step, parts)                           # a signal may end a long scoring
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args, W_cls)
            run.log(step=step - 1, **{f"val_{k}": val["sets"]["val"][k] for k in ("top1", "ece")})
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total, args.warmup, args.lr)
        images = common.to_input(model, images)                                     # (n, 3, H, W)
        y = common.gather(common.to_device(labels))                                 # (N,)
        with common.autocast(args.precision):
            u = common.gather(common.encode_image(model, images, args.accum))       # (N, d)
        loss = F.cross_entropy(tau * u @ W_cls.T, y)                                # of (N, K)
        terms = {"cross_entropy": loss}
        if args.lam:
            with torch.inference_mode(), common.autocast(args.precision):
                u0 = common.gather(common.encode_image(untuned, images, args.accum))
            context0, context = tau * u0 @ W_ctx.T, tau * u @ W_ctx.T               # (N, M)
            if args.reverse_kl:
                context0, context = context, context0
            terms["context_kl"] = context_kl(context0, context)
            loss = loss + args.lam * terms["context_kl"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(trained)
        scaler.step(optimizer)
        scaler.update()

        if step % args.log_every == 0 or step + 1 == total:
            run.log(step=step, loss=loss, **terms, lr=group["lr"])
        if (step + 1) % args.save_every == 0 or step + 1 == total or run.stopped:
            run.save(step + 1, parts)

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    head, classes = {"W_cls": W_cls}, json.dumps(train.classes)
    common.write(run.path / "head.safetensors", head, classes=classes)
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args, W_cls))
    run.report()

if __name__ == "__main__":
    main()
