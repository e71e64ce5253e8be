"""Costs of upstream's models: every part is counted, or named as not counted."""

from pathlib import Path
from types import SimpleNamespace

import mmdet
import mmseg
import pytest
import torch
from mmengine.config import Config

from saga_mm.analysis import model_cost as module
from saga_mm.analysis.model_cost import model_cost, not_counted
from saga_mm.apis import build_model

CONFIGS = {
    name: Path(package.__file__).parent / '.mim/configs'
    for name, package in (('mmdet', mmdet), ('mmseg', mmseg))
}


def build(name):
    """Build a model of upstream without loading weights from a file."""
    toolbox, _, path = name.partition('/')
    cfg = Config.fromfile(CONFIGS[toolbox] / f'{path}.py')
    forget_weights(cfg._cfg_dict)
    return build_model(cfg)


def forget_weights(value):
    if isinstance(value, dict):
        for key in {'init_cfg', 'pretrained'} & value.keys():
            value[key] = None
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            forget_weights(item)


# Config, parts that must have FLOPs, parts that cannot have any.
MODELS = {
    'mmdet/htc/htc_r50_fpn_1x_coco': (['roi_head.semantic_head', 'roi_head.mask_head.2'], {}),
    'mmdet/panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco': (['semantic_head', 'roi_head'], {}),
    'mmdet/detr/detr_r50_8xb2-150e_coco': (['encoder', 'decoder', 'bbox_head'], {}),
    'mmdet/solov2/solov2-light_r18_fpn_ms-3x_coco': (['mask_head'], {}),
    'mmseg/ocrnet/ocrnet_hr18s_4xb2-160k_cityscapes-512x1024': (
        ['decode_head.0', 'decode_head.1'],
        {},
    ),
    # This runs on real tensors.
    'mmdet/dino/dino-4scale_r50_8xb2-12e_coco': (
        ['encoder', 'decoder', 'bbox_head'],
        {'dn_query_generator'},
    ),
}
LONG = {
    # Inference uses the masks of the last stage.
    'mmdet/queryinst/queryinst_r50_fpn_1x_coco': (
        ['roi_head.bbox_head.0', 'roi_head.mask_head.5'],
        {f'roi_head.mask_head.{i}' for i in range(5)},
    ),
    'mmdet/mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic': (['panoptic_head'], {}),
    'mmseg/mask2former/mask2former_r50_8xb2-160k_ade20k-512x512': (['decode_head'], {}),
    'mmseg/point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024': (['decode_head.1'], {}),
    'mmseg/psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024': (
        ['decode_head'],
        {'auxiliary_head'},
    ),
    'mmdet/guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco': (['rpn_head', 'roi_head'], {}),
    'mmdet/carafe/faster-rcnn_r50_fpn-carafe_1x_coco': (['neck'], {}),
    'mmdet/dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco': (['backbone.layer3.0.conv2'], {}),
    'mmdet/fast_rcnn/fast-rcnn_r50_fpn_1x_coco': (['roi_head'], {}),
    'mmdet/groie/faste-rcnn_r50_fpn_groie_1x_coco': (['roi_head.bbox_roi_extractor'], {}),
    # This runs without stand-in tensors.
    'mmdet/condinst/condinst_r50_fpn_ms-poly-90k_coco_instance': (['mask_head'], {}),
    'mmdet/yolact/yolact_r50_1xb8-55e_coco': (['mask_head'], {'mask_head.segm_branch'}),
    'mmdet/yolox/yolox_tiny_8xb8-300e_coco': (['bbox_head'], {}),
    'mmdet/tood/tood_r50_fpn_1x_coco': (['bbox_head.cls_decomp'], {}),
    'mmdet/pvt/retinanet_pvt-t_fpn_1x_coco': (['backbone'], {}),
}


@pytest.mark.parametrize(
    'name', [*MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_every_part_is_counted_or_named(name):
    counted, left_out = {**MODELS, **LONG}[name]
    model = build(name)
    costs = model_cost(model, (224, 256))
    assert set(not_counted(model, costs)) == set(left_out)
    for part in counted:
        assert costs[part].flops > 0, part
    assert costs[''].flops >= sum(costs[part].flops for part, _ in model.named_children())
    assert all(
        costs[part].flops > 0
        for part, child in model.named_children()
        if costs[part].parameters and part not in left_out and not is_embedding(child)
    )


def is_embedding(part):
    return all(
        isinstance(module, torch.nn.Embedding)
        for module in part.modules()
        if any(True for _ in module.parameters(recurse=False))
    ) or all(parameter.ndim == 1 for parameter in part.parameters())


# published, in multiply-adds of an image of 800 x 1280
@pytest.mark.parametrize(
    ('name', 'published'),
    [
        ('mmdet/retinanet/retinanet_r50_fpn_1x_coco', 239e9),
        ('mmdet/mask_rcnn/mask-rcnn_r50_fpn_1x_coco', 260e9),
    ],
)
def test_published_costs(name, published):
    costs = model_cost(build(name), (800, 1280))
    assert costs[''].flops / 2 == pytest.approx(published, rel=0.03)


@pytest.fixture(scope='module')
def segmentor():
    return build('mmseg/fcn/fcn_r18b-d8_4xb2-80k_cityscapes-512x1024')


def test_real_tensors_cost_what_shapes_cost(segmentor, monkeypatch):
    shapes = model_cost(segmentor, (64, 96))
    assert shapes[''].activations > 0
    # The copy cannot be run.
    fail = SimpleNamespace(deepcopy=lambda model: torch.nn.Identity())
    monkeypatch.setattr(module, 'copy', fail)
    real = model_cost(segmentor, (64, 96))
    assert real[''].activations is None
    assert {name: cost.flops for name, cost in real.items()} == {
        name: cost.flops for name, cost in shapes.items()
    }


def test_parts_that_only_training_uses_are_named(segmentor):
    costs = model_cost(segmentor, (64, 96))
    assert not_counted(segmentor, costs) == {'auxiliary_head': 'inference does without it'}
    assert costs['auxiliary_head'].unused == costs['auxiliary_head'].parameters > 0
    assert costs['backbone'].unused == 0


class Unknown(torch.nn.Module):
    """A convolution that the counter does not see, and one that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = torch.nn.Conv2d(3, 3, 1)
        self.hidden = torch.nn.Conv2d(3, 3, 1)
        self.hidden.forward = lambda x: x * self.hidden.weight.sum()
        self.position = torch.nn.Embedding(3, 3)
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.hidden(self.seen(x)) + self.position.weight.sum())


def test_weights_without_a_product_are_named():
    model = Unknown().eval()
    costs = module.measure_cost(model, lambda: model(torch.randn(1, 3, 8, 8)))
    reason = 'it has no product that the counter knows'
    assert not_counted(model, costs) == {'hidden': reason}


def test_sizes_that_a_model_does_not_take(segmentor):
    with pytest.raises(
        ValueError, match=r'can not be run on an image of 64 x 96 pixels .*: Runtime'
    ):
        model_cost(segmentor, (64, 96), channels=4)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match='a classifier of mmpretrain, got Conv2d'):
        model_cost(torch.nn.Conv2d(3, 3, 1), (64, 64))
