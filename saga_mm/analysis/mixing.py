"""Takes attention layers apart: KV states, features, and the weights between tokens.

Everything is computed again, in float64, from the input of a layer, which a hook records, so that
the code of the models does not have to support it. One function for each class of attention, which
`explain` finds by the class, tells its formula. A program registers one for a class of its own.

Legend: B batch, H height, W width, N = H * W tokens, C channels, D = C / heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels import apply_rotary_2d
from saga_kernels.defaults import EPS
from saga_kernels.feature_maps import phi

from ..attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    RankAugmentedAttention,
    SoftmaxAttention,
    WKVAttention,
)
from ..attention.base import PackedAttention
from ..layers import rotary_frequencies


@dataclass(frozen=True)
class Mixing:
    """The parts of what an attention layer computes, in float64.

    Attributes:
        mechanism: A short name, such as 'gated'.
        values: (B, heads, N, D): v, times its gate if there is one. In WKV, each channel is a head.
        row: A function that returns the row of the attention matrix for the index of a token,
            (B, heads, N). The row times `values` is the output of the token. Its sum is 1, apart
            from the small number in the denominator. With rotary encoding in linear attention,
            the sum may differ and weights may be negative.
        states: KV states (B, heads, D, D). 'state' is the one that all queries read; the others
            are computed from the same q, k and v without a part of the mechanism. Empty for
            softmax, which has no state, and for decay and WKV, which have one for each token.
        gates: The gates on k and v, (B, heads, N, D) each; empty if there are none.
        features: (B, N, C), which `take_apart` adds. 'output' is the output of attention before
            LePE and the output projection; 'gated output', if there is an output gate, is that
            times the gate.
    """

    mechanism: str
    values: Tensor
    row: Callable[[int], Tensor]
    states: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)


def attention_layers(model: nn.Module) -> dict[str, PackedAttention]:
    """The attention modules of a model by name, in order; ValueError if there are none."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedAttention)}
    if not layers:
        raise ValueError(f'{type(model).__name__} has no attention of saga_mm')
    return layers


def label(layer: str) -> str:
    """Short name of an attention layer, STAGE.BLOCK, both from 0: '2.5' of the module
    stages.2.blocks.5.attn."""
    _, stage, _, block, _ = layer.split('.')
    return f'{stage}.{block}'


