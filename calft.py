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
by the teacher's soft targets) and 1 / sigma_min of the image features' covariance (lowered by
L_oc). L_cross is the paper's regulariser R(W_v, W_l) of equations 3 and 4, "to promote the encoders
to capture diverse features" (after Ji et al., 2023). The paper's equations square both norms, and
the released code does not. We follow the code, to which the default weights belong; appendix B.2
writes L_oc without the square, too. Images of one class that meet in a batch are negatives of each
other in CE2, as in FLYP and in CaRot's code.

--teacher-beta B replaces CaRot's m by that of TRACER (ICML 2026, github.com/HesamAsad/TRACER): the
teacher is then a mean of the weights of the whole run, the untuned ones included. All else stays
CaRot's. TRACER's own loss has further terms of distillation (of features, of relations, across
modalities), which are not here.

    python calft.py                                                # the toy
    torchrun --nproc_per_node 8 calft.py --data /imagenet          # the released recipe, eight GPUs
    python calft.py --oc 0 --sd 0 --cross-fnorm 0 --out out/flyp   # the baseline FLYP, CE2 alone
    python calft.py --teacher-beta 0.5 --out out/whole-run         # TRACER's teacher
"""
import common                                               # before torch, see its first lines

import copy
import math
import signal

import torch

# ---- the loss ------------------------------------------------------------------------------------
def orthogonality(W):
    """Return L_oc of W (d_in, d): scalar. The norm is not squared; the weight 0.2 is for that."""
    identity = torch.eye(W.shape[1], device=W.device, dtype=W.dtype)
    return torch.linalg.norm(W.T @ W - identity)

def self_distillation(student_logits, teacher_logits):
    """Return L_sd of S (N, N) and S_ema (N, N): scalar. It is the sum of the two directions, while
    CE2 is their mean. The paper writes KL divergences; their gradient is the same."""
    def H(target, logits):
        return -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return H(teacher_logits, student_logits) + H(teacher_logits.T, student_logits.T)

def cross_frobenius(W_v, W_t):
    """Return L_cross of the projections W_v (d_in, d) and W_t (d_t, d): scalar."""
    return torch.linalg.norm(W_v @ W_t.T)

def ema_momentum(step, total_steps):
    """Return m after `step`: it rises from 0.05 to 0.9 over the first fifth of the run."""
    return 0.05 + (0.9 - 0.05) * min(1.0, step / (0.2 * total_steps))

def beta_momentum(update, n_updates, beta):
    """Return m of update k = 1, ..., K. With it the teacher is the mean of the untuned weights
    (k = 0) and of the student's at all updates, weighted by the density of Beta(beta, beta):
    m = 1 - w_k / (w_0 + ... + w_k), w_k = (t (1 - t))^(beta - 1), t = (k + 1/2) / (K + 1).

    From TRACER's code, which updates after each step. In float32 a mean of 250 weights is off by up
    to 0.7 % of the teacher's movement, one of 25,000 by a third or more."""
    density = []
    for k in range(update + 1):
        t = (k + 0.5) / (n_updates + 1)
        density.append((t * (1 - t)) ** (beta - 1))
    return 1 - density[-1] / sum(density)

