import argparse
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope, init_default_scope

from saga_mm.apis import build_model
from saga_mm.checkpoint import CheckpointError
from saga_mm.cli import add_common_arguments, command_line
from saga_mm.cli.errors import describe
from saga_mm.stack import StackError


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ValueError('a: expected b,\n   got c'), 'a: expected b, got c'),
        (CheckpointError('a.pth is refused'), 'a.pth is refused'),
        (StackError('two stacks'), 'two stacks'),
        (FileNotFoundError(2, 'No such file', 'a.py'), 'No such file: a.py'),
        (FileNotFoundError('a.py is missing'), 'a.py is missing'),
        (KeyError('X is not in the registry'), 'KeyError: X is not in the registry (run'),
        (RuntimeError('wrong\nshape'), 'RuntimeError: wrong shape (run with --debug for'),
        (
            RuntimeError('[/a/gloo/transport/tcp/pair.cc:537] Read error'),
            'the connection to another process of this run is lost',
        ),
        (ValueError(), 'ValueError:'),
        (ValueError('a ' * 3000), 'a a a'),
    ],
)
def test_errors_are_one_line(error, line):
    assert describe(error).startswith(line)
    assert '\n' not in describe(error)
    assert len(describe(error)) < 1100
    with pytest.raises(SystemExit) as exit_, command_line(debug=False):
        raise error
    assert exit_.value.code == f'error: {describe(error)}'
    with pytest.raises(type(error)), command_line(debug=True):
        raise error


def test_what_is_no_error_passes():
    with command_line(debug=False):
        pass
    with pytest.raises(SystemExit) as exit_, command_line(debug=False):
        raise SystemExit(3)
    assert exit_.value.code == 3
    with pytest.raises(SystemExit) as exit_, command_line(debug=False):
        raise KeyboardInterrupt
    assert exit_.value.code == 130


def test_ctrl_c_is_no_error_of_syntax(capsys):
    # mmengine raises this error while it formats a config.
    with pytest.raises(SystemExit) as exit_, command_line(debug=False):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SyntaxError('Failed to format the config file')  # noqa: B904
    assert exit_.value.code == 130
    assert capsys.readouterr().err == 'interrupted\n'


@pytest.mark.parametrize(
    ('error', 'hint'),
    [
        (KeyError('mask'), "an object has no mask ('segmentation' in a COCO file)"),
        (
            RuntimeError("Caught KeyError in DataLoader worker process 0.\nKeyError: 'mask'"),
            'an object has no mask',
        ),
        (KeyError('masks'), ''),
        (
            TypeError("class `EncoderDecoder`: got an unexpected keyword argument 'pretrained'"),
            'set pretrained=None in model',
        ),
        (RuntimeError('operator torchvision::nms does not exist'), 'from the same index'),
        (TypeError('NoneType takes no arguments'), 'does not work with transformers 5'),
        (Exception('Cannot find valid image after 1000!'), 'whether the classes of the data set'),
        (
            RuntimeError('expected input[1, 64, 8, 8] to have 96 channels, but got 64 channels'),
            "must be the widths of the backbone's maps",
        ),
    ],
)
def test_errors_of_others_are_explained(error, hint):
    assert hint in describe(error)
    assert bool(hint) is (';' in describe(error))


def test_an_assertion_without_a_message_shows_its_line():
    def check(inputs, in_channels):
        assert len(inputs) == len(in_channels)

    with pytest.raises(AssertionError) as error:
        check([1], [1, 2])
    shown = AssertionError().with_traceback(error.value.__traceback__)
    assert describe(shown).startswith('AssertionError: assert len(inputs) == len(in_channels) ')
    assert describe(AssertionError('a message')).startswith('AssertionError: a message (run')


def test_a_class_that_can_not_be_looked_up_is_explained():
    class Metric:
        cat_ids = (1, 2)

        def results2json(self, labels):
            for label in labels:
                self.cat_ids[label]

    with pytest.raises(IndexError) as error:
        Metric().results2json([0, 7])
    assert 'predicts class 7, and the data set has 2 classes' in describe(error.value)


@pytest.mark.parametrize('scope', ['mmdet', 'mmpretrain', 'mmseg'])
def test_a_missing_toolbox_is_named(monkeypatch, scope):
    monkeypatch.setattr(DefaultScope, '_instance_dict', {})
    monkeypatch.setitem(sys.modules, scope, None)
    monkeypatch.setitem(sys.modules, f'{scope}.registry', None)
    init_default_scope(scope)
    for build in (
        lambda: DATASETS.build(dict(type='NowhereDataset')),
        lambda: build_model(Config(dict(default_scope=scope, model=dict(type='Nowhere')))),
    ):
        with pytest.raises((ImportError, KeyError, ValueError)) as error:
            build()
        assert f'; {scope} is not installed: pip install ' in describe(error.value)
    missing = ModuleNotFoundError(f'No module named {scope!r}')
    assert f'; {scope} is not installed: pip install ' in describe(missing)


def test_a_toolbox_that_is_there_is_not_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', {})
    init_default_scope('mmseg')
    with pytest.raises(KeyError) as error:
        DATASETS.build(dict(type='NowhereDataset'))
    assert 'installed' not in describe(error.value)


def test_common_arguments():
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    assert parser.parse_args([]).cfg_options == {}
    args = parser.parse_args(['--local-rank', '1', '--cfg-options', 'a.b=3', 'c=[1,x]', 'd=u=v'])
    assert args.cfg_options == {'a.b': 3, 'c': [1, 'x'], 'd': 'u=v'}
    assert args.local_rank == 1
    assert parser.parse_args([]).cfg_options == {}
