# SPDX-License-Identifier: MIT
"""Accuracy and calibration of any CLIP on val and every shift of a ROOT: one model, or several side by side.

    python evaluate.py --data ROOT --model local-dir:out/calft/model
    python evaluate.py --data ROOT --model ViT-B-16-quickgelu out/calft out/carft local-dir:out/calft/teacher

A model is the folder of a run, local-dir:PATH (what runs export), or an open_clip name with --pretrained. Each is
scored as the training scripts score it: with the zero-shot head of its own text tower, or with the head that carft.py
trained, where there is one for the classes of this ROOT.
"""
import json
import os

import safetensors

import common


@common.cli
def main(argv=None):
    parser = common.flags(__doc__, out="out/evaluate")
    parser.set_defaults(batch_size=256)
    parser.add_argument("--model", nargs="+", default=["ViT-B-16-quickgelu"],
                        help="folders of runs, open_clip names, local-dir:PATH")
    device = common.setup()
    args = common.parse(parser, device, argv)

    if os.path.isfile(os.path.join(args.out, "args.json")):
        raise common.Abort(f"--out {args.out} holds a run, which results.json belongs to; give another --out")
    root = common.read_root(args, need_train=False)
    columns = {}
    for name in [args.model] if isinstance(args.model, str) else args.model:
        column = os.path.normpath(name.removeprefix("local-dir:"))
        if os.path.isdir(os.path.join(name, "model")):               # the folder of a run
            name = "local-dir:" + os.path.join(name, "model")
        model, _, preprocess, tokenizer = common.load_model(name, args.pretrained, device)
        path, head = os.path.normpath(name.removeprefix("local-dir:")), None
        if root.held_out and os.path.isfile(os.path.join(path, os.pardir, "args.json")):
            run = common.read_json(os.path.join(path, os.pardir, "args.json"))
            other = [k for k in ("seed", "val_frac", "train") if run[k] != getattr(args, k)]
            if other and os.path.realpath(run["data"]) == os.path.realpath(args.data):
                raise common.Abort(f"{path} was trained with another val held out; give " + " ".join(
                    f"--{k.replace('_', '-')} {' '.join(run[k]) if k == 'train' else run[k]}" for k in other))
        trained = os.path.join(os.path.dirname(path), "head.safetensors")
        if os.path.basename(path) == "model" and os.path.isfile(trained):
            with safetensors.safe_open(trained, "pt") as f:
                if json.loads(f.metadata()["classes"]) == root.classes:
                    head = f.get_tensor("W_cls")
                else:
                    print(f"{trained} was trained on other classes: zero-shot head")
        columns[column] = common.evaluate(model, tokenizer, preprocess, root, args, device, head, column)
    os.makedirs(args.out, exist_ok=True)
    common.write_json(os.path.join(args.out, "results.json"), columns)
    if common.rank_world()[0] == 0:
        print(common.table(columns))


if __name__ == "__main__":
    main()
