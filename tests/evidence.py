# SPDX-License-Identifier: MIT
"""The tables of accuracy and calibration. Every run is a script's own, in a process of its own.

    python tests/evidence.py toy        # all methods on the toy; the papers' claims as differences
    python tests/evidence.py ablations  # the toy: one choice of a method changed at a time
    python tests/evidence.py recipe     # the toy: its learning rate, on training images held out
    python tests/evidence.py pacs --root ROOT --model local-dir:CLIP --pool pool.tsv

`pacs` takes what tests/pretrain.py makes: each method's learning rate is chosen on training images
held out, then all methods run over the seeds, and evaluate.py gives WiSE-FT's curves. Finished runs
are kept in --out and not repeated; --jobs of them go on at once, one thread each.
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
import toy as the_toy
from bench import METHODS, REPO, system

BASELINES = {"CAR-FT": "FT", "CaRot": "FLYP", "ARF": "FLYP"}

# {method: {what changes: its flags, or where no flag changes it a statement to run before main()}}
ABLATIONS = {
    "CaRot": {
        "orthogonality alone": ("--sd", "0", "--cross-fnorm", "0"),
        "self-distillation alone": ("--oc", "0", "--cross-fnorm", "0"),
        "cross-Frobenius alone": ("--oc", "0", "--sd", "0"),
        "no cross-Frobenius term": ("--cross-fnorm", "0"),
        "L_oc squared": ("f = calft.orthogonality; calft.orthogonality = lambda W: f(W) ** 2",),
        "teacher moves every step": ("--ema-every", "1"),
        "teacher moves at step 0 only": ("--ema-every", "100000"),
        "m = 0.9 from the start": ("calft.ema_momentum = lambda step, total: 0.9",)},
    "CAR-FT": {"the reverse, KL(p ‖ p0)": ("--reverse-kl",), "lam 0.3": ("--lam", "0.3"),
               "lam 3": ("--lam", "3")},
    "ARF": {"captions alone": ("--ret", "0"), "retrieved pairs alone": ("--cap", "0"),
            "k = 8": ("--k", "8")}}

MEASURES = {"val top-1": ("val", "top1"), "shift top-1": ("shift mean", "top1"),
            "unseen top-1": ("unseen", "top1"), "val ECE": ("val", "ece"),
            "shift ECE": ("shift mean", "ece")}
SPLITS = 2                              # of the training images, for each trial of a learning rate

# ---- runs ----------------------------------------------------------------------------------------
def results_of(folder):
    file = Path(folder, "results.json")
    return json.loads(file.read_text()) if file.is_file() else {}

def folder_of(args, name, command):
    """--out/<name>, which must be new or of the same command, a list of strings."""
    out = Path(args.out, name.replace(" ", "_").replace("/", "_"))
    if not out.is_dir():
        out.mkdir(parents=True)
        (out / "command.json").write_text(json.dumps(command))
    if json.loads((out / "command.json").read_text()) != command:
        sys.exit(f"error: {out} holds a run of another command; give another --out, or remove it")
    return str(out)

def run(args, name, command):
    """Run [script, flag, ...] in --out/<name>, unless that is finished; its results.json."""
    out = folder_of(args, name, command)
    if "sets" not in results_of(out):
        script, changes = command[0], [c for c in command if " = " in c]
        code = "; ".join([f"import sys, {script}", *changes, f"{script}.main(sys.argv[1:])"])
        flags = [c for c in command[1:] if c not in changes]
        done = subprocess.run([sys.executable, "-c", code, *flags, "--out", out], cwd=REPO,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        if done.returncode:
            sys.exit(f"error: {name} failed: {done.stderr.decode()[-2000:]}")
        Path(out, "last.pt").unlink(missing_ok=True)        # the largest file, of no more use
        print(f"  {name}", file=sys.stderr)
    return results_of(out)

def run_all(args, commands):
    """{name: command} -> {name: results}, --jobs at a time."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(commands, pool.map(partial(run, args), commands, commands.values())))

def train_alone(args, root):
    """A ROOT with the training folder of `root` and no val, so that the scripts hold images out."""
    alone = Path(args.out, "train_alone")
    if not alone.is_dir():
        alone.mkdir(parents=True)
        (alone / "train").symlink_to(Path(root, "train").resolve())
    return str(alone)

# ---- tables --------------------------------------------------------------------------------------
def score(results, name, measure):
    return (results["shift_mean"] if name == "shift mean" else results["sets"][name])[measure]

