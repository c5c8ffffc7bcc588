# SPDX-License-Identifier: MIT
"""CAR-FT: context-aware robust fine-tuning of CLIP (Mao et al., 2022, arXiv 2211.16175).

    loss = CE(tau u W_cls^T, y) + lam * KL(p0 || p),     p = softmax(tau u W_ctx^T)

    u (N, d)             image features of a batch, L2-normalised; y (N,) their classes; tau = exp(logit_scale), fixed
    E (K, M, d)          text features of K classes in M templates ("contexts"), L2-normalised, from the untuned model
    W_cls (K, d)         normalised mean of E over templates: the classifier, trained from there
    W_ctx (M, d)         normalised mean of E over classes: the context head, fixed
    p, p0 (N, M)         which context an image is in, by the model being tuned and by the untuned one

The tuned image tower keeps telling a sketch from a photograph, and with that what it knew of both. Training needs no
text tower after E: neither its activations nor its optimiser state exist. It is exported as it was.

What the paper's text confirms: zero-shot prompt weights give the context distribution, and the KL divergence between
those of the original and the tuned model is minimised beside classification. Our reading: its direction (--reverse-kl
turns it), lam = 1, W_cls free to leave the unit sphere, and the recipe, which is FLYP's (no code was released).

    python carft.py                                                   # the toy, on a CPU
    python carft.py --data /imagenet                                  # ImageNet, on a GPU
    torchrun --nproc_per_node 8 carft.py --data /imagenet             # the same batch on eight
    python carft.py --lam 0                                           # plain fine-tuning (FT), the natural baseline
"""
import copy
import json
import os

import torch
import torch.nn.functional as F

import common


# ---- the loss ------------------------------------------------------------------------------------------------------

def context_head(E):
    """W_ctx (M, d) of text embeddings E (K, M, d): the normalised mean over classes."""
    return F.normalize(E.mean(0), dim=-1)


def context_kl(zero_shot_logits, logits):
    """KL(p0 || p) of two (N, M) sets of context logits, already times tau; the mean over the batch: scalar.

    p0 = softmax(zero_shot_logits) of the untuned model, p = softmax(logits) of the one being tuned; exchanged, they
    give the reverse KL(p || p0).
    """
    log_p0, log_p = zero_shot_logits.log_softmax(-1), logits.log_softmax(-1)
    return (log_p0.exp() * (log_p0 - log_p)).sum(-1).mean()


# ---- the run -------------------------------------------------------------------------------------------------------

@common.cli
def main(argv=None):
    parser = common.flags(__doc__, out="out/carft")                  # --data, --model, --batch-size, --accum, ...
    add = parser.add_argument
    # recipe: FLYP's, not verified for CAR-FT
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--max-steps", type=int, help="stop (and end the schedule) after this many steps")
    add("--lr", type=float, default=1e-5, help="peak learning rate of AdamW")
    add("--wd", type=float, default=0.1, help="weight decay, on every trained parameter, W_cls too")
    add("--warmup", type=int, default=500, help="steps of linear warm-up, then cosine to 0")
    # CAR-FT
    add("--lam", type=float, default=1.0, help="weight of the context term; 0: plain fine-tuning")
    add("--reverse-kl", action="store_true", help="KL(p || p0) instead of KL(p0 || p)")

    device = common.setup()
    args = common.parse(parser, device, argv)
    out = lambda name: os.path.join(args.out, name)

    # data, model, heads, optimiser
    root = common.read_root(args)
    total = common.total_steps(args, len(root.train))
    if args.lam and len(root.templates) < 2:
        raise common.Abort(f"{args.data} has a single template, so there is no context to keep; "
                           "write more to templates.txt, or give --lam 0")
    torch.manual_seed(args.seed)                                     # for random weights; the data draws by itself
    model, preprocess_train, preprocess_val, tokenizer = common.load_model(args.model, args.pretrained, device)
    E = common.text_embeddings(model, tokenizer, root.classnames, root.templates)                  # (K, M, d)
    W_cls = torch.nn.Parameter(common.class_head(E))                                               # (K, d)
    W_ctx = context_head(E)                                                                        # (M, d)
    del E
    tau = model.logit_scale.exp().detach()
    untuned = copy.deepcopy(model).requires_grad_(False) if args.lam else None                     # gives p0
    model.requires_grad_(False).visual.requires_grad_(True)
    trained = [*model.visual.parameters(), W_cls]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.wd, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    common.prepare_towers(model, args)
    if untuned:
        common.prepare_towers(untuned, args)

    # a new run, or the one that --out holds
    state, results = common.begin(args, root)
    if "sets" in results:
        return common.report(results)
    if "zero_shot" not in results:                                   # before any training, so a broken set shows now
        results["zero_shot"] = common.evaluate(model, tokenizer, preprocess_val, root, args, device,
                                               head=W_cls.detach(), title="zero-shot")
        common.write_json(out("results.json"), results)
    start = 0
    if state:
        start = state["step"]
        model.visual.load_state_dict(state["visual"])
        W_cls.data.copy_(state["W_cls"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    del state                                                        # as large as model and optimiser

    # the loop; n of the N images of a batch are this process's own (without torchrun: all)
    prepare = common.to_input(model, device)
    loader = common.train_loader(root.train, preprocess_train, args, total, device, start)
    log = common.Log(args, root.train, total, start, "CAR-FT")
    for step, (images, labels, index, _) in zip(range(start, total), loader):
        lr = common.cosine_lr(step, total, args.warmup, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, y = prepare(images), common.to_device(labels, device)                              # (n, 3, H, W), (n,)

        with common.autocast(device, args.precision):
            u = common.encode_image(model, images, args.accum)                                     # (n, d)
        terms = {"cross_entropy": F.cross_entropy(tau * u @ W_cls.T, y)}
        loss = terms["cross_entropy"]
        if args.lam:
            with torch.inference_mode(), common.autocast(device, args.precision):
                u0 = common.encode_image(untuned, images, args.accum)                              # (n, d)
            logits0, logits = tau * u0 @ W_ctx.T, tau * u @ W_ctx.T                                # (n, M)
            terms["context_kl"] = context_kl(logits, logits0) if args.reverse_kl else context_kl(logits0, logits)
            loss = loss + args.lam * terms["context_kl"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(trained)
        scaler.step(optimizer)
        scaler.update()

        if log.step(step, lr, {"loss": loss, **terms}, index):       # every --save-every steps, at the end, on a signal
            log.save(step=step + 1, visual=model.visual.state_dict(), W_cls=W_cls.data,
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    log.close()

    # export first: whatever evaluation stumbles over, the model is there
    common.export(model, args.model, out("model"))
    common.write_tensors(out("head.safetensors"), {"W_cls": W_cls}, classes=json.dumps(root.classes))
    results.update(common.evaluate(model, tokenizer, preprocess_val, root, args, device, head=W_cls.detach()))
    common.write_json(out("results.json"), results)
    common.report(results)


if __name__ == "__main__":
    main()
