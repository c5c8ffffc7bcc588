# SPDX-License-Identifier: MIT
"""The authors' training loops beside ours, step by step, in float64 on a CPU. Nothing of their code
is in this project: it is imported, unchanged, from clones of yours. Stand-ins replace CUDA, wandb,
pandas, their data and scoring. -s prints how far apart the two are.

    CAROT=/path/to/CaRot FLYP=/path/to/FLYP pytest -s tests/test_released.py
"""
import copy
import importlib
import os
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import calft
import common
from conftest import log, run, weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="set CUDA_VISIBLE_DEVICES= first")
BOUNDS = {"terms": 5e-13, "gradients": 1e-12, "model": 4e-14, "teacher": 4e-14}     # see RESULTS.md
CAROT = "--use_fp16=0 --ema_up_freq=5 --cross_fnorm=0.05 --distil_coef=1.5 --l_orth_wv="

def released(monkeypatch, tmp_path, variable, module):
    """src/models/<module>.py of the clone that the variable names."""
    clone = os.environ.get(variable) or pytest.skip(f"{variable}=/path/to/clone is not given")
    for name in [name for name in sys.modules if name.split(".")[0] in ("src", "clip")]:
        monkeypatch.delitem(sys.modules, name)              # of another clone
    data = [f"src.datasets{x}{part}" for x in ("", "_") for part in ("", ".common", ".laion")]
    for name in ["wandb", "pandas", "src.visualize", *data]:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    for kind in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    monkeypatch.syspath_prepend(os.path.abspath(clone))
    monkeypatch.chdir(tmp_path)                             # they write expt_logs/
    return importlib.import_module(f"src.models.{module}")

def watch(train, *args):
    """Run it; of its optimiser the groups, and by step the learning rates and gradients."""
    seen = SimpleNamespace(lrs=[], grads=[])
    def look(optimizer, *_):
        if len(seen.lrs) in (0, 1, 2, 59):
            seen.grads.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        seen.lrs.append(optimizer.param_groups[0]["lr"])
        seen.groups = [(len(g["params"]), *(g[k] for k in ("betas", "eps", "weight_decay")))
                       for g in optimizer.param_groups]
    with register_optimizer_step_pre_hook(look):
        train(*args)
    return seen

def run_ours(p, tau, root, name, *flags):
    """calft.main in float64 from this tau: what was seen, the model at the start, the batches."""
    start, batches, to_input = [], [], common.to_input
    def load_float64(*args, load=common.load_model):
        start[:] = load(*args)
        start[0].double().logit_scale.data.fill_(tau).log_()
        return copy.deepcopy(start)

    def keep(train, *args, loader=common.train_loader):
        for x, labels, rows, draws in loader(train, *args):
            prompts = [train.templates[d % len(train.templates)].replace("{}", train.classnames[k])
                       for k, d in zip(labels, draws)]
            batches.append((common.to_input(start[0], x), start[3](prompts)))
            yield x, labels, rows, draws
    p.setattr(common, "load_model", load_float64)
    p.setattr(common, "to_input", lambda *args: to_input(*args).double())
    p.setattr(common, "train_loader", keep)
    flags = ["--ema-every=5", "--eval-every=0", *flags]
    return watch(lambda: run(calft, root, name, "ours", *flags, steps=60)), start[0], batches

def run_theirs(p, module, model, batches, *flags):
    """Their loop: what was seen, and by step [loss, weighted terms...] from what is added to the
    contrastive loss in place. It writes `model` and `teacher`."""
    model, rows = copy.deepcopy(model), [[]]
    def add(self, other, iadd=torch.Tensor.__iadd__):
        if torch.is_tensor(other) and self.ndim == 0:
            rows[-1] += [other.item()] if rows[-1] else [self.item(), other.item()]
        return iadd(self, other)

    def end(self, backward=torch.Tensor.backward):
        rows[-1:] = [self.item(), *rows[-1]], []
        backward(self)
    p.setattr(torch.Tensor, "__iadd__", add)
    p.setattr(torch.Tensor, "backward", end)
    p.setattr(sys, "argv", ["", "--train-dataset=Set", "--exp_name=x", "--save=saved", "--epochs=3",
                            "--lr=1e-3", "--warmup_length=2", *flags])
    p.setattr("src.models.utils.torch_save", lambda encoder, path: torch.save(
        encoder.model.state_dict(), "teacher" if path.endswith("EMA.pt") else "model"))
    model.register_forward_hook(lambda _, x, y: (*y[:2], y[2][None]))   # DataParallel's tau (GPUs,)
    model.train = lambda mode: model                        # BatchNorm in eval mode, as in ours
    p.setattr(module.clip, "load", lambda *args, **_: (model, None, None))
    module.datasets = MagicMock(**{"Set.return_value.train_loader": range(20)})    # of an epoch
    module.get_data = lambda *args, **_: {"train_ft": SimpleNamespace(dataloader=batches)}
    module.evaluate = module.get_zeroshot_classifier = MagicMock()
    args, loop = module.parse_arguments(), getattr(module, module.__name__.split(".")[-1])
    return watch(loop, args, module.CLIPEncoder(args), MagicMock(), MagicMock()), rows[:-1]

