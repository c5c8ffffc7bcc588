# SPDX-License-Identifier: MIT
"""The tables of accuracy and calibration, and the README's pictures. One protocol: every method at
the learning rate 3e-4, over the seeds. Every run is a script's own, in a process of its own.

    python tests/evidence.py toy
    python tests/evidence.py root --root ROOT --model local-dir:CLIP --pool pool.tsv
    python tests/evidence.py corrupt --root ROOT --cifar SETS/cifar10 --unseen PACS/cartoon

WiSE-FT's curves come with the tables, and the pictures with --figures. `corrupt` writes a ROOT
whose shifts are corruptions of its val. Finished runs are kept in --out and not repeated; --jobs of
them go on at once, one thread each.
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
    """Run [script, flag, ...] in --out/<name>, unless that is finished; its results.json."""
    out = Path(args.out, name)
    if not out.is_dir():
        out.mkdir(parents=True)
        (out / "command.json").write_text(json.dumps(command))
    if json.loads((out / "command.json").read_text()) != command:
        sys.exit(f"error: {out} holds a run of another command; give another --out, or remove it")
    if set(common.read_json(out / "results.json")) <= {"zero_shot"}:        # not finished
        done = subprocess.run([sys.executable, f"{command[0]}.py", *command[1:], "--out", str(out)],
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=REPO,
                              capture_output=True)
        if done.returncode:
            sys.exit(f"error: {name} failed: {done.stderr.decode()[-2000:]}")
        (out / "last.pt").unlink(missing_ok=True)           # the largest file, of no more use
        print(f"  {name}", file=sys.stderr)
    return common.read_json(out / "results.json")

def run_all(args, commands):
    """{name: command} -> {name: results}, --jobs at a time."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(commands, pool.map(partial(run, args), commands, commands.values())))

def score(results, name, measure):
    return (results["shift_mean"] if name == "shift mean" else results["sets"][name])[measure]

# ---- tables --------------------------------------------------------------------------------------
def cell(values, form=".1f"):
    """Mean ± standard deviation of fractions, as text in percent."""
    error = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{form}}" + error

def markdown(head, rows):
    print("| | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")

def claims(rows, measures):
    """Print the papers' claims, differences by seed. rows: {method: {measure: values by seed}}."""
    print("\nDifferences by seed:\n")
    shown = {}
    for a, b in BASELINES.items():
        for measure in measures if a in rows else ():       # without a pool there is no ARF
            d = rows[a][measure] - rows[b][measure]
            better = (d < 0).sum() if measure.endswith("ece") else (d > 0).sum()
            shown.setdefault(f"{a} over {b}", []).append(
                f"{cell(d, '+.1f')}, better in {better} of {len(d)}")
    markdown(measures, shown)

def report(args, commands, data):
    """Run {method: [script, flag, ...]} with every seed; print the tables. data: --data ROOT."""
    seeds = range(args.seeds)
    results = run_all(args, {f"{m}-{s}": [c[0], "--seed", str(s), *c[1:]]
                             for s in seeds for m, c in commands.items()})
    zero_shot = next(iter(results.values()))["zero_shot"]
    sets = [*zero_shot["sets"], "shift mean"]
    rows = {m: {f"{k} {x}": np.array([score(results[f"{m}-{s}"], k, x) for s in seeds])
                for x in ("top1", "ece") for k in sets} for m in commands}
    for x in ("top1", "ece"):
        print(f"\n{x}, {args.seeds} seeds:\n")
        markdown(sets, {"zero-shot": [cell([score(zero_shot, k, x)]) for k in sets],
                        **{m: [cell(rows[m][f"{k} {x}"]) for k in sets] for m in commands}})
    new = [k for k, r in zero_shot["sets"].items() if r["head"] == "zero-shot"]
    claims(rows, [f"{k} {x}" for k in ("val", "shift mean", *new) for x in ("top1", "ece")])

    print("\nWiSE-FT by weight of the tuned: top-1 of val / shifts / their ECE / top-1 of others\n")
    curves = {}                                             # {method: [results by seed] by weight}
    for m in commands:
        runs = [f"{args.out}/{m}-{s}" for s in seeds]
        mixed = run(args, f"wise-{m}-{args.seeds}", [
            "evaluate", *data, "--workers", "0", "--wise", *WEIGHTS, "--model", *runs]).values()
        curves[m] = [[zero_shot], *([r for r in mixed if r["alpha"] == float(w)] for w in WEIGHTS),
                     [results[f"{m}-{s}"] for s in seeds]]
    shown = [("val", "top1"), ("shift mean", "top1"), ("shift mean", "ece"), *(
        (k, "top1") for k in new)]
    markdown(["0", *WEIGHTS, "1"], {m: [" / ".join(
        f"{100 * np.mean([score(r, *of) for r in point]):.1f}" for of in shown)
        for point in curves[m]] for m in curves})
    if args.figures:
        draw(args, curves, data)

def toy(args):
    the_toy.build()                                         # once, and not by every job
    report(args, METHODS, [])

