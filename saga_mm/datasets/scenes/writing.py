"""Writes a folder of scenes, which is either complete or does not exist.

All files are written into a temporary folder next to the target, which is then renamed. If several
processes start at once, each makes its own folder, and all use the one that is finished first.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from . import photos
from .layouts import LAYOUTS, SPLITS, Layout
from .polygons import polygons
from .render import Scene, deal, render

MANIFEST = 'scenes.json'
# Version of what the generator draws. A folder that another version made is not reused.
VERSION = 1
JPEG_QUALITY = 92


def make_scenes(
    out: str | os.PathLike,
    layout: str = 'scenes',
    train: int | None = None,
    val: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Make a folder of scenes, unless a complete one with the same parameters exists.

    The bytes depend only on the parameters and on the versions of NumPy and OpenCV.

    Args:
        out: the folder to make.
        layout: 'scenes', 'coco' (an instance data set with COCO's categories and file names) or
            'ade20k' (labels with ADE20K's numbers and file names).
        train: number of training images. Default: 400 scenes, 80 in the other layouts.
        val: number of validation images. Default: 100 scenes, 20 in the other layouts.
        size: height and width in pixels. Default: (192, 256), (480, 640) for COCO, (512, 683) for
            ADE20K.
        seed: 0 or more.
        progress: shows a progress bar on stderr.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: An argument is wrong, or the folder exists and was made with other parameters.
        OSError: The folder cannot be written.
        RuntimeError: scikit-image is not installed, or mmdet, which is needed for COCO's names.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout: expected one of {", ".join(LAYOUTS)}, got {layout!r}')
    default = LAYOUTS[layout]
    height, width = _pair('size', default.size if size is None else size)
    parameters = dict(
        version=VERSION,
        layout=layout,
        train=_integer('train', default.train if train is None else train, 1, 999_999),
        val=_integer('val', default.val if val is None else val, 1, 999_999),
        height=_integer('height', height, 32, 4096),
        width=_integer('width', width, 32, 4096),
        seed=_integer('seed', seed, 0, 2**63),
    )
    out = Path(out).expanduser().resolve()
    if _is_reusable(out, parameters):
        return out
    photos.folder()
    categories = default.categories()
    temporary = out.parent / f'.{out.name}-{uuid.uuid4().hex}'
    temporary.mkdir(parents=True)
    try:
        for split in SPLITS:
            _write_split(temporary, default, categories, parameters, split, progress)
        (temporary / MANIFEST).write_text(json.dumps(parameters, indent=2) + '\n')
        try:
            temporary.rename(out)
        except OSError:
            if not _is_reusable(out, parameters):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_manifest(folder: Path) -> dict | None:
    """The parameters that a complete folder was made with, or None if there is no such folder.

    Raises:
        ValueError: The folder was not made by this generator, or files are missing.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        layout = LAYOUTS[manifest['layout']]
        counts = {split: manifest[split] for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f'{folder} is there, but was not made by this generator: '
            'choose another folder or remove it'
        ) from None
    for name in _file_names(layout, counts):
        if not (folder / name).is_file():
            raise ValueError(f'{folder} is incomplete, {name} is missing: remove the folder')
    return manifest


def _is_reusable(out: Path, parameters: dict) -> bool:
    manifest = read_manifest(out)
    if manifest is None:
        return False
    differing = [key for key in parameters if manifest.get(key) != parameters[key]]
    if differing:
        found, wanted = (
            ', '.join(f'{key}={values.get(key)}' for key in differing)
            for values in (manifest, parameters)
        )
        raise ValueError(
            f'{out} is there, made with {found} instead of {wanted}: '
            'choose another folder or remove it'
        )
    return True


def _file_names(layout: Layout, counts: dict[str, int]) -> Iterable[str]:
    for split, count in counts.items():
        if layout.instances:
            yield layout.name(layout.instances, split)
        for template in filter(None, (layout.image, layout.labels)):
            for number in range(1, count + 1):
                yield layout.name(template, split, number)


def _integer(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f'{name}: expected an integer from {low} to {high}, got {value!r}')
    return value


def _pair(name: str, values: Sequence) -> tuple:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise ValueError(f'{name}: expected (height, width), got {values!r}')
    return tuple(values)


def _write_split(
    folder: Path,
    layout: Layout,
    categories: list[tuple[int, str]],
    parameters: dict,
    split: str,
    progress: bool,
) -> None:
    seed, size = parameters['seed'], (parameters['height'], parameters['width'])
    stream = SPLITS.index(split)
    hands = deal(parameters[split], len(layout.kinds), np.random.default_rng([seed, stream]))
    coco: dict[str, list[dict]] = dict(images=[], annotations=[])
    coco['categories'] = [dict(id=i, name=name) for i, name in categories]
    numbered = track(
        enumerate(hands, start=1),
        total=len(hands),
        description=f'{split} scenes',
        console=Console(stderr=True),
        disable=not progress,
    )
    for number, hand in numbered:
        rng = np.random.default_rng([seed, stream, number])
        scene = render(layout.kinds, hand, split, size, rng)
        path = folder / layout.name(layout.image, split, number)
        _save(path, scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        if layout.labels:
            _save(folder / layout.name(layout.labels, split, number), _label_map(scene), [])
        if layout.instances:
            coco['images'].append(
                dict(id=number, file_name=path.name, height=size[0], width=size[1])
            )
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                ids = dict(id=len(coco['annotations']) + 1, image_id=number)
                ids['category_id'] = categories[label][0]
                coco['annotations'].append(ids | _outline(mask))
    if layout.instances:
        path = folder / layout.name(layout.instances, split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco, separators=(',', ':')))


def _label_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8: 0 for background, i + 1 for kind i."""
    labels = np.zeros(scene.image.shape[:2], dtype=np.uint8)
    for label, mask in zip(scene.labels, scene.masks, strict=True):
        labels[mask] = label + 1
    return labels


def _outline(mask: np.ndarray) -> dict:
    """The entries of a COCO annotation for an instance's mask, (H, W) bool."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return dict(
        segmentation=polygons(mask),
        area=int(mask.sum()),
        bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        iscrowd=0,
    )


def _save(path: Path, image: np.ndarray, options: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, encoded = cv2.imencode(path.suffix, image, options)
    path.write_bytes(encoded.tobytes())
