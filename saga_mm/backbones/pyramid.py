"""The base class of the backbones: stages, outputs, freezing, checkpointing and weights.

Legend: B batch, H height, W width, C channels. Inside a backbone, maps are channels-last,
(B, H, W, C). Linear layers and norms read them directly, and convolutions through a view that needs
no copy. The outputs are contiguous maps (B, C, H, W), because mmcv's RoIAlign expects them and
misreads channels-last maps.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from numbers import Integral
from types import MappingProxyType
from typing import TypeVar

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from saga_kernels.tracing import is_exporting

from ..checkpoint import report_pretrained
from ..inference import ImageRows, in_full, run_block, run_embed, run_output
from ..layers import (
    FFN,
    DepthwiseConv2d,
    LayerNorm,
    downsample_mask,
    join_gradients,
    unpack,
    with_kernel,
)
from .arguments import check_arguments

# The value by which timm marks the last layer of layer-wise decay.
NORMS = (r'^norms', (99999,))


@dataclass(frozen=True)
class Arch:
    """Widths, depths, heads and FFN ratios, one entry per stage."""

    embed_dims: Sequence[int]
    depths: Sequence[int]
    num_heads: Sequence[int]
    mlp_ratios: Sequence[float]

    def __post_init__(self) -> None:
        for field in fields(Arch):
            values = getattr(self, field.name)
            number = (int, float) if field.name == 'mlp_ratios' else int
            if not isinstance(values, Sequence) or not all(
                isinstance(value, number) and value > 0 for value in values
            ):
                kind = 'numbers' if field.name == 'mlp_ratios' else 'ints'
                raise ValueError(
                    f'arch[{field.name!r}] must be a sequence of positive {kind}, got {values!r}'
                )
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(Arch)}
        if len(set(lengths.values())) != 1 or not self.depths:
            raise ValueError(
                f'arch must have one entry per stage in each list, got lengths {lengths}'
            )
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(
                    f'arch: embed_dims must be multiples of num_heads, got {dim} and {heads}'
                )


AnyArch = TypeVar('AnyArch', bound=Arch)


def resolve_arch(
    arch: str | Mapping, known: Mapping[str, AnyArch], mlp_ratio: float = 4
) -> AnyArch:
    """An `Arch` from its name, the first letter of its name, or a dict of its fields.

    Args:
        arch: One of the names in `known`, its first letter, or a dict.
        known: The architecture of each name. A dict makes one of the same class.
        mlp_ratio: The FFN ratio of each stage if a dict has no `mlp_ratios`.
    """
    if isinstance(arch, str):
        names = {name[0]: name for name in known} | {name: name for name in known}
        if arch not in names:
            raise ValueError(f'arch must be one of {tuple(names)} or a dict, got {arch!r}')
        return known[names[arch]]
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be a name or a dict, got {type(arch).__name__}')
    required, optional = {'embed_dims', 'depths', 'num_heads'}, {'mlp_ratios'}
    if not required <= set(arch) <= required | optional:
        raise ValueError(
            f'arch must have the keys {sorted(required)} and optionally {sorted(optional)}, '
            f'got {sorted(arch)}'
        )
    stages = len(arch['depths']) if isinstance(arch['depths'], Sequence) else 0
    kind = type(next(iter(known.values())))
    return kind(**{'mlp_ratios': (mlp_ratio,) * stages, **arch})


def resolve_out_indices(out_indices: int | Sequence[int], num_stages: int) -> tuple[int, ...]:
    """The stages whose maps are returned, as a tuple; ValueError if `out_indices` has others."""
    found = tuple(out_indices) if isinstance(out_indices, Iterable) else (out_indices,)
    are_ints = all(isinstance(i, Integral) for i in found)
    if not found or not are_ints or found != tuple(i for i in range(num_stages) if i in found):
        raise ValueError(
            f'out_indices must be increasing stage numbers from 0 to {num_stages - 1}, got {found}'
        )
    return found


class Stage(nn.Module):
    """One resolution of the pyramid: an embedding that sets grid and width, then blocks.

    Args:
        embed: Module that maps (B, H, W, C_in) and its mask to the grid and width of the stage.
        blocks: Modules that map (B, H, W, C) and its mask to (B, H, W, C), or to that and a hidden
            state of the same grid.
        with_cp: Recompute the activations of each block in the backward pass (non-reentrant).
        bridges: By the index of a block: which hidden state its input gets, counted over all
            states of the backbone in order, and the `HiddenStateBridge` that adds it.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        with_cp: bool = False,
        bridges: Mapping[int, tuple[int, nn.Module]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.embed = embed
        self.bridges = nn.ModuleDict({str(i): bridge for i, (_, bridge) in bridges.items()})
        self.sources = {i: source for i, (source, _) in bridges.items()}
        self.blocks = nn.ModuleList(blocks)
        self.with_cp = with_cp

    def forward(
        self,
        x: Tensor | ImageRows,
        masks: tuple[Tensor | None, Tensor | None] = (None, None),
        states: Sequence[tuple[Tensor, Tensor | None]] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of this stage, (B, H', W', C), followed by the hidden states of its blocks if
        there are any.

        Args:
            x: The image, which may be `ImageRows`, or the map of the stage before, (B, H, W, C_in).
            masks: The masks of x and of the map of this stage, as in `mask_padding`, or twice None.
            states: Hidden states of the stages before, each with its mask.
        """
        finer, mask = masks
        map_ = run_embed(self.embed, x, finer)
        states, before = list(states), len(states)
        for i, block in enumerate(self.blocks):
            if i in self.sources:
                map_ = self.bridges[str(i)](in_full(map_), *states[self.sources[i]])
            if self.with_cp and torch.is_grad_enabled():
                out = checkpoint(run_block, block, map_, mask, use_reentrant=False)
            else:
                out = run_block(block, map_, mask)
            map_, *found = unpack(out)
            states += [(state, mask) for state in found]
        found = [state for state, _ in states[before:]]
        return (map_, *found) if found else map_


class PyramidBackbone(BaseModule):
    """Base class of the backbones: a subclass passes functions that make its stages and norms.

    Args:
        make_stage (Callable[[int], Stage]): Makes stage i. It is called for the stages up to the
            last one in `out_indices`, so that no parameter stays without a gradient.
        make_norm (Callable[[int], nn.Module]): Makes the norm of output i, over the last axis.
        num_stages (int): Number of stages of the architecture.
        in_channels (int): Channels of the image.
        out_indices (int | Sequence[int]): Stages whose maps are returned, in increasing order.
        frozen_stages (int): -1 freezes nothing, 0 the first embedding, n > 0 the first n stages
            with their norms. Frozen parts stay in eval mode.
        pad_mask (bool): The input has one more channel, which is 1 inside an image and 0 in its
            padding. The maps are then those of the image alone inside, except for batch norms in
            training, and 0 in the padding.
        norm_eval (bool): Keep batch norms, including synchronised ones, in eval mode during
            training. Defaults to False.
        init_cfg (dict, optional): `dict(type='Pretrained', checkpoint=..., prefix=...)` or any
            mmengine initialiser. Without it the weights keep the layers' own initialisation.
        impl (str): 'reference' runs the layers around the attention in PyTorch as well. Other
            values, which are for the attention alone, leave them the choice. Defaults to 'auto'.
    """

    init_cfg: dict | list | None

    def __new__(cls, *args, **kwargs) -> PyramidBackbone:
        check_arguments(cls, args, kwargs)
        backbone = super().__new__(cls)
        # `init_weights` builds another backbone from these arguments.
        backbone.__dict__['_arguments'] = args, kwargs
        return backbone

    def __init__(
        self,
        make_stage: Callable[[int], Stage],
        make_norm: Callable[[int], nn.Module],
        *,
        num_stages: int,
        in_channels: int,
        out_indices: int | Sequence[int],
        frozen_stages: int,
        pad_mask: bool,
        init_cfg: dict | list | None,
        norm_eval: bool = False,
        impl: str = 'auto',
    ) -> None:
        for cfg in init_cfg if isinstance(init_cfg, list) else [init_cfg]:
            if cfg and 'type' not in cfg:
                raise ValueError(f"init_cfg must have a type, such as 'Pretrained', got {cfg}")
        super().__init__(init_cfg=init_cfg)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels must be a positive int, got {in_channels!r}')
        out_indices = resolve_out_indices(out_indices, num_stages)
        used = out_indices[-1] + 1
        if frozen_stages not in range(-1, used + 1):
            raise ValueError(f'frozen_stages must be from -1 to {used}, got {frozen_stages}')
        self.in_channels = in_channels
        self.pad_mask = pad_mask
        self.input_channels = in_channels + pad_mask
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        stages = [make_stage(i) for i in range(used)]
        self.depths = [len(stage.blocks) for stage in stages]
        self.stages = nn.ModuleList(stages)
        self.norms = nn.ModuleDict({str(i): make_norm(i) for i in out_indices})
        if impl == 'reference':
            for module in self.modules():
                if isinstance(module, DepthwiseConv2d | LayerNorm | FFN):
                    module.impl = 'reference'
        self._freeze()
        self._built_empty = any(parameter.is_meta for parameter in self.parameters())

    def init_weights(self) -> None:
        """Apply `init_cfg`. A file of which no weight fits is an error.

        A backbone that was built on the meta device first gets the weights of a new one.

        Raises:
            CheckpointError: No weight of the file fits.
            ValueError: The parameters are on the meta device.
        """
        if self._built_empty:
            self._fill()
        self.init_cfg = report_pretrained(self.init_cfg)
        super().init_weights()

    @torch.no_grad()
    def _fill(self) -> None:
        """Copy the parameters and buffers of a new backbone with the same arguments."""
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(
                f'{type(self).__name__} is on the meta device and has no memory for weights: call '
                'to_empty(device=...) before init_weights()'
            )
        args, kwargs = self._arguments
        with torch.device('cpu'):
            new = type(self)(*args, **kwargs)
        own = dict(chain(self.named_parameters(), self.named_buffers()))
        for name, value in chain(new.named_parameters(), new.named_buffers()):
            own[name].copy_(value)
        self._built_empty = False

    def forward(self, x: Tensor | ImageRows) -> tuple[Tensor, ...]:
        """Maps of the stages in `out_indices`.

        Args:
            x (Tensor): Images (B, in_channels, H, W), of any size from 1 x 1. With `pad_mask`,
                (B, in_channels + 1, H, W), where the last channel is the mask. Or the same as
                `saga_mm.inference.ImageRows`, which are read chunk by chunk.

        Returns:
            tuple[Tensor]: Contiguous maps, as mmcv's ops expect. That of stage 0 has the shape
            (B, C_0, ceil(H / 4), ceil(W / 4)); each further stage halves the sides, rounded up.
        """
        x, image_mask = self._split(x)
        mask, outs = image_mask, []
        states: list[tuple[Tensor, Tensor | None]] = []
        for i, stage in enumerate(self.stages):
            finer, mask = mask, downsample_mask(image_mask, 4 * 2**i)
            x, *found = unpack(stage(x, (finer, mask), states))
            states += [(state, mask) for state in found]
            if i in self.out_indices:
                outs.append(self._output(i, x, mask))
        return join_gradients(outs)

    def _output(self, i: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Output i, (B, C, H, W), from the map of stage i."""
        return run_output(self.norms[str(i)], x, mask)

    def _split(self, x: Tensor | ImageRows) -> tuple[Tensor | ImageRows, Tensor | None]:
        """Image (B, H, W, in_channels) and mask (B, H, W, 1) or None."""
        if isinstance(x, ImageRows):
            assert x.shape[-1] == self.input_channels
            if not self.pad_mask:
                return x, None
            mask = x.channels(slice(-1, None)).whole() > 0.5
            return x.channels(slice(0, -1)), mask.permute(0, 2, 3, 1)
        if x.ndim != 4 or x.shape[1] != self.input_channels or 0 in x.shape[2:]:
            expected = f'(B, {self.input_channels}, H, W)'
            if self.pad_mask:
                expected += ', the last channel a mask, as pad_mask=True'
            raise ValueError(f'the input must have shape {expected}, got {tuple(x.shape)}')
        if compiles_for_cpu(x):
            for side in x.shape[2:]:
                operator.index(side)
        x = x.permute(0, 2, 3, 1)
        if not self.pad_mask:
            return x, None
        return x[..., :-1], x[..., -1:] > 0.5

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Depth of the layer that a parameter belongs to, for layer-wise learning rate decay.

        Layer 0 is the embedding of the first stage. Layer n is block n with the bridge into it; the
        first block of a later stage is in one layer with the embedding of that stage. The norms of
        the outputs, and all parameters outside of the backbone, belong to the last layer.

        Args:
            param_name (str): Name of the parameter.
            prefix (str): Prefix of the names of the backbone's parameters, such as 'backbone.'.
                Defaults to ''.

        Returns:
            tuple[int, int]: The layer, counted from 0, and the number of layers, which is the
            number of blocks plus two.

        Source: the convention of mmpretrain's `BaseBackbone.get_layer_depth`.
        """
        layers = sum(self.depths) + 2
        found = re.match(
            r'stages\.(\d+)\.(?:(?:blocks|bridges)\.(\d+))?', param_name.removeprefix(prefix)
        )
        if not param_name.startswith(prefix) or not found:
            return layers - 1, layers
        stage, block = int(found[1]), found[2]
        if stage == 0 and block is None:
            return 0, layers
        return 1 + sum(self.depths[:stage]) + int(block or 0), layers

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that assign parameters to layers, for timm's layer-wise learning rate decay.

        Args:
            coarse (bool): Make one layer per stage in place of one per block. Defaults to False.
        """
        if coarse:
            return dict(stem=r'^stages\.0\.embed', blocks=[(r'^stages\.(\d+)', None), NORMS])
        return dict(
            stem=r'^stages\.0\.embed',
            blocks=[
                (r'^stages\.(\d+)\.embed', (0,)),
                (r'^stages\.(\d+)\.(?:blocks|bridges)\.(\d+)', None),
                NORMS,
            ],
        )

    def train(self, mode: bool = True) -> PyramidBackbone:
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        frozen: list[nn.Module] = []
        if self.frozen_stages >= 0:
            frozen.append(self.stages[0].get_submodule('embed'))
        frozen += self.stages[: max(self.frozen_stages, 0)]
        frozen += [self.norms[str(i)] for i in self.out_indices if i < self.frozen_stages]
        for module in frozen:
            module.eval().requires_grad_(False)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


def compiles_for_cpu(x: Tensor) -> bool:
    """Whether `torch.compile` compiles for a CPU, where image sizes must be constants.

    There, Inductor fails on channels-last convolutions with symbolic sizes (torch 2.13), because it
    sorts their strides by comparing expressions. `operator.index` turns sizes into constants, with
    which a model is compiled again for each image size.
    """
    compiling = torch.compiler.is_compiling() and not is_exporting()
    return compiling and x.device.type == 'cpu'


def build_norm(name: str, norm_cfg: dict, dim: int) -> nn.Module:
    """The norm of a `norm_cfg`, which is the value of the argument `name`."""
    try:
        return build_norm_layer(norm_cfg, dim)[1]
    except KeyError as error:
        raise ValueError(
            f'{name} must have the type of a norm, such as LN or BN, got {norm_cfg}'
        ) from error


def channel_norm(norm_cfg: dict) -> Callable[[int], nn.Module]:
    """A function that makes norms over the last axis of (B, H, W, C), as `norm_cfg` says."""

    def make(dim: int) -> nn.Module:
        norm = build_norm('norm_cfg', norm_cfg, dim)
        if not hasattr(norm, 'normalized_shape'):
            raise ValueError(f'norm_cfg must name a norm over channels such as LN, got {norm_cfg}')
        return with_kernel(norm)

    return make


def map_norm(name: str, norm_cfg: dict, pad_mask: bool) -> Callable[[int], nn.Module]:
    """A function that makes norms of maps (B, C, H, W) from an OpenMMLab `norm_cfg`.

    With `pad_mask`, norms with statistics of each map are refused: these would include padding.

    Args:
        name: Of the argument that has the `norm_cfg`.
        norm_cfg: Its value.
        pad_mask: As in `PyramidBackbone`.
    """

    def make(dim: int) -> nn.Module:
        norm = build_norm(name, norm_cfg, dim)
        if hasattr(norm, 'normalized_shape'):
            raise ValueError(f'{name} must name a norm of maps such as BN, got {norm_cfg}')
        if pad_mask and isinstance(norm, nn.GroupNorm | _InstanceNorm):
            raise ValueError(
                f'{name} must name a batch norm such as BN where pad_mask=True, for statistics of '
                f'each map would take its padding in, got {norm_cfg}'
            )
        return norm

    return make
