"""The gated module: what it adds to the op."""

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


@pytest.mark.parametrize('used', [(0,), (1,), (0, 1)])
def test_with_channels_has_the_gradients_of_a_slice(used):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def chosen(x):
        both = with_channels(x, 2, 4)
        return tuple(both[i].sin() for i in used)

    truths = tuple((x, x[..., 2:4])[i].sin() for i in used)
    torch.testing.assert_close(
        torch.autograd.grad(sum(y.sum() for y in chosen(x)), x),
        torch.autograd.grad(sum(y.sum() for y in truths), x),
    )
    assert torch.autograd.gradcheck(chosen, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(chosen, x)


def test_gradients_that_hooks_keep_do_not_change():
    x = torch.randn(2, 3, 6, requires_grad=True)
    whole, channels = with_channels(x * 1, 2, 4)
    kept = []
    whole.register_hook(kept.append)
    (whole.sum() + channels.sum()).backward()
    torch.testing.assert_close(kept[0], torch.ones(2, 3, 6))


def test_the_output_gate_multiplies_attention_and_lepe():
    module = GatedLinearAttention(12, 3, output_gate=True).double()
    plain = GatedLinearAttention(12, 3).double()
    assert plain.load_state_dict(module.state_dict(), strict=False).missing_keys == []
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    torch.nn.init.zeros_(module.output_gate.weight)
    torch.testing.assert_close(module(x), plain(x))
    torch.nn.init.normal_(module.output_gate.weight)
    gate = 1 + x @ module.output_gate.weight.T
    mixed, _ = plain.mix(plain.project(x, None), None)
    torch.testing.assert_close(module(x), plain.proj(gate * mixed))


def test_without_lepe_tokens_are_a_set():
    module = GatedLinearAttention(8, 2, lepe_kernel_size=0).double()
    x = torch.randn(1, 1, 20, 8, dtype=torch.float64)
    order = torch.randperm(20)
    torch.testing.assert_close(module(x)[:, :, order], module(x[:, :, order]))


def test_wrong_heads():
    with pytest.raises(ValueError, match='dim must be a multiple of num_heads, got 8 and 3'):
        GatedLinearAttention(8, 3)
