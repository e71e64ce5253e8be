"""Bidirectional WKV in Triton: states of chunks, a scan over chunks, then all tokens of a chunk.

Legend: B batch, N tokens, C channels; a program takes BC channels of a chunk, which has G tiles of
L tokens each. Every channel is by itself: a thread takes its channels through the tokens one by
one, and holds those of one tile in registers, as L blocks (BC). Threads exchange nothing, except in
the scan. A state on one side of a place is (top, a, b), with the sums a and b relative to exp(top).
Masked tokens are passed without a decay.

A tile needs the states on both of its sides. One side is where the program came from. The state on
the other side is of tokens beyond the chunk, which the scan gives, and of those in the chunk: the
pass before went through the chunk in the opposite direction, and wrote that part for each tile.

Forward     a, b = sums of e^k v and of e^k, before and after each token
            D = sum of e^k before, after and here, relative to exp(top);  o likewise with v, over D
Backward    what token t adds to the sums of the gradient: a = g / D, b = g o / D, relative to
            exp(-top), summed before and after each token as in the forward pass
            dv = e^k a,  dk = e^k (v a - b),  the token's own part with its bonus added
            dw = -e^-w sum over tokens, and both directions, of (a of the forward pass on one side
            times a of the backward pass on the other, minus the same of b)
            du = sum of e^(u + k - top) g (v - o) / D

All exponents here are differences that the largest term bounds by zero. They are taken before the
decay is: a `top` that was rounded costs nothing, as the sums follow it exactly.

Traffic, in token tensors T. Forward 5: k and v for the states; k, v and o. A pass must have read
the last token before it can write the first, so k and v are read twice. 3 is the minimum, and two
passes load at least 5 / 3 of it. What is left of the second reading is up to the L2 cache: programs
start where the first pass ended. Backward 8: k, v and do for the states; these, dk and dv. o and D
are computed again from the states of the forward pass. To write or to read all states once moves
6 / CHUNK of a token tensor in fp32, and 12 / CHUNK in half precision; the forward pass does so 4
times, the backward pass 6 times. A state for each tile moves 3 / L in fp32, and 6 / L in half
precision, each time; the forward pass does so twice, the backward pass 5 times.
"""

# The loops over the tokens of a tile let tuples grow, which changes their types.
# mypy: disable-error-code=assignment
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import ceil_div
from ..launch import (
    WKV_CHANNELS,
    WKV_CHUNK,
    WKV_STEPS,
    Launch,
    alignment,
    meaningful,
    plan,
    tile_config,
)
from ..starter import Starter
from ..tiles import SIZES, aligned, store

# e^x is 2^(x LOG2E), in two instructions.
LOG2E = tl.constexpr(1.4426950408889634)
# The exponent of no token at all. Finite, for the difference of two infinities is not a number.
EMPTY = tl.constexpr(-1e30)
# That of a masked token: its weight is zero beside an empty state, too.
MASKED = tl.constexpr(-3e30)


@triton.jit
def empty(BC: tl.constexpr):
    """The state of no token."""
    b_zero = tl.zeros([BC], tl.float32)
    return b_zero + EMPTY, b_zero, b_zero


@triton.jit
def decayed_sum(top_1, a_1, b_1, decay, top_2, a_2, b_2):
    """The sum of two states, the first of which decays by an exponent."""
    top = tl.maximum(top_1 - decay, top_2)
    x, y = tl.exp2((top_1 - top - decay) * LOG2E), tl.exp2((top_2 - top) * LOG2E)
    return top, x * a_1 + y * a_2, x * b_1 + y * b_2


@triton.jit
def join(decay_1, top_1, a_1, b_1, decay_2, top_2, a_2, b_2):
    """Two neighbouring ranges of tokens as one: its decay, and its state at the second's end."""
    top, a, b = decayed_sum(top_1, a_1, b_1, decay_2, top_2, a_2, b_2)
    return decay_1 + decay_2, top, a, b


@triton.jit
def load_state(p, o_c, m_c, C):
    """The state at a pointer."""
    p += o_c
    top = tl.load(p, mask=m_c, other=EMPTY)
    return top, tl.load(p + C, mask=m_c, other=0.0), tl.load(p + 2 * C, mask=m_c, other=0.0)


@triton.jit
def store_state(p, top, a, b, o_c, m_c, C):
    """Write the state to a pointer."""
    p += o_c
    tl.store(p, top, mask=m_c)
    tl.store(p + C, a, mask=m_c)
    tl.store(p + 2 * C, b, mask=m_c)


