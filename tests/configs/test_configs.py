"""Every config under `configs/` can be parsed and built, has a docstring, predicts and trains."""

from __future__ import annotations

import ast
import math
import re

import pytest
import torch
from mmcv.ops import RoIAlign
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS
from mmengine.registry import MODELS as ROOT_MODELS

PROMISED = {
    *(
        f'detection/mask_rcnn_saga_{name}.py'
        for name in ('s', 't', 't_3x', 't_demo', 't_nuclei', 't_padmask')
    ),
    *(
        f'detection/{name}_saga_t.py'
        for name in ('cascade_mask_rcnn', 'retinanet', 'rtmdet', 'deformable_detr')
    ),
    *(f'segmentation/upernet_saga_{name}.py' for name in 'tsm'),
    *(
        f'segmentation/upernet_saga_t_{name}.py'
        for name in ('camvid', 'demo', 'idrid', 'nuclei', 'padmask')
    ),
    *(f'segmentation/{name}_saga_t.py' for name in ('fpn', 'deeplabv3plus', 'mask2former')),
    *(
        f'segmentation/{head}_saga_t{data}.py'
        for head in ('segformer_head', 'upernet128')
        for data in ('', '_camvid', '_idrid')
    ),
    *(f'segmentation/upernet_saga_t_{name}.py' for name in ('cityscapes', 'loveda', 'voc12')),
    *(f'detection/mask_rcnn_sola_vision_{size}.py' for size in 'tsb'),
    *(f'detection/mask_rcnn_sola_vision_{size}_3x.py' for size in 'tsb'),
    *(f'detection/mask_rcnn_sola_vision_t_{name}.py' for name in ('demo', 'nuclei')),
    *(
        f'segmentation/{head}_sola_vision_{size}.py'
        for head in ('fpn', 'upernet')
        for size in 'tsb'
    ),
    *(f'segmentation/upernet_sola_vision_t_{name}.py' for name in ('camvid', 'demo', 'nuclei')),
    *(
        f'segmentation/upernet_sola_vision_t_camvid_{preset}.py'
        for preset in ('linear', 'last', 'front', 'softmax')
    ),
    *(f'detection/mask_rcnn_ravlt_{size}.py' for size in 'tsbl'),
    *(f'detection/{name}.py' for name in ('mask_rcnn_ravlt_t_demo', 'mask_rcnn_ravlt_t_nuclei')),
    *(f'detection/mask_rcnn_ravlt_{size}_3x.py' for size in 'tsbl'),
    *(f'detection/cascade_mask_rcnn_ravlt_{size}_3x.py' for size in 'tsbl'),
    *(f'detection/retinanet_ravlt_{size}.py' for size in 'tsbl'),
    *(f'segmentation/{head}_ravlt_{size}.py' for head in ('fpn', 'upernet') for size in 'tsbl'),
    *(f'segmentation/upernet_ravlt_t_{name}.py' for name in ('camvid', 'demo', 'nuclei')),
    *(
        f'classification/classifier_{method}_{name}.py'
        for method in ('saga', 'ravlt')
        for name in ('s', 't', 't_demo', 't_tiny_imagenet50')
    ),
    *(
        f'classification/classifier_sola_vision_{name}.py'
        for name in ('t', 's', 'b', 't_demo', 't_tiny_imagenet50')
    ),
}
SCOPES = dict(classification='mmpretrain', detection='mmdet', segmentation='mmseg')


def test_promised_configs_exist(config_dir):
    found = {path.relative_to(config_dir).as_posix() for path in config_dir.glob('*/*.py')}
    assert found >= PROMISED


def bases_of(path):
    tree = ast.parse(path.read_text())
    bases = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            bases = ast.literal_eval(node.value)
    bases = [bases] if isinstance(bases, str) else bases
    for base in bases:
        assert base.startswith('./'), f'{path}: bases are relative paths, got {base}'
    return [path.parent / base for base in bases]


def inheritance_depth(path):
    """Length of the longest chain of `_base_` files that starts at `path`."""
    return max((1 + inheritance_depth(base) for base in bases_of(path)), default=0)


def test_bases_are_relative_and_at_most_three_deep(any_config_path):
    assert inheritance_depth(any_config_path) <= 3


def test_is_complete(any_config_path, load_config):
    cfg = load_config(any_config_path)
    assert cfg.custom_imports == dict(imports=['saga_mm'], allow_failed_imports=False)
    assert cfg.model.backbone.type.startswith('saga_mm.')
    assert cfg.default_scope == SCOPES[any_config_path.parent.name]
    if 'tta_model' in cfg:
        assert 'tta_pipeline' in cfg
    assert cfg.default_scope != 'mmseg' or 'tta_model' in cfg


