"""Segments an image of any size in one piece, in bounded memory."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from ..backbones.pyramid import PyramidBackbone
from ..inference import (
    ImageRows,
    LiveBytes,
    NotByRowsError,
    RowProgram,
    bytes_in_memory,
    chosen_storage,
    is_watched,
    store_maps,
)
from .class_maps import TIFF_SUFFIXES, is_streamed, legend, pixel_area, write_class_map
from .pipeline import ImagePipeline
from .predict import complete_classes, toolbox_of
from .preprocessed import in_memory, preprocess

# Bytes of the maps of a chunk, where more memory is allowed: longer chunks are not faster.
CHUNK = 2**27
# The memory of a backbone is measured on images with at most so many pixels on a side.
SAMPLE = 512
# What images of some sizes take in a backbone, by what the number depends on.
_measured: weakref.WeakKeyDictionary[nn.Module, dict[tuple, int]] = weakref.WeakKeyDictionary()
# What a segmentor does from the image to the logits, in the methods of mmseg's EncoderDecoder.
METHODS = ('predict', 'inference', 'whole_inference', 'encode_decode', 'extract_feat')


def segment_whole(
    model: BaseModel,
    data: Mapping,
    max_memory: int,
    progress: Callable[[int, int], None] | None = None,
    maps_dir: str | os.PathLike | None = None,
    maps_dtype: torch.dtype | None = None,
) -> BaseDataElement:
    """Segment an image in one piece, as `test_step` does with `test_cfg.mode='whole'`.

    The classes are those of `test_step` to rounding, but neck, head and what follows them run over
    chunks of rows, so that neither their maps nor the logits of the full image exist. This works
    for heads of convolutions, norms, interpolation and pooling, such as UPerHead, FPNHead,
    SegformerHead and FCNHead. Any other head runs as a whole, with a line in the log that says why.

    Args:
        model: A segmentor of mmseg in eval mode, such as from `load_model`.
        data: What the test pipeline returns for the image, with `inputs` and `data_samples`. Or
            what `ImagePipeline.open_rows` returns, for an image that is read row by row.
        max_memory: Bytes that tensors may take at a time, besides the weights and `data`.
        progress: Called with the number of pixels that are done, and that of all pixels. Defaults
            to None.
        maps_dir: A folder for large maps of a backbone of this package, as memory-mapped files,
            which do not count as memory. Defaults to None, for maps in memory.
        maps_dtype: torch.float16 or torch.bfloat16, for large maps of a backbone of this package
            that stay while others are computed, and for the maps that the head reads. They then
            take half the memory, and all computations are still those of the weights' dtype.
            Defaults to None, for maps in that dtype.

    Returns:
        The data sample, on the CPU, with the classes of all pixels, (1, H, W), in `pred_sem_seg`.
        They are uint8 if that holds all classes, else int16. There are no `seg_logits`.

    Raises:
        ValueError: `max_memory` is too small; the message says how much is needed. Or `maps_dtype`
            is another one, or can't hold a value of a map.
        OSError: `maps_dir` is missing, or has no room for the maps.
    """
    with torch.no_grad():
        sample, parts = segment_rows(model, data, max_memory, maps_dir, maps_dtype=maps_dtype)
        height, width = sample.ori_shape[:2]
        labels = torch.empty((1, height, width), dtype=label_dtype(model.num_classes))
        for rows, part in parts:
            labels[:, rows.start : rows.stop] = part
            if progress is not None:
                progress(rows.stop * width, height * width)
    sample.set_data(dict(pred_sem_seg=PixelData(data=labels)))
    return sample


def segment_rows(
    model: BaseModel,
    data: Mapping,
    max_memory: int,
    maps_dir: str | os.PathLike | None = None,
    keeps_result: bool = True,
    maps_dtype: torch.dtype | None = None,
) -> tuple[BaseDataElement, Iterator[tuple[range, Tensor]]]:
    """Segment an image as `segment_whole` does, and give its rows as they are computed.

    It must be called, and its result read, without gradients.

    Args:
        model: As in `segment_whole`.
        data: As in `segment_whole`.
        max_memory: As in `segment_whole`.
        maps_dir: As in `segment_whole`. Defaults to None.
        keeps_result: The caller keeps the classes of all pixels, which then count as memory.
            Defaults to True.
        maps_dtype: As in `segment_whole`. Defaults to None.

    Returns:
        The data sample, on the CPU, and the rows in order, with their classes (1, rows, W).

    Raises:
        ValueError: As in `segment_whole`.
        OSError: As in `segment_whole`.
    """
    mode = (model.test_cfg or {}).get('mode', 'whole')
    reason = why_not_by_rows(model)
    if reason is not None:
        how = 'in one piece' if mode == 'whole' else 'in the windows of its config'
        print_log(f'the whole model runs {how}, in unbounded memory: {reason}', 'current')
        batch = model.data_preprocessor(pseudo_collate([in_memory(data)]), False)
        (sample,) = model.predict(batch.pop('inputs'), batch['data_samples'])
        sample = without_logits(sample, model.num_classes)
        labels = sample.pred_sem_seg.data
        return sample, iter([(range(labels.shape[1]), labels)])
    if mode != 'whole':
        print_log(f'the image is segmented in one piece, not by test_cfg.mode={mode!r}', 'current')
    image, sample = preprocess(model, data)
    with store_maps(maps_dir, maps_dtype, weights_dtype(model)):
        check_memory(backbone_bytes(model.backbone, image), max_memory, sample)
        maps = run_backbone(model.backbone, image)
    return sample.cpu(), decode(model, maps, sample, max_memory, keeps_result)


class WholePredictor:
    """Segments image files in one piece, in bounded memory, and writes maps of their classes.

    Args:
        model (BaseModel): A segmentor of mmseg, from `load_model`.
        max_memory (int): As in `segment_whole`.
        progress (Callable[[int, int], None], optional): As in `segment_whole`. Defaults to None.
        maps_dir (str | os.PathLike, optional): As in `segment_whole`. Defaults to None.
        maps_dtype (torch.dtype, optional): As in `segment_whole`. Defaults to None.

    Raises:
        ValueError: The model is not a segmentor.
    """

    def __init__(
        self,
        model: BaseModel,
        max_memory: int,
        progress: Callable[[int, int], None] | None = None,
        maps_dir: str | os.PathLike | None = None,
        maps_dtype: torch.dtype | None = None,
    ) -> None:
        if toolbox_of(model) != 'mmseg':
            raise ValueError(
                f'bounded memory needs a segmentor of mmseg, got {type(model).__name__}'
            )
        self.model = model
        self.pipeline = ImagePipeline(model.cfg)
        self.max_memory = max_memory
        self.progress = progress
        self.maps_dir = maps_dir
        self.maps_dtype = maps_dtype

    def __call__(self, path: Path, out_file: Path) -> str:
        """Segment an image file, and write the map of its classes.

        Args:
            path: The image.
            out_file: A file from `class_map_path`.

        Returns:
            A line for each class that was found, as of `legend`, with its area on the ground if the
            image is georeferenced.

        Raises:
            ValueError: The file is not an image that the pipeline can read, or it does not fit into
                the memory.
            OSError: `out_file` can't be written.
        """
        model = self.model
        labels = torch.arange(model.num_classes)
        binary = model.out_channels == 1
        classes, palette = complete_classes(model.dataset_meta, labels, binary)
        counts = np.zeros(len(classes), np.int64)
        with torch.no_grad():
            # the image is not kept here, so that it is gone when the backbone has read it
            sample, parts = segment_rows(
                model,
                self._open(path),
                self.max_memory,
                self.maps_dir,
                keeps_result=not is_streamed(out_file),
                maps_dtype=self.maps_dtype,
            )
            size = tuple(sample.ori_shape[:2])
            dtype = np.uint8 if model.num_classes <= 256 else np.uint16
            write_class_map(out_file, self._count(parts, size, counts), size, dtype, palette, path)
        return legend(counts, classes, palette, pixel_area(path))

    def _count(
        self, parts: Iterator[tuple[range, Tensor]], size: tuple[int, int], counts: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield the classes of rows, (rows, W), and add the pixels of each class to `counts`."""
        height, width = size
        for rows, part in parts:
            labels = part[0].long().cpu().numpy()
            counts += np.bincount(labels.ravel(), minlength=len(counts))
            yield labels
            if self.progress is not None:
                self.progress(rows.stop * width, height * width)

    def _open(self, path: Path) -> dict:
        """The image, whose rows are read when they are needed, if that is possible."""
        if path.suffix.lower() in TIFF_SUFFIXES:
            try:
                return self.pipeline.open_rows(path)
            except ValueError as error:
                print_log(f'{path.name} is loaded as a whole: {error}', 'current')
        return self.pipeline(path)[0]


