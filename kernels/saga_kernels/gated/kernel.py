"""Gated linear attention in Triton: two passes forward, two backward, no atomics.

Legend: B batch, N tokens, P parts of the packed projection (q, k, v and the gate logits a, b), H
heads, D head dim, es bytes per element. Everything is per head; `.` is a product over channels,
`*` one per element; fp32 but for the operands of a matrix product, which have the input's dtype.

Forward     k' = phi(k) * sigmoid(a),  v' = v * sigmoid(b),  S = sum_i k'_i^T v'_i,  z = sum_i k'_i
            w = phi(q) * z / (phi(q) . z + eps),  A = S / z (row by row),  o = w A
Backward    t = do A^T,  delta = w . t = do . o
            dq = phi'(q) * z / (phi(q) . z + eps) * (t - delta)
            G = sum_i w_i^T do_i,  g = -sum_i delta_i w_i,  dS = G / z,  dz = g / z
            dk' = v' dS^T + dz,  dv' = k' dS,  and through the gates to k, v, a, b

A row of A is an average of v', and w lies in [0, 1]: no operand grows with N, so half precision
neither overflows nor fades on large images, and o = phi(q) S / (phi(q) . z + eps) exactly. The
output is not needed again in the backward.

A state is a (D + 1, D) block: D rows of S (or G), then z (or g). Each program takes `span` tokens
of one head and leaves a partial state; partials are summed in a fixed order.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import NUM_STAGES, Launch, Phase, padded_dim, plan


@triton.jit
def _program(N, H, SPAN):
    # Heads run fastest: programs of one token range share cache lines of the packed projection.
    i = tl.program_id(0)
    splits = tl.cdiv(N, SPAN)
    i_h, i_s, i_b = i % H, i // H % splits, i // (H * splits)
    begin = i_s * SPAN
    # Partial states are ordered (B, H, splits).
    i_partial = (i_b * H + i_h).to(tl.int64) * splits + i_s
    return i_b.to(tl.int64), i_h.to(tl.int64), i_partial, begin, tl.minimum(begin + SPAN, N)


@triton.jit
def _live(o_n, end, p_mask, i_b, mask_b, mask_n):
    """Tokens that take part: inside the range, and not masked."""
    m_n = o_n < end
    if p_mask is not None:
        p = p_mask + i_b * mask_b + o_n.to(tl.int64) * mask_n
        m_n &= tl.load(p, mask=m_n, other=0).to(tl.int1)
    return m_n[:, None]


@triton.jit
def _tile(o_n, o_d, stride):
    return o_n.to(tl.int64)[:, None] * stride + o_d[None, :]


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _store(p, x, m_live, m_inside):
    """Masked tokens get zeros, so every element inside is written."""
    tl.store(p, tl.where(m_live, x, 0.0).to(p.dtype.element_ty), mask=m_inside)


@triton.jit
def _phi(x, ELU: tl.constexpr):
    # NaN stays: maximum and minimum would swallow it.
    if ELU:
        return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def _slope(x, scale, y, ELU: tl.constexpr):
    """Derivative of y = scale * phi(x). ELU + 1 is its own derivative where x <= 0."""
    if ELU:
        return tl.where(x > 0, scale, y)
    else:
        return tl.where(x <= 0, 0.0, scale)


@triton.jit
def _over(x, z):
    """x / z. Where every k' of a channel is zero, so is x."""
    return x / tl.where(z == 0, 1.0, z)


@triton.jit
def _load_state(p, o_d, D: tl.constexpr):
    m_d = o_d < D
    b_s = tl.load(p + o_d[:, None] * D + o_d[None, :], m_d[:, None] & m_d[None, :], other=0.0)
    return b_s, tl.load(p + D * D + o_d, m_d, other=0.0)


@triton.jit
def _store_state(p, b_s, b_z, o_d, D: tl.constexpr):
    m_d = o_d < D
    tl.store(p + o_d[:, None] * D + o_d[None, :], b_s, m_d[:, None] & m_d[None, :])
    tl.store(p + D * D + o_d, b_z, m_d)