def cell(values, form=".1f"):
    """Mean ± standard deviation of fractions, as text in percent."""
    error = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{form}}" + error

def markdown(head, rows):
    print("| | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")

def claims(rows, pairs):
    """Print differences by seed. rows: {method: {measure: array of values by seed}}."""
    print("\nDifferences by seed:")
    for a, b, measure in pairs:
        d = rows[a][measure] - rows[b][measure]
        better = (d < 0).sum() if measure.lower().endswith("ece") else (d > 0).sum()
        print(f"{a + ' over ' + b:<36}{measure:<16}{cell(d, '+6.1f')}   "
              f"better in {better} of {len(d)} seeds")

def toy_runs(args, commands):
    """{method: {measure: array of values by seed}} of {method: (script, flag, ...)} on the toy."""
    the_toy.build()                                         # once, and not by every job
    results = run_all(args, {f"{m}-{s}": [c[0], "--seed", str(s), *c[1:]]
                             for s in range(args.seeds) for m, c in commands.items()})
    found = {m: [results[f"{m}-{s}"] for s in range(args.seeds)] for m in commands}
    found["zero-shot"] = [next(iter(results.values()))["zero_shot"]]
    return {m: {k: np.array([score(r, *of) for r in found[m]]) for k, of in MEASURES.items()}
            for m in found}

def toy(args):
    rows = toy_runs(args, METHODS)
    markdown(MEASURES, {m: map(cell, row.values()) for m, row in rows.items()})
    claims(rows, [("CAR-FT", "FT", "shift top-1"), ("CaRot", "FLYP", "shift top-1"),
                  ("CaRot", "FLYP", "shift ECE"), ("ARF", "FLYP", "shift top-1"),
                  ("ARF", "FLYP", "unseen top-1")])

def ablations(args):
    """Below each method what one change adds to it, by seed."""
    commands = {f"{m}, {what}" if what else m: (*METHODS[m], *change)
                for m in ABLATIONS for what, change in {"": (), **ABLATIONS[m]}.items()}
    rows, shown = toy_runs(args, commands), {}
    for name in commands:
        method, _, what = name.partition(", ")
        shown[what or f"**{method}**"] = [
            cell(rows[name][k] - rows[method][k], "+.1f") if what else cell(rows[name][k])
            for k in MEASURES]
    markdown(MEASURES, shown)

def recipe(args):
    """Top-1 of FT and FLYP by learning rate on a fifth of the training images, held out. No val, no
    shift and no robust method takes part."""
    the_toy.build()
    shared, rates = the_toy.defaults(), ("3e-5", "1e-4", "3e-4", "1e-3")
    flags = ["--data", train_alone(args, shared["data"]), "--workers", "0"]
    for flag in ("model", "epochs", "batch-size", "warmup"):
        flags += [f"--{flag}", str(shared[flag.replace("-", "_")])]
    found = run_all(args, {f"recipe-{m}-{lr}": [*METHODS[m], *flags, "--lr", lr]
                           for m in ("FT", "FLYP") for lr in rates})
    for row in (["FT"], ["FLYP"], ["FT", "FLYP"]):
        top1 = {lr: np.mean([score(found[f"recipe-{m}-{lr}"], "val", "top1") for m in row])
                for lr in rates}
        best, n = max(top1.values()), score(found[f"recipe-FT-{rates[0]}"], "val", "n")
        error = (best * (1 - best) / n) ** 0.5              # both models see the same n images
        print(f"{' and '.join(row):<12}", *(f"{lr}: {100 * t:.2f}  " for lr, t in top1.items()),
              f"standard error {100 * error:.2f}; the smallest rate within it of the best:",
              next(lr for lr, t in top1.items() if t >= best - error))

