# SPDX-License-Identifier: MIT
"""The authors' training loops beside ours, step by step, in float64 on a CPU. Nothing of their code
is in this project: it is imported, unchanged, from clones of yours. Stand-ins replace CUDA, wandb,
pandas, their data and scoring. -s prints how far apart the two are.

    export CAROT=/path/to/CaRot FLYP=/path/to/FLYP WISE_FT=/path/to/wise-ft TRACER=/path/to/TRACER
    pip install scipy                                              # TRACER's alone
    pytest -s tests/test_released.py
"""
import copy
import importlib
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import calft
import carft
import common
from conftest import log, run, weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="set CUDA_VISIBLE_DEVICES= first")
BOUNDS = {"terms": 5e-13, "gradients": 1e-12, "model": 4e-14, "teacher": 4e-14, "head": 4e-14}
CAROT = "--use_fp16=0 --ema_up_freq=5 --cross_fnorm=0.05 --distil_coef=1.5 --l_orth_wv="

# ---- running the two -----------------------------------------------------------------------------
def released(monkeypatch, tmp_path, variable, module):
    """Import src/models/<module>.py of the clone that the variable names."""
    clone = os.environ.get(variable)
    if not clone:
        pytest.skip(f"{variable}=/path/to/clone is not given")
    for name in list(sys.modules):
        if name.split(".")[0] in ("src", "clip"):           # of another clone
            monkeypatch.delitem(sys.modules, name)
    data = [f"src.datasets{x}{part}" for x in ("", "_") for part in ("", ".common", ".laion")]
    for name in ["wandb", "pandas", "src.visualize", *data]:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    monkeypatch.syspath_prepend(os.path.abspath(clone))
    monkeypatch.chdir(tmp_path)                             # they write expt_logs/ and saved/
    return importlib.import_module(f"src.models.{module}")

def watch(train, *args):
    """Call train(*args). Return what its optimiser had: settings, by group; lrs and norms (of all
    gradients together), by step; grads, of each parameter in steps 0, 1, 2 and 59."""
    seen = SimpleNamespace(settings=[], lrs=[], norms=[], grads=[])
    def look(optimizer, *_):
        seen.settings = [[group[key] for key in ("betas", "eps", "weight_decay")]
                         for group in optimizer.param_groups]
        group = optimizer.param_groups[0]
        grads = [p.grad.clone() for p in group["params"] if p.grad is not None]
        if len(seen.lrs) in (0, 1, 2, 59):
            seen.grads.append(grads)
        seen.norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        seen.lrs.append(group["lr"])
    with register_optimizer_step_pre_hook(look):
        train(*args)
    return seen

def run_ours(p, script, tau, root, name, *flags):
    """Run a script's main in float64 from this tau. Return what was seen, the model that it loaded,
    and the batches with their texts: images (n, 3, S, S), tokens (n, L), labels (n,)."""
    ours = SimpleNamespace(batches=[])
    to_input = common.to_input
    load_model = common.load_model
    train_loader = common.train_loader
    def load_float64(*args):
        loaded = load_model(*args)
        loaded[0].double().logit_scale.data.fill_(tau).log_()
        ours.model, _, _, ours.tokenizer = copy.deepcopy(loaded)
        return loaded

    def keep(train, *args):
        ours.train = train
        for x, labels, rows, draws in train_loader(train, *args):
            prompts = [train.templates[d % len(train.templates)].replace("{}", train.classnames[k])
                       for k, d in zip(labels, draws)]
            ours.batches.append((common.to_input(ours.model, x), ours.tokenizer(prompts), labels))
            yield x, labels, rows, draws
    p.setattr(common, "load_model", load_float64)
    p.setattr(common, "to_input", lambda *args: to_input(*args).double())
    p.setattr(common, "train_loader", keep)
    ours.seen = watch(lambda: run(script, root, name, "ours", "--eval-every=0", *flags, steps=60))
    return ours

def set_flags(p, *flags):
    """Set the command line of a released loop: 60 steps at a peak learning rate of 1e-3."""
    p.setattr(sys, "argv", ["", "--train-dataset=Set", "--save=saved", "--epochs=3", "--lr=1e-3",
                            "--warmup_length=2", *flags])

