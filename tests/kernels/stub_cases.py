"""Launches for the plugin `stub_gpu.py` to check.

python -m pytest -p stub_gpu tests/kernels/stub_cases.py
"""

import pytest
import stub_gpu
import torch

from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    gated_linear_attention,
    linear_attention,
    rank_augmented_linear_attention,
)
from saga_kernels.depthwise.registration import depthwise_forward
from saga_kernels.ffn.registration import ffn_forward
from saga_kernels.gated import kernel
from saga_kernels.gated_attention.registration import gated_attention_forward
from saga_kernels.starter import starters_of

SIZE = 6, 10


def of_tokens(op):
    def run(packed, mask):
        k, v = packed[:, :, 1:3].flatten(3).unbind(2)
        w = torch.ones(k.shape[2])
        return op(k, v, w, w, mask=mask, impl='triton').unflatten(2, packed.shape[3:])

    return run


def convolved(packed, mask):
    x = packed[:, :, 0].flatten(2).unflatten(1, SIZE)
    if mask is not None:
        mask = mask.unflatten(1, SIZE)[..., None]
    weight = torch.ones(x.shape[-1], 1, 3, 3)
    out = depthwise_forward(x, weight, None, None, mask, True)
    return out.flatten(1, 2).unflatten(2, packed.shape[3:])


# Parts of the packed projection, and the op.
OPS = {
    'gated': (5, lambda x, mask: gated_linear_attention(x, mask=mask, impl='triton')),
    'plain': (3, lambda x, mask: linear_attention(x, mask=mask, impl='triton')),
    'rank_augmented': (
        3,
        lambda x, mask: rank_augmented_linear_attention(
            x, SIZE, torch.ones(x.shape[-1] // 4), mask=mask, impl='triton'
        ),
    ),
    'decay': (
        3,
        lambda x, mask: decay_linear_attention(
            x, -torch.ones(x.shape[3]), SIZE, mask=mask, impl='triton'
        ),
    ),
    'wkv': (3, of_tokens(bidirectional_wkv)),
    'depthwise': (3, convolved),
}


def shifted(x):
    """A copy of a tensor, one element behind an address that 16 divides."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
    return buffer[1:].view(x.shape).copy_(x)


def counted(function):
    """How many kernels are compiled and launched, by Triton's launcher and directly."""
    before = stub_gpu.counts.copy()
    function()
    return [stub_gpu.counts[name] - before[name] for name in ('compiled', 'by Triton', 'directly')]


@pytest.mark.parametrize('dim', [24, 64])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('name', OPS)
def test_a_tensor_that_is_not_aligned_gets_a_kernel_of_its_own(name, dtype, dim):
    parts, op = OPS[name]
    packed = torch.randn(2, 60, parts, 2, dim).to(dtype)
    grad = torch.randn(2, 60, 2, dim).to(dtype)
    mask = torch.ones(2, 60, dtype=torch.bool)
    # Of the input, of the gradient, and of the mask.
    cases = [
        (packed, grad, None),
        (shifted(packed), grad, None),
        (packed, shifted(grad), None),
        (packed, grad, mask),
        (packed, grad, shifted(mask)),
    ]

    def run(packed, grad, mask):
        packed = packed.detach().requires_grad_()
        torch.autograd.grad(op(packed, mask), packed, grad)

    launches = []
    for case in cases:
        _, by_triton, directly = counted(lambda case=case: run(*case))
        assert by_triton > 0
        launches.append(by_triton + directly)
    assert len(set(launches)) == 1
    for case in cases:
        assert counted(lambda case=case: run(*case)) == [0, 0, launches[0]]


@pytest.mark.parametrize('dim', [24, 64])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_a_feed_forward_network_with_tensors_that_are_not_aligned(dtype, dim):
    x, norm = torch.randn(60, dim).to(dtype), torch.ones(2, dim)
    fc1, bias1, bias2 = torch.randn(2 * dim, dim).to(dtype), torch.ones(2 * dim), torch.ones(dim)
    layers = [*norm, fc1, bias1, fc1.T.contiguous(), bias2]
    cases = [(x, layers, None), (x, layers, bias2), (shifted(x), layers, None)]
    cases += [
        (x, [shifted(y) if i == j else y for j, y in enumerate(layers)], None) for i in range(6)
    ]

    def run(x, layers, gamma):
        ffn_forward(x, *layers, gamma, 1e-6)

    for case in cases:
        assert counted(lambda case=case: run(*case)) == [1, 1, 0]
    for case in cases:
        assert counted(lambda case=case: run(*case)) == [0, 0, 1]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_fused_attention_with_tensors_that_are_not_aligned(dtype):
    x, vector = torch.randn(2, *SIZE, 24).to(dtype), torch.ones(24)
    square, taps = torch.randn(24, 24).to(dtype), torch.ones(24, 1, 3, 3)
    layers = [vector, vector, square.repeat(5, 1), vector.repeat(5), square, vector]
    optional = [taps, vector, square, vector, vector]
    mask = torch.ones(2, *SIZE, 1, dtype=torch.bool)
    cases = [
        (x, layers, [None] * 5, None),
        (x, layers, optional, None),
        (x, layers, optional, mask),
    ]
    cases += [(shifted(x), layers, optional, None)]
    cases += [(x, layers[:2] + [shifted(y) for y in layers[2:]], optional, None)]
    cases += [(x, layers, [shifted(y) for y in optional], None)]

    def run(x, layers, optional, mask):
        gated_attention_forward(x, *layers, 1, *optional, mask, 'elu', 1e-6, 1e-6)

    for case in cases:
        compiled, by_triton, directly = counted(lambda case=case: run(*case))
        assert 0 < compiled <= by_triton
        assert by_triton + directly == 3
    for case in cases:
        assert counted(lambda case=case: run(*case)) == [0, 0, 3]


def test_the_stub_refuses_a_kernel_that_was_compiled_for_other_tensors():
    packed = torch.randn(1, 60, 5, 2, 64).bfloat16()
    state, out = torch.empty(1, 2, 65, 64), torch.empty(1, 60, 2, 64).bfloat16()
    tensors = dict(p_x=packed, p_mask=None, p_state=state, p_out=out)
    (starter,) = starters_of('gated', kernel.out_forward)(packed, None, ELU=True, eps=0.5)
    starter(**tensors)
    (compiled,) = starter.compiled.values()
    for name, x in dict(
        p_x=shifted(packed), p_mask=torch.ones(1, 60), p_state=state.double(), p_out=out.half()
    ).items():
        changed = [(tensors | {name: x}).get(name) for name in kernel.out_forward.arg_names]
        values = [y if x is None else x for x, y in zip(changed, starter.values, strict=True)]
        with pytest.raises(stub_gpu.MismatchError, match=name):
            compiled(*values)


def test_strides_of_64_bits():
    # The memory is never touched.
    memory = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)
    far = memory.as_strided((2, 60, 5, 2, 64), (2**31, 640, 128, 64, 1))
    near = torch.randn(2, 60, 5, 2, 64).bfloat16()
    for packed, expected in [(near, None), (far, 2), (near, 0), (far, 0)]:
        compiled, *_ = counted(lambda x=packed: gated_linear_attention(x, impl='triton'))
        assert compiled == expected or expected is None