def root(args):
    steps = args.epochs * sum(len(f) for *_, f in os.walk(f"{args.root}/train", followlinks=True))
    steps, data = steps // 64, ["--data", args.root]
    own = {"CaRot": ["--ema-every", str(steps // 50)], "ARF": ["--pool", args.pool]}
    recipe = ["--model", args.model, "--batch-size", "64", "--epochs", str(args.epochs), "--lr",
              args.lr, "--warmup", str(steps // 10), "--workers", "0", "--save-every", "100000"]
    report(args, {m: [*METHODS[m], *own.get(m, []), *recipe, *data]
                  for m in METHODS if m != "ARF" or args.pool}, data)

# ---- a world, and pictures -----------------------------------------------------------------------
def corrupt(args):
    """ROOT: train and val are links to a set's train and test, --unseen a link, each shift a copy
    of val with one of CORRUPTIONS."""
    targets = {"train": f"{args.cifar}/train", "val": f"{args.cifar}/test", "unseen": args.unseen}
    for name, target in targets.items():
        if target and not Path(args.root, name).exists():
            Path(args.root).mkdir(parents=True, exist_ok=True)
            Path(args.root, name).symlink_to(os.path.abspath(target))
    for i, file in enumerate(sorted(Path(args.cifar, "test").glob("*/*"))):
        for name, change in CORRUPTIONS.items():
            torch.manual_seed(i)
            Path(args.root, name, file.parent.name).mkdir(parents=True, exist_ok=True)
            x = change(decode_image(str(file)))
            write_png(x, f"{args.root}/{name}/{file.parent.name}/{file.stem}.png")

def draw(args, curves, data):
    """Write robustness.png, curves and ECE, and reliability.png, of seed 0 on the first shift."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    colours = dict(zip(METHODS, ("#666666", "#0072b2", "#e69f00", "#009e73", "#cc79a7")))

    def stat(point, name, measure):
        """Mean and standard error over seeds, in percent."""
        values = [100 * score(r, name, measure) for r in point]
        return np.mean(values), np.std(values) / max(1, len(values) - 1) ** 0.5
    Path(args.figures).mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), width_ratios=[3, 2],
                                         layout="constrained")
    zero_shot, height = next(iter(curves.values()))[0], 0   # of the label last written, upwards
    for m in sorted(curves, key=lambda m: stat(curves[m][-1], "shift mean", "top1")):
        points = curves[m]
        x, y = ([stat(point, name, "top1") for point in points] for name in ("val", "shift mean"))
        left.plot(*([mean for mean, _ in axis] for axis in (x, y)), "o-", markersize=4,
                  color=colours[m])
        left.errorbar(x[-1][0], y[-1][0], y[-1][1], x[-1][1], capsize=3, color=colours[m])
        height = max(height + 0.8, y[-1][0] - 0.2)
        left.text(x[-1][0] + 0.8, height, m, color=colours[m], weight="bold")
    for m in curves:
        mean, error = stat(curves[m][-1], "shift mean", "ece")
        right.barh(m, mean, xerr=error, color=colours[m], capsize=3)
    corner = stat(zero_shot, "val", "top1")[0], stat(zero_shot, "shift mean", "top1")[0]
    left.plot(*corner, "k*", markersize=14)
    left.text(corner[0] + 0.2, corner[1] - 1, "zero-shot", weight="bold")
    left.set(xlabel="top-1 on val (%)", ylabel="top-1, mean of the shifts (%)",
             title="mixing tuned and untuned weights (WiSE-FT)")
    left.margins(x=0.15)
    right.barh("zero-shot", stat(zero_shot, "shift mean", "ece")[0], color="black")
    right.invert_yaxis()
    right.set(xlabel="ECE, mean of the shifts (%)", title="calibration, lower is better")
    figure.savefig(f"{args.figures}/robustness.png", dpi=100)

    runs, predictions = [f"{args.out}/{m}-0" for m in ("FLYP", "CaRot")], f"{args.out}/predictions"
    run(args, "predict", ["evaluate", *data, "--workers", "0", "--predictions", predictions,
                          "--model", *runs])
    shift = next(k for k, r in zero_shot[0]["sets"].items() if k not in ("val", "test") and
                 r["head"] != "zero-shot")
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained")
    for axis, m, out in zip(axes, ("FLYP", "CaRot"), runs):
        found = np.load(f"{predictions}/{evaluate.filename(out)}/{shift}.npz")
        correct = found["prediction"] == found["label"]
        evaluate.reliability(axis, found["confidence"], correct, f"{m} on {shift}")
    figure.savefig(f"{args.figures}/reliability.png", dpi=100)

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
    if args.seeds < 2 or args.what in ("root", "corrupt") and not args.root:
        parser.error("--seeds is two at least; root and corrupt need --root")
    args.out = os.path.abspath(args.out or f"{REPO}/out/evidence/{args.what}")
    print(f"{args.what}; mean ± standard deviation in percent; {system()}\n")
    globals()[args.what](args)
