"""Checks shared by every op: one line that names the argument, what was expected and what came.

While `torch.jit.trace` records, shapes are tensors, and comparing them would fix their values in
the trace: then only what does not depend on a shape is checked.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .tracing import is_tracing_or_compiling

IMPLS = ('auto', 'reference', 'triton')
OPS = (
    'gated_linear_attention',
    'linear_attention',
    'rank_augmented_linear_attention',
    'decay_linear_attention',
    'bidirectional_wkv',
    'depthwise_conv2d',
    'layer_norm',
    'ffn',
    'gated_attention',
)
FEATURE_MAPS = ('elu', 'relu')
DecayPer = Literal['image', 'token']
DECAY_PER: tuple[DecayPer, ...] = get_args(DecayPer)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packed(name: str, x: Tensor | Sequence[Tensor], parts: int) -> Tensor:
    """Check a packed projection (B, N, parts, H, D), or its parts (B, N, H, D), and return it."""
    if isinstance(x, list | tuple):
        x = _pack(name, x, parts)
    if not isinstance(x, Tensor):
        raise TypeError(
            f'{name} must be a tensor, or {parts} tensors (B, N, H, D), got {type(x).__name__}'
        )
    if x.dtype not in DTYPES:
        raise ValueError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
    if torch.jit.is_tracing():
        return x
    if x.ndim != 5 or x.shape[2] != parts:
        raise ValueError(f'{name} must have shape (B, N, {parts}, H, D), got {tuple(x.shape)}')
    if x.shape[3] == 0 or x.shape[4] == 0:
        raise ValueError(f'{name} must have at least one head and channel, got {tuple(x.shape)}')
    return x


def _pack(name: str, x: Sequence[Tensor], parts: int) -> Tensor:
    kinds = [
        f'{tuple(part.shape)} {part.dtype} {part.device}'
        if isinstance(part, Tensor)
        else type(part).__name__
        for part in x
    ]
    alike = torch.jit.is_tracing() or len(set(kinds)) == 1
    if len(x) != parts or not alike or not isinstance(x[0], Tensor) or x[0].ndim != 4:
        raise ValueError(
            f'{name} must be {parts} tensors (B, N, H, D) of one shape, dtype and device, got '
            f'{", ".join(kinds)}'
        )
    return torch.stack(tuple(x), 2)


def check_feature_map(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f'feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}')


def check_impl(impl: str, name: str = 'impl') -> None:
    if impl not in IMPLS:
        raise ValueError(f'{name} must be one of {IMPLS}, got {impl!r}')


def check_impls(impls: str, name: str) -> dict[str, str]:
    """Check implementations by op, such as 'layer_norm=reference,linear_attention=auto'."""
    chosen = {}
    for part in impls.split(','):
        op, _, impl = (word.strip() for word in part.partition('='))
        if op not in OPS:
            raise ValueError(f'{name} must name ops of {OPS}, as OP=IMPL,OP=IMPL, got {part!r}')
        check_impl(impl, name)
        chosen[op] = impl
    return chosen


def check_eps(eps: float) -> float:
    """Check what is added to denominators; returns it as a Python float."""
    if not isinstance(eps, float | numbers.Real) or not 0 < eps < math.inf:
        raise ValueError(f'eps must be a positive number, got {eps!r}')
    if eps <= 2.0**-150:
        raise ValueError(f'eps must be at least 1.4e-45, the smallest float32, got {eps!r}')
    return float(eps)


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    """Check a token mask (B, N) against the packed projection it belongs to."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f'mask must be a bool tensor, got {got}')
    if mask.device != x.device:
        raise ValueError(f'mask must be on {x.device}, got {mask.device}')
    if not torch.jit.is_tracing() and mask.shape != x.shape[:2]:
        expected = tuple(x.shape[:2])
        raise ValueError(f'mask must have shape (B, N) = {expected}, got {tuple(mask.shape)}')


