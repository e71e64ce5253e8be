"""Gated linear attention in Triton: two passes over the tokens forward, two backward, no atomics.

Legend: B batch, N tokens, H heads, D head dim; q, k, v and the gate logits a, b are the parts of
the packed projection. Formulas hold for one head; `.` is a product over channels, `*` one element
by element. Numbers are fp32, except that operands of a matrix product have the dtype of the input.

Forward     k' = phi(k) * sigmoid(a),  v' = v * sigmoid(b),  S = sum_i k'_i^T v'_i,  z = sum_i k'_i
            w = phi(q) * z / (phi(q) . z + eps),  A = S / z (row by row),  o = w A
Backward    t = do A^T,  delta = w . t = do . o
            dq = phi'(q) * z / (phi(q) . z + eps) * (t - delta)
            G = sum_i w_i^T do_i,  g = -sum_i delta_i w_i,  dS = G / z,  dz = g / z
            dk' = v' dS^T + dz,  dv' = k' dS,  and through the gates to k, v, a, b

A row of A is an average of v', and w lies in [0, 1]. So no operand grows with N, and half precision
neither overflows nor loses small terms on large images; o is still phi(q) S / (phi(q) . z + eps)
exactly. In fp16, k' is divided by the largest of its channel before it becomes an operand, because
nearly closed gates make it too small. The backward pass does not need the output.

Each program takes `span` tokens of one head and writes a partial state, S and z or G and g. Partial
states are summed in a fixed order, so that results are repeatable bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import new_partials, sum_partials
from ..starter import starters_of
from ..tiles import (
    SIZES,
    aligned,
    live,
    load,
    load_state,
    phi,
    product,
    program_range,
    safe_div,
    sigmoid,
    slope,
    store,
    store_state,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def kv_forward(
    p_x, p_mask, p_partial, N, H, SPAN, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    GATED: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial S and z from k, v and the gate logits."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    o_d = tl.arange(0, BD)
    b_s = tl.zeros([BD, BD], tl.float32)
    # Added up over tokens after the loop: in it, that would take shuffles between threads.
    b_z = tl.zeros([BN, BD], tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        o = tile(o_n, o_d, x_n)
        b_k = phi(load(p_k + o, m), ELU)
        b_v = load(p_k + x_p + o, m)
        if GATED:
            # x_p is added several times, because 2 * x_p may pass 2^31.
            b_k *= sigmoid(load(p_k + x_p + x_p + o, m))
            b_v *= sigmoid(load(p_k + x_p + x_p + x_p + o, m))
        b_k = tl.where(m, b_k, 0.0)
        b_s += product(tl.trans(b_k), b_v.to(T), PRECISION)
        b_z += b_k
    store_state(p_partial + i_partial * (D + 1) * D, b_s, tl.sum(b_z, 0), o_d, D)


@triton.jit(do_not_specialize=SIZES)
def out_forward(
    p_x, p_mask, p_state, p_out, N, H, SPAN, x_b, x_n, x_h, mask_b, mask_n, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o from q and the state."""
    x_b, x_n, x_h = aligned((x_b, x_n, x_h), ALIGN)
    i_b, i_h, _, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_o = p_out + (i_b * N * H + i_h) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state + (i_b * H + i_h) * (D + 1) * D, o_d, D)
    b_a = safe_div(b_s, b_z[:, None]).to(T)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_n = live(o_n, end, p_mask, i_b, mask_b, mask_n)
        m_inside = (o_n < end)[:, None] & (o_d < D)[None, :]
        b_w = phi(load(p_q + tile(o_n, o_d, x_n), m_inside), ELU) * b_z[None, :]
        b_w *= (1.0 / (tl.sum(b_w, 1) + eps))[:, None]
        b_o = tl.dot(b_w.to(T), b_a, input_precision=PRECISION)
        store(p_o + tile(o_n, o_d, H * D), b_o, p_mask, m_n, m_inside)


