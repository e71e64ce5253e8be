"""The first half of a transformer block, for inference: x plus linear attention of its norm."""

import torch
from torch import Tensor

from ..defaults import EPS, FEATURE_MAP
from ..dispatch import TRITON_DTYPES, Impl, resolve_impl, why_not_triton
from ..launch import ATTENTION_CHANNELS, ATTENTION_HEAD_DIM, DEPTHWISE_COLUMNS
from ..precision import autocast_dtype
from ..validation import check_eps, check_feature_map, check_gated_attention
from .reference import attention
from .registration import gated_attention_forward

Layer = tuple[Tensor, Tensor]


def gated_attention(
    x: Tensor,
    norm: Layer,
    in_proj: Layer,
    proj: Layer,
    *,
    num_heads: int,
    lepe: Layer | None = None,
    output_gate: Layer | None = None,
    gamma: Tensor | None = None,
    mask: Tensor | None = None,
    feature_map: str = FEATURE_MAP,
    eps: float = EPS,
    norm_eps: float = 1e-6,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Linear attention, gated or not, with its norm, projections and residual:
    :math:`x + \gamma \, (W_o \, ((\mathrm{attend}(h) + \mathrm{LePE}(v)) \odot
    (W_g h + b_g)) + b_o)` with :math:`h = \mathrm{norm}(x)`.

    `attend` is `gated_linear_attention` or `linear_attention` of q, k, v and the gate logits, which
    are a linear function of h. The kernels keep all of these but v on the chip: they read x and v
    twice at most and write v and the result, where PyTorch writes and reads the norm, the packed
    projection and what follows. They have no backward pass, so that they are for inference.

    Args:
        x: (B, H, W, C).
        norm: Weight and bias of a layer norm over the channels, (C,) each.
        in_proj: Weight (5 C, C) and bias (5 C,) of the linear layer of q, k, v and the two gate
            logits, in this order; or (3 C, C) and (3 C,), without gates.
        proj: Weight (C, C) and bias (C,) of the output projection.
        num_heads: A divisor of C. A head has D = C / num_heads channels.
        lepe: Weight (C, 1, K, K) with an odd K and bias (C,) of the depthwise convolution of v;
            None for none.
        output_gate: Weight (C, C) and bias (C,) of the output gate; None for none.
        gamma: Layer scale (C,); None for none.
        mask: (B, H, W, 1) bool. False tokens do not influence others.
        feature_map: `'elu'` for ELU(x) + 1 or `'relu'`.
        eps: Added to the denominators of the attention.
        norm_eps: Added to the variance.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. The kernels take
            up to 128 channels in half precision and 32 in float32, head dims from 8 to 64, K up to
            5, and nothing that needs a gradient.

    Returns:
        (B, H, W, C), contiguous, in the widest of the dtypes of x, `gamma` and the linear layers.
        Under autocast, these compute in its dtype. The kernels compute all else in float32.
        Parameters have the dtype of x; the kernels, and autocast, take others.

    Raises:
        ValueError: Wrong shape, dtype, device, feature map or eps.
        RuntimeError: `impl='triton'` where the kernels can't run.
    """
    check_gated_attention(x, norm, in_proj, proj, num_heads, lepe, output_gate, gamma, mask)
    check_feature_map(feature_map)
    eps = check_eps(eps)
    why = why_not_kernel(x, norm, in_proj, proj, num_heads, lepe, output_gate, gamma)
    options = gamma, mask, feature_map, eps, norm_eps
    if resolve_impl(impl, 'gated_attention', why) == 'reference':
        return attention(x, norm, in_proj, proj, num_heads, lepe, output_gate, *options)
    dtype = autocast_dtype(x) or x.dtype
    (in_weight, in_bias), (out_weight, out_bias) = in_proj, proj
    lepe_weight, lepe_bias = lepe or (None, None)
    gate_weight, gate_bias = output_gate or (None, None)
    return gated_attention_forward(
        x, *norm, in_weight.to(dtype), in_bias, out_weight.to(dtype), out_bias, num_heads,
        lepe_weight, lepe_bias, None if gate_weight is None else gate_weight.to(dtype), gate_bias,
        *options,
    )  # fmt: skip


def why_not_kernel(
    x: Tensor,
    norm: Layer,
    in_proj: Layer,
    proj: Layer,
    num_heads: int,
    lepe: Layer | None,
    output_gate: Layer | None,
    gamma: Tensor | None,
) -> str | None:
    """Why the Triton kernels can't take these arguments of `gated_attention`, or None."""
    if torch.jit.is_tracing():
        return 'torch.jit.trace records PyTorch alone'
    layers = norm, in_proj, proj, lepe or (), output_gate or ()
    others = [*(y for layer in layers for y in layer), *([] if gamma is None else [gamma])]
    if why := why_not_triton(x, *others):
        return why
    dtype = autocast_dtype(x) or x.dtype
    for kind in (dtype, *(y.dtype for y in others)):
        if kind not in TRITON_DTYPES:
            return f'it takes float16, bfloat16 and float32, not {kind}'
    most, dim = ATTENTION_CHANNELS[dtype.itemsize], x.shape[-1] // num_heads
    if x.shape[-1] > most:
        return f'it takes up to {most} channels in {dtype}, not {x.shape[-1]}'
    if not 8 <= dim <= ATTENTION_HEAD_DIM:
        return f'it takes head dims 8 to {ATTENTION_HEAD_DIM}, not {dim}'
    side = 1 if lepe is None else lepe[0].shape[-1]
    if side not in DEPTHWISE_COLUMNS:
        return f'it takes filters of up to {max(DEPTHWISE_COLUMNS)} pixels a side, not {side}'
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others)):
        return 'it has no backward pass, and something needs a gradient'
    return None
