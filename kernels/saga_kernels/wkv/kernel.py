"""Bidirectional WKV in Triton: states of chunks, a scan over chunks, then all tokens of a chunk.

Legend: B batch, N tokens, C channels; a tile has BC channels of a chunk of G groups of L tokens
each. Every channel is by itself, and a thread takes a group through its tokens: its tokens lie in
registers, as L blocks (G, BC). A state on one side of a place is (top, a, b), with the sums a and b
relative to exp(top). Masked tokens, and those beyond N, are passed without a decay.

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
times, the backward pass 6 times.
"""

# The loops over the tokens of a group let tuples grow, which changes their types.
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
    Starter,
    alignment,
    meaningful,
    plan,
    tile_config,
)
from ..tiles import SIZES, aligned, live, store, tile

# e^x is 2^(x LOG2E), in two instructions.
LOG2E = tl.constexpr(1.4426950408889634)
# No token at all. Finite, for the difference of two infinities is not a number.
EMPTY = tl.constexpr(-1e30)


@triton.jit
def empty(G: tl.constexpr, BC: tl.constexpr):
    """The state of no token."""
    b_zero = tl.zeros([G, BC], tl.float32)
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
def total(top, a, b, decay):
    """The sum over axis 0 of states that decay by exponents."""
    b_top = tl.max(top - decay, 0)
    x = tl.exp2((top - b_top[None, :] - decay) * LOG2E)
    return b_top, tl.sum(x * a, 0), tl.sum(x * b, 0)


@triton.jit
def neighbour(x, o_g, WAY: tl.constexpr, G: tl.constexpr, BC: tl.constexpr):
    """Row g - 1 at each row g, or row g + 1; an arbitrary one where there is none."""
    o_from = tl.maximum(o_g - 1, 0) if WAY == 0 else tl.minimum(o_g + 1, G - 1)
    return tl.gather(x, tl.broadcast_to(o_from[:, None], [G, BC]), 0)


@triton.jit
def enter(top, a, b, decay, p_state, o_c, m_c, C, o_g, WAY: tl.constexpr, G: tl.constexpr,
          BC: tl.constexpr):  # fmt: skip
    """The state where each group begins (WAY 0) or ends (WAY 1): of all tokens beyond that.

    Args:
        top, a, b: What each group adds, (G, BC).
        decay: Decay over each group.
        p_state: The state where the chunk begins or ends.
    """
    # The first group takes in that state; then all move one group on.
    m_first = (o_g == (0 if WAY == 0 else G - 1))[:, None]
    p = p_state + WAY * 3 * C + o_c
    b_top = tl.load(p, mask=m_c, other=EMPTY)[None, :]
    b_a = tl.load(p + C, mask=m_c, other=0.0)[None, :]
    b_b = tl.load(p + 2 * C, mask=m_c, other=0.0)[None, :]
    top_1, a_1, b_1 = decayed_sum(b_top, b_a, b_b, decay, top, a, b)
    top = tl.where(m_first, top_1, top)
    a, b = tl.where(m_first, a_1, a), tl.where(m_first, b_1, b)
    _, top, a, b = tl.associative_scan((decay, top, a, b), 0, join, reverse=WAY == 1)
    top = tl.where(m_first, b_top, neighbour(top, o_g, WAY, G, BC))
    a = tl.where(m_first, b_a, neighbour(a, o_g, WAY, G, BC))
    return top, a, tl.where(m_first, b_b, neighbour(b, o_g, WAY, G, BC))


