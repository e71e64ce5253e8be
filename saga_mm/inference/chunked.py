"""Runs plain modules over chunks of rows, for inference on large images on a CPU.

A block computes temporary maps that have several times as many channels as its input. If it runs
over chunks of rows that fit a cache, these maps never exist as a whole, which saves memory and
time. The result is that of the plain module, because its layers are of three kinds:

- norms, linear layers and activations process each token by itself;
- a convolution or a shift reads a few more rows than it writes, its `halo`;
- linear attention sums over all tokens. It takes two sweeps over the chunks: the first sums up the
  state, and the second reads it for each token.

All other layers, such as softmax attention, are called on the whole map.

Legend: B batch, H height, W width, C channels. Maps are (B, H, W, C), masks (B, H, W, 1) bool.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from saga_kernels import KVState, is_tracing_or_compiling, kv_state, read_state, sum_states
from saga_kernels.dispatch import resolve_impl, why_not_triton

from ..attention import GatedLinearAttention
from ..layers import (
    FFN,
    Block,
    ChannelMix,
    Conv2d,
    ConvNormEmbed,
    ConvStem,
    DepthwiseConv2d,
    PatchEmbed,
    QKNorm,
    is_watched,
    mask_padding,
    scale,
    unpack,
)
from .fused import fused_block, fused_halves
from .image_rows import ImageRows
from .storage import full_dtype, in_full, kept_dtype, new_map, write_map

# Bytes of the widest temporary of a chunk, which then fits the cache of a CPU. At 1280 x 1280,
# SAGA-T takes the same time with 2**18 to 2**21 bytes, and more time and memory with 2**23.
BUDGET = 2**20
# With gradients, chunks are larger by this factor, because each chunk adds up the gradients of all
# weights. A training step is fastest with 2**21 or 2**22 bytes.
GRAD_FACTOR = 2
# Minimum rows of a chunk per row of its halo. A chunk reads a halo at both ends, and computes these
# rows again, so at most 2 / 16 = one eighth of the work is repeated.
ROWS_PER_HALO = 16


def run_block(
    block: nn.Module, x: Tensor, mask: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Compute `block(x, mask)`, over chunks of rows where that gives the same result and is faster.

    On a GPU without gradients, the halves of a block that `fused_halves` finds are fused kernels.

    The block is called on the whole map otherwise on a GPU, while torch traces or compiles, if a
    hook is registered on it or on a module in it, if it contains other modules than `Block`, `FFN`
    and `ChannelMix` do by default, as after quantisation, and if the map is small. If gradients are
    needed, only the FFN runs over chunks. Autograd keeps the wide maps, so that this saves time but
    no memory.

    Args:
        block: Maps (B, H, W, C) and its mask to (B, H, W, C), or to that and a hidden state.
        x: (B, H, W, C).
        mask: As in `mask_padding`, or None.
    """
    if not is_plain(block):
        return block(in_full(x), mask)
    halves = fused_halves(block, x)
    if halves is not None:
        return fused_block(block, in_full(x), mask, halves)
    if not can_chunk(block, x):
        return block(in_full(x), mask)
    width, halo = reach_of_ffn(block.ffn)
    chunks = row_chunks(x, width, halo)
    if len(chunks) == 1:
        return block(in_full(x), mask)
    if not block.training and not torch.is_grad_enabled():
        return chunked_block(block, x, mask)
    return block(x, mask) if halo else block_with_chunked_ffn(block, x, mask, chunks)


class Reach(NamedTuple):
    """What a row of the output of an embedding reads.

    Attributes:
        channels: Channels of the widest map between its convolutions, if all of it that a row of
            the output needs is laid out in one row as wide as the image.
        halo: Rows of the output that are wrong at a cut through the image.
        stride: Rows of the image per row of the output.
    """

    channels: int
    halo: int
    stride: int


