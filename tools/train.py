"""Train a detector or segmentor; tools/dist_train.sh does it on several GPUs."""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS

from saga_mm.checkpoint import latest_checkpoint, make_folder
from saga_mm.cli import add_common_arguments, check_data, command_line, prepare

TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the training')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='latest',
        metavar='CKPT',
        help='go on from a checkpoint, by default the latest one of the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision, on a GPU')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Put the options into the config; ValueError for those that can't be met."""
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise ValueError('mixed precision (--amp, AmpOptimWrapper) needs a GPU, and there is none')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = args.resume
        if args.resume == 'latest':
            cfg.load_from = latest_checkpoint(cfg.work_dir)
    save_atomically(cfg)
    complete = bool(cfg.get('resume'))
    cfg.custom_hooks = [
        *cfg.get('custom_hooks', []),
        dict(type='saga_mm.CheckpointCheckHook', complete=complete, resume=complete),
        dict(type='saga_mm.DataCheckHook'),
        dict(type='saga_mm.ExactResumeHook'),
    ]


def save_atomically(cfg: Config) -> None:
    """Put the project's checkpoint hook in the place of mmengine's, also in configs of others."""
    hook = cfg.get('default_hooks', {}).get('checkpoint', dict(type='CheckpointHook', interval=1))
    if hook and hook['type'] == 'CheckpointHook':
        hook = dict(hook, type='saga_mm.AtomicCheckpointHook')
        cfg.merge_from_dict({'default_hooks.checkpoint': hook})


def run(args: argparse.Namespace) -> None:
    cfg = prepare(args, TRAINING)
    apply_options(cfg, args)
    check_data(cfg, ('train', 'val'))
    make_folder(cfg.work_dir)
    RUNNERS.build(cfg).train()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command_line(args.debug):
        run(args)


if __name__ == '__main__':
    main()