SEVEN = {'saga', 'saga_ungated', 'sola_vision', 'ravlt', 'pvt', 'pvtv2', 'swin'}


@pytest.mark.parametrize(
    ('folder', 'expected'),
    [
        ('classification/compare', SEVEN),
        ('detection/compare', SEVEN),
        ('segmentation/compare', SEVEN),
        ('segmentation/compare_idrid', {'saga', 'pvt'}),
    ],
)
def test_compared_models_differ_in_the_backbone_only(config_dir, load_config, folder, expected):
    paths = sorted((config_dir / folder).glob('*.py'))
    names = {path.stem for path in paths}
    assert names >= expected
    others = []
    for path in paths:
        cfg = load_config(path).to_dict()
        backbone = cfg['model'].pop('backbone')
        assert backbone.get('out_indices') == (
            (3,) if cfg['default_scope'] == 'mmpretrain' else None
        )
        for reader in ('neck', 'decode_head'):
            (cfg['model'].get(reader) or {}).pop('in_channels', None)
        others.append(cfg)
    assert all(cfg == others[0] for cfg in others)


@pytest.mark.parametrize(
    ('light', 'heavy'),
    [
        ('compare/saga', 'compare_heads/upernet128_camvid'),
        ('compare_heads/segformer_head_idrid', 'compare_heads/upernet128_idrid'),
    ],
)
def test_compared_heads_differ_in_the_head_only(
    light, heavy, load_config, build_model, make_batch, train_step
):
    others, heads = [], []
    for name in (light, heavy):
        cfg = load_config(f'segmentation/{name}.py')
        batch = make_batch('mmseg', cfg.model.decode_head.num_classes)
        losses = train_step(build_model(cfg), batch)
        assert all(math.isfinite(value) for value in losses.values()), losses
        others.append(cfg.to_dict())
        others[-1].pop('norm_cfg', None)
        others[-1]['model'].pop('auxiliary_head', None)
        heads.append(others[-1]['model'].pop('decode_head'))
    assert others[0] == others[1]
    assert [head['type'] for head in heads] == ['SegformerHead', 'UPerHead']
    for name in ('num_classes', 'in_channels', 'loss_decode'):
        assert heads[0][name] == heads[1][name]