def apart(ours, theirs):
    """The greatest distance of two tensors, relative to the norm of theirs. Not of the biases of
    attention's keys: softmax does not see them; their gradient, rounding, is blown up by AdamW."""
    def norm(k, x):
        return (x.view(3, -1)[::2] if "in_proj_bias" in k else x).double().norm()
    keys = [k for k in theirs if "k_proj.bias" not in k]
    return float(max(norm(k, ours[k] - theirs[k]) / (norm(k, theirs[k]) + 1e-20) for k in keys))

@pytest.mark.parametrize("clone, kind, tau, slack, ours, theirs", [
    ("CAROT", "vit", 1 / 0.07, 1, "", CAROT + "0.2 --model=ViT-B/16"),
    ("CAROT", "vit", 100, 1, "", CAROT + "0.2 --model=ViT-B/16"),
    ("CAROT", "resnet", 100, 20, "--oc=0", CAROT + "0 --model=RN50"),
    ("FLYP", "vit", 100, 1, "--oc=0 --sd=0 --cross-fnorm=0", "")])
def test_loop(tiny_root, clip, monkeypatch, tmp_path, clone, kind, tau, slack, ours, theirs):
    """Else what calft.py trains is not what the authors trained."""
    module = released(monkeypatch, tmp_path, clone, clone.lower() + "_loss")
    with monkeypatch.context() as p:
        seen, model, batches = run_ours(p, tau, tiny_root, clip(kind), *ours.split())
    with monkeypatch.context() as p:
        their, rows = run_theirs(p, module, model, batches, *theirs.split())
    if kind == "resnet":                                    # as released, L_oc multiplies a module
        with monkeypatch.context() as p, pytest.raises(TypeError, match="Linear"):
            run_theirs(p, module, model, batches, *theirs.split(), "--l_orth_wv=0.2")
    args, pairs = common.read_json("ours/args.json"), []
    weight = {"loss": 1, "contrastive": 1, "cross_frobenius": args["cross_fnorm"],
              "orthogonality": args["oc"], "self_distillation": args["sd"]}     # in their order
    for line, row in zip(log("ours"), rows, strict=True):
        terms = [w * line[k] for k, w in weight.items() if k in line]
        pairs += zip(terms, row if len(row) > 1 else 2 * row, strict=True)
    far = {"terms": max(abs(a - b) / b for a, b in pairs), "gradients": max(
        apart(*(dict(zip(dict(model.named_parameters()), g, strict=True)) for g in both))
        for both in zip(seen.grads, their.grads, strict=True))}
    files = ["model", "teacher"] if args["sd"] else ["model"]
    far |= {which: apart(weights("ours", which), torch.load(which, weights_only=True))
            for which in files}
    print(f"\n{clone}, {kind}, tau {tau:.0f}:", {k: f"{v:.1e}" for k, v in far.items()})
    assert seen.groups == their.groups and seen.lrs == pytest.approx(their.lrs, 1e-14, 0)
    assert all(v <= slack * BOUNDS[k] for k, v in far.items())

def test_ece(monkeypatch, tmp_path):
    """Else ece_batch10 is not to be compared with the published ECE."""
    module = released(monkeypatch, tmp_path, "CAROT", "eval")
    torch.manual_seed(0)
    x = torch.randn(1300, 20) * 2                           # of calibrated predictions: bins matter
    y = x.softmax(1).multinomial(1).squeeze(1)
    module.get_dataloader, module.maybe_dictionarize = lambda batches, **_: batches, lambda b: b
    batches = [{"images": a, "labels": b} for a, b in zip(x.split(512), y.split(512))]
    ours, args = common.scores(x, y), MagicMock(device="cpu", temperature_scale=0, full_eval=0)
    theirs = module.eval_single_dataset(torch.nn.Identity(), batches, args, None)
    print("\nECE:", ours["ece_batch10"], theirs["ece"], "whole set:", ours["ece"])
    assert ours["top1"] == theirs["top1"] and abs(ours["ece_batch10"] - theirs["ece"]) < 2e-7
