"""The attention module: what it adds around the op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saga_kernels import gated_linear_attention, linear_attention, slices
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


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('lepe_kernel_size', [0, 3])
@pytest.mark.parametrize('with_grad', [False, True])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('height', [1, 33])
def test_strips_equal_the_whole(gated, lepe_kernel_size, with_grad, padded, height, monkeypatch):
    module = GatedLinearAttention(12, 3, gated=gated, lepe_kernel_size=lepe_kernel_size).double()
    norm = nn.LayerNorm(12).double()
    x = torch.randn(2, height, 7, 12, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, height, 7, 1) < 0.5 if padded else None
    tensors = x, *norm.parameters(), *module.parameters()
    whole = module(x, mask, norm)
    weights = torch.randn_like(whole)
    truth = torch.autograd.grad((whole * weights).sum(), tensors)

    rows = []
    module.in_proj.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    monkeypatch.setitem(slices.BUDGET, 'cpu', 5 * 2 * 7 * 12 * 8)
    with torch.set_grad_enabled(with_grad):
        out = module(x, mask, norm)
    # a strip is no thinner than 16 times what LePE reads beyond it
    step = 16 if lepe_kernel_size else 5
    assert rows == [min(step, height - start) for start in range(0, height, step)]
    torch.testing.assert_close(out, whole)
    if with_grad:
        torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), tensors), truth)


def test_strips_under_autocast_sum_in_fp32(monkeypatch):
    module, x = GatedLinearAttention(16, 2), torch.randn(1, 64, 64, 16)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        whole = module(x)
        monkeypatch.setitem(slices.BUDGET, 'cpu', 2**12)
        out = module(x)
    assert out.dtype == torch.bfloat16
    # a sum of 4096 tokens in bf16 would be far off
    torch.testing.assert_close(out, whole, rtol=2**-7, atol=2**-9)


def test_strips_are_for_the_reference_alone(monkeypatch):
    monkeypatch.setitem(slices.BUDGET, 'cpu', 1)
    module = GatedLinearAttention(16, 2, impl='triton')
    why = r"gated_linear_attention: impl='triton' can't run: it needs a GPU"
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match=why):
        module(torch.randn(1, 40, 4, 16))


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
