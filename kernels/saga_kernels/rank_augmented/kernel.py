"""Rank-augmented linear attention in Triton: three passes over the tokens forward, three backward,
no atomics.

Legend: B batch, N tokens, H heads, D head dim. Formulas hold for one head; `.` is a product over
channels, `*` one element by element. Numbers are fp32, except that operands of a matrix product
have the dtype of the input. x R turns each pair of channels of x by the angle of its token.

Forward     g = mean_i phi(q_i) / sqrt(D),  k' = phi(k),  a = softmax_j(k'_j . g)
            S = sum_j a_j (k'_j R)^T v_j,  z = sum_j a_j k'_j,  r = 1 / (phi(q) . z + eps)
            A = S / c (row by row),  w = r * (c * phi(q)) R,  o = w A
Backward    t = do A^T,  delta = w . t = do . o
            dS = sum_i w_i^T do_i / c,  dz = -sum_i delta_i r_i phi(q_i)
            h = v dS^T R^-1 + dz,  da = k' . h,  mean of da under a = <S, dS> + z . dz
            ds = a * (da - mean),  dg = sum_j ds_j k'_j
            dk' = a * h + ds * g,  dv = a * (k' R) dS
            dphi(q) = r * (c * t R^-1 - delta * z) + dg / (N sqrt(D))

c is z summed over each pair of channels. Both channels of a pair have the same c, so c and R
commute; a row of A is at most the largest v. Weights a are kept relative to the largest a_j k'_j
seen so far, and scaled such that their products with k' fill the range of half precision. So no
operand grows with N or with k, and what half precision loses is far below the largest term. Rows of
w, and of a * k' R / c, are divided by their sum before they become operands, and the product is
multiplied by it.

Each program takes `span` tokens of one head and writes a partial result; these are combined in a
fixed order, so that results are repeatable bit by bit. Partial S and z are averages over their own
tokens, and beside them stands the logarithm of the sum of the weights of these tokens.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import MERGED, Launch, new_partials, sum_partials, tile_config
from ..rotary import table_shape
from ..starter import Starter, starters_of
from ..tiles import (
    SIZES,
    aligned,
    exp,
    live,
    load,
    load_state,
    phi,
    program_range,
    safe_div,
    slope,
    store,
    store_state,
    tile,
)

# Logarithms of the smallest k' that weights are kept relative to, and of the largest product of a
# weight with k': 2^14, which the rotation may increase to less than the 65504 of float16.
FLOOR = tl.constexpr(-40 * math.log(2))
ROOM = tl.constexpr(14 * math.log(2))
# Logarithm of the weight of no tokens. It is finite, so that the difference of two of them is zero.
NOTHING = tl.constexpr(-1e38)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# Angles of the rotation that a program computes at a time.
ANGLES = tl.constexpr(128)


@triton.jit
def write_table(p_table, p_frequencies, HEIGHT, WIDTH, D: tl.constexpr):
    """The share of this program in the table of the rotation (WIDTH + HEIGHT, 2, D / 4): cosines,
    then sines, of the angles of each column and then of each row."""
    PAIRS: tl.constexpr = D // 4
    size = (WIDTH + HEIGHT) * PAIRS
    for begin in range(tl.program_id(0) * ANGLES, size, tl.num_programs(0) * ANGLES):
        o_e = begin + tl.arange(0, ANGLES)
        i_position, i_pair = o_e // PAIRS, o_e % PAIRS
        b_x = tl.load(p_frequencies + i_pair).to(tl.float64) * 0.3183098861837907
        # Half turns, from which the nearest integer is subtracted; if it is odd, both signs change.
        b_x *= tl.where(i_position < WIDTH, i_position, i_position - WIDTH).to(tl.float64)
        b_i = tl.floor(b_x + 0.5)
        m_sign = b_i.to(tl.int32) << 31
        b_x = (b_x - b_i).to(tl.float32)
        # Polynomials for sin(pi x) and cos(pi x), |x| <= 1/2, to 4e-9 and 2e-10.
        b_y = b_x * b_x
        b_sin = -0.598097986 + b_y * 0.0773087384
        b_sin = 3.1415926 + b_y * (-5.16770773 + b_y * (2.55004213 + b_y * b_sin))
        b_sin *= b_x
        b_cos = -1.33521206 + b_y * (0.234937559 + b_y * -0.0243967166)
        b_cos = 1.0 + b_y * (-4.93480214 + b_y * (4.05870916 + b_y * b_cos))
        p = p_table + i_position.to(tl.int64) * (2 * PAIRS) + i_pair
        tl.store(p, flipped(b_cos, m_sign), o_e < size)
        tl.store(p + PAIRS, flipped(b_sin, m_sign), o_e < size)


@triton.jit
def place(o_n, WIDTH):
    """Row and column of tokens in their image."""
    i_row = o_n // WIDTH
    return i_row, o_n - i_row * WIDTH


@triton.jit
def advance(i_row, i_column, rows, columns, WIDTH):
    """Row and column of tokens that stand so many rows and columns further on, fewer than WIDTH."""
    i_column += columns
    m_next = i_column >= WIDTH
    return i_row + rows + m_next, tl.where(m_next, i_column - WIDTH, i_column)


@triton.jit
def rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D: tl.constexpr, BD: tl.constexpr):
    """Cosine and sine of each token and pair of channels, from the table."""
    PAIRS: tl.constexpr = D // 4
    o_c = tl.arange(0, BD // 2)
    # The last tile may go beyond the image.
    i_row = tl.minimum(i_row, HEIGHT - 1) + WIDTH
    i_position = tl.where((o_c < PAIRS)[None, :], i_row[:, None], i_column[:, None])
    p = (p_table + o_c % PAIRS)[None, :] + i_position.to(tl.int64) * (2 * PAIRS)
    return tl.load(p), tl.load(p + PAIRS)


@triton.jit
def flipped(x, m_sign):
    return (x.to(tl.int32, bitcast=True) ^ m_sign).to(tl.float32, bitcast=True)


@triton.jit
def rotate(x, b_cos, b_sin, BN: tl.constexpr, BD: tl.constexpr):
    """Turn pairs of neighbouring channels; with -b_sin, turn them back."""
    b_even, b_odd = tl.split(tl.reshape(x, [BN, BD // 2, 2]))
    x = tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin)
    return tl.reshape(x, [BN, BD])


@triton.jit
def row_sum(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def reciprocal(x):
    """1 / x of x >= 0; zero where that is not finite, as a row with such a sum is lost in eps."""
    return tl.where(x < SMALLEST_NORMAL, 0.0, 1.0 / x)


@triton.jit
def logits(b_k, b_g):
    """k' . g without the sum of g, which the softmax does not see. Features are near one, so that
    these logits are small, and exact."""
    return row_sum((b_k - 1.0) * b_g)


@triton.jit
def load_scale(p_state, o_d, D: tl.constexpr):
    """c: z summed over each pair of channels; zero where it is too small for 1 / c to be finite."""
    p_z = p_state + D * D
    m_d = o_d < D
    b_c = tl.load(p_z + o_d, m_d, other=0.0) + tl.load(p_z + (o_d ^ 1), m_d, other=0.0)
    return tl.where(b_c < SMALLEST_NORMAL, 0.0, b_c)


@triton.jit(do_not_specialize=SIZES)
def mean_forward(
    p_x, p_mask, p_frequencies, p_partial, p_table, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Partial sums of phi(q), and the table of the rotation, which the other kernels read."""
    write_table(p_table, p_frequencies, HEIGHT, WIDTH, D)
    x_b, x_n, x_h = aligned((x_b, x_n, x_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    p_q = p_x + i_b * x_b + i_h * x_h
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BN, BD], tl.float32)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        b_q = phi(load(p_q + tile(o_n, o_d, x_n), m), True)
        b_sum += tl.where(m, b_q, 0.0)
    tl.store(p_partial + i_partial * D + o_d, tl.sum(b_sum, 0), o_d < D)


