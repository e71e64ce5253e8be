"""The attention module: what it adds around the op."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import gated_linear_attention, linear_attention
from saga_mm.attention import GatedLinearAttention
from saga_mm.attention.base import with_channels


@pytest.mark.parametrize('gated', [True, False])
def test_channel_order_and_lepe(gated):
    dim, heads, parts = 12, 3, 5 if gated else 3
    module = GatedLinearAttention(dim, heads, gated=gated).double()
    x = torch.randn(2, 5, 7, dim, dtype=torch.float64)
    projected = F.linear(x, module.in_proj.weight, module.in_proj.bias)
    # Projection p, head h, channel d sits at p * C + h * D + d.
    packed = torch.stack(
        [torch.stack(part.chunk(heads, -1), 3) for part in projected.chunk(parts, -1)], 3
    )
    op = gated_linear_attention if gated else linear_attention
    mixed = op(packed.reshape(2, 35, parts, heads, dim // heads)).reshape(2, 5, 7, dim)
    v = projected[..., 2 * dim : 3 * dim].permute(0, 3, 1, 2)
    lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=1, groups=dim)
    truth = F.linear(mixed + lepe.permute(0, 2, 3, 1), module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), truth)


def test_channels_beside_the_whole_have_the_gradient_of_a_slice():
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def both(x):
        whole, part = with_channels(x, 1, 3)
        assert torch.equal(whole, x)
        assert torch.equal(part, x[:, 1:3])
        return whole.sin(), part.cos()

    assert torch.autograd.gradcheck(both, x)
    assert torch.autograd.gradgradcheck(both, x)
    # elements of this gradient share memory
    whole, part = with_channels(x, 1, 3)
    (whole.sum() + 2 * part.sum()).backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 3, 3, 1, 1], dtype=x.dtype).expand(2, 5))


def test_without_lepe_tokens_are_a_set():
    module = GatedLinearAttention(8, 2, lepe_kernel_size=0).double()
    x = torch.randn(1, 1, 20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    torch.testing.assert_close(module(x)[:, :, order], module(x[:, :, order]))


def test_wrong_heads():
    with pytest.raises(ValueError, match='dim must be a multiple of num_heads, got 8 and 3'):
        GatedLinearAttention(8, 3)
