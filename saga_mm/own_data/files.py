"""Finds images, their masks and their splits in a folder, by the usual names."""

from __future__ import annotations

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..apis.images import IMAGE_SUFFIXES

SPLIT_WORDS = dict(
    train=('train', 'training'), val=('val', 'valid', 'validation'), test=('test', 'testing')
)
_SPLIT = '|'.join(word for words in SPLIT_WORDS.values() for word in words)
_MASKS = (
    'annot|annots|annotations?|ann_dir|ann|masks?|labels?|label_?maps?|gts?|ground_?truths?|'
    'semantic|segs?|segmentations?|segmentation_?class|seg_?maps?|targets?'
)
_IMAGES = 'images?|imgs?|img_dir|jpegimages'
# a folder such as masks, train, val2017, train_masks, images_train or trainannot
FOLDER = re.compile(
    rf'(?P<before>{_SPLIT})?[_-]?(?:(?P<masks>{_MASKS})|{_IMAGES})?[_-]?(?P<after>{_SPLIT})?(?:20\d\d)?',
    re.IGNORECASE,
)
MASK_STEM = re.compile(r'(.+)[_-](?:masks?|labels?|gt|segs?|segmentation|annotation)', re.I)
# of the images without a split, one of so many is for validation
ONE_OF = 5


@dataclass(frozen=True)
class Pair:
    """An image and its mask, relative to the folder of the data.

    The names of both begin with `stem`.
    """

    image: PurePosixPath
    mask: PurePosixPath
    stem: str


@dataclass(frozen=True)
class Source:
    """Pairs that one data set of mmseg can hold: two folders, and a suffix in each."""

    img_path: str
    seg_map_path: str
    img_suffix: str
    seg_map_suffix: str
    # of the files, without the suffixes
    names: tuple[str, ...]


@dataclass
class Files:
    """What a folder holds.

    `problems` has a list of files for each reason why they are left out.
    """

    root: Path
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    was_split: bool = True
    # images for testing, if there are others for validation
    unused: int = 0


def split_of(path: PurePosixPath, *, stem: bool = False) -> str | None:
    """The split that the name of a folder above a file tells, or that of the file itself."""
    for part in (*path.parent.parts, *([path.stem] if stem else ())):
        for word in re.split(r'[_-]', part) if stem else [part]:
            match = FOLDER.fullmatch(word)
            found = match and (match['before'] or match['after'])
            if found:
                return next(name for name, ws in SPLIT_WORDS.items() if found.lower() in ws)
    return None


def is_of_masks(folder: PurePosixPath) -> bool:
    """Whether the name of a folder, or of one above, tells that it holds masks."""
    matches = map(FOLDER.fullmatch, folder.parts)
    return any(match and match['masks'] for match in matches)


def list_files(root: Path, suffixes: set[str]) -> list[PurePosixPath]:
    """The files of a folder and its subfolders, relative to it, without hidden ones."""
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(('.', '__'))]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [
            relative / name
            for name in names
            if Path(name).suffix.lower() in suffixes and not name.startswith('.')
        ]
    return sorted(found)


def find_pairs(root: Path, images: str | None = None, masks: str | None = None) -> Files:
    """Find images with masks.

    Args:
        root: The folder of the data.
        images: The folder of the images, relative to `root`, if its name is none of the usual ones.
        masks: That of the masks.

    Raises:
        ValueError: There are no images, or no masks, or an image has two masks.
    """
    found = list_files(root, IMAGE_SUFFIXES)
    if not found:
        raise ValueError(f'no images in {root}')
    roles = _assign(found, images, masks)
    if not roles['masks'] or not roles['images']:
        missing = 'masks' if not roles['masks'] else 'images'
        raise ValueError(
            f'no {missing} among the {len(found)} image files in {root}: put them in folders '
            f'`images` and `masks`, or name theirs with --images and --masks'
        )
    files = Files(root)
    splits: dict[str, list[Pair]] = defaultdict(list)
    for split, pair in _match(files, roles['images'], roles['masks']):
        splits[split or 'all'].append(pair)
    if not splits:
        first = (next(iter(paths)) for paths in roles.values())
        raise ValueError(
            'no image has a mask of the same name, or with an ending such as _mask: got {} and '
            '{}'.format(*first)
        )
    _choose_splits(files, splits)
    return files


