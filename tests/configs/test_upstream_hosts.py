"""SAGA in configs of mmdet and mmseg, where only `backbone=` is replaced."""

from __future__ import annotations

import math
from pathlib import Path

import mmdet
import mmseg
import pytest
from mmengine.config import Config

SWIN_T = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
HOSTS = [
    (mmdet, 'pvt/retinanet_pvt-t_fpn_1x_coco.py', 't', 80),
    (mmdet, 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', SWIN_T, 80),
    (
        mmseg,
        'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        SWIN_T,
        150,
    ),
]


@pytest.mark.parametrize(
    'toolbox, config, arch, num_classes', HOSTS, ids=['retinanet', 'mask_rcnn', 'upernet']
)
def test_takes_the_place_of_the_backbone(
    toolbox, config, arch, num_classes, build_model, make_batch, train_step
):
    cfg = Config.fromfile(Path(toolbox.__file__).parent / '.mim' / 'configs' / config)
    # No custom_imports is needed, because the registries find the type by its scope.
    cfg.model.backbone = dict(type='saga_mm.SAGA', arch=arch)
    model = build_model(cfg)
    losses = train_step(model, make_batch(cfg.default_scope, num_classes))
    assert all(math.isfinite(value) for value in losses.values()), losses

    without = {name for name, p in model.named_parameters() if p.grad is None}
    # PVT's RetinaNet reads outputs 1 to 3 of four, so the norm of output 0 gets no gradient.
    unread = {'backbone.norms.0.weight', 'backbone.norms.0.bias'} if 'pvt' in config else set()
    assert without == unread
