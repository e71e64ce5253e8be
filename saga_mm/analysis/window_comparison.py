"""Compares the segmentation of whole images with that in sliding windows."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from torch import Tensor

from ..apis import segment_whole, to_8_bit
from ..apis.predict import complete_classes
from ..apis.whole import in_gib, without_logits
from ..inference import LiveBytes
from .files import make_figure, write_figure
from .measure import synchronize
from .tables import table
from .windows import NEAR, Window, borders, edges, near_lines

# Labels with this value are left out of IoU, as by mmseg.
IGNORED = 255
# The sides of a detail in a picture, and the longest side of an overview, in pixels.
DETAIL, OVERVIEW = 256, 1024
WHOLE = 'whole'


class Sample(NamedTuple):
    """An image to compare on.

    Attributes:
        name: Of the image.
        data: What the test pipeline returns for it.
        truth: The labels of its pixels, (H, W), or None.
    """

    name: str
    data: Mapping
    truth: Tensor | None


class Shown(NamedTuple):
    """What a picture of an image shows.

    Attributes:
        name: Of the image.
        image: (H, W, 3), uint8, RGB.
        maps: Class maps (H, W) by name.
        borders: Rows and columns of the borders of windows, by the name of the map.
        place: Row and column where the whole image and windows differ most near a border.
    """

    name: str
    image: np.ndarray
    maps: dict[str, np.ndarray]
    borders: dict[str, list[list[int]]]
    place: tuple[int, int]


@dataclass
class Result:
    """What was measured for the whole image, or for windows of one size.

    Attributes:
        seconds: Of each image.
        peak: Bytes of tensors that a pass over the first image holds at most.
        areas: Intersection, union, prediction and label of each class, in pixels; or None.
        counts: Pixels or pairs that differ, and all of them, by the name of a measure of seams.
    """

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    areas: Tensor | None = None
    counts: dict[str, np.ndarray] = field(default_factory=dict)

    def count(self, name: str, different: int, total: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + np.array([different, total])

    def share(self, name: str) -> float:
        """The share that differs, or NaN if there is nothing to compare."""
        different, total = self.counts.get(name, (0, 0))
        return different / total if total else float('nan')


class Comparison:
    """Segments images as a whole and in windows.

    Args:
        model (BaseModel): A segmentor of mmseg in eval mode, with `encode_decode`.
        windows (Sequence[Window]): The windows to compare with.
        max_memory (int): As in `segment_whole`.

    Attributes:
        results (dict[str, Result]): By `'whole'`, and by the names of windows.
        shown (Shown, optional): The image with the most changes near borders, for a picture.
    """

    def __init__(self, model: BaseModel, windows: Sequence[Window], max_memory: int) -> None:
        if not hasattr(model, 'slide_inference'):
            raise ValueError(f'windows need an EncoderDecoder of mmseg, got {type(model).__name__}')
        self.model = model
        self.windows = {str(window): window for window in windows}
        self.max_memory = max_memory
        self.results = {name: Result() for name in (WHOLE, *self.windows)}
        self.shown: Shown | None = None
        self._most = -1.0

    def run(self, samples: Iterable[Sample]) -> Iterator[str]:
        """Compare on images; yield a line for each.

        Raises:
            ValueError: An image needs more than `max_memory`, or the pipeline resizes it.
        """
        for sample in samples:
            check_size(sample)
            if not self.results[WHOLE].seconds:
                self._measure_peaks(sample)
            maps = {name: self._timed(name, sample) for name in self.results}
            if sample.truth is not None:
                for name, labels in maps.items():
                    self._add_areas(self.results[name], labels, sample.truth)
            for name in self.windows:
                self._add_seams(name, maps, sample)
            times = ', '.join(f'{name} {self.results[name].seconds[-1]:.1f} s' for name in maps)
            yield f'{sample.name}: {times}'

    def _segment(self, name: str, sample: Sample) -> Tensor:
        """The classes of an image, (H, W), as a whole or in windows."""
        if name == WHOLE:
            found = segment_whole(self.model, sample.data, self.max_memory)
            return found.pred_sem_seg.data[0]
        window = self.windows[name]
        before = self.model.test_cfg
        side, stride = (window.size,) * 2, (window.stride,) * 2
        slide = dict(before or {}, mode='slide', crop_size=side, stride=stride)
        self.model.test_cfg = ConfigDict(slide)
        try:
            with torch.no_grad():
                (found,) = self.model.test_step(pseudo_collate([copy.deepcopy(sample.data)]))
        finally:
            self.model.test_cfg = before
        return without_logits(found, self.model.num_classes).pred_sem_seg.data[0]

    def _measure_peaks(self, sample: Sample) -> None:
        for name, result in self.results.items():
            with LiveBytes() as live:
                self._segment(name, sample)
            result.peak = live.peak

    def _timed(self, name: str, sample: Sample) -> np.ndarray:
        device = next(self.model.parameters()).device
        synchronize(device)
        start = time.perf_counter()
        labels = self._segment(name, sample)
        synchronize(device)
        self.results[name].seconds.append(time.perf_counter() - start)
        return labels.numpy()

    def _add_areas(self, result: Result, labels: np.ndarray, truth: Tensor) -> None:
        from mmseg.evaluation import IoUMetric

        found = torch.from_numpy(labels).long()
        classes = self.model.num_classes
        areas = IoUMetric.intersect_and_union(found, truth.long(), classes, IGNORED)
        result.areas = (0 if result.areas is None else result.areas) + torch.stack(areas).double()

    def _add_seams(self, name: str, maps: dict[str, np.ndarray], sample: Sample) -> None:
        window, (height, width) = self.windows[name], maps[WHOLE].shape
        # windows are placed on the image with the padding of the preprocessor
        sides = padded_size(self.model, sample)
        spans = [window.spans(side) for side in sides]
        lines = [
            [line for line in borders(side) if line < length]
            for side, length in zip(spans, (height, width), strict=True)
        ]
        if not any(lines):
            return
        result = self.results[name]
        seen = {'windows': maps[name], 'whole': maps[WHOLE]}
        if sample.truth is not None:
            seen['labels'] = sample.truth.numpy()
        for key, labels in seen.items():
            for place, counts in edges(labels, lines).items():
                result.count(f'edges of {key} {place}', *counts)
        elsewhere = [window.moved_spans(side) for side in sides]
        moved = segment_in(self.model, sample.data, *elsewhere)
        near = near_lines((height, width), lines)
        far = ~near & ~near_lines((height, width), list(map(borders, elsewhere)))
        changed = maps[name] != moved
        result.count('changes near', changed[near].sum(), near.sum())
        result.count('changes far', changed[far].sum(), far.sum())
        if changed[near].mean() > self._most:
            self._most = changed[near].mean()
            self._show(maps, near & (maps[name] != maps[WHOLE]), sample, sides)

    def _show(
        self, maps: dict[str, np.ndarray], differs: np.ndarray, sample: Sample, sides: Sequence[int]
    ) -> None:
        truth = {} if sample.truth is None else {'labels': sample.truth.numpy()}
        around = cv2.boxFilter(differs.astype(np.float32), -1, (4 * NEAR, 4 * NEAR))
        row, column = np.unravel_index(around.argmax(), around.shape)
        self.shown = Shown(
            sample.name,
            to_8_bit(sample.data['inputs'].permute(1, 2, 0).numpy())[..., ::-1],
            truth | maps,
            {
                name: [borders(window.spans(side)) for side in sides]
                for name, window in self.windows.items()
            },
            (int(row), int(column)),
        )


def check_size(sample: Sample) -> None:
    """ValueError if the pipeline resizes or flips an image: borders would be in other places."""
    meta = sample.data['data_samples'].metainfo
    height, width = sample.data['inputs'].shape[1:]
    if tuple(meta['ori_shape'][:2]) != (height, width) or meta.get('flip'):
        old = 'x'.join(map(str, reversed(meta['ori_shape'][:2])))
        raise ValueError(
            f'{sample.name}: windows are compared at the size of the image, but the test pipeline '
            f'turns {old} pixels into {width}x{height}; --full-size leaves out what resizes it'
        )


def padded_size(model: BaseModel, sample: Sample) -> tuple[int, int]:
    """Height and width of the input of a model."""
    batch = model.data_preprocessor(pseudo_collate([copy.deepcopy(sample.data)]), False)
    height, width = batch['inputs'].shape[2:]
    return height, width


def segment_in(
    model: BaseModel, data: Mapping, rows: Sequence[range], columns: Sequence[range]
) -> np.ndarray:
    """The classes of an image, (H, W), from windows in these rows and columns.

    It is what mmseg's `slide_inference` computes in the places of its windows.
    """
    batch = model.data_preprocessor(pseudo_collate([copy.deepcopy(data)]), False)
    image, samples = batch['inputs'], batch['data_samples']
    logits = image.new_zeros((1, model.out_channels, *image.shape[2:]))
    number = image.new_zeros((1, 1, *image.shape[2:]))
    for row in rows:
        for column in columns:
            place = (..., slice(row.start, row.stop), slice(column.start, column.stop))
            crop = image[place]
            meta = dict(samples[0].metainfo, img_shape=crop.shape[2:])
            with torch.no_grad():
                logits[place] += model.encode_decode(crop, [meta])
            number[place] += 1
    (found,) = model.postprocess_result(logits / number, samples)
    return without_logits(found, model.num_classes).pred_sem_seg.data[0].numpy()


def summary(results: Mapping[str, Result], meta: Mapping) -> str:
    """Tables in Markdown: IoU, time and memory, and seams.

    Args:
        results: Of a `Comparison`.
        meta: `dataset_meta` of the model.
    """
    rows = {}
    if all(result.areas is not None for result in results.values()):
        found = {name: ious(result) for name, result in results.items()}
        number = len(found[WHOLE])
        classes, _ = complete_classes(meta, torch.arange(number), binary=number == 2)
        rows['mean IoU'] = [percent(np.nanmean(iou)) for iou in found.values()]
        for i, name in enumerate(classes[:number]):
            rows[f'IoU, {name}'] = [percent(iou[i]) for iou in found.values()]
    rows['seconds per image'] = [f'{np.mean(r.seconds):.2f}' for r in results.values()]
    rows['peak memory'] = [in_gib(r.peak) for r in results.values()]
    windows = {name: result for name, result in results.items() if name != WHOLE}
    seams = {
        title: [percent(result.share(name), 3) for result in windows.values()]
        for title, name in {
            'edges at borders, windows': 'edges of windows at',
            'edges elsewhere, windows': 'edges of windows elsewhere',
            'edges at the same places, whole': 'edges of whole at',
            'edges at the same places, labels': 'edges of labels at',
            f'changes up to {NEAR} pixels from borders': 'changes near',
            'changes elsewhere': 'changes far',
        }.items()
    }
    columns = [name if name == WHOLE else f'windows {name}' for name in results]
    return '\n\n'.join([table('', columns, rows), table('seams', columns[1:], seams)])


def ious(result: Result) -> np.ndarray:
    """The IoU of each class; NaN for one that is neither predicted nor in the labels."""
    from mmseg.evaluation import IoUMetric

    assert result.areas is not None
    return np.asarray(IoUMetric.total_area_to_metrics(*result.areas)['IoU'])


def percent(share: float, digits: int = 2) -> str:
    return '-' if np.isnan(share) else f'{100 * share:.{digits}f} %'


def draw(shown: Shown, meta: Mapping, path: Path) -> None:
    """Draw an image, its labels and its class maps, and below a detail of each at a border.

    Args:
        shown: The image.
        meta: `dataset_meta` of the model.
        path: File of the picture.
    """
    from matplotlib.patches import Patch, Rectangle

    present = sorted({int(i) for labels in shown.maps.values() for i in np.unique(labels)})
    present = [label for label in present if label != IGNORED]
    classes, palette = complete_classes(meta, torch.tensor(present))
    colors = np.full((max(256, len(palette)), 3), 255, np.uint8)
    colors[: len(palette)] = palette
    panels = {'image': shown.image} | {name: colors[map_] for name, map_ in shown.maps.items()}
    height, width = shown.image.shape[:2]
    top, left = (
        max(0, min(place - DETAIL // 2, side - DETAIL))
        for place, side in zip(shown.place, (height, width), strict=True)
    )
    figure = make_figure(3 * len(panels), 3 * height / width + 4)
    figure.suptitle(f'{shown.name}, and where windows and whole differ most near a border')
    step = -(-max(height, width) // OVERVIEW)
    for axes, (name, panel) in zip(figure.subplots(2, len(panels)).T, panels.items(), strict=True):
        extent = (0, width, height, 0)
        axes[0].imshow(panel[::step, ::step], extent=extent, interpolation='nearest')
        axes[0].add_patch(Rectangle((left, top), DETAIL, DETAIL, fill=False, edgecolor='white'))
        axes[0].set_title(f'windows {name}' if name in shown.borders else name)
        axes[1].imshow(panel, extent=extent, interpolation='nearest')
        axes[1].set(xlim=(left, left + DETAIL), ylim=(top + DETAIL, top))
        rows, columns = shown.borders.get(name, [[], []])
        for ax in axes:
            ax.set(xticks=[], yticks=[])
            for row in rows:
                ax.axhline(row, color='white', linestyle=':', linewidth=0.8)
            for column in columns:
                ax.axvline(column, color='white', linestyle=':', linewidth=0.8)
    patches = [
        Patch(
            facecolor='#{:02x}{:02x}{:02x}'.format(*palette[label]),
            edgecolor='gray',
            label=classes[label],
        )
        for label in present
    ]
    figure.legend(handles=patches, loc='outside lower center', ncols=6, frameon=False)
    write_figure(path, figure, dpi=110)
