"""Run a detector or segmentor on images: draw what it finds, and print it.

python tools/infer.py photo.jpg folder/ 'more/*.png' --config CONFIG --checkpoint FILE --out-dir out
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2

from saga_mm.apis import (
    find_images,
    load_model,
    make_detector,
    make_segmentor,
    name_outputs,
    select_device,
)
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, keep_freed_memory, load_config, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or globs')
    parser.add_argument('--config', required=True, help='config of the model')
    parser.add_argument('--checkpoint', required=True, help='its weights, a file or a URL')
    parser.add_argument('--out-dir', required=True, type=Path, help='where the drawings go')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='show objects that score more than this (detection only). Defaults to 0.3',
    )
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to cuda, else cpu')
    add_options(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.score_thr < 1:
        raise ValueError(f'score-thr must be in [0, 1), got {args.score_thr}')
    images = find_images(args.images)
    out_files = name_outputs(images, args.out_dir)
    device = select_device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    cfg = load_config(args.config, args.cfg_options, ('model', 'test_dataloader'))
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise ValueError(f"default_scope of the config must be 'mmdet' or 'mmseg', got {scope!r}")
    model = load_model(cfg, args.checkpoint, device)
    draw = make_detector(model, args.score_thr) if scope == 'mmdet' else make_segmentor(model)
    make_folder(args.out_dir)
    broken = []
    for path, out_file in zip(images, out_files, strict=True):
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            broken.append(str(path))
        else:
            print(f'{path} -> {out_file}: {draw(image, out_file)}', flush=True)
    if broken:
        raise ValueError(f'not readable as an image: {", ".join(broken)}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
