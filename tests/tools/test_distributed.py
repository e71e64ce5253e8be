"""Training by several processes that torchrun starts, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saga_mm.checkpoint import load_file, missing_for_resume

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / 'tools/train.py'
ITERATIONS = 7
# Records the losses of each process; the last process kills itself.
OBSERVER = """
import os, signal
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Observer(Hook):
    priority = 'LOWEST'

    def __init__(self, folder, kill_after):
        self.file = f'{folder}/{get_rank()}.losses'
        self.kill_after = kill_after if get_rank() == get_world_size() - 1 else None

    def after_train_iter(self, runner, outputs, **kwargs):
        with open(self.file, 'a') as file:
            print(runner.iter + 1, outputs['loss'].item(), file=file)
        if runner.iter + 1 == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
"""
# Only the order of the data is random; the data of a process does not depend on the others.
STEADY = """
_base_ = './{base}'
custom_imports = dict(imports=['saga_mm', 'observer'], allow_failed_imports=False)
custom_hooks = [dict(type='Observer', folder='{folder}', kill_after={kill_after})]
norm = dict(type='GN', num_groups=2)
model = dict(
    backbone=dict(drop_path_rate=0.0), decode_head=dict(dropout_ratio=0.0, norm_cfg=norm)
)
steps = ['LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs']
pipeline = [dict(type=step) for step in steps]
train_dataloader = dict(batch_size={batch_size}, dataset=dict(pipeline=pipeline))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9))
randomness = dict(seed=7)
"""


@pytest.fixture
def cpu(tmp_path):
    """Environment of a process without a GPU, which imports the project from its source."""
    return {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'kernels', tmp_path))),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
    }


@pytest.fixture
def torchrun(cpu):
    """Runs a script in two processes, and returns the result of the run."""

    def run(script, *arguments):
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        return subprocess.run(
            [*command, '--nproc-per-node=2', script, *arguments],
            env=cpu,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def steady(tiny_seg, tmp_path):
    """Makes a config whose losses and weights depend only on the weights and the data."""
    (tmp_path / 'observer.py').write_text(OBSERVER)

    def make(name, batch_size, kill_after=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        path = tmp_path / f'{name}.py'
        settings = dict(folder=folder, batch_size=batch_size, kill_after=kill_after)
        path.write_text(STEADY.format(base=tiny_seg.name, **settings))
        return path

    return make


def mean_losses(folder):
    """Loss by iteration, averaged over the processes; a repeated iteration must give the same."""
    losses = {}
    for file in Path(folder).glob('*.losses'):
        for line in file.read_text().splitlines():
            iteration, loss = map(float, line.split())
            first = losses.setdefault(iteration, {}).setdefault(file.name, loss)
            assert loss == pytest.approx(first, rel=1e-5)
    return {iteration: sum(of.values()) / len(of) for iteration, of in losses.items()}


def test_two_processes_are_one_with_the_doubled_batch(
    torchrun, steady, tool, tmp_path, monkeypatch
):
    """Also if one of them is killed, and the training goes on from its last checkpoint."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr('mmengine.runner.runner.get_device', lambda: 'cpu')
    one, two = tmp_path / 'one', tmp_path / 'two'
    tool('train').main([str(steady('one', batch_size=4)), '--work-dir', str(one)])
    expected = mean_losses(one)
    assert len(expected) == ITERATIONS

    config = steady('two', batch_size=2, kill_after=5)
    command = (TRAIN, config, '--launcher', 'pytorch', '--work-dir', two)
    killed = torchrun(*command)
    assert killed.returncode != 0
    assert 'Signal 9 (SIGKILL) received' in killed.stderr
    assert max(mean_losses(two)) == 5
    assert Path((two / 'last_checkpoint').read_text()).name == 'iter_4.pth'
    assert not missing_for_resume(load_file(two / 'iter_4.pth'))

    steady('two', batch_size=2)
    resumed = torchrun(*command, '--resume')
    assert resumed.returncode == 0, resumed.stderr
    assert mean_losses(two) == pytest.approx(expected, rel=1e-5)
    weights = (load_file(folder / f'iter_{ITERATIONS}.pth')['state_dict'] for folder in (two, one))
    for (name, value), truth in zip(next(weights).items(), next(weights).values(), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-6, msg=name)


