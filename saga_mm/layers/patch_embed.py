"""Patch embedding. Legend: B batch, H height, W width, C channels."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels.slices import join, row_strips, with_halo

from .conv import Conv2d
from .mask import masked, strided


class PatchEmbed(nn.Module):
    """Strided convolution and norm: (B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride),
    C_out).

    Args:
        in_channels: C_in.
        dim: C_out.
        stride: Step between patches, in pixels.
        overlap: Patches of 2 * stride - 1 pixels that overlap, padded by zeros all around; else
            patches of `stride` pixels, padded by zeros at the bottom and the right.
        norm_layer: Makes the norm from a channel number.
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
        x = masked(x, mask)
        if not self.overlap:
            height, width = x.shape[1:3]
            x = F.pad(x, (0, 0, 0, -width % self.stride, 0, -height % self.stride))
        return self.norm(self.proj(x))


class ConvStem(nn.Module):
    """Two overlapping patch embeddings of stride 2 and a GELU between them, for the first stage.

    (B, H, W, C_in) -> (B, ceil(H / 4), ceil(W / 4), C_out), through C_out / 2 channels, rounded up.
    Without grad, rows go through in strips that fit a CPU's cache.

    Args:
        in_channels: C_in.
        dim: C_out.
        norm_layer: Makes the norm from a channel number.

    Source: arXiv 2106.14881, where such stems make transformers easier to train.
    """

    def __init__(self, in_channels: int, dim: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        hidden = -(-dim // 2)
        self.embed1 = PatchEmbed(in_channels, hidden, 2, True, norm_layer)
        self.embed2 = PatchEmbed(hidden, dim, 2, True, norm_layer)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # per row of the output two of the map in between, of half as many cells
        strips = row_strips(x[:, ::4], self.embed1.proj.out_channels, least=16)
        if len(strips) == 1:
            return self._embed(x, mask)
        # at the ends of a strip, zeros stand for what is beyond
        return join((with_halo(self._embed, x, mask, strip, 1, 4) for strip in strips), strips)

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.embed2(F.gelu(self.embed1(x, mask)), strided(mask, 2))


class ConvNormEmbed(nn.Sequential):
    """3x3 convolutions with a norm after each and a GELU between them.

    (B, H, W, C_in) -> (B, ceil(H / stride), ceil(W / stride), C_out), rounded up per convolution.

    Args:
        in_channels: C_in.
        dims: Channels after each convolution; the last is C_out.
        strides: Stride of each convolution; their product is that of the whole.
        norm_layer: Makes a norm of maps (B, C, H, W), such as batch norm, from a channel number.
        fp32_start: Compute the first convolution and norm in fp32 under autocast. An image may be
            flat: batch norm then divides by a deviation close to zero, and its gradient sums up to
            zero over the pixels, which rounding to half precision would hide.
    """

    def __init__(
        self,
        in_channels: int,
        dims: Sequence[int],
        strides: Sequence[int],
        norm_layer: Callable[[int], nn.Module],
        fp32_start: bool = False,
    ) -> None:
        layers = []
        for before, dim, stride in zip((in_channels, *dims[:-1]), dims, strides, strict=True):
            layers += [nn.Conv2d(before, dim, 3, stride, padding=1), norm_layer(dim), nn.GELU()]
        super().__init__(*layers[:-1])
        self.fp32_start = fp32_start

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        device = x.device.type
        x = x.permute(0, 3, 1, 2)
        layers = list(self)
        if self.fp32_start and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                x, mask = _run(layers[:2], x.to(layers[0].weight.dtype), mask)
            x, layers = x.to(torch.get_autocast_dtype(device)), layers[2:]
        x, _ = _run(layers, x, mask)
        return x.permute(0, 2, 3, 1)


def _run(
    layers: Sequence[nn.Module], x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Maps (B, C, H, W) through layers, and their mask with them."""
    for layer in layers:
        if mask is not None and isinstance(layer, nn.Conv2d):
            x = masked(x, mask.permute(0, 3, 1, 2))
            mask = strided(mask, layer.stride[0])
        x = layer(x)
    return x, mask
