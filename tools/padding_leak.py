"""Measure how much padding changes the features of an image, without and with a mask.

    python -m saga_mm padding_leak --image 400 560 --batch 608 608

For each stage, the table shows the RMS of the change of the features inside the image, over the RMS
of the features of the image without padding. Weights and pixels are random.
"""

from __future__ import annotations

import argparse

import torch

from saga_mm.analysis.padding import leak
from saga_mm.cli import add_options, run_tool

KNOWN = {
    'saga_t': dict(type='saga_mm.SAGA'),
    'ravlt_t': dict(type='saga_mm.RAVLT'),
    'sola_vision_t': dict(type='saga_mm.SoLAVision'),
    'sola_vision_t, gated': dict(type='saga_mm.SoLAVision', linear='gated'),
    'sola_vision_t, plain': dict(type='saga_mm.SoLAVision', linear='plain'),
    'sola_vision_t, decay': dict(type='saga_mm.SoLAVision', linear='decay'),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', choices=list(KNOWN), default=list(KNOWN))
    for name, size in dict(image=(400, 560), batch=(608, 608)).items():
        text = f'size of the {name} in pixels. Defaults to {size[0]} {size[1]}'
        parser.add_argument(
            f'--{name}', nargs=2, type=int, default=size, metavar=('H', 'W'), help=text
        )
    add_options(parser, config=False)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if not all(0 < side <= whole for side, whole in zip(args.image, args.batch, strict=True)):
        raise ValueError(f'--image must fit into --batch, got {args.image} and {args.batch}')
    image = torch.randn(1, 3, *args.image, generator=torch.Generator().manual_seed(0))
    print('| backbone | pad_mask | stage 1 | stage 2 | stage 3 | stage 4 |')
    print('|---|---|--:|--:|--:|--:|')
    for name in args.models:
        for pad_mask in (False, True):
            ratios = leak({**KNOWN[name], 'pad_mask': pad_mask}, image, tuple(args.batch))
            print(f'| {name} | {pad_mask} | {" | ".join(f"{ratio:.1e}" for ratio in ratios)} |')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
