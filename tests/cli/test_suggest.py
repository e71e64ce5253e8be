"""What errors about mistyped options, types and arguments suggest."""

import argparse
from collections import OrderedDict

import pytest
from mmengine.registry import DefaultScope, build_from_cfg, init_default_scope
from torch import nn

from saga_mm.cli import add_options
from saga_mm.cli.errors import describe
from saga_mm.registry import MODELS


@pytest.mark.parametrize(
    ('argument', 'suggested'),
    [
        ('--cfg-option2', '--cfg-options'),
        ('--cfg-opitons=a=1', '--cfg-options'),
        ('--out-drr', '--out-dir'),
        ('--zzzzzz', None),
        ('extra', None),
    ],
)
@pytest.mark.parametrize('command', [[], ['map']])
def test_mistyped_options(capsys, argument, suggested, command):
    parser = argparse.ArgumentParser()
    where = parser.add_subparsers().add_parser('map') if command else parser
    where.add_argument('--out-dir')
    add_options(where)
    if command:
        add_options(parser, config=False)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args([*command, argument])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert ('did you mean' in message) is bool(suggested)
    assert not suggested or f'did you mean {suggested!r}?' in message


@pytest.fixture(autouse=True)
def scopes(monkeypatch):
    """Runs of other tests leave a default scope, in which names are looked up."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())


@pytest.mark.parametrize(
    ('config', 'scope', 'suggested'),
    [
        (dict(type='SAGAA', arch='tiny'), None, 'SAGA'),
        (dict(type='SAGAA', arch='tiny'), 'mmengine', 'saga_mm.SAGA'),
        (dict(type='RAVLT', arch='tiny'), 'mmengine', 'saga_mm.RAVLT'),
        (dict(type='saga_mm.SAGAA', arch='tiny'), None, 'saga_mm.SAGA'),
        (dict(type='saga_mm.SAGAA', arch='tiny'), 'mmengine', 'saga_mm.SAGA'),
        (dict(type='saga.SAGA', arch='tiny'), 'mmengine', 'saga_mm.SAGA'),
        (dict(type='SAGA', arch='tiny', drop_path_rte=0.1), None, 'drop_path_rate'),
        (dict(type='SAGA', arch='tiny', zzzzzz=0.1), None, None),
        (dict(type='Zzzzzz'), None, None),
        (dict(type='Zzzzzz'), 'mmengine', None),
    ],
)
def test_mistyped_types_and_arguments(config, scope, suggested):
    init_default_scope(scope or 'saga_mm')
    with pytest.raises((KeyError, TypeError)) as error:
        build_from_cfg(config, MODELS)
    message = describe(error.value)
    assert ('did you mean' in message) is bool(suggested)
    assert not suggested or f'did you mean {suggested!r}?' in message


def test_an_error_of_a_constructor_suggests_nothing():
    @MODELS.register_module(name='NearlyThere', force=True)
    class NearlyThere(nn.Module):
        def __init__(self) -> None:
            raise KeyError('NearlyTher')

    try:
        with pytest.raises(KeyError) as error:
            build_from_cfg(dict(type='NearlyThere'), MODELS)
        assert 'did you mean' not in describe(error.value)
    finally:
        MODELS.module_dict.pop('NearlyThere')