def check_size(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Check the (height, width) of an image of that many tokens; returns it."""
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f'size must be (height, width), got {size!r}') from None
    if torch.jit.is_tracing():
        return height, width
    try:
        # A symbol stays one. Other integers, such as those of numpy, become Python's.
        height, width = (
            length if isinstance(length, int | torch.SymInt) else operator.index(length)
            for length in (height, width)
        )
    except TypeError:
        raise ValueError(f'size must be two integers, got {size!r}') from None
    if height < 0 or height * width != tokens:
        raise ValueError(f'size must hold N = {tokens} tokens, got {height} x {width}')
    return height, width


def check_frequencies(frequencies: Tensor, x: Tensor) -> None:
    """Check the frequencies (D / 4,) of a rotation against the packed projection."""
    if not isinstance(frequencies, Tensor) or frequencies.dtype not in DTYPES:
        got = getattr(frequencies, 'dtype', type(frequencies).__name__)
        raise ValueError(f'frequencies must be a floating-point tensor, got {got}')
    if frequencies.device != x.device:
        raise ValueError(f'frequencies must be on {x.device}, got {frequencies.device}')
    if frequencies.requires_grad:
        raise ValueError('frequencies get no gradient, but require one: detach them')
    if torch.jit.is_tracing():
        return
    dim = x.shape[-1]
    if dim % 4:
        raise ValueError(f'the head dim must be divisible by 4 to be rotated, got {dim}')
    if frequencies.shape != (dim // 4,):
        got = tuple(frequencies.shape)
        raise ValueError(f'frequencies must have shape (D / 4,) = ({dim // 4},), got {got}')


def check_log_decay(log_decay: Tensor, x: Tensor) -> None:
    """Check the decay per head (H,) against the packed projection it belongs to."""
    if not isinstance(log_decay, Tensor) or log_decay.dtype not in DTYPES:
        got = getattr(log_decay, 'dtype', type(log_decay).__name__)
        raise ValueError(f'log_decay must be a tensor of floats, got {got}')
    if log_decay.device != x.device:
        raise ValueError(f'log_decay must be on {x.device}, got {log_decay.device}')
    if not torch.jit.is_tracing() and log_decay.shape != x.shape[3:4]:
        expected = tuple(x.shape[3:4])
        raise ValueError(
            f'log_decay must have shape (H,) = {expected}, got {tuple(log_decay.shape)}'
        )


def check_tokens(name: str, x: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """Check tokens (B, N, C), and that they have the shape, dtype and device of another argument.

    Args:
        name: Of the argument.
        x: The argument.
        like: Name and value of the other argument.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(x).__name__}')
    if x.dtype not in DTYPES:
        raise ValueError(f'{name} must be float16, bfloat16, float32 or float64, got {x.dtype}')
    if not torch.jit.is_tracing() and (x.ndim != 3 or x.shape[2] == 0):
        raise ValueError(f'{name} must have shape (B, N, C), C > 0, got {tuple(x.shape)}')
    if like is None:
        return
    other, y = like
    if x.dtype != y.dtype:
        raise ValueError(f'{name} must have the dtype of {other}, {y.dtype}, got {x.dtype}')
    if x.device != y.device:
        raise ValueError(f'{name} must be on {y.device} as {other} is, got {x.device}')
    if not torch.jit.is_tracing() and x.shape != y.shape:
        expected = tuple(y.shape)
        raise ValueError(f'{name} must have the shape of {other}, {expected}, got {tuple(x.shape)}')