def test_script_starts_processes_which_normalise_their_own_batch(tiny_seg, tmp_path, cpu):
    """With SyncBN in the config, which needs a GPU."""
    work_dir = tmp_path / 'work'
    cpu['PATH'] = os.pathsep.join((str(Path(sys.executable).parent), os.environ['PATH']))
    cpu['PORT'] = str(20000 + os.getpid() % 10000)
    options = ['--cfg-options', 'train_cfg.max_iters=2', 'randomness.seed=1', '--debug']
    result = subprocess.run(
        [ROOT / 'tools/dist_train.sh', tiny_seg, '2', '--work-dir', work_dir, *options],
        env=cpu,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'GPU number: 2' in next(work_dir.glob('*/*.log')).read_text()
    assert result.stdout.count('SyncBN needs a GPU: each process normalises its own batch') == 1
    weights = load_file(work_dir / 'iter_2.pth')['state_dict']
    assert weights['decode_head.convs.0.bn.num_batches_tracked'] == 2
    assert all(weight.isfinite().all() for weight in weights.values())


ENDING = """
import atexit
import glob

import torch
from mmengine.config import Config

import saga_mm
from saga_mm.cli import launch


@atexit.register
def show():
    names = [open(path).read().strip() for path in glob.glob('/proc/self/task/*/comm')]
    print('threads left:', [name for name in names if 'gloo' in name], flush=True)


def work():
    launch.use_cpu_processes(Config())
    model = launch.CPUDistributedDataParallel(torch.nn.Linear(2, 2))
    # as hooks and a runner refer to each other
    model.itself = [model]
    model(torch.ones(1, 2)).sum().backward()
    torch.distributed.all_reduce(torch.ones(1))


work()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='threads are listed in /proc')
def test_no_thread_outlives_python(torchrun, tmp_path):
    # it would abort the process where it lets go of a tensor of Python
    (tmp_path / 'ending.py').write_text(ENDING)
    result = torchrun(tmp_path / 'ending.py')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('threads left: []') == 2


UNUSED = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import saga_mm
from saga_mm.registry import MODELS

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2))

dist.init_process_group('gloo')
for name in saga_mm.backbones.__all__:
    for used, size, options in (
        ((1, 2, 3), 64, {}),
        ((0, 1, 2, 3), 64, {}),
        ((2,), 64, dict(with_cp=True)),
        ((0,), 20, {}),
        ((0, 3), 64, dict(frozen_stages=1)),
    ):
        torch.manual_seed(0)
        alone = MODELS.get(name)(arch=ARCH, drop_path_rate=0, **options)
        for module in alone.modules():
            # batch statistics are those of a process
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.requires_grad_(False).fill_(1)
                module.bias.requires_grad_(False).fill_(0)
        model = DistributedDataParallel(alone)
        images = torch.randn(2, 3, size, size)
        grads = []
        for module in (alone, model, model):
            model.zero_grad()
            outs = module(images)
            # as a head may do
            sum(outs[i].mul_(2).relu_().square().mean() for i in used).backward()
            grads.append({n: p.grad for n, p in alone.named_parameters() if p.requires_grad})
        assert not any(None in found.values() for found in grads)
        for key, grad in grads[0].items():
            for other in grads[1:]:
                torch.testing.assert_close(other[key], grad, msg=key)
        for i, norm in alone.norms.items():
            trained = [p.grad.any() for p in norm.parameters() if p.requires_grad]
            assert all(found == (int(i) in used) for found in trained), (name, i)
"""


def test_outputs_that_nobody_uses_have_gradients_of_zero(torchrun, tmp_path):
    """Without which DistributedDataParallel would wait for the gradients of their norms."""
    (tmp_path / 'unused.py').write_text(UNUSED)
    result = torchrun(tmp_path / 'unused.py')
    assert result.returncode == 0, result.stderr


SHARDED = """
import os

import torch
import torch.distributed as dist

import saga_mm
from saga_mm.registry import MODELS

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2))


def build(name, seed):
    torch.manual_seed(seed)
    model = MODELS.get(name)(arch=ARCH, drop_path_rate=0)
    # batch statistics are those of a process
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model, lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model, optimizer, images):
    optimizer.zero_grad()
    loss = sum((out * out.sin()).mean() for out in model(images))
    loss.backward()
    optimizer.step()
    return loss.detach()


dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(0)
batches = torch.randn(2, 2, 3, 40, 48)
backbones = saga_mm.backbones.__all__
assert len(backbones) == 3
for name in backbones:
    folder = f'{os.environ["FOLDER"]}/{name}'
    plain, make_optimizer = build(name, seed=1)
    optimizer = make_optimizer()
    losses = [step(plain, optimizer, images) for images in batches]

    models, optimizers = [], []
    for seed in (1, 2):
        model, make_optimizer = build(name, seed)
        shard(model)
        models.append(model)
        optimizers.append(make_optimizer())
    found = [step(models[0], optimizers[0], batches[0, rank : rank + 1])]
    save(folder, models[0], optimizers[0])
    load(folder, models[1], optimizers[1])
    for saved, loaded in zip(*(model.parameters() for model in models)):
        assert saved.to_local().shape[0] <= (saved.shape[0] + 1) // 2
        assert torch.equal(saved.to_local(), loaded.to_local())
    # the loaded one goes on, with the momentum
    found.append(step(models[1], optimizers[1], batches[1, rank : rank + 1]))

    for loss, truth in zip(found, losses):
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / 2, truth)
    for (key, weight), truth in zip(models[1].named_parameters(), plain.parameters()):
        torch.testing.assert_close(weight.full_tensor(), truth, rtol=1e-4, atol=1e-6, msg=key)
dist.barrier()
# gloo's threads, which sharded weights keep, can abort a process while Python ends
os._exit(0)
"""


def test_sharded_backbones_train_and_load_as_the_documentation_says(torchrun, tmp_path, cpu):
    page = (ROOT / 'docs/distributed.md').read_text()
    (example,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    script = tmp_path / 'sharded.py'
    script.write_text(example + SHARDED)
    cpu['FOLDER'] = str(tmp_path)
    result = torchrun(script)
    assert result.returncode == 0, result.stderr


def test_flexible_runner(tool, tiny_seg, tmp_path):
    """mmengine's runner for strategies, with the hooks of the project."""
    options = ['runner_type=FlexibleRunner', 'strategy.type=SingleDeviceStrategy']
    work_dir = tmp_path / 'work'
    main = tool('train').main
    main([str(tiny_seg), '--work-dir', str(work_dir), '--cfg-options', *options])
    assert not missing_for_resume(load_file(work_dir / f'iter_{ITERATIONS}.pth'))
