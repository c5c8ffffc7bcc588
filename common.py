# SPDX-License-Identifier: MIT
"""What calft.py, carft.py, anchor.py and evaluate.py share: set-up, models, images, heads, scores, files.

Nothing here knows a fine-tuning method, but for the names of flags and files. The way of the data:
class folders -> uint8 crops (workers) -> normalised on the device -> features -> loss | head -> scores of whole sets.
Shapes: N images in the global batch, K classes, M templates, L tokens, d feature dimensions.
"""
import argparse
import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings

import numpy as np
import open_clip
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.datasets.folder import IMG_EXTENSIONS
from torch.utils.checkpoint import checkpoint
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm


# ---- ends ----------------------------------------------------------------------------------------------------------

class Abort(Exception):
    """Ends the program with one line on stderr: exit code 2 for wrong usage, 1 for a run that failed."""

    def __init__(self, message, code=2):
        if message.startswith("Caught Abort in DataLoader"):         # torch hands over a worker's traceback as text
            message, code = message.strip().rsplit("Abort: ", 1)[1], 1
        super().__init__(message.replace("\n", "\\n"))               # one line, whatever a file is called
        self.code = code


def cli(main):
    """Decorates `main(argv=None)`: an Abort becomes one line and an exit code, and the process group is closed."""
    @functools.wraps(main)
    def wrapped(argv=None):
        if hasattr(sys.stdout, "reconfigure"):                       # names of files need not be text
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main(argv)
            if dist.is_initialized():                                # after a failure it would wait for the others
                dist.destroy_process_group()
        except BaseException as e:
            traceback.clear_frames(e.__traceback__)                  # lets go of data loaders: their workers end
            for worker in multiprocessing.active_children():         # ... or are ended; torch would raise for each
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                worker.kill()
            if isinstance(e, Abort):
                message, code = str(e), e.code
            elif isinstance(e, torch.cuda.OutOfMemoryError):
                message, code = (f"{str(e).splitlines()[0]} Give --accum 2 (or 4, 8, ...: 1/2, 1/4, 1/8 of the memory "
                                 "for activations, the same gradients), --grad-checkpointing, or a smaller batch"), 1
            elif isinstance(e, OSError):                             # no space, no permission: the system's words
                message, code = e, 1
            elif isinstance(e, KeyboardInterrupt):
                message, code = "interrupted; the same command continues from the last checkpoint", 130
            else:
                raise
            tqdm.write(f"error: {message}", file=sys.stderr)         # on a line of its own, below any bar
            sys.exit(code)
        finally:
            at_exit.close()
    return wrapped


at_exit = contextlib.ExitStack()                                     # the lock of --out, signal handlers, bars


@contextlib.contextmanager
def saying(what):
    """Prints what is being done if it takes longer than two seconds; by the first process only."""
    timer = threading.Timer(2, lambda: tqdm.write(f"{what} ...", file=sys.stderr))
    timer.daemon = True
    if rank_world()[0] == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def on_signal(number, _):
    """SIGTERM or SIGUSR1, as schedulers send before they kill: in the loop the step's end saves and leaves (Log)."""
    Log.asked = number                                               # a raise can get lost in a fork
    if not Log.in_loop:
        raise Abort(f"{signal.Signals(number).name}: stopped; the same command continues", PREEMPTED)


PREEMPTED = 75                                                       # exit code of a run that a signal ended


# ---- flags ---------------------------------------------------------------------------------------------------------

def flags(doc, out, training=True):
    """An ArgumentParser with the flags that all scripts share; `doc` is the script's docstring, `out` its folder."""
    parser = argparse.ArgumentParser(description=doc, conflict_handler="resolve",
                                     formatter_class=lambda prog: _Help(prog, max_help_position=26, width=110))
    add = parser.add_argument
    add("--data", metavar="ROOT", help="folder with train/<class>/* and val/<class>/*; each other image folder in it "
        "is a shift and is evaluated; without --data: the toy. Here and below NAME:FOLDER is one of torchvision's "
        "sets: " + ", ".join(SETS))
    add("--train", nargs="+", default=["train"], metavar="DIR", help="training folders, in ROOT or anywhere")
    add("--val", metavar="DIR", help="validation folder; 'val' if ROOT has one, else held out of the training images")
    add("--val-frac", type=float, default=0.2, help="fraction of each training class held out where there is no val")
    add("--eval", nargs="+", default=[], metavar="DIR", help="further image folders to evaluate")
    add("--model", default="ViT-B-16-quickgelu", help="an open_clip name, or local-dir:PATH")
    add("--pretrained", default="openai", help="open_clip tag or weights file, '' for random weights; local-dir: "
        "has its own")
    add("--out", default=out, help="folder of everything that is written")
    add("--batch-size", type=int, default=512, help="images in the global batch, over all processes")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="data loading workers of each process")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of the towers in training; bf16 or fp16 on CUDA, else "
        "fp32. Scores are always computed in fp32")
    add("--seed", type=int, default=0, help="of all randomness")
    if training:
        add("--accum", type=int, default=1, metavar="N", help="compute a batch in N chunks: 1/N of the memory for "
            "activations, the gradients of the whole batch for every term, a second forward pass")
        add("--grad-checkpointing", action="store_true", help="recompute activations block by block: less memory")
        add("--compile", action="store_true", help="torch.compile the towers")
        add("--log-every", type=int, default=50, help="steps between lines of log.jsonl")
        add("--save-every", type=int, default=1000, help="steps between checkpoints")
        add("--no-resume", action="store_true", help="start this run anew instead of continuing it")
        add("--overwrite", action="store_true", help="start anew, whatever --out holds")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the docstring as it is, and the default of every flag that has one."""

    def _get_help_string(self, action):
        if action.default in (None, "", []) or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)


def parse(parser, device, argv=None):
    """Parse `argv`; without --data the toy is made and its defaults take the place of ours. Raises Abort."""
    args = parser.parse_args(argv)
    if args.data is None:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "toy.py")
        if not os.path.isfile(path):
            raise Abort("--data ROOT is needed (the toy that stands in for it is not here: no tests/toy.py)")
        spec = importlib.util.spec_from_file_location("toy", path)
        toy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(toy)
        if rank_world()[0] == 0:                                     # one process makes it, the others find it made
            toy.build()
        if dist.is_initialized():
            dist.barrier()
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{k: v for k, v in toy.defaults().items() if k in known})
        args = parser.parse_args(argv)
    least = {0: ("workers", "seed", "lr", "warmup", "wd", "oc", "sd", "cross_fnorm", "lam", "cap", "ret"),
             1: ("batch_size", "epochs", "max_steps", "log_every", "save_every", "ema_every", "k", "accum")}
    for low, name in [(low, name) for low, names in least.items() for name in names]:
        value = getattr(args, name, None)
        if value is not None and not low <= value < (2 ** 63 if name == "seed" else math.inf):
            raise Abort(f"--{name.replace('_', '-')} must be a finite number and at least {low}, not {value}"
                        + " (and less than 2^63)" * (name == "seed"))
    name, folder = _split_name(args.data)
    args.data = f"{name}:{folder}" if name else os.path.abspath(folder)
    if not 0 < args.val_frac < 1:
        raise Abort(f"--val-frac must lie between 0 and 1, not {args.val_frac}")
    world, accum = rank_world()[1], getattr(args, "accum", 1)
    if args.batch_size % (world * accum):
        raise Abort(f"--batch-size {args.batch_size} does not divide by " + " times ".join(
            [f"the {world} processes of torchrun"] * (world > 1) + [f"--accum {accum}"] * (accum > 1)))
    if args.precision is None:
        args.precision = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return args


# ---- device and processes ------------------------------------------------------------------------------------------

def setup():
    """Device of this process: cuda, else mps, else cpu. Under torchrun the process group is opened too."""
    local, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False                      # float32 means it, in convolutions too
        device = torch.device("cuda", local)
    else:                                                            # gloo cannot talk about mps tensors
        device = torch.device("mps" if torch.backends.mps.is_available() and world == 1 else "cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def autocast(device, precision):
    """The context in which towers run. encode_image and encode_text leave it in float32, so losses are float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def gather(x):
    """The rows of all processes, (n, d) -> (N, d) in batch order, with gradient; x itself without torchrun.

    Every process computes the loss of the whole batch, so the gradient of its own rows is complete and needs no
    communication; it is multiplied by the processes, because `average_gradients` divides by them.
    """
    if not dist.is_initialized():
        return x
    rank, world = rank_world()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank] = x.detach() + world * (x - x.detach())              # x, its gradient times world
    return torch.cat(parts)


