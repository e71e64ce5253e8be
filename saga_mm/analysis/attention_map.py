"""Maps of what one pixel attends to. Legend: H height, W width, N tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .mixing import attention_layers, label, record_inputs, take_apart
from .rank import effective_rank


def attention_maps(
    backbone: nn.Module,
    image: Tensor,
    pixel: tuple[int, int],
    layers: Sequence[str] | None = None,
) -> dict[str, dict]:
    """Compute the row of the attention matrix that belongs to a pixel, in O(N) for each layer.

    Args:
        backbone: In eval mode.
        image: (1, 3, H, W).
        pixel: Row and column.
        layers: Layers, by their `label`. Defaults to the last one of each stage.

    Returns:
        By `label`: the `mechanism`; `weights` (H_i, W_i), the mean over heads of a token's weight
        times the mean over channels of its gate on v, times N, so that 1 is what uniform attention
        gives; `token`, its row and column there; and per head the sum of the weights (`sums`) and
        the effective number of tokens (`effective_tokens`): exp of the entropy of the absolute
        values of the weights as shares of their sum.

    Raises:
        ValueError: The backbone has no such layer.
    """
    modules = attention_layers(backbone)
    names = {label(name): name for name in modules}
    # later layers of a stage replace earlier ones
    last = {name.partition('.')[0]: name for name in names}
    layers = list(layers or last.values())
    if unknown := [name for name in layers if name not in names]:
        raise ValueError(f'layers must be of {", ".join(names)}, got {", ".join(unknown)}')
    inputs = record_inputs(backbone, image)
    found = {}
    for layer in layers:
        x = inputs[names[layer]]
        height, width = x.shape[1:3]
        row, column = pixel[0] * height // image.shape[2], pixel[1] * width // image.shape[3]
        mixing = take_apart(modules[names[layer]], x)
        # (heads, N)
        weights = mixing.row(row * width + column)[0]
        shown = weights * mixing.gates['v'][0].mean(-1) if mixing.gates else weights
        found[layer] = dict(
            mechanism=mixing.mechanism,
            token=[row, column],
            sums=weights.sum(-1).tolist(),
            effective_tokens=effective_rank(weights.abs()).tolist(),
            weights=(shown.mean(0) * height * width).reshape(height, width).cpu(),
        )
    return found
