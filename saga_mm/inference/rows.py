"""Runs a convolutional head over chunks of rows, so that its maps never exist as a whole.

The calls of a function on maps are recorded once, without computing anything. The rows of the
result are then computed chunk by chunk, on demand: going back through the record says which rows of
each map a chunk needs, and going forward computes those that are not there yet. Rows that the next
chunk needs too, such as the halo of a convolution, are kept, so no row is computed twice.

What reads a whole map, such as pyramid pooling and group normalisation, is summed up in a sweep of
its own over the rows of its input.

Rows are the last axis but one of every map: (..., H, W).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from .live_bytes import LiveBytes

aten = torch.ops.aten
# The axis of rows.
ROWS = -2
# What programs hold at most, by what it depends on: chunk, calls, and layouts of tensors.
_peaks: dict[tuple, int] = {}
# Numbers to keep at most, as each is kept with the text of its calls.
MOST_PEAKS = 64


class NotByRowsError(ValueError):
    """A function makes a call that can't be computed row by row; the message names it."""


class Rule(NamedTuple):
    """How rows of the result of a call are computed.

    Attributes:
        reads: From a range of rows of the result to the range of rows of each map that it needs.
        run: Computes these rows of the result, from the range and the arguments of the call, with
            the rows of `reads` in place of the maps.
        gather: For a call that reads the whole map: takes all of its rows, range by range and in
            order, before `run` is called. Defaults to None.
    """

    reads: Callable[[range], range]
    run: Callable[..., Tensor]
    gather: Callable[[range, Tensor], None] | None = None


class Plan(NamedTuple):
    """The rows of each map that a chunk reads or writes, and those that are not there yet."""

    wanted: dict[Node, range]
    missing: dict[Node, range]


class Held(NamedTuple):
    """Rows of a map."""

    rows: range
    map: Tensor

    def narrow(self, rows: range) -> Tensor:
        # torch counts a negative start from the end
        assert overlap(rows, self.rows) == rows
        return self.map.narrow(ROWS, rows.start - self.rows.start, len(rows))


