"""SoLA-Vision: linear or softmax attention for each layer, arXiv 2601.11164 (Li et al., 2026).

Stated by the paper: hybrids that choose linear or softmax attention for each layer, with a small
number of global softmax layers among linear ones. Chosen by this project: widths, depths and the
default places of the softmax layers, gated linear attention as the linear layer, the block (that of
SAGA), and the form of HSB, which passes early features to stage 3. We know that linear attention
with distance decay and HSB are parts of the paper, but not their exact form.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import nn

from saga_kernels.dispatch import Impl

from ..attention import DecayLinearAttention, GatedLinearAttention, SoftmaxAttention
from ..layers import FFN, HSB, Block, ConvStem, PatchEmbed, drop_path_schedule
from ..registry import MODELS
from .pyramid import Arch, PyramidBackbone, Stage, channel_norm, resolve_arch

LINEAR: dict[str, Callable[..., nn.Module]] = {
    'gated': GatedLinearAttention,
    'plain': partial(GatedLinearAttention, gated=False),
    'decay': DecayLinearAttention,
}
# The pattern of a stage with a given depth: softmax (S) and linear (L) layers. All presets except
# 'linear' and 'softmax' have the same number of softmax layers, in stages 3 and 4 only.
PRESETS: dict[str, Callable[[int], str]] = {
    'linear': lambda depth: 'L' * depth,
    'every_3rd': lambda depth: ('LLS' * depth)[-depth:],
    'last': lambda depth: 'L' * (depth * 2 // 3) + 'S' * -(-depth // 3),
    'front': lambda depth: 'S' * -(-depth // 3) + 'L' * (depth * 2 // 3),
    'softmax': lambda depth: 'S' * depth,
}
STAGES = 4


def resolve_layers(
    arch: str | Mapping, layers: str | Sequence[str], known: Mapping[str, Arch]
) -> tuple[Arch, tuple[str, ...]]:
    """The architecture, and the pattern of each stage, whose length is the depth of the stage.

    Raises:
        ValueError: `layers` is neither a preset nor four strings of L and S, or `arch` is wrong, as
            in `resolve_arch`.
    """
    preset = PRESETS.get(layers) if isinstance(layers, str) else None
    if preset is None:
        check_patterns(layers)
        if isinstance(arch, Mapping):
            arch = {'depths': tuple(len(pattern) for pattern in layers), **arch}
    sizes = resolve_arch(arch, known)
    if len(sizes.depths) != STAGES:
        raise ValueError(f'arch must have {STAGES} stages, got {len(sizes.depths)}')
    if preset is None:
        return replace(sizes, depths=tuple(len(pattern) for pattern in layers)), tuple(layers)
    early = PRESETS['softmax' if layers == 'softmax' else 'linear']
    return sizes, tuple((early if i < 2 else preset)(n) for i, n in enumerate(sizes.depths))


def check_patterns(layers: Sequence[str]) -> None:
    if (
        not isinstance(layers, list | tuple)
        or len(layers) != STAGES
        or not all(isinstance(p, str) and re.fullmatch('[LS]+', p) for p in layers)
    ):
        raise ValueError(
            f"layers must be {STAGES} strings of L and S, such as ('LL', 'LL', 'LLSLLS', 'LS'), or "
            f'one of {tuple(PRESETS)}, got {layers!r}'
        )


def warn_of_early_softmax(layers: Sequence[str], side: int = 1024) -> None:
    """Warn how many scores softmax attention in stage 1 or 2 computes for side x side pixels."""
    scores = [
        f'{(side // stride) ** 2:,} x {(side // stride) ** 2:,} scores per head in stage {i + 1}'
        for i, (pattern, stride) in enumerate(zip(layers[:2], (4, 8), strict=True))
        if 'S' in pattern
    ]
    if scores:
        warnings.warn(
            f'layers={tuple(layers)} has softmax attention at high resolution: at {side}x{side} '
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
        layers (str | Sequence[str]): The pattern: four strings, one per stage, with one letter per
            layer, L for linear and S for global softmax attention, as in
            ('LL', 'LL', 'LLSLLS', 'LS'). The pattern replaces the depths of `arch`, which may then
            have none. Or the name of a preset, which uses the depths of `arch`: 'every_3rd' has a
            softmax layer at every third place of stages 3 and 4, counted back from the last layer;
            'last' and 'front' have the same number of them at the end and at the start; 'linear'
            has none; in 'softmax' all layers of all stages are softmax layers. Defaults to
            'every_3rd'.
        linear (str): Kind of the linear layers: 'gated', as in SAGA; 'plain', without gates; or
            'decay', where weights decay with the distance in a scan of the map. Defaults to
            'gated'.
        hsb (bool): Add the outputs of stages 1 and 2 to the input of stage 3; see
            `saga_mm.layers.HSB`. Defaults to True.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): Stages whose maps are returned. Stages after the last of
            them are not built. Defaults to (0, 1, 2, 3).
        frozen_stages (int): -1 freezes nothing, 0 the stem, n > 0 the first n stages. Defaults to
            -1.
        drop_path_rate (float): Drop rate of the last block; rates grow linearly with depth, from
            0. Defaults to 0.1.
        cpe_kernel_size (int): Kernel size of the depthwise convolution that encodes position at the
            start of each block; 0 for no convolution. Defaults to 3.
        lepe_kernel_size (int): Kernel size of the depthwise convolution of v that is added to the
            attention; 0 for no convolution. Defaults to 3.
        feature_map (str): Feature map of the linear layers, 'elu' (ELU + 1) or 'relu'. Defaults to
            'elu'.
        impl (str): Implementation of the linear layers, 'auto', 'reference' or 'triton'; see
            `saga_kernels.dispatch`. Defaults to 'auto'.
        norm_cfg (dict): Norm over channels. Defaults to dict(type='LN', eps=1e-6).
        pad_mask (bool): The input has one more channel, 1 inside an image and 0 in the padding of
            its batch, which then does not change the maps of the image. See
            `saga_mm.preprocessors`. Defaults to False.
        with_cp (bool): Recompute each block in the backward pass, which takes less memory and more
            time. Defaults to False.
        init_cfg (dict, optional): Initialisation, such as dict(type='Pretrained', checkpoint=PATH,
            prefix='backbone.'). Defaults to None.
    """

    arch_settings: ClassVar[dict[str, Arch]] = {
        'tiny': Arch((64, 128, 320, 512), (2, 2, 6, 2), (2, 4, 10, 16), (3, 3, 3, 3)),
        'small': Arch((64, 128, 320, 512), (3, 5, 12, 3), (2, 4, 10, 16), (3, 3, 3, 3)),
        'base': Arch((96, 192, 384, 512), (4, 6, 15, 6), (3, 6, 12, 16), (3, 3, 3, 3)),
    }

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        layers: str | Sequence[str] = 'every_3rd',
        linear: str = 'gated',
        hsb: bool = True,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float = 0.1,
        cpe_kernel_size: int = 3,
        lepe_kernel_size: int = 3,
        feature_map: str = 'elu',
        impl: Impl = 'auto',
        norm_cfg: dict = dict(type='LN', eps=1e-6),  # noqa: B006
        pad_mask: bool = False,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        sizes, patterns = resolve_layers(arch, layers, self.arch_settings)
        if linear not in LINEAR:
            raise ValueError(f'linear must be one of {tuple(LINEAR)}, got {linear!r}')
        warn_of_early_softmax(patterns)
        dims = sizes.embed_dims
        norm_layer = channel_norm(norm_cfg)
        drop_paths = drop_path_schedule(drop_path_rate, sizes.depths)
        mixers: dict[str, Callable[..., nn.Module]] = {
            'L': partial(LINEAR[linear], feature_map=feature_map, impl=impl),
            'S': SoftmaxAttention,
        }

        def make_block(i: int, kind: str, drop_path: float) -> Block:
            attention = mixers[kind](dims[i], sizes.num_heads[i], lepe_kernel_size=lepe_kernel_size)
            return Block(
                attention,
                FFN(dims[i], round(dims[i] * sizes.mlp_ratios[i])),
                dims[i],
                cpe_kernel_size=cpe_kernel_size,
                drop_path=drop_path,
                norm_layer=norm_layer,
            )

        def make_stage(i: int) -> Stage:
            if i == 0:
                embed: nn.Module = ConvStem(in_channels, dims[0], norm_layer)
            else:
                embed = PatchEmbed(dims[i - 1], dims[i], 2, True, norm_layer)
            blocks = [
                make_block(i, *layer) for layer in zip(patterns[i], drop_paths[i], strict=True)
            ]
            early = HSB(dims[:2], dims[2], strides=(4, 2)) if i == 2 and hsb else None
            return Stage(embed, blocks, with_cp=with_cp, hsb=early)

        super().__init__(
            make_stage,
            lambda i: norm_layer(dims[i]),
            num_stages=STAGES,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            pad_mask=pad_mask,
            init_cfg=init_cfg,
        )
        self.layers = patterns
