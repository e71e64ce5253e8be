"""Layer norm over channels. Legend: C channels."""

import torch
from torch import Tensor, nn

from saga_kernels import layer_norm
from saga_kernels.dispatch import Impl
from saga_kernels.precision import autocast_dtype


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, by a kernel of this project on a GPU: (..., C) -> the same shape.

    Attributes:
        before_linear: Under autocast, write the dtype that linear layers and convolutions read in
            place of float32, which each of them would have to convert. False unless it is set.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. 'auto' unless it
            is set.
    """

    before_linear = False
    impl: Impl = 'auto'

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None or len(self.normalized_shape) != 1:
            return super().forward(x)
        # Autocast leaves float64 as it is.
        dtype = autocast_dtype(x) if self.before_linear and x.dtype != torch.float64 else None
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype, impl=self.impl)


def with_kernel(norm: nn.Module) -> nn.Module:
    """The same norm; a `torch.nn.LayerNorm` becomes a `LayerNorm` with the same parameters."""
    if type(norm) is nn.LayerNorm:
        norm.__class__ = LayerNorm
    return norm


def before_linear(norm: nn.Module) -> None:
    """Tell a norm, if it is a `LayerNorm`, that only linear layers and convolutions read it."""
    if isinstance(norm, LayerNorm):
        norm.before_linear = True
