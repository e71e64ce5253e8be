"""Predict with a detector, segmentor or classifier on images; draw and print the predictions.

python tools/infer.py photo.jpg folder/ 'more/*.png' --config CONFIG --checkpoint FILE --out-dir out

Images are loaded by the test pipeline of the config. An image that fails is named, the others are
processed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from saga_mm.apis import (
    Predictor,
    find_images,
    load_model,
    name_outputs,
    select_device,
    write_image,
)
from saga_mm.checkpoint import make_folder, printable
from saga_mm.cli import add_options, go_on, keep_freed_memory, load_config, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or globs')
    parser.add_argument('--config', required=True, help='config of the model')
    parser.add_argument('--checkpoint', required=True, help='its weights, a file or a URL')
    parser.add_argument('--out-dir', required=True, type=Path, help='folder of the drawings')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='show objects with a higher score, for detectors. Defaults to 0.3',
    )
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
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
    predict = Predictor(load_model(cfg, args.checkpoint, device), args.score_thr)
    make_folder(args.out_dir)
    failed: dict[str, str] = {}
    for path, out_file in zip(images, out_files, strict=True):
        # The name is printed first, so that the last line names the image if the system ends the
        # process.
        name = printable(str(path))
        print(f'{name} -> {printable(str(out_file))}: ', end='', flush=True)
        with go_on(name, failed, args.debug):
            prediction = predict(path)
            write_image(out_file, prediction.picture)
            print(prediction.text, flush=True)
    if failed:
        names = ', '.join(failed) if len(failed) > 1 else ': '.join(*failed.items())
        raise ValueError(f'{len(failed)} of {len(images)} images failed: {names}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
