import pickle
from copy import copy, deepcopy

import pytest
from mmengine.config import Config

from saga_mm.cli.run_config import RunConfig


@pytest.fixture(params=['py', 'json', 'yaml'])
def path(request, tmp_path):
    path = tmp_path / f'config.{request.param}'
    Config(dict(model=dict(depth=3), resume=False)).dump(path)
    return path


@pytest.mark.parametrize('duplicate', [lambda cfg: cfg, copy, deepcopy])
def test_saves_what_it_was_made_from(path, tmp_path, duplicate):
    cfg = Config.fromfile(path)
    text = path.read_text()
    run = RunConfig(cfg)
    run.resume = True
    run.model.depth = 5
    run.load_from = 'a.pth'
    run = duplicate(run)
    assert (run.resume, run.model.depth, run.filename) == (True, 5, str(path))
    assert cfg.model.depth == 3
    run.dump(tmp_path / f'saved{path.suffix}')
    assert (tmp_path / f'saved{path.suffix}').read_text() == text
    assert run.dump() == cfg.dump()
    assert run.pretty_text == cfg.pretty_text


def test_is_a_config_like_others_in_another_process(path):
    run = RunConfig(Config.fromfile(path))
    run.resume = True
    other = pickle.loads(pickle.dumps(run))
    assert (type(other), other.resume, other.filename) == (Config, True, str(path))
    assert 'resume = True' in other.pretty_text


def test_what_is_there_stays_if_it_can_not_be_saved(path, tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(28, 'No space left on device')

    run = RunConfig(Config.fromfile(path))
    before = path.read_bytes()
    monkeypatch.setattr('os.fsync', fsync)
    with pytest.raises(OSError, match='No space left'):
        run.dump(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
