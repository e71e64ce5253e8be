"""Layer norm in Triton: one pass over the rows forward, one backward, no atomics.

Legend: N rows, C channels; a program goes through a span of rows, BN at a time, all of whose
channels it holds in registers.

Forward     h = (x - mean) / sqrt(var + eps),  o = w h + b
Backward    g = w do,  dx = (g - mean(g) - h mean(g h)) / sqrt(var + eps)
            dw = sum over rows of do h,  db = sum of do

The backward pass computes mean and variance again, since it has to read x anyway. Every program
writes its sums for dw and db, which are added in a fixed order.

Traffic, in token tensors: forward 2 (x, o), backward 3 (do, x, dx).
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import alignment, padded_dim, plan, processors
from ..starter import Starter
from ..tiles import SIZES, aligned, load, tile


@triton.jit
def share(C):
    """1 / C. It is rounded to the nearest, so that a single channel is its own mean."""
    return tl.div_rn(tl.full([1], 1.0, tl.float32), C.to(tl.float32))


@triton.jit
def normalized(p_x, o, m, b_share, eps):
    """h of some rows, and 1 / sqrt(var + eps)."""
    b_x = load(p_x + o, m)
    b_mean = tl.sum(b_x, 1) * b_share
    b_d = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_r = tl.rsqrt(tl.sum(b_d * b_d, 1) * b_share + eps)[:, None]
    return b_d * b_r, b_r


@triton.jit
def norm(p_x, p_w, p_bias, o, m, o_c, C, b_share, eps):
    """o of some rows."""
    b_h, _ = normalized(p_x, o, m, b_share, eps)
    return b_h * load(p_w + o_c, o_c < C)[None, :] + load(p_bias + o_c, o_c < C)[None, :]


@triton.jit(do_not_specialize=SIZES)
def norm_forward(
    p_x, p_w, p_bias, p_out, N, C, SPAN, eps,
    BN: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """o from x."""
    (C,) = aligned((C,), ALIGN)
    b_share = share(C)
    begin = tl.program_id(0) * SPAN
    o_c = tl.arange(0, BD)
    b_w = load(p_w + o_c, o_c < C)[None, :]
    b_bias = load(p_bias + o_c, o_c < C)[None, :]
    for n in range(begin, tl.minimum(begin + SPAN, N), BN):
        o_n = n + tl.arange(0, BN)
        o, m = tile(o_n, o_c, C), (o_n < N)[:, None] & (o_c < C)[None, :]
        b_h, _ = normalized(p_x, o, m, b_share, eps)
        tl.store(p_out + o, (b_h * b_w + b_bias).to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=SIZES)
def norm_backward(
    p_do, p_x, p_w, p_dx, p_partial, N, C, SPAN, eps,
    BN: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dx, and partial dw and db, from do and x."""
    (C,) = aligned((C,), ALIGN)
    b_share = share(C)
    begin = tl.program_id(0) * SPAN
    o_c = tl.arange(0, BD)
    b_w = load(p_w + o_c, o_c < C)[None, :]
    b_dw = tl.zeros([BN, BD], tl.float32)
    b_db = tl.zeros([BN, BD], tl.float32)
    for n in range(begin, tl.minimum(begin + SPAN, N), BN):
        o_n = n + tl.arange(0, BN)
        o, m = tile(o_n, o_c, C), (o_n < N)[:, None] & (o_c < C)[None, :]
        b_h, b_r = normalized(p_x, o, m, b_share, eps)
        b_do = load(p_do + o, m)
        b_g = b_do * b_w
        b_mean, b_slope = tl.sum(b_g, 1) * b_share, tl.sum(b_g * b_h, 1) * b_share
        b_dx = (b_g - b_mean[:, None] - b_h * b_slope[:, None]) * b_r
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        b_dw += b_do * b_h
        b_db += b_do
    p_partial += tl.program_id(0).to(tl.int64) * 2 * C + o_c
    tl.store(p_partial, tl.sum(b_dw, 0), mask=o_c < C)
    tl.store(p_partial + C, tl.sum(b_db, 0), mask=o_c < C)


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The normalised x, contiguous, in a dtype."""
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        starter = _starter(norm_forward, x.device, x.dtype, x.shape, eps)
        starter(p_x=x, p_w=weight, p_bias=bias, p_out=out)
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, contiguous, in the dtypes of x and of weight."""
    grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad, torch.zeros_like(weight), torch.zeros_like(weight)
    x, weight, grad_out = x.contiguous(), weight.contiguous(), grad_out.contiguous()
    starter = _starter(norm_backward, x.device, x.dtype, x.shape, eps)
    sums = (starter.launch.programs, 2, x.shape[-1])
    partial = x.new_empty(sums, dtype=torch.float32)
    starter(p_do=grad_out, p_x=x, p_w=weight, p_dx=grad, p_partial=partial)
    dw, db = partial.sum(0).to(weight.dtype).unbind()
    # An op must not return two views of one tensor.
    return grad, dw.clone(), db.clone()


@functools.lru_cache(4096)
def _starter(
    kernel: Any, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], eps: float
) -> Starter:
    """What launches a kernel over all rows of a contiguous x."""
    channels = shape[-1]
    rows = math.prod(shape[:-1])
    launch = plan('layer_norm', kernel.__name__, dtype, channels, 1, rows, processors(device))
    numbers = dict(
        N=rows, C=channels, SPAN=launch.span, eps=eps, BN=launch.block,
        BD=max(32, padded_dim(channels)), ALIGN=alignment(channels),
    )  # fmt: skip
    return Starter(kernel, device, launch, numbers)