def record_inputs(model: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    """Call a model without gradients; return the input of each attention module, (B, H, W, C)."""
    inputs = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in attention_layers(model).items():

            def keep(module: nn.Module, args: tuple, name: str = name) -> None:
                inputs[name] = args[0]

            stack.callback(module.register_forward_pre_hook(keep).remove)
        model(*args)
    return inputs


@torch.no_grad()
def take_apart(module: PackedAttention, x: Tensor) -> Mixing:
    """Compute the parts of what an attention module does to maps (B, H, W, C).

    Raises:
        ValueError: No function is registered for its class, or what that function returns is not
            what the module computes.
    """
    _, height, width, dim = x.shape
    size = height, width
    module = copy.deepcopy(module).double()
    # (B, N, parts * C)
    projected = module.project(x.double(), None).flatten(1, 2)
    gate = None
    if isinstance(module, RankAugmentedAttention):
        projected, gate = projected.split((3 * dim, dim), dim=-1)
    elif isinstance(module, WKVAttention):
        gate = projected[..., :dim].sigmoid()
    elif module.output_gate is not None:
        gate = module.output_gate(x.double()).flatten(1, 2)
    packed = projected.unflatten(-1, (-1, module.num_heads, module.head_dim))
    mixing = explain(module, packed, size)
    output = module.attend(packed, size, None).flatten(2)
    if output.numel():
        first = (mixing.row(0).unsqueeze(-1) * mixing.values).sum(2).flatten(1)
        if not torch.allclose(first, output[:, 0], rtol=1e-4, atol=1e-8):
            raise ValueError(
                f'{type(module).__name__} can not be analysed: the row of the first token times '
                f'the values of {mixing.mechanism!r} is not its output'
            )
    features = {'output': output}
    if gate is not None:
        features['gated output'] = output * gate
    return replace(mixing, features=features)


@singledispatch
def explain(module: PackedAttention, packed: Tensor, size: tuple[int, int]) -> Mixing:
    """Tell what `module.attend(packed, size)` computes.

    Register a function for a class by `@explain.register`. Subclasses share it, unless they have
    one of their own. It need not be fast, and leaves `features` out.

    Args:
        module: In float64.
        packed: The output of its projection, (B, N, parts, heads, D) in float64.
        size: (H, W).

    Raises:
        ValueError: No function is registered for the class.
    """
    raise ValueError(
        f'{type(module).__name__} can not be analysed: register a function for it by '
        'saga_mm.analysis.explain.register'
    )


@explain.register
def _gated(module: GatedLinearAttention, packed: Tensor, size: tuple[int, int]) -> Mixing:
    query, key, v, *logits = _per_head(packed)
    q, k = phi(query, module.feature_map), phi(key, module.feature_map)
    gates = {name: logit.sigmoid() for name, logit in zip('kv', logits, strict=False)}
    states = {'state': _state(k, v)}
    if gates:
        k, v = k * gates['k'], v * gates['v']
        states = {'state': _state(k, v), 'state without gates': states['state']}

    def row(token: int) -> Tensor:
        return _normalized(_products(q, k, token))

    return Mixing('gated' if gates else 'plain', v, row, states, gates)


@explain.register
def _rank_augmented(
    module: RankAugmentedAttention, packed: Tensor, size: tuple[int, int]
) -> Mixing:
    frequencies = rotary_frequencies(module.head_dim, packed.device)
    if module.mixer == 'softmax':
        turned = apply_rotary_2d(packed[:, :, :2], size, frequencies)
        return _softmax(module, torch.cat([turned, packed[:, :, 2:]], 2), size)
    # (B, N, 2, heads, D)
    features = phi(packed[:, :, :2], 'elu')
    value = packed[:, :, 2].transpose(1, 2)
    turned = apply_rotary_2d(features, size, frequencies)
    (q, k), (turned_q, turned_k) = _per_head(features), _per_head(turned)
    # (B, heads, N, 1), of sum 1
    weights = (k @ q.mean(2).unsqueeze(-1) * q.shape[-1] ** -0.5).softmax(2)
    states = {
        'state': _state(turned_k * weights, value),
        'state without weights': _state(turned_k, value),
        'state without weights and rotation': _state(k, value),
    }

    def row(token: int) -> Tensor:
        # only the numerator is rotated
        total = _products(q, k * weights, token).sum(-1, keepdim=True)
        return _products(turned_q, turned_k * weights, token) / (total + module.eps)

    return Mixing('rank_augmented', value, row, states)


@explain.register
def _decay(module: DecayLinearAttention, packed: Tensor, size: tuple[int, int]) -> Mixing:
    query, key, value = _per_head(packed)
    q, k = phi(query, module.feature_map), phi(key, module.feature_map)
    height, width = size
    here = torch.arange(height * width, device=packed.device)
    # position of each token in the scan of each head, (heads, N)
    by_column = here % width * height + here // width
    rows = module.num_heads - module.num_heads // 2
    place = torch.stack([here] * rows + [by_column] * (module.num_heads - rows))
    log_decay = F.logsigmoid(module.decay_logit.double())

    def row(token: int) -> Tensor:
        distance = (place - place[:, token, None]).abs()
        return _normalized(_products(q, k, token) * (log_decay[:, None] * distance).exp())

    return Mixing('decay', value, row)


@explain.register
def _wkv(module: WKVAttention, packed: Tensor, size: tuple[int, int]) -> Mixing:
    # (B, C, N) and (B, C, N, 1)
    _, key, value = _per_head(packed)
    key = key.squeeze(3)
    tokens = key.shape[2]
    scale = tokens if module.decay_per == 'image' else 1
    decay, bonus = (x[:, None] / scale for x in (module.log_decay.exp(), module.bonus))
    here = torch.arange(tokens, device=packed.device)

    def row(token: int) -> Tensor:
        distance = (here - token).abs()
        return (key + torch.where(distance == 0, bonus, (1 - distance) * decay)).softmax(-1)

    return Mixing('wkv', value, row)


@explain.register(SoftmaxAttention)
def _softmax(module: PackedAttention, packed: Tensor, size: tuple[int, int]) -> Mixing:
    q, k, v = _per_head(packed)

    def row(token: int) -> Tensor:
        return (_products(q, k, token) * q.shape[-1] ** -0.5).softmax(-1)

    return Mixing('softmax', v, row)


def _per_head(packed: Tensor) -> tuple[Tensor, ...]:
    """(B, N, parts, heads, D) -> parts of (B, heads, N, D)."""
    return packed.transpose(1, 3).unbind(2)


def _state(key: Tensor, value: Tensor) -> Tensor:
    """(B, heads, D, D)."""
    return key.transpose(-1, -2) @ value


def _products(query: Tensor, key: Tensor, token: int) -> Tensor:
    """Scores of the query of one token with all keys, (B, heads, N)."""
    return (key @ query[:, :, token, :, None]).squeeze(-1)


def _normalized(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + EPS)