def average_gradients(parameters):
    """Mean of every parameter's gradient over the processes, in one flat all-reduce."""
    if dist.is_initialized():
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for g, mean in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))


# ---- models --------------------------------------------------------------------------------------------------------

@saying("loading the model")
def load_model(name, pretrained, device):
    """An open_clip model in float32 and eval mode, the transforms of its images, and its tokenizer.

    name: open_clip's, or local-dir:PATH; pretrained: a tag, a weights file, or '' for random weights.
    preprocess_train, preprocess_val: uint8 (3, H, W) -> uint8 (3, S, S), to be normalised later by `to_input`.
    Raises Abort for what open_clip does not have, for a tag made with the other activation (open_clip only warns, and
    accuracy drops silently), and for text towers of other tokenizers than CLIP's.
    """
    if name.startswith("local-dir:"):
        path, pretrained = name[len("local-dir:"):], None
        for file in ("open_clip_config.json", "open_clip_model.safetensors"):
            if not os.path.isfile(os.path.join(path, file)):
                raise Abort(f"--model {name}: there is no {os.path.join(path, file)}")
    elif not name.startswith("hf-hub:"):
        _check_name(name, pretrained)
    try:
        if (open_clip.get_model_config(name) or {}).get("text_cfg", {}).get("hf_tokenizer_name"):
            raise Abort(f"--model {name} has a Hugging Face tokenizer; only models with CLIP's own are supported")
        model = open_clip.create_model(name, pretrained or None, device=device)
    except Abort:
        raise
    except Exception as e:                                 # no network, a truncated or foreign file: open_clip's words
        raise Abort(f"--model {name} --pretrained {pretrained or repr('')} could not be loaded: "
                    f"{' '.join(str(e).split())[:300]}", code=1)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise Abort(f"--model {name} --pretrained {pretrained}: its weights are not finite numbers", code=1)
    # eval mode for good: BatchNorm keeps its pretrained statistics (released CLIP-ResNet code updates them) and
    # stochastic depth is off, so that a step does not depend on how the batch is cut
    model.eval()

    size = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    cfg = model.visual.preprocess_cfg
    if cfg["resize_mode"] not in ("shortest", "squash"):
        raise Abort(f"--model {name}: resize mode '{cfg['resize_mode']}' is not supported, only shortest and squash")
    how = dict(interpolation=InterpolationMode(cfg["interpolation"]), antialias=True)
    preprocess_train = v2.RandomResizedCrop(size, scale=(0.9, 1.0), **how)
    preprocess_val = v2.Compose([v2.Resize(size if cfg["resize_mode"] == "shortest" else (size, size), **how),
                                 v2.CenterCrop(size)])
    return model, preprocess_train, preprocess_val, open_clip.get_tokenizer(name)


def _check_name(name, pretrained):
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name.replace("/", "-"), open_clip.list_models(), 3)
        if os.path.isdir(name):
            raise Abort(f"--model {name} is a folder; write local-dir:{name}")
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise Abort(f"--model {name} is not a model of open_clip{hint}")
    if not pretrained or os.path.isfile(pretrained):
        return
    if not open_clip.is_pretrained_cfg(name, pretrained) and not open_clip.get_pretrained_cfg(name, pretrained):
        raise Abort(f"--pretrained {pretrained} is neither a file nor a tag of {name}; its tags: "
                    + (", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"))
    wants = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    if wants != bool(open_clip.get_model_config(name).get("quick_gelu", False)):
        right = name + "-quickgelu" if wants else name.replace("-quickgelu", "")
        raise Abort(f"--pretrained {pretrained} was trained with {'QuickGELU' if wants else 'GELU'} and --model {name} "
                    f"has the other activation; use --model {right}")


def to_device(x, device):
    """A CPU tensor on the device, without waiting on CUDA; on mps such a copy may read what is already freed."""
    return x.to(device, non_blocking=device.type == "cuda")


