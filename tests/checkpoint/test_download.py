"""Downloaded checkpoints are complete and have their own names, and a download times out."""

import hashlib
import http.server
import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import CheckpointLoader

from saga_mm.checkpoint import CheckpointError, download, load_file, use_safe_loading


def content(value, **more):
    buffer = io.BytesIO()
    torch.save({'w': torch.full((1000,), float(value)), **more}, buffer)
    return buffer.getvalue()


class Site(dict):
    """What a web server has, by path: bytes, or a function that answers a request."""

    url = ''
    requests = 0


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server, and an empty cache of torch."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.requests += 1
            answer = site.get(self.path)
            if answer is None:
                self.send_error(404)
            elif callable(answer):
                answer(self)
            else:
                send(self, answer)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    site.url = f'http://127.0.0.1:{server.server_port}'
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def send(handler, data, length=None):
    handler.send_response(200)
    handler.send_header('Content-Length', str(length or len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def send_without_length(data):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def cached():
    return sorted(path.name for path in Path(torch.hub.get_dir(), 'checkpoints').iterdir())


def test_urls_that_end_alike_are_different_files(site):
    site['/a/last.pth'], site['/b/last.pth'] = content(1), content(2)
    site['/b/last.pth?token=3'] = content(3)
    for _ in range(2):
        assert load_file(f'{site.url}/a/last.pth')['w'][0] == 1
        assert load_file(f'{site.url}/b/last.pth')['w'][0] == 2
        assert load_file(f'{site.url}/b/last.pth?token=3')['w'][0] == 3
    # Each is downloaded once.
    assert site.requests == 3
    assert len(cached()) == 3


@pytest.mark.parametrize('named', [True, False])
def test_a_download_that_is_cut_off_is_not_kept(site, named):
    data = content(1)
    name = f'/a-{hashlib.sha256(data).hexdigest()[:8]}.pth' if named else '/a.pth'
    site[name] = lambda handler: send(handler, data[:100], len(data))
    with pytest.raises(CheckpointError, match='can not be downloaded: ') as error:
        load_file(site.url + name)
    assert '\n' not in str(error.value)
    assert cached() == []
    # Without a length, only the end of the file shows that it is incomplete.
    site[name] = send_without_length(data[:100])
    with pytest.raises(CheckpointError):
        load_file(site.url + name)
    assert cached() == []
    site[name] = send_without_length(data)
    assert load_file(site.url + name)['w'][0] == 1
    assert load_file(site.url + name)['w'][0] == 1
    assert site.requests == 3


def test_what_torch_has_is_used_if_its_hash_is_right(site):
    data = content(1)
    name = f'a-{hashlib.sha256(data).hexdigest()[:8]}.pth'
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    assert load_file(f'{site.url}/{name}')['w'][0] == 1
    assert site.requests == 0
    # Left by an earlier download that was interrupted.
    (folder / name).write_bytes(data[:100])
    site[f'/{name}'] = data
    assert load_file(f'{site.url}/{name}')['w'][0] == 1
    assert (folder / name).read_bytes() == data
    assert site.requests == 1


def test_a_date_is_no_hash(site):
    site['/a-20221018.pth'] = content(1)
    assert load_file(f'{site.url}/a-20221018.pth')['w'][0] == 1


def test_a_silent_server_is_an_error(site, monkeypatch):
    monkeypatch.setattr(download, 'PATIENCE', 0.2)
    done = threading.Event()
    site['/a.pth'] = lambda handler: done.wait(60)
    try:
        with pytest.raises(CheckpointError, match=r'/a\.pth can not be downloaded: .*timed out'):
            load_file(f'{site.url}/a.pth')
    finally:
        done.set()


def test_a_server_that_hardly_sends_is_an_error(site, monkeypatch):
    # Each reading of the clock is 100 seconds after the one before.
    seconds = iter(range(0, 10**6, 100))
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(download, 'time', clock)
    site['/a.pth'] = content(1)
    with pytest.raises(CheckpointError, match='sends less than 1000 bytes per second'):
        load_file(f'{site.url}/a.pth')
    assert cached() == []


@pytest.mark.parametrize('url', ['http://', 'http:///a.pth', 'http://[a', 'https://a b/c.pth'])
def test_urls_that_are_none_are_errors(url):
    with pytest.raises(CheckpointError, match='can not be downloaded: ') as error:
        load_file(url)
    assert '\n' not in str(error.value)


def test_long_and_empty_names(site):
    for path in ('/', f'/{"a" * 300}.pth', f'/a.{"b" * 300}'):
        site[path] = content(1)
        assert load_file(site.url + path)['w'][0] == 1


def test_names_of_mmengine(site, monkeypatch):
    site['/a.pth'] = content(1)
    site['/c.pth'] = content(2, **{'backbone.w': torch.ones(3)})
    table = {'detectron2/resnet50_caffe_bgr': f'{site.url}/a.pth'}
    monkeypatch.setattr(download, 'get_external_models', lambda: table)
    monkeypatch.setattr(download, 'get_mmcls_models', lambda: {'c': f'{site.url}/c.pth'})
    # An old name, as in configs of mmdet.
    assert load_file('open-mmlab://resnet50_caffe_bgr')['w'][0] == 1
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loading()
    loaded = CheckpointLoader.load_checkpoint('mmcls://c')
    assert {name: weight.tolist() for name, weight in loaded['state_dict'].items()} == {
        'w': [1] * 3
    }
    with pytest.raises(CheckpointError, match='mmcls://d is unknown'):
        load_file('mmcls://d')
