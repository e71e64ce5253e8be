"""Measures one model in several runtimes and precisions on a CPU: time, memory and error.

Everything is measured in a process of its own, see `cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..apis import build_model, load_complete_weights
from ..apis.export import Subject, check_format, largest_error, select, write
from ..cli import keep_freed_memory, load_config
from .measure import DTYPES, memory, peak, reset_peak, timed

CPU = torch.device('cpu')
# Precisions of each runtime, the reference first.
RUNTIMES = {
    'pytorch': ('fp32', 'bf16'),
    'aoti': ('fp32',),
    'onnxruntime': ('fp32', 'int8'),
    'openvino': ('fp32', 'bf16'),
}
Program = Callable[[Tensor], Sequence[Tensor]]


def load(config: str, checkpoint: str | None) -> BaseModel:
    """The model of a config, in eval mode.

    Args:
        config: The file.
        checkpoint: Its weights; None for random ones, which are the same each time.
    """
    torch.manual_seed(0)
    model = build_model(load_config(config, {}, ('model',)))
    if checkpoint:
        load_complete_weights(model, checkpoint)
    return model


@torch.no_grad()
def prepare(
    module: nn.Module,
    outputs: list[str],
    images: Tensor,
    runtimes: Sequence[str],
    folder: Path,
) -> None:
    """Write the files that `measure` needs: the module in each format, images and their outputs.

    Raises:
        ValueError: What writes a file is not installed.
    """
    if 'aoti' in runtimes:
        check_format('aoti')
    if {'onnxruntime', 'openvino'} & set(runtimes):
        check_format('onnx')
    torch.save((images, list(module(images))), folder / 'truth.pt')
    shape = tuple(images.shape)
    subject = Subject(module, outputs, {0: 'batch'}, [(2, *shape[1:])])
    if 'aoti' in runtimes:
        write('aoti', subject, folder / 'model.pt2')
    if {'onnxruntime', 'openvino'} & set(runtimes):
        write('onnx', subject, folder / 'model.onnx')
    if 'onnxruntime' in runtimes:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            folder / 'model.onnx', folder / 'model_int8.onnx', weight_type=QuantType.QInt8
        )


def measure(cell: dict) -> dict:
    """Measure a cell in this process.

    Returns:
        `seconds` per call; `bytes` that the loaded program and its first call add to the memory;
        and `error`, the largest one relative to the largest value of an output.
    """
    torch.set_num_threads(cell['threads'])
    keep_freed_memory()
    images, truth = torch.load(Path(cell['folder'], 'truth.pt'))
    prepared = LOADERS[cell['runtime']](cell)
    before = memory(CPU)
    reset_peak(CPU)
    program = prepared()
    with torch.no_grad():
        outputs = [output.float() for output in program(images)]
        added = peak(CPU) - before
        seconds = median(timed(lambda: program(images), CPU))
    return dict(seconds=seconds, bytes=added, error=largest_error(outputs, truth))


def _pytorch(cell: dict) -> Callable[[], Program]:
    dtype = DTYPES[cell['precision']]

    def start() -> Program:
        module, _ = select(load(cell['config'], cell['checkpoint']), cell['part'])

        def program(images: Tensor) -> Sequence[Tensor]:
            with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
                return module(images)

        return program

    return start


def _aoti(cell: dict) -> Callable[[], Program]:
    from torch._inductor import aoti_load_package

    return partial(aoti_load_package, str(Path(cell['folder'], 'model.pt2')))


def _onnxruntime(cell: dict) -> Callable[[], Program]:
    import onnxruntime

    name = 'model.onnx' if cell['precision'] == 'fp32' else f'model_{cell["precision"]}.onnx'

    def start() -> Program:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cell['threads']
        session = onnxruntime.InferenceSession(
            Path(cell['folder'], name), options, providers=['CPUExecutionProvider']
        )
        return lambda images: [
            torch.from_numpy(output) for output in session.run(None, {'images': images.numpy()})
        ]

    return start


def _openvino(cell: dict) -> Callable[[], Program]:
    import openvino

    settings = dict(
        INFERENCE_PRECISION_HINT={'fp32': 'f32'}.get(cell['precision'], cell['precision']),
        INFERENCE_NUM_THREADS=cell['threads'],
    )

    def start() -> Program:
        compiled = openvino.Core().compile_model(
            Path(cell['folder'], 'model.onnx'), 'CPU', settings
        )
        return lambda images: [
            torch.from_numpy(output) for output in compiled({'images': images.numpy()}).values()
        ]

    return start


LOADERS = dict(pytorch=_pytorch, aoti=_aoti, onnxruntime=_onnxruntime, openvino=_openvino)


def table(results: Sequence[dict]) -> str:
    """Format results as a table in Markdown."""
    lines = ['| runtime | precision | ms | MiB | error |', '|---|---|--:|--:|--:|']
    for one in results:
        name = f'| {one["runtime"]} | {one["precision"]} |'
        if 'seconds' not in one:
            lines.append(f'{name} {one["error"]} | | |')
            continue
        lines.append(
            f'{name} {1e3 * one["seconds"]:.0f} | {one["bytes"] / 2**20:.0f} | {one["error"]:.1e} |'
        )
    return '\n'.join(lines)
