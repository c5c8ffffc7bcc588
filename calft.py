# SPDX-License-Identifier: MIT
"""CaRot: calibrated robust fine-tuning of CLIP (Oh et al., NeurIPS 2024, arXiv 2311.01723).

    loss = CE2(S) + oc * L_oc + sd * L_sd + cross_fnorm * L_cross

    CE2(S)  = (CE(S) + CE(S^T)) / 2          CLIP's contrastive loss: image i belongs to text i
    L_oc    = ||W_v^T W_v - I||_F
    L_sd    = H(S_ema, S) + H(S_ema^T, S^T), H(A, B) = -mean_i sum_j softmax(A)_ij log softmax(B)_ij
    L_cross = ||W_v W_t^T||_F

    u, v (N, d)       L2-normalised features of images and of their class names in random templates
    S, S_ema (N, N)   tau u v^T with tau = exp(logit_scale), by the student and by the teacher
    W_v (d_in, d)     last projection of the image tower; W_t (d_t, d): that of the text tower
    teacher           starts as a copy of the student. After steps 0, 500, 1000, ... (--ema-every)
                      theta_ema <- m theta_ema + (1 - m) theta, where m rises from 0.05 to 0.9

Both towers and tau are trained, and the student is the result. The paper bounds error and
calibration error under shift by two terms: calibration error on the training distribution (lowered
by the teacher's soft targets) and 1 / sigma_min of the image features' covariance (by L_oc). Where
paper and released code differ we follow the code: the paper squares the norm in L_oc, and L_cross
stands in the code alone, without a reason.

    python calft.py                                                # the toy
    torchrun --nproc_per_node 8 calft.py --data /imagenet          # the released recipe, eight GPUs
    python calft.py --oc 0 --sd 0 --cross-fnorm 0 --out out/flyp   # the baseline FLYP, CE2 alone
"""
import copy
import math
import sys

import torch

import common

# ---- the loss ------------------------------------------------------------------------------------
def orthogonality(W):
    """L_oc of W (d_in, d): scalar. The norm is not squared; the default weight 0.2 is for this."""
    return torch.linalg.norm(W.T @ W - torch.eye(W.shape[1], device=W.device, dtype=W.dtype))

def self_distillation(student_logits, teacher_logits):
    """L_sd of S (N, N) and S_ema (N, N): scalar. The two directions are summed, while CE2
    takes their mean. The paper writes KL divergences; their gradient is the same."""
    def H(target, logits):
        return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return H(teacher_logits, student_logits) + H(teacher_logits.T, student_logits.T)

def cross_frobenius(W_v, W_t):
    """L_cross of the projections W_v (d_in, d) and W_t (d_t, d): scalar."""
    return torch.linalg.norm(W_v @ W_t.T)

def ema_momentum(step, total_steps):
    """m after `step`: linear from 0.05 to 0.9 over the first fifth of the run, then 0.9."""
    return 0.05 + (0.9 - 0.05) * min(1.0, step / (0.2 * total_steps))

