"""What one pixel attends to, as a map. Legend: H height, W width, N tokens."""

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
    """The row of the attention matrix that belongs to a pixel, at O(N) a layer.

    Args:
        backbone: In eval mode.
        image: (1, 3, H, W).
        pixel: Row and column.
        layers: By `label`. Defaults to the last of each stage.

    Returns:
        By `label`: the `mechanism`; `weights` (H_i, W_i), the mean over heads of a token's weight
        times the mean over channels of its gate on v, times N, so that 1 is what uniform attention
        gives; `token`, its row and column there; and per head the sum of the weights (`sums`) and
        the number of tokens that count (`effective_tokens`), exp of the entropy of their absolute
        values as shares of their sum.

    Raises:
        ValueError: The backbone has no such layer.
    """
    modules = attention_layers(backbone)
    names = {label(name): name for name in modules}
    # of each stage, the last stays
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
