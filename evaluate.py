# SPDX-License-Identifier: MIT
"""Evaluation: accuracy and calibration of any CLIP on val and every shift of a ROOT.

    python evaluate.py --model out/calft                           # on the ROOT it was tuned on
    python evaluate.py --data ROOT --model ViT-B-16-quickgelu out/calft out/carft local-dir:PATH
    python evaluate.py --model out/calft --wise 0 0.25 0.5 0.75 1  # WiSE-FT's curve
    python evaluate.py --model out/calft --fit-temperature --sigma-min --plot DIR
    python evaluate.py --mean out/seed0 out/seed1 out/seed2        # mean and deviation over runs
    python evaluate.py --model out/carft --predict DIR FILE        # classes of pictures, as a CSV

A model is the folder of a run, local-dir:PATH, an open_clip name with --pretrained, or zero-shot:
the one that the first run was tuned from. It is scored as the training scripts score it: by the
zero-shot head of its text tower, or by the head that carft.py trained, if that has the classes of
this ROOT. Each image is decoded once for all models.
"""
import common                                               # before torch, see its first lines

import contextlib
import copy
import csv
import importlib.util
import json
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from os.path import realpath
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

# ---- measures ------------------------------------------------------------------------------------
def fit_temperature(logits, labels):
    """Return the T in [0.01, 100] that minimises the NLL of logits (n, K) / T, with labels (n,), by
    LBFGS (Guo et al., 2017)."""
    z = logits.double()
    b = torch.ones((), dtype=torch.float64, requires_grad=True)         # 1 / T: the NLL is convex
    optimizer = torch.optim.LBFGS(
        [b], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    def nll():
        optimizer.zero_grad()
        loss = F.cross_entropy(b * z, labels)
        loss.backward()
        return loss
    optimizer.step(nll)
    return 1 / min(max(b.item(), 0.01), 100)

def sigma_min(features):
    """Return the smallest singular value of the covariance (d, d) of features (n, d), with each
    dimension standardised. CaRot's theory bounds errors under shift by its inverse (section 3)."""
    x = features.double()
    deviation = x.std(0, correction=min(1, len(x) - 1))     # 0 for a single image
    if not deviation.all():                                 # a constant dimension
        return 0.0
    x = (x - x.mean(0)) / deviation
    return torch.linalg.svdvals(x.T @ x / (len(x) - 1))[-1].item()

# ---- the models to score -------------------------------------------------------------------------
@dataclass
class Candidate:
    """A model to score."""
    title: str                                              # of its outcomes
    source: str                                             # what --model names
    alpha: float | None                                     # the weight of the tuned model (--wise)
    model: torch.nn.Module
    preprocess: torch.nn.Module
    tokenizer: object
    head: torch.Tensor | None                               # trained W_cls (K, d); None: zero-shot
    columns: dict = field(default_factory=dict)             # {its titles in the table: temperature}

def find_model(name):
    """Return the folder of the model that a --model means, and the flags of the run that wrote it;
    {} for a model of open_clip's."""
    path = Path(name.removeprefix("local-dir:"))
    if (path / "model").is_dir():                           # the folder of a run
        path = path / "model"
    elif (path / "args.json").is_file():
        common.fail(f"--model {name} is a run that has not finished; it has no model/ yet")
    run = common.read_json(path.parent / "args.json") if path.is_dir() else {}
    return path, run

def check_run(source, run, args, sets):
    """End the program if images are to be scored on which the run was tuned."""
    if run.get("data") != args.data:                        # another ROOT, or not a run
        return
    tuned = [realpath(f"{args.data}/{name}") for name in run["train"]]
    is_held_out = not args.val and not Path(args.data, "val").is_dir()
    for images in sets[int(is_held_out):]:                  # val may be held out of these folders
        for folder in map(realpath, Path(os.fsdecode(images.paths[0])).parents):
            if folder in tuned:
                common.fail(f"{source} was tuned on {folder}, which is to be scored; see its "
                            "--train")
    for flag in ("train", "val", "val_frac", "seed"):
        if is_held_out and run[flag] != getattr(args, flag):
            common.fail(f"{source} was tuned on images that are held out as val now; its flags had "
                        f"{flag.replace('_', '-')} {run[flag]}")

def read_head(path):
    """Return W_cls (K, d) of the head.safetensors beside a run's model/, and what it says of its
    classes, classnames and is_trained. None and {} if there is none, as beside a teacher/."""
    file = path.parent / "head.safetensors"
    if path.name != "model" or not file.is_file():
        return None, {}
    try:
        with safe_open(file, "pt") as f:
            about = {name: json.loads(text) for name, text in f.metadata().items()}
            return f.get_tensor("W_cls"), about
    except Exception as e:                                  # of many kinds
        common.fail(f"{file} is damaged ({e}); remove it")

def trained_head(path, classes):
    """Return W_cls (K, d) of a run that trained it for these classes, or None."""
    W_cls, about = read_head(path)
    if W_cls is None or not about.get("is_trained", True):  # an older run's head was trained
        return None
    if about["classes"] != classes:
        common.say(f"{path.parent}/head.safetensors has other classes; the zero-shot head of its "
                   "text tower is used")
        return None
    return W_cls

def interpolate(base, tuned, alpha):
    """Return the model of WiSE-FT (Wortsman et al., 2022), all weights of which are (1 - alpha)
    theta_zero_shot + alpha theta_fine_tuned."""
    mixed = copy.deepcopy(base)
    tuned_weights = tuned.state_dict()
    for name, weight in mixed.state_dict().items():
        if weight.is_floating_point():                      # unlike the counters of BatchNorm
            weight.lerp_(tuned_weights[name], alpha)        # in place: weight is the model's own
    return mixed

def load(name, args, sets):
    """Return the candidates of one --model: itself, or a mixture for each alpha of --wise."""
    path, run = find_model(name)
    source = str(path).removesuffix("/model")
    if path.is_dir():
        name = f"local-dir:{path}"
    if name == "zero-shot":
        name = args.untuned or common.fail("--model zero-shot needs a run beside it")
    check_run(source, run, args, sets)
    model, _, preprocess, tokenizer = common.load_model(name, args.pretrained)
    head = trained_head(path, sets[0].classes)
    if not args.wise:
        return [Candidate(source, source, None, model, preprocess, tokenizer, head)]

    if not run:
        common.fail(f"--wise: {source} is not a run's folder, so its base model is unknown")
    base, *_ = common.load_model(run["model"], run["pretrained"])
    base_head = common.zero_shot_head(base, tokenizer, sets[0]).cpu()
    candidates = []
    for alpha in args.wise:
        mixed = interpolate(base, model, alpha)
        mixed_head = None
        if head is not None:
            mixed_head = base_head.lerp(head, alpha)
        title = f"{source} {alpha:g}"
        candidates.append(
            Candidate(title, source, alpha, mixed, preprocess, tokenizer, mixed_head))
    return candidates

# ---- what is shown -------------------------------------------------------------------------------
def filename(title):
    """Return a title as the name of a file: no two titles have the same."""
    return quote(title, safe=" ")

def reliability(axis, confidence, correct, title):
    """Draw a reliability diagram of confidence (n,) and correct (n,): accuracy in 15 equal bins."""
    edges = np.linspace(0, 1, 16)
    count = np.histogram(confidence, edges)[0]
    hits = np.histogram(confidence, edges, weights=1.0 * correct)[0]
    colours = np.where(count < 10, "#bcd3ea", "#2b6cb0")    # few images say little: pale
    axis.bar(edges[:-1], hits / np.maximum(count, 1), 1 / 15, align="edge", color=colours, ec="w")
    axis.plot([0, 1], [0, 1], "k--")
    axis.set(title=f"{title}: ECE {100 * common.ece(confidence, correct):.1f}", xlim=(0, 1),
             ylim=(0, 1), xlabel="confidence", ylabel="accuracy")

def plot(folder, candidates, columns, outcomes):
    """Write PNGs: a reliability diagram of each model (of --wise the two ends), and val against
    shifts. columns and outcomes are those of score()."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    for candidate in candidates:
        if candidate.alpha not in (None, 0, 1):
            continue
        sets = outcomes[candidate.title]
        tall = math.ceil(len(sets) / 4)
        figure = plt.figure(figsize=(10.4, 2.8 * tall), layout="constrained")
        for i, (name, outcome) in enumerate(sets.items(), 1):
            correct = outcome["prediction"] == outcome["label"]
            axis = figure.add_subplot(tall, 4, i)
            reliability(axis, outcome["confidence"], correct, name)
        with common.replacing(f"{folder}/reliability_{filename(candidate.title)}.png") as f:
            figure.savefig(f, dpi=120)

    figure, axis = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    curves = {}                                             # {source: [(alpha, val, shifts), ...]}
    for candidate in candidates:
        column = columns[candidate.title]
        if column["shift_mean"]:
            top1s = column["sets"]["val"]["top1"], column["shift_mean"]["top1"]
            curves.setdefault(candidate.source, []).append((candidate.alpha, *top1s))
    for source, points in curves.items():
        alphas, x, y = np.array(sorted(points), float).T                # an alpha of None is nan
        axis.plot(100 * x, 100 * y, marker="o", label=Path(source).name)
        for alpha, *point in zip(alphas, 100 * x, 100 * y):
            if source == candidates[0].source and alpha >= 0:           # not nan
                axis.annotate(f"{alpha:g}", point)
    axis.set(xlabel="val top-1 (%)", ylabel="mean top-1 over shifts (%)")
    axis.legend(fontsize=8)
    with common.replacing(f"{folder}/val_against_shifts.png") as f:
        figure.savefig(f, dpi=120)

def print_mean(folders, measures):
    """Print mean and deviation over runs: of the sets that all of them have, and of shift means."""
    runs = [common.read_json(Path(folder, "results.json")) for folder in folders]
    if len(runs) < 2 or not all("sets" in run for run in runs):
        common.fail("--mean takes the folders of two or more finished runs")
    for measure in measures:
        found = [scores.get(measure) for run in runs for scores in run["sets"].values()]
        if not any(isinstance(value, float) for value in found):
            common.fail(f"--metric {measure} is no score in the results.json of these runs")
    runs = [{**run["sets"], "shift mean": run["shift_mean"]} for run in runs]
    print(f"{len(runs)} runs: mean and standard deviation")
    print(f"{'set':<24}" + "".join(f"{measure:>15}" for measure in measures))
    for name in runs[0]:
        scores = [run.get(name) for run in runs]
        if None in scores:                                  # some run lacks it
            continue
        line = f"{name:<24}"
        for measure in measures:
            cell = ""                                       # the shift mean has top1 and ece alone
            if all(measure in score for score in scores):
                values = [100 * score[measure] for score in scores]
                cell = f"{np.mean(values):.2f} ±{np.std(values, ddof=1):<4.1f}"
            line += f"{cell:>15}"
        print(line)

def predict(args, stdout):
    """Write a CSV of pictures to stdout: path, class name, confidence, and the runners-up."""
    files = []
    for name in args.predict:
        if os.path.isdir(name):
            try:
                found = common.images_below(name, set())
            except OSError as e:
                common.fail(f"--predict {name}: {e.filename} cannot be read ({e.strerror})")
            if not found:
                common.fail(f"--predict {name} holds no image")
            files += found
        elif os.path.isfile(name):
            files.append(os.fsencode(name))
        else:
            common.fail(f"--predict {name} is neither a file nor a folder")
    path, run = find_model(args.model[0])
    W_cls, about = read_head(path)                                                  # (K, d)
    if W_cls is None or len(args.model) > 1 or common.WORLD > 1:
        common.fail("--predict takes one run as --model, that has a head.safetensors, and no "
                    "torchrun")
    model, _, preprocess, tokenizer = common.load_model(f"local-dir:{path}", "")
    T = 1
    if args.fit_temperature:
        _, (val, *_) = common.read_data(args)
        check_run(args.model[0], run, args, [val])          # T is not fitted on training images
        if val.classes != about["classes"]:
            common.fail(f"--fit-temperature: {args.data} has other classes than {args.model[0]}")
        u, = common.image_features([model], [preprocess], val, args)                # (n, d)
        logits = common.set_logits(model, tokenizer, val, u, W_cls)
        T = fit_temperature(logits, torch.from_numpy(val.labels))
        common.say(f"{T:<8.3g} T of {args.model[0]}")

    pictures = common.ImageSet("pictures", [], [], [], np.array(files), np.zeros(len(files)), None,
                               "", False)
    data = common.EvalImages(pictures, {"": preprocess}, skip_corrupt=True)
    top = min(args.top, len(W_cls))
    table = csv.writer(stdout, lineterminator="\n")
    table.writerow(["path", *["class", "confidence"] * top])
    remaining = iter(files)
    for crops, readable in common.load(data, range(len(files)), args.batch_size, args, "pictures"):
        with torch.no_grad(), common.autocast(args.precision):
            u = common.encode_image(model, common.to_input(model, crops[""]))       # (n, d)
        logits = model.logit_scale.exp() * u @ W_cls.to(common.DEVICE).T            # (n, K)
        best = (logits / T).softmax(-1).detach().cpu().topk(top)                    # (n, top)
        for is_readable, confidences, classes in zip(readable, *best):
            file = os.fsdecode(next(remaining))
            if not is_readable:
                common.say(f"skipped, not readable: {file}")
                continue
            row = [file]
            for confidence, k in zip(confidences.tolist(), classes.tolist()):
                row += [about["classnames"][k], f"{confidence:.6f}"]
            table.writerow(row)

# ---- the program ---------------------------------------------------------------------------------
def score(candidates, sets, args):
    """Score all candidates on all sets: return the columns of the table, {title: summary}, the
    outcomes, {title: {set: {path, label, prediction, confidence: (n,) each, classes: (K,)}}}, and
    notes, a list of lines."""
    models = [candidate.model for candidate in candidates]
    preprocesses = [candidate.preprocess for candidate in candidates]
    outcomes = {candidate.title: {} for candidate in candidates}
    about = {}                                              # {column: alpha, temperature, ...}
    scores_of = {}                                          # {column: {set: scores}}
    notes = []
    for images in sets:
        features_of = common.image_features(
            models, preprocesses, images, args, args.skip_corrupt, args.precision)
        is_readable = ~features_of[0][:, 0].isnan().numpy()                         # (n,)
        if not is_readable.any():
            common.fail(f"no image of {images.name} can be read, or the weights are not finite")
        for path in images.paths[~is_readable]:
            notes.append(f"skipped, not readable: {path.decode(errors='replace')}")
        labels = torch.from_numpy(images.labels[is_readable])                       # (n',)
        for candidate, features in zip(candidates, features_of):
            features = features[is_readable]                                        # (n', d)
            title = candidate.title
            if candidate.head is None:
                candidate.head = common.zero_shot_head(candidate.model, candidate.tokenizer, images)
            logits = common.set_logits(
                candidate.model, candidate.tokenizer, images, features, candidate.head)
            if images is sets[0]:                           # val
                candidate.columns = {title: 1.0}
                about[title] = {"alpha": candidate.alpha, "temperature": 1.0}
                if args.sigma_min:
                    about[title]["sigma_min"] = sigma_min(features)
                    notes.append(f"{about[title]['sigma_min']:<8.3g} sigma_min of {title}")
                if args.fit_temperature:
                    T = fit_temperature(logits, labels)
                    candidate.columns[f"{title} at T"] = T
                    about[f"{title} at T"] = {"alpha": candidate.alpha, "temperature": T}
                    notes.append(f"{T:<8.3g} T of {title}")
            for column, T in candidate.columns.items():
                scores_of.setdefault(column, {})[images.name] = common.score_set(
                    images, logits / T, labels)

            confidence, prediction = logits.softmax(-1).max(-1)
            outcomes[title][images.name] = {
                "path": images.paths[is_readable],          # as bytes
                "label": labels.numpy(),
                "prediction": prediction.numpy(),
                "confidence": confidence.numpy(),
                "classes": np.array(images.classes)}
    columns = {name: {**common.summary(sets, scores_of[name]), **about[name]} for name in about}
    return columns, outcomes, notes

def main(argv=None):
    parser = common.make_parser(__doc__, "out/evaluate")
    parser.set_defaults(batch_size=256, precision="fp32")   # bf16 may turn near ties around
    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add("--model", nargs="+", default=["ViT-B-16-quickgelu"], help="runs, names, local-dir:PATH")
    add("--wise", nargs="+", type=float, metavar="ALPHA",
        help="mix weights with the model a run was tuned from: 0 is that model, 1 the tuned one")
    add("--fit-temperature", action="store_true", help="also show each model at a T fitted on val")
    add("--sigma-min", action="store_true", help="of val's standardised feature covariance")
    add("--predictions", metavar="DIR", help="path, label, prediction and confidence of all images")
    add("--plot", metavar="DIR", help="reliability diagrams, and val against shifts")
    add("--skip-corrupt", action="store_true", help="count unreadable images instead of stopping")
    add("--mean", nargs="+", metavar="OUT", help="only print the mean over the results of runs")
    add("--metric", nargs="+", default=["top1", "ece"], metavar="NAME",
        help="what --mean prints, such as mean_per_class or macro_f1 (top1 ece)")
    add("--predict", nargs="+", metavar="PATH",
        help="print the classes of pictures, in folders or files, as a CSV; --model is one run")
    common.add_number(group, "--top", 1, "classes for each picture of --predict")
    args, defaults = common.given_flags(parser, argv)
    if args.mean:
        return print_mean(args.mean, args.metric or defaults["metric"])
    runs = [find_model(name)[1] for name in args.model or []]
    first_run = next(filter(None, runs), {})                # has the flags that are not given
    for flag in ("data", "train", "val", "val_frac", "seed", "pretrained"):
        defaults[flag] = first_run.get(flag, defaults[flag])
    if args.predict and not first_run:
        common.fail("--predict takes the folder of a run as --model")
    if args.predict and args.wise:
        common.fail("--predict takes a run as it is, without --wise")
    args = common.fill_in(args, defaults)                   # without --data or a run: the toy
    if args.predict:
        stdout = sys.stdout                                 # for the CSV alone
        with contextlib.redirect_stdout(sys.stderr):
            common.start_processes()
            return predict(args, stdout)
    common.start_processes()
    if Path(args.out, "args.json").is_file():
        common.fail(f"--out {args.out} holds a run and its results.json; give another --out")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        common.fail("--plot needs matplotlib: pip install matplotlib")
    if not Path(args.data, args.train[0]).is_dir():
        args.train = []                                     # val's classes stand in for training's

    _, sets = common.read_data(args)                        # val, then all others
    args.untuned = first_run.get("model")                   # what zero-shot means
    candidates = []
    for name in np.ravel(args.model):                       # the toy's is a single name
        candidates += load(name, args, sets)
    # Before scoring, so that a folder that cannot be written is found early.
    digests = {images.name: common.digest(images) for images in sets}
    file = Path(args.out, "results.json")
    older = common.read_json(file)
    if older and common.read_json(f"{args.out}/sets.json") != digests:
        older = {}
        kept = file.with_name(f"results-{int(file.stat().st_mtime)}.json")
        common.say(f"{file} is of other sets; it is kept as {kept.name}")
        if common.RANK == 0:
            file.rename(kept)
    for folder in (args.out, args.predictions or args.out):
        common.write(f"{folder}/sets.json", digests)

    columns, outcomes, notes = score(candidates, sets, args)
    titles = list(columns)
    names = max(len(images.name) for images in sets)
    a_page = max(1, (100 - names - 20) // 22)               # models on 100 characters
    for i in range(0, len(titles), a_page):
        page = {title: columns[title] for title in titles[i:i + a_page]}
        common.say("\n" + common.table(page))
    common.say("\n".join(notes))
    common.write(file, {**older, **columns})                # what other titles have stays
    if args.predictions and common.RANK == 0:
        for title, sets_of in outcomes.items():
            for name, outcome in sets_of.items():
                outcome["path"] = np.char.decode(outcome["path"], "utf-8", "replace")
                path = f"{args.predictions}/{filename(title)}/{filename(name)}.npz"
                with common.replacing(path) as f:
                    np.savez(f, **outcome)
    if args.plot and common.RANK == 0:
        plot(args.plot, candidates, columns, outcomes)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C ends the program at once
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # and so does `| head`
    main()
    common.end_processes()