def run_embed(embed: nn.Module, x: Tensor | ImageRows, mask: Tensor | None = None) -> Tensor:
    """Compute `embed(x, mask)`; in inference, a stem of several convolutions runs over chunks as in
    `run_block`.

    Rows of `ImageRows` are read chunk by chunk by all embeddings of this package, on any device.
    """
    reach = reach_of_embed(embed)
    if isinstance(x, ImageRows):
        possible, itemsize = not is_watched(embed), 4
    else:
        itemsize = full_dtype(x).itemsize
        # a map in half precision is converted row by row
        several = type(embed) is ConvStem or (
            type(embed) is ConvNormEmbed and len(embed.strides) > 1
        )
        pays = several or itemsize > x.itemsize
        possible = pays and can_chunk(embed, x)
    if reach is None or not possible or torch.is_grad_enabled():
        whole = x.whole().permute(0, 2, 3, 1) if isinstance(x, ImageRows) else in_full(x)
        return embed(whole, mask)
    batch, height, width, colors = x.shape
    out = RowBuffer(-(-height // reach.stride))
    channels = max(reach.channels, reach.stride * colors)
    bytes_per_row = batch * width * channels * itemsize
    chunks = divide(out.height, bytes_per_row, reach.halo)
    if len(chunks) == 1 and not isinstance(x, ImageRows):
        return embed(in_full(x), mask)
    for rows in chunks:
        out.write(rows, with_halo(embed, x, mask, rows, reach.halo, reach.stride))
    return out.map


def run_output(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The contiguous map (B, C, H, W) of the norm of x, whose padding is 0; over chunks as above.

    Args:
        norm: Maps (B, H, W, C) to the same shape, each token by itself.
        x: (B, H, W, C).
        mask: As in `mask_padding`, or None.
    """
    if torch.is_grad_enabled() or not can_chunk(norm, x) or not hasattr(norm, 'normalized_shape'):
        plain = mask_padding(norm(in_full(x)), mask).permute(0, 3, 1, 2)
        return plain.clone(memory_format=torch.contiguous_format)
    out = RowBuffer(x.shape[1], axis=2)
    for rows in row_chunks(x, x.shape[-1]):
        part = mask_padding(norm(in_full(x[:, rows])), None if mask is None else mask[:, rows])
        out.write(rows, part.permute(0, 3, 1, 2))
    return out.map


def can_chunk(module: nn.Module, x: Tensor) -> bool:
    """Whether no caller can tell a module that runs over chunks from one that is called."""
    return (
        type(x) is Tensor
        and x.device.type == 'cpu'
        and not is_tracing_or_compiling()
        and not is_watched(module)
    )


def is_plain(block: nn.Module) -> TypeGuard[Block]:
    """Whether a block contains only modules that this file can run over chunks."""
    if type(block) is not Block:
        return False
    linear, convs = [], [block.cpe]
    if type(block.ffn) is FFN:
        linear += [block.ffn.fc1, block.ffn.fc2]
        convs.append(block.ffn.dwconv)
    elif type(block.ffn) is ChannelMix:
        linear += [block.ffn.key, block.ffn.value, block.ffn.receptance]
    else:
        return False
    if type(block.attn) is GatedLinearAttention:
        linear += [block.attn.in_proj, block.attn.proj]
        if block.attn.output_gate is not None:
            linear.append(block.attn.output_gate)
        convs.append(block.attn.lepe)
    return (
        all(type(layer) is nn.Linear for layer in linear)
        and all(conv is None or type(conv) is DepthwiseConv2d for conv in convs)
        and type(getattr(block.attn, 'qk_norm', None)) in (QKNorm, type(None))
        and all(hasattr(norm, 'normalized_shape') for norm in (block.norm1, block.norm2))
    )


def is_plain_stem(embed: nn.Module) -> TypeGuard[ConvStem]:
    """Whether an embedding is a `ConvStem` that contains its original modules."""
    return type(embed) is ConvStem and all(
        type(part) is PatchEmbed and type(part.proj) is Conv2d
        for part in (embed.embed1, embed.embed2)
    )


def reach_of_embed(embed: nn.Module) -> Reach | None:
    """What a row of an embedding reads; None if it may contain what reads a whole map."""
    if is_plain_stem(embed):
        # One row of the output needs two rows of the map between the convolutions, which is half as
        # wide as the image. Row r of the output reads rows 2r - 1 to 2r + 1 of that map. If a chunk
        # of the image starts at row 4r, only rows 2r - 1 and 2r of that map are wrong, so only row
        # r of the output is.
        return Reach(embed.embed2.proj.in_channels, 1, 4)
    if type(embed) is PatchEmbed and type(embed.proj) is Conv2d:
        if not hasattr(embed.norm, 'normalized_shape'):
            return None
        return Reach(embed.proj.in_channels, int(embed.overlap), embed.stride)
    if type(embed) is ConvNormEmbed and all(map(is_plain_layer, embed)):
        pixels, stride = 0, 1
        for step in embed.strides:
            pixels, stride = pixels + stride, stride * step
        return Reach(len(embed.get_parameter('0.weight')), -(-pixels // stride), stride)
    return None


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer of a `ConvNormEmbed` is an original one, and its norm reads no other row."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return not layer.training and layer.track_running_stats
    return type(layer) in (nn.Conv2d, nn.GELU)


def chunked_block(block: Block, x: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """The output of a plain block in inference, computed without its wide maps."""
    if is_linear(block.attn) and runs_eagerly(block.attn, x):
        return linear_attention_block(block, x, mask)
    x = positional_encoding(block, x, mask)
    y, *state = unpack(block.attn(block.norm1(in_full(x)), mask))
    x = feed_forward(block, x + scale(y, block.gamma1), mask)
    return (x, *state) if state else x


def block_with_chunked_ffn(
    block: Block, x: Tensor, mask: Tensor | None, chunks: list[slice]
) -> Tensor | tuple[Tensor, ...]:
    """The output of a plain block, with gradients: only `norm2` and `ffn` run over chunks."""
    x, *state = block.attend(block.encode(x, mask), mask)
    # One split in place of several slices, so that autograd writes a single gradient for x.
    parts = x.split(chunks[0].stop, dim=1)
    y = torch.cat([block.ffn(block.norm2(part)) for part in parts], dim=1)
    x = x + block.drop_path2(scale(y, block.gamma2))
    return (x, *state) if state else x


def is_linear(attn: nn.Module) -> TypeGuard[GatedLinearAttention]:
    """Whether attention runs in two sweeps: its hidden state would be one more whole map."""
    return type(attn) is GatedLinearAttention and not attn.returns_state


def runs_eagerly(attn: GatedLinearAttention, x: Tensor) -> bool:
    """Whether the op of an attention module runs in PyTorch and not in Triton's interpreter."""
    tokens = x.flatten(1, 2).unflatten(-1, (1, attn.num_heads, attn.head_dim))
    return resolve_impl(attn.impl, attn.op.__name__, why_not_triton(tokens)) != 'triton'


def positional_encoding(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """A new map that holds x plus its positional encoding."""
    out = RowBuffer(x.shape[1])
    for rows in row_chunks(x, x.shape[-1], halo_of(block.cpe)):
        out.write(rows, encoded_rows(block, x, mask, rows))
    return out.map


def encoded_rows(block: Block, x: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """Some rows of x plus its positional encoding."""
    part = in_full(x[:, rows])
    return part if block.cpe is None else part + conv_rows(block.cpe, x, mask, rows)


def linear_attention_block(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """The output of a plain block with linear attention, in two sweeps over the chunks."""
    attn, heads = block.attn, (block.attn.num_heads, block.attn.head_dim)
    whole_ffn = reach_of_ffn(block.ffn)[1] > 0
    chunks = row_chunks(x, x.shape[-1], max(halo_of(block.cpe), halo_of(attn.lepe)))
    encoded, queries, values = (RowBuffer(x.shape[1]) for _ in range(3))

    def add_to_state(rows: slice) -> KVState:
        encoded.write(rows, encoded_rows(block, x, mask, rows))
        y = in_full(encoded.map[:, rows])
        # (B, N, heads, D) each
        packed = attn.project(block.norm1(y), None).flatten(1, 2).unflatten(-1, (-1, *heads))
        query, *others = packed.unbind(2)
        queries.write(rows, query.reshape(y.shape))
        if attn.lepe is not None:
            values.write(rows, others[1].reshape(y.shape))
        return kv_state(*others, feature_map=attn.feature_map, mask=token_mask(mask, rows))

    def read_from_state(rows: slice) -> Tensor:
        query = in_full(queries.map[:, rows])
        tokens = query.flatten(1, 2).unflatten(-1, heads)
        y = read_state(tokens, state, attn.feature_map, mask=token_mask(mask, rows))
        y = y.reshape(query.shape)
        if attn.lepe is not None:
            y = y + conv_rows(attn.lepe, values.map, mask, rows)
        if attn.output_gate is not None:
            # The norm is computed again, so that no map of the gates has to stay.
            y = y * attn.output_gate(block.norm1(in_full(encoded.map[:, rows])))
        y = encoded.map[:, rows] + scale(attn.proj(y), block.gamma1)
        # A chunk is passed to the FFN while it is in the cache. An FFN with a halo reads the
        # neighbouring chunks as well, so it runs when all of them are there.
        return y if whole_ffn else feed_forward(block, y, None)

    state = sum_states([add_to_state(rows) for rows in chunks])
    out = RowBuffer(x.shape[1], encoded.map)
    for rows in chunks:
        out.write(rows, read_from_state(rows))
    return feed_forward(block, out.map, mask) if whole_ffn else out.map


def feed_forward(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """x plus the FFN of its norm. If the FFN has no halo, the result overwrites x."""

    def branch(x: Tensor, mask: Tensor | None) -> Tensor:
        return scale(block.ffn(block.norm2(x), mask), block.gamma2)

    width, halo = reach_of_ffn(block.ffn)
    out = RowBuffer(x.shape[1], None if halo else x)
    for rows in row_chunks(x, width, halo):
        out.write(rows, x[:, rows] + with_halo(branch, x, mask, rows, halo))
    return out.map


def row_chunks(x: Tensor, channels: int, halo: int = 0) -> list[slice]:
    """Divide the rows of a map into chunks.

    Args:
        x: The map (B, H, W, C).
        channels: Channels of the widest temporary, which has the grid of the map, in the dtype to
            compute in.
        halo: Rows that are read beyond either end of a chunk.
    """
    batch, height, width, _ = x.shape
    return divide(height, batch * width * channels * full_dtype(x).itemsize, halo)


def divide(height: int, bytes_per_row: int, halo: int) -> list[slice]:
    """Divide rows into chunks, from the bytes that each row of their widest temporary takes."""
    budget = BUDGET * GRAD_FACTOR if torch.is_grad_enabled() else BUDGET
    step = max(1, ROWS_PER_HALO * halo, budget // max(1, bytes_per_row))
    return [slice(start, min(start + step, height)) for start in range(0, max(1, height), step)]


def with_halo(
    function: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor | ImageRows,
    mask: Tensor | None,
    rows: slice,
    halo: int,
    stride: int = 1,
) -> Tensor:
    """Some rows of the output of a function, computed from the rows of the map that they depend on.

    Args:
        function: Maps a map and its mask to a map. At a cut, `halo` rows of its output may be
            wrong, because it reads zeros in place of the rows beyond the cut.
        x: The whole map.
        mask: Its mask, or None.
        rows: The rows of the output to compute.
        halo: Rows of the output to compute and drop at either end.
        stride: Rows of the map per row of the output.
    """
    start = max(0, rows.start - halo)
    read = slice(stride * start, stride * (rows.stop + halo))
    part = x[:, read] if isinstance(x, ImageRows) else in_full(x[:, read])
    out = function(part, None if mask is None else mask[:, read])
    return out[:, rows.start - start : rows.stop - start]


def conv_rows(conv: DepthwiseConv2d, x: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """Some rows of a depthwise convolution of a map."""
    return with_halo(lambda x, m: conv(mask_padding(x, m)), x, mask, rows, halo_of(conv))


def halo_of(conv: DepthwiseConv2d | None) -> int:
    """Rows that a depthwise convolution reads above and below each row that it writes."""
    return 0 if conv is None else conv.kernel_size[0] // 2


def reach_of_ffn(ffn: FFN | ChannelMix) -> tuple[int, int]:
    """Channels of the widest temporary of an FFN, and its halo."""
    if isinstance(ffn, ChannelMix):
        return ffn.key.out_features, 0 if ffn.shift is None else 1
    return ffn.fc1.out_features, halo_of(ffn.dwconv)


def token_mask(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask (B, N) of the tokens in some rows."""
    return None if mask is None else mask[:, rows].flatten(1)


class RowBuffer:
    """A map that is written chunk by chunk.

    Args:
        height: H.
        reuse: A map of the same shape to overwrite if it has the dtype of a new map.
        axis: That of the rows.

    Attributes:
        map: (B, H, W, C), or (B, C, H, W); exists after the first `write`.
    """

    map: Tensor

    def __init__(self, height: int, reuse: Tensor | None = None, axis: int = 1) -> None:
        self.height = height
        self.axis = axis
        self.reuse = reuse

    def write(self, rows: slice, x: Tensor) -> None:
        if not hasattr(self, 'map'):
            shape = (*x.shape[: self.axis], self.height, *x.shape[self.axis + 1 :])
            if self.reuse is not None and self.reuse.dtype == kept_dtype(x, shape):
                self.map = self.reuse
            else:
                self.map = new_map(x, shape)
        write_map(self.map.narrow(self.axis, rows.start, rows.stop - rows.start), x)
