"""RAVLT: rank-augmented vision linear transformer, arXiv 2411.07635 (Fan, Huang & He, CVPR 2025).

Rank-augmented linear attention in the first two stages, softmax attention in the others, both with
rotary position encoding, LePE and an output gate. Written from the paper's formulas and the names
and shapes of the weights published at https://github.com/qhfan/RALA, which can be loaded without
conversion; their names are translated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from mmengine.logging import print_log
from torch import Tensor

from saga_kernels.dispatch import Impl

from ..attention import RankAugmentedAttention
from ..checkpoint import extract_state_dict, printable
from ..layers import FFN, Block, ConvNormEmbed, LayerNorm, drop_path_schedule, rotary_frequencies
from ..registry import MODELS
from .pyramid import Arch, PyramidBackbone, Stage, map_norm, resolve_arch

# Names of the weights of the backbone in published checkpoints. Those of detectors and segmentors
# have the prefix `backbone.`. The weights of a classifier, a neck or heads have other names.
PUBLISHED = re.compile(r'(backbone\.)?((patch_embed\.proj|layers\.\d+|extra_norms\.\d+)\..+)')
# Patterns in the published names and their replacements, applied in this order.
TRANSLATION = (
    (r'^patch_embed\.proj\.', r'stages.0.embed.'),
    (r'^layers\.(\d+)\.downsample\.reduction\.', lambda m: f'stages.{int(m[1]) + 1}.embed.0.'),
    (r'^layers\.(\d+)\.downsample\.norm\.', lambda m: f'stages.{int(m[1]) + 1}.embed.1.'),
    (r'^layers\.', r'stages.'),
    (r'^extra_norms\.(\d+)\.norm\.', r'norms.\1.'),
    (r'\.norm([12])\.norm\.', r'.norm\1.'),
    (r'\.pos\.', r'.cpe.'),
    (r'\.attn\.qkvo\.', r'.attn.in_proj.'),
    (r'\.gamma_([12])$', r'.gamma\1'),
)


@dataclass(frozen=True)
class RAVLTArch(Arch):
    """Also the settings for training a size: drop path rate, and initial layer scales per stage."""

    drop_path_rate: float = 0.1
    layer_scale: float | Sequence[float] = 1.0


@MODELS.register_module()
class RAVLT(PyramidBackbone):
    """RAVLT backbone: linear attention at high resolution, softmax attention at low resolution.

    Args:
        arch (str | dict): 'tiny', 'small', 'base' or 'large' (or 't', 's', 'b', 'l'); or a dict
            with `embed_dims`, `depths`, `num_heads` and optionally `mlp_ratios` (3.5), with one
            entry per stage; widths per head must be multiples of 4. Defaults to 'tiny'.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): Stages whose maps are returned. Stages after the last of
            them are not built. Defaults to (0, 1, 2, 3).
        frozen_stages (int): -1 freezes nothing, 0 the stem, n > 0 the first n stages. Defaults to
            -1.
        drop_path_rate (float, optional): Drop rate of the last block; rates grow linearly with
            depth, from 0. None uses that of `arch`, or 0.1 for a dict. Defaults to None.
        layer_scale (float | Sequence[float], optional): Initial value of the learned factors per
            channel on attention and FFN, one for all stages or one for each. None uses that of
            `arch`, or 1.0 for a dict. Defaults to None.
        linear_stages (int): Number of stages, from the first, with linear attention. The others
            have softmax attention. Defaults to 2.
        impl (str): 'auto', 'reference' or 'triton' for the linear attention; see
            `saga_kernels.dispatch`. Defaults to 'auto'.
        norm_cfg (dict): Norm after the convolutions of the stem and between stages, such as SyncBN
            for small batches on many GPUs. All other norms are LN with eps 1e-6. Defaults to
            dict(type='BN').
        norm_eval (bool): Keep batch norms, including synchronised ones, in eval mode during
            training. Defaults to False.
        pad_mask (bool): The input has one more channel, 1 inside an image and 0 in the padding of
            its batch, which then does not change the maps of the image. See
            `saga_mm.preprocessors`. Defaults to False.
        with_cp (bool): Recompute each block in the backward pass, which takes less memory and more
            time. Defaults to False.
        init_cfg (dict | list, optional): Initialisation, such as dict(type='Pretrained',
            checkpoint=PATH_OR_URL) for a published checkpoint of a classifier, detector or
            segmentor. A checkpoint that this project trained needs `prefix='backbone.'` as well.
            Defaults to None.
    """

    arch_settings: ClassVar[dict[str, RAVLTArch]] = {
        'tiny': RAVLTArch((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), (3.5,) * 4, 0.1, 1.0),
        'small': RAVLTArch((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), (3.5,) * 4, 0.15, 1.0),
        'base': RAVLTArch(
            (96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (3.5,) * 4, 0.4, (1, 1, 1e-6, 1e-6)
        ),
        'large': RAVLTArch(
            (96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), (3.5,) * 4, 0.55, 1e-6
        ),
    }

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float | None = None,
        layer_scale: float | Sequence[float] | None = None,
        linear_stages: int = 2,
        impl: Impl = 'auto',
        norm_cfg: dict = dict(type='BN'),  # noqa: B006
        norm_eval: bool = False,
        pad_mask: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        sizes = resolve_arch(arch, self.arch_settings, mlp_ratio=3.5)
        dims = sizes.embed_dims
        if linear_stages not in range(len(dims) + 1):
            raise ValueError(f'linear_stages must be from 0 to {len(dims)}, got {linear_stages!r}')
        scales = per_stage(sizes.layer_scale if layer_scale is None else layer_scale, len(dims))
        drop_paths = drop_path_schedule(
            sizes.drop_path_rate if drop_path_rate is None else drop_path_rate, sizes.depths
        )
        norm_layer = map_norm('norm_cfg', norm_cfg, pad_mask)
        channel_norm = partial(LayerNorm, eps=1e-6)

        def make_block(i: int, drop_path: float) -> Block:
            mixer = 'linear' if i < linear_stages else 'softmax'
            attention = RankAugmentedAttention(dims[i], sizes.num_heads[i], mixer=mixer, impl=impl)
            ffn = FFN(dims[i], round(dims[i] * sizes.mlp_ratios[i]), conv_kernel_size=3)
            return Block(
                attention,
                ffn,
                dims[i],
                cpe_kernel_size=3,
                drop_path=drop_path,
                norm_layer=channel_norm,
                layer_scale=scales[i],
            )

        def make_stage(i: int) -> Stage:
            if i == 0:
                widths = (*(dims[0] // 2,) * 3, dims[0])
                embed = ConvNormEmbed(
                    in_channels, widths, (2, 1, 1, 2), norm_layer, fp32_start=True
                )
            else:
                embed = ConvNormEmbed(dims[i - 1], (dims[i],), (2,), norm_layer)
            blocks = [make_block(i, rate) for rate in drop_paths[i]]
            return Stage(embed, blocks, with_cp=with_cp)

        super().__init__(
            make_stage,
            lambda i: channel_norm(dims[i]),
            num_stages=len(dims),
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            pad_mask=pad_mask,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
            impl=impl,
        )
        self.head_dims = [dim // heads for dim, heads in zip(dims, sizes.num_heads, strict=True)]
        self.register_load_state_dict_pre_hook(accept_published)

    def translate_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give published weights the names and shapes of this module, and keep all others.

        Raises:
            ValueError: The published model rotates its tokens by other angles.
        """
        translated = {}
        for name, weight in weights.items():
            if published := PUBLISHED.fullmatch(name):
                name = published[2]
                for pattern, replacement in TRANSLATION:
                    name = re.sub(pattern, replacement, name)
                if name.endswith('.RoPE.angle'):
                    self._check_angles(name, weight)
                    continue
                if weight.shape[2:] == (1, 1):
                    # a 1x1 convolution, (O, I, 1, 1), or a layer scale, (1, C, 1, 1)
                    weight = weight.flatten(1).squeeze(0) if 'gamma' in name else weight.flatten(1)
            translated[name] = weight
        return translated

    def _check_angles(self, name: str, angles: Tensor) -> None:
        stage = int(name.split('.')[1])
        if stage >= len(self.stages):
            return
        own = rotary_frequencies(self.head_dims[stage], angles.device)
        own = own.repeat_interleave(2)
        # The tolerance accepts a checkpoint in half precision.
        if angles.shape != own.shape or not torch.allclose(angles.float(), own, rtol=1e-2):
            raise ValueError(
                f'layers.{stage}.RoPE.angle must hold {len(own)} angles from 1 to 1e-4, got '
                f'{tuple(angles.shape)} angles from {angles.max():.3g} to {angles.min():.3g}'
            )


