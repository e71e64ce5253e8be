"""The backbones as models of timm: `import saga_mm.timm`, then `timm.create_model('saga_tiny')`.

With `features_only=True` they are backbones for programs that take those of timm, such as
segmentation_models_pytorch ('tu-saga_tiny') and transformers. There are no pretrained weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from .backbones.create import SIZES, create_backbone
from .layers import init_linear


class TimmBackbone(nn.Module):
    """A backbone and, for images of objects, a linear classifier of the mean over the last map.

    Args:
        name: The backbone, as in `create_backbone`.
        num_classes: Number of classes; 0 for features in place of logits.
        in_chans: Channels of the image.
        global_pool: 'avg', or '' for no pooling.
        drop_rate: Drop rate before the classifier.
        **options: Options of the backbone.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        **options,
    ) -> None:
        super().__init__()
        self.body = create_backbone(name, in_channels=in_chans, **options)
        kind, arch = SIZES[name]
        dims = kind.arch_settings[arch].embed_dims
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'body.norms.{i}')
            for i, dim in enumerate(dims)
        ]
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, '', 'avg'):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = init_linear(nn.Linear(self.num_features, num_classes))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.body.stages.children():
            stage.with_cp = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        patterns = self.body.group_matcher(coarse)
        blocks = [(_in_body(pattern), order) for pattern, order in patterns['blocks']]
        # what no pattern matches, the classifier, is the last layer
        return dict(stem=_in_body(patterns['stem']), blocks=blocks)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = True,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of some stages, each with its norm; see timm. `stop_early` has no effect."""
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps = dict(zip(self.body.out_indices, self.body(x), strict=True))
        found = [maps[i] for i in take]
        return found if intermediates_only else (maps[max(maps)], found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last of `indices`, and norms of other outputs."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.body.out_indices = tuple(take)
        self.body.stages = self.body.stages[: last + 1]
        self.body.norms = nn.ModuleDict({str(i): self.body.norms[str(i)] for i in take})
        if prune_head:
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.mean((2, 3))
        elif self.num_classes and not pre_logits:
            x = x.permute(0, 2, 3, 1)
        x = self.drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _in_body(pattern: str) -> str:
    return pattern.replace('^', r'^body\.', 1)


default_cfgs = generate_default_cfgs(
    {
        name: dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.9,
            interpolation='bicubic',
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            first_conv=None,
            classifier='head',
        )
        for name in SIZES
    }
)


def _register(name: str) -> None:
    def create(pretrained: bool = False, **options) -> nn.Module:
        features = dict(out_indices=(0, 1, 2, 3), feature_cls='getter')
        return build_model_with_cfg(
            TimmBackbone, name, pretrained, name=name, feature_cfg=features, **options
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'{name}, without pretrained weights; options as in `TimmBackbone`.'
    globals()[name] = register_model(create)


for _name in SIZES:
    _register(_name)