@triton.jit(do_not_specialize=SIZES)
def q_backward(
    p_x, p_mask, p_state, p_do, p_dx, p_partial, N, H, SPAN,
    x_b, x_n, x_h, mask_b, mask_n, do_b, do_n, do_h, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and partial G and g, from q, do and the state."""
    x_b, x_n, x_h, do_b, do_n, do_h = aligned((x_b, x_n, x_h, do_b, do_n, do_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_do += i_b * do_b + i_h * do_h
    p_dq = p_dx + (i_b * N * PARTS * H + i_h) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state + (i_b * H + i_h) * (D + 1) * D, o_d, D)
    b_a = tl.trans(safe_div(b_s, b_z[:, None]).to(T))
    b_s = tl.zeros([BD, BD], tl.float32)
    b_g = tl.zeros([BN, BD], tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        b_q = load(p_q + tile(o_n, o_d, x_n), m)
        b_do = tl.load(p_do + tile(o_n, o_d, do_n), mask=m, other=0.0)
        b_phi = phi(b_q, ELU)
        b_r = 1.0 / (tl.sum(b_phi * b_z[None, :], 1) + eps)
        b_zr = b_z[None, :] * b_r[:, None]
        b_w = b_phi * b_zr
        b_slope = slope(1.0, b_phi, ELU) * b_zr
        # In another order, Triton 3.9 spills registers on sm_80.
        b_s = tl.dot(tl.trans(b_w.to(T)), b_do, b_s, input_precision=PRECISION)
        b_t = tl.dot(b_do, b_a, input_precision=PRECISION)
        b_delta = tl.sum(b_w * b_t, 1)[:, None]
        b_g -= b_w * b_delta
        b_dq = b_slope * (b_t - b_delta)
        store(p_dq + tile(o_n, o_d, PARTS * H * D), b_dq, p_mask, m, (o_n < end)[:, None] & m_d)
    store_state(p_partial + i_partial * (D + 1) * D, b_s, tl.sum(b_g, 0), o_d, D)


@triton.jit(do_not_specialize=SIZES)
def kv_backward(
    p_x, p_mask, p_state, p_dstate, p_dx, N, H, SPAN, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    GATED: tl.constexpr, ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, da, db from k, v, a, b and the gradient of the state."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, _, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    PARTS: tl.constexpr = 5 if GATED else 3
    d_n = PARTS * H * D
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    p_dk = p_dx + (i_b * N * PARTS * H + H + i_h) * D
    o_d = tl.arange(0, BD)
    i_state = (i_b * H + i_h) * (D + 1) * D
    b_z = tl.load(p_state + i_state + D * D + o_d, o_d < D, other=0.0)
    b_s, b_g = load_state(p_dstate + i_state, o_d, D)
    b_ds = safe_div(b_s, b_z[:, None])
    b_dz = safe_div(b_g, b_z)[None, :]
    # dS has the scale of the loss; divided by its largest element it is at most one.
    scale = tl.max(tl.max(tl.abs(b_ds), 1), 0)
    scale = tl.where(scale > 0, scale, 1.0)
    b_ds = (b_ds / scale).to(T)
    b_dst = tl.trans(b_ds)
    larger = 1.0
    smaller = 1.0
    if GATED and p_x.dtype.element_ty == tl.float16:
        # If gates a are nearly closed, they and k' are made larger, at most to 2^15, as k' <= z.
        larger = tl.maximum(2.0**15 / tl.maximum(tl.max(b_z, 0), 2.0**-100), 1.0)
        smaller = 1.0 / larger
        scale *= smaller
        b_dz *= smaller
    m_d = (o_d < D)[None, :]
    # To load the next tile meanwhile would take more shared memory than some GPUs have, 99 KiB.
    STAGES: tl.constexpr = 1 if BD * T.primitive_bitwidth > 64 * 32 else 2
    for n in tl.range(begin, end, BN, num_stages=STAGES):
        o_n = n + tl.arange(0, BN)
        # Only what is stored needs the mask, as no token sees another one here.
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        m_inside = (o_n < end)[:, None] & m_d
        o = tile(o_n, o_d, x_n)
        p_d = p_dk + tile(o_n, o_d, d_n)
        b_k = load(p_k + o, m_inside)
        b_v = load(p_k + x_p + o, m_inside)
        if GATED:
            b_a = sigmoid(load(p_k + x_p + x_p + o, m_inside)) * larger
            b_b = sigmoid(load(p_k + x_p + x_p + x_p + o, m_inside))
        else:
            b_a = 1.0
            b_b = 1.0
        b_v *= b_b
        b_phi = phi(b_k, ELU) * b_a
        b_dv = tl.dot(b_phi.to(T), b_ds, input_precision=PRECISION) * scale
        store(p_d + H * D, b_dv * b_b, p_mask, m, m_inside)
        if GATED:
            store(p_d + 3 * H * D, b_dv * b_v * (1.0 - b_b), p_mask, m, m_inside)
        b_dk = tl.dot(b_v.to(T), b_dst, input_precision=PRECISION) * scale + b_dz
        store(p_d, b_dk * slope(b_a, b_phi, ELU), p_mask, m, m_inside)
        if GATED:
            store(p_d + 2 * H * D, b_dk * b_phi * (1.0 - b_a * smaller), p_mask, m, m_inside)


_forward_starters = starters_of('gated', kv_forward, out_forward)
_backward_starters = starters_of('gated', q_backward, kv_backward)


def forward(packed: Tensor, mask: Tensor | None, elu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and fp32 state (B, H, D + 1, D) of packed (B, N, 3 or 5, H, D)."""
    batch, tokens, _, heads, dim = packed.shape
    out = packed.new_empty((batch, tokens, heads, dim))
    if out.numel() == 0:
        return out, new_partials(packed, 1, dim + 1, dim).zero_()
    kv, read = _forward_starters(packed, mask, ELU=elu, eps=eps)
    partial = new_partials(packed, kv.launch.splits, dim + 1, dim)
    kv(p_x=packed, p_mask=mask, p_partial=partial)
    state = sum_partials(partial, kv.launch.splits)
    read(p_x=packed, p_mask=mask, p_state=state, p_out=out)
    return out, state


def backward(
    grad_out: Tensor, packed: Tensor, state: Tensor, mask: Tensor | None, elu: bool, eps: float
) -> Tensor:
    """Gradient of the packed projection, contiguous, in its dtype."""
    dim = packed.shape[-1]
    grad = torch.empty_like(packed, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad
    # The gradient of a sum comes from autograd as an expanded tensor, with strides of zero.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    state = state.contiguous()
    q, kv = _backward_starters(packed, mask, grad_out, ELU=elu, eps=eps)
    partial = new_partials(packed, q.launch.splits, dim + 1, dim)
    q(p_x=packed, p_mask=mask, p_state=state, p_do=grad_out, p_dx=grad, p_partial=partial)
    dstate = sum_partials(partial, q.launch.splits)
    kv(p_x=packed, p_mask=mask, p_state=state, p_dstate=dstate, p_dx=grad)
    return grad
