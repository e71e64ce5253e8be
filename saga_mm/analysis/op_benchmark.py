"""Times linear attention: the eager formula, torch.compile of it, this project, and others.

Legend: `packed` is the packed projection (B, N, parts, H, D): q, k, v and, for some ops, gates.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    depthwise_conv2d,
    ffn,
    gated_attention,
    gated_linear_attention,
    layer_norm,
    rank_augmented_linear_attention,
)
from saga_kernels.launch import ATTENTION_CHANNELS, FFN_CHANNELS

Impl = Literal['reference', 'triton']
# The time of SDPA grows with the square of the number of tokens. Beyond this number of FLOPs it is
# not measured, and its cell says 'too long'.
MOST_FLOPS = {'cuda': 2e13, 'cpu': 2e10}
# What the ops of this project are compared with.
ALTERNATIVES = ('eager', 'torch.compile', 'SDPA', 'flash_bla')


def gates_applied(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a, b = packed.unbind(2)
    return F.elu(q) + 1, (F.elu(k) + 1) * a.sigmoid(), v * b.sigmoid()


def eager(packed: Tensor) -> Tensor:
    """The formula in plain PyTorch, in the dtype of the input."""
    q, k, v = gates_applied(packed)
    state = torch.einsum('bnhd,bnhe->bhde', k / packed.shape[1], v)
    denominator = torch.einsum('bnhd,bhd->bnh', q, k.mean(1)) + 1e-6
    return torch.einsum('bnhd,bhde->bnhe', q, state) / denominator[..., None]


def image_of(packed: Tensor) -> tuple[tuple[int, int], Tensor]:
    """The size of an image, as square as possible, and frequencies of a rotation."""
    tokens, dim = packed.shape[1], packed.shape[-1]
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    frequencies = 10000 ** -torch.linspace(0, 1, dim // 4, device=packed.device)
    return (height, tokens // height), frequencies


def rank_augmented(packed: Tensor, impl: Impl) -> Tensor:
    return rank_augmented_linear_attention(packed, *image_of(packed), impl=impl)


def eager_rank_augmented(packed: Tensor) -> Tensor:
    """As `eager`. The tables of the rotation are computed in each call."""
    (height, width), frequencies = image_of(packed)
    q, k, v = packed.unbind(2)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    scores = torch.einsum('bhd,bnhd->bnh', q.mean(1), k) * packed.shape[-1] ** -0.5
    k = k * scores.softmax(1)[..., None]
    rows, columns = (torch.arange(n, device=packed.device) for n in (height, width))
    pair = torch.broadcast_tensors(
        rows[:, None, None] * frequencies, columns[:, None] * frequencies
    )
    angles = torch.cat(pair, -1).flatten(0, 1)[:, None]
    cos, sin = (x.repeat_interleave(2, -1).to(packed.dtype) for x in (angles.cos(), angles.sin()))

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    state = torch.einsum('bnhd,bnhe->bhde', rotate(k), v)
    denominator = torch.einsum('bnhd,bhd->bnh', q, k.sum(1)) + 1e-6
    return torch.einsum('bnhd,bhde->bnhe', rotate(q), state) / denominator[..., None]


def decay(packed: Tensor, impl: Impl) -> Tensor:
    """Linear attention whose weights fall to 1/e after 16 tokens."""
    log_decay = torch.full(packed.shape[3:4], -1 / 16, device=packed.device)
    return decay_linear_attention(packed, log_decay, image_of(packed)[0], impl=impl)


def eager_decay(packed: Tensor) -> Tensor:
    """The reference implementation, because the plain formula needs a matrix of N x N."""
    return decay(packed, 'reference')


def wkv(packed: Tensor, impl: Impl) -> Tensor:
    """Bidirectional WKV of the second and third part, whose weights fall to 1/e after 16 tokens."""
    k, v = packed[:, :, 1:].flatten(3).unbind(2)
    w, u = (torch.full(k.shape[2:], x, device=packed.device) for x in (1 / 16, 1.0))
    out = bidirectional_wkv(k, v, w, u, decay_per='token', impl=impl)
    return out.unflatten(2, packed.shape[3:])


def eager_wkv(packed: Tensor) -> Tensor:
    """The implementation in PyTorch, because the plain formula needs a matrix of N x N."""
    return wkv(packed, 'reference')


@functools.cache
def parameters(device: torch.device, *shape: int) -> Tensor:
    """Weights in float32, which stay the same from call to call."""
    return torch.randn(shape, device=device)


def depthwise(packed: Tensor, impl: Impl) -> Tensor:
    """A convolution of 3 x 3 of the second part as a map, with a bias, plus the first part."""
    add, x = packed.flatten(3).unflatten(1, image_of(packed)[0]).unbind(3)
    channels = x.shape[-1]
    weights = parameters(x.device, channels, 1, 3, 3), parameters(x.device, channels)
    out = depthwise_conv2d(x, *(w.to(x.dtype) for w in weights), add=add, impl=impl)
    return out.flatten(1, 2).unflatten(2, packed.shape[3:])


def norm(packed: Tensor, impl: Impl) -> Tensor:
    """A layer norm over the channels of all heads."""
    x = packed.flatten(2)
    weight = parameters(x.device, x.shape[-1]).to(x.dtype)
    return layer_norm(x, weight, weight, impl=impl).unflatten(2, packed.shape[3:])


@functools.cache
def layers(device: torch.device, dtype: torch.dtype, channels: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of a norm and of the linear layers of an FFN with 8 times the channels."""
    shapes = (channels,), (8 * channels, channels), (channels, 8 * channels)
    weights = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    return [(w.to(dtype), torch.zeros(len(w), device=device, dtype=dtype)) for w in weights]