@triton.jit(do_not_specialize=SIZES)
def kv_forward(
    p_x, p_mask, p_table, p_query, p_partial, p_weight, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial S and z, as averages, and the logarithm of their weight, from k, v and g."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    o_d = tl.arange(0, BD)
    b_g = tl.load(p_query + (i_b * H + i_h) * D + o_d, o_d < D, other=0.0)[None, :]
    b_s = tl.zeros([BD, BD], tl.float32)
    b_z = tl.zeros([BD], tl.float32)
    # Largest logarithm of a weight times a feature so far, and the sum of weights relative to it.
    top = FLOOR - tl.sum(tl.sum(b_g, 1), 0)
    weight = tl.zeros([], tl.float32)
    i_row, i_column = place(begin + tl.arange(0, BN), WIDTH)
    rows, columns = place(BN, WIDTH)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_n = live(o_n, end, p_mask, i_b, mask_b, mask_n)
        m = m_n & (o_d < D)[None, :]
        o = tile(o_n, o_d, x_n)
        b_k = tl.where(m, phi(load(p_k + o, m), True), 0.0)
        b_v = tl.load(p_k + x_p + o, mask=m, other=0.0)
        b_logit = logits(b_k, b_g)
        b_peak = tl.log(tl.maximum(tl.max(b_k, 1)[:, None], 2.0**-40))
        before = top
        top = tl.maximum(top, tl.max(tl.max(tl.where(m_n, b_logit + b_peak, top), 1), 0))
        shrunk = exp(before - top)
        b_a = tl.where(m_n, exp(b_logit - top + ROOM), 0.0)
        b_k *= b_a
        weight = weight * shrunk + tl.sum(tl.sum(b_a, 1), 0)
        b_z = b_z * shrunk + tl.sum(b_k, 0)
        b_cos, b_sin = rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D, BD)
        b_k = rotate(b_k, b_cos, b_sin, BN, BD).to(T)
        b_s = tl.dot(tl.trans(b_k), b_v, b_s * shrunk, input_precision=PRECISION)
        i_row, i_column = advance(i_row, i_column, rows, columns, WIDTH)
    p_state = p_partial + i_partial * (D + 1) * D
    store_state(p_state, safe_div(b_s, weight), safe_div(b_z, weight), o_d, D)
    tl.store(p_weight + i_partial, tl.where(weight == 0, NOTHING, top - ROOM + tl.log(weight)))


