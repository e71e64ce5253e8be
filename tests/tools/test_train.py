import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from saga_mm.checkpoint import load_file

ROOT = Path(__file__).resolve().parents[2]
KILLER = """
import os, signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Killer(Hook):
    priority = 'LOWEST'

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)
"""


class Payload:
    """Makes a file when it is unpickled as usual."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


def failure(main, *arguments):
    """The error of a tool, without its 'error: '."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    message = exit_.value.code
    assert isinstance(message, str), message
    assert message.startswith('error: ')
    assert '\n' not in message
    return message.removeprefix('error: ')


def losses(work_dir):
    """Losses by iteration, of all runs in a work dir; runs that overlap must agree."""
    found = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if 'loss' in row:
                assert found.setdefault(row['iter'], row['loss']) == row['loss'], row
    return found


def start_and_kill(config, work_dir, iteration):
    """Train in another process until it kills itself after an iteration."""
    (config.parent / 'killer.py').write_text(KILLER)
    killed = config.with_name(f'killed_{config.name}')
    killed.write_text(
        f"_base_ = './{config.name}'\n"
        f"custom_imports = dict(imports=['saga_mm', 'killer'], allow_failed_imports=False)\n"
        f"custom_hooks = [dict(type='Killer', iteration={iteration})]\n"
        'randomness = dict(seed=7)\n'
    )
    paths = [ROOT, ROOT / 'kernels', config.parent]
    command = [sys.executable, ROOT / 'tools/train.py', killed, '--work-dir', work_dir, '--debug']
    result = subprocess.run(
        command,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr


# killed one iteration after a checkpoint, and in the epoch after one
@pytest.mark.parametrize(
    ('kind', 'iteration', 'checkpoint', 'iterations'),
    [('seg', 5, 'iter_4.pth', 7), ('det', 8, 'epoch_2.pth', 9)],
)
def test_killed_run_resumes_to_the_loss_of_an_uninterrupted_one(
    tool, request, tmp_path, kind, iteration, checkpoint, iterations
):
    config = request.getfixturevalue(f'tiny_{kind}')
    train = tool('train').main
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    train([str(config), '--work-dir', str(whole), '--cfg-options', 'randomness.seed=7'])
    start_and_kill(config, parts, iteration)
    assert Path((parts / 'last_checkpoint').read_text()).name == checkpoint
    assert max(losses(parts)) == iteration
    # the config has no seed: the order of the data, too, comes from the checkpoint
    train([str(config), '--work-dir', str(parts), '--resume'])

    assert len(losses(whole)) == iterations
    assert losses(parts) == losses(whole)
    last = Path((whole / 'last_checkpoint').read_text()).name
    expected, actual = (load_file(folder / last)['state_dict'] for folder in (whole, parts))
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name

    # the same, without the random state
    other = tmp_path / 'other'
    content = load_file(parts / checkpoint)
    del content['random_state']
    torch.save(content, tmp_path / 'forgetful.pth')
    train([str(config), '--work-dir', str(other), '--resume', str(tmp_path / 'forgetful.pth')])
    assert losses(other).items().isdisjoint(losses(whole).items())


def test_checkpoint_of_validation_resumes_before_it(tool, tiny_seg, tmp_path):
    # the best checkpoint is saved while validation draws numbers of its own
    train = tool('train').main
    whole = tmp_path / 'whole'
    train([str(tiny_seg), '--work-dir', str(whole)])
    best = next(whole.glob('best_*.pth'))
    regular = load_file(whole / f'iter_{load_file(best)["meta"]["iter"]}.pth')['random_state']
    state = load_file(best)['random_state']
    assert torch.equal(state.pop('torch'), regular.pop('torch'))
    assert state == regular


def test_bad_checkpoints_are_refused_in_one_line(tool, tiny_seg, tmp_path):
    train, test = tool('train').main, tool('test').main
    file = tmp_path / 'ran'
    path = tmp_path / 'a.pth'
    work_dir = ('--work-dir', tmp_path / 'work')
    uses = {
        'resume': lambda: failure(train, tiny_seg, *work_dir, '--resume', path),
        'load_from': lambda: failure(
            train, tiny_seg, *work_dir, '--cfg-options', f'load_from={path}'
        ),
        'init_cfg': lambda: failure(
            train,
            tiny_seg,
            *work_dir,
            '--cfg-options',
            'model.backbone.init_cfg.type=Pretrained',
            f'model.backbone.init_cfg.checkpoint={path}',
        ),
        'test': lambda: failure(test, tiny_seg, path, *work_dir),
    }
    torch.save({'state_dict': {'w': torch.ones(1)}, 'x': Payload(file)}, path)
    for name, use in uses.items():
        assert 'a.pth is refused: it holds posix.system' in use(), name
    assert not file.exists()
    torch.save(nn.Linear(1, 1).state_dict(), path)
    assert 'can not be resumed: it holds weights, but no message_hub, meta, opt' in uses['resume']()
    for name in ('load_from', 'test'):
        assert 'does not fit the model of the config, weights: 0 loaded' in uses[name](), name
    path.unlink()
    assert 'a.pth does not exist: check the path' in uses['init_cfg']()


def test_text_in_a_checkpoint_is_not_run(tool, tiny_seg, tmp_path):
    # Runner.resume runs meta['config'], and inferencers run the text in the message hub
    train = tool('train').main
    options = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', 'train_cfg.max_iters=4']
    train([str(tiny_seg), *options])
    content = load_file(tmp_path / 'work/iter_2.pth')
    file = tmp_path / 'ran'
    text = f'import os\nos.system("touch {file}")'
    content['meta'].update(config=text, cfg=text)
    content['message_hub']['runtime_info']['cfg'] = text
    torch.save(content, tmp_path / 'a.pth')
    (tmp_path / 'work/iter_4.pth').unlink()
    train([str(tiny_seg), '--resume', str(tmp_path / 'a.pth'), *options])
    assert not file.exists()
    saved = load_file(tmp_path / 'work/iter_4.pth')
    for config in (saved['meta']['cfg'], saved['message_hub']['runtime_info']['cfg']):
        assert 'touch' not in config
        assert 'EncoderDecoder' in config


def test_mistakes_are_one_line(tool, tiny_seg, tmp_path, monkeypatch):
    main = tool('train').main
    work_dir = ('--work-dir', tmp_path / 'work')
    assert 'missing.py' in failure(main, tmp_path / 'missing.py', *work_dir)
    assert 'nothing to resume' in failure(main, tiny_seg, *work_dir, '--resume')
    (tmp_path / 'file').touch()
    assert failure(main, tiny_seg, '--work-dir', tmp_path / 'file/work').startswith(
        'Not a directory'
    )
    assert failure(main, tiny_seg, '--work-dir', tmp_path / 'file').startswith('File exists')
    option = ('--cfg-options', 'model.backbone.drop_path=0.1')
    message = failure(main, tiny_seg, *work_dir, *option)
    assert 'drop_path' in message
    assert message.endswith('(run with --debug for the traceback)')
    assert 'needs auto_scale_lr' in failure(main, tiny_seg, *work_dir, '--auto-scale-lr')
    monkeypatch.setattr('saga_mm.apis.runs.get_device', lambda: 'cpu')
    assert failure(main, tiny_seg, *work_dir, '--amp').startswith('mixed precision (--amp')
    with pytest.raises(TypeError):
        main([str(tiny_seg), '--debug', '--work-dir', str(tmp_path / 'work'), *option])


def test_bad_option_is_a_usage_error(tool, tiny_seg, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool('train').main([str(tiny_seg), '--cfg-options', 'a'])
    assert exit_.value.code == 2
    assert "--cfg-options: expected KEY=VALUE, got 'a'" in capsys.readouterr().err


def test_missing_data_is_explained(tool, monkeypatch, tmp_path):
    monkeypatch.delenv('DATA_ROOT', raising=False)
    monkeypatch.chdir(tmp_path)
    message = failure(tool('train').main, ROOT / 'configs/segmentation/upernet_saga_t.py')
    assert 'the folder data/ade/ADEChallengeData2016 is missing' in message
    for folder in ('images/training/*.jpg', 'annotations/validation/*.png'):
        assert folder in message
    assert message.endswith('The demo needs no data: make demo')
    assert not list(tmp_path.iterdir())


def test_options_reach_the_runner(tool, tiny_seg, tmp_path, monkeypatch):
    module = tool('train')
    configs = []

    class Runner:
        def train(self):
            pass

    def build(cfg):
        configs.append(cfg)
        return Runner()

    monkeypatch.setattr('saga_mm.apis.runs.RUNNERS.build', build)
    monkeypatch.setattr('saga_mm.apis.runs.get_device', lambda: 'cuda')
    monkeypatch.chdir(tmp_path)
    options = ('--cfg-options', 'auto_scale_lr.base_batch_size=4')
    module.main([str(tiny_seg), '--amp', '--auto-scale-lr', *options])
    module.main([str(tiny_seg), '--resume', 'a.pth', '--cfg-options', 'custom_hooks=[]'])
    first, second = configs
    assert first.optim_wrapper.type == 'AmpOptimWrapper'
    assert first.optim_wrapper.loss_scale == 'dynamic'
    assert first.auto_scale_lr == dict(base_batch_size=4, enable=True)
    assert first.work_dir == f'work_dirs/{tiny_seg.stem}'
    assert not first.get('resume')
    assert (second.resume, second.load_from) == (True, 'a.pth')
    assert [hook.type for hook in second.custom_hooks] == [
        'saga_mm.CheckpointCheckHook',
        'saga_mm.DataCheckHook',
        'saga_mm.ExactResumeHook',
    ]
    # in the place of mmengine's, with its options
    hook = first.default_hooks.checkpoint
    assert (hook.type, hook.interval) == ('saga_mm.AtomicCheckpointHook', 2)
