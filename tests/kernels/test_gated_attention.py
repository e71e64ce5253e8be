"""The first half of a block in PyTorch, and the arguments that it refuses."""

import pytest
import torch
from torch import nn

from saga_kernels import gated_attention
from saga_mm.attention import GatedLinearAttention

X = torch.randn(2, 3, 5, 16)
VECTOR, SQUARE = torch.randn(16), torch.randn(16, 16)
LAYERS = dict(
    norm=(VECTOR, VECTOR),
    in_proj=(torch.randn(80, 16), torch.randn(80)),
    proj=(SQUARE, VECTOR),
    num_heads=2,
    lepe=(torch.randn(16, 1, 3, 3), VECTOR),
    output_gate=(SQUARE, VECTOR),
)


@pytest.mark.parametrize('gamma', [None, torch.randn(16)])
@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('optional', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_equals_the_modules(gamma, gated, optional, masked):
    norm = nn.LayerNorm(16, eps=1e-3)
    module = GatedLinearAttention(
        16, 2, gated=gated, lepe_kernel_size=3 if optional else 0, output_gate=optional
    )
    layers = dict(norm=norm, in_proj=module.in_proj, proj=module.proj)
    if optional:
        layers |= dict(lepe=module.lepe, output_gate=module.output_gate)
    pairs = {name: (layer.weight, layer.bias) for name, layer in layers.items()}
    mask = torch.rand(2, 3, 5, 1) > 0.3 if masked else None
    y = module(norm(X), mask)
    truth = X + (y if gamma is None else gamma * y)
    out = gated_attention(X, **pairs, num_heads=2, gamma=gamma, mask=mask, norm_eps=1e-3)
    torch.testing.assert_close(out, truth)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x=X.long()), 'x must be float16, bfloat16, float32 or float64, got torch.int64'),
        (dict(x=X[0]), r'x must have shape \(B, H, W, C\), C > 0, got \(3, 5, 16\)'),
        (dict(norm=VECTOR), 'norm must be a weight and a bias, got Tensor'),
        (dict(lepe=VECTOR), 'lepe must be a weight and a bias, got Tensor'),
        (dict(num_heads=3), 'num_heads must divide the channels, 16, got 3'),
        (dict(num_heads=0), 'num_heads must divide the channels, 16, got 0'),
        (dict(num_heads=2.0), 'num_heads must divide the channels, 16, got 2.0'),
        (
            dict(in_proj=(torch.randn(64, 16), torch.randn(64))),
            r'in_proj\[0\] must have shape \(80, 16\), got \(64, 16\)',
        ),
        (
            dict(in_proj=(torch.randn(80, 16), torch.randn(48))),
            r'in_proj\[0\] must have shape \(48, 16\), got \(80, 16\)',
        ),
        (dict(proj=(SQUARE[:8], VECTOR)), r'proj\[0\] must have shape \(16, 16\), got \(8, 16\)'),
        (
            dict(lepe=(torch.randn(16, 1, 2, 2), VECTOR)),
            r'lepe\[0\] must have shape \(C, 1, K, K\) with an odd K, got K = 2',
        ),
        (
            dict(lepe=(torch.randn(16, 16, 3, 3), VECTOR)),
            r'lepe\[0\] must have shape \(16, 1, 3, 3\), got \(16, 16, 3, 3\)',
        ),
        (dict(output_gate=(SQUARE, VECTOR.to('meta'))), r'output_gate\[1\] must be on cpu as x is'),
        (dict(gamma=torch.ones(3)), r'gamma must have shape \(16,\), got \(3,\)'),
        (dict(mask=torch.ones(2, 3, 5, 1)), 'mask must be a bool tensor, got torch.float32'),
        (
            dict(mask=torch.ones(2, 15).bool()),
            r'mask must have shape \(2, 3, 5, 1\), got \(2, 15\)',
        ),
        (dict(feature_map='exp'), 'feature_map must be one of'),
        (dict(eps=0), 'eps must be a positive number, got 0'),
        (dict(impl='fast'), 'impl must be one of'),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        gated_attention(**dict(x=X) | LAYERS | change)


@pytest.mark.parametrize('name', ['x', 'gamma'])
def test_what_is_no_tensor(name):
    with pytest.raises(TypeError, match=f'{name} must be a tensor, got int'):
        gated_attention(**dict(x=X) | LAYERS | {name: 1})
