"""Finds image files, and writes images."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from ..checkpoint import write_atomically

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def find_images(patterns: list[str]) -> list[Path]:
    """List the image files that files, folders (without subfolders) and globs name, each once.

    Files in a folder are chosen by their suffix only, so some of them may not be readable images.

    Args:
        patterns: Names of files and folders, and globs such as 'photos/**/*.png'.

    Raises:
        ValueError: One of `patterns` matches no image.
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
    """Choose a PNG file in `out_dir` for each image.

    It is `<stem>.png`; further images with the same stem get `<stem>_2.png` and so on.

    Raises:
        ValueError: `out_dir` holds one of the images, which a drawing might overwrite.
    """
    for image in images:
        if image.resolve().parent == out_dir.resolve():
            raise ValueError(f'out-dir must not be the folder of an image, got {out_dir}')
    # an image whose own stem ends in a number keeps it: of a.jpg, b/a.jpg and a_2.jpg, the third
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
    """Write an image (H, W, 3), uint8, BGR, as a PNG file, completely or not at all."""
    write_atomically(path, cv2.imencode('.png', image)[1].tobytes())
