"""Run a detector or segmentor on images: draw what it finds, and print it.

python tools/infer.py photo.jpg folder/ 'more/*.png' --config CONFIG --checkpoint FILE --out-dir out
"""

from __future__ import annotations

import argparse
import glob
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from saga_mm.backbones.pyramid import PyramidBackbone
from saga_mm.checkpoint import (
    CheckpointError,
    extract_state_dict,
    load_file,
    make_folder,
    match_weights,
    translate,
)
from saga_mm.cli import ConfigOptions, command_line, keep_freed_memory, load_config

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}
# weights that predictions do without
TRAINING_ONLY = 'auxiliary_head.'
# of an image (H, W, 3), uint8, BGR, and the file to draw to; returns what there is in words
Draw = Callable[[np.ndarray, Path], str]


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
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help='config entries to change',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def find_images(patterns: list[str]) -> list[Path]:
    """Image files behind files, folders (not their subfolders) and globs, each once, in order.

    Raises:
        ValueError: One of `patterns` leads to no image.
    """
    found = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise ValueError(f'no images in the folder {pattern}')
        elif path.exists():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
            if not files:
                raise ValueError(f'no such image: {pattern}')
        found += files
    return list({path.resolve(): path for path in found}.values())


def name_outputs(images: list[Path], out_dir: Path) -> list[Path]:
    """One PNG per image in `out_dir`: `<stem>.png`; `<stem>_2.png`, ... for more of that stem.

    Raises:
        ValueError: `out_dir` holds one of the images, which a drawing might overwrite.
    """
    for image in images:
        if image.resolve().parent == out_dir.resolve():
            raise ValueError(f'out-dir must not be the folder of an image, got {out_dir}')
    # stems that only a number tells apart keep their own names: a.jpg, b/a.jpg and a_2.jpg
    taken = {image.stem.lower() for image in images}
    names, seen = [], Counter()
    for image in images:
        name = image.stem
        seen[name.lower()] += 1
        if seen[name.lower()] > 1:
            number = seen[name.lower()]
            while f'{name}_{number}'.lower() in taken:
                number += 1
            name = f'{name}_{number}'
            taken.add(name.lower())
        names.append(out_dir / f'{name}.png')
    return names


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is; ValueError when torch can't compute on it."""
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=name).cpu()
    # a torch built without CUDA raises AssertionError
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'device {name!r} is not available: {reason}') from error
    return torch.device(name)


def load_weights(model: nn.Module, path: str) -> dict:
    """Load a checkpoint into `model`; return its meta, empty where it has none.

    Raises:
        CheckpointError: The file can't be read, or lacks a weight that predictions need.
    """
    checkpoint = load_file(path)
    weights = translate(model, extract_state_dict(checkpoint))
    match = match_weights(model, weights)
    needed = [name for name in match.missing if not name.startswith(TRAINING_ONLY)]
    if needed or match.mismatched:
        raise CheckpointError(f'{path} does not fit the model of the config, weights: {match}')
    if match.missing or match.unexpected:
        print(f'{path}, weights: {match}')
    model.load_state_dict({name: weights[name] for name in match.loaded}, strict=False)
    return checkpoint.get('meta', {})


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, for one process and in eval mode; no weights are loaded."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def backbone_of(model: nn.Module, config: str) -> PyramidBackbone:
    """The backbone of the model of a config; ValueError if it is not one of this project."""
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, PyramidBackbone):
        raise ValueError(
            f'{config}: the backbone of the config must be one of saga_mm, got '
            f'{type(backbone).__name__}'
        )
    return backbone


def load_model(cfg: Config, checkpoint: str, device: torch.device) -> nn.Module:
    """Build the model of a config with trained weights, ready for mmdet's and mmseg's inference.

    Class names and colours come from the checkpoint, or else from the test data set of the config.
    """
    model = build_model(cfg)
    meta = load_weights(model, checkpoint).get('dataset_meta')
    if meta is None:
        meta = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True}).metainfo
    model.dataset_meta = {key.lower(): value for key, value in meta.items()}
    if palette := model.dataset_meta.get('palette'):
        # a tuple would be one colour for all classes
        model.dataset_meta['palette'] = [tuple(color) for color in palette]
    model.cfg = cfg
    return model.to(device)


def make_detector(model: nn.Module, score_thr: float) -> Draw:
    """Draw boxes and masks that score more than `score_thr`, and count them per class."""
    from mmdet.apis import inference_detector
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    # mmdet knows how to make up colours
    visualizer.dataset_meta = {'palette': 'random', **model.dataset_meta}

    def draw(image: np.ndarray, out_file: Path) -> str:
        sample = inference_detector(model, image).cpu()
        visualizer.add_datasample(
            'image',
            image[..., ::-1],
            sample,
            draw_gt=False,
            pred_score_thr=score_thr,
            out_file=str(out_file),
        )
        found = sample.pred_instances
        found = found[found.scores > score_thr]
        texts = []
        for label, count in Counter(found.labels.tolist()).most_common():
            best = found.scores[found.labels == label].max()
            texts.append(f'{count} {model.dataset_meta["classes"][label]} (best {best:.2f})')
        return ', '.join(texts) or f'nothing scores more than {score_thr}'

    return draw


def make_segmentor(model: nn.Module) -> Draw:
    """Draw the class of each pixel, and tell each class's share of the pixels."""
    from mmseg.apis import inference_model
    from mmseg.visualization import SegLocalVisualizer

    # where mmseg looks for it
    if 'test_pipeline' not in model.cfg:
        model.cfg.test_pipeline = model.cfg.test_dataloader.dataset.pipeline
    # its arguments for the classes and the palette are swapped in some versions
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray, out_file: Path) -> str:
        sample = inference_model(model, image).cpu()
        visualizer.add_datasample(
            'image', image[..., ::-1], sample, draw_gt=False, out_file=str(out_file)
        )
        labels = sample.pred_sem_seg.data.flatten().tolist()
        texts = []
        for label, count in Counter(labels).most_common():
            share = 100 * count / len(labels)
            number = f'{share:.1f}' if share >= 0.1 else '<0.1'
            texts.append(f'{model.dataset_meta["classes"][label].strip()} {number} %')
        return ', '.join(texts)

    return draw


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.score_thr < 1:
        raise ValueError(f'score-thr must be in [0, 1), got {args.score_thr}')
    images = find_images(args.images)
    out_files = name_outputs(images, args.out_dir)
    device = pick_device(args.device)
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
    args = parse_args(argv)
    with command_line(args.debug):
        run(args)


if __name__ == '__main__':
    main()
