"""The depthwise convolution in PyTorch, and the arguments that it refuses."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import depthwise_conv2d, dispatch

X, WEIGHT = torch.randn(2, 5, 6, 4), torch.randn(4, 1, 3, 3)


@pytest.mark.parametrize('side', [1, 3, 5])
@pytest.mark.parametrize('biased', [False, True])
def test_equals_the_convolution_of_torch(side, biased):
    x, weight = torch.randn(2, 5, 6, 4).double(), torch.randn(4, 1, side, side).double()
    bias = torch.randn(4).double() if biased else None
    truth = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=side // 2, groups=4)
    out = depthwise_conv2d(x, weight, bias, add=x)
    torch.testing.assert_close(out, x + truth.permute(0, 2, 3, 1))


def test_masked_pixels_count_as_zeros_even_when_nan():
    mask = torch.rand(2, 5, 6, 1) > 0.3
    masked = torch.where(mask, X, 0)
    out = depthwise_conv2d(torch.where(mask, X, torch.nan), WEIGHT, mask=mask)
    torch.testing.assert_close(out, depthwise_conv2d(masked, WEIGHT))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(x=X[0]), r'x must have shape \(B, H, W, C\)'),
        (dict(x=X.long()), 'x must be float16, bfloat16, float32 or float64, got torch.int64'),
        (dict(weight=torch.randn(4, 1, 2, 2)), 'weight must have shape .* C = 4 and an odd K'),
        (dict(weight=torch.randn(4, 1, 3, 5)), 'weight must have shape'),
        (dict(weight=WEIGHT.to('meta')), 'weight must be on cpu as x is, got meta'),
        (dict(bias=torch.randn(3)), r'bias must have shape \(4,\), got \(3,\)'),
        (dict(bias=torch.randn(4).half()), 'bias must have the dtype of weight'),
        (dict(add=X[:1]), r'add must have shape \(2, 5, 6, 4\), got \(1, 5, 6, 4\)'),
        (dict(mask=torch.ones(2, 5, 6, 1)), 'mask must be a bool tensor, got torch.float32'),
        (dict(mask=torch.ones(2, 30, dtype=torch.bool)), 'mask must have shape'),
        (dict(impl='fast'), 'impl must be one of'),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**dict(x=X, weight=WEIGHT) | change)


def test_the_environment_can_name_single_ops(monkeypatch):
    monkeypatch.setenv(dispatch.ENV_VAR, 'linear_attention=reference, depthwise_conv2d=triton')
    with pytest.raises(RuntimeError, match="depthwise_conv2d: impl='triton' can't run"):
        depthwise_conv2d(X, WEIGHT)
    monkeypatch.setenv(dispatch.ENV_VAR, 'linear_attention=triton')
    depthwise_conv2d(X, WEIGHT)
    for wrong, message in {
        'lepe=triton': 'SAGA_KERNELS_IMPL must name ops of .* got .lepe=triton',
        'depthwise_conv2d=fast': 'SAGA_KERNELS_IMPL must be one of',
    }.items():
        monkeypatch.setenv(dispatch.ENV_VAR, wrong)
        with pytest.raises(ValueError, match=message):
            depthwise_conv2d(X, WEIGHT)
