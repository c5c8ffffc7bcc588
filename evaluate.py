# SPDX-License-Identifier: MIT
"""Accuracy and calibration of any CLIP on val and every shift of a ROOT: one model, or several side by side.

    python evaluate.py --data ROOT --model local-dir:out/calft/model
    python evaluate.py --data ROOT --model ViT-B-16-quickgelu local-dir:out/calft/model local-dir:out/calft/teacher

A model is local-dir:PATH (what the training scripts export) or an open_clip name with --pretrained. Each is scored
with the zero-shot head of its own text tower, as the training scripts score it.
"""
import os

import common


@common.cli
def main(argv=None):
    parser = common.flags(__doc__, out="out/evaluate")
    parser.set_defaults(batch_size=256)
    parser.add_argument("--model", nargs="+", help="open_clip names or local-dir:PATH, any number")
    device = common.setup()
    args = common.parse(parser, device, argv)

    root = common.read_root(args, need_train=False)
    columns = {}
    for name in [args.model] if isinstance(args.model, str) else args.model:
        model, _, preprocess, tokenizer = common.load_model(name, args.pretrained, device)
        title = os.path.normpath(name.removeprefix("local-dir:"))
        columns[title] = common.evaluate(model, tokenizer, preprocess, root, args, device, title=title)
    if common.rank_world()[0] == 0:
        os.makedirs(args.out, exist_ok=True)
        common.write_json(os.path.join(args.out, "results.json"), columns)
        print(common.table(columns))


if __name__ == "__main__":
    main()
