"""A feed-forward network with its norm and residual in Triton: one pass over the rows, forward.

Legend: N rows, C channels, F hidden channels; a program has BN rows, all of whose channels it holds
in registers, and goes through the hidden channels BF at a time.

    h = norm(x),  a = GELU(W1 h + b1),  o = x + gamma (W2 a + b2)

Traffic, in token tensors: 2 (x, o). The weights come from the L2 cache for every program.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    FFN_HIDDEN,
    alignment,
    is_nvidia,
    padded_dim,
    plan,
    processors,
    product_precision,
)
from ..layer_norm.kernel import norm, share
from ..starter import Starter
from ..tiles import SIZES, aligned, load, tile


@triton.jit
def gelu(x):
    """x P(x), where P is the share of a normal distribution below x, to 1e-7.

    P(-t) for t >= 0 is 2 to the power of a polynomial of t, which was fitted for the least error of
    t P(-t). It takes half the instructions of tl.erf, and these are most of what the kernel does.
    """
    t = tl.abs(x)
    y = -1.6904029962461209e-06 * t + 2.5083327273023315e-05
    y = y * t - 0.00011446279677329585
    y = y * t - 0.0003233417810406536
    y = y * t + 0.007333383429795504
    y = y * t - 0.05271419882774353
    y = y * t - 0.4591154456138611
    y = y * t - 1.151123285293579
    y = y * t - 0.9999988675117493
    return tl.where(x < 0, 0.0, x) - t * tl.exp2(y)


@triton.jit(do_not_specialize=SIZES)
def ffn_forward(
    p_x, p_w, p_bias, p_weight1, p_b1, p_weight2, p_b2, p_gamma, p_out, N, C, F, eps,
    BN: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o from x."""
    C, F = aligned((C, F), ALIGN)
    o_c = tl.arange(0, BD)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_c, m_n = o_c < C, o_n < N
    o, m = tile(o_n, o_c, C), m_n[:, None] & m_c[None, :]
    b_h = norm(p_x, p_w, p_bias, o, m, o_c, C, share(C), eps).to(p_weight1.dtype.element_ty)
    b_out = tl.zeros([BN, BD], tl.float32)
    for f in range(0, F, BF):
        o_f = f + tl.arange(0, BF)
        m_f = o_f < F
        # (C, F) and (F, C), read along the axis that is contiguous.
        o_w1, m_w1 = o_f[None, :] * C + o_c[:, None], m_c[:, None] & m_f[None, :]
        o_w2, m_w2 = o_c[None, :] * F + o_f[:, None], m_f[:, None] & m_c[None, :]
        b_w1 = tl.load(p_weight1 + o_w1, m_w1, other=0.0)
        b_w2 = tl.load(p_weight2 + o_w2, m_w2, other=0.0)
        b_a = tl.dot(b_h, b_w1, input_precision=PRECISION) + load(p_b1 + o_f, m_f)[None, :]
        b_out = tl.dot(gelu(b_a).to(b_w2.dtype), b_w2, b_out, input_precision=PRECISION)
    b_out += load(p_b2 + o_c, m_c)[None, :]
    if p_gamma is not None:
        b_out *= load(p_gamma + o_c, m_c)[None, :]
    # From the L1 or L2 cache: to keep x until now would take registers.
    b_out += load(p_x + o, m)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    gamma: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """x plus the FFN of its norm, contiguous, in a dtype; products in that of the two weights."""
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        names = 'p_x', 'p_w', 'p_bias', 'p_weight1', 'p_b1', 'p_weight2', 'p_b2'
        tensors = (y.contiguous() for y in (x, *norm, *fc1, *fc2))
        gamma = None if gamma is None else gamma.contiguous()
        starter = _starter(x.device, fc1[0].dtype, x.shape, len(fc1[0]), eps)
        starter(**dict(zip(names, tensors, strict=True)), p_gamma=gamma, p_out=out)
    return out


@functools.lru_cache(4096)
def _starter(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], hidden: int, eps: float
) -> Starter:
    """What launches the kernel over all rows of a contiguous x, with weights of a dtype."""
    channels = shape[-1]
    rows = math.prod(shape[:-1])
    edge = max(32, padded_dim(channels))
    launch = plan('ffn', 'ffn_forward', dtype, channels, 1, rows, processors(device))
    numbers = dict(
        N=rows, C=channels, F=hidden, eps=eps, BN=launch.block, BD=edge,
        BF=FFN_HIDDEN[dtype.itemsize, edge], ALIGN=alignment(channels, hidden),
        PRECISION=product_precision(channels, is_nvidia(device)),
    )  # fmt: skip
    return Starter(ffn_forward, device, launch, numbers)
