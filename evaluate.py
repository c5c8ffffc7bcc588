# SPDX-License-Identifier: MIT
"""Evaluation: accuracy and calibration of any CLIP on val and every shift of a ROOT.

    python evaluate.py --data ROOT --model ViT-B-16-quickgelu out/calft out/carft local-dir:PATH
    python evaluate.py --data ROOT --model out/calft --wise 0 0.25 0.5 0.75 1      # WiSE-FT's curve
    python evaluate.py --data ROOT --model out/calft --temperature fit --sigma-min --plot DIR
    python evaluate.py --mean out/seed0 out/seed1 out/seed2    # mean and deviation of runs' results

A model is the folder of a run, local-dir:PATH, or an open_clip name with --pretrained. It is scored
as the training scripts score it: by the zero-shot head of its text tower, or by carft.py's trained
head, if that has the classes of this ROOT. Each image is decoded once for all models.
"""
import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import safetensors
import torch

import common

def fit_temperature(logits, labels):
    """The T > 0 that minimises the NLL of logits (n, K) / T, labels (n,) (Guo et al., 2017):
    Newton's steps in b = 1/T, in which the NLL is convex, kept in [0.01, 100]."""
    z, y, b = logits.double(), labels[:, None], 1.0
    for _ in range(100):
        p = (b * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        slope = (mean - z.gather(1, y)).mean()                                      # d NLL / d b
        curvature = (p * (z - mean) ** 2).sum(1).mean()                             # d2 NLL / d b2
        step = float(slope / curvature.clamp(min=1e-12))
        b = min(max(b - step, b / 4, 0.01), 4 * b, 100.0)
        if abs(step) < 1e-9 * b:
            break
    return 1 / b

def sigma_min(features):
    """Smallest singular value of the covariance (d, d) of features (n, d), each dimension
    standardised. CaRot's theory bounds errors under shift by its inverse (section 3)."""
    x = features.double()
    if not x.std(0).all():                                  # a dimension that stands still
        return 0.0
    x = (x - x.mean(0)) / x.std(0)
    return float(torch.linalg.svdvals(x.T @ x / (len(x) - 1))[-1])

def load(name, args, val):
    """[(title, model, preprocess, tokenizer, head or None, alpha)] of one --model: itself, or a
    mixture for each alpha of --wise."""
    path = Path(name.removeprefix("local-dir:"))
    if (path / "model").is_dir():                           # the folder of a run
        path, name = path / "model", f"local-dir:{path / 'model'}"
    run, head = common.read_json(path.parent / "args.json"), None
    title = str(path.parent if path.name == "model" else path)
    scored = set(run.get("train", [])) - ({*args.train, "train"} - {args.val or "val"})
    given = {k: run.get(k) for k in ("train", "val", "seed", "val_frac")}
    held_out = not args.val and not Path(args.data, "val").is_dir()     # by the run's own flags
    if run.get("data") == args.data and (
            scored or held_out and given != {k: getattr(args, k) for k in given}):
        sys.exit(f"error: {title} was tuned on images to be scored; give its own flags: {given}")
    model, _, preprocess, tokenizer = common.load_model(name, args.pretrained)
    if path.name == "model" and (path.parent / "head.safetensors").is_file():
        with safetensors.safe_open(path.parent / "head.safetensors", "pt") as f:
            if json.loads(f.metadata()["classes"]) == val.classes:
                head = f.get_tensor("W_cls")                                        # (K, d)
            else:
                common.say(f"{title}: its head has other classes; its zero-shot head is used")
    if not args.wise:
        return [(title, model, preprocess, tokenizer, head, None)]

    # WiSE-FT (Wortsman et al., 2022): theta = (1 - alpha) theta_zero_shot + alpha theta_fine_tuned
    if not run:
        sys.exit(f"error: --wise: {title} is no run's folder, so what it was tuned from is unknown")
    base, *_ = common.load_model(run["model"], run["pretrained"])
    tuned, models = model.state_dict(), []
    if head is not None:
        E = common.text_embeddings(base, tokenizer, val.classnames, val.templates)  # (K, M, d)
        base_head = common.class_head(E).cpu()
    for alpha in args.wise:
        mixed = copy.deepcopy(base)
        mixed.load_state_dict({k: v.lerp(tuned[k], alpha) if v.is_floating_point() else v
                               for k, v in base.state_dict().items()})
        W = None if head is None else base_head.lerp(head, alpha)
        models.append((f"{title} {alpha:g}", mixed, preprocess, tokenizer, W, alpha))
    return models

def filename(title):
    return re.sub("[/ ]", "_", title.strip("/"))

def reliability(axis, confidence, correct, title):
    """Draw a reliability diagram of confidence (n,), correct (n,): accuracy in 15 equal bins."""
    edges = np.linspace(0, 1, 16)
    count = np.histogram(confidence, edges)[0]
    right = np.histogram(confidence, edges, weights=1.0 * correct)[0]
    colours = np.where(count < 10, "#bcd3ea", "#2b6cb0")    # few images say little: pale
    axis.bar(edges[:-1], right / np.maximum(count, 1), 1 / 15, align="edge", color=colours, ec="w")
    axis.plot([0, 1], [0, 1], "k--", linewidth=1)
    axis.set(title=f"{title}: ECE {100 * common.ece(confidence, correct):.1f}", xlim=(0, 1),
             ylim=(0, 1), xlabel="confidence", ylabel="accuracy")

def plot(folder, columns, outcomes):
    """Draw PNGs: a reliability diagram of each model (of --wise the two ends), and val against
    shifts. outcomes: {title: {set: (confidence (n,), correct (n,))}}."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    curves = {}
    for title, sets in outcomes.items():
        alpha = columns[title].get("alpha")
        name = title if alpha is None else title.rsplit(" ", 1)[0]          # of the run
        if columns[title]["shift_mean"]:
            point = columns[title]["sets"]["val"]["top1"], columns[title]["shift_mean"]["top1"]
            curves.setdefault(name, []).append((alpha, *point))
        if alpha in (None, 0, 1):
            wide, tall = min(4, len(sets)), -(-len(sets) // 4)
            figure, axes = plt.subplots(tall, wide, figsize=(2.6 * wide, 2.8 * tall), squeeze=False,
                                        layout="constrained")
            for axis in axes.flat[len(sets):]:
                axis.set_visible(False)
            for axis, (name, outcome) in zip(axes.flat, sets.items()):
                reliability(axis, *outcome, name)
            with common.replacing(f"{folder}/reliability_{filename(title)}.png") as f:
                figure.savefig(f, dpi=120)
    figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    for name, points in curves.items():
        alphas, x, y = zip(*sorted(points, key=lambda point: point[0] or 0))
        axis.plot(100 * np.array(x), 100 * np.array(y), marker="o", label=Path(name).name)
        for i, alpha in enumerate(alphas):                  # of one curve, else they collide
            if alpha is not None and name == next(iter(curves)):
                axis.annotate(f"{alpha:g}", (100 * x[i], 100 * y[i]), fontsize=8, xytext=(
                    4, 4 if i % 2 else -10), textcoords="offset points")
    axis.set(xlabel="val top-1 (%)", ylabel="mean top-1 over shifts (%)")
    axis.legend(fontsize=8)
    with common.replacing(f"{folder}/val_against_shifts.png") as f:
        figure.savefig(f, dpi=120)

def print_mean(folders):
    """Print mean and deviation over runs: on sets that all of them have, and of shift means."""
    runs = [common.read_json(Path(d, "results.json")) for d in folders]
    if len(runs) < 2 or not all("sets" in r for r in runs):
        sys.exit("error: --mean takes the folders of two or more finished runs")
    rows = {name: [r["sets"][name] for r in runs] for name in runs[0]["sets"]
            if all(name in r["sets"] for r in runs)}
    if all(r["shift_mean"] for r in runs):
        rows["shift mean"] = [r["shift_mean"] for r in runs]
    print(f"{len(runs)} runs: mean and standard deviation\n{'set':<24}{'top-1':>8}{'± sd':>6}"
          f"{'ECE':>8}{'± sd':>6}")
    for name, entries in rows.items():
        line = f"{name:<24}"
        for key in ("top1", "ece"):
            values = [100 * e[key] for e in entries]
            line += f"{np.mean(values):>8.2f}{f'±{np.std(values, ddof=1):.1f}':>6}"
        print(line)

def main(argv=None):
    parser = common.flags(__doc__, "out/evaluate")
    parser.set_defaults(batch_size=256, precision="fp32")   # bf16 may flip near ties
    add = parser.add_argument_group("evaluation").add_argument
    add("--model", nargs="+", default=["ViT-B-16-quickgelu"], help="runs, names, local-dir:PATH")
    add("--wise", nargs="+", type=common.number_type(float, -9, 9), metavar="ALPHA",
        help="mix weights with the model a run was tuned from: 0 is that model, 1 the tuned one")
    add("--temperature", choices=["fit"], help="also show each model at a T fitted on val")
    add("--sigma-min", action="store_true", help="of val's standardised feature covariance")
    add("--predictions", metavar="DIR", help="path, label, prediction and confidence of all images")
    add("--plot", metavar="DIR", help="reliability diagrams, and val against shifts")
    add("--skip-corrupt", action="store_true", help="count unreadable images instead of stopping")
    add("--mean", nargs="+", metavar="OUT", help="only print the mean over the results of runs")
    args = parser.parse_args(argv)
    if args.mean:
        return print_mean(args.mean)
    args = common.start(parser, argv)                       # without --data: draws the toy
    if Path(args.out, "args.json").is_file():
        sys.exit(f"error: --out {args.out} holds a run and its results.json; give another --out")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: --plot needs matplotlib: pip install matplotlib")
    val = args.val or "val"
    if Path(args.data, val).is_dir() and not all(Path(args.data, d).is_dir() for d in args.train):
        args.train = [val]                                  # its classes stand in for training's

    _, sets = common.read_data(args)
    loaded = [entry for name in np.ravel(args.model) for entry in load(str(name), args, sets[0])]
    everything = common.image_features(
        [m for _, m, *_ in loaded], [p for _, _, p, *_ in loaded], sets, args, "scoring",
        skip=args.skip_corrupt, precision=args.precision)
    columns, outcomes, notes = {}, {}, []
    for (title, model, _, tokenizer, head, alpha), features in zip(loaded, everything):
        plain, scaled, T, outcomes[title] = {}, {}, None, {}
        logits_of = common.set_logits(model, tokenizer, sets, features, head)
        for s, (rows, logits, labels, about) in zip(sets, logits_of):
            plain[s.name] = {**about, **common.scores(logits, labels)}
            if args.temperature:
                T = T or fit_temperature(logits, labels)    # val comes first
                scaled[s.name] = {**about, **common.scores(logits / T, labels)}
            confidence, prediction = (x.numpy() for x in logits.softmax(1).max(1))
            outcomes[title][s.name] = confidence, prediction == labels.numpy()
            if args.predictions and common.RANK == 0:
                file = f"{args.predictions}/{filename(title)}/{filename(s.name)}.npz"
                with common.replacing(file) as f:
                    paths = np.char.decode(s.paths[rows], "utf-8", "replace")
                    np.savez(f, path=paths, label=labels, prediction=prediction,
                             confidence=confidence, classes=s.classes)
        columns[title] = {**common.summary(sets, plain), "alpha": alpha}
        if args.temperature:
            columns[f"{title} T={T:.3f}"] = {**common.summary(sets, scaled), "temperature": T}
        if args.sigma_min:
            columns[title]["sigma_min"] = sigma_min(features[0][~features[0][:, 0].isnan()])
            notes.append(f"sigma_min {columns[title]['sigma_min']:.3g}   {title}")
    bad = [s.paths[u[:, 0].isnan().numpy()] for s, u in zip(sets, everything[0])]
    notes += [f"skipped, not readable: {p.decode(errors='replace')}" for p in np.concatenate(bad)]
    common.write(f"{args.out}/results.json", columns)
    for i in range(0, len(columns), 3):                     # three models are 100 columns wide
        common.say("\n" + common.table(dict(list(columns.items())[i:i + 3])))
    common.say("\n".join(notes))
    if args.plot and common.RANK == 0:
        plot(args.plot, columns, outcomes)

if __name__ == "__main__":
    main()
