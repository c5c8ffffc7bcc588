# SPDX-License-Identifier: MIT
"""The tables of accuracy and calibration, and the README's pictures. One protocol: every method at
the learning rate 3e-4, over the seeds. Every run is a script's own, in a process of its own.

    python tests/evidence.py toy
    python tests/evidence.py root --root ROOT --model local-dir:CLIP --pool pool.tsv
    python tests/evidence.py corrupt --root ROOT --cifar SETS/cifar10 --unseen PACS/cartoon

WiSE-FT's curves come with the tables, and the pictures with --figures. `corrupt` writes a ROOT
whose shifts are corruptions of its val. Finished runs are kept in --out and are not repeated.
--jobs of them run at once, on one thread each.
"""
import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.io import decode_image, write_png
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

import toy as the_toy
from bench import METHODS, REPO, system

sys.path.insert(0, REPO)
import common  # noqa: E402
import evaluate  # noqa: E402

BASELINES = {"CAR-FT": "FT", "CaRot": "FLYP", "ARF": "FLYP"}
WEIGHTS = ["0.25", "0.5", "0.75"]       # of the tuned model in WiSE-FT's mixtures

# Fixed before any model was tuned on them. Images are uint8 (3, 32, 32).
CORRUPTIONS = {
    "noise": lambda x: (x + 25 * torch.randn(x.shape)).clamp(0, 255).byte(),
    "blur": partial(F.gaussian_blur, kernel_size=[5, 5], sigma=[1.0, 1.0]),
    "contrast": partial(F.adjust_contrast, contrast_factor=0.3),
    "brightness": partial(F.adjust_brightness, brightness_factor=0.4),
    "jpeg": partial(F.jpeg, quality=15),
    "pixelate": lambda x: F.resize(F.resize(x, [14, 14]), [32, 32], InterpolationMode.NEAREST),
    "grey": partial(F.rgb_to_grayscale, num_output_channels=3)}

