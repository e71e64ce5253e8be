import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
from torch import nn

from saga_mm.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_file,
    missing_for_resume,
    use_safe_loading,
    write_atomically,
)
from saga_mm.engine import AtomicCheckpointHook
from saga_mm.engine.atomic_checkpoint import AtomicBackend

WEIGHTS = 20000


@pytest.fixture(autouse=True)
def safe_loading(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loading()
    # One process per checkpoint.
    monkeypatch.setattr('mmengine.runner.runner.get_git_hash', str)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WEIGHTS, 1, bias=False)

    def forward(self, inputs, mode):
        out = self.fc(inputs.expand(1, WEIGHTS))
        return dict(loss=out.square().mean()) if mode == 'loss' else [out]


class Rising(BaseMetric):
    """A metric that rises, so that each validation is the best so far."""

    def __init__(self, score):
        super().__init__(prefix='rising')
        self.score = score

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(acc=self.score())


def train(work_dir, iterations, **hook):
    """Train to an iteration, from the latest checkpoint if any, and validate every second one."""
    hook = dict(interval=1, by_epoch=False, max_keep_ckpts=2, save_best='rising/acc') | hook
    data = dict(dataset=[torch.ones(1)] * 2, batch_size=1, sampler=dict(type='InfiniteSampler'))
    runner = Runner(
        Model(),
        str(work_dir),
        train_dataloader=data,
        val_dataloader=dict(data, sampler=dict(type='DefaultSampler')),
        train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=2),
        val_cfg=dict(),
        val_evaluator=Evaluator(Rising(lambda: runner.iter)),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        default_hooks=dict(
            checkpoint=dict(type='saga_mm.AtomicCheckpointHook', **hook), logger=None
        ),
        resume=True,
        log_level='CRITICAL',
        # mmengine keeps a global state per name.
        experiment_name=f'{os.getpid()}_{time.monotonic_ns()}',
    )
    runner.train()


