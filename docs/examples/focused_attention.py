"""Focused linear attention as a mechanism of one's own, in one file outside the package.

Put the file where Python finds it, and name it in a config:

    custom_imports = dict(imports=['saga_mm', 'focused_attention'], allow_failed_imports=False)
    model = dict(backbone=dict(type='saga_mm.SAGA', attention='focused'))

`saga_mm.SoLAVision` takes it by `linear='focused'`. Source: FLatten Transformer, arXiv 2308.00442,
whose feature map sharpens the direction of queries and keys and keeps their norm. The depthwise
convolution of the values that it adds is the one that all mechanisms have (`lepe_kernel_size`).
"""

import torch.nn.functional as F
from torch import Tensor

from saga_kernels import kv_state, read_state
from saga_mm.analysis import Mixing, explain
from saga_mm.attention import PackedAttention, register_attention


@register_attention('focused')
class FocusedLinearAttention(PackedAttention):
    """Linear attention with the focused feature map, f(x) = |r| r^p / |r^p| for r = ReLU(x) + 1e-6.

    Args:
        dim: Number of channels, a multiple of `num_heads`.
        num_heads: Number of heads.
        power: p, at least 1. Defaults to 3.
        lepe_kernel_size: As in `PackedAttention`. Defaults to 3.
        feature_map: Must be what the backbones pass, and has no effect: the mechanism has its own.
        impl: 'auto' or 'reference', because there is no Triton kernel.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        power: float = 3,
        lepe_kernel_size: int = 3,
        feature_map: str = 'elu',
        impl: str = 'auto',
    ) -> None:
        super().__init__(dim, num_heads, parts=3, lepe_kernel_size=lepe_kernel_size)
        if impl not in ('auto', 'reference'):
            raise ValueError(f"impl must be 'auto' or 'reference', got {impl!r}")
        self.power = power

    def focus(self, x: Tensor) -> Tensor:
        x = F.relu(x) + 1e-6
        sharp = x**self.power
        return sharp * (x.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        query, key, value = packed.unbind(2)
        # ReLU leaves the focused features as they are
        state = kv_state(self.focus(key), value, feature_map='relu', mask=mask)
        return read_state(self.focus(query), state, feature_map='relu', mask=mask)


@explain.register
def explain_focused(
    module: FocusedLinearAttention, packed: Tensor, size: tuple[int, int]
) -> Mixing:
    """For the ranks and maps of `tools/analyze_attention.py`; not needed for training."""
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    q, k = module.focus(query), module.focus(key)

    def row(token: int) -> Tensor:
        weights = (k @ q[:, :, token, :, None]).squeeze(-1)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6)

    return Mixing('focused', value, row, states={'state': k.transpose(2, 3) @ value})