@triton.jit
def walk(top, a, b, rates, exponents, xs, ys, WAY: tl.constexpr, L: tl.constexpr):
    """The state before each token of a group (WAY 0) or after it (WAY 1), and behind the last.

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
def enter_walk(
    rates, exponents, xs, ys, decay, p_state, o_c, m_c, C, o_g,
    WAY: tl.constexpr, G: tl.constexpr, BC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """`enter`, of the tokens of each group."""
    top, a, b = empty(G, BC)
    _, last = walk(top, a, b, rates, exponents, xs, ys, WAY, L)
    top, a, b = last
    return enter(top, a, b, decay, p_state, o_c, m_c, C, o_g, WAY, G, BC)


@triton.jit
def program(i, N, C, BC: tl.constexpr, CHUNK: tl.constexpr):
    """Image, chunk, channels, and which channels there are, of program i."""
    # Channels run fastest: programs of one chunk share cache lines.
    blocks = tl.cdiv(C, BC)
    chunks = tl.cdiv(N, CHUNK)
    o_c = i % blocks * BC + tl.arange(0, BC)
    i_chunk = i // blocks
    return (i_chunk // chunks).to(tl.int64), i_chunk % chunks, o_c, o_c < C


@triton.jit
def tokens(
    p_k, p_v, p_mask, i_b, i_chunk, o_c, m_c, b_w, N, k_b, k_n, v_b, v_n, mask_b, mask_n,
    G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Keys, values, ones and decays of the tokens of each group, and the number of those that
    count, (G, 1)."""
    keys = ()
    values = ()
    ones = ()
    rates = ()
    count = tl.zeros([G, 1], tl.float32)
    for t in tl.static_range(L):
        o_n = (i_chunk * G + tl.arange(0, G)) * L + t
        m_n = live(o_n, N, p_mask, i_b, mask_b, mask_n)
        m = m_n & m_c[None, :]
        b_k = tl.load(p_k + i_b * k_b + tile(o_n, o_c, k_n), mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_b * v_b + tile(o_n, o_c, v_n), mask=m, other=0.0).to(tl.float32)
        b_k = tl.where(m, b_k, EMPTY)
        keys = keys + (b_k,)
        values = values + (b_v,)
        ones = ones + (tl.where(m, 1.0, 0.0),)
        if p_mask is None:
            # Nothing comes from beyond N that could decay.
            rates = rates + (b_w,)
            count += 1.0
        else:
            rates = rates + (tl.where(m_n, b_w, 0.0),)
            count += tl.where(m_n, 1.0, 0.0)
    return keys, values, ones, rates, count


@triton.jit
def store_states(
    rates, exponents, xs, ys, count, b_w, p_state, o_c, m_c, C,
    G: tl.constexpr, BC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Write the states that a chunk adds to what follows it and to what comes before it."""
    # Triton 3.6 can't scan an axis beside one of length one.
    count = tl.broadcast_to(count, [G, BC])
    for WAY in tl.static_range(2):
        top, a, b = empty(G, BC)
        _, last = walk(top, a, b, rates, exponents, xs, ys, WAY, L)
        top, a, b = last
        # Tokens between the group and the edge of the chunk.
        passed = tl.cumsum(count, 0, reverse=WAY == 0) - count
        b_top, b_a, b_b = total(top, a, b, passed * b_w)
        p = p_state + WAY * 3 * C + o_c
        tl.store(p, b_top, mask=m_c)
        tl.store(p + C, b_a, mask=m_c)
        tl.store(p + 2 * C, b_b, mask=m_c)


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
    r = 1.0 / (x * b_1 + y * b_2 + z)
    return top, (x * a_1 + y * a_2 + z * value) * r, r


@triton.jit
def attend(
    keys, values, ones, rates, decay, b_u, p_enter, o_c, m_c, C, o_g,
    G: tl.constexpr, BC: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """What `mean` gives for each token, the states before each token, and that behind a group."""
    top, a, b = enter_walk(rates, keys, values, ones, decay, p_enter, o_c, m_c, C, o_g, 0, G, BC, L)
    behind = enter_walk(rates, keys, values, ones, decay, p_enter, o_c, m_c, C, o_g, 1, G, BC, L)
    earlier, _ = walk(top, a, b, rates, keys, values, ones, 0, L)
    means = ()
    top, a, b = behind
    for t in tl.static_range(L - 1, -1, -1):
        means = (mean(earlier[t], (top, a, b), keys[t], values[t], b_u),) + means
        top, a, b = decayed_sum(top, a, b, rates[t], keys[t], values[t], ones[t])
    return means, earlier, behind


@triton.jit
def adjoints(
    means, ones, p_do, i_b, i_chunk, o_c, m_c, N, do_b, do_n, G: tl.constexpr, L: tl.constexpr
):
    """Exponent and summands of each token in the sums of the backward pass."""
    exponents = ()
    xs = ()
    ys = ()
    for t in tl.static_range(L):
        o_n = (i_chunk * G + tl.arange(0, G)) * L + t
        m = ones[t] > 0
        top, b_o, b_r = means[t]
        b_do = tl.load(p_do + i_b * do_b + tile(o_n, o_c, do_n), mask=m, other=0.0)
        b_x = b_do.to(tl.float32) * b_r
        exponents = exponents + (tl.where(m, -top, EMPTY),)
        xs = xs + (tl.where(m, b_x, 0.0),)
        ys = ys + (tl.where(m, b_x * b_o, 0.0),)
    return exponents, xs, ys


@triton.jit(do_not_specialize=SIZES)
def state_forward(
    p_k, p_v, p_mask, p_w, p_state, p_count, N, C, k_b, k_n, v_b, v_n, w_b, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The states that each chunk adds, and its number of tokens."""
    C, k_b, k_n, v_b, v_n, w_b = aligned((C, k_b, k_n, v_b, v_n, w_b), ALIGN)
    i_b, i_chunk, o_c, m_c = program(tl.program_id(0), N, C, BC, G * L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)[None, :]
    keys, values, ones, rates, count = tokens(
        p_k, p_v, p_mask, i_b, i_chunk, o_c, m_c, b_w, N, k_b, k_n, v_b, v_n, mask_b, mask_n, G, L
    )
    i = i_b * tl.cdiv(N, G * L) + i_chunk
    store_states(rates, keys, values, ones, count, b_w, p_state + i * 6 * C, o_c, m_c, C, G, BC, L)
    tl.store(p_count + i, tl.sum(tl.sum(count, 0), 0), mask=tl.program_id(0) % tl.cdiv(C, BC) == 0)


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
    top, a, b = empty(1, BC)
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
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_out, N, C, k_b, k_n, v_b, v_n, w_b, u_b,
    mask_b, mask_n, ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """o of each token of a chunk."""
    C, k_b, k_n, v_b, v_n, w_b, u_b = aligned((C, k_b, k_n, v_b, v_n, w_b, u_b), ALIGN)
    # From the end, which the cache still holds.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_chunk, o_c, m_c = program(i, N, C, BC, G * L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)[None, :]
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)[None, :]
    keys, values, ones, rates, count = tokens(
        p_k, p_v, p_mask, i_b, i_chunk, o_c, m_c, b_w, N, k_b, k_n, v_b, v_n, mask_b, mask_n, G, L
    )
    o_g = tl.arange(0, G)
    decay = count * b_w
    p_enter += (i_b * tl.cdiv(N, G * L) + i_chunk) * 6 * C
    means, _, _ = attend(keys, values, ones, rates, decay, b_u, p_enter, o_c, m_c, C, o_g, G, BC, L)
    for t in tl.static_range(L):
        o_n = (i_chunk * G + o_g) * L + t
        _, b_o, _ = means[t]
        p = p_out + i_b * N * C + tile(o_n, o_c, C)
        store(p, b_o, ones[t] > 0, (o_n < N)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=SIZES)