def why_not_by_rows(model: BaseModel) -> str | None:
    """Why the neck and head of a model can't run over chunks, as far as its class and hooks say."""
    from mmseg.models import EncoderDecoder

    if not isinstance(model, EncoderDecoder):
        return f'{type(model).__name__} is not an EncoderDecoder'
    changed = [m for m in METHODS if getattr(type(model), m) is not getattr(EncoderDecoder, m)]
    if changed:
        return f'{type(model).__name__} has its own {", ".join(changed)}'
    parts = [model.decode_head, *([model.neck] if model.with_neck else [])]
    watched = [type(part).__name__ for part in parts if is_watched(part)]
    if watched:
        return f'{", ".join(watched)} has hooks'
    return None


def decode(
    model: BaseModel,
    maps: tuple[Tensor, ...],
    sample: BaseDataElement,
    max_memory: int,
    keeps_result: bool,
) -> Iterator[tuple[range, Tensor]]:
    """Yield the classes of rows, (1, rows, W), from the maps of the backbone."""

    dtype = weights_dtype(model)

    def classes(*maps: Tensor) -> Tensor:
        maps = tuple(map_.to(dtype) if map_.itemsize < dtype.itemsize else map_ for map_ in maps)
        features = model.neck(maps) if model.with_neck else maps
        logits = model.decode_head.predict(features, [sample.metainfo], model.test_cfg)
        empty = type(sample)(metainfo=sample.metainfo)
        (predicted,) = model.postprocess_result(logits, [empty])
        return predicted.pred_sem_seg.data

    try:
        program = RowProgram(classes, maps)
    except NotByRowsError as error:
        head = type(model.decode_head).__name__
        print_log(f'{head} runs in one piece, in unbounded memory: {error}', 'current')
        labels = classes(*maps)
        yield range(labels.shape[1]), labels
        return
    held = bytes_in_memory(maps)
    if keeps_result:
        held += math.prod(sample.ori_shape[:2]) * label_dtype(model.num_classes).itemsize
    yield from program.run(choose_rows(program, held, max_memory, sample))