@triton.jit(do_not_specialize=['N', 'H', 'SPAN'])
def kv_forward(
    p_x, p_mask, p_partial, N, H, SPAN, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial S and z from k, v and the gate logits."""
    i_b, i_h, i_partial, begin, end = _program(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    o_d = tl.arange(0, BD)
    b_s = tl.zeros([BD, BD], tl.float32)
    b_z = tl.zeros([BD], tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m = _live(o_n, end, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        o = _tile(o_n, o_d, x_n)
        b_k = _phi(_load(p_k + o, m), ELU)
        b_v = _load(p_k + x_p + o, m)
        if GATED:
            # Part by part: 2 * x_p may pass 2^31.
            b_k *= tl.sigmoid(_load(p_k + x_p + x_p + o, m))
            b_v *= tl.sigmoid(_load(p_k + x_p + x_p + x_p + o, m))
        b_k = tl.where(m, b_k, 0.0)
        b_s = tl.dot(tl.trans(b_k.to(T)), b_v.to(T), b_s, input_precision=PRECISION)
        b_z += tl.sum(b_k, 0)
    _store_state(p_partial + i_partial * (D + 1) * D, b_s, b_z, o_d, D)


@triton.jit(do_not_specialize=['N', 'H', 'SPAN'])
def out_forward(
    p_x, p_mask, p_state, p_out, N, H, SPAN, x_b, x_n, x_h, mask_b, mask_n, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from q and the state."""
    i_b, i_h, _, begin, end = _program(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_o = p_out + (i_b * N * H + i_h) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = _load_state(p_state + (i_b * H + i_h) * (D + 1) * D, o_d, D)
    b_a = _over(b_s, b_z[:, None]).to(T)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = _live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        b_w = _phi(_load(p_q + _tile(o_n, o_d, x_n), m), ELU) * b_z[None, :]
        b_w /= tl.sum(b_w, 1)[:, None] + eps
        b_o = tl.dot(b_w.to(T), b_a, input_precision=PRECISION)
        _store(p_o + _tile(o_n, o_d, H * D), b_o, m, (o_n < end)[:, None] & m_d)


@triton.jit(do_not_specialize=['N', 'H', 'SPAN'])
def q_backward(
    p_x, p_mask, p_state, p_do, p_dx, p_partial, N, H, SPAN,
    x_b, x_n, x_h, mask_b, mask_n, do_b, do_n, do_h, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and partial G and g, from q, do and the state."""
    i_b, i_h, i_partial, begin, end = _program(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_do += i_b * do_b + i_h * do_h
    p_dq = p_dx + (i_b * N * PARTS * H + i_h) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = _load_state(p_state + (i_b * H + i_h) * (D + 1) * D, o_d, D)
    b_a = tl.trans(_over(b_s, b_z[:, None]).to(T))
    b_s = tl.zeros([BD, BD], tl.float32)
    b_g = tl.zeros([BD], tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = _live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        b_q = _load(p_q + _tile(o_n, o_d, x_n), m)
        b_do = tl.load(p_do + _tile(o_n, o_d, do_n), mask=m, other=0.0)
        b_phi = tl.where(m, _phi(b_q, ELU), 0.0)
        b_r = 1.0 / (tl.sum(b_phi * b_z[None, :], 1) + eps)
        b_zr = b_z[None, :] * b_r[:, None]
        b_w = b_phi * b_zr
        b_slope = _slope(b_q, b_zr, b_w, ELU)
        b_t = tl.dot(b_do, b_a, input_precision=PRECISION)
        b_delta = tl.sum(b_w * b_t, 1)[:, None]
        b_s = tl.dot(tl.trans(b_w.to(T)), b_do, b_s, input_precision=PRECISION)
        b_g -= tl.sum(b_w * b_delta, 0)
        b_dq = b_slope * (b_t - b_delta)
        _store(p_dq + _tile(o_n, o_d, PARTS * H * D), b_dq, m, (o_n < end)[:, None] & m_d)
    _store_state(p_partial + i_partial * (D + 1) * D, b_s, b_g, o_d, D)


@triton.jit(do_not_specialize=['N', 'H', 'SPAN'])
def kv_backward(
    p_x, p_mask, p_state, p_dstate, p_dx, N, H, SPAN, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, da, db from k, v, a, b and the gradient of the state."""
    i_b, i_h, _, begin, end = _program(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    PARTS: tl.constexpr = 5 if GATED else 3
    d_n = PARTS * H * D
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    p_dk = p_dx + (i_b * N * PARTS * H + H + i_h) * D
    o_d = tl.arange(0, BD)
    i_state = (i_b * H + i_h) * (D + 1) * D
    b_z = tl.load(p_state + i_state + D * D + o_d, o_d < D, other=0.0)
    b_s, b_g = _load_state(p_dstate + i_state, o_d, D)
    b_ds = _over(b_s, b_z[:, None])
    b_dz = _over(b_g, b_z)[None, :]
    # dS has the scale of the loss: as an operand it is at most one.
    scale = tl.max(tl.max(tl.abs(b_ds), 1), 0)
    scale = tl.where(scale > 0, scale, 1.0)
    b_ds = (b_ds / scale).to(T)
    b_dst = tl.trans(b_ds)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = _live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        m_inside = (o_n < end)[:, None] & m_d
        o = _tile(o_n, o_d, x_n)
        p_d = p_dk + _tile(o_n, o_d, d_n)
        b_k, b_v = _load(p_k + o, m), _load(p_k + x_p + o, m)
        if GATED:
            b_a = tl.sigmoid(_load(p_k + x_p + x_p + o, m))
            b_b = tl.sigmoid(_load(p_k + x_p + x_p + x_p + o, m))
        else:
            b_a = 1.0
            b_b = 1.0
        b_v *= b_b
        b_dk = tl.dot(b_v.to(T), b_dst, input_precision=PRECISION) * scale + b_dz
        b_phi = _phi(b_k, ELU) * b_a
        _store(p_d, b_dk * _slope(b_k, b_a, b_phi, ELU), m, m_inside)
        if GATED:
            _store(p_d + 2 * H * D, b_dk * b_phi * (1.0 - b_a), m, m_inside)
        b_dv = tl.dot(b_phi.to(T), b_ds, input_precision=PRECISION) * scale
        _store(p_d + H * D, b_dv * b_b, m, m_inside)
        if GATED:
            _store(p_d + 3 * H * D, b_dv * b_v * (1.0 - b_b), m, m_inside)


def forward(packed: Tensor, mask: Tensor | None, elu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and fp32 state (B, H, D + 1, D) of packed (B, N, 3 or 5, H, D)."""
    batch, tokens, parts, heads, dim = packed.shape
    out = packed.new_empty((batch, tokens, heads, dim))
    if out.numel() == 0:
        return out, _new_states(packed)[:, :, 0].zero_()
    launch = _plan('kv_forward', packed)
    partial = _new_states(packed, launch.splits)
    _run(
        kv_forward, launch, packed, mask, elu,
        p_partial=partial, x_p=packed.stride(2), GATED=parts == 5,
    )  # fmt: skip
    state = _total(partial)
    launch = _plan('out_forward', packed)
    _run(out_forward, launch, packed, mask, elu, p_state=state, p_out=out, eps=eps)
    return out, state


def backward(
    grad_out: Tensor, packed: Tensor, state: Tensor, mask: Tensor | None, elu: bool, eps: float
) -> Tensor:
    """Gradient of the packed projection, contiguous, in its dtype."""
    parts = packed.shape[2]
    grad = torch.empty_like(packed, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad
    # autograd may hand over an expanded gradient.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    state = state.contiguous()
    do_b, do_n, do_h, _ = grad_out.stride()
    launch = _plan('q_backward', packed)
    partial = _new_states(packed, launch.splits)
    _run(
        q_backward, launch, packed, mask, elu,
        p_state=state, p_do=grad_out, p_dx=grad, p_partial=partial,
        do_b=do_b, do_n=do_n, do_h=do_h, eps=eps, PARTS=parts,
    )  # fmt: skip
    launch = _plan('kv_backward', packed)
    _run(
        kv_backward, launch, packed, mask, elu,
        p_state=state, p_dstate=_total(partial), p_dx=grad, x_p=packed.stride(2),
        GATED=parts == 5,
    )  # fmt: skip
    return grad


def _plan(phase: Phase, packed: Tensor) -> Launch:
    batch, tokens, _, heads, dim = packed.shape
    processors = _processors(packed.device)
    return plan(phase, packed.dtype, dim, batch * heads, tokens, processors)


@functools.cache
def _processors(device: torch.device) -> int:
    # The interpreter plans for a large GPU.
    cuda = device.type == 'cuda'
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132


def _new_states(packed: Tensor, splits: int = 1) -> Tensor:
    batch, _, _, heads, dim = packed.shape
    return packed.new_empty((batch, heads, splits, dim + 1, dim), dtype=torch.float32)


def _total(partial: Tensor) -> Tensor:
    # (B, H, splits, D + 1, D) -> (B, H, D + 1, D)
    return partial[:, :, 0] if partial.shape[2] == 1 else partial.sum(2)


def _run(kernel, launch: Launch, packed: Tensor, mask: Tensor | None, elu: bool, **arguments):
    _, tokens, _, heads, dim = packed.shape
    x_b, x_n, _, x_h, _ = packed.stride()
    mask_b, mask_n = (0, 0) if mask is None else mask.stride()
    on_gpu = packed.device.type == 'cuda'
    with torch.cuda.device(packed.device) if on_gpu else contextlib.nullcontext():
        kernel[(launch.programs,)](
            p_x=packed, p_mask=mask, N=tokens, H=heads, SPAN=launch.span,
            x_b=x_b, x_n=x_n, x_h=x_h, mask_b=mask_b, mask_n=mask_n,
            D=dim, BD=padded_dim(dim), BN=launch.block, ELU=elu,
            # Three tf32 products are as exact as one in fp32, and use the tensor cores.
            PRECISION='tf32x3' if on_gpu and torch.version.hip is None else 'ieee',
            num_warps=launch.num_warps, num_stages=NUM_STAGES, **arguments,
        )  # fmt: skip
