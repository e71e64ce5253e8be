"""Device functions that the kernels share: ranges of tokens, tiles, feature maps and states.

Legend: N tokens, H heads, D head dim; i_ program ids, o_ offsets, m_ masks, p_ pointers, b_ blocks.

A state is a (D + 1, D) block of fp32: D rows of S, then z.

Triton would compile a kernel anew for a size or stride that is 1 or a multiple of 16, and so for
some image sizes and masks. `SIZES` keep it from that. What it then does not know of the strides,
`aligned` tells it.
"""

import triton
import triton.language as tl

# The arguments of the kernels that are no pointers and no options of the compiler.
SIZES = (
    'N', 'H', 'SPAN', 'HEIGHT', 'WIDTH', 'C', 'CHUNKS', 'SPLITS', 'x_b', 'x_n', 'x_p', 'x_h', 'k_b',
    'k_n', 'v_b', 'v_n', 'w_b', 'u_b', 'do_b', 'do_n', 'do_h', 'mask_b', 'mask_n',
    'x_r', 'x_w', 'add_b', 'add_r', 'add_w', 'do_r', 'do_w', 'mask_r', 'mask_w', 'F',
)  # fmt: skip


@triton.jit
def program_range(N, H, SPAN):
    """Image, head, partial result and range of tokens of this program."""
    # Heads run fastest: programs of one token range share cache lines of the packed projection.
    i = tl.program_id(0)
    splits = tl.cdiv(N, SPAN)
    i_h, i_s, i_b = i % H, i // H % splits, i // (H * splits)
    begin = i_s * SPAN
    # Partial states are ordered (B, H, splits).
    i_partial = (i_b * H + i_h).to(tl.int64) * splits + i_s
    return i_b.to(tl.int64), i_h.to(tl.int64), i_partial, begin, tl.minimum(begin + SPAN, N)


@triton.jit
def aligned(sizes, ALIGN: tl.constexpr):
    """The same sizes, which the compiler now knows to be multiples of ALIGN.

    Otherwise it would load the channels of a token one by one.
    """
    known = ()
    for i in tl.static_range(len(sizes)):
        known = known + (sizes[i] // ALIGN * ALIGN,)  # type: ignore[assignment]
    return known


@triton.jit
def live(o_n, end, p_mask, i_b, mask_b, mask_n):
    """Which tokens take part: those inside the range that are not masked."""
    m_n = o_n < end
    if p_mask is not None:
        p = p_mask + i_b * mask_b + o_n.to(tl.int64) * mask_n
        b_m = tl.load(p, mask=m_n, other=0).to(tl.int32)
        # The maximum of one number: Triton sets out the operands of a matrix product by the
        # narrowest load that it finds behind them, and looks no further than a reduction.
        m_n &= tl.max(b_m[:, None], 1) > 0
    return m_n[:, None]


@triton.jit
def tile(o_n, o_d, stride):
    """Offsets of a tile: channels o_d of tokens o_n."""
    return o_n.to(tl.int64)[:, None] * stride + o_d[None, :]


@triton.jit
def load(p, m):
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def store(p, x, p_mask, m_live, m_inside):
    """Write a tile; masked tokens get zeros, so that every element inside is written."""
    # Without a mask, all tokens inside are live.
    if p_mask is not None:
        x = tl.where(m_live, x, 0.0)
    tl.store(p, x.to(p.dtype.element_ty), mask=m_inside)


@triton.jit
def exp(x):
    """e^x in two instructions; tl.exp takes five, to keep results that are denormal."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    """The logistic function; a division would take more instructions than all the rest."""
    r = tl.rsqrt(1.0 + exp(-x))
    return r * r


@triton.jit
def phi(x, ELU: tl.constexpr):
    """ELU(x) + 1 or ReLU(x). NaN stays NaN, which tl.maximum and tl.minimum would not keep."""
    if ELU:
        return tl.where(x > 0, x + 1.0, exp(tl.where(x > 0, 0.0, x)))
    else:
        return tl.where(x < 0, 0.0, x)


@triton.jit
def slope(scale, y, ELU: tl.constexpr):
    """Derivative of y = scale * phi(x) with scale >= 0, without x, which would take registers.

    ELU(x) + 1 is greater than 1 where x > 0, and its own derivative elsewhere.
    """
    if ELU:
        return tl.where(y > scale, scale, y)
    else:
        return tl.where(y <= 0, 0.0, scale)


@triton.jit
def safe_div(x, z):
    """x / z, and x where z is zero: every k' of that channel is zero then, and so is x."""
    return x / tl.where(z == 0, 1.0, z)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a b; in fp16, the rows of a are divided by their largest element meanwhile, as small numbers
    would lose digits."""
    if b.dtype == tl.float16:
        b_max = tl.max(tl.abs(a), 1)[:, None]
        b_max = tl.where(b_max > 2.0**-120, b_max, 1.0)
        return tl.dot((a * (1.0 / b_max)).to(tl.float16), b) * b_max
    else:
        return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def load_state(p, o_d, D: tl.constexpr):
    """S and z of the state at a pointer."""
    m_d = o_d < D
    b_s = tl.load(p + o_d[:, None] * D + o_d[None, :], m_d[:, None] & m_d[None, :], other=0.0)
    return b_s, tl.load(p + D * D + o_d, m_d, other=0.0)


@triton.jit
def store_state(p, b_s, b_z, o_d, D: tl.constexpr):
    """Write S and z to the state at a pointer."""
    m_d = o_d < D
    tl.store(p + o_d[:, None] * D + o_d[None, :], b_s, m_d[:, None] & m_d[None, :])
    tl.store(p + D * D + o_d, b_z, m_d)
