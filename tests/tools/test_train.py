import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
from torch import nn

from harness import other_process
from saga_mm.checkpoint import load_file
from saga_mm.cli.lock import locked
from saga_mm.engine import (
    AtomicCheckpointHook,
    CheckpointCheckHook,
    DataCheckHook,
    ExactResumeHook,
    FiniteCheckHook,
    ResumeScheduleHook,
    atomic_checkpoint,
)

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
    """Makes a file when it is unpickled without restrictions."""

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
    """Train in another process that kills itself after an iteration."""
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


# Killed one iteration after a checkpoint, and in the epoch after one.
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
    # The config has no seed, so the order of the data also comes from the checkpoint.
    train([str(config), '--work-dir', str(parts), '--resume'])

    assert len(losses(whole)) == iterations
    assert losses(parts) == losses(whole)
    last = Path((whole / 'last_checkpoint').read_text()).name
    expected, actual = (load_file(folder / last)['state_dict'] for folder in (whole, parts))
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name

    # The same without the random state.
    other = tmp_path / 'other'
    content = load_file(parts / checkpoint)
    del content['random_state']
    torch.save(content, tmp_path / 'forgetful.pth')
    train([str(config), '--work-dir', str(other), '--resume', str(tmp_path / 'forgetful.pth')])
    assert losses(other).items().isdisjoint(losses(whole).items())


def test_checkpoint_of_validation_resumes_before_it(tool, tiny_seg, tmp_path):
    # The best checkpoint is saved while validation draws its own random numbers.
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
    # Runner.resume executes meta['config'], and inferencers execute text in the message hub.
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


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c['meta'].update(iter=-1), r'meta\.iter must be a whole number'),
        (
            lambda c: c['message_hub']['runtime_info'].update(best_ckpt='/home/me/photo.jpg'),
            "best_ckpt must be the path of a 'best_",
        ),
        (
            lambda c: c['optimizer']['param_groups'][0].update(lr=float('nan')),
            r'param_groups\[0\]\.lr must be a number',
        ),
        (
            lambda c: c['optimizer']['param_groups'].pop(),
            r'must have 1 groups of parameters, as that of the config, got 0$',
        ),
        (
            lambda c: c.update(param_schedulers=[{'by_epoch': True, 'end': '\x1b[2J', 'step': 3}]),
            r'a name in param_schedulers\[0\] must be',
        ),
        (
            lambda c: c['random_state'].update(numpy=([0] * 624, 2**31 - 1, 0, 0.0)),
            'its random_state must hold states',
        ),
    ],
)
def test_wrong_states_of_a_training_are_refused_in_one_line(
    tool, tiny_seg, tmp_path, change, message
):
    train = tool('train').main
    options = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', 'train_cfg.max_iters=3']
    train([str(tiny_seg), *options])
    content = load_file(tmp_path / 'work/iter_2.pth')
    change(content)
    torch.save(content, tmp_path / 'a.pth')
    line = failure(train, tiny_seg, '--resume', tmp_path / 'a.pth', *options)
    assert re.search(message, line), line
    assert line.isprintable()


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
    assert message.endswith('The demo needs no data: python -m saga_mm demo')
    assert not list(tmp_path.iterdir())


class Recorder:
    """A stand-in for mmengine's runner, which keeps its config and does not train."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.hooks = [CheckpointHook(interval=2, max_keep_ckpts=3), Own()]
        self.register_hook = self.hooks.append

    def train(self):
        return self


class Own(CheckpointHook):
    """A user's checkpoint hook."""


def test_options_reach_the_runner(tool, tiny_seg, tmp_path, monkeypatch):
    runners = []
    monkeypatch.setattr(
        'saga_mm.apis.runs.RUNNERS.build', lambda cfg: runners.append(Recorder(cfg)) or runners[-1]
    )
    monkeypatch.setattr('saga_mm.apis.runs.get_device', lambda: 'cuda')
    monkeypatch.chdir(tmp_path)
    main = tool('train').main
    options = ('--cfg-options', 'auto_scale_lr.base_batch_size=4')
    main([str(tiny_seg), '--amp', '--auto-scale-lr', *options])
    main([str(tiny_seg), '--resume', 'a.pth', '--cfg-options', 'custom_hooks=None'])
    first, second = runners
    assert first.cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert first.cfg.optim_wrapper.loss_scale == 'dynamic'
    assert first.cfg.auto_scale_lr == dict(base_batch_size=4, enable=True)
    assert first.cfg.work_dir == f'work_dirs/{tiny_seg.stem}'
    assert not first.cfg.get('resume')
    assert (second.cfg.resume, second.cfg.load_from) == (True, 'a.pth')
    # It replaces mmengine's hook and keeps its options; other hooks stay.
    saving, own, *checks = second.hooks
    assert type(saving) is AtomicCheckpointHook
    assert (saving.interval, saving.max_keep_ckpts) == (2, 3)
    assert type(own) is Own
    assert [type(hook) for hook in checks] == [
        CheckpointCheckHook,
        DataCheckHook,
        ExactResumeHook,
        ResumeScheduleHook,
        FiniteCheckHook,
    ]
    assert checks[0].resume


