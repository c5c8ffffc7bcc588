# SPDX-License-Identifier: MIT
"""Measurements on the toy, each printed as a table with versions and hardware.

    python tests/bench.py recipe     # learning rate for all methods, chosen on training images held out, baselines alone
    python tests/bench.py methods    # zero-shot, FT, CAR-FT, FLYP, CaRot, ARF over five seeds, and the papers' claims

Runs are kept in out/bench until the code changes; --jobs of them go on at once, each on one thread.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
sys.path[:0] = [HERE, REPO]

METHODS = {"FT": ("carft.py", "--lam", "0"), "CAR-FT": ("carft.py",),
           "FLYP": ("calft.py", "--oc", "0", "--sd", "0", "--cross-fnorm", "0"), "CaRot": ("calft.py",),
           "ARF": ("anchor.py",)}


def folder():
    """Where runs are kept: by the content of the code that makes them."""
    digest = hashlib.sha256()
    for file in ("calft.py", "carft.py", "anchor.py", "common.py", "tests/toy.py", "tests/toy_clip.safetensors"):
        with open(os.path.join(REPO, file), "rb") as f:
            digest.update(f.read())
    return os.path.join(REPO, "out", "bench", digest.hexdigest()[:8])


def run(name, command):
    """Run a script with its output in out/bench/<name>; its results.json."""
    out = os.path.join(folder(), name)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "stderr.txt"), "w") as err:
        done = subprocess.run([sys.executable, os.path.join(REPO, command[0]), *command[1:], "--out", out], cwd=REPO,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=err)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {open(os.path.join(out, 'stderr.txt')).read()[-2000:]}")
    print(f"  {name}", file=sys.stderr)
    return json.load(open(os.path.join(out, "results.json")))


def run_all(jobs, commands):
    """{name: command} -> {name: results}, `jobs` at a time."""
    import toy
    toy.build()                                                  # once, and not by every job
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        return dict(zip(commands, pool.map(run, commands, commands.values())))


def system():
    import torch
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?") \
        if os.path.exists("/proc/cpuinfo") else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def recipe(jobs):
    """FT and FLYP at several learning rates, scored on a fifth of the training images. No val, no shift, no method."""
    import toy
    toy.build()
    root = os.path.join(folder(), "train_only")                  # a ROOT without val: the scripts hold images out
    os.makedirs(root, exist_ok=True)
    if not os.path.lexists(os.path.join(root, "train")):
        os.symlink(os.path.join(toy.where(), "root", "train"), os.path.join(root, "train"))
    shared = toy.defaults()
    base = ["--data", root, "--workers", "0"]
    for flag in ("model", "epochs", "batch_size", "warmup"):
        base += [f"--{flag.replace('_', '-')}", str(shared[flag])]
    names = {(m, lr): f"recipe-{m}-{lr}" for m in ("FT", "FLYP") for lr in ("3e-5", "1e-4", "3e-4", "1e-3")}
    results = run_all(jobs, {n: [*METHODS[m], *base, "--lr", lr] for (m, lr), n in names.items()})
    print(f"Top-1 on held-out training images by learning rate; {system()}")
    rates = list(dict.fromkeys(lr for _, lr in names))
    for row in (["FT"], ["FLYP"], ["FT", "FLYP"]):
        top1 = {lr: statistics.mean(results[names[m, lr]]["sets"]["val"]["top1"] for m in row) for lr in rates}
        best, n = max(top1.values()), results[names["FT", "1e-3"]]["sets"]["val"]["n"]
        error = (best * (1 - best) / n) ** 0.5                   # of one model: both see the same images
        print(f"{' and '.join(row):<12}" + "".join(f"{lr:>8}: {100 * t:.2f}" for lr, t in top1.items())
              + f"   standard error {100 * error:.2f}; the smallest rate within it of the best: "
              + next(lr for lr, t in top1.items() if t >= best - error))


def methods(jobs, seeds):
    results = run_all(jobs, {f"{m}-{s}": [*METHODS[m], "--seed", str(s)] for s in range(seeds) for m in METHODS})
    measures = {"val top-1": lambda r: r["sets"]["val"]["top1"], "shift top-1": lambda r: r["shift_mean"]["top1"],
                "unseen top-1": lambda r: r["sets"]["unseen"]["top1"], "val ECE": lambda r: r["sets"]["val"]["ece"],
                "shift ECE": lambda r: r["shift_mean"]["ece"]}
    rows = {m: {k: [100 * f(results[f"{m}-{s}"]) for s in range(seeds)] for k, f in measures.items()} for m in METHODS}

    def cell(values):
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    print(f"The toy, {seeds} seeds, mean ± standard deviation in percent; {system()}\n")
    print(f"{'':<10}" + "".join(f"{k:>14}" for k in measures))
    zero_shot = results["FT-0"]["zero_shot"]
    print(f"{'zero-shot':<10}" + "".join(f"{100 * f(zero_shot):>14.1f}" for f in measures.values()))
    for m, row in rows.items():
        print(f"{m:<10}" + "".join(f"{cell(values):>14}" for values in row.values()))
    print("\nThe papers' claims, as differences by seed:")
    for a, b, k, better in (("CAR-FT", "FT", "shift top-1", 1), ("CaRot", "FLYP", "shift top-1", 1), ("CaRot", "FLYP", "shift ECE", -1),
                            ("ARF", "FLYP", "shift top-1", 1), ("ARF", "FLYP", "unseen top-1", 1)):
        d = [x - y for x, y in zip(rows[a][k], rows[b][k])]
        print(f"{a + ' over ' + b:<18}{k:<14}{statistics.mean(d):+6.1f} ± {statistics.stdev(d):.1f}   "
              f"better in {sum(better * x > 0 for x in d)} of {seeds} seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recipe", "methods"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be at least 2, for a standard deviation")
    if args.what == "recipe":
        recipe(args.jobs)
    else:
        methods(args.jobs, args.seeds)
