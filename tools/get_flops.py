"""Count FLOPs, parameters and activations of the parts of a detector, segmentor or classifier.

    python -m saga_mm flops saga_mm::segmentation/upernet_saga_t.py --size 512 2048

FLOPs are those of inference on one image, two per multiply-add, in convolutions and matrix
products, including those of attention. Element-wise operations are not counted. Many papers count
one FLOP per multiply-add and leave out the matrix products of attention. Activations are what
autograd keeps for the backward pass. A two-stage detector has 1000 regions and finds 100 objects,
as in mmdet's tables. Parts whose FLOPs are not in the table, such as those for training only, are
named below it.

The model is run on fake tensors, which have shapes and no values, so that any size takes seconds
and no memory. Models that do not support this are run on random pixels; their activations are not
counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from saga_mm.analysis.cost import Cost
from saga_mm.analysis.model_cost import model_cost, not_counted
from saga_mm.apis import build_model
from saga_mm.checkpoint import make_folder, write_atomically
from saga_mm.cli import add_options, load_config, print_written, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(1280, 1280),
        metavar=('H', 'W'),
        help='size of the image in pixels. Defaults to 1280 1280',
    )
    parser.add_argument(
        '--json', metavar='FILE', type=Path, help='file to write the cost of each module to'
    )
    add_options(parser)
    return parser.parse_args(argv)


def parts(model: nn.Module) -> list[str]:
    """The names of the rows: the parts of the model, and the stages of its backbone."""
    names = []
    for name, child in model.named_children():
        if any(True for _ in child.parameters()):
            names.append(name)
            names += [f'{name}.stages.{i}' for i in range(len(getattr(child, 'stages', ())))]
    return names


def table(costs: dict[str, Cost], names: list[str]) -> str:
    lines = [
        '| part | GFLOPs | multiply-adds, G | parameters, M | activations, MiB |',
        '|---|--:|--:|--:|--:|',
    ]
    for name in [*names, '']:
        cost = costs[name]
        activations = '-' if cost.activations is None else f'{cost.activations / 2**20:.0f}'
        lines.append(
            f'| {name or "all"} | {cost.flops / 1e9:.2f} | {cost.flops / 2e9:.2f} '
            f'| {cost.parameters / 1e6:.2f} | {activations} |'
        )
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> None:
    if min(args.size) < 1:
        raise ValueError(f'--size must be two positive numbers, got {args.size}')
    cfg = load_config(args.config, args.cfg_options, ('model',))
    if args.json:
        make_folder(args.json.parent)
    model = build_model(cfg)
    channels = (cfg.model.get('backbone') or {}).get('in_channels', 3)
    channels = getattr(getattr(model, 'backbone', None), 'input_channels', channels)
    costs = model_cost(model, tuple(args.size), channels)
    print(table(costs, parts(model)))
    for name, reason in not_counted(model, costs).items():
        print(f'not counted: {name} ({costs[name].parameters / 1e6:.2f}M parameters), {reason}')
    if args.json:
        found = {name: vars(cost) for name, cost in costs.items()}
        write_atomically(args.json, json.dumps(found, indent=1).encode())
        print_written(args.json)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