def feed_forward(packed: Tensor, impl: Impl) -> Tensor:
    """The second half of a block: x plus the FFN of its norm, over the channels of all heads."""
    x = packed.flatten(2)
    out = ffn(x, *layers(x.device, x.dtype, x.shape[-1]), impl=impl)
    return out.unflatten(2, packed.shape[3:])


@functools.cache
def attention_layers(device: torch.device, dtype: torch.dtype, channels: int) -> dict[str, Any]:
    """Weights and biases of a norm, of the linear layers of SAGA's attention, and of LePE."""
    shapes = dict(
        norm=(channels,), in_proj=(5 * channels, channels), proj=(channels, channels),
        output_gate=(channels, channels), lepe=(channels, 1, 3, 3),
    )  # fmt: skip
    weights = {
        name: torch.randn(shape, device=device) / shape[-1] ** 0.5 for name, shape in shapes.items()
    }
    return {
        name: (w.to(dtype), torch.zeros(len(w), device=device, dtype=dtype))
        for name, w in weights.items()
    }


def attention(packed: Tensor, impl: Impl) -> Tensor:
    """The first half of a block of SAGA, with LePE and an output gate."""
    x = packed.flatten(2).unflatten(1, image_of(packed)[0])
    layers = attention_layers(x.device, x.dtype, x.shape[-1])
    out = gated_attention(x, **layers, num_heads=packed.shape[3], impl=impl)
    return out.flatten(1, 2).unflatten(2, packed.shape[3:])


