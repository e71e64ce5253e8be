"""Depthwise convolution of maps as PyTorch runs it: the specification, and what CPUs and exports
use."""

import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`depthwise_conv2d` in plain PyTorch."""
    if mask is not None:
        x = x.masked_fill(~mask, 0)
    # A view in the channels-last memory layout, which convolutions keep; only strided maps are
    # copied.
    x = x.contiguous().permute(0, 3, 1, 2)
    out = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    out = out.permute(0, 2, 3, 1)
    return out if add is None else add + out
