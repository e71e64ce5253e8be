"""Train SAGA-T with UperNet on the embedded scenes, evaluate it, and draw what it has learnt.

    python tools/demo.py

This takes about ten minutes on two CPU cores. A second call continues from the newest checkpoint of
the first one. The full log is in the work dir.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

from mmengine.registry import DATASETS
from mmengine.runner import find_latest_checkpoint

from saga_mm import configs_dir
from saga_mm.analysis.files import check_drawing
from saga_mm.analysis.scenes import draw_scenes
from saga_mm.apis import load_model, select_device, test, train
from saga_mm.cli import add_options, load_config, run_tool

CONFIG = Path(configs_dir(), 'segmentation/upernet_saga_t_demo.py')
NEXT = """\
next:
  {python} -m saga_mm infer {images} --config {config} --checkpoint {checkpoint} --out-dir out
  {python} -m saga_mm train {configs}/detection/mask_rcnn_saga_t_demo.py
  {python} -m saga_mm train {configs}/segmentation/upernet_saga_t.py  # with ADE20K"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--work-dir', default='work_dirs/demo', help='folder of logs, weights and the picture'
    )
    parser.add_argument('--max-iters', type=int, help='iterations of training')
    add_options(parser)
    return parser.parse_args(argv)


def shorten(path: str | Path) -> str:
    """`path`, relative to the current folder if it is inside of it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(args: argparse.Namespace) -> None:
    check_drawing()
    # of the toolboxes, about nothing that a user of the demo could change
    warnings.simplefilter('ignore')
    start = time.monotonic()
    options = dict(args.cfg_options)
    if args.max_iters is not None:
        if args.max_iters < 1:
            raise ValueError(f'max-iters must be at least 1, got {args.max_iters}')
        options['train_cfg.max_iters'] = args.max_iters
    common = dict(work_dir=args.work_dir, options=options, quiet=True)

    resume = None
    if Path(args.work_dir, 'last_checkpoint').is_file():
        checkpoint = find_latest_checkpoint(args.work_dir)
        print(f'going on from {shorten(checkpoint)}; to start over, remove {args.work_dir}')
        resume = 'latest'
    train(CONFIG, resume=resume, **common)
    checkpoint = find_latest_checkpoint(args.work_dir)
    metrics = test(CONFIG, checkpoint, **common)

    # the config with the options of the training
    cfg = load_config(Path(args.work_dir, CONFIG.name), {}, ('model', 'test_dataloader'))
    model = load_model(cfg, checkpoint, select_device())
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    picture = Path(args.work_dir, 'scenes.png')
    result = f'mIoU {metrics["mIoU"]:.1f} on {len(dataset)} scenes never trained on'
    draw_scenes(model, dataset, f'SAGA-T + UperNet: {result}', picture)
    print(f'{result}, after {(time.monotonic() - start) / 60:.1f} min')
    print(f'picture: {picture}')
    names = dict(
        python=sys.executable,
        images=dataset.data_prefix['img_path'],
        config=CONFIG,
        configs=configs_dir(),
        checkpoint=checkpoint,
    )
    print(NEXT.format(**{name: shorten(path) for name, path in names.items()}))


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