def sdpa(packed: Tensor) -> Tensor:
    q, k, v = (packed[:, :, part].transpose(1, 2) for part in range(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash_bla(packed: Tensor) -> Tensor:
    """The kernels of flash_bla. Gates and feature map, which these lack, are eager."""
    from flash_bla.ops.linear_attn.fused import linear_attention

    return linear_attention(*(x.transpose(1, 2) for x in gates_applied(packed))).transpose(1, 2)


@dataclass(frozen=True)
class Op:
    """An op to time.

    Attributes:
        parts: Number of parts of the packed projection.
        eager: The formula, a function of the packed projection.
        this: The op of this project, a function of the packed projection and `impl`.
        forward, backward: Number of token tensors that have to be read or written; None for an op
            without a backward pass.
        channels: The most channels that the kernel takes, by bytes per element; None for any.
    """

    parts: int
    eager: Callable
    this: Callable
    forward: int
    backward: int | None
    channels: dict[int, int] | None = None


OPS = {
    'gated': Op(5, eager, lambda packed, impl: gated_linear_attention(packed, impl=impl), 6, 11),
    'rank_augmented': Op(3, eager_rank_augmented, rank_augmented, 5, 9),
    'decay': Op(3, eager_decay, decay, 6, 10),
    'wkv': Op(3, eager_wkv, wkv, 3, 5),
    # What autograd moves to put the gradients of the two parts into one tensor is 4.
    'depthwise': Op(2, lambda packed: depthwise(packed, 'reference'), depthwise, 3, 3 + 4),
    'layer_norm': Op(1, lambda packed: norm(packed, 'reference'), norm, 2, 3),
    'ffn': Op(
        1, lambda packed: feed_forward(packed, 'reference'), feed_forward, 2, None, FFN_CHANNELS
    ),
    'gated_attention': Op(
        1, lambda packed: attention(packed, 'reference'), attention, 5, None, ATTENTION_CHANNELS
    ),
}


def implementations(op: Op, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = dict(eager=op.eager)
    if device == 'cuda':
        found['torch.compile'] = torch.compile(op.eager, dynamic=False)
    impl: Impl = 'triton' if device == 'cuda' else 'reference'
    found['this'] = lambda packed: op.this(packed, impl)
    if op.parts >= 3:
        found['SDPA'] = sdpa
    if op is OPS['gated'] and device == 'cuda' and importlib.util.find_spec('flash_bla'):
        found['flash_bla'] = flash_bla
    return found


def median_ms(function: Callable[[], object], device: str, seconds: float) -> float:
    if device == 'cuda':
        from triton.testing import do_bench

        budget = round(1e3 * seconds)
        return do_bench(function, warmup=budget // 4, rep=budget, return_mode='median')
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes per millisecond, read and written, of a copy that is too large for caches."""
    source = torch.empty(2**30 if device == 'cuda' else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), device, seconds)


def measure(
    function: Callable[[Tensor], Tensor],
    packed: Tensor,
    device: str,
    seconds: float,
    backward: bool,
) -> dict[str, float]:
    """Measure the milliseconds of forward, and of forward and backward."""
    with torch.no_grad():
        forward = median_ms(lambda: function(packed), device, seconds)
    if not backward:
        return dict(forward=forward)
    leaf = packed.detach().requires_grad_()
    grad_out = torch.randn_like(function(packed))

    def step() -> None:
        torch.autograd.grad(function(leaf), leaf, grad_out)

    return dict(forward=forward, both=median_ms(step, device, seconds))


def cell(
    op: Op,
    name: str,
    function: Callable[[Tensor], Tensor],
    packed: Tensor,
    device: str,
    seconds: float,
) -> dict[str, Any]:
    batch, tokens, _, heads, dim = packed.shape
    # FLOPs per pair of tokens, head and channel: 4 forward, 10 backward.
    flops = 14 * batch * heads * tokens**2 * dim
    if name == 'SDPA' and flops > MOST_FLOPS[device]:
        return dict(error='too long')
    most = op.channels[packed.itemsize] if op.channels else math.inf
    if name == 'this' and device == 'cuda' and heads * dim > most:
        return dict(error='too many channels')
    try:
        return measure(function, packed, device, seconds, op.backward is not None)
    except torch.OutOfMemoryError:
        return dict(error='out of memory')
    finally:
        gc.collect()
        if device == 'cuda':
            torch.cuda.empty_cache()


def benchmark(
    name: str,
    device: str,
    dtype: str,
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int, int]],
    seconds: float,
    skip: Sequence[str] = (),
    save: Callable[[dict], None] = lambda report: None,
) -> dict:
    """Time an op of `OPS` and alternatives to it; print each row when it is complete.

    Args:
        name: Name of the op.
        device: 'cuda' or 'cpu'.
        dtype: A dtype of torch, such as 'bfloat16'.
        tokens: Numbers of tokens.
        shapes: (batch, heads, head dim). Each is measured with each number of tokens.
        seconds: Duration of each measurement.
        skip: Alternatives to leave out. Defaults to none.
        save: Called with the report after each row. Defaults to doing nothing.

    Returns:
        `environment`, `copy_gb_per_s`, and `rows`, which JSON can hold.
    """
    op = OPS[name]
    copy = copy_bandwidth(device, seconds)
    rows: list[dict[str, Any]] = []
    report = dict(environment=environment(name, device, dtype), copy_gb_per_s=copy / 1e6, rows=rows)
    for (batch, heads, dim), count in itertools.product(shapes, tokens):
        torch.compiler.reset()
        shape = (batch, count, op.parts, heads, dim)
        row: dict[str, Any] = dict(batch=batch, heads=heads, dim=dim, tokens=count, cells={})
        rows.append(row)
        try:
            packed = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
        except torch.OutOfMemoryError:
            row['cells']['this'] = dict(error='out of memory')
            continue
        row['token_tensor_bytes'] = packed[:, :, 0].numel() * packed.element_size()
        for other, function in implementations(op, device).items():
            if other in skip:
                continue
            row['cells'][other] = cell(op, other, function, packed, device, seconds)
        row['share'] = shares(op, row, copy)
        print(json.dumps(row), flush=True)
        save(report)
    return report


def shares(op: Op, row: dict[str, Any], copy: float) -> dict[str, Any]:
    """GB/s of the op of this project, and their share of the copy bandwidth."""
    this = row['cells']['this']
    if 'error' in this:
        return {}
    times = dict(forward=(op.forward, this['forward']))
    if op.backward is not None:
        times['backward'] = op.backward, this['both'] - this['forward']
    result = {}
    for name, (tensors, ms) in times.items():
        speed = tensors * row['token_tensor_bytes'] / ms
        result[name] = dict(gb_per_s=speed / 1e6, share=speed / copy)
    return result


def environment(op: str, device: str, dtype: str) -> dict[str, object]:
    return dict(
        op=op,
        device=torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or 'CPU',
        driver_runtime=torch.version.cuda or torch.version.hip,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=importlib.metadata.version('triton') if importlib.util.find_spec('triton') else None,
        dtype=dtype,
    )


def markdown(report: dict[str, Any]) -> str:
    names = max((list(row['cells']) for row in report['rows']), key=len)
    lines = [
        ', '.join(f'{key} {value}' for key, value in report['environment'].items()),
        '',
        f'Copy: {report["copy_gb_per_s"]:.0f} GB/s. Microseconds, forward / forward and backward.',
        '',
        '| B, H, D | N | ' + ' | '.join(names) + ' | forward | backward |',
        '|---|---|' + '---|' * len(names) + '---|---|',
    ]
    for row in report['rows']:
        cells = [text(row['cells'].get(name, {})) for name in names]
        for name in ('forward', 'backward'):
            speed = row.get('share', {}).get(name)
            cells.append(f'{speed["gb_per_s"]:.0f} GB/s, {speed["share"]:.0%}' if speed else '')
        shape = f'{row["batch"]}, {row["heads"]}, {row["dim"]}'
        lines.append(f'| {shape} | {row["tokens"]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def text(cell: dict[str, Any]) -> str:
    if 'forward' in cell:
        return ' / '.join(
            f'{1e3 * cell[name]:,.1f}' for name in ('forward', 'both') if name in cell
        )
    return cell.get('error', '')
