# SPDX-License-Identifier: MIT
"""Accuracy and calibration of any CLIP on val and every shift of a ROOT: one model, or several side by side.

    python evaluate.py --data ROOT --model local-dir:out/calft/model
    python evaluate.py --data ROOT --model ViT-B-16-quickgelu out/calft out/carft local-dir:out/calft/teacher
    python evaluate.py --data ROOT --model out/calft --wise 0 0.25 0.5 0.75 1      # WiSE-FT's curve
    python evaluate.py --data ROOT --model out/calft --temperature fit --sigma-min --predictions DIR --plot DIR

A model is the folder of a run, local-dir:PATH (what runs export), or an open_clip name with --pretrained. Each is
scored as the training scripts score it: with the zero-shot head of its own text tower, or with the head that carft.py
trained, where there is one for the classes of this ROOT. A run on this ROOT keeps its own training folders and val, so
that runs which left out a domain each stand side by side; of several runs the mean is printed too. Each image is
decoded once for all models that share them.
"""
import argparse
import copy
import importlib.util
import json
import os
import re
import statistics

import numpy as np
import safetensors
import torch

import common


def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of logits / T (Guo et al., 2017), logits (n, K), labels (n,): float.

    The NLL is convex in 1/T, so Newton's steps on its derivative, kept in [0.01, 100], find it.
    """
    z, y, b = logits.double(), labels[:, None], 1.0                  # b = 1/T
    for _ in range(100):
        p = (b * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        slope = (mean - z.gather(1, y)).mean()                       # d NLL / d b
        curvature = (p * (z - mean) ** 2).sum(1).mean()              # d2 NLL / d b2
        step = float(slope / curvature.clamp(min=1e-12))
        b = min(max(b - step, b / 4, 0.01), 4 * b, 100.0)
        if abs(step) < 1e-9 * b:
            break
    return 1 / b


def sigma_min(features):
    """Smallest singular value of the covariance (d, d) of features (n, d), each dimension standardised: float.

    CaRot's theory (section 3) bounds error and calibration error under shift by its inverse.
    """
    x = features.double()
    if not x.std(0).all():                                           # a dimension that stands still
        return 0.0
    x = (x - x.mean(0)) / x.std(0)
    return float(torch.linalg.svdvals(x.T @ x / (len(x) - 1))[-1])


def read_run(name):
    """(name for load_model, title, folder, args.json or None) of one --model."""
    title = os.path.normpath(name.removeprefix("local-dir:"))
    if os.path.isdir(os.path.join(name, "model")):                   # the folder of a run
        name = "local-dir:" + os.path.join(name, "model")
    folder = os.path.dirname(os.path.normpath(name.removeprefix("local-dir:")))
    file = os.path.join(folder, "args.json")
    run = common.read_json(file) if name.startswith("local-dir:") and os.path.isfile(file) else {}
    return name, title, folder, run if {"data", "train", "val", "val_frac", "seed", "model"} <= set(run) else None


def load(name, args, root, device):
    """[(title, model, preprocess, tokenizer, head or None, about)] of one --model: itself, or what --wise asks for."""
    name, title, folder, run = read_run(name)
    model, _, preprocess, tokenizer = common.load_model(name, args.pretrained, device)
    head, trained = None, os.path.join(folder, "head.safetensors")
    if os.path.basename(os.path.normpath(name)) == "model" and os.path.isfile(trained):
        with safetensors.safe_open(trained, "pt") as f:
            if json.loads(f.metadata()["classes"]) == root.classes:
                head = f.get_tensor("W_cls")                         # (K, d)
            else:
                print(f"{trained} was trained on other classes: zero-shot head")
    about = {}                                                       # a run, its recipe all that its seeds share
    if run and os.path.basename(os.path.normpath(name)) == "model":
        own = {k: v for k, v in run.items() if k not in common.FREE | {"seed", "train", "val", "eval", "images"}}
        about = {"run": title, "recipe": json.dumps(own, sort_keys=True)}
    if not args.wise:
        return [(title, model, preprocess, tokenizer, head, about)]

    # WiSE-FT (Wortsman et al., 2022): theta = (1 - alpha) theta_zero_shot + alpha theta_fine_tuned
    if run is None:
        raise common.Abort(f"--wise needs to know what {title} was tuned from: name a run's folder, with its args.json")
    base, *_ = common.load_model(run["model"], run["pretrained"], device)
    if head is not None:
        E = common.text_embeddings(base, tokenizer, root.classnames, root.templates)               # (K, M, d)
        zero_shot_head = common.class_head(E).float().cpu()
    out, tuned = [], model.state_dict()
    for alpha in args.wise:
        mixed = copy.deepcopy(base)
        mixed.load_state_dict({k: v.lerp(tuned[k], alpha) if v.is_floating_point() else v
                               for k, v in base.state_dict().items()})
        W = None if head is None else zero_shot_head.lerp(head, alpha)
        out.append((f"{title} {alpha:g}", mixed, preprocess, tokenizer, W, {**about, "alpha": alpha}))
    return out


def plot(folder, columns, outcomes):
    """PNGs by matplotlib: a reliability diagram with bin counts for each model and set, and val against shifts.

    outcomes: {title: {set: (confidence (n,), correct (n,))}}.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    os.makedirs(folder, exist_ok=True)
    centres, bins = (np.arange(15) + 0.5) / 15, np.linspace(0, 1, 16)
    for title, sets in outcomes.items():
        wide = min(4, len(sets))
        tall = -(-len(sets) // wide)
        figure, axes = plt.subplots(2 * tall, wide, figsize=(2.6 * wide, 3.4 * tall), squeeze=False, sharex=True,
                                    gridspec_kw={"height_ratios": [3, 1] * tall}, layout="constrained")
        for axis in axes.flat:
            axis.set_visible(False)
        for i, (name, (confidence, correct)) in enumerate(sets.items()):
            top, below = axes[2 * (i // wide)][i % wide], axes[2 * (i // wide) + 1][i % wide]
            count, _ = np.histogram(confidence, bins)
            right, _ = np.histogram(confidence, bins, weights=correct.astype(float))
            some = count > 0
            top.bar(centres[some], (right / np.maximum(count, 1))[some], 1 / 15, color="tab:blue", edgecolor="white")
            top.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
            top.set(title=f"{name}: ECE {100 * common.ece(confidence, correct):.1f}", ylim=(0, 1), visible=True)
            below.bar(centres, count, 1 / 15, color="tab:gray", edgecolor="white")
            below.set(xlim=(0, 1), xlabel="confidence", visible=True)
            below.tick_params(labelbottom=True)
            if i % wide == 0:
                top.set_ylabel("accuracy")
                below.set_ylabel("images")
        figure.savefig(os.path.join(folder, f"reliability_{filename(title)}.png"), dpi=120)
        plt.close(figure)

    curves = {}                                                      # WiSE-FT's points of one run make a curve
    for title, c in columns.items():
        if c["shift_mean"] and "temperature" not in c:
            point = c["sets"]["val"]["top1"], c["shift_mean"]["top1"], c.get("alpha")
            curves.setdefault(c.get("run", title), []).append(point)
    figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    for run, points in curves.items():
        points = sorted(points, key=lambda p: p[2] or 0)
        axis.plot([100 * p[0] for p in points], [100 * p[1] for p in points], marker="o", label=run)
        for x, y, alpha in points:
            if alpha is not None:
                axis.annotate(f"{alpha:g}", (100 * x, 100 * y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axis.set(xlabel="val top-1 (%)", ylabel="mean top-1 over shifts (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(os.path.join(folder, "val_against_shifts.png"), dpi=120)
    plt.close(figure)


def filename(title):
    return re.sub("[/ ]", "_", title.strip("/"))


def score(names, args, root, device, outcomes, notes):
    """{title: results} of the models `names` on the sets of `root`; fills outcomes (what `plot` takes) and notes."""
    loaded = [entry for name in names for entry in load(name, args, root, device)]
    everything = common.image_features([m for _, m, *_ in loaded], [p for _, _, p, *_ in loaded],
                                       [root.val, *root.shifts], args, device, skip=args.skip_corrupt,
                                       precision=args.precision)
    columns = {}
    for (title, model, _, tokenizer, head, of_run), features in zip(loaded, everything):
        results, scaled, T = {}, {}, None
        of_sets = common.set_logits(model, tokenizer, root, features, device, head, args.precision,
                                    keep=os.path.join(args.out, "heads"))
        for images, rows, logits, labels, about in of_sets:
            results[images.name] = {**about, **common.scores(logits, labels)}
            if args.temperature:
                T = fit_temperature(logits, labels) if T is None else T                            # val comes first
                scaled[images.name] = {**about, **common.scores(logits / T, labels)}
            confidence, prediction = logits.softmax(1).max(1)
            if args.plot:
                outcomes.setdefault(title, {})[images.name] = confidence.numpy(), (prediction == labels).numpy()
            if args.predictions and common.rank_world()[0] == 0:
                folder = os.path.join(args.predictions, filename(title))
                paths = [images.path(i) for i in rows.tolist()]
                os.makedirs(folder, exist_ok=True)
                with common.replacing(os.path.join(folder, filename(images.name) + ".npz")) as f:
                    np.savez(f, path=np.array(paths), label=labels.numpy(), prediction=prediction.numpy(),
                             confidence=confidence.numpy(), classes=np.array(images.classes))
        columns[title] = {**common.summary(results, root), **of_run}
        if args.temperature:
            columns[f"{title} T={T:.3f}"] = {**common.summary(scaled, root), **of_run, "temperature": T}
        if args.sigma_min:
            value = sigma_min(features[0][~features[0][:, 0].isnan()])
            columns[title]["sigma_min"] = value
            notes.append(f"sigma_min {value:.3g}   {title}")
    skipped = {f: None for s in next(iter(columns.values()))["sets"].values() for f in s.get("skipped_files", [])}
    notes += [f"skipped, not readable: {f}" for f in skipped]
    return columns


def mean_of_runs(runs):
    """Mean and standard deviation of top-1 and ECE over runs: on every set that all have, and of their shift means."""
    def over(entries):
        both = {k: [e[k] for e in entries] for k in ("top1", "ece")}
        mean = {k: statistics.mean(v) for k, v in both.items()}
        return {**mean, **{f"{k}_sd": statistics.stdev(v) for k, v in both.items()}}
    shared = [name for name in runs[0]["sets"] if all(name in r["sets"] for r in runs)]
    return {"runs": [r["run"] for r in runs], "sets": {name: over([r["sets"][name] for r in runs]) for name in shared},
            "shift_mean": over([r["shift_mean"] for r in runs]) if all(r["shift_mean"] for r in runs) else None}


def mean_table(title, mean):
    rows = {**mean["sets"], **({"shift mean": mean["shift_mean"]} if mean["shift_mean"] else {})}
    wide = max(14, len(title) + 2, *(len(name) + 2 for name in rows))
    return "\n".join([f"{title:<{wide}}{'top-1':>8}{'± sd':>6}{'ECE':>8}{'± sd':>6}"] + [
        f"{name:<{wide}}{100 * m['top1']:>8.2f}{'±%.1f' % (100 * m['top1_sd']):>6}"
        f"{100 * m['ece']:>8.2f}{'±%.1f' % (100 * m['ece_sd']):>6}" for name, m in rows.items()])


@common.cli
def main(argv=None):
    parser = common.flags(__doc__, out="out/evaluate", training=False)
    parser.set_defaults(batch_size=256, precision="fp32")
    add = parser.add_argument
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of the towers; bf16 is faster on a GPU, and decides "
        "near ties by chance")
    add("--model", nargs="+", default=["ViT-B-16-quickgelu"], help="folders of runs, open_clip names, local-dir:PATH")
    add("--wise", nargs="+", type=float, metavar="ALPHA", help="interpolate weights with the model that a run was "
        "tuned from: 0 is that model, 1 the tuned one")
    add("--temperature", choices=["fit"], help="fit one temperature on val, and show each model with it too")
    add("--sigma-min", action="store_true", help="smallest singular value of val's standardised feature covariance")
    add("--predictions", metavar="DIR", help="store path, label, prediction and confidence of every image, .npz")
    add("--plot", metavar="DIR", help="reliability diagrams, and val against shifts with WiSE-FT's curve; PNG")
    add("--skip-corrupt", action="store_true", help="count and list images that cannot be read instead of stopping")
    device = common.setup()
    args = common.parse(parser, device, argv)
    if os.path.isfile(os.path.join(args.out, "args.json")):
        raise common.Abort(f"--out {args.out} holds a run, which results.json belongs to; give another --out")
    if not all(np.isfinite(args.wise or [])):
        raise common.Abort("--wise takes finite numbers")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise common.Abort("--plot needs matplotlib: pip install matplotlib")
    groups = {}                                                      # {what decides on val and shifts: names of models}
    for name in [args.model] if isinstance(args.model, str) else args.model:
        *_, run = read_run(name)
        of = run if run and os.path.realpath(run["data"]) == os.path.realpath(args.data) else vars(args)
        own = ["train", "val"] + ["val_frac", "seed"] * (common.val_folder(args.data, of["val"]) is None)
        groups.setdefault(json.dumps({k: of[k] for k in own}), []).append(name)
    columns, outcomes, notes, tables = {}, {}, [], []
    for key, names in groups.items():
        root = common.read_root(argparse.Namespace(**{**vars(args), **json.loads(key)}), need_train=False)
        group = score(names, args, root, device, outcomes, notes)
        columns.update(group)
        tables.append(common.table(group))

    variants = {}                                                    # of runs the mean: plain, by alpha, by temperature
    for c in columns.values():
        if "run" in c:
            variants.setdefault((c.pop("recipe"), c.get("alpha"), "temperature" in c), []).append(c)
    for (_, alpha, tempered), runs in variants.items():
        if len(runs) > 1:
            title = (f"mean of {len(runs)} runs" + (f" {alpha:g}" if alpha is not None else "")
                     + ", temperature fitted" * tempered)
            title += f": {runs[0]['run']}, ..." * (title in columns)
            columns[title] = mean_of_runs(runs)
            tables.append(mean_table(title, columns[title]))
    os.makedirs(args.out, exist_ok=True)
    common.write_json(os.path.join(args.out, "results.json"), columns)
    if common.rank_world()[0] == 0:
        print("\n\n".join(tables))
        print("\n".join(notes), end="\n" * bool(notes))
        if args.plot:
            plot(args.plot, {t: c for t, c in columns.items() if "runs" not in c}, outcomes)


if __name__ == "__main__":
    main()