def accept_published(module: RAVLT, state_dict: dict, prefix: str, *_: object) -> None:
    """Hook before `load_state_dict` that lets a published checkpoint be loaded, also with `strict`.

    `translate_weights` translates the names. Weights that the backbone does not have are left out:
    those of the classifier, or of the neck and the heads. The checkpoint of a classifier has no
    norms of outputs, so the module keeps its own.
    """
    own = {name: weight for name, weight in state_dict.items() if name.startswith(prefix)}
    weights = {name[len(prefix) :]: weight for name, weight in own.items()}
    if not prefix:
        weights = extract_state_dict(weights)
    published = {name for name in weights if PUBLISHED.fullmatch(name)}
    if not published:
        return
    for name in own:
        del state_dict[name]
    if dropped := sorted(weights.keys() - published):
        print_log(f'RAVLT: left out {", ".join(map(printable, dropped))}', logger='current')
    norms = {f'norms.{name}': norm for name, norm in module.norms.state_dict().items()}
    if any('extra_norms.' in name for name in published):
        norms = {}
    translated = module.translate_weights({name: weights[name] for name in published})
    state_dict.update({prefix + name: weight for name, weight in {**norms, **translated}.items()})


def per_stage(value: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """The initial value of the layer scales of each stage."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(values) != stages or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f'layer_scale must be a number or {stages} of them, got {value!r}')
    return values
