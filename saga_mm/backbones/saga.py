"""SAGA: pyramid of gated linear attention, arXiv 2509.12817 (Cao & Wang, 2025).

Stated by the paper: linear attention with input-adaptive gates on what enters the KV state,
factorised by a Hadamard product, in place of the attention of PVT. Chosen by this project, because
the paper's code is not public: the exact gate (see `saga_kernels.gated_linear_attention`), its
initial values, the output gate (which is that of RAVLT), LePE, conditional positional encoding, the
convolutional stem and overlapping patches. Each choice is an option of `SAGA`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from saga_kernels.dispatch import Impl

from ..attention import LINEAR
from ..layers import FFN, Block, ConvNormEmbed, ConvStem, PatchEmbed, drop_path_schedule
from ..registry import MODELS
from .pyramid import Arch, PyramidBackbone, Stage, channel_norm, map_norm, resolve_arch

# the attentions that have an output gate, and a norm of queries and keys
WITH_OPTIONS = ('gated', 'plain')


@MODELS.register_module()
class SAGA(PyramidBackbone):
    """SAGA backbone: a pyramid with linear cost in the number of pixels, for images of any size.

    Args:
        arch (str | dict): 'tiny', 'small', 'medium' or 'large' (or 't', 's', 'm', 'l'), which have
            the widths and depths of PVT; or a dict with `embed_dims`, `depths`, `num_heads` and
            optionally `mlp_ratios` (4), with one entry per stage. Defaults to 'tiny'.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (int | Sequence[int]): Stages whose maps are returned. Stages after the last of
            them are not built. Defaults to (0, 1, 2, 3).
        frozen_stages (int): -1 freezes nothing, 0 the first patch embedding, n > 0 the first n
            stages. Defaults to -1.
        drop_path_rate (float): Drop rate of the last block; rates grow linearly with depth, from
            0. Defaults to 0.1.
        patch_embed (str): 'conv' is two 3x3 convolutions of stride 2 before the first stage and
            one before each other stage; 'overlap' is 7x7 patches of stride 4, then 3x3 patches of
            stride 2; 'plain' is patches that do not overlap, as in PVT. Defaults to 'conv'.
        cpe_kernel_size (int): Kernel size of the depthwise convolution that encodes position at the
            start of each block; 0 for no convolution. Defaults to 3.
        lepe_kernel_size (int): Kernel size of the depthwise convolution of v that is added to the
            attention; 0 for no convolution. Defaults to 3.
        attention (str): 'gated', the attention of SAGA, or another name in
            `saga_mm.attention.LINEAR`, such as one that `register_attention` has added. Defaults to
            'gated'.
        gated (bool): Apply gates to what enters the KV state. False gives plain linear attention.
            Defaults to True.
        gate_bias (float): Initial bias of the gate logits, so that gates start near
            sigmoid(gate_bias). Defaults to 2.0.
        qk_norm (Sequence[float], optional): Normalise queries and keys in each head, with this
            initial gain and bias. None for no norm. See `saga_mm.layers.QKNorm`. Defaults to None.
        output_gate (bool, optional): Multiply the output of attention, before its projection, by a
            gate that is a linear function of the token. See `saga_mm.attention.PackedAttention`.
            None gives the attentions 'gated' and 'plain' this gate, which others do not have.
            Defaults to None.
        ffn_kernel_size (int): Kernel size of a depthwise convolution in the FFN, whose input is
            added to it, as in PVTv2 and RAVLT; 0 for no convolution. Defaults to 0.
        layer_scale (float, optional): Initial value of a learned factor per channel on attention
            and FFN. None for no factor. Defaults to None.
        feature_map (str): 'elu' (ELU + 1) or 'relu'. Defaults to 'elu'.
        impl (str): 'auto', 'reference' or 'triton'; see `saga_kernels.dispatch`. Defaults to
            'auto'.
        norm_cfg (dict): Norm over channels. Defaults to dict(type='LN', eps=1e-6).
        embed_norm_cfg (dict, optional): Norm of maps after each convolution of
            `patch_embed='conv'`: dict(type='BN'), or SyncBN for small batches on many GPUs.
            None for `norm_cfg`. Defaults to None.
        norm_eval (bool): Keep batch norms, including synchronised ones, in eval mode during
            training. Defaults to False.
        pad_mask (bool): The input has one more channel, 1 inside an image and 0 in the padding of
            its batch, which then does not change the maps of the image. See
            `saga_mm.preprocessors`. Defaults to False.
        with_cp (bool): Recompute each block in the backward pass, which takes less memory and more
            time. Defaults to False.
        init_cfg (dict | list, optional): Initialisation, such as dict(type='Pretrained',
            checkpoint=PATH, prefix='backbone.'). Defaults to None.
    """

    arch_settings: ClassVar[dict[str, Arch]] = {
        'tiny': Arch((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), (8, 8, 4, 4)),
        'small': Arch((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
        'medium': Arch((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
        'large': Arch((64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8), (8, 8, 4, 4)),
    }

    def __init__(
        self,
        arch: str | Mapping = 'tiny',
        in_channels: int = 3,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        drop_path_rate: float = 0.1,
        patch_embed: str = 'conv',
        cpe_kernel_size: int = 3,
        lepe_kernel_size: int = 3,
        attention: str = 'gated',
        gated: bool = True,
        gate_bias: float = 2.0,
        qk_norm: Sequence[float] | None = None,
        output_gate: bool | None = None,
        ffn_kernel_size: int = 0,
        layer_scale: float | None = None,
        feature_map: str = 'elu',
        impl: Impl = 'auto',
        norm_cfg: dict = dict(type='LN', eps=1e-6),  # noqa: B006
        embed_norm_cfg: dict | None = None,
        norm_eval: bool = False,
        pad_mask: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        sizes = resolve_arch(arch, self.arch_settings)
        if patch_embed not in ('conv', 'overlap', 'plain'):
            raise ValueError(
                f"patch_embed must be 'conv', 'overlap' or 'plain', got {patch_embed!r}"
            )
        if embed_norm_cfg and patch_embed != 'conv':
            raise ValueError(f"embed_norm_cfg is for patch_embed='conv', got {patch_embed!r}")
        if attention not in LINEAR:
            raise ValueError(f'attention must be one of {tuple(LINEAR)}, got {attention!r}')
        if attention != 'gated' and not gated:
            raise ValueError(f"gated=False is for attention='gated', got attention={attention!r}")
        options: dict[str, Any] = dict(lepe_kernel_size=lepe_kernel_size, impl=impl)
        if attention != 'wkv':
            options['feature_map'] = feature_map
        if attention == 'gated':
            options.update(gated=gated, gate_bias=gate_bias)
        if output_gate:
            check_takes('output_gate', attention)
        if attention in WITH_OPTIONS:
            options['output_gate'] = output_gate is None or bool(output_gate)
        if qk_norm is not None:
            check_takes('qk_norm', attention)
            check_qk_norm(qk_norm)
            options['qk_norm'] = tuple(qk_norm)
        dims = sizes.embed_dims
        norm_layer = channel_norm(norm_cfg)
        drop_paths = drop_path_schedule(drop_path_rate, sizes.depths)

        def make_block(i: int, drop_path: float) -> Block:
            mixer = LINEAR[attention](dims[i], sizes.num_heads[i], **options)
            ffn = FFN(dims[i], round(dims[i] * sizes.mlp_ratios[i]), ffn_kernel_size)
            return Block(
                mixer,
                ffn,
                dims[i],
                cpe_kernel_size=cpe_kernel_size,
                drop_path=drop_path,
                norm_layer=norm_layer,
                layer_scale=layer_scale,
            )

        def make_stage(i: int) -> Stage:
            channels, stride = (dims[i - 1], 2) if i else (in_channels, 4)
            embed: nn.Module
            if embed_norm_cfg:
                map_norm_layer = map_norm('embed_norm_cfg', embed_norm_cfg, pad_mask)
                widths = (dims[i],) if i else (-(-dims[i] // 2), dims[i])
                embed = ConvNormEmbed(
                    channels, widths, (2,) * len(widths), map_norm_layer, fp32_start=i == 0
                )
            elif i == 0 and patch_embed == 'conv':
                embed = ConvStem(channels, dims[i], norm_layer)
            else:
                embed = PatchEmbed(channels, dims[i], stride, patch_embed != 'plain', norm_layer)
            blocks = [make_block(i, rate) for rate in drop_paths[i]]
            return Stage(embed, blocks, with_cp=with_cp)

        super().__init__(
            make_stage,
            lambda i: norm_layer(dims[i]),
            num_stages=len(dims),
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            pad_mask=pad_mask,
            norm_eval=norm_eval,
            init_cfg=init_cfg,
            impl=impl,
        )


def check_takes(option: str, attention: str) -> None:
    """ValueError unless this attention has this option."""
    if attention not in WITH_OPTIONS:
        raise ValueError(f"{option} is for attention='gated' or 'plain', got {attention!r}")


def check_qk_norm(qk_norm: Sequence[float]) -> None:
    """ValueError unless this is an initial gain and bias."""
    pair = isinstance(qk_norm, Sequence) and not isinstance(qk_norm, str) and len(qk_norm) == 2
    if not pair or not all(isinstance(value, int | float) for value in qk_norm):
        raise ValueError(f'qk_norm must be two numbers, gain and bias, or None, got {qk_norm!r}')
