"""Helpers of the config tests: every config by path, model building, batches of random data."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData

CONFIG_DIR = Path(__file__).parents[2] / 'configs'


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests by config.

    `any_config_path` is each config in the repository. `config_path` is each one of a detector or
    segmentor, and `tiny_config_path` each of them that does not differ from another only in its
    size or in a longer schedule. Classifiers need mmpretrain, see tests/tools/test_classifiers.py.
    """
    every = sorted(CONFIG_DIR.glob('*/*.py'))
    paths = [path for path in every if path.parent.name != 'classification']
    tiny = [path for path in paths if not re.search('_([smbl]|3x)(_|$)', path.stem)]
    names = dict(any_config_path=every, config_path=paths, tiny_config_path=tiny)
    for name, values in names.items():
        if name in metafunc.fixturenames:
            ids = [f'{path.parent.name}/{path.stem}' for path in values]
            metafunc.parametrize(name, values, ids=ids)


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    monkeypatch.delenv('DATA_ROOT', raising=False)


@pytest.fixture
def config_dir():
    return CONFIG_DIR


@pytest.fixture
def load_config():
    """Parse a config, by its path or by its path below `configs/`, and enter its scope."""

    def load(path: str | Path) -> Config:
        cfg = Config.fromfile(CONFIG_DIR / path)
        if cfg.default_scope != 'mmpretrain':
            init_default_scope(cfg.default_scope)
        return cfg

    return load


def make_shallow(backbone: dict) -> None:
    known = getattr(MODELS.get(backbone.type), 'arch_settings', {})
    if isinstance(backbone.get('arch'), str) and backbone.arch in known:
        arch = known[backbone.arch]
        fields = {name: getattr(arch, name) for name in ('embed_dims', 'num_heads', 'mlp_ratios')}
        backbone.arch = dict(fields, depths=(1,) * len(arch.depths))


@pytest.fixture
def build_model():
    """Build `cfg.model` for one process, padding images to 32 rather than to the crop size.

    A backbone of this project keeps its widths and gets one block per stage.
    """

    def build(cfg: Config) -> torch.nn.Module:
        init_default_scope(cfg.default_scope)
        make_shallow(cfg.model.backbone)
        if cfg.default_scope == 'mmseg':
            cfg.model.data_preprocessor.update(size=None, size_divisor=32)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
        return model

    return build


def seg_sample(num_classes, height, width, objects, masks):
    from mmseg.structures import SegDataSample

    truth = torch.randint(num_classes, (1, height, width))
    if not objects:
        truth.fill_(255)
    return SegDataSample(gt_sem_seg=PixelData(data=truth))


def det_sample(num_classes, height, width, objects, with_masks):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    corner = torch.rand(objects, 2) * torch.tensor([width, height]) / 2
    boxes = torch.cat([corner, corner + torch.tensor([width, height]) * 0.4], dim=1).round()
    masks = np.zeros((objects, height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    instances = InstanceData(bboxes=boxes, labels=torch.randint(num_classes, (objects,)))
    if with_masks:
        instances.masks = BitmapMasks(masks, height, width)
    ignored = InstanceData(bboxes=torch.zeros(0, 4))
    return DetDataSample(gt_instances=instances, ignored_instances=ignored)


@pytest.fixture
def make_batch():
    """Two random images with random truth, as the loader of the config's toolbox gives them.

    Without objects, there is no box, or every pixel is ignored.
    """

    def make(
        scope: str,
        num_classes: int,
        height: int = 64,
        width: int = 96,
        objects: int = 3,
        masks: bool = True,
    ) -> dict:
        make_sample = dict(mmseg=seg_sample, mmdet=det_sample)[scope]
        samples = [make_sample(num_classes, height, width, objects, masks) for _ in range(2)]
        for i, sample in enumerate(samples):
            shape = (height, width)
            sample.set_metainfo(
                dict(img_id=i, ori_shape=shape, img_shape=shape, scale_factor=(1.0, 1.0))
            )
        images = torch.randint(256, (2, 3, height, width), dtype=torch.uint8)
        return dict(inputs=list(images), data_samples=samples)

    return make


@pytest.fixture
def train_step():
    """Run one training step, which sets the gradients, and return the losses by name."""

    def step(model: torch.nn.Module, batch: dict) -> dict[str, float]:
        model.train()
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
        total, log = model.parse_losses(losses)
        total.backward()
        return {name: value.item() for name, value in log.items()}

    return step


@pytest.fixture
def head_classes():
    """The number of classes of a model config, which all of its heads must agree on."""

    def numbers(node):
        if isinstance(node, dict):
            if 'num_classes' in node:
                yield node['num_classes']
            node = list(node.values())
        if isinstance(node, list | tuple):
            for child in node:
                yield from numbers(child)

    def find(model_cfg: dict) -> int:
        (number,) = set(numbers(model_cfg))
        return number

    return find