@triton.jit(do_not_specialize=SIZES)
def merge(
    p_partial, p_weight, p_state, p_total, SPLITS,
    D: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Averages over all tokens, from averages over parts and the logarithms of their weights."""
    SIZE: tl.constexpr = (D + 1) * D
    chunks = tl.cdiv(SIZE, BE)
    i_state = (tl.program_id(0) // chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % chunks
    o_e = i_chunk * BE + tl.arange(0, BE)
    b_state = tl.zeros([BE], tl.float32)
    top = tl.full([], NOTHING, tl.float32)
    weight = tl.zeros([], tl.float32)
    for s in range(0, SPLITS, BN):
        o_s = s + tl.arange(0, BN)
        m_s = o_s < SPLITS
        p = p_partial + (i_state * SPLITS + o_s)[:, None] * SIZE + o_e[None, :]
        b_partial = tl.load(p, m_s[:, None] & (o_e < SIZE)[None, :], other=0.0)
        b_log = tl.load(p_weight + i_state * SPLITS + o_s, m_s, other=NOTHING)
        before = top
        top = tl.maximum(top, tl.max(b_log, 0))
        shrunk = exp(before - top)
        b_a = tl.where(m_s, exp(b_log - top), 0.0)
        weight = weight * shrunk + tl.sum(b_a, 0)
        b_state = b_state * shrunk + tl.sum(b_a[:, None] * b_partial, 0)
    tl.store(p_state + i_state * SIZE + o_e, b_state / weight, o_e < SIZE)
    tl.store(p_total + i_state, top + tl.log(weight), mask=i_chunk == 0)


@triton.jit(do_not_specialize=SIZES)
def out_forward(
    p_x, p_mask, p_table, p_state, p_out, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_h, mask_b, mask_n, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o from q and the state."""
    x_b, x_n, x_h = aligned((x_b, x_n, x_h), ALIGN)
    i_b, i_h, _, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_o = p_out + (i_b * N * H + i_h) * D
    p_state += (i_b * H + i_h) * (D + 1) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state, o_d, D)
    b_c = load_scale(p_state, o_d, D)
    b_a = safe_div(b_s, b_c[:, None]).to(T)
    i_row, i_column = place(begin + tl.arange(0, BN), WIDTH)
    rows, columns = place(BN, WIDTH)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        b_q = phi(load(p_q + tile(o_n, o_d, x_n), m), True)
        b_r = 1.0 / (row_sum(b_q * b_z[None, :]) + eps)
        b_q *= b_c[None, :]
        b_sum = row_sum(b_q)
        b_cos, b_sin = rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D, BD)
        b_w = rotate(b_q * reciprocal(b_sum), b_cos, b_sin, BN, BD)
        b_o = tl.dot(b_w.to(T), b_a, input_precision=PRECISION) * (b_sum * b_r)
        store(p_o + tile(o_n, o_d, H * D), b_o, p_mask, m, (o_n < end)[:, None] & m_d)
        i_row, i_column = advance(i_row, i_column, rows, columns, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def state_backward(
    p_x, p_mask, p_table, p_state, p_do, p_partial, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_h, mask_b, mask_n, do_b, do_n, do_h, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial dS and dz from q, do and the state."""
    x_b, x_n, x_h, do_b, do_n, do_h = aligned((x_b, x_n, x_h, do_b, do_n, do_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_do += i_b * do_b + i_h * do_h
    p_state += (i_b * H + i_h) * (D + 1) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state, o_d, D)
    b_c = load_scale(p_state, o_d, D)
    b_a = tl.trans(safe_div(b_s, b_c[:, None]).to(T))
    b_s = tl.zeros([BD, BD], tl.float32)
    b_dz = tl.zeros([BD], tl.float32)
    i_row, i_column = place(begin + tl.arange(0, BN), WIDTH)
    rows, columns = place(BN, WIDTH)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & (o_d < D)[None, :]
        b_q = load(p_q + tile(o_n, o_d, x_n), m)
        b_do = tl.load(p_do + tile(o_n, o_d, do_n), mask=m, other=0.0)
        b_q = tl.where(m, phi(b_q, True), 0.0)
        b_q *= 1.0 / (row_sum(b_q * b_z[None, :]) + eps)
        b_cos, b_sin = rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D, BD)
        b_w = rotate(b_q * b_c[None, :], b_cos, b_sin, BN, BD)
        b_t = tl.dot(b_do, b_a, input_precision=PRECISION)
        b_dz -= tl.sum(b_q * row_sum(b_w * b_t), 0)
        b_s = tl.dot(tl.trans(b_w.to(T)), b_do, b_s, input_precision=PRECISION)
        i_row, i_column = advance(i_row, i_column, rows, columns, WIDTH)
    p_dstate = p_partial + i_partial * (D + 1) * D
    store_state(p_dstate, safe_div(b_s, b_c[:, None]), b_dz, o_d, D)


@triton.jit(do_not_specialize=SIZES)
def kv_backward(
    p_x, p_mask, p_table, p_query, p_weight, p_state, p_dstate, p_dx, p_partial,
    N, H, SPAN, HEIGHT, WIDTH, x_b, x_n, x_p, x_h, mask_b, mask_n,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and partial dg from k, v, g, the state and its gradient."""
    x_b, x_n, x_p, x_h = aligned((x_b, x_n, x_p, x_h), ALIGN)
    i_b, i_h, i_partial, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    i_head = i_b * H + i_h
    p_k = p_x + i_b * x_b + i_h * x_h + x_p
    p_dk = p_dx + (i_b * N * 3 * H + H + i_h) * D
    p_state += i_head * (D + 1) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state, o_d, D)
    b_ds, b_dz = load_state(p_dstate + i_head * (D + 1) * D, o_d, D)
    mean = tl.sum(tl.sum(b_s * b_ds, 1) + b_z * b_dz, 0)
    b_c = load_scale(p_state, o_d, D)
    # dS has the scale of the loss; divided by its largest element it is at most one.
    b_ds *= b_c[:, None]
    scale = tl.max(tl.max(tl.abs(b_ds), 1), 0)
    scale = tl.where(scale > 0, scale, 1.0)
    b_ds = (b_ds / scale).to(T)
    b_dst = tl.trans(b_ds)
    b_c = safe_div(1.0, b_c)[None, :]
    b_g = tl.load(p_query + i_head * D + o_d, o_d < D, other=0.0)[None, :]
    log_weight = tl.load(p_weight + i_head)
    b_dg = tl.zeros([BD], tl.float32)
    i_row, i_column = place(begin + tl.arange(0, BN), WIDTH)
    rows, columns = place(BN, WIDTH)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m_n = live(o_n, end, p_mask, i_b, mask_b, mask_n)
        m = m_n & m_d
        m_inside = (o_n < end)[:, None] & m_d
        o = tile(o_n, o_d, x_n)
        b_k = load(p_k + o, m)
        b_v = tl.load(p_k + x_p + o, mask=m, other=0.0)
        b_phi = tl.where(m, phi(b_k, True), 0.0)
        b_a = tl.where(m_n, exp(logits(b_phi, b_g) - log_weight), 0.0)
        b_cos, b_sin = rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D, BD)
        b_h = tl.dot(b_v, b_dst, input_precision=PRECISION) * scale
        b_h = rotate(b_h, b_cos, -b_sin, BN, BD) * b_c + b_dz[None, :]
        b_da = b_a * (row_sum(b_phi * b_h) - mean)
        b_dg += tl.sum(b_da * b_phi, 0)
        p_d = p_dk + tile(o_n, o_d, 3 * H * D)
        b_dk = b_a * b_h + b_da * b_g
        store(p_d, b_dk * slope(1.0, b_phi, True), p_mask, m, m_inside)
        b_phi *= b_c
        b_sum = row_sum(b_phi)
        b_w = rotate(b_phi * reciprocal(b_sum), b_cos, b_sin, BN, BD)
        b_dv = tl.dot(b_w.to(T), b_ds, input_precision=PRECISION) * (b_a * b_sum * scale)
        store(p_d + H * D, b_dv, p_mask, m, m_inside)
        i_row, i_column = advance(i_row, i_column, rows, columns, WIDTH)
    tl.store(p_partial + i_partial * D + o_d, b_dg, o_d < D)


