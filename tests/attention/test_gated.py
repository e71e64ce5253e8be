"""The gated module: what it adds to the op."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import gated_linear_attention, linear_attention
from saga_mm.attention import GatedLinearAttention


@pytest.mark.parametrize('gated', [True, False])
def test_channel_order_and_lepe(gated):
    dim, heads, parts = 12, 3, 5 if gated else 3
    module = GatedLinearAttention(dim, heads, gated=gated).double()
    x = torch.randn(2, 5, 7, dim, dtype=torch.float64)
    projected = F.linear(x, module.in_proj.weight, module.in_proj.bias)
    # Projection p, head h and channel d are at index p * C + h * D + d.
    packed = torch.stack(
        [torch.stack(part.chunk(heads, -1), 3) for part in projected.chunk(parts, -1)], 3
    )
    op = gated_linear_attention if gated else linear_attention
    mixed = op(packed.reshape(2, 35, parts, heads, dim // heads)).reshape(2, 5, 7, dim)
    v = projected[..., 2 * dim : 3 * dim].permute(0, 3, 1, 2)
    lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=1, groups=dim)
    truth = F.linear(mixed + lepe.permute(0, 2, 3, 1), module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), truth)


def test_without_lepe_tokens_are_a_set():
    module = GatedLinearAttention(8, 2, lepe_kernel_size=0).double()
    x = torch.randn(1, 1, 20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    torch.testing.assert_close(module(x)[:, :, order], module(x[:, :, order]))


def test_wrong_heads():
    with pytest.raises(ValueError, match='dim must be a multiple of num_heads, got 8 and 3'):
        GatedLinearAttention(8, 3)
