"""Train a detector, segmentor or classifier.

`torchrun --nproc-per-node 8 -m saga_mm train CONFIG --launcher pytorch` uses 8 GPUs.
"""

from __future__ import annotations

import argparse
import os

from saga_mm.apis import train
from saga_mm.cli import add_common_arguments, command_line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the training')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='latest',
        metavar='CKPT',
        help='go on from a checkpoint, by default the latest one of the work dir, without which '
        "it is an error; 'auto' starts anew then",
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision, on a GPU')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    with command_line(args.debug):
        train(
            args.config,
            work_dir=args.work_dir,
            options=args.cfg_options,
            resume=args.resume,
            amp=args.amp,
            auto_scale_lr=args.auto_scale_lr,
            launcher=args.launcher,
        )


if __name__ == '__main__':
    main()
