"""Measures one model in several runtimes and precisions on a CPU: time, memory and error.

Everything is measured in a process of its own, see `cells`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from ..apis import build_model, load_complete_weights
from ..apis.export import Subject, check_format, largest_error, select, write
from ..cli import keep_freed_memory, load_config
from .measure import DTYPES, memory, peak, reset_peak, timed
from .trainings import METRICS

CPU = torch.device('cpu')
# Precisions of each runtime, the reference first.
RUNTIMES = {
    'pytorch': ('fp32', 'bf16'),
    'aoti': ('fp32',),
    'onnxruntime': ('fp32', 'int8'),
    'openvino': ('fp32', 'bf16'),
}
# Entries of a config that `evaluate` needs.
TESTED = ('model', 'test_dataloader', 'test_evaluator')
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
        `error`, the largest one relative to the largest value of an output; and with `test`, the
        `metrics` of the whole model on the test data.
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
    result = dict(seconds=seconds, bytes=added, error=largest_error(outputs, truth))
    return {**result, 'metrics': evaluate(cell, program)} if cell['test'] else result


@torch.no_grad()
def evaluate(cell: dict, program: Program) -> dict[str, float]:
    """Test the model of a cell, a part of which is computed by `program`; return the metrics.

    Raises:
        ValueError: An image has another size than the program takes.
    """
    cfg = load_config(cell['config'], {}, TESTED)
    model = load(cell['config'], cell['checkpoint'])

    def compute(images: Tensor, *_: object) -> list[Tensor]:
        if list(images.shape[2:]) != list(cell['size']):
            raise ValueError(
                f'--size must be that of the test images, {tuple(images.shape[2:])}, '
                f'got {tuple(cell["size"])}'
            )
        return [output.float() for output in program(images)]

    if cell['part'] == 'backbone':
        model.backbone.forward = compute
    else:
        model.encode_decode = lambda *inputs: compute(*inputs)[0]
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for data in loader:
        evaluator.process(data_samples=model.test_step(data), data_batch=data)
    metrics = evaluator.evaluate(len(loader.dataset))
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (float, np.floating))
    }


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
    tested: dict[str, float] = next((one['metrics'] for one in results if 'metrics' in one), {})
    metrics = [name for name in (*METRICS, *tested) if name in tested][:1]
    heads = ['runtime', 'precision', 'ms', 'MiB', 'error', *metrics]
    lines = [f'| {" | ".join(heads)} |', f'|---|---|{"--:|" * (len(heads) - 2)}']
    for one in results:
        if 'seconds' in one:
            columns = [
                f'{1e3 * one["seconds"]:.0f}',
                f'{one["bytes"] / 2**20:.0f}',
                f'{one["error"]:.1e}',
                *(f'{one["metrics"][name]:.2f}' for name in metrics),
            ]
        else:
            columns = [one['error']] + [''] * (len(heads) - 3)
        cells = [one['runtime'], one['precision'], *columns]
        lines.append(''.join(f'| {cell} ' if cell else '| ' for cell in cells) + '|')
    return '\n'.join(lines)
