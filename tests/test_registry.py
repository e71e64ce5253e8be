from importlib.metadata import version

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import MODELS, init_default_scope

import saga_mm
from saga_mm.cli import check_data

BASES = {
    'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py': 'EncoderDecoder',
    'mmseg::_base_/models/upernet_swin.py': 'EncoderDecoder',
    'mmdet::htc/htc_r50_fpn_1x_coco.py': 'HybridTaskCascade',
    'saga_mm::segmentation/upernet_saga_t.py': 'EncoderDecoder',
    'saga_mm::detection/_base_/models/mask_rcnn.py': 'MaskRCNN',
}


@pytest.mark.parametrize('base', BASES)
def test_configs_of_packages_are_found(tmp_path, base):
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{base}'\n")
    assert Config.fromfile(config).model.type == BASES[base]


def test_a_model_on_a_config_of_this_package(tmp_path):
    # its classes are those of the toolbox
    config = tmp_path / 'config.py'
    config.write_text(
        "_base_ = ['saga_mm::segmentation/_base_/models/upernet_small.py',"
        " 'mmseg::_base_/datasets/cityscapes_1024x1024.py', 'mmseg::_base_/default_runtime.py']\n"
        'model = dict(data_preprocessor=dict(size=(64, 64)))\n'
        'model.update(decode_head=dict(num_classes=3), auxiliary_head=dict(num_classes=3))\n'
    )
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    assert isinstance(MODELS.build(cfg.model).backbone, saga_mm.backbones.SAGA)
    with pytest.raises(FileNotFoundError, match=r'leftImg8bit/train/\*_leftImg8bit\.png'):
        check_data(cfg, ['train'])


def test_distributions_that_are_installed_keep_their_names():
    assert version('saga_mm')
    assert MODULE2PACKAGE['mmdet'] == 'mmdet'
    assert MODULE2PACKAGE['mmpretrain'] == 'mmpretrain'
