import builtins
import http.server
import os
import sys
import threading
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.runner import CheckpointLoader
from torch import nn

from saga_mm.checkpoint import (
    CheckpointError,
    download,
    load_file,
    load_weights,
    use_safe_loading,
)
from saga_mm.checkpoint import weights as weights_module
from saga_mm.checkpoint.loading import load_from_vetted


class Reduced:
    """An object that is pickled as a given call."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def safe_loading(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loading()


def save(path, value, **options):
    torch.save(value, path, **options)
    return path


def payloads(file):
    write = f"open({str(file)!r}, 'w').close()"
    return {
        'os': Reduced(os.system, (f'touch {file}',)),
        'exec': Reduced(builtins.exec, (write,)),
        'open': Reduced(builtins.open, (str(file), 'w')),
        'getattr': Reduced(getattr, (OrderedDict, 'update')),
        'method': Reduced(getattr, (HistoryBuffer, '__setstate__')),
        'module': Reduced(nn.Linear, (1, 1)),
    }


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('name', payloads(''))
def test_payload_is_refused_and_does_not_run(tmp_path, safe_loading, name, zipped):
    file = tmp_path / 'ran'
    path = tmp_path / 'bad.pth'
    content = {'state_dict': {'w': torch.ones(1)}, 'meta': payloads(file)[name]}
    save(path, content, _use_new_zipfile_serialization=zipped)
    for load in (load_file, CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match=r'bad\.pth is refused: it holds') as error:
            load(str(path))
        assert '\n' not in str(error.value)
    assert not file.exists()


def test_payload_in_the_weights_of_any_module_is_refused(tmp_path, safe_loading):
    file = tmp_path / 'ran'
    path = save(tmp_path / 'bad.pth', {'w': torch.ones(1), 'x': payloads(file)['os']})

    class Module(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
            self.fc = nn.Linear(1, 1)

    with pytest.raises(CheckpointError, match='refused'):
        Module().init_weights()
    assert not file.exists()


def test_every_scheme_of_mmengine_is_safe(safe_loading):
    assert set(CheckpointLoader._schemes.values()) == {load_from_vetted}


def test_config_text_is_dropped(tmp_path, safe_loading):
    # mmengine would run it on a resume.
    content = {
        'meta': {'config': 'raise SystemExit', 'iter': 3},
        'state_dict': {'w': torch.ones(1)},
    }
    path = save(tmp_path / 'a.pth', content)
    assert CheckpointLoader.load_checkpoint(str(path))['meta'] == {'iter': 3}


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_what_mmengine_writes(tmp_path, zipped):
    log = HistoryBuffer([0.5, 1.5], [1, 2])
    content = {
        'meta': {'iter': 2, 'palette': np.arange(6, dtype=np.uint8).reshape(2, 3), 'x': (1, None)},
        'message_hub': {'log_scalars': OrderedDict(loss=log), 'info': {'best': np.float32(0.25)}},
        'state_dict': OrderedDict(w=torch.arange(3.0)),
    }
    path = save(tmp_path / 'a.pth', content, _use_new_zipfile_serialization=zipped)
    loaded = load_file(path)
    assert loaded['meta']['palette'].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded['meta']['palette'].dtype == np.uint8
    assert loaded['meta']['iter'] == 2
    assert loaded['message_hub']['info'] == {'best': 0.25}
    buffer = loaded['message_hub']['log_scalars']['loss']
    buffer.update(4.0, 1)
    assert [value.tolist() for value in buffer.data] == [[0.5, 1.5, 4.0], [1, 2, 1]]
    assert loaded['state_dict']['w'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('core', [b'core', b'_core'])
def test_reads_arrays_of_numpy_1_and_2(tmp_path, core):
    content = {'w': torch.ones(1), 'a': np.arange(3), 'b': np.float64(0.5)}
    path = save(tmp_path / 'a.pth', content, _use_new_zipfile_serialization=False)
    pickled = path.read_bytes()
    assert b'core.multiarray' in pickled
    pickled = pickled.replace(b'numpy._core.', b'numpy.core.').replace(b'.core.', b'.%s.' % core)
    path.write_bytes(pickled)
    loaded = load_file(path)
    assert loaded['a'].tolist() == [0, 1, 2]
    assert loaded['b'] == 0.5


@pytest.mark.parametrize(
    'array', [np.array([None]), np.array(['text']), np.zeros(2, 'f4,f4'), np.array(1, 'M8[s]')]
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    path = save(tmp_path / 'a.pth', {'w': torch.ones(1), 'a': array})
    with pytest.raises(CheckpointError, match=r'refused: it holds numpy\.dtype'):
        load_file(path)


def test_a_file_can_not_make_numpy_read_pointers(tmp_path):
    # These flags mark eight bytes of a number as a Python object.
    dtype = Reduced(np.dtype, ('f8', False, True), (3, '<', None, None, None, -1, -1, 63))
    array = Reduced(
        np._core.multiarray._reconstruct,
        (np.ndarray, (0,), b'b'),
        (1, (1,), dtype, False, b'A' * 8),
    )
    path = save(tmp_path / 'a.pth', {'w': torch.ones(1), 'a': array})
    loaded = load_file(path)['a']
    assert loaded.dtype == np.float64
    assert not loaded.dtype.hasobject
    assert isinstance(loaded[0], np.float64)
    assert np.dtype('f8').flags == 0


def damaged(folder):
    whole = save(folder / 'whole.pth', {'w': torch.arange(1000.0)}).read_bytes()
    legacy = save(
        folder / 'legacy.pth', {'w': torch.arange(1000.0)}, _use_new_zipfile_serialization=False
    ).read_bytes()
    rng = np.random.default_rng(0)
    yield b''
    yield b'<html>404</html>'
    yield b'PK\x03\x04'
    for data in (whole, legacy):
        for part in (0.1, 0.5, 0.9, 0.999):
            yield data[: int(len(data) * part)]
    for size in (1, 10, 1000):
        yield from (rng.bytes(size) for _ in range(20))
        yield from (b'\x80\x02' + rng.bytes(size) for _ in range(20))


def test_damaged_file_is_an_error(tmp_path):
    path = tmp_path / 'a.pth'
    for data in damaged(tmp_path):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r'a\.pth (can not be read|is)') as error:
            load_file(path)
        assert '\n' not in str(error.value)


def test_other_archives_are_errors(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', 'a')
    with pytest.raises(CheckpointError, match='can not be read'):
        load_file(path)
    torch.jit.script(nn.Linear(1, 1)).save(path)
    with pytest.raises(CheckpointError, match='can not be read'):
        load_file(path)


@pytest.mark.parametrize('content', [[torch.ones(1)], {}, {'a': 1, 'b': {'c': 'd'}}, 3])
def test_foreign_file_is_an_error(tmp_path, content):
    path = save(tmp_path / 'a.pth', content)
    with pytest.raises(
        CheckpointError, match=r'a\.pth is no checkpoint of a model: expected a dict'
    ):
        load_file(path)


def test_missing_file_and_folder_are_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r'a\.pth does not exist: check the path'):
        load_file(tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='is a folder: name a checkpoint in it'):
        load_file(tmp_path)
    with pytest.raises(CheckpointError, match='s3://a can not be loaded: download it'):
        load_file('s3://a')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server for the folder `web`, and an empty cache of torch."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    (tmp_path / 'web').mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / 'web')

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_downloaded_once(tmp_path, server):
    path = save(tmp_path / 'web' / 'a.pth', {'w': torch.ones(2)})
    assert load_file(f'{server}/a.pth')['w'].sum() == 2
    path.unlink()
    assert load_file(f'{server}/a.pth')['w'].sum() == 2


def test_failed_downloads_are_errors(tmp_path, server):
    with pytest.raises(CheckpointError, match=r'/a\.pth can not be downloaded: .*404'):
        load_file(f'{server}/a.pth')
    save(tmp_path / 'web' / 'a-0123456789.pth', {'w': torch.ones(2)})
    with pytest.raises(CheckpointError, match='can not be downloaded: invalid hash'):
        load_file(f'{server}/a-0123456789.pth')
    file = tmp_path / 'ran'
    save(tmp_path / 'web' / 'b.pth', {'w': torch.ones(2), 'x': payloads(file)['os']})
    with pytest.raises(CheckpointError, match='refused'):
        load_file(f'{server}/b.pth')
    assert not file.exists()


def test_names_in_mmengines_tables(monkeypatch, tmp_path, server):
    save(tmp_path / 'web' / 'a.pth', {'w': torch.ones(2)})
    monkeypatch.setattr(download, 'get_external_models', lambda: {'a': f'{server}/a.pth'})
    assert load_file('open-mmlab://a')['w'].sum() == 2
    with pytest.raises(CheckpointError, match='open-mmlab://b is unknown'):
        load_file('open-mmlab://b')


def layers():
    return nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.BatchNorm2d(3), c=nn.Linear(3, 1)))


@pytest.mark.parametrize(
    ('nest', 'prefix', 'argument'),
    [
        (lambda weights: weights, '', None),
        (lambda weights: {'state_dict': weights}, 'module.', None),
        (lambda weights: {'model': weights, 'epoch': 3}, 'backbone.', 'backbone.'),
        (lambda weights: {'state_dict': weights}, 'module.backbone.', 'backbone'),
    ],
)
def test_backbone_weights(tmp_path, nest, prefix, argument):
    source, target = layers(), layers()
    weights = {prefix + name: weight for name, weight in source.state_dict().items()}
    path = save(tmp_path / 'a.pth', nest(weights))
    match = load_weights(target, path, prefix=argument)
    for name, weight in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], weight), name
    assert len(match.loaded) == len(weights)
    assert not (match.missing or match.unexpected or match.mismatched)


def test_backbone_weights_are_reported(tmp_path, monkeypatch):
    source, target = layers(), layers()
    weights = source.state_dict()
    del weights['a.weight'], weights['b.num_batches_tracked']
    weights['c.weight'] = torch.ones(1, 4)
    weights |= {f'head.{i}': torch.ones(1) for i in range(5)}
    path = save(tmp_path / 'a.pth', weights)
    lines = []
    monkeypatch.setattr(weights_module, 'print_log', lambda text, **_: lines.append(text))
    before = target.a.weight.clone()
    match = load_weights(target, path)
    assert match.missing == ['a.weight']
    assert match.mismatched == ['c.weight']
    assert len(match.unexpected) == 5
    assert lines == [
        f'Sequential from {path}, weights: 6 loaded, 1 missing (a.weight), '
        '5 unexpected (head.0, head.1, head.2, ...), 1 mismatched (c.weight)'
    ]
    assert torch.equal(target.a.weight, before)
    assert torch.equal(target.a.bias, source.a.bias)


def test_backbone_weights_that_fit_nowhere_are_an_error(tmp_path):
    weights = {f'backbone.{name}': weight for name, weight in layers().state_dict().items()}
    path = save(tmp_path / 'a.pth', {'state_dict': weights})
    with pytest.raises(
        CheckpointError, match=r'no weight that fits Sequential.*backbone\.a'
    ) as error:
        load_weights(layers(), path)
    assert '\n' not in str(error.value)
    with pytest.raises(CheckpointError, match="under prefix='neck"):
        load_weights(layers(), path, prefix='neck')


def test_threads_may_load_at_once(tmp_path):
    content = {'w': torch.ones(1), 'a': np.arange(3), 'log': HistoryBuffer([0.5], [1])}
    path = save(tmp_path / 'a.pth', content)
    before = torch.serialization.get_safe_globals()
    with ThreadPoolExecutor(4) as threads:
        for loaded in threads.map(load_file, [path] * 100):
            assert loaded['a'].tolist() == [0, 1, 2]
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_the_own_list_of_a_program_does_not_matter(tmp_path):
    # The real numpy functions, which some programs allow.
    entries = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, getattr]
    forged = Reduced(np.ndarray, ((1,), 'O', b'A' * 8))
    path = save(tmp_path / 'a.pth', {'w': torch.ones(1), 'x': forged})
    with torch.serialization.safe_globals(entries):
        with pytest.raises(CheckpointError):
            load_file(path)
        assert set(entries) <= set(torch.serialization.get_safe_globals())


def test_little_that_unpacks_to_much_is_refused(tmp_path):
    path = save(tmp_path / 'a.pth', {'w': torch.zeros(2**26)})
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / 'b.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert (tmp_path / 'b.pth').stat().st_size < 2**20
    with pytest.raises(CheckpointError, match=r'b\.pth can not be read: .* bytes unpack to 2684'):
        load_file(tmp_path / 'b.pth')
    # A file that somebody compressed, with an ordinary ratio, is read.
    with zipfile.ZipFile(tmp_path / 'c.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        path = save(tmp_path / 'a.pth', {'w': torch.rand(1000)})
        with zipfile.ZipFile(path) as whole:
            for name in whole.namelist():
                archive.writestr(name, whole.read(name))
    assert load_file(tmp_path / 'c.pth')['w'].shape == (1000,)


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('~nobody_of_this_name/a.pth', 'can not be opened: .*home'),
        ('a' * 5000, 'can not be opened: .*too long'),
        ('a\0b', 'does not exist|can not be opened'),
        ('\x1b[2Ja.pth', r'\\x1b\[2Ja\.pth does not exist'),
    ],
)
def test_paths_that_are_none_are_errors(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_file(path)
    assert str(error.value).isprintable()


def test_a_closed_folder_is_an_error(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(download.Path, 'is_file', closed)
    with pytest.raises(CheckpointError, match=r'a\.pth can not be opened: .*Permission denied'):
        load_file(tmp_path / 'a.pth')


def test_a_file_of_torch_may_have_the_suffix_of_safetensors(tmp_path):
    """mmengine's `filename_tmpl` names the files of a training as it likes."""
    path = tmp_path / 'iter_1.safetensors'
    torch.save(dict(meta=dict(iter=1), state_dict=dict(w=torch.ones(3))), path)
    assert load_file(path)['meta'] == dict(iter=1)


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(b'damaged')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(CheckpointError, match='the package is missing: pip install safetensors'):
        load_file(path)
    monkeypatch.undo()
    safetensors = pytest.importorskip('safetensors.torch')
    with pytest.raises(CheckpointError, match='can not be read'):
        load_file(path)
    safetensors.save_file({'w': torch.ones(3)}, path)
    assert load_file(path)['w'].sum() == 3