@torch.no_grad()
def update_teacher(teacher, model, m):
    """Set theta_ema to m theta_ema + (1 - m) theta, for every parameter, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - m)

def projections(model):
    """Return W_v (d_in, d) and W_t (d_t, d), the last linear map of each tower, or None for a tower
    that does not end in one."""
    visual = model.visual
    W_v = None
    if getattr(visual, "proj", None) is not None:           # ViT
        W_v = visual.proj
    elif hasattr(visual, "attnpool"):                       # CLIP's ResNets
        W_v = visual.attnpool.c_proj.weight.T
    elif hasattr(getattr(visual, "head", None), "proj"):    # timm towers
        W_v = visual.head.proj.weight.T
    W_t = getattr(model, "text", model).text_projection
    if isinstance(W_t, torch.nn.Linear):
        W_t = W_t.weight.T
    return W_v, W_t

def cosine_lr(step, total, warmup, peak):
    """Return the learning rate: a linear rise to `peak`, then a cosine to 0 at `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(angle))

# ---- the run -------------------------------------------------------------------------------------
def main(argv=None):
    parser = common.make_train_parser("CaRot", __doc__, "out/calft", lr=1e-5)
    group = parser.add_argument_group("CaRot, as released")
    common.add_number(group, "--oc", 0.2, "weight of L_oc")
    common.add_number(group, "--sd", 1.5, "weight of L_sd; 0: no teacher")
    common.add_number(group, "--cross-fnorm", 0.05, "weight of L_cross")
    common.add_number(group, "--ema-every", 500, "steps between two updates of the teacher")
    common.add_number(group, "--teacher-beta", 0.0, "b of TRACER's teacher, say 0.5; 0: CaRot's")
    args = common.fill_in(*common.given_flags(parser, argv))            # without --data: the toy
    common.start_processes()

    # data, model, teacher, optimiser
    train, sets = common.read_data(args)                    # sets: val, then all others to score
    total = common.total_steps(args, len(train))
    torch.manual_seed(args.seed)                            # seeds random initialisation
    model, crop, preprocess, tokenizer = common.load_model(args.model, args.pretrained)
    # The towers train in eval mode: BatchNorm keeps its statistics, and nothing is dropped.
    W_v, W_t = projections(model)
    lacks_W_v = W_v is None and (args.oc or args.cross_fnorm)
    lacks_W_t = W_t is None and args.cross_fnorm
    if lacks_W_v or lacks_W_t:
        common.fail(f"--model {args.model} has no final linear projections; use --oc 0 "
                    "--cross-fnorm 0")
    if args.teacher_beta > 100:                             # its density would be 0 / 0
        common.fail(f"--teacher-beta {args.teacher_beta}: expected at most 100")
    if args.sd and args.ema_every >= total:
        common.say(f"warning: --ema-every {args.ema_every} in {total} steps: one teacher update")
    tokens = common.prompts(tokenizer, train.classnames, train.templates)           # (K, M, L)
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.wd, fused=True)
    scaler = torch.amp.GradScaler(common.DEVICE.type, enabled=args.precision == "fp16")
    saved = {"model": model, "optimizer": optimizer, "scaler": scaler}      # what last.pt holds
    if args.sd:
        saved["teacher"] = teacher
    common.prepare_towers(model, args)
    common.prepare_towers(teacher, args)

    run = common.Run(args, train, sets)
    if "sets" in run.results:                               # the run in --out has ended
        return run.report()
    if "zero_shot" not in run.results:                      # unreadable images are found early
        zero_shot = common.evaluate(model, tokenizer, preprocess, sets, args)
        run.add_results({"zero_shot": zero_shot})
    run.restore(saved)                                      # if there is a checkpoint

    # the loop; this process has n = N / WORLD images of each batch
    batches = common.train_loader(train, crop, args, run.first_step, total)
    for step, (images, labels, _, draws) in run.steps(batches, total):
        lr = cosine_lr(step, total, args.warmup, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        images = common.to_input(model, images)                                     # (n, 3, S, S)
        template_id = draws % len(train.templates)
        text = common.cut_padding(tokens[labels, template_id])                      # (n, L)
        if common.DEVICE.type == "cuda":
            text = text.pin_memory()                        # otherwise the copy waits for the GPU
        text = text.to(common.DEVICE, non_blocking=True)

        with common.autocast(args.precision):
            u = common.encode_image(model, images, args.accum)                      # (n, d)
            v = common.encode_text(model, text, args.accum)                         # (n, d)
        S = model.logit_scale.exp() * common.gather(u) @ common.gather(v).T         # (N, N)
        terms = {"contrastive": common.clip_loss(S)}
        loss = terms["contrastive"]
        W_v, W_t = projections(model)
        if args.oc:
            terms["orthogonality"] = orthogonality(W_v)
            loss = loss + args.oc * terms["orthogonality"]
        if args.sd and step:                                # at step 0 the teacher is the student
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
            m = ema_momentum(step, total)
            if args.teacher_beta:
                update = step // args.ema_every + 1
                n_updates = (total - 1) // args.ema_every + 1
                m = beta_momentum(update, n_updates, args.teacher_beta)
            update_teacher(teacher, model, m)

        is_last = step + 1 == total
        if step % args.log_every == 0 or is_last:
            run.log(step, loss=loss, **terms, lr=lr)
        if (step + 1) % args.save_every == 0 or is_last:
            run.save(step + 1, saved)                       # first: the run may be killed below
        if common.epoch_ended(step, total, len(train), args):
            val = common.evaluate(model, tokenizer, preprocess, sets[:1], args)["sets"]["val"]
            run.log(step, val_top1=val["top1"], val_ece=val["ece"])

    common.export(model, args.model, run.path / "model")    # before scoring, which may fail
    if args.sd:
        common.export(teacher, args.model, run.path / "teacher")
    head = common.zero_shot_head(model, tokenizer, train)
    common.export_head(head, model, train, run.path / "head.safetensors", is_trained=False)
    run.add_results(common.evaluate(model, tokenizer, preprocess, sets, args, head))
    run.report()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends the run at once
    main()
    common.end_processes()