def weights_dtype(model: BaseModel) -> torch.dtype:
    return next(model.parameters()).dtype


def choose_rows(program: RowProgram, held: int, max_memory: int, sample: BaseDataElement) -> int:
    """Rows of the image per chunk, so that a chunk fits what is left of the memory."""
    few, more = program.peak_bytes(8), program.peak_bytes(16)
    per_row = max(1, (more - few) / 8)
    check_memory(int(held + few - 7 * per_row), max_memory, sample)
    rows = int(8 + (min(CHUNK, max_memory - held) - few) / per_row)
    return max(1, min(rows, program.height))


def run_backbone(backbone: nn.Module, image: ImageRows) -> tuple[Tensor, ...]:
    """The maps of a backbone; one of this package reads the image row by row."""
    return backbone(image if reads_rows(backbone) else image.whole())


def reads_rows(backbone: nn.Module) -> bool:
    """Whether no caller can tell that a backbone reads an image row by row."""
    return isinstance(backbone, PyramidBackbone) and not (
        is_watched(backbone)
        or type(backbone).forward is not PyramidBackbone.forward
        or backbone._compiled_call_impl
    )


def backbone_bytes(backbone: nn.Module, image: ImageRows) -> int:
    """Bytes that an image and its maps in a backbone take at a time, measured on smaller images.

    Beyond these, memory is taken to grow with the number of pixels. Softmax attention without
    fused kernels needs more. What was measured serves the next images, too.
    """
    batch, *sides, channels = image.shape
    height, width = (min(side, SAMPLE) for side in sides)
    first = image.read(range(1))
    known = _measured.setdefault(backbone, {})

    def measure(height: int) -> int:
        def zeros(rows: range) -> Tensor:
            return first.new_zeros((batch, channels, len(rows), width))

        shape = batch, height, width, channels
        weights = {(weight.dtype, weight.device) for weight in backbone.parameters()}
        key = shape, first.dtype, frozenset(weights), reads_rows(backbone), chosen_storage()
        if key not in known:
            with LiveBytes() as live:
                run_backbone(backbone, ImageRows(shape, zeros))
            known[key] = live.peak
        return known[key]

    once, samples = measure(height), sides[0] * sides[1] / (height * width)
    if samples < 2:
        return int(once * samples)
    return int(once + (measure(2 * height) - once) * (samples - 1))


def check_memory(needed: int, max_memory: int, sample: BaseDataElement) -> None:
    if needed > max_memory:
        height, width = sample.ori_shape[:2]
        raise ValueError(
            f'max_memory must be at least {in_gib(needed)} for an image of {width}x{height} '
            f'pixels, got {in_gib(max_memory)}'
        )


def in_gib(size: int) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**27 else f'{size / 2**20:.1f} MiB'


def label_dtype(num_classes: int) -> torch.dtype:
    return torch.uint8 if num_classes <= 256 else torch.int16


def without_logits(sample: BaseDataElement, num_classes: int) -> BaseDataElement:
    """A predicted sample with nothing but its classes, in the format of `segment_whole`."""
    labels = sample.pred_sem_seg.data.to(label_dtype(num_classes)).cpu()
    result = type(sample)(metainfo=sample.metainfo)
    result.set_data(dict(pred_sem_seg=PixelData(data=labels)))
    return result