# Names and classes of mmengine's hook in a config.
SAVING = {
    'name': "checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=3)",
    'scope': "checkpoint = dict(type='mmengine.CheckpointHook', by_epoch=False, interval=3)",
    'path': "checkpoint = dict(type='mmengine.hooks.CheckpointHook', by_epoch=False, interval=3)",
    'class': 'checkpoint = dict(type=CheckpointHook, by_epoch=False, interval=3)',
}


@pytest.mark.parametrize('name', SAVING)
def test_pure_python_configs_save_atomically(tool, tiny_seg, tmp_path, monkeypatch, name):
    config = tiny_seg.with_name('pure.py')
    config.write_text(
        'from mmengine.config import read_base\n'
        'from mmengine.hooks import CheckpointHook\n'
        'from mmengine.optim import OptimWrapper\n'
        f'with read_base():\n    from .{tiny_seg.stem} import *\n'
        f'{SAVING[name]}\n'
        'default_hooks.update(checkpoint=checkpoint)\n'
        'optim_wrapper.update(type=OptimWrapper)\n'
    )
    written = []
    write = atomic_checkpoint.write_atomically
    monkeypatch.setattr(
        atomic_checkpoint,
        'write_atomically',
        lambda path, data: written.append(Path(path).name) or write(path, data),
    )
    options = ['--work-dir', str(tmp_path / 'work'), '--cfg-options', 'train_cfg.max_iters=3']
    tool('train').main([str(config), *options])
    files = {path.name for path in (tmp_path / 'work').glob('*.pth')}
    assert len(files) == 2, files
    assert files | {'last_checkpoint'} <= set(written)


def test_saved_config_is_the_one_that_was_given(tool, tiny_seg, tmp_path):
    main, test = tool('train').main, tool('test').main
    work = tmp_path / 'work'
    saved = work / tiny_seg.name
    options = ['--work-dir', str(work), '--cfg-options', 'train_cfg.max_iters=2']
    main([str(tiny_seg), *options])
    text = saved.read_text()
    assert 'CheckHook' not in text
    assert 'launcher' not in text
    main([str(tiny_seg), '--resume', *options[:-1], 'train_cfg.max_iters=3'])
    assert saved.read_text() == text.replace('max_iters=2', 'max_iters=3')
    test([str(tiny_seg), str(work / 'iter_3.pth'), '--tta', *options])
    assert saved.read_text() == text
    # With load_from, the saved config starts a new training.
    again = ['--work-dir', str(tmp_path / 'again'), '--cfg-options', f'load_from={work}/iter_3.pth']
    main([str(saved), *again])
    assert min(losses(tmp_path / 'again')) == 1


def test_checks_in_a_config_of_an_earlier_version_are_replaced(tool, tiny_seg, tmp_path):
    torch.save(build(tiny_seg).state_dict(), tmp_path / 'weights.pth')
    with tiny_seg.open('a') as file:
        file.write(
            "custom_hooks = [dict(type='saga_mm.CheckpointCheckHook', complete=True, resume=True)] "
            "* 2 + [dict(type='saga_mm.DataCheckHook')]\n"
            f"load_from = '{tmp_path}/weights.pth'\n"
        )
    tool('train').main([str(tiny_seg), '--work-dir', str(tmp_path / 'work')])


def build(config):
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@HOOKS.register_module()
class Poison(Hook):
    """Gives the model an image of NaN in some iterations."""

    def __init__(self, iterations):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch):
        if runner.iter + 1 in self.iterations:
            data_batch['inputs'] = [image * math.nan for image in data_batch['inputs']]