def run_contrastive(p, module, model, batches, *flags):
    """Run CaRot's or FLYP's loop. Return what was seen, and by step [loss, weighted terms...] from
    what is added to the contrastive loss in place. It writes `model` and `teacher`."""
    model = copy.deepcopy(model)
    rows = [[]]
    def add(self, other, iadd=torch.Tensor.__iadd__):
        if torch.is_tensor(other) and self.ndim == 0:
            if not rows[-1]:
                rows[-1].append(self.item())
            rows[-1].append(other.item())
        return iadd(self, other)

    def end(self, backward=torch.Tensor.backward):
        rows[-1].insert(0, self.item())
        rows.append([])
        backward(self)

    def save(encoder, path):
        name = "teacher" if path.endswith("EMA.pt") else "model"
        torch.save(encoder.model.state_dict(), name)
    p.setattr(torch.Tensor, "__iadd__", add)
    p.setattr(torch.Tensor, "backward", end)
    set_flags(p, "--exp_name=x", *flags)
    p.setattr("src.models.utils.torch_save", save)
    model.register_forward_hook(lambda _, x, y: (*y[:2], y[2][None]))   # DataParallel's tau (GPUs,)
    model.train = lambda mode: model                        # BatchNorm in eval mode, as in ours
    p.setattr(module.clip, "load", lambda *args, **_: (model, None, None))
    pairs = [batch[:2] for batch in batches]
    module.datasets = MagicMock(**{"Set.return_value.train_loader": range(20)})    # of an epoch
    module.get_data = lambda *args, **_: {"train_ft": SimpleNamespace(dataloader=pairs)}
    module.evaluate = module.get_zeroshot_classifier = MagicMock()
    args = module.parse_arguments()
    loop = getattr(module, module.__name__.split(".")[-1])
    seen = watch(loop, args, module.CLIPEncoder(args), MagicMock(), MagicMock())
    return seen, rows[:-1]

def run_wise_ft(p, module, ours):
    """Run WiSE-FT's zeroshot.eval, which saves the untuned model with its head, then its finetune.
    Return what was seen, the losses by step, the names of the parameters that have gradients, and
    {name: tensor} after training."""
    zeroshot = importlib.import_module("src.models.zeroshot")
    model = copy.deepcopy(ours.model)
    losses = []
    loaded = []
    epochs = iter([ours.batches[:20], ours.batches[20:40], ours.batches[40:]])
    def load(path):
        classifier = module.torch_load(path).double()       # its bias is float32
        classifier.classification_head.bias.requires_grad_(False)
        loaded.append(classifier)
        return classifier

    def end(self, backward=torch.Tensor.backward):
        losses.append(self.item())
        backward(self)

    def template(text):
        return lambda name: text.replace("{}", name)
    p.setattr(torch.Tensor, "backward", end)
    p.setattr(torch.Tensor, "float", lambda self: self)     # their head would be float32
    set_flags(p, "--template=Set", "--load=saved/zeroshot.pt")
    args = module.parse_arguments()
    p.setattr(module.clip, "load", lambda *args, **_: (model, None, None))
    p.setattr(module.clip, "tokenize", ours.tokenizer)
    zeroshot.templates = SimpleNamespace(Set=[template(text) for text in ours.train.templates])
    zeroshot.datasets = MagicMock(**{"Set.return_value.classnames": ours.train.classnames})
    zeroshot.evaluate = module.evaluate = MagicMock()
    zeroshot.eval(SimpleNamespace(**{**vars(args), "load": None, "save": "saved/zeroshot.pt"}))

    module.datasets = MagicMock(**{"Set.return_value.train_loader": range(20)})
    module.get_dataloader = lambda *args, **_: [
        {"images": images, "labels": labels} for images, _, labels in next(epochs)]
    module.maybe_dictionarize = lambda batch: batch
    module.ImageClassifier = SimpleNamespace(load=load)
    args.freeze_encoder = False
    seen = watch(module.finetune, args)
    tuned = loaded[0]
    names = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    return seen, losses, names, module.torch_load("saved/checkpoint_3.pt").state_dict()

