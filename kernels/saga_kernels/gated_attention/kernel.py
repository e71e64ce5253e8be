"""Norm, gated linear attention with LePE, projection and residual in Triton: two passes, forward.

Legend: B batch, N tokens of a map WIDTH tokens wide, H heads, D head dim, C = H D channels; q, k, v
and the gate logits a, b are parts of the projection of a token, and g is the output gate.

    h = norm(x),  (q, k, v, a, b) = W h + b,  g = W_g h + b_g
    k' = phi(k) * sigmoid(a),  v' = v * sigmoid(b),  S = sum_i k'_i^T v'_i,  z = sum_i k'_i
    w = phi(q) * z / (phi(q) . z + eps),  A = S / z (row by row),  y = (w A + LePE(v)) * g
    o = x + gamma (W_o y + b_o)

The first pass writes v, which LePE reads at the neighbours of a token as well, and partial states,
of which a kernel between the passes makes A and z. All else of the projection stays on the chip,
and the second pass computes h again. What `gated.kernel` says of half precision holds here too.

Traffic, in token tensors: 5 (x, v; x, v, o). The weights come from the L2 cache for every program.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, is_nvidia, padded_dim, plan, processors, product_precision, tile_config
from ..layer_norm.kernel import norm
from ..starter import Starter
from ..tiles import (
    SIZES,
    live,
    load,
    phi,
    product,
    program_range,
    safe_div,
    sigmoid,
    store_state,
    tile,
)


@triton.jit
def linear(
    b_h, p_weight, p_bias, o_c, o_d, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """D outputs of a linear layer of C channels."""
    m_d = o_d < D
    # (C, D), read along the axis that is contiguous.
    p = p_weight + (o_d[None, :] * C + o_c[:, None])
    b_w = tl.load(p, (o_c < C)[:, None] & m_d[None, :], other=0.0)
    b_y = tl.dot(b_h, b_w, input_precision=PRECISION)
    return b_y + load(p_bias + o_d, m_d)[None, :]


@triton.jit(do_not_specialize=SIZES)
def kv_forward(
    p_x, p_w, p_bias, p_in, p_in_bias, p_mask, p_v, p_partial, N, SPAN, mask_b, mask_n, norm_eps,
    HEADS: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v, and partial S and z, from x."""
    C: tl.constexpr = HEADS * D
    i_b, i_h, i_partial, begin, end = program_range(N, HEADS, SPAN)
    T: tl.constexpr = p_in.dtype.element_ty
    p_x += i_b * N * C
    p_v += i_b * N * C + i_h * D
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_s = tl.zeros([BD, BD], tl.float32)
    # Added up over tokens after the loop: in it, that would take shuffles between threads. Only n
    # and n + 8 of each 16 tokens are added in the loop. A thread of an NVIDIA GPU has both, and
    # their sum takes half the registers.
    b_z = tl.zeros([BN // 16, 8, BD], tl.float32)
    p_in += i_h * D * C
    p_in_bias += i_h * D
    # To load weights ahead would take registers that there are not.
    for n in tl.range(begin, end, BN, num_stages=1):
        o_n = n + tl.arange(0, BN)
        # The x of masked tokens counts as zero, because it may be NaN.
        m_n = live(o_n, end, p_mask, i_b, mask_b, mask_n)
        m_x, m = m_n & (o_c < C)[None, :], m_n & m_d
        b_h = norm(p_x, p_w, p_bias, tile(o_n, o_c, C), m_x, o_c, C, 1.0 / C, norm_eps).to(T)
        b_v = linear(b_h, p_in + 2 * C * C, p_in_bias + 2 * C, o_c, o_d, C, D, PRECISION)
        b_v = tl.where(m, b_v, 0.0)
        tl.store(p_v + tile(o_n, o_d, C), b_v.to(T), (o_n < end)[:, None] & m_d)
        if GATED:
            p = p_in + 4 * C * C
            b_v *= sigmoid(linear(b_h, p, p_in_bias + 4 * C, o_c, o_d, C, D, PRECISION))
        b_v = b_v.to(T)
        b_k = phi(linear(b_h, p_in + C * C, p_in_bias + C, o_c, o_d, C, D, PRECISION), ELU)
        if GATED:
            p = p_in + 3 * C * C
            b_k *= sigmoid(linear(b_h, p, p_in_bias + 3 * C, o_c, o_d, C, D, PRECISION))
        b_s += product(tl.trans(b_k), b_v, PRECISION)
        # v' of masked tokens is zero, but not their k'. To select zeros would take more registers.
        b_k *= tl.where(m_n, 1.0, 0.0)
        b_z += tl.sum(tl.reshape(b_k, [BN // 16, 2, 8, BD]), 1)
    b_z = tl.sum(tl.reshape(b_z, [BN // 2, BD]), 0)
    store_state(p_partial + i_partial * (D + 1) * D, b_s, b_z, o_d, D)


@triton.jit(do_not_specialize=SIZES)
def merge(p_partial, p_a, p_z, SPLITS, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """A row of A, and its element of z, from partial states, which are added in a fixed order."""
    i_state, i_row = (tl.program_id(0) // D).to(tl.int64), tl.program_id(0) % D
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_s = tl.zeros([BN, BD], tl.float32)
    b_z = tl.zeros([BN, 1], tl.float32)
    for s in range(0, SPLITS, BN):
        o_s = (s + tl.arange(0, BN))[:, None]
        p = p_partial + (i_state * SPLITS + o_s) * ((D + 1) * D)
        b_s += load(p + i_row * D + o_d[None, :], (o_s < SPLITS) & m_d)
        b_z += load(p + D * D + i_row, o_s < SPLITS)
    b_z = tl.sum(b_z)
    b_a = safe_div(tl.sum(b_s, 0), b_z)
    i = i_state * D + i_row
    tl.store(p_a + i * D + o_d, b_a.to(p_a.dtype.element_ty), mask=o_d < D)
    tl.store(p_z + i, b_z)


@triton.jit
def neighbours(p_v, p_taps, o_n, o_d, end, C, HEIGHT, WIDTH, D: tl.constexpr, K: tl.constexpr):
    """The depthwise convolution of v, zero beyond the map, without its bias."""
    m_d = o_d < D
    o_y, o_x = o_n // WIDTH, o_n % WIDTH
    b_o = tl.zeros([o_n.shape[0], o_d.shape[0]], tl.float32)
    p_v += tile(o_n, o_d, C)
    for t in tl.static_range(K * K):
        y, x = t // K - K // 2, t % K - K // 2
        m = (o_n < end) & (o_y + y >= 0) & (o_y + y < HEIGHT) & (o_x + x >= 0) & (o_x + x < WIDTH)
        b_v = load(p_v + (y * WIDTH + x).to(tl.int64) * C, m[:, None] & m_d[None, :])
        b_o += b_v * load(p_taps + o_d * K * K + t, m_d)[None, :]
    # The sum of one number: Triton would set out each b_v as an operand of a matrix product, in
    # shared memory, in place of the sum, and looks no further than a reduction.
    return tl.sum(b_o[:, :, None], 2)


@triton.jit(do_not_specialize=SIZES)
def out_forward(
    p_x, p_w, p_bias, p_in, p_in_bias, p_taps, p_taps_bias, p_gate, p_gate_bias,
    p_proj, p_proj_bias, p_gamma, p_mask, p_v, p_a, p_z, p_out,
    HEIGHT, WIDTH, mask_b, mask_n, norm_eps, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    K: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from x, v and the state."""
    C: tl.constexpr = HEADS * D
    N = HEIGHT * WIDTH
    i_b, _, _, begin, end = program_range(N, 1, BN)
    T: tl.constexpr = p_in.dtype.element_ty
    p_x += i_b * N * C
    p_v += i_b * N * C
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    m_c, m_d = o_c < C, o_d < D
    o_n = begin + tl.arange(0, BN)
    m_n = live(o_n, end, p_mask, i_b, mask_b, mask_n)
    o, m = tile(o_n, o_c, C), (o_n < end)[:, None] & m_c[None, :]
    b_h = norm(p_x, p_w, p_bias, o, m, o_c, C, 1.0 / C, norm_eps).to(T)
    b_out = tl.zeros([BN, BC], tl.float32)
    for i_h in tl.range(0, HEADS, num_stages=1):
        row = i_h * D
        b_y = tl.zeros([BN, BD], tl.float32)
        if p_taps is not None:
            b_y = neighbours(p_v + row, p_taps + row * K * K, o_n, o_d, end, C, HEIGHT, WIDTH, D, K)
            b_y += load(p_taps_bias + row + o_d, m_d)[None, :]
        i_state = i_b * HEADS + i_h
        b_z = tl.load(p_z + i_state * D + o_d, m_d, other=0.0)
        p = p_a + i_state * D * D + (o_d[:, None] * D + o_d[None, :])
        b_a = tl.load(p, m_d[:, None] & m_d[None, :], other=0.0)
        b_q = linear(b_h, p_in + row * C, p_in_bias + row, o_c, o_d, C, D, PRECISION)
        b_w = phi(b_q, ELU) * b_z[None, :]
        b_w *= (1.0 / (tl.sum(b_w, 1) + eps))[:, None]
        b_y = tl.dot(tl.where(m_n, b_w, 0.0).to(T), b_a, b_y, input_precision=PRECISION)
        if p_gate is not None:
            b_y *= linear(b_h, p_gate + row * C, p_gate_bias + row, o_c, o_d, C, D, PRECISION)
        # (D, C), read along the axis that is contiguous.
        p = p_proj + row + (o_c[None, :] * C + o_d[:, None])
        b_o = tl.load(p, m_d[:, None] & m_c[None, :], other=0.0)
        b_out = tl.dot(b_y.to(T), b_o, b_out, input_precision=PRECISION)
    b_out += load(p_proj_bias + o_c, m_c)[None, :]
    if p_gamma is not None:
        b_out *= load(p_gamma + o_c, m_c)[None, :]
    # From the L1 or L2 cache: to keep x until now would take registers.
    b_out += load(p_x + o, m)
    tl.store(p_out + i_b * N * C + o, b_out.to(p_out.dtype.element_ty), mask=m)


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    in_proj: tuple[Tensor, Tensor],
    proj: tuple[Tensor, Tensor],
    heads: int,
    lepe: tuple[Tensor, Tensor] | None,
    output_gate: tuple[Tensor, Tensor] | None,
    gamma: Tensor | None,
    mask: Tensor | None,
    elu: bool,
    eps: float,
    norm_eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x (B, H, W, C) plus the attention of its norm, contiguous, in a dtype; products in that of
    the weights of linear layers. The mask is (B, N)."""
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    batch, channels, kind = x.shape[0], x.shape[-1], in_proj[0].dtype
    dim = channels // heads
    side = 0 if lepe is None else lepe[0].shape[-1]
    tensors: dict[str, Tensor | None] = dict(p_mask=mask, p_gamma=_contiguous(gamma))
    names = dict(p=norm, p_in=in_proj, p_taps=lepe, p_gate=output_gate, p_proj=proj)
    for name, pair in names.items():
        weight, bias = (None, None) if pair is None else map(_contiguous, pair)
        tensors |= {'p_w' if name == 'p' else name: weight, f'{name}_bias': bias}
    mask_stride = (0, 0) if mask is None else mask.stride()
    gated = len(in_proj[0]) == 5 * channels
    kv, merger, read = _starters(
        x.device, kind, x.shape, heads, side, mask_stride, gated, elu, eps, norm_eps
    )
    splits = kv.launch.splits
    v = x.new_empty(x.shape, dtype=kind)
    partial = x.new_empty((batch, heads, splits, dim + 1, dim), dtype=torch.float32)
    a = x.new_empty((batch, heads, dim, dim), dtype=kind)
    z = x.new_empty((batch, heads, dim), dtype=torch.float32)
    tensors |= dict(p_x=x.contiguous(), p_v=v, p_partial=partial, p_a=a, p_z=z, p_out=out)
    for starter in (kv, merger, read):
        starter(**tensors)
    return out


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@functools.lru_cache(4096, typed=True)
def _starters(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    heads: int,
    side: int,
    mask_stride: tuple[int, int],
    gated: bool,
    elu: bool,
    eps: float,
    norm_eps: float,
) -> tuple[Starter, Starter, Starter]:
    """What launches the three kernels over a contiguous x, with weights of a dtype."""
    batch, height, width, channels = shape
    dim = channels // heads
    numbers: dict[str, Any] = dict(
        N=height * width, HEIGHT=height, WIDTH=width, eps=eps, norm_eps=norm_eps,
        HEADS=heads, D=dim, BD=padded_dim(dim), BC=max(32, padded_dim(channels)), K=side,
        GATED=gated, ELU=elu, PRECISION=product_precision(channels, is_nvidia(device)),
        mask_b=mask_stride[0], mask_n=mask_stride[1],
    )  # fmt: skip

    def launch(kernel: Any, rows: int) -> Launch:
        tokens, count = height * width, processors(device)
        return plan('gated_attention', kernel.__name__, dtype, channels, rows, tokens, count)

    kv, read = launch(kv_forward, batch * heads), launch(out_forward, batch)
    block, warps = tile_config('gated_attention', 'merge', dtype, channels)
    merger = Launch(block, kv.splits, 1, batch * channels, warps)
    return (
        Starter(kv_forward, device, kv, numbers | dict(SPAN=kv.span, BN=kv.block)),
        Starter(merge, device, merger, numbers | dict(SPLITS=kv.splits, BN=block)),
        Starter(out_forward, device, read, numbers | dict(BN=read.block)),
    )
