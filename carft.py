# SPDX-License-Identifier: MIT
"""CAR-FT: context-aware robust fine-tuning of CLIP (Mao et al., 2022, arXiv 2211.16175).

    loss = CE(u W_cls^T, y) + lam * KL(p0 || p)

    u, u0 (N, d)     L2-normalised features of images, by the model being tuned and the untuned one
    y (N,)           their classes
    E (K, M, d)      text features of K classes in M templates, by the untuned model
    W_cls (K, d)     the classifier: starts as tau times the normalised mean of E over templates
    W_ctx (M, d)     the normalised mean of E over classes: a classifier of contexts, fixed
    p, p0 (N, M)     softmax(tau u W_ctx^T), softmax(tau u0 W_ctx^T)
    tau              exp(logit_scale), fixed

Plain fine-tuning forgets which context an image is in ("a sketch of a", "a photo of a"), and loses
robustness with it. The KL term keeps the untuned model's view of the context. The image tower and
W_cls are trained. The text tower only makes E, and the heads of sets with other classes.

The loss is the paper's. No code was released, so the recipe and the head are those of WiSE-FT's
released loop (Wortsman et al., 2022), whose plain fine-tuning, FT, is the baseline of the papers'
tables: lr 3e-5, gradients clipped to norm 1, and a head that holds tau. One thing differs from that
loop: its head also has a bias. Ours are the direction of the KL (--reverse-kl turns it) and
lam = 1.

    python carft.py                                                # the toy
    torchrun --nproc_per_node 8 carft.py --data /imagenet          # ImageNet, on eight GPUs
    python carft.py --lam 0 --out out/ft                           # the baseline FT, CE alone
"""
import common                                               # before torch, see its first lines

import copy
import math
import signal

import torch
import torch.nn.functional as F

# ---- the loss ------------------------------------------------------------------------------------
def context_head(E):
    """Return W_ctx (M, d) of text features E (K, M, d): the normalised mean over the classes."""
    return F.normalize(E.mean(0), dim=-1)

def context_kl(zero_shot_logits, logits):
    """Return KL(p0 || p) of logits (N, M), the mean over the batch: scalar. Swap the arguments for
    KL(p || p0)."""
    log_p0 = zero_shot_logits.log_softmax(-1)                                       # (N, M)
    log_p = logits.log_softmax(-1)                                                  # (N, M)
    return (log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()

def cosine_lr(step, total, warmup, peak):
    """Return the learning rate: a linear rise to `peak`, then a cosine to 0 at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.make_train_parser("CAR-FT", __doc__, "out/carft", lr=3e-5)
    group = parser.add_argument_group("CAR-FT")
    common.add_number(group, "--lam", 1.0, "weight of the KL term; 0: plain fine-tuning, FT")
    common.add_number(group, "--clip-grad", 1.0, "largest norm of all gradients; 0: any")
    group.add_argument("--reverse-kl", action="store_true", help="KL(p || p0), not KL(p0 || p)")
    args = common.fill_in(*common.given_flags(parser, argv))            # without --data: the toy
    common.start_processes()

    # data, model, heads, optimiser
    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    if args.lam and len(train.templates) < 2:
        common.fail(f"{args.data}/templates.txt has one template; add more, or use --lam 0")
    torch.manual_seed(args.seed)                            # seeds random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    # The image tower trains in eval mode: BatchNorm keeps its statistics, and nothing is dropped.
    E = common.text_embeddings(model, tokenizer, train.classnames, train.templates)  # (K, M, d)
    tau = model.logit_scale.exp().detach()
    W_cls = torch.nn.Parameter(tau * common.class_head(E))                          # (K, d)
    W_ctx = context_head(E)                                                         # (M, d)
    untuned = copy.deepcopy(model).requires_grad_(False)    # for u0
    model.requires_grad_(False).visual.requires_grad_(True)
    trained = [*model.visual.parameters(), W_cls]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    saved = {"visual": model.visual, "head": torch.nn.ParameterList([W_cls]),
             "optimizer": optimizer, "scaler": scaler}      # what last.pt holds
    common.prepare_towers(model, args)
    common.prepare_towers(untuned, args)

    run = common.Run(args, train, sets)
    if "sets" in run.results:                               # the run in --out has ended
        return run.report()
    if "zero_shot" not in run.results:                      # unreadable images are found early
        zero_shot = common.evaluate(model, tokenizer, preprocess, sets, args)
        run.add_results({"zero_shot": zero_shot})
    run.restore(saved)                                      # if there is a checkpoint

    # the loop; this process has n = N / WORLD images of each batch
    batches = common.train_loader(train, crop, args, run.first_step, total)
    for step, (images, labels, _, _) in run.steps(batches, total):
        lr = cosine_lr(step, total, args.warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = common.to_input(model, images)                                     # (n, 3, S, S)
        y = common.gather(labels.to(common.DEVICE, non_blocking=True))              # (N,)

        with common.autocast(args.precision):
            u = common.gather(common.encode_image(model, images, args.accum))       # (N, d)
        terms = {"cross_entropy": F.cross_entropy(u @ W_cls.T, y)}                  # of (N, K)
        loss = terms["cross_entropy"]
        if args.lam:
            with torch.inference_mode(), common.autocast(args.precision):
                u0 = common.encode_image(untuned, images, args.accum)               # (n, d)
            zero_shot_logits = tau * common.gather(u0) @ W_ctx.T                    # (N, M)
            logits = tau * u @ W_ctx.T                                              # (N, M)
            if args.reverse_kl:
                terms["context_kl"] = context_kl(logits, zero_shot_logits)
            else:
                terms["context_kl"] = context_kl(zero_shot_logits, logits)
            loss = loss + args.lam * terms["context_kl"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(trained)
        if args.clip_grad:
            scaler.unscale_(optimizer)                      # in fp16 gradients are scaled
            torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
        scaler.step(optimizer)
        scaler.update()

        is_last = step + 1 == total
        if step % args.log_every == 0 or is_last:
            run.log(step, loss=loss, **terms, lr=lr)
        if (step + 1) % args.save_every == 0 or is_last:
            run.save(step + 1, saved)                       # first: the run may be killed below
        if common.epoch_ended(step, total, len(train), args):
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args, W_cls / tau)
            val = val["sets"]["val"]
            run.log(step, val_top1=val["top1"], val_ece=val["ece"])

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    head = W_cls.detach() / tau                             # any model's logits are tau u head^T
    common.export_head(head, model, train, run.path / "head.safetensors", is_trained=True)
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args, head))
    run.report()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends the run at once
    main()
    common.end_processes()
