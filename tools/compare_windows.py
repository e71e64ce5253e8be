"""Compare the segmentation of whole images with sliding windows: IoU, time, memory and seams.

    python -m saga_mm compare_windows CONFIG CHECKPOINT --windows 512 1024
    python -m saga_mm compare_windows CONFIG CHECKPOINT --windows 512/256 --images 'photos/*.tif'

Whole images go through segment_whole (docs/whole_images.md), windows through mmseg's slide mode.
The images are those of the config's test set, with their labels.

The tool prints what it measured, and writes it to windows.md. windows.png shows an image with a
detail at a border of windows, where they differ most from the whole image. What the measures of
seams mean is in docs/whole_images.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS

from saga_mm.analysis.files import check_drawing, write_text
from saga_mm.analysis.window_comparison import Comparison, Sample, draw, summary
from saga_mm.analysis.windows import Window
from saga_mm.apis import ImagePipeline, find_images, load_model, select_device
from saga_mm.checkpoint import make_folder, printable
from saga_mm.cli import (
    add_options,
    byte_size,
    check_data,
    keep_freed_memory,
    load_config,
    print_written,
    run_tool,
)
from saga_mm.cli.types import find_datasets, name_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a segmentor')
    parser.add_argument('checkpoint', help='its weights, a file or a URL')
    parser.add_argument(
        '--windows',
        nargs='+',
        type=window,
        required=True,
        metavar='SIZE[/STRIDE]',
        help='pixels on a side, and between windows. STRIDE defaults to two thirds of SIZE',
    )
    parser.add_argument(
        '--images', nargs='+', metavar='IMAGE', help='files, folders or globs, without labels'
    )
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N images')
    parser.add_argument(
        '--full-size',
        action='store_true',
        help='leave out the transforms of the test pipeline that resize images',
    )
    parser.add_argument(
        '--max-memory',
        type=byte_size,
        default='4GiB',
        metavar='SIZE',
        help='for tensors, when an image is segmented as a whole. Defaults to 4GiB',
    )
    parser.add_argument('--out-dir', type=Path, help='Defaults to work_dirs/windows_<config>')
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
    add_options(parser)
    return parser.parse_args(argv)


def window(text: str) -> Window:
    """The windows that an option such as 512 or 512/256 stands for."""
    size, _, stride = text.partition('/')
    try:
        found = Window(int(size), int(stride) if stride else max(1, 2 * int(size) // 3))
    except ValueError:
        found = Window(0, 0)
    if not 1 <= found.stride <= found.size:
        raise argparse.ArgumentTypeError(
            f'expected SIZE or SIZE/STRIDE in pixels, with STRIDE up to SIZE, got {text!r}'
        )
    return found


def prepare(args: argparse.Namespace) -> Config:
    """Load the config and set defaults of the options; ValueError for options that do not fit."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f'--limit must be at least 1, got {args.limit}')
    if len(set(args.windows)) < len(args.windows):
        raise ValueError(f'--windows must be different, got {" ".join(map(str, args.windows))}')
    cfg = load_config(args.config, args.cfg_options, ('model', 'test_dataloader'))
    if args.full_size:
        for _, dataset in find_datasets(cfg.test_dataloader.dataset):
            steps = dataset.get('pipeline', [])
            dataset['pipeline'] = [step for step in steps if 'Resize' not in name_of(step['type'])]
    args.out_dir = args.out_dir or Path('work_dirs', f'windows_{Path(args.config).stem}')
    return cfg


def samples(cfg: Config, images: list[Path] | None) -> Iterator[Sample]:
    """The images to compare on."""
    if images is not None:
        pipeline = ImagePipeline(cfg)
        for path in images:
            yield Sample(printable(path.name), pipeline(path)[0], None)
        return
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    for i in range(len(dataset)):
        data = dataset[i]
        found = data['data_samples']
        truth = found.gt_sem_seg.data[0] if 'gt_sem_seg' in found else None
        yield Sample(printable(Path(found.img_path).name), data, truth)


def run(args: argparse.Namespace) -> None:
    check_drawing()
    cfg = prepare(args)
    images = None
    if args.images:
        images = find_images(args.images)
    else:
        check_data(cfg, ('test',))
    device = select_device(args.device)
    if device.type == 'cpu':
        keep_freed_memory()
    model = load_model(cfg, args.checkpoint, device)
    comparison = Comparison(model, args.windows, args.max_memory)
    make_folder(args.out_dir)
    for line in comparison.run(itertools.islice(samples(cfg, images), args.limit)):
        print(line, flush=True)
    text = summary(comparison.results, model.dataset_meta)
    files = [args.out_dir / 'windows.md']
    write_text(files[0], text)
    print(f'\n{text}\n')
    if comparison.shown is not None:
        files.append(args.out_dir / 'windows.png')
        draw(comparison.shown, model.dataset_meta, files[1])
    print_written(*files)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