def to_input(model, device):
    """The function that makes uint8 images (N, 3, S, S) the model's normalised float input, on the device."""
    mean, std = [torch.tensor(model.visual.preprocess_cfg[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std")]
    return lambda images: (to_device(images, device).float() / 255 - mean) / std


def prepare_towers(model, args):
    """--grad-checkpointing and --compile, in place; the names of the weights stay. Raises Abort."""
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
        if not any(getattr(m, "grad_checkpointing", False) for m in model.visual.modules()):
            raise Abort(f"--grad-checkpointing: the image tower of --model {args.model} has none; give --accum instead")
    if args.compile:
        model.visual.compile()
        getattr(model, "text", model).transformer.compile()


def _in_chunks(encode, model, x, accum):
    """encode(model, x) in `accum` chunks, for the gradient of the whole batch at 1/accum of its activations.

    The forward pass keeps features only, so a loss may compare all of them; the backward pass computes chunk by chunk
    again, each with the gradient that its features got (GradCache, Gao et al., 2021).
    """
    return torch.cat([checkpoint(encode, model, chunk, use_reentrant=False, preserve_rng_state=False)
                      for chunk in x.chunk(accum)])


def normalize(x):
    """L2-normalised rows of x (N, d), in float32, or float64 if x is."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def encode_image(model, images, accum=1):
    """Normalised images (N, 3, S, S) -> L2-normalised features (N, d), float32; in `accum` chunks (_in_chunks)."""
    if accum > 1:
        return _in_chunks(encode_image, model, images, accum)
    return normalize(model.encode_image(images))


def encode_text(model, tokens, accum=1):
    """Tokens (N, L) -> L2-normalised features (N, d), float32; in `accum` chunks (_in_chunks).

    A causal tower pooled at the end-of-text token never looks behind it, so the batch is cut at its longest prompt:
    the features are open_clip's, at a fraction of the work. Other towers run at full length. Tokens best come from
    the CPU: finding the longest prompt on a GPU would wait for it.
    """
    if accum > 1:
        return _in_chunks(encode_text, model, tokens, accum)
    text = getattr(model, "text", model)                             # CustomTextCLIP keeps its tower in .text
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    if not causal or pool != "argmax":
        return normalize(model.encode_text(tokens.to(model.logit_scale.device)))
    end = tokens.argmax(-1)                                          # the end-of-text token has the highest number
    L = int(end.max()) + 1
    tokens, end = (to_device(t, model.logit_scale.device) for t in (tokens[:, :L], end))
    x = text.token_embedding(tokens) + text.positional_embedding[:L]                               # (N, L, width)
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:L, :L]))
    x = x[torch.arange(len(x), device=x.device), end]                                              # (N, width)
    if isinstance(text.text_projection, torch.nn.Linear):
        x = text.text_projection(x)
    elif text.text_projection is not None:
        x = x @ text.text_projection
    return normalize(x)                                                                            # (N, d)


def write_tensors(path, tensors, **metadata):
    """Write safetensors, atomically; by the first process only. metadata: strings."""
    if rank_world()[0] == 0:
        with replacing(path) as f:
            f.write(safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def sha256(*parts):
    """Hex digest of tensors' bytes and of everything else's str, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.cpu().contiguous().view(-1).view(torch.uint8).numpy() if isinstance(part, torch.Tensor)
                      else f"{part}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def cached(path, digest, make):
    """The tensor in the safetensors file `path` if it was made from `digest`, else make() and write it there."""
    try:
        with safetensors.safe_open(path, "pt") as f:
            if f.metadata() == {"made_from": digest}:
                return f.get_tensor("cached")
    except (OSError, safetensors.SafetensorError):                   # none there, or broken: make it anew
        pass
    made = make()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_tensors(path, {"cached": made}, made_from=digest)
    return made


def export(model, name, path):
    """Write the weights as an open_clip `local-dir:`; `name` is what the model was loaded as. float32 safetensors."""
    os.makedirs(path, exist_ok=True)
    write_tensors(os.path.join(path, "open_clip_model.safetensors"), model.state_dict())
    write_json(os.path.join(path, "open_clip_config.json"),
               {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": model.visual.preprocess_cfg})


# ---- heads and losses ----------------------------------------------------------------------------------------------

def prompt_texts(classnames, templates):
    """Every class name in every template, K * M strings. templates: callables, or strings with {}."""
    return [t(c) if callable(t) else t.replace("{}", c) for c in classnames for t in templates]


@saying("tokenising the prompts")
def prompts(tokenizer, classnames, templates):
    """Every class name in every template as tokens, (K, M, L) long."""
    tokens = tokenizer(prompt_texts(classnames, templates))                                        # (K*M, L)
    cut = int((tokens.argmax(-1) == tokens.shape[1] - 1).sum())
    if cut and rank_world()[0] == 0:
        print(f"warning: {cut} prompts fill all {tokens.shape[1]} tokens; what is beyond them is cut off")
    return tokens.view(len(classnames), len(templates), -1)


@saying("encoding the prompts of a zero-shot head")
@torch.no_grad()
def text_embeddings(model, tokenizer, classnames, templates):
    """Text features of every class in every template, (K, M, d), each L2-normalised."""
    tokens = prompts(tokenizer, classnames, templates).flatten(0, 1)                               # (K*M, L)
    order = tokens.argmax(-1).argsort()                              # by length, so that each batch is cut short
    E = torch.cat([encode_text(model, t) for t in tokens[order].split(1024)])                      # (K*M, d)
    return E[order.argsort()].view(len(classnames), len(templates), -1)


def class_head(E):
    """Zero-shot classifier W_cls (K, d) of text embeddings E (K, M, d): the normalised mean over templates."""
    return F.normalize(E.mean(1), dim=-1)


def similarity(image_features, text_features, logit_scale):
    """S = logit_scale * u v^T of the global batch, (n, d) and (n, d) of this process -> (N, N), rows are images."""
    return logit_scale * gather(image_features) @ gather(text_features).T


def clip_loss(S):
    """CE2(S): mean of the cross-entropies of rows and columns of S (N, N), where pair i belongs to i."""
    target = torch.arange(len(S), device=S.device)
    return (F.cross_entropy(S, target) + F.cross_entropy(S.T, target)) / 2


def contrastive_loss(image_features, text_features, logit_scale):
    """CLIP's symmetric contrastive loss (Radford et al., 2021, figure 3) over the global batch: scalar.

    image_features, text_features: (N, d), L2-normalised; under torchrun (n, d) of this process, the others' are
    gathered. logit_scale: already exponentiated, as in open_clip.
    """
    return clip_loss(similarity(image_features, text_features, logit_scale))


# ---- image folders -------------------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Image files with labels. base/files[i] has class classes[labels[i]] and is called classnames[labels[i]].

    Evaluated with the training head, the logit of classes[k] is the greatest of its columns columns[k], mostly one;
    columns None: a class was not trained on, and the set gets a zero-shot head of its own, with its own `templates` if
    it has some. `border` pixels are cut off on each side. group: the --eval folder of image folders that the set is
    part of. pixels {group: (n, H, W, 3)}: where file group/17 is no file but row 17 of an array.
    """

    def __init__(self, name, base, files, labels, classes, classnames=None, columns=None, pixels={}):
        self.name, self.base, self.classes, self.classnames, self.columns = name, base, classes, classnames, columns
        self.border, self.group, self.templates, self.pixels = 0, None, None, pixels
        self.bad = []                                                # what training said of those it could not read
        # one block of bytes, which workers share
        self.files = files if isinstance(files, np.ndarray) else np.array([os.fsencode(f) for f in files])
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self):
        return len(self.files)

    def file(self, i):
        return os.fsdecode(bytes(self.files[i]))                     # relative to base

    def path(self, i):
        return os.path.join(self.base, self.file(i))

    def read(self, i):
        group, _, row = self.file(i).rpartition("/")
        if group in self.pixels:
            return torch.from_numpy(self.pixels[group][int(row)]).permute(2, 0, 1)
        b, x = self.border, read_image(self.path(i))
        return x[:, b:x.shape[1] - b, b:x.shape[2] - b]

    def take(self, keep, name):
        return Images(name, self.base, self.files[keep], self.labels[keep], self.classes, self.classnames, self.columns,
                      self.pixels)


class Root:
    """What a ROOT holds: train, val and shifts (Images), classes (folder names), classnames, templates; test, the name
    of the one of `shifts` that is none, but val's sibling."""


def _subfolders(path):
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def _image_files(path):
    """Image files below a folder, relative to it, sorted."""
    return sorted(os.path.relpath(os.path.join(top, f), path) for top, _, files in os.walk(path) for f in files
                  if f.lower().endswith(IMG_EXTENSIONS))


def _is_image_folder(path):
    return any(e.is_file() and e.name.lower().endswith(IMG_EXTENSIONS)
               for c in _subfolders(path) for e in os.scandir(os.path.join(path, c)))


def _scan(path, base, name=None):
    """The Images of path/<class>/*, with paths relative to `base`. Raises Abort."""
    if not os.path.isdir(path):
        raise Abort(f"{path} is not a folder (expected image folders: {path}/<class>/*.jpg)")
    classes, files, labels = _subfolders(path), [], []
    if not classes:
        raise Abort(f"{path} holds no class folders (expected {path}/<class>/*.jpg)")
    for k, c in enumerate(classes):
        found = _image_files(os.path.join(path, c))
        if not found:
            raise Abort(f"class folder {os.path.join(path, c)} holds no image ({', '.join(IMG_EXTENSIONS)})")
        prefix = os.path.relpath(os.path.join(path, c), base)
        if prefix.startswith(os.pardir):                             # elsewhere: `base` may be a link, and .. go astray
            prefix = os.path.abspath(os.path.join(path, c))
        files.append(np.array([os.fsencode(os.path.join(prefix, f)) for f in found]))
        labels.append(np.full(len(found), k))
    return Images(name or os.path.basename(os.path.normpath(path)), base, np.concatenate(files), np.concatenate(labels),
                  classes)


# torchvision's sets: its class, the splits to train on, for val (None: held out) and to test on, CLIP's first template
SETS = {
    "cifar10": ("CIFAR10", ("train", None, "test"), "a photo of a {}."),
    "cifar100": ("CIFAR100", ("train", None, "test"), "a photo of a {}."),
    "food101": ("Food101", ("train", None, "test"), "a photo of {}, a type of food."),
    "cars": ("StanfordCars", ("train", None, "test"), "a photo of a {}."),
    "pets": ("OxfordIIITPet", ("trainval", None, "test"), "a photo of a {}, a type of pet."),
    "aircraft": ("FGVCAircraft", ("train", "val", "test"), "a photo of a {}, a type of aircraft."),
    "flowers102": ("Flowers102", ("train", "val", "test"), "a photo of a {}, a type of flower."),
    "dtd": ("DTD", ("train", "val", "test"), "a photo of a {} texture."),
}


def _split_name(path):
    """(NAME, folder) of NAME:FOLDER, (None, path) of any other path."""
    name, colon, folder = path.partition(":")
    return (name, os.path.abspath(folder)) if colon and name in SETS else (None, path)


def _torchvision(path, part, title):
    """The Images of a split (0: to train on, 1: val, 2: to test on) of NAME:FOLDER, downloaded if need be; or Abort."""
    name, folder = _split_name(path)
    (cls, splits, template), rank = SETS[name], rank_world()[0]
    if splits[part] is None:
        raise Abort(f"--val {path}: {name} has no val split; without --val some of its training images are held out")
    if not os.path.isdir(folder):
        raise Abort(f"{path}: {folder} is not a folder (make it, and {name} is downloaded into it)")
    if name in ("cars", "flowers102") and importlib.util.find_spec("scipy") is None:
        raise Abort(f"{path}: torchvision reads {name} by scipy: pip install scipy")
    split = {"train": part < 2} if name.startswith("cifar") else {"split": splits[part]}
    make = functools.partial(getattr(torchvision.datasets, cls), folder, **split)
    try:
        if rank == 0:                                                # one process downloads, the others find it there
            try:
                make()
            except RuntimeError:
                print(f"{name} is not in {folder}, or not whole: downloading it")
                make(download=True)
        if dist.is_initialized():
            dist.barrier()
        d = make()
        classes = d.classes                                          # Flowers102 of torchvision 0.19 has none
        labels = getattr(d, "targets", None) or getattr(d, "_labels", None) or [y for _, y in d._samples]
    except Exception as e:                                           # no network, a dead address, broken annotations
        raise Abort(f"{path}: torchvision {torchvision.__version__} cannot open or download {cls} in {folder} "
                    f"({type(e).__name__}: {' '.join(str(e).split())[:200]})", code=1)
    pixels = {}
    if hasattr(d, "data"):                                           # CIFAR is not files
        pixels = {f"{name}:{splits[part]}": d.data}
        files = [f"{name}:{splits[part]}/{i}" for i in range(len(d))]
    else:
        files = getattr(d, "_image_files", None) or getattr(d, "_images", None) or [f for f, _ in d._samples]
        files = [os.path.relpath(f, folder) for f in files]
    images = Images(title, folder, files, labels, list(classes), _classnames(classes, folder), pixels=pixels)
    images.templates = [template]
    return images


def _open(path, base, part, name=None):
    """The Images of a class folder (relative to base or not), or of split `part` of NAME:FOLDER, called `name`."""
    own, _ = _split_name(path)
    return _torchvision(path, part, name or own) if own else _scan(os.path.join(base, path), base, name)


def read_lines(path):
    """The lines of a text file. Raises Abort."""
    try:
        with open(path, encoding="utf-8-sig") as f:                  # some editors begin a file with a mark
            return f.read().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise Abort(f"{path} cannot be read as UTF-8 text ({e})")


def _classnames(classes, root):
    """Names of class folders: root/classnames.txt > ImageNet's wnids (OpenAI's names) > the folder, _ as space."""
    path, names = os.path.join(root, "classnames.txt"), {}
    if os.path.isfile(path):
        for i, line in enumerate(read_lines(path), 1):
            if line.strip():
                if line.count("\t") != 1 or not all(part.strip() for part in line.split("\t")):
                    raise Abort(f"{path} line {i}: expected folder<TAB>name, found {line.strip()!r}")
                folder, name = line.split("\t")
                names[folder.strip()] = name.strip()
    imagenet = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
    called = [names.get(c) or imagenet.get(c) or c.replace("_", " ") for c in classes]
    first = {}
    for c, name in zip(classes, called):                             # of ImageNet's own names two occur twice
        if first.setdefault(name, c) != c and not (c in imagenet and c not in names):
            raise Abort(f"{root}: classes {first[name]} and {c} have the same name, '{name}'; give each its own in "
                        f"{path}")
    return called


def _templates(root):
    """Prompt templates: root/templates.txt, a line each with {} where the class goes > OpenAI's 80."""
    path = os.path.join(root, "templates.txt")
    if not os.path.isfile(path):
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines or not all("{}" in line for line in lines):
        raise Abort(f"{path}: expected one template a line, each with {{}} where the class name goes")
    return lines


def _match(images, root, classnames_root):
    """Say which columns of the training head the classes of an evaluation set are, in place."""
    index, found = {c: k for k, c in enumerate(root.classes)}, set(images.classes)
    if not found <= set(index) and found == set(map(str, range(len(index)))):
        index = {str(k): k for k in range(len(index))}               # ImageNet-V2: the folder name is the index
    if found <= set(index):                                          # all of the training classes, or a subset
        images.columns = [[index[c]] for c in images.classes]
        images.classnames = [root.classnames[k] for k, in images.columns]
    else:
        images.classnames = images.classnames or _classnames(images.classes, classnames_root)
        new = [c for c in images.classes if c not in index]
        if rank_world()[0] == 0:
            print(f"{images.name}: {len(new)} of its {len(images.classes)} classes were not trained on "
                  f"({', '.join(new[:3])}{', ...' * (len(new) > 3)}): zero-shot head, not in the shift mean")
    return images


def _objectnet(path, root, name):
    """The Images of ObjectNet as it unpacks: path/images/<folder>/*.png and path/mappings. Raises Abort.

    Where the training classes are ImageNet's 1000, of its 313 classes the 113 that are also ImageNet's count, each with
    the logits of all ImageNet classes it maps to; elsewhere all, zero-shot. The red border of 2 pixels is cut off.
    """
    mapping = functools.partial(os.path.join, path, "mappings")
    images = _scan(os.path.join(path, "images"), path, name)
    labels = read_json(mapping("folder_to_objectnet_label.json"))    # {folder: label}
    strange = [c for c in images.classes if c not in labels]
    if strange:
        raise Abort(f"{path}/images/{strange[0]} is not in {path}/mappings/folder_to_objectnet_label.json")
    images.classnames, images.border = [labels[c] for c in images.classes], 2
    if root.classes == ImageNetInfo().label_names():
        names = read_json(mapping("objectnet_to_imagenet_1k.json"))  # {label: "name; name"} for the 113
        line = {name: i for i, name in enumerate(read_lines(mapping("imagenet_to_label_2012_v2")))}
        index = {i: int(k) for k, i in read_json(mapping("pytorch_to_imagenet_2012_id.json")).items()}   # line: logit
        kept = [k for k, label in enumerate(images.classnames) if label in names]
        try:
            images.columns = [[index[line[name]] for name in names[images.classnames[k]].split("; ")] for k in kept]
        except KeyError as e:
            raise Abort(f"{path}/mappings: the files do not agree, {e} has no index")
        images.classes, images.classnames = [[x[k] for k in kept] for x in (images.classes, images.classnames)]
        rows = np.isin(images.labels, kept)
        images.files, images.labels = images.files[rows], np.searchsorted(kept, images.labels[rows])
    return images


def _eval_sets(path, root, classnames_root, name=None):
    """The evaluation sets of a folder: itself, or those of its subfolders (ImageNet-C's corruption/severity/class)."""
    if _split_name(path)[0]:
        return [_match(_open(path, root.base, 2, name), root, None)]
    if os.path.basename(os.path.normpath(path)) == "images" and os.path.isdir(os.path.join(path, "..", "mappings")):
        path = os.path.dirname(os.path.abspath(path))                # of ObjectNet, the folder above is meant
    name = name or os.path.basename(os.path.normpath(path))
    if os.path.isdir(os.path.join(path, "mappings")) and os.path.isdir(os.path.join(path, "images")):
        return [_objectnet(path, root, name)]
    inner = [d for d in _subfolders(path) if _subfolders(os.path.join(path, d))] if os.path.isdir(path) else []
    if not inner or _is_image_folder(path):
        return [_match(_scan(path, root.base, name), root, classnames_root)]
    sets = [s for d in inner for s in _eval_sets(os.path.join(path, d), root, classnames_root, f"{name}/{d}")]
    for s in sets:
        s.group = name
    return sets


def val_folder(data, val):
    """Where val is, by --data and --val: --val, ROOT/val, NAME:FOLDER itself; None: held out of the training images."""
    own, base = _split_name(data)
    return val or (data if own and SETS[own][1][1] else "val" if not own and os.path.isdir(f"{base}/val") else None)


@saying("reading the image folders")
def read_root(args, need_train=True):
    """Read --data, --train, --val, --val-frac and --eval into a Root. Raises Abort for what does not fit together.

    Each may be NAME:FOLDER, one of torchvision's SETS; as --data it is trained on and evaluated by its own splits.
    need_train False (evaluation): where there is a val, of the training folders only the class names are read, and
    without those folders val's classes stand in for them.
    """
    root, (own, base) = Root(), _split_name(args.data)
    if not os.path.isdir(base):
        raise Abort(f"--data {args.data} is not a folder" + (
            f", and torchvision's sets are {', '.join(SETS)}" if ":" in args.data else ""))
    root.base = base
    where = lambda d: d if _split_name(d)[0] else os.path.join(base, d)
    folders, val = [args.data] if own and args.train == ["train"] else args.train, val_folder(args.data, args.val)
    missing = [d for d in folders if not _split_name(d)[0] and not os.path.isdir(where(d))]
    if missing and (need_train or val is None):
        raise Abort(f"--data {base} has no folder {missing[0]} (expected {where(missing[0])}/<class>/*.jpg; --train "
                    "names another)")

    if need_train or val is None:
        parts = [_open(d, base, 0) for d in folders]
        root.classes = sorted(set().union(*(p.classes for p in parts)))
        labels = [[root.classes.index(c) for c in p.classes] for p in parts]
        groups = [p.labels + 10**6 * i for i, p in enumerate(parts)]                 # a class of a training folder
        files = [p.files if p.base == base or p.pixels else np.array([os.fsencode(p.path(i)) for i in range(len(p))])
                 for p in parts]
        pixels = {group: rows for p in parts for group, rows in p.pixels.items()}
        train = Images("train", base, np.concatenate(files), np.concatenate(
            [np.take(lab, p.labels) for lab, p in zip(labels, parts)]), root.classes, pixels=pixels)
    else:
        of_classes = [_torchvision(d, 0, "train").classes if _split_name(d)[0] else _subfolders(where(d))
                      for d in ([val] if missing else folders)]
        root.classes, train = sorted(set().union(*of_classes)), None
    if len(root.classes) < 2:
        raise Abort(f"{where(args.train[0])} holds {len(root.classes)} class folder(s); classification needs two")
    root.classnames, root.templates = _classnames(root.classes, base), _templates(base)
    if train is not None:
        train.classnames = root.classnames

    if val is not None:
        root.val = _open(val, base, 1, "val")
        lacking = sorted(set(root.val.classes) - set(root.classes))
        if lacking:
            raise Abort(f"--val {where(val)} has classes that training lacks: {', '.join(lacking[:5])}"
                        + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""))
        root.val.labels = np.take([root.classes.index(c) for c in root.val.classes], root.val.labels)
    else:                                                            # hold some of every class of every folder out:
        held = np.zeros(len(train), bool)                            # by a hash, so that a lost image moves no other
        rank = np.array([hashlib.sha256(b"%d " % args.seed + bytes(f)).digest()[:8] for f in train.files])
        groups = np.concatenate(groups)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            count = min(max(round(args.val_frac * len(members)), 1), len(members) - 1)
            held[members[np.argsort(rank[members])[:count]]] = True
        if not held.any():
            raise Abort(f"{base} has no val/ and too few images a class to hold some out; name a folder with --val")
        root.val, train = train.take(held, "val"), train.take(~held, "train")
    root.train, root.val.classes, root.val.classnames = train, root.classes, root.classnames
    root.val.columns = [[k] for k in range(len(root.classes))]       # val is never scored on a subset of the classes

    used = {os.path.realpath(where(d)) for d in [*folders, val or "train"]}
    others = [] if own else [where(d) for d in _subfolders(base) if os.path.realpath(where(d)) not in used]
    shifts = [d for d in others if _is_image_folder(d) or os.path.isdir(os.path.join(d, "mappings"))]
    if rank_world()[0] == 0:
        for d in others:
            if d not in shifts:
                print(f"{d}: not an image folder, not evaluated (if it holds image folders, name it with --eval)")
    root.shifts, root.test = _eval_sets(args.data, root, base, "test") if own else [], "test" if own else None
    for d in shifts + args.eval:
        sets = _eval_sets(d, root, base if d in others else os.path.dirname(os.path.abspath(d)))
        if any(s.name == other.name for s in sets for other in [root.val, *root.shifts]):          # two of one name
            sets = _eval_sets(d, root, os.path.dirname(os.path.abspath(d)), os.path.normpath(d))
        root.shifts += sets
    return root


# ---- reading images ------------------------------------------------------------------------------------------------

def read_image(path, offset=0, size=-1):
    """Decode an image file, or `size` bytes of it from `offset`: uint8 RGB (3, H, W). Raises Abort (code 1).

    By torchvision, and by Pillow what torchvision refuses. 16-bit values are scaled down; of an animation the first
    frame counts; orientation tags are ignored, as by open_clip. Images of more than 89 million pixels (Pillow's limit),
    or more than 100 times as long as wide, are refused by their header: resized, they would fill the memory.
    """
    try:
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read(size)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:              # reads the header only
                if max(image.size) > 100 * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels")
        try:
            x = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            x = x[0] if x.ndim == 4 else x
            return x if x.dtype == torch.uint8 else (x.float() / 257).round().to(torch.uint8)
        except (RuntimeError, ValueError):
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith("I"):                       # 16-bit grey, which convert() would clip
                    image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except Exception as e:                                           # Pillow raises whatever its plugins raise
        why = isinstance(e, OSError) and e.strerror or " ".join(str(e).split(" <")[0].split())[:120]
        where = f"{path} at byte {offset}" if offset else path
        raise Abort(f"{where}: not readable as an image ({type(e).__name__}: {why})", code=1)


class TrainImages(torch.utils.data.Dataset):
    """Items (epoch, i) of Images: crop uint8 (3, S, S), label, i, a random number for the script's own draws, and "".

    All are functions of (seed, epoch, i) alone: not of workers, ranks, or a resume. In place of an image that cannot be
    read another one is drawn, and instead of "" stands why.
    """

    def __init__(self, images, preprocess, seed):
        self.images, self.preprocess, self.seed = images, preprocess, seed

    def __getitem__(self, item):
        (epoch, i), error = item, ""
        state = np.random.SeedSequence([self.seed, epoch, i]).generate_state(2, np.uint32)
        for other in np.random.default_rng(state).integers(len(self.images), size=20):
            try:
                image = self.images.read(i)
                break
            except Abort as e:
                error, i = error or str(e), int(other)
        else:
            raise Abort(f"{error}; nor can 19 others", code=1)
        with torch.random.fork_rng(devices=[]):                      # transforms.v2 draws from the global generator
            torch.manual_seed(int(state[0]))
            image = self.preprocess(image)
        return image, int(self.images.labels[i]), i, int(state[1]), error


def batches(n, batch_size, steps, seed, start=0):
    """Batches of (epoch, i) for this process, of steps start..steps-1: the n images in a new order each epoch, end to
    end, cut into batches.

    Each image comes once an epoch; a batch may hold the end of one epoch and the start of the next. Process r takes
    the r-th part of every global batch.
    """
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(n))
    rank, world = rank_world()
    share = batch_size // world
    for step in range(start, steps):
        first = step * batch_size + rank * share
        places = [divmod(p, n) for p in range(first, first + share)]
        yield [(epoch, int(order(epoch)[i])) for epoch, i in places]


def train_loader(images, preprocess, args, steps, device, start=0, batch_size=None, seed=None):
    """Batches of (images uint8 (n, 3, S, S), labels (n,), indices (n,), draws (n,)) for steps start..steps-1.

    Images that cannot be read are named once, in images.bad too. Raises Abort where they are over 1 %.
    """
    seed = args.seed if seed is None else seed
    loader = torch.utils.data.DataLoader(
        TrainImages(images, preprocess, seed), num_workers=args.workers, pin_memory=device.type == "cuda",
        batch_sampler=batches(len(images), batch_size or args.batch_size, steps, seed, start),
        worker_init_fn=quiet_worker)
    for *batch, errors in loader:
        for error in set(errors) - {"", *images.bad}:
            images.bad.append(error)
            tqdm.write(f"warning: {error}; another image takes its place", file=sys.stderr)
        if len(images.bad) > 0.01 * len(images):
            raise Abort(f"{len(images.bad)} of {len(images)} images to train on cannot be read, which is over 1 %; the "
                        f"first: {images.bad[0]}", code=1)
        yield batch


def quiet_worker(_):
    """Workers live until their process leaves, not by the signals that are sent to both (SIGTERM: 10 minutes more)."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


def total_steps(args, n):
    """Optimiser steps of a run over n images: epochs in whole batches, at most --max-steps. Raises Abort."""
    if args.batch_size > n:
        raise Abort(f"--batch-size {args.batch_size} is more than the {n} training images; give a smaller one")
    steps = min(args.epochs * n // args.batch_size, args.max_steps or math.inf)
    if args.warmup >= steps and rank_world()[0] == 0:
        print(f"warning: --warmup {args.warmup} in a run of {steps} steps: --lr is never reached")
    return steps


# ---- evaluation ----------------------------------------------------------------------------------------------------

def ece(confidence, correct, bins=15):
    """Expected calibration error (Guo et al., 2017): sum over bins of n_bin/n * |accuracy - confidence|, in [0, 1].

    confidence (n,) in [0, 1]; correct (n,) of 0 and 1; `bins` equal-width bins. Of a whole set, never of a batch.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(where, correct - confidence, minlength=bins)   # n_bin * (accuracy - confidence)
    return float(np.abs(gap).sum() / len(confidence))


class EvalImages(torch.utils.data.Dataset):
    """Each of the Images ready for each of the models, and whether it could be read."""

    def __init__(self, images, preprocesses, skip=False):
        self.images, self.preprocesses, self.skip = images, preprocesses, skip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        try:
            x, readable = self.images.read(i), True
        except Abort:
            if not self.skip:
                raise
            x, readable = torch.zeros(3, 8, 8, dtype=torch.uint8), False
        return [preprocess(x) for preprocess in self.preprocesses], readable


@torch.no_grad()
def image_features(models, preprocesses, sets, args, device, title="evaluating", skip=False, dtype=torch.float32,
                   precision="fp32"):
    """For every model the features (n, d) of every set of Images, as `dtype` on the CPU, in file order.

    Each image is decoded once for all models. An unreadable one ends the program, or with `skip` has NaN for features.
    Process r reads images r, r + world, ...: each image once, whatever the sizes; all processes get all features.
    """
    rank, world = rank_world()
    images = torch.utils.data.ConcatDataset([EvalImages(s, preprocesses, skip) for s in sets])
    prepare = [to_input(model, device) for model in models]
    if len(images) < world:
        raise Abort(f"{len(images)} images cannot be shared out to {world} processes")
    mine = torch.utils.data.Subset(images, range(rank, len(images), world))
    loader = torch.utils.data.DataLoader(mine, max(1, args.batch_size // world), num_workers=args.workers,
                                         pin_memory=device.type == "cuda", worker_init_fn=quiet_worker)
    parts = [[] for _ in models]
    for crops, readable in tqdm(loader, title, unit="batch", leave=False, disable=rank != 0):
        for model, to_float, x, part in zip(models, prepare, crops, parts):
            with autocast(device, precision):
                u = encode_image(model, to_float(x)).to("cpu", dtype)                              # (batch, d)
            part.append(u.masked_fill(~readable[:, None], math.nan))
    out = []
    for features in map(torch.cat, parts):
        if world > 1:                                                # each row is one process's, and 0 elsewhere
            full = torch.zeros(len(images), features.shape[1], device=device)
            full[rank::world] = features.to(device, torch.float32)
            dist.all_reduce(full)
            features = full.to("cpu", dtype)
        out.append(features.split([len(s) for s in sets]))
    return out


def scores(logits, labels):
    """Whole-set scores of logits (n, K) and labels (n,): top1, its standard error, ece, nll, brier; fractions and nats.

    ece has 15 bins over the whole set. ece_batch10 is what the released CaRot code reports and its tables probably
    show: 10 bins on batches of 512 in file order, averaged; biased upwards, here for comparison only.
    """
    labels = torch.as_tensor(labels)
    log_p = torch.cat([F.log_softmax(part.float(), -1) for part in logits.split(8192)])            # (n, K)
    confidence, predicted = log_p.exp().max(-1)
    correct = (predicted == labels).numpy()
    cuts = range(0, len(labels), 512)
    batch = [ece(confidence[i:i + 512], correct[i:i + 512], 10) * len(correct[i:i + 512]) for i in cuts]
    p_label = log_p.gather(1, labels[:, None]).squeeze(1)                                          # (n,)
    brier = (log_p.exp().square().sum(1) - 2 * p_label.exp() + 1).mean()                           # sum_k (p_k - y_k)^2
    top1 = float(correct.mean())
    return {"top1": top1, "top1_se": math.sqrt(top1 * (1 - top1) / len(labels)), "ece": ece(confidence, correct),
            "ece_batch10": sum(batch) / len(labels), "nll": float(-p_label.mean()), "brier": float(brier)}


@torch.no_grad()
def evaluate(model, tokenizer, preprocess, root, args, device, head=None, title="evaluating"):
    """Scores on val and every shift, as `summary` has them; in float32, as bf16 moves images between near ties.

    head (K, d): the classifier of the training classes; None for the zero-shot head of the model's own text tower.
    """
    features, = image_features([model], [preprocess], [root.val, *root.shifts], args, device, title)
    results = {}
    for images, _, logits, labels, about in set_logits(model, tokenizer, root, features, device, head):
        results[images.name] = {**about, **scores(logits, labels)}
    return summary(results, root)


@torch.no_grad()
def set_logits(model, tokenizer, root, features, device, head=None, precision="fp32", keep=None):
    """For every set: its Images, the rows (n,) of them that could be read (features, of every set, not NaN), their
    logits (n, K) times tau, their labels (n,), and what the results say of the set beside its scores.

    keep: a folder in which zero-shot heads are kept, by the content of what made them.
    Kinds of head: "all" training classes, a "subset" of them, or "zero-shot": its own, as a class was not trained on.
    """
    texts = [w for k, w in model.state_dict().items() if not k.startswith("visual.")]
    weights = sha256(model, precision, *texts) if keep else None

    @functools.lru_cache(None)
    def zero_shot(names, templates):                                 # (K, d)
        def make():
            with autocast(device, precision):
                return class_head(text_embeddings(model, tokenizer, names, templates)).float().cpu()
        if keep is None:
            return make()
        digest = sha256(weights, *prompt_texts(names, templates))
        return cached(os.path.join(keep, digest[:16] + ".safetensors"), digest, make)
    tau = model.logit_scale.exp().float().cpu()
    for images, u in zip([root.val, *root.shifts], features):
        corrupt, rows = u[:, 0].isnan().nonzero().squeeze(1).tolist(), (~u[:, 0].isnan()).nonzero().squeeze(1)
        if not len(rows):
            raise Abort(f"no image of {images.name} can be read", code=1)
        if images.columns is None:
            W = zero_shot(tuple(images.classnames), tuple(images.templates or root.templates))     # (K of the set, d)
            logits, kind = tau * u[rows] @ W.T, "zero-shot"                                        # (n, K of the set)
        else:
            W = zero_shot(tuple(root.classnames), tuple(root.templates)) if head is None else head.float().cpu()
            wide = max(map(len, images.columns))                     # of a class's columns the greatest counts
            index = torch.tensor([c + c[:1] * (wide - len(c)) for c in images.columns])    # (K of the set, wide)
            logits = (tau * u[rows] @ W.T)[:, index].amax(2)                                       # (n, K of the set)
            kind = "all" if logits.shape[1] == len(root.classes) else "subset"
        about = {"n": len(rows), "classes": len(images.classes), "skipped": len(corrupt), "head": kind}
        if corrupt:
            about["skipped_files"] = [images.path(i) for i in corrupt]
        yield images, rows, logits, torch.from_numpy(images.labels)[rows], about


def summary(results, root):
    """{"sets": results, "means": {folder: means of the sets below it}, "shift_mean": {"top1", "ece"}}.

    A set with classes that were not trained on stays out of shift_mean, and so does the test split that belongs to
    val; a folder of image folders counts once.
    """
    def mean(names):
        return {k: sum(results[name][k] for name in names) / len(names) for k in ("top1", "ece")}
    folders, units = {}, {}                                          # {folder: its sets}, {what counts once: its sets}
    for s in root.shifts:
        inner = s.name[len(s.group) + 1:].split("/")[:-1] if s.group else []
        for depth in range(len(inner) + 1 if s.group else 0):
            folders.setdefault("/".join([s.group, *inner[:depth]]), []).append(s.name)
        if s.columns is not None and s.name != root.test:
            units.setdefault(s.group or s.name, []).append(s.name)
    once = [mean(names) for names in units.values()]
    return {"sets": results, "means": {folder: mean(names) for folder, names in folders.items()},
            "shift_mean": {k: sum(m[k] for m in once) / len(once) for k in ("top1", "ece")} if once else None}


def table(columns):
    """The results of several models on the same sets, {title: summary(...)}, as text: top-1 and ECE in percent.

    As many models side by side as 100 columns hold, the others below.
    """
    def short(name, most=40):
        return name if len(name) <= most else "..." + name[3 - most:]
    first = next(iter(columns.values()))
    wide = max(14, *(len(short(name)) + 2 for name in first["sets"]), *(len(short(f)) + 7 for f in first["means"]))
    fit = max(1, (100 - wide - 15) // 22)
    if len(columns) > fit:
        parts = [list(columns)[i:i + fit] for i in range(0, len(columns), fit)]
        return "\n\n".join(table({title: columns[title] for title in part}) for part in parts)
    titles = [short(title, 21) for title in columns]
    lines = [" " * (wide + 15) + "".join(f"{title:>22}" for title in titles),
             f"{'set':<{wide}}{'images':>7}{'classes':>8}" + f"{'top-1':>8}{'± se':>6}{'ECE':>8}" * len(columns)]

    def row(name, n, classes, cells):
        error = [f"±{100 * c['top1_se']:.1f}" if "top1_se" in c else "" for c in cells]
        return f"{name:<{wide}}{n:>7}{classes:>8}" + "".join(
            f"{100 * c['top1']:>8.2f}{e:>6}{100 * c['ece']:>8.2f}" for c, e in zip(cells, error))
    for own in (False, True):                                        # sets with classes not trained on come last
        for name, r in first["sets"].items():
            if (r["head"] == "zero-shot") == own:
                cells = [c["sets"][name] for c in columns.values()]
                lines.append(row(short(name) + " *" * own, r["n"], r["classes"], cells))
        if not own:
            for f in first["means"]:
                lines.append(row("mean " + short(f), "", "", [c["means"][f] for c in columns.values()]))
            if first["shift_mean"]:
                lines.append(row("shift mean", "", "", [c["shift_mean"] for c in columns.values()]))
    if any(r["head"] == "zero-shot" for r in first["sets"].values()):
        lines.append("* classes not trained on: scored by a zero-shot head of their own, not in the shift mean")
    return "\n".join(lines)


def report(results):
    """Print the closing table of a run: zero-shot beside fine-tuned."""
    if rank_world()[0] == 0:
        print(table({"zero-shot": results["zero_shot"], "fine-tuned": results}))


# ---- schedule and files --------------------------------------------------------------------------------------------

def cosine_lr(step, total, warmup, peak):
    """Learning rate of a step: linear up to `peak` over `warmup` steps, then a cosine down to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@contextlib.contextmanager
def replacing(path):
    """A binary file to write in place of `path`: the old one stays until the new one is on disk, whole."""
    try:
        with open(path + ".tmp", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:                             # torch.save has a RuntimeError for a full disk
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        old = "; the one from before is kept" if os.path.exists(path) else ""
        raise Abort(f"{path} could not be written ({' '.join(str(e).split())[:200]}){old}", code=1)


def write_json(path, data):
    """Write JSON, atomically; by the first process only."""
    if rank_world()[0] == 0:
        with replacing(path) as f:
            f.write(json.dumps(data, indent=1).encode())


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise Abort(f"{path} cannot be read as JSON ({e}); mend or remove it")


class Log:
    """A run's progress bar, its log.jsonl and its checkpoints; it stops a run that went wrong or was told to stop."""

    in_loop, asked = False, 0                                        # `asked`: the signal that came, see on_signal

    def __init__(self, args, images, total, start, title):
        self.args, self.images, self.total, self.since, self.clock = args, images, total, start, time.perf_counter()
        self.bar = tqdm(total=total, initial=start, desc=title, unit="step", disable=rank_world()[0] != 0)
        self.pending, self.stop = None, 0
        at_exit.callback(self.bar.close)
        Log.in_loop = True

    def step(self, step, lr, terms, rows):
        """Ends a step: logs it every --log-every steps, and returns whether to save.

        terms: {name: scalar tensor}, "loss" among them; their mean over the processes is logged. rows (n,): the batch.
        Two flags, "the loss is not finite" and "a signal came", are shared by all processes and read one step late, so
        that no step waits for the device; before a save, and where a line is logged, they are read at once.
        Raises Abort (code 1) for a loss that is not finite.
        """
        self.bar.update()
        loss, last = terms["loss"].detach(), step + 1 == self.total
        flags = torch.stack([(~loss.isfinite()).float(), torch.full_like(loss, Log.asked, dtype=torch.float32)])
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        host = torch.empty(2, pin_memory=loss.is_cuda).copy_(flags, non_blocking=loss.is_cuda)
        event = torch.cuda.Event() if loss.is_cuda else None
        if event:
            event.record()
        late, self.pending = self.pending, (host, event, step, rows)
        logging = last or step % self.args.log_every == 0
        saving = last or (step + 1) % self.args.save_every == 0
        if late:
            self._look(*late)
        if logging or saving or self.stop:
            self._look(*self.pending)
        if dist.is_initialized() and (logging or saving or self.stop):       # each has met bad images of its own
            bad = [None] * rank_world()[1]
            dist.all_gather_object(bad, self.images.bad)
            self.images.bad[:] = dict.fromkeys(sum(bad, []))
        if logging:
            self._write(step, lr, terms)
        return saving or bool(self.stop)

    def _look(self, host, event, step, rows):
        if event:
            event.synchronize()
        wrong, self.stop = host.tolist()
        if wrong:
            path = os.path.join(self.args.out, "nonfinite.txt")
            files = [self.images.path(i) for i in rows.tolist()]
            with open(path, "a", encoding="utf-8", errors="surrogateescape") as f:
                f.write("\n".join([f"step {step}, process {rank_world()[0]}", *files]) + "\n")
            raise Abort(f"the loss is not finite at step {step}; {self.args.out} keeps the last good checkpoint. The "
                        f"batch's images are listed in {path}: {', '.join(files[:2])}, ...", code=1)

    def _write(self, step, lr, terms):
        values = torch.stack([t.detach().float() for t in terms.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
        line = {"step": step, **dict(zip(terms, (values / rank_world()[1]).tolist())), "lr": lr}
        if self.images.bad:
            line["unreadable"] = len(self.images.bad)
        now = time.perf_counter()
        line["images_per_s"] = round(self.args.batch_size * (step + 1 - self.since) / (now - self.clock), 1)
        self.since, self.clock = step + 1, now
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {lr:.1e}, {line['images_per_s']:.0f} images/s")
        if rank_world()[0] == 0:
            with open(os.path.join(self.args.out, "log.jsonl"), "a") as f:
                f.write(json.dumps(line) + "\n")

    def save(self, step, parts):
        """Write last.pt, atomically, by the first process; then leave if a signal asked for it. Raises Abort.

        step: how many are done; parts: {name: what has a state_dict}, for `restore`.
        """
        if rank_world()[0] == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            if not all(t.isfinite().all() for t in _tensors(state)):
                raise Abort(f"weights are not finite after step {step - 1}; {self.args.out} keeps the last good "
                            "checkpoint", code=1)
            with replacing(os.path.join(self.args.out, "last.pt")) as f:
                torch.save({**state, "step": step, "bad": self.images.bad, "flags": sorted(vars(self.args))}, f)
        if self.stop:
            if dist.is_initialized():                                # torchrun kills what is left when one leaves
                dist.barrier()
            self.close()
            raise Abort(f"{signal.Signals(int(self.stop)).name}: saved after step {step - 1}; the same command "
                        "continues", PREEMPTED)

    def close(self):
        """Ends the loop. Raises Abort for a signal that came after its last step."""
        self.bar.close()
        Log.in_loop = False
        if Log.asked and not self.stop:
            on_signal(Log.asked, None)


def _tensors(state):
    """All floating point tensors in nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for x in inner for tensor in _tensors(x)]


# flags that do not change a run; the last three do by rounding only
FREE = {"out", "workers", "log_every", "save_every", "no_resume", "overwrite", "accum", "compile", "grad_checkpointing"}


def begin(args, root, *files):
    """Open --out: the state (last.pt, or None) and the results of the run of the same flags that it holds, if any.

    files: texts that the run depends on beside those of ROOT; the contents of what is a file count.

    Flags that do not change a run may differ; any other difference, and other images, are refused unless --overwrite;
    so is an --out in which another process is at work.
    """
    Log.in_loop, Log.asked = False, 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        at_exit.callback(signal.signal, number, signal.signal(number, on_signal))
    if rank_world()[0] == 0:
        try:
            os.makedirs(args.out, exist_ok=True)
            lock = at_exit.enter_context(open(os.path.join(args.out, ".lock"), "w"))
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)         # goes with the process, however that ends
        except BlockingIOError:
            raise Abort(f"--out {args.out}: another run is at work there; wait for it, or give another --out")
        except OSError as e:
            raise Abort(f"--out {args.out} cannot be written to ({e.strerror})")
    data = hashlib.sha256()                                          # names and texts, not pixels
    for s in (root.train, root.val, *root.shifts):
        data.update(f"{s.name} {len(s)} ".encode("utf-8", "surrogateescape") + s.files.tobytes())
    data.update("\n".join([*root.classnames, *prompt_texts(["{}"], root.templates)]).encode())
    for file in files:
        if file and os.path.isfile(file) and not file.endswith(".tar"):
            with open(file, "rb") as f:
                data.update(f.read())
    flags = {**json.loads(json.dumps(vars(args))), "images": data.hexdigest()[:16]}
    path, last, log, done = [os.path.join(args.out, f) for f in ("args.json", "last.pt", "log.jsonl", "results.json")]
    main_process, state, results = rank_world()[0] == 0, None, {}
    began = os.path.isfile(last) or os.path.isfile(log)              # a run that failed before its first step did not
    if os.path.isfile(path) and began and not args.overwrite:
        old = read_json(path)
        if not isinstance(old, dict) or set(old) != set(flags):
            raise Abort(f"--out {args.out} holds a run of another script; give another --out, or --overwrite")
        changed = {k: f"--{k.replace('_', '-')} {old[k]}" for k in flags if k not in FREE and flags[k] != old[k]}
        if "images" in changed:
            changed["images"] = "other images or texts: files, class names, templates, captions or the pool changed"
        if changed:
            raise Abort(f"--out {args.out} holds another run ({', '.join(changed.values())}); give another --out, or "
                        "--overwrite")
        if os.path.isfile(done) and not args.no_resume:
            results = read_json(done)
        if os.path.isfile(last) and not args.no_resume:
            try:
                state = torch.load(last, map_location="cpu", weights_only=True)
            except Exception as e:                                   # torch raises half a dozen kinds
                raise Abort(f"{last} cannot be read as a checkpoint ({type(e).__name__}); remove it to begin anew")
            if not isinstance(state, dict) or state.get("flags") != sorted(vars(args)):
                raise Abort(f"{last} is not a checkpoint of this script; remove it to begin anew")
            root.train.bad[:] = state["bad"]
        if main_process and not args.no_resume:
            print(f"{args.out} holds this run: " + ("finished" if "sets" in results else
                                                    f"continuing at step {state['step'] if state else 0}"))
    elif not args.overwrite and not os.path.isfile(path) and any(
            os.path.exists(f) for f in (last, log, done, os.path.join(args.out, "model"))):
        raise Abort(f"--out {args.out} holds files that are not this script's; give another --out, or --overwrite")
    if dist.is_initialized():
        found = [None] * rank_world()[1]
        dist.all_gather_object(found, [state["step"] if state else 0, sorted(results)])
        if any(f != found[0] for f in found):
            raise Abort(f"--out {args.out} is not the same to all processes; nodes need one on a disk that they share")
    if main_process and state is None and not results:
        for f in ("last.pt", "log.jsonl", "results.json", "head.safetensors"):
            if os.path.isfile(os.path.join(args.out, f)):
                os.remove(os.path.join(args.out, f))
        for d in ("model", "teacher"):                               # else they would pass for the new run's
            shutil.rmtree(os.path.join(args.out, d), ignore_errors=True)
        write_json(path, flags)
    if dist.is_initialized():
        dist.barrier()
    if main_process and os.path.isfile(log) and "sets" not in results:       # later steps will come again
        with open(log, errors="replace") as f:                       # a line may be torn, or of zeros
            whole = [line for line in f if line.startswith("{") and line.endswith("}\n")]
        lines = [line for line in whole if state and json.loads(line)["step"] < state["step"]]
        with replacing(log) as f:
            f.write("".join(lines).encode())
    return state, results


def restore(state, parts):
    """Put what `begin` found in last.pt, if anything, into the parts; the step to begin with."""
    for name, part in parts.items() if state else ():
        part.load_state_dict(state.pop(name))                        # popped: it is as large as the part
    return state["step"] if state else 0
