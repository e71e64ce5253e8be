"""Each way to load a checkpoint in mmengine, mmdet and mmseg, after `use_safe_loading()`."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader

import saga_mm
from saga_mm.checkpoint import CheckpointError


class Payload:
    """Makes a file when it is unpickled without restrictions."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


@pytest.fixture
def safe_loading(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    saga_mm.use_safe_loading()


def init_detector(config, path):
    from mmdet.apis import init_detector

    return init_detector(str(config), path, device='cpu')


def init_model(config, path):
    from mmseg.apis import init_model

    return init_model(str(config), path, device='cpu')


def detection_inferencer(config, path):
    from mmdet.apis import DetInferencer

    return DetInferencer(str(config), path, device='cpu')


def segmentation_inferencer(config, path):
    from mmseg.apis import MMSegInferencer

    return MMSegInferencer(str(config), weights=path, device='cpu')


def runner(resume):
    def load(config, path):
        cfg = Config.fromfile(config)
        cfg.work_dir = str(config.parent / 'work')
        cfg.load_from, cfg.resume, cfg.launcher = path, resume, 'none'
        RUNNERS.build(cfg).train()

    return load


def model(init_cfg):
    def build(config, path):
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        cfg.model.init_cfg = init_cfg(path)
        built = MODELS.build(cfg.model)
        built.init_weights()
        return built

    return build


def backbone(init_cfg):
    def build(config, path):
        cfg = Config.fromfile(config)
        MODELS.build(dict(cfg.backbone, init_cfg=init_cfg(path))).init_weights()

    return build


def pretrained(path, kind='Pretrained'):
    return dict(type=kind, checkpoint=path)


# The config, and the function that loads the checkpoint.
WAYS = {
    'init_detector': ('det', init_detector),
    'init_model': ('seg', init_model),
    'DetInferencer': ('det', detection_inferencer),
    'MMSegInferencer': ('seg', segmentation_inferencer),
    'Runner, load_from': ('seg', runner(resume=False)),
    'Runner, resume': ('seg', runner(resume=True)),
    'segmentor': ('seg', model(pretrained)),
    'segmentor, list': ('seg', model(lambda path: [pretrained(path)])),
    'segmentor, class': ('seg', model(lambda path: pretrained(path, PretrainedInit))),
}
# These are safe without that call.
OWN_WAYS = {
    'backbone': ('seg', backbone(pretrained)),
    'backbone, list': ('seg', backbone(lambda path: [pretrained(path)])),
    'backbone, scope': ('seg', backbone(lambda path: pretrained(path, 'mmengine.Pretrained'))),
    'backbone, class': ('seg', backbone(lambda path: pretrained(path, PretrainedInit))),
}


def refuse(way, request, tmp_path):
    kind, load = way
    file = tmp_path / 'ran'
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}, 'meta': {'x': Payload(file)}}, path)
    with pytest.raises(CheckpointError, match=r'a\.pth is refused: it holds posix\.system'):
        load(request.getfixturevalue(f'tiny_{kind}'), str(path))
    assert not file.exists()


@pytest.mark.parametrize('name', WAYS)
def test_code_is_refused(request, tmp_path, safe_loading, name):
    refuse(WAYS[name], request, tmp_path)


@pytest.mark.parametrize('name', OWN_WAYS)
def test_code_is_refused_by_the_backbones_in_any_case(request, tmp_path, name):
    refuse(OWN_WAYS[name], request, tmp_path)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('name', ['init_detector', 'segmentor'])
def test_files_of_weights_alone_are_read(request, tmp_path, safe_loading, name, suffix):
    kind, load = WAYS[name]
    config = request.getfixturevalue(f'tiny_{kind}')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    weights = {
        name: torch.full_like(weight, 3, memory_format=torch.contiguous_format)
        for name, weight in MODELS.build(cfg.model).state_dict().items()
    }
    path = tmp_path / f'a.{suffix}'
    if suffix == 'safetensors':
        pytest.importorskip('safetensors.torch').save_file(weights, path)
    else:
        torch.save(weights, path)
    for name, weight in load(config, str(path)).state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize('place', ['meta', 'runtime_info'])
def test_inferencers_do_not_run_configs_of_checkpoints(tmp_path, safe_loading, tiny_det, place):
    from mmdet.apis import DetInferencer

    file = tmp_path / 'ran'
    text = f'import os\nos.system("touch {file}")\n{tiny_det.read_text()}'
    content = {'state_dict': {'w': torch.ones(1)}, 'meta': {}, 'message_hub': {'runtime_info': {}}}
    (content['meta'] if place == 'meta' else content['message_hub']['runtime_info'])['cfg'] = text
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        DetInferencer(weights=str(tmp_path / 'a.pth'), device='cpu')
    assert not file.exists()


def test_weights_under_another_name_are_loaded(tmp_path, safe_loading, tiny_seg):
    cfg = Config.fromfile(tiny_seg)
    init_default_scope(cfg.default_scope)
    # a device for SyncBN
    cfg.model.decode_head.norm_cfg.type = 'BN'
    weights = MODELS.build(cfg.model).state_dict()
    torch.save({'model': weights, 'meta': {}}, tmp_path / 'a.pth')
    loaded = init_model(tiny_seg, str(tmp_path / 'a.pth')).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