def state_backward(
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_do, p_state, N, C, k_b, k_n, v_b, v_n, w_b, u_b,
    do_b, do_n, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The states that each chunk adds in the backward pass."""
    C, k_b, k_n, v_b = aligned((C, k_b, k_n, v_b), ALIGN)
    v_n, w_b, u_b, do_b, do_n = aligned((v_n, w_b, u_b, do_b, do_n), ALIGN)
    i_b, i_chunk, o_c, m_c = program(tl.program_id(0), N, C, BC, G * L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)[None, :]
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)[None, :]
    keys, values, ones, rates, count = tokens(
        p_k, p_v, p_mask, i_b, i_chunk, o_c, m_c, b_w, N, k_b, k_n, v_b, v_n, mask_b, mask_n, G, L
    )
    o_g = tl.arange(0, G)
    i_state = (i_b * tl.cdiv(N, G * L) + i_chunk) * 6 * C
    means, _, _ = attend(
        keys, values, ones, rates, count * b_w, b_u, p_enter + i_state, o_c, m_c, C, o_g, G, BC, L
    )
    exponents, xs, ys = adjoints(means, ones, p_do, i_b, i_chunk, o_c, m_c, N, do_b, do_n, G, L)
    store_states(rates, exponents, xs, ys, count, b_w, p_state + i_state, o_c, m_c, C, G, BC, L)


@triton.jit(do_not_specialize=SIZES)
def token_backward(
    p_k, p_v, p_mask, p_w, p_u, p_enter, p_do, p_denter, p_dk, p_dv, p_partial, N, C,
    k_b, k_n, v_b, v_n, w_b, u_b, do_b, do_n, mask_b, mask_n,
    ALIGN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """dk and dv of each token of a chunk, and partial sums of dw and du."""
    C, k_b, k_n, v_b = aligned((C, k_b, k_n, v_b), ALIGN)
    v_n, w_b, u_b, do_b, do_n = aligned((v_n, w_b, u_b, do_b, do_n), ALIGN)
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_chunk, o_c, m_c = program(i, N, C, BC, G * L)
    b_w = tl.load(p_w + i_b * w_b + o_c, mask=m_c, other=0.0)[None, :]
    b_u = tl.load(p_u + i_b * u_b + o_c, mask=m_c, other=0.0)[None, :]
    keys, values, ones, rates, count = tokens(
        p_k, p_v, p_mask, i_b, i_chunk, o_c, m_c, b_w, N, k_b, k_n, v_b, v_n, mask_b, mask_n, G, L
    )
    o_g = tl.arange(0, G)
    decay = count * b_w
    i_part = i_b * tl.cdiv(N, G * L) + i_chunk
    p_enter += i_part * 6 * C
    p_denter += i_part * 6 * C
    means, earlier, behind = attend(
        keys, values, ones, rates, decay, b_u, p_enter, o_c, m_c, C, o_g, G, BC, L
    )
    top, a, b = behind
    exponents, xs, ys = adjoints(means, ones, p_do, i_b, i_chunk, o_c, m_c, N, do_b, do_n, G, L)
    d_top, d_a, d_b = enter_walk(
        rates, exponents, xs, ys, decay, p_denter, o_c, m_c, C, o_g, 0, G, BC, L
    )
    d_earlier, _ = walk(d_top, d_a, d_b, rates, exponents, xs, ys, 0, L)
    d_top, d_a, d_b = enter_walk(
        rates, exponents, xs, ys, decay, p_denter, o_c, m_c, C, o_g, 1, G, BC, L
    )
    b_dw = tl.zeros([G, BC], tl.float32)
    b_du = tl.zeros([G, BC], tl.float32)
    for t in tl.static_range(L - 1, -1, -1):
        top_1, a_1, b_1 = earlier[t]
        d_top_1, d_a_1, d_b_1 = d_earlier[t]
        x, y = tl.exp2((keys[t] + d_top_1) * LOG2E), tl.exp2((keys[t] + d_top) * LOG2E)
        z = tl.exp2((keys[t] + exponents[t] + b_u) * LOG2E)
        b_dv = x * d_a_1 + y * d_a + z * xs[t]
        b_dk = values[t] * b_dv - (x * d_b_1 + y * d_b + z * ys[t])
        b_du += z * (values[t] * xs[t] - ys[t])
        # Pairs of tokens on two sides of this one.
        b_pairs = tl.exp2((top_1 + d_top - b_w) * LOG2E) * (a_1 * d_a - b_1 * d_b)
        b_pairs += tl.exp2((top + d_top_1 - b_w) * LOG2E) * (a * d_a_1 - b * d_b_1)
        m = ones[t] > 0
        b_dw -= tl.where(m, b_pairs, 0.0)
        o_n = (i_chunk * G + o_g) * L + t
        o = i_b * N * C + tile(o_n, o_c, C)
        m_inside = (o_n < N)[:, None] & m_c[None, :]
        store(p_dk + o, b_dk, m, m_inside)
        store(p_dv + o, b_dv, m, m_inside)
        d_top, d_a, d_b = decayed_sum(d_top, d_a, d_b, rates[t], exponents[t], xs[t], ys[t])
        top, a, b = decayed_sum(top, a, b, rates[t], keys[t], values[t], ones[t])
    p_partial += i_part * 2 * C + o_c
    tl.store(p_partial, tl.sum(b_dw, 0), mask=m_c)
    tl.store(p_partial + C, tl.sum(b_du, 0), mask=m_c)


def forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, C); in fp32, the states where each chunk begins and ends, (B, chunks, 2, 3, C),
    and the number of tokens of each chunk that count, (B, chunks)."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = _new_states(k)
    count = state.new_empty(state.shape[:2])
    if out.numel() == 0:
        return out, state, count
    w, u = (x.float().contiguous() for x in (w, u))
    tensors: dict[str, Any] = dict(p_k=k, p_v=v, p_mask=mask, p_w=w, p_u=u)
    starter = _starter_of(state_forward, **tensors)
    starter(**tensors, p_state=state, p_count=count)
    enter = _scan(state, count, w)
    starter = _starter_of(out_forward, **tensors)
    starter(**tensors, p_enter=enter, p_out=out)
    return out, enter, count


def backward(
    grad_out: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    enter: Tensor,
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
    enter, count = enter.contiguous(), count.contiguous()
    state = _new_states(k)
    starter = _starter_of(state_backward, **tensors)
    starter(**tensors, p_enter=enter, p_state=state)
    denter = _scan(state, count, p_w)
    partial = state.new_empty((*count.shape, 2, k.shape[2]))
    starter = _starter_of(token_backward, **tensors)
    starter(**tensors, p_enter=enter, p_denter=denter, p_dk=dk, p_dv=dv, p_partial=partial)
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


def _starter_of(
    kernel: Any,
    p_k: Tensor,
    p_v: Tensor,
    p_mask: Tensor | None,
    p_w: Tensor,
    p_u: Tensor,
    p_do: Tensor | None = None,
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