@triton.jit(do_not_specialize=SIZES)
def q_backward(
    p_x, p_mask, p_table, p_state, p_dquery, p_do, p_dx, N, H, SPAN, HEIGHT, WIDTH,
    x_b, x_n, x_h, mask_b, mask_n, do_b, do_n, do_h, eps,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq from q, do, the state and the gradient of the mean."""
    x_b, x_n, x_h, do_b, do_n, do_h = aligned((x_b, x_n, x_h, do_b, do_n, do_h), ALIGN)
    i_b, i_h, _, begin, end = program_range(N, H, SPAN)
    T: tl.constexpr = p_x.dtype.element_ty
    p_q = p_x + i_b * x_b + i_h * x_h
    p_do += i_b * do_b + i_h * do_h
    p_dq = p_dx + (i_b * N * 3 * H + i_h) * D
    p_state += (i_b * H + i_h) * (D + 1) * D
    o_d = tl.arange(0, BD)
    b_s, b_z = load_state(p_state, o_d, D)
    b_c = load_scale(p_state, o_d, D)
    b_a = tl.trans(safe_div(b_s, b_c[:, None]).to(T))
    b_mean = tl.load(p_dquery + (i_b * H + i_h) * D + o_d, o_d < D, other=0.0)[None, :]
    i_row, i_column = place(begin + tl.arange(0, BN), WIDTH)
    rows, columns = place(BN, WIDTH)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        m_d = (o_d < D)[None, :]
        m = live(o_n, end, p_mask, i_b, mask_b, mask_n) & m_d
        b_q = load(p_q + tile(o_n, o_d, x_n), m)
        b_do = tl.load(p_do + tile(o_n, o_d, do_n), mask=m, other=0.0)
        b_phi = tl.where(m, phi(b_q, True), 0.0)
        b_r = 1.0 / (row_sum(b_phi * b_z[None, :]) + eps)
        b_cos, b_sin = rotation(p_table, i_row, i_column, HEIGHT, WIDTH, D, BD)
        b_t = tl.dot(b_do, b_a, input_precision=PRECISION)
        b_t = rotate(b_t, b_cos, -b_sin, BN, BD) * b_c[None, :]
        b_delta = row_sum(b_phi * b_t) * b_r
        b_dq = b_r * (b_t - b_delta * b_z[None, :]) + b_mean
        b_dq *= slope(1.0, b_phi, True)
        store(p_dq + tile(o_n, o_d, 3 * H * D), b_dq, p_mask, m, (o_n < end)[:, None] & m_d)
        i_row, i_column = advance(i_row, i_column, rows, columns, WIDTH)


_forward_starters = starters_of('rank_augmented', mean_forward, kv_forward, out_forward)
_backward_starters = starters_of('rank_augmented', state_backward, kv_backward, q_backward)


def forward(
    qkv: Tensor, frequencies: Tensor, mask: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, H, D) of qkv (B, N, 3, H, D), and what its gradient needs, in fp32: the table
    of the rotation (width + height, 2, D / 4), the state (B, H, D + 1, D), the mean query g
    (B, H, D), and the logsumexp of the weights (B, H)."""
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty((batch, tokens, heads, dim))
    table = qkv.new_empty(table_shape(tokens, width, dim), dtype=torch.float32)
    if out.numel() == 0:
        state = new_partials(qkv, 1, dim + 1, dim).zero_()
        return out, table.zero_(), state, state[:, :, 0].clone(), state[:, :, 0, 0].clone()
    tensors = dict(p_x=qkv, p_mask=mask, p_table=table)
    size: dict = dict(HEIGHT=tokens // width, WIDTH=width)
    mean, kv, read = _forward_starters(qkv, mask, **size, eps=eps)
    partial = new_partials(qkv, mean.launch.splits, dim)
    mean(**tensors, p_frequencies=frequencies.contiguous(), p_partial=partial)
    query = sum_partials(partial, mean.launch.splits) * _share(qkv, mask)
    splits = kv.launch.splits
    partial, weight = new_partials(qkv, splits, dim + 1, dim), new_partials(qkv, splits)
    kv(**tensors, p_query=query, p_partial=partial, p_weight=weight)
    state, weight = (partial, weight) if splits == 1 else _merge(partial, weight)
    read(**tensors, p_state=state, p_out=out)
    return out, table, state, query, weight


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    table: Tensor,
    state: Tensor,
    query: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    width: int,
    eps: float,
) -> Tensor:
    """Gradient of the packed projection, contiguous, in its dtype."""
    _, tokens, _, _, dim = qkv.shape
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if grad.numel() == 0:
        return grad
    # The gradient of a sum comes from autograd as an expanded tensor, with strides of zero.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    state = state.contiguous()
    tensors = dict(p_x=qkv, p_mask=mask, p_table=table, p_state=state)
    size: dict = dict(HEIGHT=tokens // width, WIDTH=width)
    sums, kv, q = _backward_starters(qkv, mask, grad_out, **size, eps=eps)
    partial = new_partials(qkv, sums.launch.splits, dim + 1, dim)
    sums(**tensors, p_do=grad_out, p_partial=partial)
    dstate = sum_partials(partial, sums.launch.splits)
    partial = new_partials(qkv, kv.launch.splits, dim)
    kv(**tensors, p_query=query, p_weight=weight, p_dstate=dstate, p_dx=grad, p_partial=partial)
    dquery = sum_partials(partial, kv.launch.splits) * _share(qkv, mask)
    q(**tensors, p_do=grad_out, p_dquery=dquery, p_dx=grad)
    return grad


def _share(qkv: Tensor, mask: Tensor | None) -> float | Tensor:
    """The weight of one query in g, 1 / (N sqrt(D)); with a mask a tensor (B, 1, 1)."""
    scale = qkv.shape[-1] ** -0.5
    if mask is None:
        return scale / qkv.shape[1]
    return scale / mask.sum(1).clamp(min=1)[:, None, None]


def _merge(partial: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One state and the logarithm of its weight, from those of all splits."""
    batch, heads, splits, _, dim = partial.shape
    state, total_weight = torch.empty_like(partial[:, :, 0]), torch.empty_like(weight[:, :, 0])
    merger = _merger(partial.device, batch * heads, splits, dim)
    merger(p_partial=partial, p_weight=weight, p_state=state, p_total=total_weight)
    return state, total_weight


@functools.lru_cache(4096)
def _merger(device: torch.device, heads: int, splits: int, dim: int) -> Starter:
    block, num_warps = tile_config('rank_augmented', 'merge', torch.float32, dim)
    programs = heads * triton.cdiv((dim + 1) * dim, MERGED)
    launch = Launch(block, splits, 1, programs, num_warps)
    return Starter(merge, device, launch, dict(SPLITS=splits, D=dim, BN=block, BE=MERGED))