# ---- runs ----------------------------------------------------------------------------------------
def run(args, name, command):
    """Run [script, flag, ...] in --out/<name>, unless it has finished, and return its
    results.json."""
    out = Path(args.out, name)
    if not out.is_dir():
        out.mkdir(parents=True)
        (out / "command.json").write_text(json.dumps(command))
    if json.loads((out / "command.json").read_text()) != command:
        common.fail(f"{out} holds a run of another command; give another --out, or remove it")
    results = common.read_json(out / "results.json")
    if set(results) <= {"zero_shot"}:                       # it has not finished
        script, *flags = command
        done = subprocess.run(
            [sys.executable, f"{script}.py", *flags, "--out", str(out)], cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        if done.returncode:
            sys.exit(f"error: {name} failed: {done.stderr.decode()[-2000:]}")
        (out / "last.pt").unlink(missing_ok=True)           # the largest file, of no more use
        print(f"  {name}", file=sys.stderr)
        results = common.read_json(out / "results.json")
    return results

def run_all(args, commands):
    """Run {name: command}, --jobs at a time, and return {name: results}."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(partial(run, args), commands, commands.values())
        return dict(zip(commands, results))

def score(results, name, measure):
    """Return one number of a summary: that of a set, or of the mean over the shifts."""
    if name == "shift mean":
        return results["shift_mean"][measure]
    return results["sets"][name][measure]

# ---- tables --------------------------------------------------------------------------------------
def cell(values, form=".1f"):
    """Return the mean ± standard deviation of fractions, as text in percent."""
    text = f"{100 * np.mean(values):{form}}"
    if len(values) > 1:
        text += f" ± {100 * np.std(values, ddof=1):.1f}"
    return text

def markdown(head, rows):
    """Print a table, {name: cells}."""
    print("| | " + " | ".join(head) + " |")
    print("|" + "---|" * (len(head) + 1))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")

def claims(rows, measures):
    """Print the papers' claims as differences by seed. rows is {method: {measure: values by
    seed}}."""
    print("\nDifferences by seed:\n")
    shown = {}
    for method, baseline in BASELINES.items():
        if method not in rows:                              # without a pool there is no ARF
            continue
        cells = []
        for measure in measures:
            d = rows[method][measure] - rows[baseline][measure]
            better = (d > 0).sum()
            if measure.endswith("ece"):                     # lower is better
                better = (d < 0).sum()
            cells.append(f"{cell(d, '+.1f')}, better in {better} of {len(d)}")
        shown[f"{method} over {baseline}"] = cells
    markdown(measures, shown)

def wise_curves(args, methods, zero_shot, results, data):
    """Return WiSE-FT's curve of each method, {method: [results by seed] by weight of the tuned
    model}, from 0, the untuned model, to 1, the tuned ones."""
    curves = {}
    for method in methods:
        names = [f"{method}-{seed}" for seed in range(args.seeds)]
        folders = [f"{args.out}/{name}" for name in names]
        mixed = run(args, f"wise-{method}-{args.seeds}", [
            "evaluate", *data, "--workers", "0", "--wise", *WEIGHTS, "--model", *folders])
        points = [[zero_shot]]
        for weight in WEIGHTS:
            points.append([r for r in mixed.values() if r["alpha"] == float(weight)])
        points.append([results[name] for name in names])
        curves[method] = points
    return curves

def report(args, commands, data):
    """Run {method: [script, flag, ...]} with every seed, and print the tables. data is the --data
    of evaluate.py: ["--data", ROOT], or nothing for the toy, as the runs name it."""
    seeds = range(args.seeds)
    seeded = {}
    for seed in seeds:
        for method, (script, *flags) in commands.items():
            seeded[f"{method}-{seed}"] = [script, "--seed", str(seed), *flags]
    results = run_all(args, seeded)
    zero_shot = next(iter(results.values()))["zero_shot"]
    names = [*zero_shot["sets"], "shift mean"]
    rows = {}                                               # {method: {measure: values by seed}}
    for method in commands:
        rows[method] = {}
        for measure in ("top1", "ece"):
            for name in names:
                values = [score(results[f"{method}-{seed}"], name, measure) for seed in seeds]
                rows[method][f"{name} {measure}"] = np.array(values)
    for measure in ("top1", "ece"):
        print(f"\n{measure}, {args.seeds} seeds:\n")
        shown = {"zero-shot": [cell([score(zero_shot, name, measure)]) for name in names]}
        for method in commands:
            shown[method] = [cell(rows[method][f"{name} {measure}"]) for name in names]
        markdown(names, shown)
    others = [name for name, r in zero_shot["sets"].items() if r["head"] == "zero-shot"]
    claims(rows, [f"{name} {measure}" for name in ("val", "shift mean", *others)
                  for measure in ("top1", "ece")])

    print("\nWiSE-FT by weight of the tuned: top-1 of val / shifts / their ECE / top-1 of others\n")
    curves = wise_curves(args, commands, zero_shot, results, data)
    measures = [("val", "top1"), ("shift mean", "top1"), ("shift mean", "ece")]
    measures += [(name, "top1") for name in others]
    shown = {}
    for method, points in curves.items():
        shown[method] = []
        for point in points:
            means = [100 * np.mean([score(r, *measure) for r in point]) for measure in measures]
            shown[method].append(" / ".join(f"{mean:.1f}" for mean in means))
    markdown(["0", *WEIGHTS, "1"], shown)
    if args.figures:
        draw(args, curves, data)

def toy(args):
    """Run the methods on the toy."""
    the_toy.build()                                         # once, and not by every job
    report(args, METHODS, [])

def root(args):
    """Run the methods on --root, with a recipe for its number of images."""
    n = sum(len(files) for *_, files in os.walk(f"{args.root}/train", followlinks=True))
    steps = args.epochs * n // 64
    data = ["--data", args.root]
    recipe = ["--model", args.model, "--batch-size", "64", "--epochs", str(args.epochs), "--lr",
              args.lr, "--warmup", str(steps // 10), "--workers", "0", "--save-every", "100000"]
    of_method = {"CaRot": ["--ema-every", str(steps // 50)], "ARF": ["--pool", args.pool]}
    commands = {}
    for method, command in METHODS.items():
        if method == "ARF" and not args.pool:
            continue
        commands[method] = [*command, *of_method.get(method, []), *recipe, *data]
    report(args, commands, data)

# ---- a world, and pictures -----------------------------------------------------------------------
def corrupt(args):
    """Write ROOT: train and val are links to a set's train and test, unseen is a link to --unseen,
    and each shift is a copy of val with one of CORRUPTIONS."""
    targets = {"train": f"{args.cifar}/train", "val": f"{args.cifar}/test", "unseen": args.unseen}
    for name, target in targets.items():
        if target and not Path(args.root, name).exists():
            Path(args.root).mkdir(parents=True, exist_ok=True)
            Path(args.root, name).symlink_to(os.path.abspath(target))
    for i, file in enumerate(sorted(Path(args.cifar, "test").glob("*/*"))):
        for name, change in CORRUPTIONS.items():
            folder = Path(args.root, name, file.parent.name)
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(i)
            x = change(decode_image(str(file)))
            write_png(x, f"{folder}/{file.stem}.png")

def stat(point, name, measure):
    """Return mean and standard deviation over the seeds' results, in percent."""
    values = [100 * score(r, name, measure) for r in point]
    deviation = 0
    if len(values) > 1:
        deviation = np.std(values, ddof=1)
    return np.mean(values), deviation