def docstring_with_schedule(path):
    """The docstring with the schedule: that of a config, or of the one that it refers to."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    (*_, base) = bases_of(path)
    if 'batch' not in text and f'like `{base.name}`' in text:
        return docstring_with_schedule(base)
    return text


def test_docstring_tells_batch_size_and_schedule(any_config_path, load_config):
    cfg = load_config(any_config_path)
    text = docstring_with_schedule(any_config_path)
    batch, devices = re.search(r'batch (\d+) x (\d+)', text).groups()
    assert int(batch) == cfg.train_dataloader.batch_size
    assert int(batch) * int(devices) == cfg.auto_scale_lr.base_batch_size

    length, kilo, unit = re.search(r'(\d+)(k?) (epochs|iterations)', text).groups()
    key = dict(epochs='max_epochs', iterations='max_iters')[unit]
    assert int(length) * (1000 if kilo else 1) == cfg.train_cfg[key]


def test_heads_have_the_widths_of_the_backbone(any_config_path, load_config):
    cfg = load_config(any_config_path)
    backbone = ROOT_MODELS.get(cfg.model.backbone.type)
    arch = backbone.arch_settings[cfg.model.backbone.arch]
    indices = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
    widths = [arch.embed_dims[i] for i in indices]
    if cfg.default_scope == 'mmpretrain':
        assert [cfg.model.head.in_channels] == widths
        assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes
        return
    reader = cfg.model.get('neck') or cfg.model.decode_head
    if isinstance(reader.in_channels, int):
        # DeepLabV3+ reads the last map, and the first one
        assert [reader.c1_in_channels, reader.in_channels] == [widths[0], widths[reader.in_index]]
    else:
        assert reader.in_channels == widths
    if 'auxiliary_head' in cfg.model:
        assert cfg.model.auxiliary_head.in_channels == widths[cfg.model.auxiliary_head.in_index]


def test_predicts_and_trains(
    tiny_config_path, load_config, build_model, make_batch, train_step, head_classes
):
    cfg = load_config(tiny_config_path)
    height, width = 64, 96
    masks = 'mask_rcnn' in tiny_config_path.stem
    batch = make_batch(cfg.default_scope, head_classes(cfg.model), height, width, masks=masks)
    model = build_model(cfg)
    read_as_contiguous = []
    for module in model.modules():
        if isinstance(module, RoIAlign):
            # It does not check the memory format, and misreads a channels-last map.
            module.register_forward_pre_hook(
                lambda _, inputs: read_as_contiguous.append(inputs[0].is_contiguous())
            )

    model.eval()
    with torch.no_grad():
        samples = model(**model.data_preprocessor(batch), mode='predict')
    assert len(samples) == 2
    for sample in samples:
        if cfg.default_scope == 'mmseg':
            assert sample.seg_logits.data.shape == (head_classes(cfg.model), height, width)
            assert sample.seg_logits.data.isfinite().all()
        else:
            assert sample.pred_instances.bboxes.isfinite().all()
            assert ('masks' in sample.pred_instances) == ('mask_rcnn' in tiny_config_path.stem)

    losses = train_step(model, batch)
    assert losses['loss'] > 0
    assert all(math.isfinite(value) for value in losses.values()), losses
    # DistributedDataParallel stops at a trainable parameter without a gradient.
    bad = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not bad
    assert all(read_as_contiguous)
    assert bool(read_as_contiguous) == ('mask_rcnn' in tiny_config_path.stem)


@pytest.mark.long
def test_no_parameter_is_unused(
    config_path, load_config, build_model, make_batch, train_step, head_classes
):
    """Holds without objects as well, because a process may get only images without them."""
    cfg = load_config(config_path)
    model = build_model(cfg)
    masks = 'mask_rcnn' in config_path.stem
    for objects in (3, 0):
        model.zero_grad()
        classes = head_classes(cfg.model)
        batch = make_batch(cfg.default_scope, classes, objects=objects, masks=masks)
        losses = train_step(model, batch)
        assert all(math.isfinite(value) for value in losses.values()), losses
        named = model.named_parameters()
        assert not [name for name, p in named if p.requires_grad and p.grad is None]


def test_weight_decay_spares_norms_biases_and_layer_scales(
    tiny_config_path, load_config, build_model
):
    cfg = load_config(tiny_config_path)
    model = build_model(cfg)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    # An optimizer updates one group after the other.
    assert len(groups) <= 6
    decay = cfg.optim_wrapper.optimizer.weight_decay
    params = [(p, group['weight_decay']) for group in groups for p in group['params']]
    assert len(params) == len([p for p in model.parameters() if p.requires_grad])
    assert all(wd == (0 if p.ndim == 1 else decay) for p, wd in params)


def test_pipelines_build(config_path, load_config):
    cfg = load_config(config_path)
    for split in ('train', 'val', 'test'):
        Compose(cfg[f'{split}_dataloader'].dataset.pipeline)
    if 'tta_model' in cfg:
        Compose(cfg.tta_pipeline)


def test_heads_have_the_classes_of_the_dataset(config_path, load_config, head_classes):
    cfg = load_config(config_path)
    dataset = cfg.train_dataloader.dataset
    if dataset.type.startswith('saga_mm.Scenes'):
        from saga_mm.datasets.scenes import CLASSES

        classes = len(CLASSES) + (cfg.default_scope == 'mmseg')
    elif 'metainfo' in dataset:
        classes = len(dataset.metainfo.classes)
        assert len(dataset.metainfo.palette) == classes
    else:
        with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
            classes = len(registry.get(dataset.type).METAINFO['classes'])
    assert head_classes(cfg.model) == classes


@pytest.mark.parametrize(
    'key, value', [('model.backbone.arch', 'small'), ('train_cfg.max_iters', 7)]
)
def test_options_of_the_command_line_reach_the_config(load_config, key, value):
    cfg = load_config('segmentation/upernet_saga_t.py')
    cfg.merge_from_dict({key: value})
    reread = Config.fromstring(cfg.pretty_text, '.py')
    for name in key.split('.'):
        reread = reread[name]
    assert reread == value


def test_a_pretrained_checkpoint_can_be_named_on_the_command_line(load_config):
    cfg = load_config('detection/mask_rcnn_saga_t.py')
    cfg.merge_from_dict(
        {
            'model.backbone.init_cfg.type': 'Pretrained',
            'model.backbone.init_cfg.checkpoint': 'weights.pth',
        }
    )
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='weights.pth')
