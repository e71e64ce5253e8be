"""SoLA-Vision: linear or softmax attention for each layer, arXiv 2601.11164 (Li et al., 2026).

Stated by the paper, in its figure, equations and tables: four stages with patch embedding and patch
merging; WKV linear layers, of the RWKV family, with a gated FFN; a few global softmax layers in
stages 3 and 4; Hidden State Bridges from linear layers to softmax layers; depths and pattern of T;
the number of parameters of T, S and B. Chosen by this project, because they are not stated: widths,
heads, depths and patterns of S and B, the softmax layer, and the details of the WKV layer and the
bridge; see `WKVAttention`, `ChannelMix` and `HiddenStateBridge`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import nn

from saga_kernels.dispatch import Impl
from saga_kernels.validation import check_decay_per, check_feature_map

from ..attention import LINEAR, SoftmaxAttention
from ..layers import (
    Block,
    ChannelMix,
    ConvStem,
    HiddenStateBridge,
    PatchEmbed,
    drop_path_schedule,
)
from ..registry import MODELS
from .pyramid import Arch, PyramidBackbone, Stage, channel_norm, resolve_arch, resolve_out_indices

# The pattern of a stage with a given depth: softmax (S) and linear (L) layers. All presets except
# 'linear' and 'softmax' have the same number of softmax layers, in stages 3 and 4 only.
PRESETS: dict[str, Callable[[int], str]] = {
    'linear': lambda depth: 'L' * depth,
    'every_3rd': lambda depth: ('LLS' * depth)[-depth:],
    'last': lambda depth: 'L' * (depth * 2 // 3) + 'S' * -(-depth // 3),
    'front': lambda depth: 'S' * -(-depth // 3) + 'L' * (depth * 2 // 3),
    'softmax': lambda depth: 'S' * depth,
}
# The patterns of stage 3 that the paper compares in its Table 2; all other layers are linear there.
TABLE_2 = (
    'LLLLLL',
    'SLLLLL',
    'SSLLLL',
    'SSSLLL',
    'LLLLLS',
    'LLLLSS',
    'LLLSSS',
    'LLSLLS',
    'LSLSLS',
    'SSSSSS',
)
STAGES = 4
EMBEDS = ('plain', 'conv', 'overlap')
Pattern = str | Sequence[str]
# Source stage, source layer, target stage, target layer, counted from 1.
Bridge = tuple[int, int, int, int]


def resolve_pattern(
    arch: str | Mapping, pattern: Pattern, known: Mapping[str, Arch]
) -> tuple[Arch, tuple[str, ...]]:
    """The architecture, and the pattern of each stage, whose length is the depth of the stage.

    Raises:
        ValueError: `pattern` is not one that `SoLAVision` takes, or `arch` is wrong, as in
            `resolve_arch`.
    """
    if isinstance(pattern, str) and pattern in PRESETS:
        sizes = check_stages(resolve_arch(arch, known))
        presets = [PRESETS['softmax' if pattern == 'softmax' else 'linear']] * 2
        presets += [PRESETS[pattern]] * 2
        return sizes, tuple(p(n) for p, n in zip(presets, sizes.depths, strict=True))
    if isinstance(pattern, str) and re.fullmatch('[LS]+', pattern):
        sizes = check_stages(resolve_arch(arch, known))
        others = ['L' * n for n in sizes.depths]
        patterns: tuple[str, ...] = (*others[:2], pattern, *others[3:])
    else:
        patterns = split_pattern(pattern)
        if isinstance(arch, Mapping):
            arch = {'depths': tuple(map(len, patterns)), **arch}
        sizes = check_stages(resolve_arch(arch, known))
    return replace(sizes, depths=tuple(map(len, patterns))), patterns


def check_stages(sizes: Arch) -> Arch:
    if len(sizes.depths) != STAGES:
        raise ValueError(f'arch must have {STAGES} stages, got {len(sizes.depths)}')
    return sizes


def split_pattern(pattern: Pattern) -> tuple[str, ...]:
    """The patterns of the stages from a sequence, or from a string with slashes or commas."""
    patterns = re.split(r' ?[/,] ?', pattern) if isinstance(pattern, str) else pattern
    if (
        not isinstance(patterns, list | tuple)
        or len(patterns) != STAGES
        or not all(isinstance(p, str) and re.fullmatch('[LS]+', p) for p in patterns)
    ):
        raise ValueError(
            f"pattern must be {STAGES} strings of L and S, such as ('LL', 'LL', 'LLSLLS', 'LS'), "
            f"one such as 'LL/LL/LLSLLS/LS', one for stage 3 such as 'LLSLLS', or one of "
            f'{tuple(PRESETS)}, got {pattern!r}'
        )
    return tuple(patterns)


def default_bridges(patterns: Sequence[str]) -> tuple[Bridge, ...]:
    """The bridges of a pattern: the n-th softmax layer gets the hidden state of the n-th run of
    linear layers, if that lies in an earlier stage, and none otherwise.

    A run is a sequence of linear layers of one stage without a softmax layer between them. Its
    hidden state is that of its last layer.
    """
    softmax = [(i, j) for i, p in enumerate(patterns, 1) for j, s in enumerate(p, 1) if s == 'S']
    runs = [(i, run.end()) for i, p in enumerate(patterns, 1) for run in re.finditer('L+', p)]
    pairs = zip(runs, softmax, strict=False)
    return tuple((*source, *target) for source, target in pairs if source[0] < target[0])


def check_bridges(bridges: object, patterns: Sequence[str]) -> tuple[Bridge, ...]:
    """Check explicit bridges; ValueError names the one that is wrong."""
    if not isinstance(bridges, list | tuple):
        raise ValueError(
            "bridges must be 'auto' or a sequence of (source stage, source layer, target stage, "
            f'target layer), counted from 1, got {bridges!r}'
        )
    places = {(i, j): s for i, p in enumerate(patterns, 1) for j, s in enumerate(p, 1)}
    checked: dict[tuple[int, int], Bridge] = {}
    for bridge in bridges:
        if (
            not isinstance(bridge, list | tuple)
            or len(bridge) != 4
            or not all(type(number) is int for number in bridge)
            or not places.keys() >= {tuple(bridge[:2]), tuple(bridge[2:])}
        ):
            raise ValueError(
                'bridges must contain (source stage, source layer, target stage, target layer), '
                f'counted from 1, of the layers {tuple(patterns)}, got {bridge!r}'
            )
        source, target = tuple(bridge[:2]), tuple(bridge[2:])
        if places[source] != 'L' or places[target] != 'S' or source > target:
            raise ValueError(
                'bridges must lead from a linear layer to a softmax layer after it, got '
                f'{bridge!r} for the layers {tuple(patterns)}'
            )
        if target in checked:
            raise ValueError(
                f'bridges must have one bridge for each softmax layer, got {checked[target]} and '
                f'{tuple(bridge)}'
            )
        checked[target] = (*source, *target)
    return tuple(checked.values())


def warn_of_early_softmax(patterns: Sequence[str], side: int = 1024) -> None:
    """Warn how many scores softmax attention in stage 1 or 2 computes for side x side pixels."""
    scores = [
        f'{(side // stride) ** 2:,} x {(side // stride) ** 2:,} scores per head in stage {i + 1}'
        for i, (pattern, stride) in enumerate(zip(patterns[:2], (4, 8), strict=True))
        if 'S' in pattern
    ]
    if scores:
        warnings.warn(
            f'pattern={tuple(patterns)} has softmax attention at high resolution: at {side}x{side} '
            f'pixels each such layer computes {" and ".join(scores)}',
            stacklevel=3,
        )


@MODELS.register_module()
class SoLAVision(PyramidBackbone):
    """SoLA-Vision backbone, whose pattern gives each layer linear or softmax attention.

    Args:
        arch (str | dict): 'tiny', 'small' or 'base' (or 't', 's', 'b'); or a dict with
            `embed_dims`, `num_heads`, `depths` and optionally `mlp_ratios` (4), with one entry per
            stage. Defaults to 'tiny'.
        pattern (str | Sequence[str]): One letter per layer, L for linear and S for global softmax
            attention: four strings, one per stage, as in ('LL', 'LL', 'LLSLLS', 'LS') or
            'LL/LL/LLSLLS/LS', which replace the depths of `arch`, so that it may have none; or one
            string for stage 3, as in the paper's Table 2 ('LLSLLS'), with all other layers linear.
            Or the name of a preset, which uses the depths of `arch`: 'every_3rd' has a softmax
            layer at every third place of stages 3 and 4, counted back from the last layer; 'last'
            and 'front' have the same number of them at the end and at the start; 'linear' has none;
            in 'softmax' all layers of all stages are softmax layers. Defaults to 'every_3rd', which
            is the pattern of the paper for 'tiny'.
        layers (str | Sequence[str], optional): Another name of `pattern`. Defaults to None.
        linear (str): Kind of the linear layers: 'wkv', as in the paper; 'gated', as in SAGA;
            'plain', without gates; or 'decay', where weights decay with the distance in a scan of
            the map. Defaults to 'wkv'.
        bridges (str | Sequence[Sequence[int]]): Hidden State Bridges, each a tuple of source stage,
            source layer, target stage and target layer, counted from 1, from a linear layer to a
            later softmax layer. () is none. 'auto' gives the n-th softmax layer the hidden state of
            the last layer of the n-th run of linear layers, if that lies in an earlier stage. For
            'tiny' these are the bridges of the paper: ((1, 2, 3, 3), (2, 2, 3, 6), (3, 2, 4, 2)).
            Defaults to 'auto'.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): Stages whose maps are returned. Stages after the last of
            them are not built, nor are bridges into them. Defaults to (0, 1, 2, 3).
        frozen_stages (int): -1 freezes nothing, 0 the first patch embedding, n > 0 the first n
            stages. Defaults to -1.
        drop_path_rate (float): Drop rate of the last block; rates grow linearly with depth, from
            0. Defaults to 0.1.
        patch_embed (str): 'plain' is patches of 4x4 pixels and merging of 2x2 tokens, as in the
            paper; 'conv' is two 3x3 convolutions of stride 2 before the first stage and one before
            each other stage; 'overlap' is 7x7 patches of stride 4, then 3x3 patches of stride 2.
            Defaults to 'plain'.
        decay_per (str): 'image' or 'token': whether the decay of a WKV layer is relative to the
            number of tokens of the image; see `saga_mm.attention.WKVAttention`. Defaults to
            'image', so that a layer reaches the same share of larger images than it was trained on.
        token_shift (str, optional): 'q_shift' mixes each token with its neighbours before WKV and
            before the FFN, as in Vision-RWKV; see `saga_mm.layers.QShift`. Defaults to None,
            because the figure of the paper has none.
        cpe_kernel_size (int): Kernel size of the depthwise convolution that encodes position at the
            start of each block; 0 for no convolution. Defaults to 0, because the figure has none.
            The layers 'gated' and 'plain' do not know the place of a token without it.
        lepe_kernel_size (int): Kernel size of the depthwise convolution of v that is added to the
            attention; 0 for no convolution. Defaults to 0, because the figure has none.
        feature_map (str): Feature map of linear layers other than 'wkv', 'elu' (ELU + 1) or 'relu'.
            Defaults to 'elu'.
        impl (str): Implementation of the linear layers, 'auto', 'reference' or 'triton'; see
            `saga_kernels.dispatch`. Defaults to 'auto'.
        norm_cfg (dict): Norm over channels. Defaults to dict(type='LN', eps=1e-6).
        pad_mask (bool): The input has one more channel, 1 inside an image and 0 in the padding of
            its batch, which then does not change the maps of the image. See
            `saga_mm.preprocessors`. Defaults to False.
        with_cp (bool): Recompute each block in the backward pass, which takes less memory and more
            time. Defaults to False.
        init_cfg (dict | list, optional): Initialisation, such as dict(type='Pretrained',
            checkpoint=PATH, prefix='backbone.'). Defaults to None.
    """

    arch_settings: ClassVar[dict[str, Arch]] = {
        'tiny': Arch((96, 128, 192, 288), (2, 2, 6, 2), (3, 4, 6, 9), (4, 4, 4, 4)),
        'small': Arch((96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24), (4, 4, 4, 4)),
        'base': Arch((128, 256, 512, 1024), (2, 2, 16, 2), (4, 8, 16, 32), (4, 4, 4, 4)),
    }

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        pattern: Pattern = 'every_3rd',
        linear: str = 'wkv',
        bridges: str | Sequence[Sequence[int]] = 'auto',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float = 0.1,
        patch_embed: str = 'plain',
        decay_per: str = 'image',
        token_shift: str | None = None,
        cpe_kernel_size: int = 0,
        lepe_kernel_size: int = 0,
        feature_map: str = 'elu',
        impl: Impl = 'auto',
        norm_cfg: dict = dict(type='LN', eps=1e-6),  # noqa: B006
        pad_mask: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
        layers: Pattern | None = None,
    ) -> None:
        if layers is not None:
            if pattern != 'every_3rd':
                raise ValueError(
                    f'layers is another name of pattern: give one of them, got {layers!r} and '
                    f'{pattern!r}'
                )
            pattern = layers
        sizes, patterns = resolve_pattern(arch, pattern, self.arch_settings)
        if linear not in LINEAR:
            raise ValueError(f'linear must be one of {tuple(LINEAR)}, got {linear!r}')
        if patch_embed not in EMBEDS:
            raise ValueError(f'patch_embed must be one of {EMBEDS}, got {patch_embed!r}')
        if token_shift not in (None, 'q_shift'):
            raise ValueError(f"token_shift must be None or 'q_shift', got {token_shift!r}")
        check_feature_map(feature_map)
        check_decay_per(decay_per)
        links = default_bridges(patterns) if bridges == 'auto' else check_bridges(bridges, patterns)
        warn_of_early_softmax(patterns)
        dims = sizes.embed_dims
        norm_layer = channel_norm(norm_cfg)
        drop_paths = drop_path_schedule(drop_path_rate, sizes.depths)
        shifts = token_shift is not None
        options = (
            dict(decay_per=decay_per, token_shift=shifts)
            if linear == 'wkv'
            else dict(feature_map=feature_map)
        )
        mixers: dict[str, Callable[..., nn.Module]] = {
            'L': partial(LINEAR[linear], impl=impl, **options),
            'S': SoftmaxAttention,
        }
        used = resolve_out_indices(out_indices, STAGES)[-1] + 1
        links = tuple(link for link in links if link[2] <= used)
        # in the order in which the forward pass gives them
        sources = sorted({link[:2] for link in links})

        def make_block(i: int, j: int) -> Block:
            attention: Any = mixers[patterns[i][j]](
                dims[i], sizes.num_heads[i], lepe_kernel_size=lepe_kernel_size
            )
            if (i + 1, j + 1) in sources:
                attention.returns_state = True
            return Block(
                attention,
                ChannelMix(dims[i], round(dims[i] * sizes.mlp_ratios[i]), token_shift=shifts),
                dims[i],
                cpe_kernel_size=cpe_kernel_size,
                drop_path=drop_paths[i][j],
                norm_layer=norm_layer,
            )

        def make_stage(i: int) -> Stage:
            channels, stride = (dims[i - 1], 2) if i else (in_channels, 4)
            if i == 0 and patch_embed == 'conv':
                embed: nn.Module = ConvStem(channels, dims[i], norm_layer)
            else:
                embed = PatchEmbed(channels, dims[i], stride, patch_embed != 'plain', norm_layer)
            blocks = [make_block(i, j) for j in range(sizes.depths[i])]
            into = {
                layer - 1: (
                    sources.index((start, first)),
                    HiddenStateBridge(dims[start - 1], dims[i], stride=2 ** (i + 1 - start)),
                )
                for start, first, stage, layer in links
                if stage == i + 1
            }
            return Stage(embed, blocks, with_cp=with_cp, bridges=into)

        super().__init__(
            make_stage,
            lambda i: norm_layer(dims[i]),
            num_stages=STAGES,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            pad_mask=pad_mask,
            init_cfg=init_cfg,
            impl=impl,
        )
        self.pattern = patterns
