"""Backbones by name, without a config."""

import pytest
import torch

import saga_mm
from saga_mm.checkpoint import CheckpointError


def test_every_size_of_every_backbone_has_a_name():
    names = saga_mm.list_backbones()
    kinds = [getattr(saga_mm, name) for name in saga_mm.backbones.__all__]
    assert len(names) == sum(len(kind.arch_settings) for kind in kinds)
    assert {'saga_tiny', 'ravlt_large', 'sola_vision_base'} <= set(names)


@pytest.mark.parametrize('name', ['saga_tiny', 'ravlt_tiny', 'sola_vision_tiny'])
def test_is_what_a_config_builds(name):
    kind = dict(saga='SAGA', ravlt='RAVLT', sola='SoLAVision')[name.split('_')[0]]
    options = dict(out_indices=(1, 2), in_channels=4)
    torch.manual_seed(0)
    built = saga_mm.registry.MODELS.build(dict(type=f'saga_mm.{kind}', arch='tiny', **options))
    torch.manual_seed(0)
    created = saga_mm.create_backbone(name, **options)
    assert type(created) is type(built)
    for (key, value), truth in zip(
        created.state_dict().items(), built.state_dict().values(), strict=True
    ):
        assert torch.equal(value, truth), key
    image = torch.randn(1, 4, 64, 96)
    maps = zip(created.eval()(image), built.eval()(image), strict=True)
    assert all(torch.equal(found, truth) for found, truth in maps)


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_takes_weights_of_a_file(prefix, tmp_path):
    trained = saga_mm.create_backbone('saga_tiny')
    file = tmp_path / 'weights.pth'
    torch.save({prefix + key: value for key, value in trained.state_dict().items()}, file)
    loaded = saga_mm.create_backbone('saga_tiny', file, prefix=prefix)
    for value, truth in zip(loaded.parameters(), trained.parameters(), strict=True):
        assert torch.equal(value, truth)

    torch.save({'other': torch.zeros(1)}, file)
    with pytest.raises(CheckpointError):
        saga_mm.create_backbone('saga_tiny', file)


@pytest.mark.parametrize(
    ('name', 'message'),
    [('saga_tyni', "got 'saga_tyni': did you mean 'saga_tiny'?"), ('resnet50', "got 'resnet50'")],
)
def test_an_unknown_name_is_one_line(name, message):
    with pytest.raises(ValueError, match='name must be one of saga_tiny, ') as error:
        saga_mm.create_backbone(name)
    assert str(error.value).endswith(message) and '\n' not in str(error.value)


def test_options_are_those_of_the_class():
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_rate'"):
        saga_mm.create_backbone('saga_tiny', drop_rate=0.1)
