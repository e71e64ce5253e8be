"""Count parameters and multiply-adds of a config's model, attention included, for one image.

python tools/get_flops.py configs/detection/mask_rcnn_ravlt_s.py --size 800 1280

Nothing is computed: only shapes pass through the model, with softmax attention written out as two
matrix products and linear attention as its reference has it. A multiply-add counts once, as papers
count FLOPs; element-wise work is not counted. A two-stage detector is given 1000 regions for boxes
and 100 for masks, as mmdet's tables are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saga_mm.engine.cli import ConfigOptions, command_line

BOXES, MASKS = 1000, 100


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config of the model')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(800, 1280),
        metavar=('H', 'W'),
        help='pixels of the image. Defaults to 800 1280',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help='config entries to change',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def count(cfg: Config, size: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Millions of parameters and billions of multiply-adds, by part of the model and in total."""
    init_default_scope(cfg.default_scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    counter = FlopCounterMode(display=False)
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), shapes_only, sdpa_kernel(SDPBackend.MATH), counter:
        run(model, torch.empty(1, 3, *size))
    totals = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    # the modules that `run` calls, by class; below them, names with dots
    counts = {
        name: (millions(m for m in model.modules() if type(m).__name__ == name), flops / 2e9)
        for name, flops in totals.items()
        if '.' not in name and name != 'Global'
    }
    return {**counts, 'total': (millions([model]), counter.get_total_flops() / 2e9)}


def millions(modules: Iterable[nn.Module]) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def run(model: nn.Module, image: Tensor) -> None:
    """All that a prediction computes with weights."""
    maps = model.extract_feat(image)
    if hasattr(model, 'roi_head'):
        model.rpn_head(maps)
        heads = model.roi_head
        regions(heads.bbox_head, heads.bbox_roi_extractor, BOXES)
        if heads.with_mask:
            regions(heads.mask_head, heads.mask_roi_extractor, MASKS)
    elif hasattr(model, 'decode_head'):
        model.decode_head(maps)
    else:
        model.bbox_head(maps)


def regions(head: nn.Module, extractor: nn.Module, number: int) -> None:
    """Give a head, or those of a cascade, as many regions as the extractor would cut out."""
    cascade = isinstance(head, nn.ModuleList)
    for one, cut in zip(head, extractor, strict=True) if cascade else [(head, extractor)]:
        one(torch.empty(number, cut.out_channels, *cut.roi_layers[0].output_size))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command_line(args.debug):
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(args.cfg_options)
        counts = count(cfg, args.size)
        print(f'one image of {args.size[0]} x {args.size[1]}')
        print('| part | parameters (M) | multiply-adds (G) |')
        print('|---|---|---|')
        for name, (parameters, flops) in counts.items():
            print(f'| {name} | {parameters:.2f} | {flops:.1f} |')


if __name__ == '__main__':
    main()