@triton.jit
def program(i, N, C, BC: tl.constexpr, CHUNK: tl.constexpr, L: tl.constexpr):
    """Image, chunk, number of its tiles, channels, and which channels there are, of program i."""
    # Channels run fastest: programs of one chunk share cache lines.
    blocks = tl.cdiv(C, BC)
    chunks = tl.cdiv(N, CHUNK)
    o_c = i % blocks * BC + tl.arange(0, BC)
    i_chunk = i // blocks
    i_b, i_chunk = (i_chunk // chunks).to(tl.int64), i_chunk % chunks
    tiles = tl.minimum(CHUNK // L, tl.cdiv(N - i_chunk * CHUNK, L))
    return i_b, i_chunk, tiles, o_c, o_c < C


@triton.jit
def tokens(
    p_k, p_v, p_mask, begin, o_c, b_w, N, C, k_n, v_n, mask_n, L: tl.constexpr
):  # fmt: skip
    """Keys, values and decays of the L tokens of a tile, which of them count, and their number."""
    keys = ()
    values = ()
    rates = ()
    lives = ()
    count = 0.0
    for t in tl.static_range(L):
        o_n = (begin + t).to(tl.int64)
        m = begin + t < N
        if p_mask is not None:
            m &= tl.load(p_mask + o_n * mask_n, mask=m, other=0).to(tl.int32) > 0
            rates = rates + (tl.where(m, b_w, 0.0),)
            count += tl.where(m, 1.0, 0.0)
        else:
            # Nothing comes from beyond N that could decay.
            rates = rates + (b_w,)
            count += 1.0
        m_t = o_c < tl.where(m, C, 0)
        b_k = tl.load(p_k + o_n * k_n + o_c, mask=m_t, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_n * v_n + o_c, mask=m_t, other=0.0).to(tl.float32)
        keys = keys + (tl.where(m_t, b_k, MASKED),)
        values = values + (b_v,)
        lives = lives + (m_t,)
    return keys, values, rates, lives, count


@triton.jit
def ones(L: tl.constexpr, BC: tl.constexpr):
    """What each token adds to the sum of weights."""
    result = ()
    for _ in tl.static_range(L):
        result = result + (tl.full([BC], 1.0, tl.float32),)
    return result


@triton.jit
def walk(top, a, b, rates, exponents, xs, ys, WAY: tl.constexpr, L: tl.constexpr):
    """The state before each token of a tile (WAY 0) or after it (WAY 1), and behind the last.

    Args:
        top, a, b: The state before the first.
        rates, exponents, xs, ys: Decay, exponent and summands of each token.

    Returns:
        L states in the order of the tokens, and one state.
    """
    states = ()
    for t in tl.static_range(WAY * (L - 1), L - WAY * (L + 1), 1 - 2 * WAY):
        states = states + ((top, a, b),) if WAY == 0 else ((top, a, b),) + states
        top, a, b = decayed_sum(top, a, b, rates[t], exponents[t], xs[t], ys[t])
    return states, (top, a, b)


@triton.jit
def total(exponents, xs, ys, rates, WAY: tl.constexpr, L: tl.constexpr, BC: tl.constexpr):
    """The state behind a tile (WAY 0) or before it (WAY 1), of its tokens alone."""
    top, a, b = empty(BC)
    decay = tl.zeros([BC], tl.float32)
    decays = ()
    # From the edge where the state is.
    for t in tl.static_range((1 - WAY) * (L - 1), WAY * (L + 1) - 1, 2 * WAY - 1):
        top = tl.maximum(top, exponents[t] - decay)
        decays = decays + (decay,) if WAY == 1 else (decay,) + decays
        decay += rates[t]
    for t in tl.static_range(L):
        x = tl.exp2((exponents[t] - top - decays[t]) * LOG2E)
        a += x * xs[t]
        b += x * ys[t]
    return top, a, b


@triton.jit
def mean(before, after, key, value, b_u):
    """The exponent of the largest weight at a token, the weighted mean, and the reciprocal of the
    sum of the weights."""
    top_1, a_1, b_1 = before
    top_2, a_2, b_2 = after
    top = tl.maximum(tl.maximum(top_1, top_2), key + b_u)
    x, y, z = (
        tl.exp2((top_1 - top) * LOG2E),
        tl.exp2((top_2 - top) * LOG2E),
        tl.exp2((key - top + b_u) * LOG2E),
    )
    # A division would take more instructions; the sum is at least about one.
    r = tl.rsqrt(x * b_1 + y * b_2 + z)
    r = r * r
    return top, (x * a_1 + y * a_2 + z * value) * r, r


@triton.jit
def adjoints(
    means, lives, p_do, begin, o_c, do_n, L: tl.constexpr
):  # fmt: skip
    """Exponent and summands of each token in the sums of the backward pass."""
    exponents = ()
    xs = ()
    ys = ()
    for t in tl.static_range(L):
        top, b_o, b_r = means[t]
        b_do = tl.load(p_do + (begin + t).to(tl.int64) * do_n + o_c, mask=lives[t], other=0.0)
        b_x = tl.where(lives[t], b_do.to(tl.float32) * b_r, 0.0)
        exponents = exponents + (tl.where(lives[t], -top, MASKED),)
        xs = xs + (b_x,)
        ys = ys + (tl.where(lives[t], b_x * b_o, 0.0),)
    return exponents, xs, ys


@triton.jit(do_not_specialize=SIZES)
def state_forward(
    p_k, p_v, p_mask, p_w, p_state, p_earlier, p_count, N, C, k_b, k_n, v_b, v_n, w_b,
    mask_b, mask_n, ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The states that each chunk adds, also to each of its tiles, and its number of tokens."""
    C, k_b, k_n, v_b, v_n, w_b = aligned((C, k_b, k_n, v_b, v_n, w_b), ALIGN)
    i_b, i_chunk, tiles, o_c, m_c = program(tl.program_id(0), N, C, BC, G * L, L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)
    i = i_b * tl.cdiv(N, G * L) + i_chunk
    p_k += i_b * k_b
    p_v += i_b * v_b
    if p_mask is not None:
        p_mask += i_b * mask_b
    top, a, b = empty(BC)
    r_top, r_a, r_b = empty(BC)
    passed = 0.0
    for j in range(tiles):
        p_tile = (i_b * tl.cdiv(N, L) + i_chunk * G + j) * 3 * C
        store_state(p_earlier + p_tile, top, a, b, o_c, m_c, C)
        keys, values, rates, _, count = tokens(
            p_k, p_v, p_mask, i_chunk * G * L + j * L, o_c, b_w, N, C, k_n, v_n, mask_n, L
        )
        b_ones = ones(L, BC)
        t_top, t_a, t_b = total(keys, values, b_ones, rates, 0, L, BC)
        top, a, b = decayed_sum(top, a, b, count * b_w, t_top, t_a, t_b)
        t_top, t_a, t_b = total(keys, values, b_ones, rates, 1, L, BC)
        r_top, r_a, r_b = decayed_sum(t_top, t_a, t_b, passed * b_w, r_top, r_a, r_b)
        passed += count
    store_state(p_state + i * 6 * C, top, a, b, o_c, m_c, C)
    store_state(p_state + i * 6 * C + 3 * C, r_top, r_a, r_b, o_c, m_c, C)
    tl.store(p_count + i, passed, mask=tl.program_id(0) % tl.cdiv(C, BC) == 0)


@triton.jit(do_not_specialize=SIZES)
def scan(
    p_state, p_count, p_w, p_enter, CHUNKS, C, w_b,
    ALIGN: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The states where each chunk begins and ends, from those that the chunks add. A program takes
    some channels in one direction."""
    C, w_b = aligned((C, w_b), ALIGN)
    i = tl.program_id(0)
    blocks = tl.cdiv(C, BC)
    o_c = i % blocks * BC + tl.arange(0, BC)
    m_c = o_c < C
    i_way, i_b = i // blocks % 2, (i // (2 * blocks)).to(tl.int64)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)[None, :]
    o = tl.arange(0, BN)
    b_zero = tl.zeros([1, BC], tl.float32)
    top, a, b = b_zero + EMPTY, b_zero, b_zero
    for n in range(0, CHUNKS, BN):
        # Each row takes the state of the chunk before it.
        o_to = tl.where(i_way == 0, n + o, CHUNKS - 1 - n - o)
        o_from = tl.where(i_way == 0, o_to - 1, o_to + 1)
        m_to = (n + o < CHUNKS)[:, None] & m_c[None, :]
        m_from = m_to & (n + o > 0)[:, None]
        p = p_state + ((i_b * CHUNKS + o_from) * 2 + i_way)[:, None] * 3 * C + o_c[None, :]
        b_top = tl.load(p, mask=m_from, other=EMPTY)
        b_a = tl.load(p + C, mask=m_from, other=0.0)
        b_b = tl.load(p + 2 * C, mask=m_from, other=0.0)
        p = p_count + i_b * CHUNKS + o_from
        count = tl.load(p, mask=(n + o > 0) & (n + o < CHUNKS), other=0.0)[:, None]
        decay, b_top, b_a, b_b = tl.associative_scan((count * b_w, b_top, b_a, b_b), 0, join)
        b_top, b_a, b_b = decayed_sum(top, a, b, decay, b_top, b_a, b_b)
        p = p_enter + ((i_b * CHUNKS + o_to) * 2 + i_way)[:, None] * 3 * C + o_c[None, :]
        tl.store(p, b_top, mask=m_to)
        tl.store(p + C, b_a, mask=m_to)
        tl.store(p + 2 * C, b_b, mask=m_to)
        m_last = (o == BN - 1)[:, None]
        top = tl.sum(tl.where(m_last, b_top, 0.0), 0)[None, :]
        a = tl.sum(tl.where(m_last, b_a, 0.0), 0)[None, :]
        b = tl.sum(tl.where(m_last, b_b, 0.0), 0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def out_forward(
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_earlier, p_count, p_out, N, C, k_b, k_n, v_b, v_n,
    w_b, u_b, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """o of each token of a chunk, from its end to its beginning."""
    C, k_b, k_n, v_b, v_n, w_b, u_b = aligned((C, k_b, k_n, v_b, v_n, w_b, u_b), ALIGN)
    # From the end, which the cache still holds.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_chunk, tiles, o_c, m_c = program(i, N, C, BC, G * L, L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)
    i = i_b * tl.cdiv(N, G * L) + i_chunk
    p_k += i_b * k_b
    p_v += i_b * v_b
    p_out += i_b * N * C
    if p_mask is not None:
        p_mask += i_b * mask_b
    e_top, e_a, e_b = load_state(p_enter + i * 6 * C, o_c, m_c, C)
    top, a, b = load_state(p_enter + i * 6 * C + 3 * C, o_c, m_c, C)
    passed = tl.load(p_count + i)
    for j in range(tiles - 1, -1, -1):
        begin = i_chunk * G * L + j * L
        keys, values, rates, lives, count = tokens(
            p_k, p_v, p_mask, begin, o_c, b_w, N, C, k_n, v_n, mask_n, L
        )
        passed -= count
        b_ones = ones(L, BC)
        p_tile = (i_b * tl.cdiv(N, L) + i_chunk * G + j) * 3 * C
        t_top, t_a, t_b = load_state(p_earlier + p_tile, o_c, m_c, C)
        t_top, t_a, t_b = decayed_sum(e_top, e_a, e_b, passed * b_w, t_top, t_a, t_b)
        earlier, _ = walk(t_top, t_a, t_b, rates, keys, values, b_ones, 0, L)
        for t in tl.static_range(L - 1, -1, -1):
            _, b_o, _ = mean(earlier[t], (top, a, b), keys[t], values[t], b_u)
            p = p_out + (begin + t).to(tl.int64) * C + o_c
            store(p, b_o, p_mask, lives[t], o_c < tl.where(begin + t < N, C, 0))
            top, a, b = decayed_sum(top, a, b, rates[t], keys[t], values[t], b_ones[t])


@triton.jit(do_not_specialize=SIZES)
def state_backward(
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_earlier, p_count, p_do, p_state, p_later, p_dlater,
    N, C, k_b, k_n, v_b, v_n, w_b, u_b, do_b, do_n, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The states that each chunk adds in the backward pass, also to each of its tiles; and the
    states of the forward pass behind each tile."""
    C, k_b, k_n, v_b = aligned((C, k_b, k_n, v_b), ALIGN)
    v_n, w_b, u_b, do_b, do_n = aligned((v_n, w_b, u_b, do_b, do_n), ALIGN)
    i_b, i_chunk, tiles, o_c, m_c = program(tl.program_id(0), N, C, BC, G * L, L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)
    i = i_b * tl.cdiv(N, G * L) + i_chunk
    p_k += i_b * k_b
    p_v += i_b * v_b
    p_do += i_b * do_b
    if p_mask is not None:
        p_mask += i_b * mask_b
    e_top, e_a, e_b = load_state(p_enter + i * 6 * C, o_c, m_c, C)
    top, a, b = load_state(p_enter + i * 6 * C + 3 * C, o_c, m_c, C)
    left = tl.load(p_count + i)
    passed = 0.0
    d_top, d_a, d_b = empty(BC)
    r_top, r_a, r_b = empty(BC)
    for j in range(tiles - 1, -1, -1):
        p_tile = (i_b * tl.cdiv(N, L) + i_chunk * G + j) * 3 * C
        store_state(p_later + p_tile, top, a, b, o_c, m_c, C)
        store_state(p_dlater + p_tile, r_top, r_a, r_b, o_c, m_c, C)
        begin = i_chunk * G * L + j * L
        keys, values, rates, lives, count = tokens(
            p_k, p_v, p_mask, begin, o_c, b_w, N, C, k_n, v_n, mask_n, L
        )
        left -= count
        b_ones = ones(L, BC)
        t_top, t_a, t_b = load_state(p_earlier + p_tile, o_c, m_c, C)
        t_top, t_a, t_b = decayed_sum(e_top, e_a, e_b, left * b_w, t_top, t_a, t_b)
        earlier, _ = walk(t_top, t_a, t_b, rates, keys, values, b_ones, 0, L)
        means = ()
        for t in tl.static_range(L - 1, -1, -1):
            means = (mean(earlier[t], (top, a, b), keys[t], values[t], b_u),) + means
            top, a, b = decayed_sum(top, a, b, rates[t], keys[t], values[t], b_ones[t])
        exponents, xs, ys = adjoints(means, lives, p_do, begin, o_c, do_n, L)
        t_top, t_a, t_b = total(exponents, xs, ys, rates, 0, L, BC)
        d_top, d_a, d_b = decayed_sum(t_top, t_a, t_b, passed * b_w, d_top, d_a, d_b)
        t_top, t_a, t_b = total(exponents, xs, ys, rates, 1, L, BC)
        r_top, r_a, r_b = decayed_sum(r_top, r_a, r_b, count * b_w, t_top, t_a, t_b)
        passed += count
    store_state(p_state + i * 6 * C, d_top, d_a, d_b, o_c, m_c, C)
    store_state(p_state + i * 6 * C + 3 * C, r_top, r_a, r_b, o_c, m_c, C)


@triton.jit(do_not_specialize=SIZES)
def token_backward(
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_count, p_do, p_later, p_denter, p_dlater, p_dk, p_dv,
    p_partial, N, C, k_b, k_n, v_b, v_n, w_b, u_b, do_b, do_n, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dk and dv of each token of a chunk, and partial sums of dw and du."""
    C, k_b, k_n, v_b = aligned((C, k_b, k_n, v_b), ALIGN)
    v_n, w_b, u_b, do_b, do_n = aligned((v_n, w_b, u_b, do_b, do_n), ALIGN)
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_chunk, tiles, o_c, m_c = program(i, N, C, BC, G * L, L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)
    i = i_b * tl.cdiv(N, G * L) + i_chunk
    p_k += i_b * k_b
    p_v += i_b * v_b
    p_do += i_b * do_b
    p_dk += i_b * N * C
    p_dv += i_b * N * C
    if p_mask is not None:
        p_mask += i_b * mask_b
    top, a, b = load_state(p_enter + i * 6 * C, o_c, m_c, C)
    d_top, d_a, d_b = load_state(p_denter + i * 6 * C, o_c, m_c, C)
    e_top, e_a, e_b = load_state(p_denter + i * 6 * C + 3 * C, o_c, m_c, C)
    left = tl.load(p_count + i)
    b_dw = tl.zeros([BC], tl.float32)
    b_du = tl.zeros([BC], tl.float32)
    for j in range(tiles):
        p_tile = (i_b * tl.cdiv(N, L) + i_chunk * G + j) * 3 * C
        begin = i_chunk * G * L + j * L
        keys, values, rates, lives, count = tokens(
            p_k, p_v, p_mask, begin, o_c, b_w, N, C, k_n, v_n, mask_n, L
        )
        left -= count
        b_ones = ones(L, BC)
        t_top, t_a, t_b = load_state(p_later + p_tile, o_c, m_c, C)
        later, _ = walk(t_top, t_a, t_b, rates, keys, values, b_ones, 1, L)
        earlier, last = walk(top, a, b, rates, keys, values, b_ones, 0, L)
        top, a, b = last
        means = ()
        for t in tl.static_range(L):
            means = means + (mean(earlier[t], later[t], keys[t], values[t], b_u),)
        exponents, xs, ys = adjoints(means, lives, p_do, begin, o_c, do_n, L)
        t_top, t_a, t_b = load_state(p_dlater + p_tile, o_c, m_c, C)
        t_top, t_a, t_b = decayed_sum(e_top, e_a, e_b, left * b_w, t_top, t_a, t_b)
        d_later, _ = walk(t_top, t_a, t_b, rates, exponents, xs, ys, 1, L)
        for t in tl.static_range(L):
            top_1, a_1, b_1 = earlier[t]
            top_2, a_2, b_2 = later[t]
            d_top_2, d_a_2, d_b_2 = d_later[t]
            x, y = tl.exp2((keys[t] + d_top) * LOG2E), tl.exp2((keys[t] + d_top_2) * LOG2E)
            z = tl.exp2((keys[t] + exponents[t] + b_u) * LOG2E)
            b_dv = x * d_a + y * d_a_2 + z * xs[t]
            b_dk = values[t] * b_dv - (x * d_b + y * d_b_2 + z * ys[t])
            b_du += z * (values[t] * xs[t] - ys[t])
            # Pairs of tokens on two sides of this one.
            b_pairs = tl.exp2((top_1 + d_top_2 - b_w) * LOG2E) * (a_1 * d_a_2 - b_1 * d_b_2)
            b_pairs += tl.exp2((top_2 + d_top - b_w) * LOG2E) * (a_2 * d_a - b_2 * d_b)
            b_dw -= tl.where(lives[t], b_pairs, 0.0)
            o = (begin + t).to(tl.int64) * C + o_c
            m_inside = o_c < tl.where(begin + t < N, C, 0)
            store(p_dk + o, b_dk, p_mask, lives[t], m_inside)
            store(p_dv + o, b_dv, p_mask, lives[t], m_inside)
            d_top, d_a, d_b = decayed_sum(d_top, d_a, d_b, rates[t], exponents[t], xs[t], ys[t])
    p_partial += i * 2 * C + o_c
    tl.store(p_partial, b_dw, mask=m_c)
    tl.store(p_partial + C, b_du, mask=m_c)


def forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, C); in fp32, the states where each chunk begins and ends, (B, chunks, 2, 3, C),
    those that the tiles of its chunk before each tile add, (B, tiles, 3, C), and the
    number of tokens of each chunk that count, (B, chunks)."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = _new_states(k)
    earlier = _new_tile_states(k)
    count = state.new_empty(state.shape[:2])
    if out.numel() == 0:
        return out, state, earlier, count
    w, u = (x.float().contiguous() for x in (w, u))
    tensors: dict[str, Any] = dict(p_k=k, p_v=v, p_mask=mask, p_w=w, p_u=u)
    starter = _starter_of(state_forward, **tensors)
    starter(**tensors, p_state=state, p_earlier=earlier, p_count=count)
    enter = _scan(state, count, w)
    starter = _starter_of(out_forward, **tensors)
    starter(**tensors, p_enter=enter, p_earlier=earlier, p_count=count, p_out=out)
    return out, enter, earlier, count


def backward(
    grad_out: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    enter: Tensor,
    earlier: Tensor,
    count: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w and u, contiguous, in their dtypes."""
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    if dk.numel() == 0:
        return dk, dv, torch.zeros_like(w), torch.zeros_like(u)
    # The gradient of a sum comes from autograd as an expanded tensor, with strides of zero.
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    p_w, p_u = (x.float().contiguous() for x in (w, u))
    tensors: dict[str, Any] = dict(p_k=k, p_v=v, p_mask=mask, p_w=p_w, p_u=p_u, p_do=grad_out)
    enter, earlier, count = (x.contiguous() for x in (enter, earlier, count))
    state = _new_states(k)
    later, dlater = _new_tile_states(k), _new_tile_states(k)
    tensors |= dict(p_enter=enter, p_count=count, p_later=later, p_dlater=dlater)
    starter = _starter_of(state_backward, **tensors)
    starter(**tensors, p_earlier=earlier, p_state=state)
    denter = _scan(state, count, p_w)
    partial = state.new_empty((*count.shape, 2, k.shape[2]))
    starter = _starter_of(token_backward, **tensors)
    starter(**tensors, p_denter=denter, p_dk=dk, p_dv=dv, p_partial=partial)
    # (B, 2, C)
    dw, du = partial.sum(1, dtype=torch.float64).unbind(1)
    return dk, dv, _sum_like(dw, w), _sum_like(du, u)


def _sum_like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient (B, C) of x, summed over the images if all of them share one row."""
    return (grad.sum(0, True) if x.shape[0] == 1 else grad).to(x.dtype)


def _new_states(k: Tensor) -> Tensor:
    """Uninitialised memory for two states of each chunk, (B, chunks, 2, 3, C) in fp32."""
    batch, tokens, channels = k.shape
    shape = (batch, ceil_div(tokens, WKV_CHUNK), 2, 3, channels)
    return k.new_empty(shape, dtype=torch.float32)


def _new_tile_states(k: Tensor) -> Tensor:
    """Uninitialised memory for a state of each tile, (B, tiles, 3, C) in fp32."""
    batch, tokens, channels = k.shape
    shape = (batch, ceil_div(tokens, WKV_STEPS), 3, channels)
    return k.new_empty(shape, dtype=torch.float32)


def _starter_of(
    kernel: Any,
    p_k: Tensor,
    p_v: Tensor,
    p_mask: Tensor | None,
    p_w: Tensor,
    p_u: Tensor,
    p_do: Tensor | None = None,
    **others: Tensor,
) -> Starter:
    """What launches a kernel over all chunks of these tensors."""
    return _starter(
        kernel, p_k.device, p_k.dtype, p_k.shape, p_k.stride(), p_v.stride(),
        None if p_mask is None else p_mask.stride(), p_w.shape[0], p_u.shape[0],
        None if p_do is None else p_do.stride(),
    )  # fmt: skip


@functools.lru_cache(4096)
def _starter(
    kernel: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    k_stride: tuple[int, ...],
    v_stride: tuple[int, ...],
    mask_stride: tuple[int, ...] | None,
    w_rows: int,
    u_rows: int,
    do_stride: tuple[int, ...] | None,
) -> Starter:
    batch, tokens, channels = shape
    width = WKV_CHANNELS[kernel.__name__]
    blocks = batch * ceil_div(channels, width)
    launch = plan('wkv', kernel.__name__, dtype, 1, blocks, tokens, 1)
    steps: dict[str, int] = {}
    for name, stride in dict(k=k_stride, v=v_stride, do=do_stride).items():
        b, n, _ = (0, 0, 0) if stride is None else meaningful(shape, stride)
        steps |= {f'{name}_b': b, f'{name}_n': n}
    mask_b, mask_n = (0, 0) if mask_stride is None else meaningful(shape[:2], mask_stride)
    numbers = dict(
        N=tokens, C=channels, **steps, w_b=_step(w_rows, channels), u_b=_step(u_rows, channels),
        mask_b=mask_b, mask_n=mask_n, ALIGN=alignment(channels, *steps.values()),
        BC=width, G=launch.block // WKV_STEPS, L=WKV_STEPS,
    )  # fmt: skip
    return Starter(kernel, device, launch, numbers)


def _step(rows: int, channels: int) -> int:
    """Distance of the images in a contiguous (B, C); zero if all of them share one row."""
    return 0 if rows == 1 else channels


def _scan(state: Tensor, count: Tensor, w: Tensor) -> Tensor:
    """The states where each chunk begins and ends, from those that the chunks add."""
    enter = torch.empty_like(state)
    scanner = _scanner(state.device, state.shape, w.shape[0])
    scanner(p_state=state, p_count=count, p_w=w, p_enter=enter)
    return enter


@functools.lru_cache(4096)
def _scanner(device: torch.device, shape: tuple[int, ...], w_rows: int) -> Starter:
    batch, chunks, _, _, channels = shape
    width = WKV_CHANNELS['scan']
    block, num_warps = tile_config('wkv', 'scan', torch.float32, 1)
    launch = Launch(block, chunks, 1, batch * 2 * ceil_div(channels, width), num_warps)
    numbers = dict(
        CHUNKS=chunks, C=channels, w_b=_step(w_rows, channels), ALIGN=alignment(channels),
        BC=width, BN=block,
    )  # fmt: skip
    return Starter(scan, device, launch, numbers)