def test_a_loss_of_nan_ends_the_training_before_it_does_harm(tool, tiny_seg, tmp_path):
    with tiny_seg.open('a') as file:
        file.write("custom_hooks = [dict(type='Poison', iterations=[4])]\n")
    work = tmp_path / 'work'
    message = failure(tool('train').main, tiny_seg, '--work-dir', work)
    assert message.startswith('iteration 4: NaN or infinity in the gradients (backbone.')
    assert "dict(type='saga_mm.FiniteCheckHook', skip=True)" in message
    # The checkpoint of iteration 4 is not written and is not the best.
    assert sorted(path.name for path in work.glob('*.pth')) == [
        'best_mIoU_iter_2.pth',
        'iter_2.pth',
    ]
    assert Path((work / 'last_checkpoint').read_text()).name == 'iter_2.pth'


@pytest.mark.parametrize('accumulate', [1, 2])
def test_steps_of_nan_can_be_left_out(tool, tiny_seg, tmp_path, accumulate):
    with tiny_seg.open('a') as file:
        file.write(
            "custom_hooks = [dict(type='Poison', iterations=[3, 4, 7]),"
            " dict(type='saga_mm.FiniteCheckHook', skip=True)]\n"
        )
    work = tmp_path / 'work'
    accumulation = f'optim_wrapper.accumulative_counts={accumulate}'
    tool('train').main([str(tiny_seg), '--work-dir', str(work), '--cfg-options', accumulation])
    states = {i: load_file(work / f'iter_{i}.pth')['state_dict'] for i in (2, 4, 7)}
    # The statistics of batch norm as well.
    assert all(value.isfinite().all() for state in states.values() for value in state.values())
    for name, value in states[2].items():
        assert torch.equal(states[4][name], value), name
    assert not torch.equal(
        states[7]['decode_head.conv_seg.weight'], states[4]['decode_head.conv_seg.weight']
    )


def test_nothing_but_nan_ends_the_training(tool, tiny_seg, tmp_path):
    with tiny_seg.open('a') as file:
        file.write(
            "custom_hooks = [dict(type='Poison', iterations=[3, 4, 5, 6]),"
            " dict(type='saga_mm.FiniteCheckHook', skip=True, patience=3)]\n"
        )
    message = failure(tool('train').main, tiny_seg, '--work-dir', tmp_path / 'work')
    assert message.startswith('iteration 5: loss or gradients were NaN or infinite in 3 iterations')