def check_channels(name: str, x: Tensor, tokens: Tensor) -> None:
    """Check one number per channel, (C,), against the tokens (B, N, C) it belongs to."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = getattr(x, 'dtype', type(x).__name__)
        raise ValueError(f'{name} must be a tensor of floats, got {got}')
    if x.device != tokens.device:
        raise ValueError(f'{name} must be on {tokens.device}, got {x.device}')
    if not torch.jit.is_tracing() and x.shape != tokens.shape[2:]:
        expected = tuple(tokens.shape[2:])
        raise ValueError(f'{name} must have shape (C,) = {expected}, got {tuple(x.shape)}')


def check_decay(w: Tensor, tokens: Tensor) -> None:
    """Check the decay per channel (C,) of `bidirectional_wkv` against its tokens (B, N, C).

    Values are looked at only where that costs nothing: on a CPU, by code that is not recorded.
    """
    check_channels('w', w, tokens)
    if is_tracing_or_compiling() or not has_values(w):
        return
    if bool((w < 0).any()):
        raise ValueError(f'w must not be negative, got {w.min().item()}')


def has_values(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at, and that costs next to nothing.

    It would make a GPU wait. Tensors under a transform of `torch.func`, and those of other types,
    such as fake ones, need not have values.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(x)
    return plain and x.device.type == 'cpu'


def check_decay_per(decay_per: str) -> None:
    if decay_per not in DECAY_PER:
        raise ValueError(f'decay_per must be one of {DECAY_PER}, got {decay_per!r}')


def _check_layer(*, x: Tensor, weight: Tensor, **others: Tensor) -> None:
    """Check types, dtypes and devices of a layer's tensors; a bias must match the weight."""
    _check_tensors(x, dict(x=x, weight=weight, **others))
    if 'bias' in others and others['bias'].dtype != weight.dtype:
        expected = f'the dtype of weight, {weight.dtype}'
        raise ValueError(f'bias must have {expected}, got {others["bias"].dtype}')


def _check_tensors(x: Tensor, tensors: dict[str, Tensor]) -> None:
    """Check types, dtypes and devices of a layer's tensors, by name."""
    for name, y in tensors.items():
        if not isinstance(y, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(y).__name__}')
        if y.dtype not in DTYPES:
            raise ValueError(f'{name} must be float16, bfloat16, float32 or float64, got {y.dtype}')
        if y.device != x.device:
            raise ValueError(f'{name} must be on {x.device} as x is, got {y.device}')


def check_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor | None
) -> None:
    """Check the arguments of `depthwise_conv2d` against each other."""
    optional = {name: y for name, y in dict(bias=bias, add=add).items() if y is not None}
    _check_layer(x=x, weight=weight, **optional)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise ValueError(f'mask must be a bool tensor, got {getattr(mask, "dtype", mask)}')
    if torch.jit.is_tracing():
        return
    if x.ndim != 4 or x.shape[3] == 0:
        raise ValueError(f'x must have shape (B, H, W, C), C > 0, got {tuple(x.shape)}')
    channels, side = x.shape[3], weight.shape[-1] if weight.ndim else 0
    if weight.shape != (channels, 1, side, side) or side % 2 != 1:
        expected = f'(C, 1, K, K) with C = {channels} and an odd K'
        raise ValueError(f'weight must have shape {expected}, got {tuple(weight.shape)}')
    shapes = dict(bias=(bias, (channels,)), add=(add, x.shape), mask=(mask, (*x.shape[:3], 1)))
    for name, (value, shape) in shapes.items():
        if value is not None and value.shape != shape:
            raise ValueError(f'{name} must have shape {tuple(shape)}, got {tuple(value.shape)}')


def check_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> None:
    """Check the arguments of `layer_norm` against each other."""
    _check_layer(x=x, weight=weight, bias=bias)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype must be a floating-point dtype, got {dtype}')
    if torch.jit.is_tracing():
        return
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f'x must have shape (..., C), C > 0, got {tuple(x.shape)}')
    for name, y in dict(weight=weight, bias=bias).items():
        if y.shape != x.shape[-1:]:
            raise ValueError(f'{name} must have shape {tuple(x.shape[-1:])}, got {tuple(y.shape)}')


