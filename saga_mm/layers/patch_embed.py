"""Patch embedding. Legend: B batch, H height, W width, C channels."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import Conv2d, to_channels_first
from .mask import downsample_mask, mask_padding
from .norm import before_linear


class PatchEmbed(nn.Module):
    """Strided convolution and norm: (B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride),
    C_out).

    Args:
        in_channels: C_in.
        dim: C_out.
        stride: Step between patches, in pixels.
        overlap: Use overlapping patches of 2 * stride - 1 pixels, with zero padding on all sides.
            Otherwise use patches of `stride` pixels, with zero padding at the bottom and the right.
        norm_layer: Makes a norm over a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        stride: int,
        overlap: bool,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = overlap
        kernel_size = 2 * stride - 1 if overlap else stride
        padding = stride - 1 if overlap else 0
        self.proj = Conv2d(in_channels, dim, kernel_size, stride, padding)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = mask_padding(x, mask)
        if not self.overlap:
            height, width = x.shape[1:3]
            x = F.pad(x, (0, 0, 0, -width % self.stride, 0, -height % self.stride))
        return self.norm(self.proj(x))


class ConvStem(nn.Module):
    """Two overlapping patch embeddings of stride 2 with a GELU between them, for the first stage.

    (B, H, W, C_in) -> (B, ceil(H / 4), ceil(W / 4), C_out). There are C_out / 2 channels, rounded
    up, between the two.

    Args:
        in_channels: C_in.
        dim: C_out.
        norm_layer: Makes a norm over a number of channels.

    Source: arXiv 2106.14881, which shows that such stems make transformers easier to train.
    """

    def __init__(self, in_channels: int, dim: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        hidden = -(-dim // 2)
        self.embed1 = PatchEmbed(in_channels, hidden, 2, True, norm_layer)
        self.embed2 = PatchEmbed(hidden, dim, 2, True, norm_layer)
        before_linear(self.embed1.norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.embed2(F.gelu(self.embed1(x, mask)), downsample_mask(mask, 2))


class ConvNormEmbed(nn.Sequential):
    """3x3 convolutions with a norm after each and a GELU between them.

    (B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride), C_out), rounded up per convolution.

    Args:
        in_channels: C_in.
        dims: Channels after each convolution; the last is C_out.
        strides: Stride of each convolution; their product is the total stride.
        norm_layer: Makes a norm of maps (B, C, H, W), such as batch norm, from the number C.
        fp32_start: Compute the first convolution and norm in fp32 under autocast. If all pixels of
            an image are equal, batch norm divides by a deviation close to zero, and its gradient
            sums to zero over the pixels. Rounding errors of half precision would be larger than
            these sums.
    """

    def __init__(
        self,
        in_channels: int,
        dims: Sequence[int],
        strides: Sequence[int],
        norm_layer: Callable[[int], nn.Module],
        fp32_start: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for before, dim, stride in zip((in_channels, *dims[:-1]), dims, strides, strict=True):
            layers += [nn.Conv2d(before, dim, 3, stride, padding=1), norm_layer(dim), nn.GELU()]
        super().__init__(*layers[:-1])
        self.strides = tuple(strides)
        self.fp32_start = fp32_start

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = to_channels_first(x)
        layers = list(self)
        for i, stride in enumerate(self.strides):
            if mask is not None:
                x = mask_padding(x, mask.permute(0, 3, 1, 2))
                mask = downsample_mask(mask, stride)
            conv_norm = layers[3 * i : 3 * i + 2]
            x = run_in_fp32(conv_norm, x) if i == 0 and self.fp32_start else run(conv_norm, x)
            x = run(layers[3 * i + 2 : 3 * i + 3], x)
        return x.permute(0, 2, 3, 1)


def run(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply layers to x, one after the other."""
    for layer in layers:
        x = layer(x)
    return x


def run_in_fp32(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Like `run`, but compute in the dtype of the weights under autocast.

    The result has the dtype of autocast, as the layers after it expect.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return run(layers, x)
    dtype = next((p.dtype for p in layers[0].parameters()), torch.float32)
    with torch.autocast(device, enabled=False):
        x = run(layers, x.to(dtype))
    return x.to(torch.get_autocast_dtype(device))
