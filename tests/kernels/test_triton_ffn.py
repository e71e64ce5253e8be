"""The kernel agrees with the feed-forward network of PyTorch in float64.

It runs on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import pytest
import torch
import torch.nn.functional as F

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import ffn


def mapped(function, arguments):
    """The same arguments, with a function of each tensor."""
    return {
        name: tuple(map(function, y)) if isinstance(y, tuple) else function(y)
        for name, y in arguments.items()
        if y is not None
    }


def inputs(rows=35, channels=24, hidden=48, *, scaled=False, dtype=torch.float32, device='cpu'):
    arguments = dict(
        x=3 * torch.randn(rows, channels) + 1,
        norm=(torch.randn(channels), torch.randn(channels)),
        fc1=(torch.randn(hidden, channels) / channels**0.5, torch.randn(hidden)),
        fc2=(torch.randn(channels, hidden) / hidden**0.5, torch.randn(channels)),
        gamma=torch.randn(channels) if scaled else None,
    )
    return mapped(lambda y: y.to(device, dtype), arguments)


def exact(arguments):
    return ffn(**mapped(torch.Tensor.double, arguments), impl='reference')


CASES = pairwise(
    rows=(1, 35, 130),
    channels=(4, 24, 64, 100, 128),
    hidden=(8, 50, 256),
    dtype=tuple(BOUNDS),
    scaled=(False, True),
)


@pytest.mark.parametrize(('rows', 'channels', 'hidden', 'dtype', 'scaled'), CASES)
def test_equals_pytorch_in_float64(rows, channels, hidden, dtype, scaled, triton_device):
    channels = min(channels, 64) if dtype == torch.float32 else channels
    arguments = inputs(rows, channels, hidden, scaled=scaled, dtype=dtype, device=triton_device)
    out = ffn(**arguments, impl='triton')
    assert out.dtype == dtype
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[dtype]


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('stream', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(scaled, stream, dtype, triton_device):
    arguments = inputs(scaled=scaled, device=triton_device)
    arguments['x'] = arguments['x'].to(stream)
    with torch.autocast(torch.device(triton_device).type, dtype=dtype):
        out, plain = (ffn(**arguments, impl=impl) for impl in ('triton', 'reference'))
    assert out.dtype == plain.dtype
    wider = max(out.dtype, dtype, stream, key=lambda kind: BOUNDS[kind])
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[wider]


def test_maps_of_any_shape_and_stride(triton_device):
    arguments = inputs(24, device=triton_device)
    arguments['x'] = arguments['x'].view(2, 3, 4, 24).transpose(1, 2)
    out = ffn(**arguments, impl='triton')
    assert out.is_contiguous()
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[torch.float32]
    weight = arguments['fc2'][0]
    arguments['fc2'] = weight.T.contiguous().T, arguments['fc2'][1]
    assert torch.equal(ffn(**arguments, impl='triton'), out)


@pytest.mark.filterwarnings('ignore:overflow')
def test_gelu(triton_device):
    far = torch.tensor([-1e30, -1e4, -50, 50, 1e4, 1e30])
    x = torch.cat((torch.linspace(-12, 12, 1024 - len(far)), far)).to(triton_device)
    zeros, eye = torch.zeros(64, device=triton_device), torch.eye(64, device=triton_device)
    # The hidden channels are the bias, and the second layer changes nothing.
    layers = [dict(fc1=(0 * eye, part), fc2=(eye, zeros)) for part in x.split(64)]
    out = torch.cat([ffn(zeros, (zeros, zeros), **layer, impl='triton') for layer in layers])
    truth = F.gelu(x.double())
    assert ((out - truth).abs() <= 1.5e-7 + 2**-20 * truth.abs()).all()


def test_nan_stays_in_its_row(triton_device):
    arguments = inputs(device=triton_device)
    arguments['x'][3, 2] = torch.nan
    seen = ffn(**arguments, impl='triton').isnan()
    assert seen[3].all()
    assert seen.sum() == seen.shape[1]


def test_empty_input_gives_empty_output(triton_device):
    arguments = inputs(0, device=triton_device)
    assert ffn(**arguments, impl='triton').shape == (0, 24)


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (inputs(dtype=torch.float64), 'not torch.float64'),
        (inputs(channels=65), 'up to 64 channels in torch.float32, not 65'),
        (inputs(channels=129, dtype=torch.float16), 'up to 128 channels in torch.float16, not 129'),
        (inputs() | dict(x=torch.randn(24, 35).T), 'contiguous'),
        (inputs() | dict(gamma=torch.ones(24).double()), 'not torch.float64'),
        (inputs() | dict(x=torch.randn(35, 24).requires_grad_()), 'it has no backward pass'),
        (inputs() | dict(gamma=torch.ones(24).requires_grad_()), 'it has no backward pass'),
    ],
)
def test_what_triton_does_not_take(arguments, reason, triton_device):
    # The same memory layout on a GPU.
    arguments = mapped(lambda y: y.to(triton_device), arguments)
    with pytest.raises(RuntimeError, match=reason):
        ffn(**arguments, impl='triton')
    assert ffn(**arguments).shape == arguments['x'].shape


def test_without_gradients_parameters_may_require_them(triton_device):
    arguments = inputs(device=triton_device)
    truth = ffn(**arguments, impl='triton')
    arguments['gamma'] = torch.ones(24, device=triton_device, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(ffn(**arguments, impl='triton'), truth)


def test_the_op_itself_refuses_a_gradient(triton_device):
    arguments = inputs(device=triton_device)
    x = arguments['x'].requires_grad_()
    pairs = [y for name in ('norm', 'fc1', 'fc2') for y in arguments[name]]
    out = torch.ops.saga_kernels.ffn_forward(x, *pairs, None, 1e-6)
    with pytest.raises(RuntimeError, match='no backward pass'):
        out.sum().backward()
