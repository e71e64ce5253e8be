"""Finds images, and writes what is drawn into them."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from ..checkpoint import write_atomically

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def find_images(patterns: list[str]) -> list[Path]:
    """Image files behind files, folders (not their subfolders) and globs, each once, in order.

    What is in a folder is told by its name alone: not all of it has to be a readable image.

    Args:
        patterns: Names of files and folders, and globs such as 'photos/**/*.png'.

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
            paths = map(Path, glob.glob(pattern, recursive=True))
            files = sorted(path for path in paths if not path.is_dir())
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
    names: list[Path] = []
    seen: Counter[str] = Counter()
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


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W, 3), uint8, BGR, as PNG: whole or not at all."""
    write_atomically(path, cv2.imencode('.png', image)[1].tobytes())
