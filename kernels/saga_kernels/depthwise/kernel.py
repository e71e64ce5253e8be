"""Depthwise convolution in Triton: one pass forward, one backward, no atomics.

Legend: B batch, H height, W width, C channels, K side of the filter; a program goes through a span
of rows of BW columns and BC channels, BN rows at a time.

Forward     o = add + bias + sum over taps t of w_t x(. + t)
Backward    dx = [do] + sum_t w_t do(. - t),  dw_t = sum over pixels of x do(. - t),  db = sum do
            With a residual, which is add = x, dx includes do.

Both passes load every row of the map that is convolved once for each of K columns, from the L1
cache but for the first time, and keep the rows of a strip in registers. dw shares the shifted do of
dx. Every program of the backward pass writes its sums, which are added in a fixed order.

Traffic, in token tensors: forward 3 (x, add, o), or 2 without a map to add, or with x as that map;
backward 3 (do, x, dx).
"""

# Tuples grow in loops, which changes their types.
# mypy: disable-error-code=assignment
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import ceil_div
from ..launch import DEPTHWISE_CHANNELS, DEPTHWISE_COLUMNS, alignment, meaningful, plan, processors
from ..starter import Starter
from ..tiles import SIZES, aligned, tile


@triton.jit
def program(HEIGHT, WIDTH, C, SPAN, BW: tl.constexpr, BC: tl.constexpr):
    """Image, first and last row, columns, channels, and index among the programs with these
    channels."""
    # Channels run fastest: neighbouring programs read the same cache lines.
    blocks, columns, splits = tl.cdiv(C, BC), tl.cdiv(WIDTH, BW), tl.cdiv(HEIGHT, SPAN)
    i = tl.program_id(0)
    o_c = i % blocks * BC + tl.arange(0, BC)
    i_part = i // blocks
    o_w = i_part % columns * BW + tl.arange(0, BW)
    begin = i_part // columns % splits * SPAN
    i_b = (i_part // (columns * splits)).to(tl.int64)
    return i_b, begin, tl.minimum(begin + SPAN, HEIGHT), o_w, o_c, i_part.to(tl.int64)


@triton.jit
def inside(row, o_w, p_mask, HEIGHT, WIDTH, mask_r, mask_w):
    """Which pixels of a row there are, without those that are masked."""
    # A block, because the interpreter has Python's numbers for the rows of a loop.
    o_y = row + tl.zeros_like(o_w)
    m = (o_y >= 0) & (o_y < HEIGHT) & (o_w >= 0) & (o_w < WIDTH)
    if p_mask is not None:
        p = p_mask + o_y.to(tl.int64) * mask_r + o_w.to(tl.int64) * mask_w
        m &= tl.load(p, mask=m, other=0).to(tl.int32) > 0
    return m[:, None]


@triton.jit
def strip(
    p, row, o_w, o_c, m_c, p_mask, HEIGHT, WIDTH, s_r, s_w, mask_r, mask_w,
    K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What K x K taps of BN rows of pixels see, row by row: (BN + K - 1) * K tiles."""
    tiles = ()
    for r in tl.static_range(BN + K - 1):
        for s in tl.static_range(K):
            y, o_x = row + r - K // 2, o_w + s - K // 2
            m = inside(y, o_x, p_mask, HEIGHT, WIDTH, mask_r, mask_w) & m_c
            b_x = tl.load(p + y * s_r.to(tl.int64) + tile(o_x, o_c, s_w), m, other=0.0)
            tiles = tiles + (b_x,)
    return tiles


@triton.jit
def load_taps(p_w, o_c, C, K: tl.constexpr):
    """The K * K weights of each channel."""
    taps = ()
    for t in tl.static_range(K * K):
        b_w = tl.load(p_w + o_c * K * K + t, mask=o_c < C, other=0.0)
        taps = taps + (b_w.to(tl.float32)[None, :],)
    return taps


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    p_x, p_w, p_bias, p_add, p_mask, p_out, HEIGHT, WIDTH, C, SPAN,
    x_b, x_r, x_w, add_b, add_r, add_w, mask_b, mask_r, mask_w,
    K: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """o from x and what is added to it."""
    C, x_b, x_r, x_w = aligned((C, x_b, x_r, x_w), ALIGN)
    add_b, add_r, add_w = aligned((add_b, add_r, add_w), ALIGN)
    i_b, begin, end, o_w, o_c, _ = program(HEIGHT, WIDTH, C, SPAN, BW, BC)
    m_c = (o_c < C)[None, :]
    p_x += i_b * x_b
    p_out += i_b * HEIGHT * WIDTH * C
    if p_mask is not None:
        p_mask += i_b * mask_b
    taps = load_taps(p_w, o_c, C, K)
    b_bias = tl.zeros([1, BC], tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    for row in range(begin, end, BN):
        tiles = strip(
            p_x, row, o_w, o_c, m_c, p_mask, HEIGHT, WIDTH, x_r, x_w, mask_r, mask_w, K, BN
        )
        for r in tl.static_range(BN):
            y = row + r
            m = inside(y, o_w, None, end, WIDTH, 0, 0) & m_c
            b_o = tl.zeros([BW, BC], tl.float32) + b_bias
            if p_add is not None:
                p = p_add + i_b * add_b + y * add_r.to(tl.int64) + tile(o_w, o_c, add_w)
                b_o += tl.load(p, m, other=0.0).to(tl.float32)
            for t in tl.static_range(K * K):
                b_o += taps[t] * tiles[r * K + t].to(tl.float32)
            p = p_out + y * WIDTH.to(tl.int64) * C + tile(o_w, o_c, C)
            tl.store(p, b_o.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=SIZES)
def conv_backward(
    p_do, p_x, p_w, p_mask, p_dx, p_partial, HEIGHT, WIDTH, C, SPAN,
    x_b, x_r, x_w, do_b, do_r, do_w, mask_b, mask_r, mask_w,
    K: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """dx, and partial dw and db, from do and x."""
    C, x_b, x_r, x_w = aligned((C, x_b, x_r, x_w), ALIGN)
    do_b, do_r, do_w = aligned((do_b, do_r, do_w), ALIGN)
    i_b, begin, end, o_w, o_c, i_part = program(HEIGHT, WIDTH, C, SPAN, BW, BC)
    m_c = (o_c < C)[None, :]
    p_do += i_b * do_b
    p_x += i_b * x_b
    p_dx += i_b * HEIGHT * WIDTH * C
    if p_mask is not None:
        p_mask += i_b * mask_b
    taps = load_taps(p_w, o_c, C, K)
    CENTER: tl.constexpr = K // 2 * K + K // 2
    b_db = tl.zeros([BW, BC], tl.float32)
    sums = ()
    for _ in tl.static_range(K * K):
        sums = sums + (b_db,)
    for row in range(begin, end, BN):
        tiles = strip(p_do, row, o_w, o_c, m_c, None, HEIGHT, WIDTH, do_r, do_w, 0, 0, K, BN)
        for r in tl.static_range(BN):
            y = row + r
            m = inside(y, o_w, None, end, WIDTH, 0, 0) & m_c
            m_live = inside(y, o_w, p_mask, end, WIDTH, mask_r, mask_w) & m_c
            p = p_x + y * x_r.to(tl.int64) + tile(o_w, o_c, x_w)
            b_x = tl.load(p, m_live, other=0.0).to(tl.float32)
            b_dx = tl.zeros([BW, BC], tl.float32)
            more = ()
            for t in tl.static_range(K * K):
                # do(. - t): a pixel reaches the outputs on the other side of it.
                b_do = tiles[r * K + K * K - 1 - t].to(tl.float32)
                b_dx += taps[t] * b_do
                more = more + (sums[t] + b_x * b_do,)
            sums = more
            b_do = tiles[r * K + CENTER].to(tl.float32)
            b_db += tl.where(m, b_do, 0.0)
            b_dx = tl.where(m_live, b_dx, 0.0)
            if RESIDUAL:
                b_dx += b_do
            p = p_dx + y * WIDTH.to(tl.int64) * C + tile(o_w, o_c, C)
            tl.store(p, b_dx.to(p_dx.dtype.element_ty), mask=m)
    p_partial += i_part * (K * K + 1) * C + o_c
    for t in tl.static_range(K * K):
        tl.store(p_partial + t * C, tl.sum(sums[t], 0), mask=o_c < C)
    tl.store(p_partial + K * K * C, tl.sum(b_db, 0), mask=o_c < C)


def out_dtype(x: Tensor, add: Tensor | None) -> torch.dtype:
    """The wider of two dtypes."""
    return x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor | None
) -> Tensor:
    """add + conv(x) + bias, (B, H, W, C), contiguous."""
    out = x.new_empty(x.shape, dtype=out_dtype(x, add))
    if out.numel() == 0:
        return out
    add_stride = None if add is None else add.stride()
    starter, _ = _starter_of(conv_forward, x, weight, mask, add=add_stride)
    starter(p_x=x, p_w=weight.contiguous(), p_mask=mask, p_bias=bias, p_add=add, p_out=out)
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, contiguous, in the dtypes of x and of weight."""
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad, torch.zeros_like(weight), weight.new_zeros(len(weight))
    # The gradient of a sum comes from autograd as an expanded tensor, with strides of zero.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    starter, parts = _starter_of(
        conv_backward, x, weight, mask, do=grad_out.stride(), RESIDUAL=residual
    )
    partial = x.new_empty((parts, weight[0].numel() + 1, len(weight)), dtype=torch.float32)
    starter(
        p_x=x, p_w=weight.contiguous(), p_mask=mask, p_do=grad_out, p_dx=grad, p_partial=partial
    )
    sums = partial.sum(0).to(weight.dtype)
    return grad, sums[:-1].t().contiguous().view(weight.shape), sums[-1].clone()


def _starter_of(
    kernel: Any, x: Tensor, weight: Tensor, mask: Tensor | None, **others: Any
) -> tuple[Starter, int]:
    """What launches a kernel over all pixels of a map, and how many of its programs have the same
    channels.

    Args:
        kernel: Made by `triton.jit`.
        x: The map.
        weight: The filters.
        mask: (B, H, W, 1), or None.
        others: Strides of the map to add or of the gradient, and constants.
    """
    mask_stride = (0, 0, 0) if mask is None else mask.stride()[:3]
    return _starter(
        kernel, x.device, x.dtype, x.shape, x.stride(), weight.shape[-1], mask_stride, **others
    )


@functools.lru_cache(4096)
def _starter(
    kernel: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    x: tuple[int, int, int, int],
    side: int,
    mask: tuple[int, int, int],
    *,
    add: tuple[int, int, int, int] | None = None,
    do: tuple[int, int, int, int] | None = None,
    **constants: bool,
) -> tuple[Starter, int]:
    batch, height, width, channels = shape
    columns = batch * ceil_div(width, DEPTHWISE_COLUMNS[side])
    heads = columns * ceil_div(channels, DEPTHWISE_CHANNELS)
    launch = plan('depthwise', kernel.__name__, dtype, side, heads, height, processors(device))
    steps: dict[str, int] = {}
    for name, stride in dict(x=x, add=add, do=do).items():
        b, r, w, _ = (0, 0, 0, 0) if stride is None else meaningful(shape, stride)
        steps |= {f'{name}_b': b, f'{name}_r': r, f'{name}_w': w}
    mask_b, mask_r, mask_w = mask
    numbers = dict(
        HEIGHT=height, WIDTH=width, C=channels, SPAN=launch.span, **steps,
        mask_b=mask_b, mask_r=mask_r, mask_w=mask_w, K=side, BN=launch.block,
        BW=DEPTHWISE_COLUMNS[side], BC=DEPTHWISE_CHANNELS,
        ALIGN=alignment(channels, *steps.values()), **constants,
    )  # fmt: skip
    return Starter(kernel, device, launch, numbers), columns * launch.splits