def _assign(
    found: Sequence[PurePosixPath], images: str | None, masks: str | None
) -> dict[str, dict[PurePosixPath, str]]:
    """The images and the masks, each with the stem that both have."""
    roles: dict[str, dict[PurePosixPath, str]] = dict(images={}, masks={})
    if masks is not None:
        of_masks = {path for path in found if path.is_relative_to(masks)}
    else:
        of_masks = {path for path in found if is_of_masks(path.parent)}
        if images is not None:
            of_masks -= {path for path in found if path.is_relative_to(images)}
    if not of_masks:
        of_masks = {path for path in found if MASK_STEM.fullmatch(path.stem)}
    for path in found:
        match = MASK_STEM.fullmatch(path.stem)
        if path in of_masks:
            roles['masks'][path] = match[1] if match else path.stem
        elif images is None or path.is_relative_to(images):
            roles['images'][path] = path.stem
    # stems such as a_gt only if the images have no such name
    stems = set(roles['images'].values())
    for path in roles['masks']:
        if path.stem in stems:
            roles['masks'][path] = path.stem
    return roles


def _match(
    files: Files, images: dict[PurePosixPath, str], masks: dict[PurePosixPath, str]
) -> Iterator[tuple[str | None, Pair]]:
    """Pairs with their split."""
    counts = Counter((split_of(path), stem) for path, stem in images.items())
    deep = max(counts.values()) > 1

    def key(path: PurePosixPath, stem: str) -> tuple:
        parts = (part for part in path.parent.parts if not FOLDER.fullmatch(part))
        return (split_of(path), *(parts if deep else ()), stem)

    of_key: dict[tuple, PurePosixPath] = {}
    for path, stem in masks.items():
        other = of_key.setdefault(key(path, stem), path)
        if other != path:
            raise ValueError(
                f'{other} and {path} may be the masks of one image: name the folder of the masks '
                'with --masks'
            )
    for path, stem in images.items():
        mask = of_key.pop(key(path, stem), None)
        split = split_of(path)
        if mask is not None:
            yield split, Pair(path, mask, stem)
        elif split != 'test':
            files.problems['images without a mask'].append(str(path))
    files.problems['masks without an image'] += map(str, of_key.values())


def _choose_splits(files: Files, splits: dict[str, list[Pair]]) -> None:
    """The pairs for training and validation, of which there is at least one each."""
    if not splits.get('train') and not splits.get('val'):
        splits['train'] = splits.pop('all', []) + splits.pop('test', [])
    if not splits.get('val') and splits.get('test'):
        splits['val'] = splits.pop('test')
    files.unused = len(splits.get('test', ()))
    splits['train'] += splits.pop('all', [])
    if not splits.get('val'):
        files.was_split = False
        splits['train'], splits['val'] = divide(splits['train'])
    for split in ('train', 'val'):
        files.pairs[split] = splits[split]


def divide(items: list) -> tuple[list, list]:
    """Divide what has no split, always in the same way."""
    chosen = set(random.Random(0).sample(range(len(items)), max(len(items) // ONE_OF, 1)))
    train = [item for i, item in enumerate(items) if i not in chosen]
    return train, [item for i, item in enumerate(items) if i in chosen]


def find_sources(pairs: Sequence[Pair]) -> list[Source]:
    """The data sets that hold some pairs: mostly one, more for several suffixes or folders."""
    groups: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        suffixes = pair.image.name[len(pair.stem) :], pair.mask.name[len(pair.stem) :]
        groups[suffixes].append(pair)
    return [source for key, group in groups.items() for source in _sources_of(*key, group)]


def _sources_of(img_suffix: str, seg_suffix: str, pairs: Sequence[Pair]) -> list[Source]:
    """The sources of pairs with the same suffixes."""
    folders = [os.path.commonpath([p.image.parent for p in pairs])]
    folders += [os.path.commonpath([p.mask.parent for p in pairs])]
    names = []
    for pair in pairs:
        name, other = pair.image.relative_to(folders[0]), pair.mask.relative_to(folders[1])
        if name.parent != other.parent:
            # folders of masks below or beside those of their images
            apart = defaultdict(list)
            for one in pairs:
                apart[one.image.parent, one.mask.parent].append(one)
            return [
                s for group in apart.values() for s in _sources_of(img_suffix, seg_suffix, group)
            ]
        names.append((name.parent / pair.stem).as_posix())
    images, masks = (folder or '.' for folder in folders)
    return [Source(images, masks, img_suffix, seg_suffix, tuple(names))]


def is_listed_alone(root: Path, source: Source) -> bool:
    """Whether mmseg finds these images, and no others, without a list of them."""
    folder = root / source.img_path
    found = list_files(folder, IMAGE_SUFFIXES)
    listed = {path.as_posix() for path in found if path.name.endswith(source.img_suffix)}
    return listed == {f'{name}{source.img_suffix}' for name in source.names}
