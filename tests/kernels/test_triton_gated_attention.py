"""The kernels agree with the first half of a block in PyTorch in float64.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import gated_attention


def mapped(function, arguments):
    """The same arguments, with a function of each floating-point tensor."""

    def change(y):
        if isinstance(y, tuple):
            return tuple(map(change, y))
        return function(y) if isinstance(y, torch.Tensor) and y.is_floating_point() else y

    return {name: change(y) for name, y in arguments.items() if y is not None}


def inputs(
    size=(5, 7), channels=24, heads=2, *, gated=True, side=3, output_gate=True, scaled=False,
    masked=False, dtype=torch.float32, device='cpu', batch=2,
):  # fmt: skip
    def linear(rows):
        return torch.randn(rows, channels) / channels**0.5, torch.randn(rows)

    shape = (batch, *size)
    arguments = dict(
        x=3 * torch.randn(*shape, channels) + 1,
        norm=(torch.randn(channels), torch.randn(channels)),
        in_proj=linear((5 if gated else 3) * channels),
        proj=linear(channels),
        num_heads=heads,
        lepe=(torch.randn(channels, 1, side, side), torch.randn(channels)) if side else None,
        output_gate=linear(channels) if output_gate else None,
        gamma=torch.randn(channels) if scaled else None,
        mask=(torch.rand(*shape, 1) > 0.3).to(device) if masked else None,
    )
    return mapped(lambda y: y.to(device, dtype), arguments)


def exact(arguments):
    return gated_attention(**mapped(torch.Tensor.double, arguments), impl='reference')


CASES = pairwise(
    size=((1, 1), (7, 9), (150, 1), (12, 33)),
    channels=((8, 1), (24, 2), (64, 1), (96, 3), (128, 2), (128, 4)),
    dtype=tuple(BOUNDS),
    gated=(False, True),
    side=(0, 1, 3, 5),
    output_gate=(False, True),
    scaled=(False, True),
    masked=(False, True),
    feature_map=('elu', 'relu'),
)


@pytest.mark.parametrize(
    (
        'size', 'channels', 'dtype', 'gated', 'side', 'output_gate', 'scaled', 'masked',
        'feature_map',
    ),
    CASES,
)  # fmt: skip
def test_equals_pytorch_in_float64(
    size, channels, dtype, gated, side, output_gate, scaled, masked, feature_map, triton_device
):
    channels, heads = channels
    if dtype == torch.float32 and channels > 32:
        channels //= 4
    arguments = inputs(
        size, channels, heads, gated=gated, side=side, output_gate=output_gate, scaled=scaled,
        masked=masked, dtype=dtype, device=triton_device,
    )  # fmt: skip
    arguments |= dict(feature_map=feature_map, eps=1e-6 if feature_map == 'elu' else 1e-3)
    out = gated_attention(**arguments, impl='triton')
    assert out.dtype == dtype
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[dtype]


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('stream', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast(scaled, stream, dtype, triton_device):
    arguments = inputs(scaled=scaled, device=triton_device)
    arguments['x'] = arguments['x'].to(stream)
    with torch.autocast(torch.device(triton_device).type, dtype=dtype):
        out, plain = (gated_attention(**arguments, impl=impl) for impl in ('triton', 'reference'))
    assert out.dtype == plain.dtype
    wider = max(out.dtype, dtype, stream, key=lambda kind: BOUNDS[kind])
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[wider]


def branch_only(arguments):
    """The same arguments, with a result that is attention alone: nothing hides its errors."""
    channels = arguments['x'].shape[-1]
    eye, zeros = torch.eye(channels), torch.zeros(channels)
    return arguments | mapped(
        lambda y: y.to(arguments['x'].device, arguments['x'].dtype), dict(proj=(eye, zeros))
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gate', [-8.0, 8.0])
def test_half_precision_neither_overflows_nor_fades(dtype, gate, triton_device):
    # Unscaled S would be near 1e6.
    arguments = inputs(
        (40, 30), 16, 1, side=0, output_gate=False, dtype=dtype, device=triton_device, batch=1
    )
    arguments = branch_only(arguments)
    weight, bias = arguments['in_proj']
    weight[16:48] *= 30
    bias[48:] = gate
    arguments['x'] /= 2**10
    out = gated_attention(**arguments, impl='triton') - arguments['x']
    truth = exact(arguments) - arguments['x'].double()
    assert rms_ratio(out, truth) <= 2 * BOUNDS[dtype]


@pytest.mark.parametrize('gate', [-14.0, -40.0])
def test_closed_gates_do_not_fade_in_fp16(gate, triton_device):
    # The smallest number of fp16 is e^-16.6, with a single digit.
    arguments = inputs(
        (20, 10), 16, 1, side=0, output_gate=False, dtype=torch.float16, device=triton_device
    )
    arguments = branch_only(arguments)
    arguments['in_proj'][1][48:64] += gate
    arguments['x'] /= 2**10
    arguments['eps'] = 1e-6 * math.exp(gate)
    out = gated_attention(**arguments, impl='triton') - arguments['x']
    truth = exact(arguments) - arguments['x'].double()
    assert rms_ratio(out, truth) <= 2 * BOUNDS[torch.float16]


def test_masked_tokens_change_nothing_even_when_nan(triton_device):
    arguments = inputs((9, 10), device=triton_device)
    alone = gated_attention(**arguments, impl='triton')
    arguments['x'] = torch.nn.functional.pad(arguments['x'], (0, 0, 0, 3, 0, 2), value=math.nan)
    mask = ~arguments['x'][..., :1].isnan()
    out = gated_attention(**arguments, mask=mask, impl='triton')
    torch.testing.assert_close(out[:, :9, :10], alone)


@pytest.mark.parametrize('gated', [False, True])
def test_nan_stays_visible(gated, triton_device):
    arguments = inputs(gated=gated, side=0, device=triton_device)
    arguments['x'][1, 2, 3, 4] = math.nan
    seen = gated_attention(**arguments, impl='triton').isnan()
    assert seen[1].all()
    assert not seen[0].any()


def test_all_tokens_masked(triton_device):
    arguments = inputs(device=triton_device)
    arguments['mask'] = torch.zeros(2, 5, 7, 1, dtype=torch.bool, device=triton_device)
    out = gated_attention(**arguments, impl='triton')
    assert rms_ratio(out, exact(arguments)) <= BOUNDS[torch.float32]


def test_strided_maps_and_weights(triton_device):
    arguments = inputs(device=triton_device, masked=True)
    out = gated_attention(**arguments, impl='triton')
    arguments['x'] = arguments['x'].transpose(1, 2).contiguous().transpose(1, 2)
    arguments['mask'] = arguments['mask'].transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = arguments['proj']
    arguments['proj'] = weight.T.contiguous().T, bias
    again = gated_attention(**arguments, impl='triton')
    assert again.is_contiguous()
    assert torch.equal(again, out)


@pytest.mark.parametrize('size', [(0, 7), (5, 0)])
def test_empty_input_gives_empty_output(size, triton_device):
    arguments = inputs(size, device=triton_device)
    assert gated_attention(**arguments, impl='triton').shape == (2, *size, 24)


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (inputs(dtype=torch.float64), 'not torch.float64'),
        (inputs(channels=34), 'up to 32 channels in torch.float32, not 34'),
        (inputs(channels=132, dtype=torch.float16), 'up to 128 channels in torch.float16, not 132'),
        (inputs(channels=96, heads=1, dtype=torch.float16), 'head dims 8 to 64, not 96'),
        (inputs(channels=24, heads=4), 'head dims 8 to 64, not 6'),
        (inputs(side=7), 'filters of up to 5 pixels a side, not 7'),
        (inputs() | dict(x=torch.randn(2, 24, 5, 7).permute(0, 2, 3, 1)), 'contiguous'),
        (inputs() | dict(gamma=torch.ones(24).double()), 'not torch.float64'),
        (inputs() | dict(x=torch.randn(2, 5, 7, 24).requires_grad_()), 'it has no backward pass'),
        (inputs() | dict(gamma=torch.ones(24).requires_grad_()), 'it has no backward pass'),
    ],
)
def test_what_triton_does_not_take(arguments, reason, triton_device):
    # The same memory layout on a GPU.
    arguments = mapped(lambda y: y.to(triton_device), arguments)
    with pytest.raises(RuntimeError, match=reason):
        gated_attention(**arguments, impl='triton')
    assert gated_attention(**arguments).shape == arguments['x'].shape


def test_the_op_itself_refuses_a_gradient(triton_device):
    arguments = inputs(device=triton_device)
    x = arguments['x'].requires_grad_()
    pairs = [y for name in ('norm', 'in_proj', 'proj') for y in arguments[name]]
    out = torch.ops.saga_kernels.gated_attention_forward(
        x, *pairs, 2, *(None,) * 6, 'elu', 1e-6, 1e-6
    )
    with pytest.raises(RuntimeError, match='no backward pass'):
        out.sum().backward()


def test_flops_are_those_of_pytorch(triton_device):
    arguments = inputs(channels=16, heads=1, device=triton_device)
    counts = []
    for impl in ('triton', 'reference'):
        with FlopCounterMode(display=False) as counter:
            gated_attention(**arguments, impl=impl)
        counts.append(counter.get_total_flops())
    # The reference multiplies by z as well, for the denominator.
    tokens = 2 * 5 * 7
    assert counts[1] - counts[0] == 2 * tokens * 16
