# SPDX-License-Identifier: MIT
"""The README's tables of accuracy and calibration. Every run is the script's own, in a process of its own.

    python tests/evidence.py toy        # all methods on the toy, and the papers' claims as differences by seed
    python tests/evidence.py ablations  # the toy: one choice of a method changed at a time, against the method as it is
    python tests/evidence.py recipe     # the toy: its learning rate, chosen on training images held out
    python tests/evidence.py pacs --root ROOT --model local-dir:CLIP --pool pool.tsv

`pacs` is for a small CLIP and a ROOT of real images, as tests/pretrain.py makes them of PACS and CIFAR-10: each
method's learning rate is chosen on training images held out, then all methods run over the seeds, and evaluate.py gives
WiSE-FT's curves. Finished runs are kept in --out and not repeated; --jobs of them go on at once, one thread each.
"""
import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys

from bench import REPO, system                                  # which lets the scripts and toy.py be imported too
import common

METHODS = {"FT": ("carft.py", "--lam", "0"), "CAR-FT": ("carft.py",),
           "FLYP": ("calft.py", "--oc", "0", "--sd", "0", "--cross-fnorm", "0"), "CaRot": ("calft.py",),
           "ARF": ("anchor.py",)}
BASELINES = {"CAR-FT": "FT", "CaRot": "FLYP", "ARF": "FLYP"}

# {method: {what changes: its flags, or for what no flag changes a statement that runs before main()}}
ABLATIONS = {
    "CaRot": {
        "orthogonality alone": ("--sd", "0", "--cross-fnorm", "0"),
        "self-distillation alone": ("--oc", "0", "--cross-fnorm", "0"),
        "cross-Frobenius alone": ("--oc", "0", "--sd", "0"),
        "no cross-Frobenius term": ("--cross-fnorm", "0"),
        "L_oc squared, as in the paper": "f = calft.orthogonality; calft.orthogonality = lambda W: f(W) ** 2",
        "teacher moves every step": ("--ema-every", "1"),
        "teacher moves at step 0 only": ("--ema-every", "100000"),
        "m = 0.9 from the start": "calft.ema_momentum = lambda step, total: 0.9",
    },
    "CAR-FT": {
        "the reverse, KL(p ‖ p0)": ("--reverse-kl",),
        "lam 0.3": ("--lam", "0.3"),
        "lam 3": ("--lam", "3"),
    },
    "ARF": {
        "captions alone": ("--ret", "0"),
        "retrieved pairs alone": ("--cap", "0"),
        "k = 8": ("--k", "8"),
    },
}


def folder_of(args, name, command):
    """--out/<name>, which must be new or of the same command, a list of strings."""
    out = os.path.join(args.out, name.replace(" ", "_").replace("/", "_"))
    file = os.path.join(out, "command.json")
    os.makedirs(out, exist_ok=True)
    if not os.listdir(out):
        common.write_json(file, command)
    if not os.path.isfile(file) or json.load(open(file)) != command:
        sys.exit(f"{out} holds a run of another command; give another --out, or remove it")
    return out