def apart(ours, theirs):
    """Return the largest distance of two tensors of the same name, relative to the norm of theirs.
    The biases of attention's keys are left out: softmax does not see them, so their gradient is
    rounding, which AdamW blows up."""
    def norm(k, x):
        if "in_proj_bias" in k:
            x = x.view(3, -1)[::2]                          # of queries and values
        return x.double().norm()
    keys = [k for k in theirs if "k_proj.bias" not in k]
    return float(max(norm(k, ours[k] - theirs[k]) / (norm(k, theirs[k]) + 1e-20) for k in keys))

def assert_near(title, ours, theirs, far, slack=1):
    """Assert that what was seen of two optimisers is the same, and that the distances, which are
    printed, are within the bounds."""
    lr = max(abs(a - b) / b for a, b in zip(ours.lrs, theirs.lrs, strict=True))
    print(f"\n{title}:", {name: f"{x:.1e}" for name, x in {"lr": lr, **far}.items()})
    assert lr < 1e-14
    assert ours.settings == theirs.settings
    assert all(distance <= slack * BOUNDS[name] for name, distance in far.items())

# ---- the tests -----------------------------------------------------------------------------------
@pytest.mark.parametrize("clone, kind, tau, slack, flags, their_flags", [
    ("CAROT", "vit", 1 / 0.07, 1, "", CAROT + "0.2 --model=ViT-B/16"),
    ("CAROT", "vit", 100, 1, "", CAROT + "0.2 --model=ViT-B/16"),
    ("CAROT", "resnet", 100, 20, "--oc=0", CAROT + "0 --model=RN50"),
    ("FLYP", "vit", 100, 1, "--oc=0 --sd=0 --cross-fnorm=0", "")])
def test_loop(tiny_root, clip, monkeypatch, tmp_path, clone, kind, tau, slack, flags, their_flags):
    """CaRot's and FLYP's released loops are ours; otherwise what calft.py trains is not what the
    authors trained."""
    module = released(monkeypatch, tmp_path, clone, clone.lower() + "_loss")
    with monkeypatch.context() as p:
        ours = run_ours(p, calft, tau, tiny_root, clip(kind), "--ema-every=5", *flags.split())
    with monkeypatch.context() as p:
        seen, rows = run_contrastive(p, module, ours.model, ours.batches, *their_flags.split())
    if kind == "resnet":                                    # as released, L_oc multiplies a module
        with monkeypatch.context() as p, pytest.raises(TypeError, match="Linear"):
            run_contrastive(p, module, ours.model, ours.batches, *their_flags.split(),
                            "--l_orth_wv=0.2")
    args = common.read_json("ours/args.json")
    weight = {"loss": 1, "contrastive": 1, "cross_frobenius": args["cross_fnorm"],
              "orthogonality": args["oc"], "self_distillation": args["sd"]}     # in their order
    far = {"terms": 0, "gradients": 0}
    for line, row in zip(log("ours"), rows, strict=True):
        if len(row) == 1:                                   # FLYP's loss is its only term
            row = 2 * row
        terms = [w * line[k] for k, w in weight.items() if k in line]
        for a, b in zip(terms, row, strict=True):
            far["terms"] = max(far["terms"], abs(a - b) / b)
    names = [name for name, _ in ours.model.named_parameters()]
    for grads in zip(ours.seen.grads, seen.grads, strict=True):
        a, b = (dict(zip(names, of_each, strict=True)) for of_each in grads)
        far["gradients"] = max(far["gradients"], apart(a, b))
    far["model"] = apart(weights("ours"), torch.load("model", weights_only=True))
    if args["sd"]:
        far["teacher"] = apart(weights("ours", "teacher"), torch.load("teacher", weights_only=True))
    assert_near(f"{clone}, {kind}, tau {tau:.0f}", ours.seen, seen, far, slack)

