"""Train SAGA-T with UperNet on the embedded scenes, evaluate it, and draw what it has learnt.

    python -m saga_mm demo
    python -m saga_mm demo --pretrain

This takes about five minutes on two CPU cores. A second call continues from the newest checkpoint
of the first one. The full log is in the work dir.

With `--pretrain`, a classifier of the scenes' objects is trained first, and a second segmentor
starts from its backbone, to be compared with the first one. This needs the extra `pretrain`.
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
from saga_mm.apis import build_model, load_model, select_device, test, train
from saga_mm.checkpoint import load_weights
from saga_mm.cli import add_options, load_config, run_tool

CONFIG = Path(configs_dir(), 'segmentation/upernet_saga_t_demo.py')
CLASSIFIER = Path(configs_dir(), 'classification/classifier_saga_t_demo.py')
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
    parser.add_argument('--max-iters', type=int, help='iterations of training of a segmentor')
    parser.add_argument(
        '--pretrain',
        action='store_true',
        help='train a classifier of the objects, and compare a segmentor that starts from it',
    )
    add_options(parser)
    return parser.parse_args(argv)


def shorten(path: str | Path) -> str:
    """`path`, relative to the current folder if it is inside of it."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def train_and_test(config: Path, work_dir: Path, options: dict) -> tuple[str, dict[str, float]]:
    """Train a model, or go on with it, and evaluate it: the checkpoint, and the metrics."""
    resume = None
    if Path(work_dir, 'last_checkpoint').is_file():
        checkpoint = find_latest_checkpoint(str(work_dir))
        print(f'going on from {shorten(checkpoint)}; to start over, remove {work_dir}')
        resume = 'latest'
    train(config, work_dir=work_dir, options=options, resume=resume, quiet=True)
    checkpoint = find_latest_checkpoint(str(work_dir))
    metrics = test(config, checkpoint, work_dir=work_dir, options=options, quiet=True)
    return checkpoint, metrics


def pretrain(work_dir: Path, options: dict) -> dict[str, object]:
    """Train the classifier: the options with which the segmentor starts from its backbone."""
    # of another backbone, the weights would not fit
    own = {key: value for key, value in options.items() if key.startswith('model.backbone.')}
    checkpoint, metrics = train_and_test(CLASSIFIER, work_dir, own)
    top1 = metrics['accuracy/top1']
    print(f'classifier: {top1:.1f} % of the objects of scenes never trained on')
    cfg = load_config(CONFIG, options, ('model',))
    report = load_weights(build_model(cfg).backbone, checkpoint, 'backbone.')
    print(f'from {shorten(checkpoint)} into the backbone: {report}')
    init_cfg = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    return {f'model.backbone.init_cfg.{name}': value for name, value in init_cfg.items()}


def segment(work_dir: Path, options: dict) -> tuple[str, str]:
    """Train and evaluate the segmentor, and draw what it predicts: its result, what to do next."""
    start = time.monotonic()
    checkpoint, metrics = train_and_test(CONFIG, work_dir, options)
    # the config with the options of the training
    cfg = load_config(Path(work_dir, CONFIG.name), {}, ('model', 'test_dataloader'))
    model = load_model(cfg, checkpoint, select_device())
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    picture = Path(work_dir, 'scenes.png')
    result = f'mIoU {metrics["mIoU"]:.1f} on {len(dataset)} scenes never trained on'
    draw_scenes(model, dataset, f'SAGA-T + UperNet: {result}', picture)
    names = dict(
        python=sys.executable,
        images=dataset.data_prefix['img_path'],
        config=CONFIG,
        configs=configs_dir(),
        checkpoint=checkpoint,
    )
    hints = NEXT.format(**{name: shorten(path) for name, path in names.items()})
    minutes = (time.monotonic() - start) / 60
    return f'{result}, after {minutes:.1f} min', f'picture: {picture}\n{hints}'


def run(args: argparse.Namespace) -> None:
    check_drawing()
    # of the toolboxes, about nothing that a user of the demo could change
    warnings.simplefilter('ignore')
    options = dict(args.cfg_options)
    if args.max_iters is not None:
        if args.max_iters < 1:
            raise ValueError(f'max-iters must be at least 1, got {args.max_iters}')
        options['train_cfg.max_iters'] = args.max_iters
    work_dir = Path(args.work_dir)
    if args.pretrain:
        init = pretrain(work_dir / 'classifier', options)
        scratch, _ = segment(work_dir, options)
        result, hints = segment(work_dir / 'pretrained', options | init)
        print(f'from scratch: {scratch}\nfrom the classifier: {result}')
    else:
        result, hints = segment(work_dir, options)
        print(result)
    print(hints)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