def run(args, name, command):
    """Run `command`, [script, flag, ...], with its output in --out/<name>, unless it is there; its results.json."""
    out = folder_of(args, name, command)
    done = os.path.join(out, "results.json")
    if not (os.path.isfile(done) and "sets" in json.load(open(done))):
        script, flags = command[0][:-3], [c for c in command[1:] if " = " not in c]
        patch = "; ".join(c for c in command[1:] if " = " in c)
        code = f"import sys, {script}; {patch}\n{script}.main(sys.argv[1:])"
        with open(os.path.join(out, "stderr.txt"), "w") as err:
            ended = subprocess.run([sys.executable, "-c", code, *flags, "--out", out], cwd=REPO, stderr=err,
                                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if ended.returncode:
            sys.exit(f"{name} failed: {open(os.path.join(out, 'stderr.txt')).read()[-2000:]}")
        if os.path.isfile(os.path.join(out, "last.pt")):
            os.remove(os.path.join(out, "last.pt"))              # of a finished run, and the largest file
        print(f"  {name}", file=sys.stderr)
    return json.load(open(done))


def run_all(args, commands):
    """{name: command} -> {name: results}, --jobs at a time."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(commands, pool.map(lambda name: run(args, name, commands[name]), commands)))


def cell(values):
    """Mean ± standard deviation, values in fractions, text in percent."""
    values = [100 * v for v in values]
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def markdown(head, rows):
    print("| | " + " | ".join(head) + " |\n|" + "---|" * (len(head) + 1))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def claims(rows, pairs, seeds):
    """Paired differences over seeds. rows: {method: {measure: [value by seed]}}."""
    print("\nDifferences by seed:")
    for a, b, measure, better in pairs:
        d = [100 * (x - y) for x, y in zip(rows[a][measure], rows[b][measure])]
        print(f"{a + ' over ' + b:<36}{measure:<16}{statistics.mean(d):+6.1f} ± {statistics.stdev(d):.1f}   "
              f"better in {sum(better * x > 0 for x in d)} of {seeds} seeds")


MEASURES = {"val top-1": lambda r: r["sets"]["val"]["top1"], "shift top-1": lambda r: r["shift_mean"]["top1"],
            "unseen top-1": lambda r: r["sets"]["unseen"]["top1"], "val ECE": lambda r: r["sets"]["val"]["ece"],
            "shift ECE": lambda r: r["shift_mean"]["ece"]}


def toy_runs(args, commands):
    """{method: (script, flags ...)} on the toy over the seeds: {method: {measure: [value by seed]}}, and a result."""
    import toy
    toy.build()                                                  # once, and not by every job
    names = {f"{m}-{s}": [c[0], "--seed", str(s), *c[1:]] for s in range(args.seeds) for m, c in commands.items()}
    results = run_all(args, names)
    return {m: {k: [f(results[f"{m}-{s}"]) for s in range(args.seeds)] for k, f in MEASURES.items()}
            for m in commands}, next(iter(results.values()))


def toy(args):
    rows, one = toy_runs(args, METHODS)
    print(f"The toy, {args.seeds} seeds, mean ± standard deviation in percent; {system()}\n")
    zero_shot = {"zero-shot": [cell([f(one["zero_shot"])]) for f in MEASURES.values()]}
    markdown(list(MEASURES), {**zero_shot, **{m: [cell(v) for v in row.values()] for m, row in rows.items()}})
    claims(rows, [("CAR-FT", "FT", "shift top-1", 1), ("CaRot", "FLYP", "shift top-1", 1),
                  ("CaRot", "FLYP", "shift ECE", -1), ("ARF", "FLYP", "shift top-1", 1),
                  ("ARF", "FLYP", "unseen top-1", 1)], args.seeds)


def ablations(args):
    commands = {}
    for method, variants in ABLATIONS.items():
        commands[method] = METHODS[method]
        for what, change in variants.items():
            commands[f"{method}, {what}"] = (*METHODS[method], *([change] if isinstance(change, str) else change))
    rows, _ = toy_runs(args, commands)
    print(f"The toy, {args.seeds} seeds, mean ± standard deviation in percent; below each method, what one change "
          f"adds, by seed; {system()}\n")
    shown = {}
    for name, row in rows.items():
        method, _, what = name.partition(", ")
        shown[f"**{method}**" if not what else what] = [
            cell(row[k]) if not what else "%+.1f ± %.1f" % (
                statistics.mean(d := [100 * (x - y) for x, y in zip(row[k], rows[method][k])]), statistics.stdev(d))
            for k in MEASURES]
    markdown(list(MEASURES), shown)


def recipe(args):
    """FT and FLYP at several learning rates, scored on a fifth of the training images. No val, no shift, no method."""
    import toy
    toy.build()
    shared = toy.defaults()
    flags = ["--data", train_alone(args, os.path.join(toy.where(), "root")), "--workers", "0"]
    for flag in ("model", "epochs", "batch_size", "warmup"):
        flags += [f"--{flag.replace('_', '-')}", str(shared[flag])]
    rates = ("3e-5", "1e-4", "3e-4", "1e-3")
    names = {(m, lr): f"recipe-{m}-{lr}" for m in ("FT", "FLYP") for lr in rates}
    results = run_all(args, {n: [*METHODS[m], *flags, "--lr", lr] for (m, lr), n in names.items()})
    print(f"Top-1 on held-out training images by learning rate; {system()}")
    for row in (["FT"], ["FLYP"], ["FT", "FLYP"]):
        top1 = {lr: statistics.mean(results[names[m, lr]]["sets"]["val"]["top1"] for m in row) for lr in rates}
        best, n = max(top1.values()), results[names["FT", "1e-3"]]["sets"]["val"]["n"]
        error = (best * (1 - best) / n) ** 0.5                   # of one model: both see the same images
        print(f"{' and '.join(row):<12}" + "".join(f"{lr:>8}: {100 * t:.2f}" for lr, t in top1.items())
              + f"   standard error {100 * error:.2f}; the smallest rate within it of the best: "
              + next(lr for lr, t in top1.items() if t >= best - error))


def train_alone(args, root):
    """A ROOT with the training folder of `root` and no val, so that the scripts hold images out."""
    alone = os.path.join(args.out, "train_alone")
    os.makedirs(alone, exist_ok=True)
    if not os.path.lexists(os.path.join(alone, "train")):
        os.symlink(os.path.abspath(os.path.join(root, "train")), os.path.join(alone, "train"))
    return alone


SPLITS = 2                                                       # trials of each method: 2 for each of --rates


def pacs(args):
    steps = args.epochs * sum(len(f) for _, _, f in os.walk(os.path.join(args.root, "train"))) // 64
    shared = ["--model", args.model, "--batch-size", "64", "--epochs", str(args.epochs), "--workers", "0",
              "--warmup", str(steps // 10), "--save-every", "100000"]
    own = {m: ["--ema-every", str(steps // 50)] if m == "CaRot" else ["--pool", args.pool] if m == "ARF" else []
           for m in METHODS}                                     # 50 updates of the teacher, as on ImageNet
    print(f"{args.root} by {args.model}: {args.epochs} epochs of batches of 64; {system()}\n")
    chosen = dict.fromkeys(METHODS, args.rates[0])
    if len(args.rates) > 1:
        alone = train_alone(args, args.root)
        trials = run_all(args, {f"trial-{m}-{lr}-{s}": [
            *METHODS[m], *own[m], *shared, "--data", alone, "--lr", lr, "--seed", str(s)]
            for s in range(SPLITS) for lr in args.rates for m in METHODS})
        held = {m: {lr: statistics.mean(trials[f"trial-{m}-{lr}-{s}"]["sets"]["val"]["top1"] for s in range(SPLITS))
                    for lr in args.rates} for m in METHODS}
        chosen = {m: max(args.rates, key=lambda lr: round(held[m][lr], 9)) for m in METHODS}    # of equals the first
        print(f"Top-1 on a fifth of the training images, held out; mean of {SPLITS} splits. {len(args.rates) * SPLITS} "
              "trials of each method:\n")
        markdown(args.rates, {m: [f"**{100 * t:.1f}**" if lr == chosen[m] else f"{100 * t:.1f}"
                                  for lr, t in held[m].items()] for m in METHODS})

    # every method at every rate that was chosen for one; compared at each of them, and each at its own
    rates = [lr for lr in args.rates if lr in chosen.values()]
    final = {f"{m} at {lr}": (m, lr) for lr in rates for m in METHODS}
    pairs = [(f"{a} at {lr}", f"{b} at {lr}") for lr in rates for a, b in BASELINES.items()] + [
        (f"{a} at {chosen[a]}", f"{b} at {chosen[b]}") for a, b in BASELINES.items() if chosen[a] != chosen[b]]
    commands = {f"{name}-{s}": [*METHODS[m], *own[m], *shared, "--data", args.root, "--lr", lr, "--seed", str(s)]
                for s in range(args.seeds) for name, (m, lr) in final.items()}
    results = run_all(args, commands)
    zero_shot = results[f"FT at {rates[0]}-0"]["zero_shot"]
    sets = list(zero_shot["sets"])
    new = [n for n in sets if zero_shot["sets"][n]["head"] == "zero-shot"]
    print(f"\n{args.seeds} seeds, mean ± standard deviation in percent; classes of {', '.join(new)} not trained on")
    rows = {name: {} for name in final}
    for measure in ("top1", "ece"):
        of = {n: lambda r, n=n: r["sets"][n][measure] for n in sets}
        of["shift mean"] = lambda r: r["shift_mean"][measure]
        for name in final:
            rows[name].update({f"{k} {measure}": [f(results[f"{name}-{s}"]) for s in range(args.seeds)]
                               for k, f in of.items()})
        print(f"\n{measure}:\n")
        markdown(list(of), {"zero-shot": [cell([f(zero_shot)]) for f in of.values()],
                            **{name: [cell(row[f"{k} {measure}"]) for k in of] for name, row in rows.items()}})
    claims(rows, [(a, b, f"{k} {measure}", 1 if measure == "top1" else -1) for a, b in pairs
                  for measure in ("top1", "ece") for k in ("val", "shift mean", *new)], args.seeds)

    print("\nWiSE-FT, top-1 on val / shift mean / the others, by weight of the tuned model; mean over the seeds\n")
    weights, table = ("0.25", "0.5", "0.75"), {}
    for m in METHODS:
        runs = [f"{m} at {chosen[m]}-{s}" for s in range(args.seeds)]
        command = ["evaluate.py", "--data", args.root, "--workers", "0", "--wise", *weights,
                   "--model", *(os.path.join(args.out, r.replace(" ", "_")) for r in runs)]
        out = folder_of(args, f"wise-{m}", command + sum((commands[r] for r in runs), []))
        if not os.path.isfile(os.path.join(out, "results.json")):
            subprocess.run([sys.executable, *command, "--out", out],
                           cwd=REPO, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = [c for c in json.load(open(os.path.join(out, "results.json"))).values() if "runs" not in c]
        points = [[zero_shot], *([c for c in found if c["alpha"] == float(w)] for w in weights),
                  [results[r] for r in runs]]
        table[f"{m} at {chosen[m]}"] = [" / ".join(f"{100 * statistics.mean(f(r) for r in point):.1f}" for f in (
            lambda r: r["sets"]["val"]["top1"], lambda r: r["shift_mean"]["top1"],
            *(lambda r, n=n: r["sets"][n]["top1"] for n in new))) for point in points]
    markdown(["0", *weights, "1"], table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["toy", "ablations", "recipe", "pacs"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--out", help="where runs are kept (default: out/evidence/WHAT)")
    parser.add_argument("--root", help="pacs: the ROOT")
    parser.add_argument("--model", help="pacs: the CLIP, local-dir:PATH")
    parser.add_argument("--pool", help="pacs: image-text pairs for ARF, which has no captions there")
    parser.add_argument("--rates", nargs="+", default=["3e-5", "1e-4", "3e-4", "1e-3", "3e-3"],
                        help="pacs: learning rates to choose from, upwards; with a single one there are no trials")
    parser.add_argument("--epochs", type=int, default=10, help="pacs: passes over the training images")
    args = parser.parse_args()
    if args.what == "pacs" and not (args.root and args.model and args.pool):
        parser.error("pacs needs --root, --model and --pool")
    if args.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard deviation")
    for path in ("root", "pool") if args.what == "pacs" else ():
        setattr(args, path, os.path.abspath(getattr(args, path)))
    args.out = os.path.abspath(args.out or os.path.join(REPO, "out", "evidence", "toy" if args.what == "ablations"
                                                        else args.what))
    globals()[args.what](args)