@torch.no_grad()
def update_teacher(teacher, model, m):
    """theta_ema <- m theta_ema + (1 - m) theta, every parameter, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - m)

def projections(model):
    """W_v (d_in, d) and W_t (d_t, d), the last linear map of each tower, None where it has none."""
    visual, W_v, W_t = model.visual, None, getattr(model, "text", model).text_projection
    if getattr(visual, "proj", None) is not None:           # ViT
        W_v = visual.proj
    elif hasattr(visual, "attnpool"):                       # CLIP's ResNets
        W_v = visual.attnpool.c_proj.weight.T
    elif hasattr(getattr(visual, "head", None), "proj"):    # timm towers
        W_v = visual.head.proj.weight.T
    return W_v, (W_t.weight.T if isinstance(W_t, torch.nn.Linear) else W_t)

def cosine_lr(step, total, warmup, peak):
    """Learning rate: linear up to `peak` over `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.flags(__doc__, "out/calft", epochs=10, lr=1e-5, wd=0.1, warmup=500)   # released
    add = parser.add_argument_group("CaRot").add_argument
    add("--oc", type=common.weight, default=0.2, help="weight of L_oc (%(default)s)")
    add("--sd", type=common.weight, default=1.5, help="of L_sd; 0: no teacher (%(default)s)")
    add("--cross-fnorm", type=common.weight, default=0.05, help="of L_cross (%(default)s)")
    add("--ema-every", type=common.positive_int, default=500, help="steps per update (%(default)s)")
    args = common.start(parser, argv)                       # without --data: draws the toy

    # data, model, teacher, optimiser
    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    torch.manual_seed(args.seed)                            # for random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    has_W_v, has_W_t = (W is not None for W in projections(model))
    if args.oc and not has_W_v or args.cross_fnorm and not (has_W_v and has_W_t):
        sys.exit(f"error: {args.model} does not end in linear projections; --oc 0 --cross-fnorm 0?")
    if args.sd and args.ema_every >= total:
        common.say(f"warning: --ema-every {args.ema_every} in {total} steps: one teacher update")
    tokens = common.prompts(tokenizer, train.classnames, train.templates)           # (K, M, L)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if args.sd:
        teacher = parts["teacher"] = copy.deepcopy(model).requires_grad_(False)
        common.prepare_towers(teacher, args)
    common.prepare_towers(model, args)                      # --compile, --grad-checkpointing

    run = common.Run(args, [train, *sets])
    if "sets" in run.results:                               # --out holds this run, finished
        return run.report()
    if not run.results:                                     # here, so that a bad file shows early
        run.add_results({"zero_shot": common.evaluate(model, tokenizer, preprocess, sets, args)})
    run.restore(parts)                                      # the checkpoint, if there is one

    # the loop; this process has n = N / WORLD images of a batch
    loader = common.train_loader(train, crop, args, run.start, total)
    for step, (images, labels, _, draws) in run.steps(loader, total):
        seen = step * args.batch_size                       # score val when an epoch has ended:
        if step and args.eval_every and seen % (args.eval_every * len(train)) < args.batch_size:
            run.save(step, parts)                           # a signal may end a long scoring
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args)
            run.log(step=step - 1, **{f"val_{k}": val["sets"]["val"][k] for k in ("top1", "ece")})
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, total, args.warmup, args.lr)
        images = common.to_input(model, images)                                     # (n, 3, H, W)
        text = tokens[labels, draws % len(train.templates)]                         # (n, L)

        with common.autocast(args.precision):
            u = common.encode_image(model, images, args.accum)                      # (n, d)
            v = common.encode_text(model, text, args.accum)                         # (n, d)
        S = model.logit_scale.exp() * common.gather(u) @ common.gather(v).T         # (N, N)
        loss = common.clip_loss(S)
        terms = {"contrastive": loss}
        W_v, W_t = projections(model)
        if args.oc:
            terms["orthogonality"] = orthogonality(W_v)
            loss = loss + args.oc * terms["orthogonality"]
        if args.sd and step > 0:                            # at step 0 the teacher is the student
            with torch.inference_mode(), common.autocast(args.precision):
                u_ema = common.encode_image(teacher, images, args.accum)            # (n, d)
                v_ema = common.encode_text(teacher, text, args.accum)               # (n, d)
            S_ema = teacher.logit_scale.exp() * common.gather(u_ema) @ common.gather(v_ema).T
            terms["self_distillation"] = self_distillation(S, S_ema)
            loss = loss + args.sd * terms["self_distillation"]
        if args.cross_fnorm:
            terms["cross_frobenius"] = cross_frobenius(W_v, W_t)
            loss = loss + args.cross_fnorm * terms["cross_frobenius"]

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        common.average_gradients(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))     # CLIP's own bound
        if args.sd and step % args.ema_every == 0:
            update_teacher(teacher, model, ema_momentum(step, total))

        if step % args.log_every == 0 or step + 1 == total:
            run.log(step=step, loss=loss, **terms, lr=group["lr"])
        if (step + 1) % args.save_every == 0 or step + 1 == total or run.stopped:
            run.save(step + 1, parts)

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    if args.sd:
        common.export(teacher, args.model, run.path / "teacher")
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args))
    run.report()

if __name__ == "__main__":
    main()
