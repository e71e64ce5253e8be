"""Evaluate a detector, segmentor or classifier.

`torchrun --nproc-per-node 8 -m saga_mm test CONFIG CHECKPOINT --launcher pytorch` uses 8 GPUs.
"""

from __future__ import annotations

import argparse
import os

from saga_mm.apis import test
from saga_mm.cli import add_common_arguments, command_line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its weights, a file or a URL')
    parser.add_argument('--out', help='.pkl file for the predictions')
    parser.add_argument('--show-dir', help='folder for drawings of the predictions')
    parser.add_argument('--show', action='store_true', help='show the predictions in windows')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window stays. Defaults to 2'
    )
    parser.add_argument('--tta', action='store_true', help='augment the images, merge predictions')
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate; return the metrics."""
    args = parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    with command_line(args.debug):
        return test(
            args.config,
            args.checkpoint,
            work_dir=args.work_dir,
            options=args.cfg_options,
            out=args.out,
            show=args.show,
            show_dir=args.show_dir,
            wait_time=args.wait_time,
            tta=args.tta,
            launcher=args.launcher,
        )


if __name__ == '__main__':
    main()
