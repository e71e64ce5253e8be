"""Work on tokens in slices, so that its temporaries fit a cache and need hardly any memory."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Bytes of one temporary: what a CPU's cache holds; enough to keep a GPU busy.
BUDGET = {'cpu': 2**21}
BUDGET_ELSEWHERE = 2**26


def token_slices(
    tokens: int,
    bytes_per_token: int,
    device: torch.device,
    *,
    least: int = 1,
    with_grad: bool = False,
) -> list[slice]:
    """Slices over an axis of tokens.

    One slice holds all of them where a graph is recorded, which keeps what it sees.

    Args:
        tokens: Length of the axis.
        bytes_per_token: Of the largest temporary.
        device: Where it lies.
        least: Tokens of the smallest slice but the last.
        with_grad: Slices where autograd records, too, on a CPU: it is only the cache that gains.
    """
    allowed = not torch.is_grad_enabled() or (with_grad and device.type == 'cpu')
    if torch.compiler.is_compiling() or not allowed:
        return [slice(None)]
    step = max(1, least, BUDGET.get(device.type, BUDGET_ELSEWHERE) // max(1, bytes_per_token))
    return [slice(start, min(start + step, tokens)) for start in range(0, max(1, tokens), step)]


def row_strips(x: Tensor, channels: int, *, least: int = 1, with_grad: bool = False) -> list[slice]:
    """Slices over the rows of a map (B, H, W, C), as `token_slices` makes them.

    Args:
        x: The map.
        channels: Of the largest temporary, which has as many cells and the dtype of the map.
        least: Rows of the smallest strip but the last.
        with_grad: As in `token_slices`.
    """
    batch, height, width, _ = x.shape
    row = batch * width * channels * x.itemsize
    return token_slices(height, row, x.device, least=least, with_grad=with_grad)


def cut(x: Tensor, slices: Sequence[slice], axis: int = 1) -> Sequence[Tensor]:
    """The slices of an axis of x, by one split: its backward pass writes one gradient."""
    return [x] if len(slices) == 1 else x.split(slices[0].stop, axis)


def with_halo(
    function: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    mask: Tensor | None,
    strip: slice,
    halo: int,
    stride: int = 1,
) -> Tensor:
    """A strip of rows of what a function of a map (B, H, W, C) and its mask (B, H, W, 1) gives.

    Args:
        function: Such as a convolution that pads with zeros.
        x: The map.
        mask: Or None.
        strip: Rows of the output.
        halo: Rows of the output by which the function may be wrong at the ends of its input.
        stride: Rows of the input per row of the output.
    """
    start = max(0, strip.start - halo)
    rows = slice(stride * start, stride * (strip.stop + halo))
    out = function(x[:, rows], None if mask is None else mask[:, rows])
    return out[:, strip.start - start : strip.stop - start]


class Joined:
    """Results (B, n, ...) of slices of the second axis, to become one tensor (B, N, ...).

    Without grad, each is put in its place as it comes, and they never live all at once.

    Args:
        slices: Of the second axis.
        out: What they are written to, without grad. Defaults to a new tensor.

    Attributes:
        pieces: The results so far; without grad, views of their places.
    """

    def __init__(self, slices: Sequence[slice], out: Tensor | None = None) -> None:
        self.pieces: list[Tensor] = []
        self._slices = slices
        self._out = out

    def append(self, piece: Tensor) -> None:
        if len(self._slices) > 1 and not torch.is_grad_enabled():
            if self._out is None:
                tokens = self._slices[-1].stop
                self._out = piece.new_empty((piece.shape[0], tokens, *piece.shape[2:]))
            place = self._out[:, self._slices[len(self.pieces)]]
            piece = place.copy_(piece)
        self.pieces.append(piece)

    def whole(self) -> Tensor:
        if self._out is not None:
            return self._out
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, 1)


def join(pieces: Iterable[Tensor], slices: Sequence[slice], out: Tensor | None = None) -> Tensor:
    """All results of slices as one tensor; see `Joined`."""
    joined = Joined(slices, out)
    for piece in pieces:
        joined.append(piece)
    return joined.whole()