@HOOKS.register_module()
class Overflow(Hook):
    """Makes a weight infinite, as a large step does whose gradients are finite."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        next(runner.model.decode_head.parameters()).data.view(-1)[0] = math.inf


def test_weights_of_infinity_are_not_saved(tool, tiny_seg, tmp_path):
    with tiny_seg.open('a') as file:
        file.write("custom_hooks = [dict(type='Overflow')]\n")
    work = tmp_path / 'work'
    options = ('--cfg-options', 'default_hooks.checkpoint.interval=1')
    message = failure(tool('train').main, tiny_seg, '--work-dir', work, *options)
    assert message.startswith('iteration 1: NaN or infinity in the weights (decode_head.')
    assert not list(work.glob('*.pth'))


def rates(work_dir):
    """Learning rates by iteration, of all runs in a work dir."""
    return {
        row['iter']: row['lr']
        for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
        for row in map(json.loads, path.read_text().splitlines())
        if 'lr' in row
    }


SCHEDULES = {
    'poly': (
        'seg',
        'max_iters',
        [
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=2),
            dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False),
        ],
    ),
    'cosine': ('seg', 'max_iters', [dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False)]),
    'epochs': (
        'det',
        'max_epochs',
        [
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
            dict(type='PolyLR', power=1.0, by_epoch=True, convert_to_iter_based=True),
            dict(type='CosineAnnealingMomentum', eta_min=0.5, by_epoch=True),
        ],
    ),
    'added': ('seg', 'max_iters', None),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_longer_training_follows_its_schedule_after_a_resume(tool, request, tmp_path, name):
    kind, length, schedule = SCHEDULES[name]
    config = request.getfixturevalue(f'tiny_{kind}')
    main, whole, parts = tool('train').main, tmp_path / 'whole', tmp_path / 'parts'
    long = config.with_name('long.py')
    poly = [dict(type='PolyLR', by_epoch=False)]
    long.write_text(f"_base_ = './{config.name}'\nparam_scheduler = {schedule or poly}\n")
    if schedule:
        config = long
    main([str(long), '--work-dir', str(whole), '--cfg-options', f'train_cfg.{length}=6'])
    main([str(config), '--work-dir', str(parts), '--cfg-options', f'train_cfg.{length}=3'])
    before = len(rates(parts))
    main(
        [str(long), '--work-dir', str(parts), '--resume', '--cfg-options', f'train_cfg.{length}=6']
    )
    expected, actual = rates(whole), rates(parts)
    assert len(expected) == len(actual) == 2 * before
    for iteration in range(before + 1, 2 * before + 1):
        assert actual[iteration] == pytest.approx(expected[iteration], rel=1e-6), iteration
    assert 'the config has another schedule' in max(parts.glob('*/*.log')).read_text()
    # The next resume has nothing to change.
    main(
        [str(long), '--work-dir', str(parts), '--resume', '--cfg-options', f'train_cfg.{length}=6']
    )
    assert 'another schedule' not in max(parts.glob('*/*.log')).read_text()


def test_resume_without_a_start(tool, tiny_seg, tmp_path):
    main, work = tool('train').main, tmp_path / 'work'
    main(
        [
            str(tiny_seg),
            '--work-dir',
            str(work),
            '--resume',
            'auto',
            '--cfg-options',
            'train_cfg.max_iters=2',
        ]
    )
    main(
        [
            str(tiny_seg),
            '--work-dir',
            str(work),
            '--resume',
            'auto',
            '--cfg-options',
            'train_cfg.max_iters=4',
        ]
    )
    assert sorted(losses(work)) == [1, 2, 3, 4]
    newest = max(work.glob('*/vis_data/scalars.json')).read_text()
    assert '"iter": 1,' not in newest


def test_weights_of_others_in_the_work_dir_are_no_start(tool, tiny_seg, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    torch.save({'state_dict': {'a': torch.ones(1)}}, work / 'pretrained.pth')
    options = ['--resume', 'auto', '--cfg-options', 'train_cfg.max_iters=1']
    tool('train').main([str(tiny_seg), '--work-dir', str(work), *options])
    assert min(losses(work)) == 1
    assert (work / 'pretrained.pth').exists()
    (work / 'last_checkpoint').write_text(str(work / 'pretrained.pth'))
    (work / 'iter_1.pth').unlink()
    line = failure(tool('train').main, tiny_seg, '--work-dir', work, *options)
    assert 'nothing to resume' in line and 'pretrained.pth holds no message_hub' in line


def test_a_work_dir_takes_one_training(tool, tiny_seg, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    with other_process(locked, work) as process:
        message = failure(tool('train').main, tiny_seg, '--work-dir', work)
        assert message.startswith(f'{work} is in use by another training (process {process} on ')
        assert [path.name for path in work.iterdir()] == ['.lock']
    tool('train').main([str(tiny_seg), '--work-dir', str(work)])
    assert not (work / '.lock').exists()


# what mmengine's own tools train with
PERMITTED = {
    'optimizer wrapper without a type': ('optim_wrapper.pop("type")', ()),
    'no hooks': ('', ('custom_hooks=None',)),
    'no checkpoint hook': ('default_hooks["checkpoint"] = None', ()),
    'norms for several GPUs': ('', ('sync_bn=torch',)),
    'loops without a type': ('val_cfg = {}', ()),
    'scale of the learning rate': ('auto_scale_lr = None', ()),
    'whole numbers as floats': ('default_hooks["checkpoint"]["interval"] = 1e0', ()),
    'option of earlier versions': (
        'default_hooks["checkpoint"]["file_client_args"] = dict(backend="disk")',
        (),
    ),
}


@pytest.mark.parametrize('name', PERMITTED)
def test_what_mmengine_trains_with_is_permitted(tool, tiny_seg, tmp_path, name):
    line, options = PERMITTED[name]
    with tiny_seg.open('a') as file:
        file.write(f'{line}\n')
    work = ['--work-dir', str(tmp_path / 'work')]
    tool('train').main([str(tiny_seg), *work, '--cfg-options', 'train_cfg.max_iters=1', *options])
    assert min(losses(tmp_path / 'work')) == 1


def test_no_workers_need_no_other_option(tool, tiny_seg, tmp_path):
    options = [
        f'{split}_dataloader.{option}'
        for split in ('train', 'val')
        for option in ('persistent_workers=True', 'prefetch_factor=4', 'timeout=9')
    ]
    tool('train').main(
        [str(tiny_seg), '--work-dir', str(tmp_path / 'work'), '--cfg-options', *options]
    )