class RowProgram:
    """A recorded function, for the rows of its result on the same maps.

    Args:
        function: Maps any number of maps (..., H, W) to a map. Under it may be convolutions, norms
            in eval mode, interpolation, pooling, concatenation, flips, slices, and whatever
            computes each pixel by itself.
        maps: Its arguments.

    Raises:
        NotByRowsError: The function makes another call.
    """

    def __init__(self, function: Callable[..., Tensor], maps: Sequence[Tensor]) -> None:
        recorded = record(function, maps)
        self.module = recorded
        nodes = list(recorded.graph.nodes)
        inputs = [node for node in nodes if node.op == 'placeholder']
        self.inputs = {
            node: Held(range(map_.shape[ROWS]), map_)
            for node, map_ in zip(inputs, maps, strict=True)
        }
        self.constants: dict[Node, Any] = {}
        self.rules: dict[Node, Rule] = {}
        for node in nodes:
            if node.op == 'get_attr':
                self.constants[node] = getattr(recorded, str(node.target))
            elif node.op == 'call_function':
                self._add(node)
        self.result: Node = arguments(nodes[-1])[0]
        if self.result not in self.rules:
            raise NotByRowsError('the function must return one map that it computes')
        self.height: int = shape_of(self.result)[ROWS]

    def run(self, rows_per_chunk: int) -> Iterator[tuple[range, Tensor]]:
        """Yield the rows of the result, chunk by chunk."""
        for target, gather, chunks in self._targets(rows_per_chunk):
            for rows, part in self._sweep(target, chunks):
                if gather is None:
                    yield rows, part
                else:
                    gather(rows, part)

    def peak_bytes(self, rows_per_chunk: int) -> int:
        """Bytes of tensors that `run` holds at most, besides its inputs; they are not computed.

        What was found serves all programs of the same calls on maps of the same shapes.
        """
        constants = [value for value in self.constants.values() if isinstance(value, Tensor)]
        tensors = [held.map for held in self.inputs.values()] + constants
        layouts = tuple((x.shape, x.dtype, x.device) for x in tensors)
        key = rows_per_chunk, self.module.code, layouts
        if key not in _peaks:
            if len(_peaks) >= MOST_PEAKS:
                _peaks.clear()
            _peaks[key] = self._count_bytes(rows_per_chunk)
        return _peaks[key]

    def _count_bytes(self, rows_per_chunk: int) -> int:
        real = dict(self.inputs)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(fake=True) as live:
            for node, (rows, map_) in real.items():
                self.inputs[node] = Held(rows, empty_like(map_))
            before = live.now
            for target, _, chunks in self._targets(rows_per_chunk):
                # Four in the middle hold as much as all of them do.
                for _ in self._sweep(target, chunks[max(0, len(chunks) // 2 - 2) :][:4]):
                    pass
        self.inputs = real
        return live.peak - before

    def _targets(
        self, rows_per_chunk: int
    ) -> Iterator[tuple[Node, Callable[[range, Tensor], None] | None, list[range]]]:
        """The maps that are swept in turn, what takes their rows, and their chunks.

        The result comes last, after the maps that are gathered.
        """
        for node, rule in self.rules.items():
            if rule.gather is not None:
                (source,) = self._maps_of(node)
                height = shape_of(source)[ROWS]
                step = max(1, rows_per_chunk * height // self.height)
                yield source, rule.gather, chunks_of(height, step)
        yield self.result, None, chunks_of(self.height, rows_per_chunk)

    def _add(self, node: Node) -> None:
        """Find the rule of a call, or compute it if it depends on constants alone."""
        if all(source in self.constants for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), self.constants.__getitem__)
            self.constants[node] = called(node)(*args, **kwargs)
            return
        if len(shape_of(node)) < 2:
            raise NotByRowsError(f'{called(node)} has a result without rows')
        self.rules[node] = find_rule(node)

    def _maps_of(self, node: Node) -> list[Node]:
        return [source for source in node.all_input_nodes if source not in self.constants]

    def _sweep(self, target: Node, chunks: Iterable[range]) -> Iterator[tuple[range, Tensor]]:
        """Yield the rows of one map of the record, chunk by chunk."""
        if target in self.inputs:
            yield from ((rows, self.inputs[target].narrow(rows)) for rows in chunks)
            return
        held: dict[Node, Held] = {}
        plans = self._plans(target, chunks)
        plan = next(plans, None)
        while plan is not None:
            following = next(plans, None)
            self._compute(plan, following, held, target)
            yield held[target]
            drop(held, target, plan, following)
            plan = following

    def _plans(self, target: Node, chunks: Iterable[range]) -> Iterator[Plan]:
        there: dict[Node, range] = {}
        for chunk in chunks:
            wanted, missing = {target: chunk}, {}
            for node, rule in reversed(self.rules.items()):
                if node not in wanted:
                    continue
                missing[node] = rest(wanted[node], there.get(node, range(0)))
                if not missing[node]:
                    continue
                for source in self._maps_of(node):
                    height = shape_of(source)[ROWS]
                    # A single row is one that is read for all rows of the result.
                    reads = range(1) if height == 1 else rule.reads(missing[node])
                    if reads:
                        wanted[source] = hull(wanted.get(source, reads), reads)
            there |= wanted
            yield Plan(wanted, missing)

    def _compute(
        self, plan: Plan, following: Plan | None, held: dict[Node, Held], target: Node
    ) -> None:
        """Compute the missing rows of a plan, and drop maps that no further call reads."""
        calls = [node for node in self.rules if plan.missing.get(node)]
        last = {source: node for node in calls for source in self._maps_of(node)}
        for node in calls:
            rows = plan.missing[node]
            held[node] = extend(
                held.get(node), plan.wanted[node], rows, self._call(node, rows, held)
            )
            for source in self._maps_of(node):
                if last[source] is node and source in held and source is not target:
                    drop(held, source, plan, following)

    def _call(self, node: Node, rows: range, held: dict[Node, Held]) -> Tensor:
        rule = self.rules[node]

        def value(source: Node) -> Any:
            if source in self.constants:
                return rows_of_constant(self.constants[source], node, rows)
            reads = range(1) if shape_of(source)[ROWS] == 1 else rule.reads(rows)
            # There is nothing to read of a map that was gathered.
            return (self.inputs.get(source) or held[source]).narrow(reads) if reads else None

        return rule.run(rows, *map_arg(node.args, value), **map_arg(node.kwargs, value))


def record(function: Callable[..., Tensor], maps: Sequence[Tensor]) -> GraphModule:
    """The calls that a function makes on maps of these shapes, in ATen operators."""
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            fakes = [empty_like(map_) for map_ in maps]
            module = make_fx(torch.func.functionalize(function))(*fakes)
    except RuntimeError as error:
        # torch's errors for values that the record does not have are RuntimeErrors
        raise NotByRowsError(str(error).splitlines()[0]) from error
    module.graph.eliminate_dead_code()
    return module


def empty_like(map_: Tensor) -> Tensor:
    return torch.empty(map_.shape, dtype=map_.dtype, device=map_.device)


def shape_of(node: Node) -> torch.Size:
    """The shape of the result of a call; that of the first one of several."""
    value = node.meta['val']
    return (value[0] if isinstance(value, tuple | list) else value).shape


def called(node: Node) -> Any:
    """The operator that a call calls."""
    return node.target


def arguments(node: Node) -> list[Any]:
    """The positional arguments of a call, of types that its operator knows."""
    return list(node.args)


def chunks_of(height: int, step: int) -> list[range]:
    return [range(start, min(start + step, height)) for start in range(0, height, step)]


def hull(a: range, b: range) -> range:
    return range(min(a.start, b.start), max(a.stop, b.stop))


def overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def rest(wanted: range, there: range) -> range:
    """The rows to compute if some are there: one range, which may take in rows that are there."""
    if not overlap(wanted, there):
        return wanted
    if there.start <= wanted.start:
        return range(min(there.stop, wanted.stop), wanted.stop)
    return range(wanted.start, there.start) if there.stop >= wanted.stop else wanted


def extend(old: Held | None, wanted: range, rows: range, new: Tensor) -> Held:
    """The wanted rows of a map, from old ones and new ones."""
    if old is None or rows == wanted:
        return Held(rows, new)
    if rows.start > wanted.start:
        parts = [old.narrow(range(wanted.start, rows.start)), new]
    else:
        parts = [new, old.narrow(range(rows.stop, wanted.stop))]
    return Held(wanted, torch.cat(parts, ROWS))


def drop(held: dict[Node, Held], node: Node, plan: Plan, following: Plan | None) -> None:
    """Forget the rows of a map, except those that the following chunk needs again."""
    rows, map_ = held.pop(node)
    if following is None:
        return
    kept = overlap(rows, following.wanted.get(node, plan.wanted[node]))
    if kept == rows:
        held[node] = Held(rows, map_)
    elif kept:
        held[node] = Held(kept, Held(rows, map_).narrow(kept).clone())


def rows_of_constant(value: object, node: Node, rows: range) -> object:
    """The rows of a constant that is added to a map, or multiplied with it, row by row."""
    shape = shape_of(node)
    if (
        is_pointwise(node)
        and isinstance(value, Tensor)
        and value.ndim >= 2
        and value.shape[ROWS] == shape[ROWS]
    ):
        return value.narrow(ROWS, rows.start, len(rows))
    return value


def is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(called(node), 'tags', ())


def find_rule(node: Node) -> Rule:
    """The rule of a call, or NotByRowsError if there is none."""
    if called(node) is operator.getitem and arguments(node)[1] == 0:
        # the rules of calls with several results return the first one
        return Rule(same_rows, lambda rows, x, index: x)
    if is_pointwise(node):
        return each_row(node)
    make = RULES.get(getattr(called(node), 'overloadpacket', None))
    rule = None if make is None else make(node)
    if rule is None:
        raise NotByRowsError(f'{called(node)} is not computed row by row')
    return rule


def same_rows(rows: range) -> range:
    return rows


def each_row(node: Node) -> Rule:
    """The rule of a call that computes each row from the same row of its maps."""
    return Rule(same_rows, lambda rows, *args, **kwargs: called(node)(*args, **kwargs))


def along(node: Node, dims: int | Sequence[int]) -> set[int]:
    """Axes of the map of a call, counted from the end."""
    ndim = len(shape_of(node.all_input_nodes[0]))
    return {dim - ndim if dim >= 0 else dim for dim in ([dims] if isinstance(dims, int) else dims)}


def over_channels(node: Node) -> Rule | None:
    """Calls with an axis as their second argument, if it is before that of the rows."""
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    if dims is None or not all(dim < ROWS for dim in along(node, dims)):
        return None
    return each_row(node)


def concatenation(node: Node) -> Rule | None:
    dim = arguments(node)[1] if len(arguments(node)) > 1 else 0
    return None if ROWS in along(node, dim) else each_row(node)


def batch_norm(node: Node) -> Rule | None:
    training = called(node).overloadpacket is aten.native_batch_norm and arguments(node)[5]
    if training:
        return None
    return Rule(same_rows, lambda rows, *args: called(node)(*args)[0])


def convolution(node: Node) -> Rule | None:
    source, weight, _, stride, padding, dilation, transposed, *_ = arguments(node)
    if transposed or len(shape_of(node)) != 4:
        return None
    height, kernel = shape_of(source)[ROWS], shape_of(weight)[ROWS]
    reach = dilation[0] * (kernel - 1) + 1

    def span(rows: range) -> range:
        first = rows.start * stride[0] - padding[0]
        return range(first, first + (len(rows) - 1) * stride[0] + reach)

    def run(rows: range, x: Tensor, weight: Tensor, bias: Tensor | None, *options) -> Tensor:
        reads = span(rows)
        above, below = max(0, -reads.start), max(0, reads.stop - height)
        if above or below:
            x = F.pad(x, (0, 0, above, below))
        stride, padding, *others = options
        return called(node)(x, weight, bias, stride, [0, padding[1]], *others)

    return Rule(lambda rows: overlap(span(rows), range(height)), run)


def bilinear(node: Node) -> Rule:
    """Bilinear interpolation: of each row by torch, and between two rows with the same weights."""
    source, (height, width), align_corners, *factors = arguments(node)
    in_height, in_width = shape_of(source)[-2:]
    y_factor, x_factor = (*factors, None, None)[:2]
    dtype = torch.float64 if source.meta['val'].dtype == torch.float64 else torch.float32
    above, weight = row_weights(in_height, height, align_corners, y_factor, dtype)
    below = (above + 1).clamp(max=in_height - 1)

    first, last = above.tolist(), below.tolist()

    def reads(rows: range) -> range:
        return range(first[rows.start], last[rows.stop - 1] + 1)

    def run(rows: range, x: Tensor, *_: object) -> Tensor:
        if width != in_width:
            x = called(node)(x, [x.shape[ROWS], width], align_corners, None, x_factor)
        if height == in_height:
            return x
        start, part = reads(rows).start, slice(rows.start, rows.stop)
        upper = x.index_select(ROWS, (above[part] - start).to(x.device))
        lower = x.index_select(ROWS, (below[part] - start).to(x.device))
        return upper.lerp_(lower, weight[part, None].to(x))

    return Rule(same_rows if height == in_height else reads, run)


def row_weights(
    in_height: int, height: int, align_corners: bool, factor: float | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """For each row of a bilinear interpolation: the row above it, and the weight of the row below.

    Positions are rounded as in torch's kernels, which compute them in `dtype` with fused multiply
    and add: far down in a large image, other rounding would be visible.
    """
    rows = torch.arange(height, dtype=torch.float64)
    if align_corners:
        step = torch.tensor(in_height - 1, dtype=dtype) / max(height - 1, 1)
        position = step.double() * (rows if height > 1 else 0 * rows)
    else:
        step = row_step(in_height, height, factor, dtype)
        position = (step.double() * (rows + 0.5) - 0.5).clamp(min=0)
    position = position.to(dtype)
    above = position.long().clamp(max=in_height - 1)
    return above, (position - above).clamp(0, 1)


def row_step(in_height: int, height: int, factor: float | None, dtype: torch.dtype) -> Tensor:
    """Rows of the map per row of the result of an interpolation, as torch's kernels round it."""
    if factor:
        return torch.tensor(1 / factor, dtype=dtype)
    return torch.tensor(in_height, dtype=dtype) / height


def nearest(node: Node) -> Rule:
    source, (height, width), *factors = arguments(node)
    in_height, in_width = shape_of(source)[-2:]
    y_factor, x_factor = (*factors, None, None)[:2]
    index = (
        torch.arange(height).float() * row_step(in_height, height, y_factor, torch.float32)
    ).long()
    index = torch.arange(height) if height == in_height else index.clamp(max=in_height - 1)

    source_rows = index.tolist()

    def reads(rows: range) -> range:
        return range(source_rows[rows.start], source_rows[rows.stop - 1] + 1)

    def run(rows: range, x: Tensor, *_: object) -> Tensor:
        if width != in_width:
            x = called(node)(x, [x.shape[ROWS], width], None, x_factor)
        part = index[rows.start : rows.stop] - reads(rows).start
        return x.index_select(ROWS, part.to(x.device))

    return Rule(reads, run)


def slice_(node: Node) -> Rule | None:
    given = arguments(node)
    source, dim, start, stop, step = given + [0, None, None, 1][len(given) - 1 :]
    if ROWS not in along(node, dim):
        return each_row(node)
    if step != 1:
        return None
    first = slice(start, stop).indices(shape_of(source)[ROWS])[0]
    return Rule(lambda rows: range(rows.start + first, rows.stop + first), lambda rows, x, *args: x)


def flip(node: Node) -> Rule:
    if ROWS not in along(node, arguments(node)[1]):
        return each_row(node)
    height = shape_of(node)[ROWS]
    return Rule(
        lambda rows: range(height - rows.stop, height - rows.start),
        lambda rows, *args: called(node)(*args),
    )


def new_axis(node: Node) -> Rule | None:
    dim, ndim = arguments(node)[1], len(shape_of(node))
    return each_row(node) if (dim - ndim if dim >= 0 else dim) < ROWS else None


def mean(node: Node) -> Rule | None:
    """A mean over channels, or over all pixels of a map."""
    _, dims, keepdim = (*arguments(node), False)[:3]
    axes = along(node, dims)
    if axes == {-2, -1} and keepdim:
        return pooling(node, (1, 1))
    return over_channels(node)


def pooling(node: Node, size: Sequence[int] | None = None) -> Rule:
    """Adaptive average pooling: the means of each row by torch, and those of rows by weights."""
    source = arguments(node)[0]
    height, width = size or arguments(node)[1]
    in_height = shape_of(source)[ROWS]
    weights = torch.zeros(height, in_height, dtype=torch.float64)
    for i, row in enumerate(weights):
        start, stop = i * in_height // height, -(-(i + 1) * in_height // height)
        row[start:stop] = 1 / (stop - start)
    result = node.meta['val']
    total = torch.zeros(result.shape, dtype=result.dtype, device=result.device)

    def gather(rows: range, x: Tensor) -> None:
        pooled = F.adaptive_avg_pool2d(x, (len(rows), width))
        part = weights[:, rows.start : rows.stop].to(x) @ pooled
        total.copy_(total + part if rows.start else part)

    def run(rows: range, *_: object) -> Tensor:
        return total.narrow(ROWS, rows.start, len(rows))

    return Rule(lambda rows: range(0), run, gather)


# By operator: makes the rule of a call, or returns None if its arguments don't allow it.
RULES: dict[object, Callable[[Node], Rule | None]] = {
    aten._adaptive_avg_pool2d: pooling,
    aten._native_batch_norm_legit_no_training: batch_norm,
    aten._softmax: over_channels,
    aten._to_copy: each_row,
    aten.alias: each_row,
    aten.amax: over_channels,
    aten.argmax: over_channels,
    aten.cat: concatenation,
    aten.clone: each_row,
    aten.convolution: convolution,
    aten.detach: each_row,
    aten.flip: flip,
    aten.mean: mean,
    aten.native_batch_norm: batch_norm,
    aten.select: over_channels,
    aten.slice: slice_,
    aten.squeeze: over_channels,
    aten.sum: over_channels,
    aten.unsqueeze: new_axis,
    aten.upsample_bilinear2d: bilinear,
    aten.upsample_nearest2d: nearest,
}