def draw(args, curves, data):
    """Write robustness.png, curves and ECE, and reliability.png, of seed 0 on the first shift."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    Path(args.figures).mkdir(parents=True, exist_ok=True)
    zero_shot = next(iter(curves.values()))[0]
    draw_robustness(plt, args, curves, zero_shot)

    folders = {method: f"{args.out}/{method}-0" for method in ("FLYP", "CaRot")}
    predictions = f"{args.out}/predictions"
    run(args, "predict", ["evaluate", *data, "--workers", "0", "--predictions", predictions,
                          "--model", *folders.values()])
    of_train = {name: r for name, r in zero_shot[0]["sets"].items() if r["head"] != "zero-shot"}
    shift = next(name for name in of_train if name not in ("val", "test"))
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    for axis, (method, folder) in zip(axes, folders.items()):
        file = f"{evaluate.filename(folder)}/{evaluate.filename(shift)}.npz"
        found = np.load(f"{predictions}/{file}")
        correct = found["prediction"] == found["label"]
        evaluate.reliability(axis, found["confidence"], correct, f"{method} on {shift}")
    figure.savefig(f"{args.figures}/reliability.png", dpi=100)

def draw_robustness(plt, args, curves, zero_shot):
    """Write robustness.png. zero_shot is the point at which every curve starts."""
    colours = dict(zip(METHODS, ("#666666", "#0072b2", "#e69f00", "#009e73", "#cc79a7")))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.4), width_ratios=[3, 2], layout="constrained")
    height = 0                                              # of the label last written, upwards
    for method in sorted(curves, key=lambda m: stat(curves[m][-1], "shift mean", "top1")):
        points = curves[method]
        colour = colours[method]
        x = [stat(point, "val", "top1") for point in points]
        y = [stat(point, "shift mean", "top1") for point in points]
        left.plot([mean for mean, _ in x], [mean for mean, _ in y], "o-", markersize=4,
                  color=colour)
        left.errorbar(x[-1][0], y[-1][0], y[-1][1], x[-1][1], capsize=3, color=colour)
        height = max(height + 0.8, y[-1][0] - 0.2)
        left.text(x[-1][0] + 0.8, height, method, color=colour, weight="bold")
    for method, points in curves.items():
        mean, error = stat(points[-1], "shift mean", "ece")
        right.barh(method, mean, xerr=error, color=colours[method], capsize=3)
    x, _ = stat(zero_shot, "val", "top1")
    y, _ = stat(zero_shot, "shift mean", "top1")
    left.plot(x, y, "k*", markersize=14)
    left.text(x + 0.2, y - 1, "zero-shot", weight="bold")
    left.set(xlabel="top-1 on val (%)", ylabel="top-1, mean of the shifts (%)",
             title="mixing tuned and untuned weights (WiSE-FT)")
    left.margins(x=0.15)
    right.barh("zero-shot", stat(zero_shot, "shift mean", "ece")[0], color="black")
    right.invert_yaxis()
    right.set(xlabel="ECE, mean of the shifts (%)", title="calibration, lower is better")
    figure.savefig(f"{args.figures}/robustness.png", dpi=100)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("what", choices=["toy", "root", "corrupt"])
    add("--seeds", type=int, default=5, help="two at least, for a standard deviation")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    add("--out", help="where runs are kept (out/evidence/WHAT)")
    add("--root", type=os.path.abspath, help="the ROOT")
    add("--model", help="root: the CLIP, local-dir:PATH")
    add("--pool", type=os.path.abspath, help="root: image-text pairs for ARF (no ARF)")
    add("--lr", default="3e-4", help="root: of every method (%(default)s)")
    add("--epochs", type=int, default=10, help="root: passes over the training images")
    add("--figures", help="folder for two pictures")
    add("--cifar", help="corrupt: what tests/folders.py makes of cifar10")
    add("--unseen", help="corrupt: an image folder of other classes")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds is two at least")
    if args.what != "toy" and not args.root:
        parser.error("root and corrupt need --root")
    if not args.out:
        args.out = f"{REPO}/out/evidence/{args.what}"
    args.out = os.path.abspath(args.out)
    print(f"{args.what}; mean ± standard deviation in percent; {system()}\n")
    globals()[args.what](args)
