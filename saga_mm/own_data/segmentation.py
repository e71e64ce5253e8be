"""Surveys images with masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .config import segmentation_config
from .files import Files, Pair, Source, find_pairs, find_sources, is_listed_alone
from .images import Loading, Look, choose_loading, look_at_image
from .labels import Classes, Mask, choose_classes, code_of, count_pixels, look_at_mask
from .survey import Survey, look_at_all, tell_images, tell_problems, tell_table, title_of


def survey_segmentation(
    root: Path,
    stem: str,
    classes: Sequence[str] = (),
    ignore: Sequence[int | tuple[int, int, int]] = (),
    images: str | None = None,
    masks: str | None = None,
) -> Survey:
    """Look at images with masks, and write a config for them.

    Args:
        root: The folder of the data.
        stem: The name of the config, with which the names of the files beside it begin.
        classes: Names of the classes; by default the lines of `classes.txt` in `root`.
        ignore: Values or colours of pixels that count for no class, beside 255.
        images: The folder of the images, relative to `root`, if it has none of the usual names.
        masks: That of the masks.

    Raises:
        ValueError: There is nothing that can be trained on. One line.
    """
    files = find_pairs(root, images, masks)
    pairs = [pair for split in ('train', 'val') for pair in files.pairs[split]]
    results = look_at_all(lambda pair: _look(root, pair), pairs)
    found = {pair: found for pair, found in zip(pairs, results, strict=True)}
    seen = _leave_out_broken(files, found)
    loading = _choose_loading(files, seen)
    listed = root / 'classes.txt'
    if not classes and listed.is_file():
        classes = listed.read_text(encoding='utf-8').split('\n')
        classes = [name.strip() for name in classes if name.strip()]
    chosen = choose_classes([mask for _, mask in seen.values()], classes, ignore)
    _require_both(files)
    sources, lists = _list_images(files, stem)
    looks = [look for look, _ in seen.values()]
    config = segmentation_config(
        f"SegFormer's head, SAGA-T, from scratch, on {title_of(root)}: batch 8 x 1 CPU or GPU.",
        root,
        sources,
        loading,
        chosen,
        np.array([(look.height, look.width) for look in looks]),
    )
    lines = [*_tell_files(files, sources), *tell_images(looks, loading), '']
    lines += [*_tell_classes(chosen, [mask for _, mask in seen.values()])]
    return Survey('\n'.join([*lines, *tell_problems(files.problems)]), config, lists)


def _look(root: Path, pair: Pair) -> tuple[Look | str, Mask | str]:
    """The image and the mask, or why they can't be read."""
    results: list = []
    for look, path in ((look_at_image, pair.image), (look_at_mask, pair.mask)):
        try:
            results.append(look(root / path))
        except ValueError as error:
            results.append(f'{path} ({error})')
    return results[0], results[1]


def _leave_out_broken(
    files: Files, found: Mapping[Pair, tuple[Look | str, Mask | str]]
) -> dict[Pair, tuple[Look, Mask]]:
    """The pairs that can be trained on."""
    good: dict[Pair, tuple[Look, Mask]] = {}
    for pair, (look, mask) in found.items():
        if isinstance(look, str):
            files.problems['broken images'].append(look)
        elif isinstance(mask, str):
            files.problems['masks that can not be used'].append(mask)
        elif (look.height, look.width) != (mask.height, mask.width):
            sizes = f'{mask.width}x{mask.height} for {look.width}x{look.height}'
            files.problems['masks of another size than the image'].append(f'{pair.mask} ({sizes})')
        else:
            good[pair] = look, mask
    if not good:
        raise ValueError(
            f'no image with a mask can be used: {"; ".join(tell_problems(files.problems))}'
        )
    is_color = Counter(mask.is_color for _, mask in good.values()).most_common(1)[0][0]
    other = 'masks of one channel, while most have colours'
    if not is_color:
        other = 'masks with colours, while most have one channel'
    different = [pair for pair, (_, mask) in good.items() if mask.is_color != is_color]
    for pair in different:
        files.problems[other].append(str(pair.mask))
        del good[pair]
    _keep(files, good)
    return good


def _choose_loading(files: Files, seen: dict[Pair, tuple[Look, Mask]]) -> Loading:
    """Choose how images are loaded; those that can't be are left out."""
    by_name = {str(pair.image): pair for pair in seen}
    before = {reason: len(names) for reason, names in files.problems.items()}
    loading = choose_loading(
        {name: seen[pair][0] for name, pair in by_name.items()}, files.problems
    )
    for reason, names in files.problems.items():
        for name in names[before.get(reason, 0) :]:
            del seen[by_name[name]]
    _keep(files, seen)
    return loading


def _keep(files: Files, kept: Mapping[Pair, object]) -> None:
    for split, pairs in files.pairs.items():
        files.pairs[split] = [pair for pair in pairs if pair in kept]


def _require_both(files: Files) -> None:
    numbers = {split: len(pairs) for split, pairs in files.pairs.items()}
    if not all(numbers.values()):
        raise ValueError(
            'there must be an image with a mask for training and another for validation, got '
            f'{numbers["train"]} and {numbers["val"]}'
        )


def _list_images(
    files: Files, stem: str
) -> tuple[dict[str, list[tuple[Source, str | None]]], dict[str, bytes]]:
    """The data sets of each split, and the lists of images that they need."""
    sources: dict[str, list[tuple[Source, str | None]]] = {}
    lists = {}
    for split, pairs in files.pairs.items():
        sources[split] = []
        for i, source in enumerate(find_sources(pairs), 1):
            name = None
            if not files.was_split or not is_listed_alone(files.root, source):
                name = f'{stem}_{split}{f"_{i}" if i > 1 else ""}.txt'
                lists[name] = '\n'.join([*source.names, '']).encode()
            sources[split].append((source, name))
    return sources, lists


def _tell_files(
    files: Files, sources: Mapping[str, Sequence[tuple[Source, str | None]]]
) -> list[str]:
    lines = []
    for split, purpose in (('train', 'training'), ('val', 'validation')):
        places = ', '.join(
            f'{source.img_path}/*{source.img_suffix} with {source.seg_map_path}/*'
            f'{source.seg_map_suffix}'
            for source, _ in sources[split][:3]
        )
        lines.append(f'{len(files.pairs[split])} images for {purpose}: {places}')
    if not files.was_split:
        lines.append('there was no split: one image of five, at random, is for validation')
    if files.unused:
        lines.append(f'{files.unused} images for testing are not used')
    return lines


def _tell_classes(classes: Classes, masks: Sequence[Mask]) -> list[str]:
    pixels = count_pixels(masks)
    total = sum(pixels.values())
    rows: list[tuple] = [('value', 'class', 'pixels', 'masks')]
    for value, name in zip(classes.values, classes.names, strict=True):
        code = code_of(value)
        share = f'{100 * pixels[code] / total:.3g} %'
        rows.append((value, name, share, sum(code in mask.pixels for mask in masks)))
    lines = tell_table(rows)
    ignored = total - sum(pixels[code_of(value)] for value in classes.values)
    if ignored:
        lines.append(f'{100 * ignored / total:.3g} % of the pixels are ignored')
    absent = [
        n for v, n in zip(classes.values, classes.names, strict=True) if not pixels[code_of(v)]
    ]
    if absent:
        lines.append(f'in no mask: {", ".join(absent)}')
    empty = sum(len(set(mask.pixels) & set(map(code_of, classes.values))) < 2 for mask in masks)
    if empty:
        lines.append(f'{empty} masks hold one class or none')
    return lines
