"""Predict with a detector, segmentor or classifier on images; draw and print the predictions.

python -m saga_mm infer photo.jpg folder/ '*.png' --config CONFIG --checkpoint FILE --out-dir out

With `--max-memory 4GiB`, a segmentor takes an image of any size in one piece and in bounded memory,
and writes the class of each pixel: docs/whole_images.md.

Images are loaded by the test pipeline of the config. An image that fails is named, the others are
processed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.model import BaseModel

from saga_mm.apis import (
    PredictionFiles,
    Predictor,
    WholePredictor,
    class_map_path,
    find_images,
    load_model,
    name_outputs,
    select_device,
    write_image,
)
from saga_mm.checkpoint import make_folder, printable
from saga_mm.cli import (
    add_options,
    byte_size,
    go_on,
    keep_freed_memory,
    load_config,
    run_tool,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders or globs')
    parser.add_argument('--config', required=True, help='config of the model')
    parser.add_argument('--checkpoint', required=True, help='its weights, a file or a URL')
    parser.add_argument('--out-dir', required=True, type=Path, help='folder of the drawings')
    parser.add_argument(
        '--predictions-dir',
        type=Path,
        metavar='DIR',
        help='also write the predictions as data: a label map (PNG) for each image, of a '
        'segmentor, or predictions.json, a COCO file with scores, of a detector',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='show objects with a higher score, for detectors. Defaults to 0.3',
    )
    parser.add_argument(
        '--max-memory',
        type=byte_size,
        metavar='SIZE',
        help='write maps of classes, from one pass over the whole image with tensors of up to this '
        'size, such as 4GiB; for segmentors',
    )
    parser.add_argument(
        '--maps-dir',
        metavar='DIR',
        help='with --max-memory: keep large maps of the backbone in files in this folder, which do '
        'not count as memory',
    )
    parser.add_argument(
        '--maps-dtype',
        choices=['float16', 'bfloat16'],
        help='with --max-memory: keep large maps of the backbone in half precision, and convert '
        'their rows for each computation',
    )
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
    add_options(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.score_thr < 1:
        raise ValueError(f'score-thr must be in [0, 1), got {args.score_thr}')
    if args.maps_dir is not None and args.max_memory is None:
        raise ValueError('--maps-dir needs --max-memory')
    if args.maps_dtype is not None and args.max_memory is None:
        raise ValueError('--maps-dtype needs --max-memory')
    if args.predictions_dir is not None and args.max_memory is not None:
        raise ValueError('--max-memory writes label maps to out-dir, without --predictions-dir')
    images = find_images(args.images)
    out_files = name_outputs(images, args.out_dir)
    if args.predictions_dir is not None:
        taken = {
            folder.resolve()
            for folder in (args.out_dir, *(path.resolve().parent for path in images))
        }
        if args.predictions_dir.resolve() in taken:
            raise ValueError(
                'predictions-dir must be neither out-dir nor the folder of an image, got '
                f'{args.predictions_dir}'
            )
    if args.max_memory is not None:
        out_files = list(map(class_map_path, out_files, images))
    device = select_device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    cfg = load_config(args.config, args.cfg_options, ('model', 'test_dataloader'))
    model = load_model(cfg, args.checkpoint, device)
    files = None
    if args.predictions_dir is not None:
        files = PredictionFiles(model, args.predictions_dir, args.score_thr)
    process = make_process(args, model, files)
    for folder in (args.out_dir, args.maps_dir, args.predictions_dir):
        if folder is not None:
            make_folder(folder)
    failed: dict[str, str] = {}
    for path, out_file in zip(images, out_files, strict=True):
        # The name is printed first, so that the last line names the image if the system ends the
        # process.
        name = printable(str(path))
        print(f'{name} -> {printable(str(out_file))}: ', end='', flush=True)
        with go_on(name, failed, args.debug):
            print(process(path, out_file), flush=True)
    if files is not None and (written := files.finish()):
        print(f'objects: {written}', flush=True)
    if failed:
        names = ', '.join(failed) if len(failed) > 1 else ': '.join(*failed.items())
        raise ValueError(f'{len(failed)} of {len(images)} images failed: {names}')


def make_process(
    args: argparse.Namespace, model: BaseModel, files: PredictionFiles | None
) -> Callable[[Path, Path], str]:
    """A function that predicts on an image, writes what it finds, and returns what to print."""
    if args.max_memory is not None:
        dtype = args.maps_dtype and getattr(torch, args.maps_dtype)
        write_classes = WholePredictor(model, args.max_memory, show_progress, args.maps_dir, dtype)
        return lambda path, out_file: f'\n{write_classes(path, out_file)}'
    predict = Predictor(model, args.score_thr)

    def draw(path: Path, out_file: Path) -> str:
        prediction = predict(path)
        write_image(out_file, prediction.picture)
        told = '' if files is None else files.add(path, out_file.name, prediction.sample)
        return prediction.text + told

    return draw


def show_progress(done: int, total: int) -> None:
    """Draw a bar on a terminal."""
    if sys.stderr.isatty():
        bar = '#' * (40 * done // total)
        end = '\n' if done == total else ''
        numbers = f'{done / 1e6:.1f} of {total / 1e6:.1f} megapixels'
        print(f'\r[{bar:40}] {numbers}', end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
