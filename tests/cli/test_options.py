"""The loader of configs: what it accepts, and how it reports what it cannot read."""

from argparse import ArgumentTypeError

import pytest

from saga_mm.cli import byte_size, load_config

# Files by name, and the error for config.py.
BROKEN = {
    'syntax': (
        {'config.py': 'a = ('},
        r"config\.py is no Python: '\(' was never closed \(line 1\)",
    ),
    'syntax in a base': (
        {'config.py': "_base_ = './base.py'", 'base.py': 'a = 1\nb = ('},
        r"base\.py is no Python: '\(' was never closed \(line 2\)",
    ),
    'name': (
        {'config.py': 'model = dict(type=missing)'},
        r'config\.py can not be read as a config: NameError: .*missing',
    ),
    'name in a base': (
        {'config.py': "_base_ = './base.py'", 'base.py': 'a = missing'},
        r'base\.py can not be read as a config: NameError: .*missing',
    ),
    'not a config': ({'config.yaml': '[1]'}, r'config\.yaml can not be read as a config'),
    'import': (
        {'config.py': "custom_imports = dict(imports=['no_such_module'])"},
        r'config\.py can not be read as a config: ImportError: .*no_such_module',
    ),
    'json': ({'config.json': '{"model": '}, r'config\.json can not be read as a config'),
    'model': ({'config.py': 'model = 3'}, r'model in .*config\.py must be a dict, got 3'),
    'no model': ({'config.py': 'a = 3'}, r"config\.py must have an entry 'model', got None"),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_config_that_can_not_be_read_is_named(tmp_path, name):
    files, message = BROKEN[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path / next(iter(files)), {}, ('model',))
    assert 'sys.path' not in str(error.value)


def test_a_mistyped_config_of_the_package_is_named():
    for folder, near in (('segmentation', "; did you mean 'upernet_saga_t.py'?"), ('nowhere', '')):
        name = f'saga_mm::{folder}/upernet_sga_t.py'
        with pytest.raises(FileNotFoundError) as error:
            load_config(name, {}, ('model',))
        assert str(error.value) == f'there is no config {name}{near}'


# Optional entries that mmengine reads if they are there.
@pytest.mark.parametrize('entry', ['sync_bn', 'compile', 'efficient_conv_bn_eval', 'work_dir'])
def test_options_may_add_what_mmengine_reads(tmp_path, entry):
    path = tmp_path / 'config.py'
    path.write_text('model = dict(type=1)')
    assert load_config(path, {entry: 'torch'}, ('model',))[entry] == 'torch'
    with pytest.raises(ValueError, match="has no entry 'sink_bn'; did you mean 'sync_bn'"):
        load_config(path, {'sink_bn': 'torch'}, ('model',))


def test_options_for_variables_say_that_they_change_nothing_else(tmp_path, capsys):
    path = tmp_path / 'config.py'
    path.write_text('root = "a"\nmodel = dict(path=root)')
    cfg = load_config(path, {'model.path': 'b'}, ('model',))
    assert cfg.model.path == 'b' and not capsys.readouterr().out
    cfg = load_config(path, {'root': 'b'}, ('model',))
    assert (cfg.root, cfg.model.path) == ('b', 'a')
    assert f'root changes a variable of {path}, and no entry' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('text', 'size'),
    [
        ('4GiB', 2**32),
        ('1.5 gib', 3 * 2**29),
        ('800MB', 800_000_000),
        ('2e9', 2 * 10**9),
        ('7k', 7000),
    ],
)
def test_sizes(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize('text', ['', '4 XB', '-1GB', '0', 'GiB', '1.2.3MB', 'inf', '4GiBs'])
def test_other_sizes_are_refused(text):
    with pytest.raises(ArgumentTypeError, match='expected a size such as 4GiB'):
        byte_size(text)