def fork(function, *args):
    """Run a function in a forked child process, which has all imports, and return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*args)
        status = 0
    finally:
        os._exit(status)


def saved_iteration(work_dir):
    """The iteration to resume from, after checking that all files are complete."""
    for path in work_dir.glob('*.pth'):
        load_file(path)
    latest = latest_checkpoint(work_dir)
    # The checkpoint that mmengine alone would resume from.
    assert find_latest_checkpoint(work_dir) == latest
    checkpoint = load_file(latest)
    assert not missing_for_resume(checkpoint)
    return checkpoint['meta']['iter']


def names(work_dir):
    return sorted(path.name for path in Path(work_dir).iterdir() if path.suffix in ('.pth', '.tmp'))


def test_writes_whole_files(tmp_path):
    path = tmp_path / 'a'
    for data in (b'first', b'second'):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_can_not_be_written_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(tmp_path / 'none/a', b'')
    assert error.value.filename == str(tmp_path / 'none/a')


def test_keeps_what_it_is_told_to(tmp_path):
    train(tmp_path, 4)
    assert names(tmp_path) == ['best_rising_acc_iter_4.pth', 'iter_3.pth', 'iter_4.pth']
    assert saved_iteration(tmp_path) == 4
    train(tmp_path, 5, max_keep_ckpts=-1)
    assert names(tmp_path)[1:] == ['iter_3.pth', 'iter_4.pth', 'iter_5.pth']


def test_run_in_a_copied_folder_leaves_the_original(tmp_path):
    train(tmp_path / 'a', 2)
    before = names(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    (tmp_path / 'b/last_checkpoint').write_text(str(tmp_path / 'b/iter_2.pth'))
    train(tmp_path / 'b', 4)
    assert names(tmp_path / 'a') == before


def test_same_best_file_again_is_not_removed(tmp_path):
    # A validation that a resumed run repeats.
    train(tmp_path, 2)
    checkpoint = load_file(tmp_path / 'iter_2.pth')
    hub = checkpoint['message_hub']['runtime_info']
    hub['best_score'] = -1
    checkpoint['meta']['iter'] = 1
    torch.save(checkpoint, tmp_path / 'iter_2.pth')
    train(tmp_path, 2)
    assert names(tmp_path) == ['best_rising_acc_iter_2.pth', 'iter_1.pth', 'iter_2.pth']


def test_what_is_removed_stays_until_it_is_outdated(tmp_path):
    backend = AtomicBackend()
    for name in ('old', 'again'):
        backend.put(b'', tmp_path / name)
        backend.remove(tmp_path / name)
    (tmp_path / 'folder').mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    backend.remove_outdated(tmp_path / 'folder', needed=[])
    assert len(list(tmp_path.iterdir())) == 3
    backend.remove(tmp_path / 'old')
    backend.remove(tmp_path / 'again')
    backend.remove_outdated(tmp_path, needed=[str(tmp_path / 'again')])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['again', 'folder']


def kill_at(work_dir, number):
    """Continue the training, and die just before the file operation with this number."""
    count = 0

    def audit(event, args):
        nonlocal count
        writes = event in ('os.rename', 'os.remove') or (event == 'open' and args[1] in ('w', 'wb'))
        if writes and str(args[0]).endswith(('.pth', '.tmp', 'last_checkpoint')):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    train(work_dir, 6)


def test_a_kill_at_any_file_operation_costs_nothing(tmp_path):
    start, work_dir = tmp_path / 'start', tmp_path / 'work'
    train(work_dir, 5)
    shutil.copytree(work_dir, start)
    kills = 0
    while True:
        _, status = os.waitpid(fork(kill_at, work_dir, kills + 1), 0)
        assert saved_iteration(work_dir) >= 5
        assert any(name.startswith('best_') for name in names(work_dir))
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        if kills % 4 == 0:
            # The run that continues removes the leftovers.
            train(work_dir, 7)
            kept = [name for name in names(work_dir) if not name.startswith('best_')]
            assert kept == ['iter_6.pth', 'iter_7.pth']
        shutil.rmtree(work_dir)
        shutil.copytree(start, work_dir)
    assert status == 0
    # Written and moved: a checkpoint, the best one, the first again, `last_checkpoint` twice.
    assert kills >= 10


@pytest.mark.parametrize('kills', [8, pytest.param(100, marks=pytest.mark.long)])
def test_kills_at_random_moments_cost_nothing(tmp_path, kills):
    train(tmp_path, 2)
    rng = random.Random(kills)
    reached, saved = 2, 0
    for _ in range(kills):
        child = fork(train, tmp_path, 10**6)
        # Before the first checkpoint, or after many.
        time.sleep(rng.uniform(0, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        iteration = saved_iteration(tmp_path)
        assert iteration >= reached
        saved += iteration > reached
        reached = iteration
    assert saved, 'no child came to save'


def fill_disk(work_dir, report):
    # A limit on the size of files takes the place of a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (WEIGHTS, resource.RLIM_INFINITY))
    try:
        train(work_dir, 5)
    except OSError as error:
        report.write_text(f'{error.strerror}: {error.filename}')


def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    work_dir, report = tmp_path / 'work', tmp_path / 'report'
    train(work_dir, 3)
    before = names(work_dir)
    os.waitpid(fork(fill_disk, work_dir, report), 0)
    assert report.read_text() == f'File too large: {work_dir}/iter_4.pth'
    assert names(work_dir) == before
    assert saved_iteration(work_dir) == 3


def test_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'File exists|Not a directory'):
        train(tmp_path / 'work', 1, out_dir=str(tmp_path / 'file'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(every=2), 'takes the options of CheckpointHook, got every'),
        (dict(file_client_args=dict(backend='disk')), 'got file_client_args'),
        (dict(interval='2'), "interval must be an int, got '2'"),
        (dict(max_keep_ckpts=1.5), r'max_keep_ckpts must be an int, got 1\.5'),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AtomicCheckpointHook(**options)


def test_unknown_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be of \['rising/acc'\], got 'mIoU'"):
        train(tmp_path, 2, save_best='mIoU')
    assert saved_iteration(tmp_path) == 2


@pytest.fixture
def two_checkpoints(tmp_path):
    """A work dir with a checkpoint, a newer one, and the newest, a best one without optimizer."""
    whole = {'state_dict': {'w': torch.ones(1)}, 'meta': {}, 'message_hub': {}, 'optimizer': {}}
    torch.save(whole, tmp_path / 'iter_9.pth')
    torch.save(whole, tmp_path / 'iter_10.pth')
    torch.save({'state_dict': {'w': torch.ones(1)}}, tmp_path / 'best.pth')
    for age, name in enumerate(('best.pth', 'iter_10.pth', 'iter_9.pth')):
        os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def test_last_checkpoint_is_taken_where_it_is_whole(two_checkpoints, capsys):
    path = str(two_checkpoints / 'iter_9.pth')
    (two_checkpoints / 'last_checkpoint').write_text(path)
    assert latest_checkpoint(two_checkpoints) == path
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ('named', 'problem'),
    [
        (None, 'last_checkpoint is missing or empty'),
        ('', 'last_checkpoint is missing or empty'),
        ('iter_11.pth', 'iter_11.pth does not exist'),
        ('best.pth', 'best.pth holds no message_hub, meta, optimizer'),
        ('.', 'is a folder'),
        ('\x00\xff', 'does not exist'),
    ],
)
def test_else_the_newest_whole_checkpoint_is_taken(two_checkpoints, capsys, named, problem):
    if named is not None:
        text = str(two_checkpoints / named) if named else ''
        (two_checkpoints / 'last_checkpoint').write_text(text, encoding='latin-1')
    assert latest_checkpoint(two_checkpoints) == str(two_checkpoints / 'iter_10.pth')
    (line,) = capsys.readouterr().out.splitlines()
    assert problem in line
    assert line.endswith('iter_10.pth, the newest checkpoint that is whole')


def test_broken_checkpoints_are_passed_over(two_checkpoints, capsys):
    (two_checkpoints / 'last_checkpoint').write_text(str(two_checkpoints / 'iter_10.pth'))
    cut(two_checkpoints / 'iter_10.pth')
    assert latest_checkpoint(two_checkpoints) == str(two_checkpoints / 'iter_9.pth')
    assert 'iter_10.pth can not be read' in capsys.readouterr().out
    cut(two_checkpoints / 'iter_9.pth')
    with pytest.raises(CheckpointError, match=r'nothing to resume: .*iter_10\.pth can not be read'):
        latest_checkpoint(two_checkpoints)