@pytest.mark.parametrize("tau, slack", [(1 / 0.07, 1), (100, 5)])
def test_plain_fine_tuning(tiny_root, clip, monkeypatch, tmp_path, tau, slack):
    """WiSE-FT's released loop is `carft.py --lam 0`; otherwise our FT is not the FT of the papers'
    tables. Their head also has a bias, which ours does not have. It starts at zero and is kept
    there: requires_grad_(False) on the model that they load."""
    module = released(monkeypatch, tmp_path, "WISE_FT", "finetune")
    with monkeypatch.context() as p:
        ours = run_ours(p, carft, tau, tiny_root, clip(), "--lam=0")
    with monkeypatch.context() as p:
        seen, losses, names, tuned = run_wise_ft(p, module, ours)
    assert not tuned["classification_head.bias"].any()
    assert all(norm < 1 + 1e-12 for norm in seen.norms)
    n_clipped = sum(norm > 1 - 1e-5 for norm in seen.norms)
    assert 0 < n_clipped < 60

    far = {"terms": 0, "gradients": 0}
    for line, loss in zip(log("ours"), losses, strict=True):
        far["terms"] = max(far["terms"], abs(line["loss"] - loss) / loss)
    our_names = [f"image_encoder.model.visual.{name}"
                 for name, _ in ours.model.visual.named_parameters()]
    our_names.append("classification_head.weight")
    for our_grads, grads in zip(ours.seen.grads, seen.grads, strict=True):
        a = dict(zip(our_names, our_grads, strict=True))
        b = dict(zip(names, grads, strict=True))
        assert a.keys() == b.keys()
        far["gradients"] = max(far["gradients"], apart(a, b))
    for our_norm, norm in zip(ours.seen.norms, seen.norms, strict=True):
        far["gradients"] = max(far["gradients"], abs(our_norm - norm) / norm)
    prefix = "image_encoder.model."
    theirs = {name.removeprefix(prefix): t for name, t in tuned.items() if name.startswith(prefix)}
    far["model"] = apart(weights("ours"), theirs)           # without the text tower's blocks
    head = load_file("ours/head.safetensors")["W_cls"]
    far["head"] = apart({"W_cls": head}, {"W_cls": tuned["classification_head.weight"] / tau})
    title = f"WISE_FT, vit, tau {tau:.0f}, {n_clipped} of 60 steps clipped"
    assert_near(title, ours.seen, seen, far, slack)

def test_ece(monkeypatch, tmp_path):
    """ece_batch10 is what CaRot's code prints; otherwise it is not to be compared with the
    published ECE."""
    module = released(monkeypatch, tmp_path, "CAROT", "eval")
    torch.manual_seed(0)
    x = torch.randn(1300, 20) * 2                           # of calibrated predictions: bins matter
    y = x.softmax(1).multinomial(1).squeeze(1)
    module.get_dataloader = lambda batches, **_: batches
    module.maybe_dictionarize = lambda batch: batch
    batches = [{"images": a, "labels": b} for a, b in zip(x.split(512), y.split(512))]
    ours = common.scores(x, y)
    args = MagicMock(device="cpu", temperature_scale=0, full_eval=0)
    theirs = module.eval_single_dataset(torch.nn.Identity(), batches, args, None)
    print("\nECE:", ours["ece_batch10"], theirs["ece"], "whole set:", ours["ece"])
    assert ours["top1"] == theirs["top1"]
    assert abs(ours["ece_batch10"] - theirs["ece"]) < 2e-7

@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_teacher_of_tracer(monkeypatch, tmp_path, beta):
    """TRACER's released average, updated as often as its run has steps, is our --teacher-beta after
    each update; otherwise what calft.py distils from is not TRACER's teacher. As released, it
    counts steps where it is told to update more seldom."""
    module = released(monkeypatch, tmp_path, "TRACER", "beta_moving_average")
    torch.manual_seed(0)
    far = 0
    for K in (1, 12, 250):
        student = torch.nn.Sequential(torch.nn.Linear(7, 24), torch.nn.LayerNorm(24)).double()
        student.requires_grad_(False)
        ours = copy.deepcopy(student)
        theirs = module.GeneralMovingAverage(
            student, module.create_beta_weight_function(beta, K))
        for update in range(1, K + 1):
            for parameter in student.parameters():
                parameter.add_(1e-2 * torch.randn_like(parameter))
            theirs.update()
            calft.update_teacher(ours, student, calft.beta_momentum(update, K, beta))
            far = max(far, apart(ours.state_dict(), theirs.state_dict()))
    print(f"\nTRACER, beta {beta}:", {"teacher": f"{far:.1e}"})
    assert far < BOUNDS["teacher"]