def pacs(args):
    steps = args.epochs * sum(len(f) for *_, f in os.walk(Path(args.root, "train"))) // 64
    own = {"CaRot": ["--ema-every", str(steps // 50)], "ARF": ["--pool", args.pool]}

    def command(m, lr, seed, data):
        return [*METHODS[m], *own.get(m, []), "--model", args.model, "--batch-size", "64",
                "--epochs", str(args.epochs), "--workers", "0", "--warmup", str(steps // 10),
                "--save-every", "100000", "--data", data, "--lr", lr, "--seed", str(seed)]
    chosen = dict.fromkeys(METHODS, args.rates[0])
    if len(args.rates) > 1:
        trials = run_all(args, {
            f"trial-{m}-{lr}-{s}": command(m, lr, s, train_alone(args, args.root))
            for s in range(SPLITS) for lr in args.rates for m in METHODS})
        print(f"Top-1 on training images held out, mean of {SPLITS} splits; of equals the first:\n")
        shown = {}
        for m in METHODS:
            held = {lr: np.mean([score(trials[f"trial-{m}-{lr}-{s}"], "val", "top1")
                                        for s in range(SPLITS)]) for lr in args.rates}
            chosen[m] = max(held, key=lambda lr: round(held[lr], 9))
            shown[m] = [f"{100 * t:.1f}" if lr != chosen[m] else f"**{100 * t:.1f}**"
                        for lr, t in held.items()]
        markdown(args.rates, shown)

    # every method at every rate that one chose; compared at each of these, and each at its own
    rates, seeds = [lr for lr in args.rates if lr in chosen.values()], range(args.seeds)
    final = {f"{m} at {lr}": (m, lr) for lr in rates for m in METHODS}
    commands = {f"{name}-{s}": command(*final[name], s, args.root) for s in seeds for name in final}
    results = run_all(args, commands)
    zero_shot = results[f"FT at {rates[0]}-0"]["zero_shot"]
    sets = [*zero_shot["sets"], "shift mean"]
    new = [n for n, r in zero_shot["sets"].items() if r["head"] == "zero-shot"]
    print(f"\n{args.seeds} seeds; classes of {', '.join(new)} not trained on")
    rows = {name: {f"{k} {m}": np.array([score(results[f"{name}-{s}"], k, m) for s in seeds])
                   for m in ("top1", "ece") for k in sets} for name in final}
    for measure in ("top1", "ece"):
        print(f"\n{measure}:\n")
        markdown(sets, {"zero-shot": [cell([score(zero_shot, k, measure)]) for k in sets], **{
            name: [cell(rows[name][f"{k} {measure}"]) for k in sets] for name in final}})
    claims(rows, [(f"{a} at {x}", f"{b} at {y}", f"{k} {measure}") for a, b in BASELINES.items()
                  for x, y in dict.fromkeys([*zip(rates, rates), (chosen[a], chosen[b])])
                  for measure in ("top1", "ece") for k in ("val", "shift mean", *new)])

    print("\nWiSE-FT, top-1 on val / shift mean / the others, by weight of the tuned model\n")
    weights, curves = ("0.25", "0.5", "0.75"), {}
    for m in METHODS:
        names = [f"{m} at {chosen[m]}-{s}" for s in seeds]
        wise = ["evaluate.py", "--data", args.root, "--workers", "0", "--wise", *weights, "--model",
                *(folder_of(args, name, commands[name]) for name in names)]
        out = folder_of(args, f"wise-{m}", [*wise, *(c for n in names for c in commands[n])])
        if not results_of(out):
            subprocess.run([sys.executable, *wise, "--out", out], cwd=REPO, check=True,
                           capture_output=True)
        mixed = results_of(out).values()
        points = [[zero_shot], *([c for c in mixed if c["alpha"] == float(w)] for w in weights),
                  [results[name] for name in names]]
        curves[f"{m} at {chosen[m]}"] = [
            " / ".join(f"{100 * np.mean([score(r, k, 'top1') for r in point]):.1f}"
                       for k in ("val", "shift mean", *new)) for point in points]
    markdown(["0", *weights, "1"], curves)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("what", choices=["toy", "ablations", "recipe", "pacs"])
    add("--seeds", type=int, default=5, help="two at least, for a standard deviation")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    add("--out", help="where runs are kept (out/evidence/WHAT; toy and ablations share theirs)")
    add("--root", type=os.path.abspath, help="pacs: the ROOT")
    add("--model", help="pacs: the CLIP, local-dir:PATH")
    add("--pool", type=os.path.abspath, help="pacs: image-text pairs for ARF")
    add("--rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"], help="pacs: "
        "learning rates to choose from, upwards; with a single one there are no trials")
    add("--epochs", type=int, default=10, help="pacs: passes over the training images")
    args = parser.parse_args()
    if args.seeds < 2 or args.what == "pacs" and not (args.root and args.model and args.pool):
        parser.error("--seeds is two at least; pacs needs --root, --model and --pool")
    shared = args.what.replace("ablations", "toy")
    args.out = os.path.abspath(args.out or f"{REPO}/out/evidence/{shared}")
    print(f"{args.what}; mean ± standard deviation in percent; {system()}\n")
    globals()[args.what](args)
