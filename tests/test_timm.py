"""The backbones as models of timm. Needs timm, and a torchvision that fits torch."""

import pytest
import torch

import saga_mm

try:
    import timm
    from timm.models import group_parameters
    from timm.optim import param_groups_layer_decay

    import saga_mm.timm
# a torchvision for another torch
except (ImportError, RuntimeError) as error:
    pytest.skip(f'timm can not be imported: {error}', allow_module_level=True)

NAMES = ['saga_tiny', 'ravlt_tiny', 'sola_vision_tiny']


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 96)


def test_every_backbone_is_registered():
    assert set(saga_mm.list_backbones()) <= set(timm.list_models())
    assert not set(saga_mm.list_backbones()) & set(timm.list_models(pretrained=True))


@pytest.mark.parametrize('name', NAMES)
def test_features_are_the_maps_of_the_backbone(name, image):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    torch.manual_seed(0)
    backbone = saga_mm.create_backbone(name).eval()
    maps = model(image)
    for found, truth in zip(maps, backbone(image)[1:3], strict=True):
        assert torch.equal(found, truth)
    assert model.feature_info.channels() == [found.shape[1] for found in maps]
    assert model.feature_info.reduction() == [8, 16]
    sum(found.square().mean() for found in maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_classifies(name, image):
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.2, drop_rate=0.1).eval()
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert model(image).shape == (2, 7)
    last, maps = model.forward_intermediates(image, [0, -1])
    assert torch.equal(last, features) and torch.equal(maps[1], features)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pooled)
    model.set_grad_checkpointing()
    model.train()(image).sum().backward()


def test_layers_of_layer_decay_are_those_of_the_backbone():
    model = timm.create_model('saga_tiny')
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    for key, layer in layers.items():
        depth, number = model.body.get_layer_depth(key, 'body.')
        # timm puts norms after the last block into its layer, and the classifier into one more
        assert layer == depth - ('norms' in key and 'stages' not in key), key
    assert max(layers.values()) == number - 1
    assert param_groups_layer_decay(model, layer_decay=0.9)


@pytest.mark.parametrize('options', [dict(nonsense=1), dict(features_only=True, nonsense=1)])
def test_unknown_options_are_errors(options):
    with pytest.raises(TypeError, match='nonsense'):
        timm.create_model('saga_tiny', **options)


def test_segmentation_models_pytorch(image):
    smp = pytest.importorskip('segmentation_models_pytorch')
    for model in (smp.Unet, smp.FPN):
        out = model('tu-saga_tiny', encoder_weights=None, classes=5).eval()(image)
        assert out.shape == (2, 5, 64, 96)
