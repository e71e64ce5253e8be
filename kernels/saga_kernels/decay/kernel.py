"""Decay linear attention in Triton: states of chunks, a scan over chunks, then tile by tile.

Legend: B batch, N tokens, H heads, D head dim, C chunks of L tokens. Formulas hold for one head,
with tokens in the order of its scan; y = exp(log_decay), l is the place of a token in its chunk, b
and c are chunks, `.` is a product over channels. Numbers are fp32, except that operands of a matrix
product have the dtype of the input. A state is S (D x D) and z (D), weighted sums of k'^T v and of
k', with k' = phi(k).

Forward     P_c: weights y^(L-1-l),  R_c: weights y^l,  of the tokens of a chunk
            F_c = sum over b < c of y^(L(c-1-b)) P_b,  B_c = sum over b > c of y^(L(b-c-1)) R_b
            S_i = y^(l+1) F_c + y^(L-l) B_c + sum of y^|i-j| k'_j^T v_j over j in c,  z_i likewise
            r = 1 / (phi(q) . z + eps),  o = r phi(q) S
Backward    w = r phi(q),  delta = do . o
            GF, GB with G, g: as F, B with S, z, from sums of w^T do and of -delta w
            dphi(q) = r (do S^T - delta z),  dk' = v G^T + g,  dv = k' G
            dlog_decay = sum_ij |i-j| e_ij,  e_ij = y^|i-j| (w_i . k'_j) (do_i . v_j - delta_i)

Where i and j are in one chunk, e is computed with dk'. Otherwise |i-j| has three parts: the
distance from i to the edge of its chunk (summed with dphi(q)), the same for j (with dk'), and L for
each chunk c between them (with the scan: y^(L+1) times F_c . GB_c and B_c . GF_c). All distances
are positive, so that sums do not cancel one another, and no exponent is positive.

Traffic, in token tensors T. Forward 6: k and v for the states; q, k, v and o. Backward 10, since o
is kept: q, o and do for the states; q, k, v, do, dq, dk and dv. The tiles of a chunk read each
other's k, v, q and do again, from the L2 cache. To write or to read all states once moves
2 (D + 1) / L of a token tensor in fp32, and 4 (D + 1) / L in half precision, which
`launch.decay_chunk` holds near T. The forward pass does so 4 times (states are written, scanned in
place, and read), the backward pass 6 times.

Half precision neither overflows nor loses small terms: the operand made of a state is S / z, an
average of v, or G divided by its largest element; rows of other operands that grow with N or the
loss are divided by their largest element.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, decay_chunk, is_nvidia, padded_dim, product_precision, tile_config
from ..starter import Starter, starters_of
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
    slope,
    store,
    store_state,
    tile,
)


@triton.jit
def token(o_p, N, H, i_h, HEIGHT, WIDTH):
    """The token at each position of a head's scan, and N beyond its end."""
    # The second half of the heads scans columns.
    o_n = tl.where(i_h < H - H // 2, o_p, o_p % HEIGHT * WIDTH + o_p // HEIGHT)
    return tl.where(o_p < N, o_n, N)


@triton.jit
def rate_of(p_decay, i_h):
    """The logarithm of a head's decay to the base 2, so that a weight takes two instructions."""
    return tl.load(p_decay + i_h) * 1.4426950408889634


@triton.jit
def weight(rate, distance):
    return tl.exp2(rate * distance.to(tl.float32))


@triton.jit
def near(begin, first, end, rate, BN: tl.constexpr, L: tl.constexpr):
    """The range of tokens of a chunk that count for the tile at `begin`, in whole tiles.

    Tiles are left out if all weights are below 2^-126, the smallest normal number of fp32.
    """
    reach = (126.0 / tl.maximum(-rate, 126.0 / L)).to(tl.int32) // BN * BN + BN
    return tl.maximum(first, begin - reach), tl.minimum(end, begin + BN + reach)


@triton.jit
def add_tokens(b_s, b_z, b_k, b_v, b_one, PRECISION: tl.constexpr):
    """Add the tokens of a tile to a state; z adds up b_one in place of the values."""
    b_s += product(tl.trans(b_k), b_v, PRECISION)
    return b_s, b_z + tl.sum(b_k * b_one, 0)


@triton.jit(do_not_specialize=SIZES)
def state_forward(
    p_x, p_mask, p_decay, p_state, N, H, SPAN, HEIGHT, WIDTH, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and R of each chunk, from k and v."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, i_chunk, begin, end = program_range(N, H, SPAN)
    rate = rate_of(p_decay, i_h)
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    o_d = tl.arange(0, BD)
    b_p = tl.zeros([BD, BD], tl.float32)
    b_r = tl.zeros([BD, BD], tl.float32)
    b_zp = tl.zeros([BD], tl.float32)
    b_zr = tl.zeros([BD], tl.float32)
    for n in range(begin, end, BN):
        o_p = n + tl.arange(0, BN)
        o_n = token(o_p, N, H, i_h, HEIGHT, WIDTH)
        m = live(o_n, N, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        o = tile(o_n, o_d, x_n)
        b_k = tl.where(m, phi(load(p_k + o, m), ELU), 0.0)
        b_v = tl.load(p_k + x_p + o, mask=m, other=0.0)
        o_l = o_p - begin
        b_w = b_k * weight(rate, SPAN - 1 - o_l)[:, None]
        b_p, b_zp = add_tokens(b_p, b_zp, b_w, b_v, 1.0, PRECISION)
        b_w = b_k * weight(rate, o_l)[:, None]
        b_r, b_zr = add_tokens(b_r, b_zr, b_w, b_v, 1.0, PRECISION)
    p_state += i_chunk * 2 * (D + 1) * D
    store_state(p_state, b_p, b_zp, o_d, D)
    store_state(p_state + (D + 1) * D, b_r, b_zr, o_d, D)


@triton.jit(do_not_specialize=SIZES)
def scan(
    p_state, p_decay, p_other, p_partial, C, H,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """F and B from P and R, in place. In the backward pass, with F and B as p_other: GF and GB, and
    partial sums of dlog_decay. A program scans one row of the states in one direction."""
    i = tl.program_id(0)
    i_row, i_way, i_head = i % (D + 1), i // (D + 1) % 2, (i // (2 * (D + 1))).to(tl.int64)
    decay = rate_of(p_decay, i_head % H)
    rate = decay * L
    o_c, o_d = tl.arange(0, BN), tl.arange(0, BD)
    distance = o_c[:, None] - 1 - o_c[None, :]
    b_earlier = tl.where(distance >= 0, weight(rate, tl.abs(distance)), 0.0)
    b_enter, b_leave = weight(rate, o_c)[:, None], weight(rate, BN - 1 - o_c)[:, None]
    b_carry = tl.zeros([BD], tl.float32)
    b_sum = tl.zeros([BD], tl.float32)
    for c in range(0, C, BN):
        m = (c + o_c < C)[:, None] & (o_d < D)[None, :]
        i_c = tl.where(i_way == 0, c + o_c, C - 1 - c - o_c)
        i_state = (i_head * C + i_c) * 2
        p = p_state + ((i_state + i_way) * (D + 1) + i_row)[:, None] * D + o_d[None, :]
        b_x = tl.load(p, mask=m, other=0.0)
        b_y = tl.dot(b_earlier, b_x, input_precision=PRECISION) + b_enter * b_carry[None, :]
        b_carry = b_carry * tl.exp2(rate * BN) + tl.sum(b_leave * b_x, 0)
        tl.store(p, b_y, mask=m)
        if p_other is not None:
            # The state of the other direction at the same chunk.
            i_other = (i_state + 1 - i_way) * (D + 1) + i_row
            b_other = tl.load(p_other + i_other[:, None] * D + o_d[None, :], mask=m, other=0.0)
            b_sum += tl.sum(b_y * b_other, 0)
    if p_other is not None:
        tl.store(p_partial + i, tl.sum(b_sum, 0) * (L * tl.exp2(decay * (L + 1))))


@triton.jit(do_not_specialize=SIZES)
def out_forward(
    p_x, p_mask, p_decay, p_state, p_out, p_r, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_p, x_h, mask_b, mask_n, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, L: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o and r of one tile, from q, k, v of its chunk and the states F and B."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, _, begin, _ = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    rate = rate_of(p_decay, i_h)
    i_head = i_b * H + i_h
    first = begin // L * L
    p_x += i_b * x_b + i_h * x_h
    p_state += (i_head * tl.cdiv(N, L) + begin // L) * 2 * (D + 1) * D
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    o_p = begin + tl.arange(0, BN)
    o_n = token(o_p, N, H, i_h, HEIGHT, WIDTH)
    m = live(o_n, N, p_mask, i_b, mask_b, mask_n) & m_d
    b_q = tl.where(m, phi(load(p_x + tile(o_n, o_d, x_n), m), ELU), 0.0)
    b_den = tl.zeros([BN], tl.float32)
    b_o = tl.zeros([BN, BD], tl.float32)
    for way in tl.range(2, num_stages=1):
        b_s, b_z = load_state(p_state + way * (D + 1) * D, o_d, D)
        o_out = tl.where(way == 0, o_p - first + 1, first + L - o_p)
        b_w = b_q * b_z[None, :] * weight(rate, o_out)[:, None]
        b_den += tl.sum(b_w, 1)
        b_o += product(b_w, safe_div(b_s, b_z[:, None]).to(T), PRECISION)
    b_q_t = b_q.to(T)
    low, high = near(begin, first, tl.minimum(first + L, N), rate, BN, L)
    for n in range(low, high, BN):
        o_j = n + tl.arange(0, BN)
        o_n = token(o_j, N, H, i_h, HEIGHT, WIDTH)
        m_j = live(o_n, N, p_mask, i_b, mask_b, mask_n) & m_d
        o = tile(o_n, o_d, x_n)
        b_k = tl.where(m_j, phi(load(p_x + x_p + o, m_j), ELU), 0.0).to(T)
        b_v = tl.load(p_x + x_p + x_p + o, mask=m_j, other=0.0)
        b_a = tl.dot(b_q_t, tl.trans(b_k), input_precision=PRECISION)
        b_a *= weight(rate, tl.abs(o_p[:, None] - o_j[None, :]))
        b_den += tl.sum(b_a, 1)
        b_o += product(b_a, b_v, PRECISION)
    b_r = 1.0 / (b_den + eps)
    o_n = token(o_p, N, H, i_h, HEIGHT, WIDTH)
    m_inside = (o_p < N)[:, None] & m_d
    p_o = p_out + (i_b * N * H + i_h) * D
    store(p_o + tile(o_n, o_d, H * D), b_o * b_r[:, None], p_mask, m, m_inside)
    tl.store(p_r + i_head * N + o_p, b_r, mask=o_p < N)


@triton.jit(do_not_specialize=SIZES)
def state_backward(
    p_x, p_mask, p_decay, p_out, p_do, p_r, p_delta, p_state, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_h, mask_b, mask_n, do_b, do_n, do_h,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta, and the states of each chunk that become GF and GB, from q, o, do and r."""
    x_b, x_n, x_h, do_b, do_n, do_h = aligned((x_b, x_n, x_h, do_b, do_n, do_h), ALIGN)
    i_b, i_h, i_chunk, begin, end = program_range(N, H, SPAN)
    rate = rate_of(p_decay, i_h)
    i_row = (i_b * H + i_h) * N
    p_x += i_b * x_b + i_h * x_h
    p_out += (i_b * N * H + i_h) * D
    p_do += i_b * do_b + i_h * do_h
    o_d = tl.arange(0, BD)
    b_p = tl.zeros([BD, BD], tl.float32)
    b_r = tl.zeros([BD, BD], tl.float32)
    b_gp = tl.zeros([BD], tl.float32)
    b_gr = tl.zeros([BD], tl.float32)
    for n in range(begin, end, BN):
        o_p = n + tl.arange(0, BN)
        o_n = token(o_p, N, H, i_h, HEIGHT, WIDTH)
        m = live(o_n, N, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        b_q = tl.where(m, phi(load(p_x + tile(o_n, o_d, x_n), m), ELU), 0.0)
        b_q *= load(p_r + i_row + o_p, o_p < N)[:, None]
        b_do = tl.load(p_do + tile(o_n, o_d, do_n), mask=m, other=0.0)
        b_delta = tl.sum(b_do.to(tl.float32) * load(p_out + tile(o_n, o_d, H * D), m), 1)
        tl.store(p_delta + i_row + o_p, b_delta, mask=o_p < N)
        o_l = o_p - begin
        b_w = b_q * weight(rate, SPAN - 1 - o_l)[:, None]
        b_p, b_gp = add_tokens(b_p, b_gp, b_w, b_do, -b_delta[:, None], PRECISION)
        b_w = b_q * weight(rate, o_l)[:, None]
        b_r, b_gr = add_tokens(b_r, b_gr, b_w, b_do, -b_delta[:, None], PRECISION)
    p_state += i_chunk * 2 * (D + 1) * D
    store_state(p_state, b_p, b_gp, o_d, D)
    store_state(p_state + (D + 1) * D, b_r, b_gr, o_d, D)


@triton.jit
def query_across(
    p_state, b_phi, b_do, b_delta, rate, o_l, o_d,
    D: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What keys of other chunks add to dphi(q) / r and dlog_decay / r, from F and B."""
    b_dq = tl.zeros(b_phi.shape, tl.float32)
    b_decay = tl.zeros(o_l.shape, tl.float32)
    for way in tl.range(2, num_stages=1):
        b_s, b_z = load_state(p_state + way * (D + 1) * D, o_d, D)
        b_s = tl.trans(safe_div(b_s, b_z[:, None]).to(b_do.dtype))
        o_out = tl.where(way == 0, o_l + 1, L - o_l)
        b_x = tl.dot(b_do, b_s, input_precision=PRECISION) - b_delta[:, None]
        b_x *= b_z[None, :] * weight(rate, o_out)[:, None]
        b_dq += b_x
        b_decay += tl.sum(b_x * b_phi, 1) * o_out
    return b_dq, b_decay


@triton.jit
def key_across(
    p_dstate, b_phi, b_v, rate, o_l, o_d,
    D: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What queries of other chunks add to dk', dv and dlog_decay, from GF and GB."""
    b_dk = tl.zeros(b_phi.shape, tl.float32)
    b_dv = tl.zeros(b_phi.shape, tl.float32)
    b_decay = tl.zeros(o_l.shape, tl.float32)
    for way in tl.range(2, num_stages=1):
        b_s, b_g = load_state(p_dstate + way * (D + 1) * D, o_d, D)
        # G has the scale of the loss; divided by its largest element it is at most one.
        scale = tl.max(tl.max(tl.abs(b_s), 0), 0)
        scale = tl.where(scale > 0, scale, 1.0)
        b_s = (b_s / scale).to(b_v.dtype)
        o_out = tl.where(way == 0, o_l + 1, L - o_l)
        b_w = weight(rate, o_out)[:, None]
        b_x = tl.dot(b_v, tl.trans(b_s), input_precision=PRECISION) * scale + b_g[None, :]
        b_x *= b_w
        b_dk += b_x
        b_decay += tl.sum(b_x * b_phi, 1) * (o_out - 1)
        b_dv += tl.dot(b_phi.to(b_v.dtype), b_s, input_precision=PRECISION) * (scale * b_w)
    return b_dk, b_dv, b_decay


@triton.jit(do_not_specialize=SIZES)
def token_backward(
    p_x, p_mask, p_decay, p_state, p_dstate, p_do, p_r, p_delta, p_dx, p_partial,
    N, H, SPAN, HEIGHT, WIDTH, x_b, x_n, x_p, x_h, mask_b, mask_n, do_b, do_n, do_h,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, L: tl.constexpr,
    ELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and a partial sum of dlog_decay, of one tile, from q, k, v, do, r, delta of its
    chunk and the states F, B, GF, GB."""
    x_b, x_n, x_p, x_h, do_b, do_n, do_h = aligned((x_b, x_n, x_p, x_h, do_b, do_n, do_h), ALIGN)
    i_b, i_h, i_tile, begin, _ = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    rate = rate_of(p_decay, i_h)
    i_head = i_b * H + i_h
    first = begin // L * L
    end = tl.minimum(first + L, N)
    i_state = (i_head * tl.cdiv(N, L) + begin // L) * 2 * (D + 1) * D
    p_x += i_b * x_b + i_h * x_h
    p_do += i_b * do_b + i_h * do_h
    p_dx += (i_b * N * 3 * H + i_h) * D
    p_k = p_x + x_p
    p_r += i_head * N
    p_delta += i_head * N
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    o_p = begin + tl.arange(0, BN)
    o_n = token(o_p, N, H, i_h, HEIGHT, WIDTH)
    m = live(o_n, N, p_mask, i_b, mask_b, mask_n) & m_d
    m_inside = (o_p < N)[:, None] & m_d
    o = tile(o_n, o_d, x_n)
    p_dx += tile(o_n, o_d, 3 * H * D)
    o_l = o_p - first

    b_phi = tl.where(m, phi(load(p_x + o, m), ELU), 0.0)
    b_do = tl.load(p_do + tile(o_n, o_d, do_n), mask=m, other=0.0)
    b_r = load(p_r + o_p, o_p < N)
    b_delta = load(p_delta + o_p, o_p < N)
    b_dq, b_decay = query_across(
        p_state + i_state, b_phi, b_do, b_delta, rate, o_l, o_d, D, L, PRECISION
    )
    decay = tl.sum(b_decay * b_r, 0)
    low, high = near(begin, first, end, rate, BN, L)
    for n in range(low, high, BN):
        o_j = n + tl.arange(0, BN)
        o_n = token(o_j, N, H, i_h, HEIGHT, WIDTH)
        m_j = live(o_n, N, p_mask, i_b, mask_b, mask_n) & m_d
        p_j = p_k + tile(o_n, o_d, x_n)
        b_k = tl.where(m_j, phi(load(p_j, m_j), ELU), 0.0).to(T)
        b_vj = tl.load(p_j + x_p, mask=m_j, other=0.0)
        b_e = tl.dot(b_do, tl.trans(b_vj), input_precision=PRECISION) - b_delta[:, None]
        b_e *= weight(rate, tl.abs(o_p[:, None] - o_j[None, :]))
        b_dq += product(b_e, b_k, PRECISION)
    store(p_dx, b_dq * b_r[:, None] * slope(1.0, b_phi, ELU), p_mask, m, m_inside)

    b_phi = tl.where(m, phi(load(p_k + o, m), ELU), 0.0)
    b_v = tl.load(p_k + x_p + o, mask=m, other=0.0)
    b_dk, b_dv, b_decay = key_across(
        p_dstate + i_state, b_phi, b_v, rate, o_l, o_d, D, L, PRECISION
    )
    for n in range(low, high, BN):
        o_i = n + tl.arange(0, BN)
        o_n = token(o_i, N, H, i_h, HEIGHT, WIDTH)
        m_i = live(o_n, N, p_mask, i_b, mask_b, mask_n) & m_d
        b_q = tl.where(m_i, phi(load(p_x + tile(o_n, o_d, x_n), m_i), ELU), 0.0).to(T)
        b_di = tl.load(p_do + tile(o_n, o_d, do_n), mask=m_i, other=0.0)
        distance = tl.abs(o_p[:, None] - o_i[None, :]).to(tl.float32)
        b_a = weight(rate, distance) * load(p_r + o_i, o_i < N)[None, :]
        b_e = tl.dot(b_v, tl.trans(b_di), input_precision=PRECISION)
        b_e = (b_e - load(p_delta + o_i, o_i < N)[None, :]) * b_a
        b_dk += product(b_e, b_q, PRECISION)
        b_s = tl.dot(b_phi.to(T), tl.trans(b_q), input_precision=PRECISION)
        b_decay += tl.sum(b_s * (b_e * distance), 1)
        b_dv += product(b_s * b_a, b_di, PRECISION)
    store(p_dx + H * D, b_dk * slope(1.0, b_phi, ELU), p_mask, m, m_inside)
    store(p_dx + 2 * H * D, b_dv, p_mask, m, m_inside)
    tl.store(p_partial + i_tile, decay + tl.sum(b_decay, 0))


_forward_starters = starters_of('decay', state_forward, out_forward)
_backward_starters = starters_of('decay', state_backward, token_backward)


def forward(
    qkv: Tensor, log_decay: Tensor, mask: Tensor | None, width: int, elu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, H, D) of qkv (B, N, 3, H, D), and what its gradient needs, in fp32: the states
    F and B (B, H, C, 2, D + 1, D), and r (B, H, N)."""
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, dim))
    r = qkv.new_empty((batch, heads, tokens), dtype=torch.float32)
    state = _new_states(qkv)
    if out.numel() == 0:
        return out, state, r
    rate = log_decay.float().contiguous()
    tensors = dict(p_x=qkv, p_mask=mask, p_decay=rate, p_state=state)
    numbers: dict = dict(HEIGHT=tokens // width, WIDTH=width, ELU=elu, eps=eps)
    sums, read = _forward_starters(qkv, mask, **numbers)
    sums(**tensors)
    _scan(qkv, rate, state)
    read(**tensors, p_out=out, p_r=r)
    return out, state, r


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    log_decay: Tensor,
    out: Tensor,
    state: Tensor,
    r: Tensor,
    mask: Tensor | None,
    width: int,
    elu: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed projection, contiguous, and of log_decay, in their dtypes."""
    batch, tokens, _, heads, dim = qkv.shape
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad, torch.zeros_like(log_decay)
    # The gradient of a sum comes from autograd as an expanded tensor, with strides of zero.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    delta, dstate = torch.empty_like(r), _new_states(qkv)
    rate = log_decay.float().contiguous()
    tensors = dict(p_x=qkv, p_mask=mask, p_decay=rate, p_r=r, p_delta=delta, p_do=grad_out)
    numbers: dict = dict(HEIGHT=tokens // width, WIDTH=width, ELU=elu)
    sums, token = _backward_starters(qkv, mask, grad_out, **numbers)
    sums(**tensors, p_out=out, p_state=dstate)
    across = r.new_empty((batch, heads, 2 * (dim + 1)))
    _scan(qkv, rate, dstate, state, across)
    within = r.new_empty((batch, heads, token.launch.splits))
    token(**tensors, p_state=state, p_dstate=dstate, p_dx=grad, p_partial=within)
    partial = torch.cat([across, within], 2)
    return grad, partial.sum((0, 2), dtype=torch.float64).to(log_decay.dtype)


def _new_states(qkv: Tensor) -> Tensor:
    """Uninitialised memory for two states of each chunk, (B, H, C, 2, D + 1, D) in fp32."""
    batch, tokens, _, heads, dim = qkv.shape
    chunks = triton.cdiv(tokens, decay_chunk(qkv.dtype, dim))
    return qkv.new_empty((batch, heads, chunks, 2, dim + 1, dim), dtype=torch.float32)


def _scan(
    qkv: Tensor,
    log_decay: Tensor,
    state: Tensor,
    other: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """Scan the states of a pass in place.

    In the backward pass, `other` are the states of the forward pass, and `partial`, one number for
    each program (B, H, 2 * (D + 1)), receives partial sums of dlog_decay.
    """
    batch, heads, chunks, _, _, dim = state.shape
    scanner = _scanner(state.device, qkv.dtype, batch, heads, chunks, dim)
    scanner(p_state=state, p_decay=log_decay, p_other=other, p_partial=partial)


@functools.lru_cache(4096)
def _scanner(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, chunks: int, dim: int
) -> Starter:
    block, num_warps = tile_config('decay', 'scan', torch.float32, dim)
    launch = Launch(block, chunks, 1, batch * heads * 2 * (dim + 1), num_warps)
    numbers = dict(
        C=chunks, H=heads, D=dim, BD=padded_dim(dim), BN=block, L=decay_chunk(dtype, dim),
        PRECISION=product_precision(dim, is_nvidia(device)),
    )  # fmt: skip
    return Starter(scan, device, launch, numbers)
