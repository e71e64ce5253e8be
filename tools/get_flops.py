"""Count what a detector or segmentor costs: FLOPs, parameters, activations, part by part.

    python tools/get_flops.py configs/segmentation/upernet_saga_t.py --size 512 2048

FLOPs are those of inference on one image, two per multiply-add. Many papers call a multiply-add one
FLOP, and leave out the matrix products of attention, which are counted here; element-wise work is
not. Activations are what autograd keeps for the backward pass. A two-stage detector is given 1000
regions for boxes and 100 for masks, as in mmdet's tables. Only shapes pass through the model, so
any size takes seconds and no memory.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from saga_mm.analysis.cost import Cost, measure_cost
from saga_mm.apis import build_model
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, load_config, run_tool

# As in mmdet's tables.
BOXES, MASKS = 1000, 100


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
        help='of the image, in pixels. Defaults to 1280 1280',
    )
    parser.add_argument(
        '--json', metavar='FILE', type=Path, help='file for the cost of each module'
    )
    add_options(parser)
    return parser.parse_args(argv)


def count(model: nn.Module, size: tuple[int, int]) -> dict[str, Cost]:
    """Cost of inference on one image of (height, width) pixels, of every module."""
    shapes_only = FakeTensorMode()
    with FakeCopyMode(shapes_only):
        model = copy.deepcopy(model)
    with shapes_only:
        channels = getattr(model.backbone, 'input_channels', 3)
        image = torch.empty(1, channels, *size)
        return measure_cost(model, lambda: predict(model, image))


def predict(model: nn.Module, image: Tensor) -> list[object]:
    """All that a prediction computes with weights."""
    maps = model.extract_feat(image)
    if hasattr(model, 'roi_head'):
        heads = model.roi_head
        outputs = [model.rpn_head(maps)]
        outputs += regions(heads.bbox_head, heads.bbox_roi_extractor, BOXES)
        if heads.with_mask:
            outputs += regions(heads.mask_head, heads.mask_roi_extractor, MASKS)
        return outputs
    head = model.decode_head if hasattr(model, 'decode_head') else model.bbox_head
    return [head(maps)]


def regions(head: nn.Module, extractor: nn.Module, number: int) -> list[object]:
    """Give a head, or those of a cascade, as many regions as the extractor would cut out."""
    cascade = isinstance(head, nn.ModuleList)
    return [
        one(torch.empty(number, cut.out_channels, *cut.roi_layers[0].output_size))
        for one, cut in (zip(head, extractor, strict=True) if cascade else [(head, extractor)])
    ]


def parts(model: nn.Module) -> list[str]:
    """What a reader looks for: the parts of the model, and the stages of its backbone."""
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
        lines.append(
            f'| {name or "all"} | {cost.flops / 1e9:.2f} | {cost.flops / 2e9:.2f} '
            f'| {cost.parameters / 1e6:.2f} | {cost.activations / 2**20:.0f} |'
        )
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> None:
    if min(args.size) < 1:
        raise ValueError(f'--size must be two positive numbers, got {args.size}')
    cfg = load_config(args.config, args.cfg_options, ('model',))
    if args.json:
        make_folder(args.json.parent)
    model = build_model(cfg)
    costs = count(model, tuple(args.size))
    print(table(costs, parts(model)))
    if args.json:
        args.json.write_text(
            json.dumps({name: vars(cost) for name, cost in costs.items()}, indent=1)
        )


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