def check_ffn(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    gamma: Tensor | None,
) -> None:
    """Check the arguments of `ffn` against each other."""
    tensors = _check_pairs(x, gamma, norm=norm, fc1=fc1, fc2=fc2)
    if torch.jit.is_tracing():
        return
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f'x must have shape (..., C), C > 0, got {tuple(x.shape)}')
    channels, hidden = x.shape[-1], fc1[0].shape[0] if fc1[0].ndim else 0
    shapes = {
        'norm[0]': (channels,), 'norm[1]': (channels,), 'fc1[0]': (hidden, channels),
        'fc1[1]': (hidden,), 'fc2[0]': (channels, hidden), 'fc2[1]': (channels,),
        'gamma': (channels,),
    }  # fmt: skip
    _check_shapes(tensors, shapes)


def check_gated_attention(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    in_proj: tuple[Tensor, Tensor],
    proj: tuple[Tensor, Tensor],
    num_heads: int,
    lepe: tuple[Tensor, Tensor] | None,
    output_gate: tuple[Tensor, Tensor] | None,
    gamma: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Check the arguments of `gated_attention` against each other."""
    pairs = dict(norm=norm, in_proj=in_proj, proj=proj)
    optional = dict(lepe=lepe, output_gate=output_gate)
    pairs |= {name: pair for name, pair in optional.items() if pair is not None}
    tensors = _check_pairs(x, gamma, **pairs)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise ValueError(f'mask must be a bool tensor, got {getattr(mask, "dtype", mask)}')
    if mask is not None and mask.device != x.device:
        raise ValueError(f'mask must be on {x.device} as x is, got {mask.device}')
    if torch.jit.is_tracing():
        return
    if x.ndim != 4 or x.shape[3] == 0:
        raise ValueError(f'x must have shape (B, H, W, C), C > 0, got {tuple(x.shape)}')
    channels = x.shape[3]
    if not isinstance(num_heads, int) or num_heads < 1 or channels % num_heads:
        raise ValueError(f'num_heads must divide the channels, {channels}, got {num_heads!r}')
    parts = 3 if len(in_proj[1].shape) == 1 and in_proj[1].shape[0] == 3 * channels else 5
    side = 1 if lepe is None or lepe[0].ndim == 0 else lepe[0].shape[-1]
    if side % 2 != 1:
        raise ValueError(f'lepe[0] must have shape (C, 1, K, K) with an odd K, got K = {side}')
    shapes = {
        'norm[0]': (channels,), 'norm[1]': (channels,),
        'in_proj[0]': (parts * channels, channels), 'in_proj[1]': (parts * channels,),
        'proj[0]': (channels, channels), 'proj[1]': (channels,),
        'lepe[0]': (channels, 1, side, side), 'lepe[1]': (channels,),
        'output_gate[0]': (channels, channels), 'output_gate[1]': (channels,),
        'gamma': (channels,),
    }  # fmt: skip
    _check_shapes(tensors, shapes)
    if mask is not None and mask.shape != (*x.shape[:3], 1):
        expected = (*x.shape[:3], 1)
        raise ValueError(f'mask must have shape {expected}, got {tuple(mask.shape)}')


def _check_pairs(
    x: Tensor, gamma: Tensor | None, **pairs: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Check types, dtypes and devices of x, of weights and biases, and of a layer scale; returns
    the tensors by name."""
    tensors = dict(x=x)
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f'{name} must be a weight and a bias, got {type(pair).__name__}')
        tensors |= {f'{name}[{i}]': y for i, y in enumerate(pair)}
    if gamma is not None:
        tensors['gamma'] = gamma
    _check_tensors(x, tensors)
    return tensors


def _check_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Check the shapes of all tensors but x."""
    for name, y in tensors.items():
        if name != 'x' and y.shape != shapes[name]:
            raise ValueError(f'{name} must have shape {shapes[name]}, got {tuple(y.shape)}')
