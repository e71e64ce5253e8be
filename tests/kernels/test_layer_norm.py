"""The layer norm in PyTorch, and the arguments that it refuses."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import layer_norm

X, WEIGHT, BIAS = torch.randn(2, 5, 4), torch.randn(4), torch.randn(4)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float64])
def test_equals_that_of_torch(dtype):
    out = layer_norm(X, WEIGHT, BIAS, 1e-3, dtype=dtype)
    assert out.dtype == (dtype or torch.float32)
    assert torch.equal(out, F.layer_norm(X, (4,), WEIGHT, BIAS, 1e-3).to(out.dtype))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x=X.long()), 'x must be float16, bfloat16, float32 or float64, got torch.int64'),
        (dict(x=X[..., :0]), r'x must have shape \(..., C\), C > 0, got \(2, 5, 0\)'),
        (dict(weight=WEIGHT[:3]), r'weight must have shape \(4,\), got \(3,\)'),
        (dict(bias=BIAS[:3]), r'bias must have shape \(4,\), got \(3,\)'),
        (dict(bias=BIAS.half()), 'bias must have the dtype of weight'),
        (dict(bias=BIAS.to('meta')), 'bias must be on cpu as x is, got meta'),
        (dict(dtype=torch.int8), 'dtype must be a floating-point dtype, got torch.int8'),
        (dict(impl='fast'), 'impl must be one of'),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**dict(x=X, weight=WEIGHT, bias=BIAS) | change)
