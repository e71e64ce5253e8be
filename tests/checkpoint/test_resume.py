"""What a resumed training takes from its checkpoint is valid, or is refused."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from saga_mm.checkpoint import (
    CheckpointError,
    check_fused_state,
    check_groups,
    check_training_state,
    load_file,
    remove_configs,
)
from saga_mm.engine.exact_resume import check_random_state, get_random_state

SCHEDULERS = [
    dict(type='ConstantLR'),
    dict(type='CosineAnnealingLR', T_max=5),
    dict(type='CosineRestartLR', periods=[3, 4], restart_weights=[1, 1], eta_min=0.0),
    dict(type='ExponentialLR', gamma=0.1),
    dict(type='LinearLR', start_factor=0.1, begin=0, end=10, by_epoch=False),
    dict(type='MultiStepLR', milestones=[3, 4]),
    dict(type='OneCycleLR', eta_max=0.1, total_steps=10),
    dict(type='OneCycleLR', eta_max=0.1, total_steps=10, anneal_strategy='linear'),
    dict(type='PolyLR', begin=0, end=10, by_epoch=False),
    dict(type='ReduceOnPlateauLR'),
    dict(type='StepLR', step_size=2),
]


def train(optimizer=torch.optim.AdamW, **options):
    """Make a parameter and its optimizer, and run a step."""
    parameter = nn.Parameter(torch.ones(3, 4))
    optimizer = optimizer([dict(params=[parameter], name='all')], lr=0.1, **options)
    parameter.sum().backward()
    optimizer.step()
    return parameter, optimizer


def checkpoint():
    """A checkpoint as mmengine saves it during a training."""
    hub = MessageHub('test')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info_dict(
        dict(
            cfg='a = 1',
            keep_ckpt_ids=[1, 2],
            best_ckpt='work/best_mIoU_iter_2.pth',
            best_score=np.float32(0.5),
            dataset_meta=dict(classes=('a', 'b'), palette=None),
        )
    )
    optimizer = train()[1]
    return {
        'meta': dict(epoch=1, iter=2, seed=7, cfg='a = 1', dataset_meta=ConfigDict(a=dict(b=1))),
        'message_hub': hub.state_dict(),
        'optimizer': OptimWrapper(optimizer).state_dict(),
        'param_schedulers': [
            PARAM_SCHEDULERS.build(dict(optimizer=optimizer, **scheduler)).state_dict()
            for scheduler in SCHEDULERS
        ],
        'random_state': {**get_random_state(), 'sampler': 7},
        'state_dict': {'w': torch.ones(3, 4)},
    }


def read(tmp_path, content):
    torch.save(content, tmp_path / 'a.pth')
    return load_file(tmp_path / 'a.pth')


def test_what_mmengine_saves_is_right(tmp_path):
    content = checkpoint()
    loaded = read(tmp_path, content)
    check_training_state(loaded, 'a.pth')
    check_random_state(loaded['random_state'])
    assert loaded['meta'] == content['meta']
    assert loaded['param_schedulers'] == content['param_schedulers']
    several = {**content, 'optimizer': {'a': content['optimizer']}}
    several['param_schedulers'] = {'a': content['param_schedulers']}
    check_training_state(read(tmp_path, several), 'a.pth')


@pytest.mark.parametrize('optimizer', [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam])
def test_state_of_other_optimizers_is_right(optimizer):
    content = checkpoint()
    content['optimizer'] = train(optimizer)[1].state_dict()
    check_training_state(content, 'a.pth')


def test_configs_are_removed():
    content = checkpoint()
    remove_configs(content)
    assert 'cfg' not in content['meta']
    assert 'cfg' not in content['message_hub']['runtime_info']


# The place of a wrong value, and the value.
WRONG = {
    'meta': [None, []],
    'meta.epoch': [None, -1, 0.5, '1', True, 2**70],
    'meta.iter': [-1, [], float('nan')],
    'meta.seed': [-1, 2**32, 'a', 0.5],
    'message_hub': [None, 'a'],
    'message_hub.log_scalars': [None, [], {3: 1}, {'train/\x1b[2J': 1}],
    'message_hub.resumed_keys': [None, {'a': 3}, {3: True}],
    'message_hub.runtime_info': [None, [], {3: 3}],
    'message_hub.runtime_info.keep_ckpt_ids': [3, ['../../a'], [-1], [[1]]],
    'message_hub.runtime_info.best_ckpt': ['/home/me/.ssh/id', 'work/last_checkpoint', 3],
    'message_hub.runtime_info.best_ckpt_AP': ['best_/../iter_2.pth'],
    'message_hub.runtime_info.best_score': ['a', float('nan'), torch.ones(2), None],
    'optimizer': [None, [], {'a': 1}],
    'optimizer.param_groups': [None, {}, [1]],
    'optimizer.param_groups.0.params': [None, 3, ['a', 0.5], [-1]],
    'optimizer.param_groups.0.lr': [-1, float('inf'), float('nan'), 'a', [1]],
    'optimizer.param_groups.0.betas': [(0.9, float('nan')), torch.ones(2), {1, 2}],
    'optimizer.state': [None, [], {0: 3}, {0.5: {}}],
    'optimizer.state.0.exp_avg': [
        torch.ones(1).expand(3, 4),
        torch.ones(5).as_strided((3, 2), (1, 1)),
        torch.ones(3, 4).to_sparse(),
    ],
    'param_schedulers': [3, None],
    'param_schedulers.0': [3, []],
    'param_schedulers.0.step': [3],
    'param_schedulers.0.optimizer': [3],
    'param_schedulers.0.last_step': [-2, 0.5, 'a'],
    'param_schedulers.0._global_step': [-1, None],
    'param_schedulers.0.factor': [float('nan'), torch.ones(2)],
}


@pytest.mark.parametrize(
    ('where', 'value'), [(where, value) for where, values in WRONG.items() for value in values]
)
def test_wrong_values_are_refused(where, value):
    content = copy.deepcopy(checkpoint())
    *path, name = [int(part) if part.isdigit() else part for part in where.split('.')]
    place = content
    for part in path:
        place = place[part]
    place[name] = value
    with pytest.raises(CheckpointError, match=r'^a\.pth can not be resumed: .* must be ') as error:
        check_training_state(content, 'a.pth')
    assert str(error.value).isprintable()


def test_values_that_unfold_without_end_are_refused():
    content = checkpoint()
    value = [0]
    for _ in range(60):
        value = [value, value]
    content['param_schedulers'][0]['factor'] = value
    with pytest.raises(CheckpointError, match='factor must be a number'):
        check_training_state(content, 'a.pth')


def state_of_fused(**changes):
    optimizer = train()[1]
    content = optimizer.state_dict()
    # The file selects a kernel that does not check shapes.
    content['param_groups'][0]['fused'] = True
    content['state'][0].update(changes)
    optimizer.load_state_dict(content)
    return optimizer


def test_states_for_fused_kernels_have_the_shape_of_their_parameters():
    check_fused_state(state_of_fused(), 'a.pth')
    with pytest.raises(CheckpointError, match=r'exp_avg in .* shape \(3, 4\) .*, got \(2,\)'):
        check_fused_state(state_of_fused(exp_avg=torch.ones(2)), 'a.pth')


def change(path, value):
    def apply(state):
        *outer, last = path
        for part in outer:
            state[part] = list(state[part]) if isinstance(state[part], tuple) else state[part]
            state = state[part]
        if isinstance(state, list) or last in state:
            state[last] = value

    return apply


# numpy would read beyond its memory at such a position
RANDOM = {
    'no dict': lambda state: state.clear(),
    'position': change(['numpy', 1], 2**31 - 1),
    'negative position': change(['numpy', 1], -1),
    'position as text': change(['numpy', 1], '1'),
    'keys': change(['numpy', 0], [1, 2, 3]),
    'a key': change(['numpy', 0, 5], 2**32),
    'gauss': change(['numpy', 3], float('nan')),
    'has gauss': change(['numpy', 2], 7),
    'python version': change(['python', 0], 2),
    'python numbers': change(['python', 1], (1, 2)),
    'python gauss': change(['python', 2], 'a'),
    'torch size': change(['torch'], torch.zeros(3, dtype=torch.uint8)),
    'torch type': change(['torch'], torch.zeros(5056)),
    'torch list': change(['torch'], [1, 2]),
    'cuda': change(['cuda'], torch.zeros(3, dtype=torch.uint8)),
    'sampler': change(['sampler'], -1),
    'sampler as text': change(['sampler'], 'a'),
}


@pytest.mark.parametrize('name', RANDOM)
def test_wrong_random_states_are_refused(name):
    state = {**get_random_state(), 'sampler': None}
    check_random_state(state)
    RANDOM[name](state)
    with pytest.raises(CheckpointError, match='its random_state must'):
        check_random_state(state)
    with pytest.raises(CheckpointError):
        check_random_state(None)


def test_optimizers_are_those_of_the_checkpoint():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=1.0)

    def refused(optimizers, state):
        with pytest.raises(CheckpointError) as error:
            check_groups(optimizers, state, 'a.pth')
        return str(error.value)

    state, others = ({'param_groups': [{}] * number} for number in (1, 2))
    check_groups({'': optimizer}, state, 'a.pth')
    check_groups({'a': optimizer, 'b': optimizer}, {'a': state, 'b': state}, 'a.pth')
    # mmengine's groups of one parameter each
    assert refused({'': optimizer}, others).endswith(
        'must have 1 groups of parameters, as that of the config, got 2; with optim_wrapper.'
        'constructor=DefaultOptimWrapperConstructor, it has one for each parameter'
    )
    message = 'a.pth can not be resumed: its optimizers must be those of the config, '
    assert refused({'': optimizer}, {'b': state, 'a': state}) == (
        f"{message}one without a name, got ['a', 'b']"
    )
    assert refused({'a': optimizer}, state) == f"{message}['a'], got one without a name"
