"""The feed-forward network in PyTorch, and the arguments that it refuses."""

import pytest
import torch
from torch import nn

from saga_kernels import ffn
from saga_mm.layers import FFN

X = torch.randn(2, 5, 4)
NORM = torch.randn(4), torch.randn(4)
FC1 = torch.randn(6, 4), torch.randn(6)
FC2 = torch.randn(4, 6), torch.randn(4)


@pytest.mark.parametrize('gamma', [None, torch.randn(4)])
def test_equals_the_modules(gamma):
    norm, module = nn.LayerNorm(4, eps=1e-3), FFN(4, 6)
    layers = [(layer.weight, layer.bias) for layer in (norm, module.fc1, module.fc2)]
    y = module(norm(X))
    truth = X + (y if gamma is None else gamma * y)
    assert torch.equal(ffn(X, *layers, gamma=gamma, eps=1e-3), truth)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x=X.long()), 'x must be float16, bfloat16, float32 or float64, got torch.int64'),
        (dict(x=X[..., :0]), r'x must have shape \(..., C\), C > 0, got \(2, 5, 0\)'),
        (dict(norm=NORM[0]), 'norm must be a weight and a bias, got Tensor'),
        (dict(fc1=FC1[:1]), 'fc1 must be a weight and a bias, got tuple'),
        (dict(norm=(NORM[0], NORM[1][:3])), r'norm\[1\] must have shape \(4,\), got \(3,\)'),
        (dict(fc1=(FC1[0][:, :3], FC1[1])), r'fc1\[0\] must have shape \(6, 4\), got \(6, 3\)'),
        (dict(fc1=(FC1[0], FC1[1][:5])), r'fc1\[1\] must have shape \(6,\), got \(5,\)'),
        (dict(fc2=(FC2[0].T, FC2[1])), r'fc2\[0\] must have shape \(4, 6\), got \(6, 4\)'),
        (dict(fc2=(FC2[0].to('meta'), FC2[1])), r'fc2\[0\] must be on cpu as x is, got meta'),
        (dict(gamma=torch.ones(3)), r'gamma must have shape \(4,\), got \(3,\)'),
        (dict(gamma=torch.ones(4).int()), 'gamma must be float16, .* got torch.int32'),
        (dict(impl='fast'), 'impl must be one of'),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ffn(**dict(x=X, norm=NORM, fc1=FC1, fc2=FC2) | change)


@pytest.mark.parametrize('name', ['x', 'gamma'])
def test_what_is_no_tensor(name):
    with pytest.raises(TypeError, match=f'{name} must be a tensor, got int'):
        ffn(**dict(x=X, norm=NORM, fc1=FC1, fc2=FC2) | {name: 1})
