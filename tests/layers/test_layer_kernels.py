"""The layers around attention choose kernels, and stay the modules that they were."""

import copy

import pytest
import torch
from torch import nn

from saga_mm.attention import GatedLinearAttention
from saga_mm.backbones import RAVLT, SAGA, SoLAVision
from saga_mm.layers import (
    FFN,
    Block,
    ConvStem,
    DepthwiseConv2d,
    LayerNorm,
    add_conv,
    mask_padding,
    with_kernel,
)

KERNELS = 'depthwise_conv2d=triton,layer_norm=triton'
SMALL = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture
def block():
    return Block(
        GatedLinearAttention(8, 1, lepe_kernel_size=3),
        FFN(8, 16, conv_kernel_size=3),
        8,
        cpe_kernel_size=3,
        drop_path=0,
        norm_layer=LayerNorm,
    )


@pytest.mark.parametrize('masked', [False, True])
def test_a_block_with_kernels_equals_one_without(masked, block, triton_device, monkeypatch):
    block.to(triton_device)
    x = torch.randn(1, 4, 6, 8, device=triton_device)
    mask = torch.rand(1, 4, 6, 1, device=triton_device) > 0.3 if masked else None
    results = []
    for impl in ('reference', KERNELS):
        monkeypatch.setenv('SAGA_KERNELS_IMPL', impl)
        leaf = x.clone().requires_grad_()
        out = block(leaf, mask)
        out = mask_padding(out, mask)
        gradients = torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])
        results.append([out.detach(), *gradients])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_one_kernel_convolves_and_adds(block, triton_device, monkeypatch):
    monkeypatch.setenv('SAGA_KERNELS_IMPL', KERNELS)
    block.to(triton_device)
    x = torch.randn(1, 4, 6, 8, device=triton_device)
    with torch.profiler.profile() as profile, torch.no_grad():
        block(x)
    names = [event.name for event in profile.events()]
    assert sum(name == 'saga_kernels::depthwise_forward' for name in names) == 3
    assert sum(name == 'saga_kernels::layer_norm_forward' for name in names) == 2
    assert not {'aten::convolution', 'aten::layer_norm', 'aten::contiguous'} & set(names)


class Doubled(nn.Module):
    """A convolution that was replaced, whose `forward` takes one argument."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return 2 * self.conv(x)


def test_a_convolution_that_is_watched_or_replaced_is_called():
    conv, seen = DepthwiseConv2d(4), []
    x, base, mask = *torch.randn(2, 2, 5, 6, 4), torch.rand(2, 5, 6, 1) > 0.3
    truth = base + conv(mask_padding(x, mask))
    torch.testing.assert_close(add_conv(base, conv, x, mask), truth)
    torch.testing.assert_close(add_conv(base, Doubled(conv), x, mask), 2 * truth - base)
    conv.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(add_conv(base, conv, x, mask), truth)
    torch.testing.assert_close(base + seen[0], truth)


def test_a_norm_keeps_its_parameters():
    norm = nn.LayerNorm(8, eps=1e-3)
    parameters = list(norm.parameters())
    x, truth = torch.randn(2, 8), copy.deepcopy(norm)
    same = with_kernel(norm)
    assert same is norm
    assert isinstance(same, LayerNorm)
    assert all(a is b for a, b in zip(same.parameters(), parameters, strict=True))
    assert torch.equal(same(x), truth(x))
    for other in (nn.GroupNorm(2, 8), nn.LayerNorm((2, 8)), nn.LayerNorm(8, bias=False)):
        other.requires_grad_(False)
        expected = copy.deepcopy(other)(x)
        assert torch.equal(with_kernel(other)(x), expected)


def test_a_norm_writes_the_dtype_of_autocast_where_a_linear_layer_reads_it(block):
    stem = ConvStem(3, 8, LayerNorm)
    dtypes = {}
    for name, norm in dict(block=block.norm1, stem=stem.embed1.norm, last=stem.embed2.norm).items():
        norm.register_forward_hook(lambda _, args, out, name=name: dtypes.update({name: out.dtype}))
    image, x = torch.randn(1, 8, 8, 3), torch.randn(1, 2, 3, 8)
    with torch.autocast('cpu', torch.bfloat16):
        stem(image)
        block(x)
    assert dtypes['block'] == dtypes['stem'] == torch.bfloat16
    block(x)
    assert dtypes['block'] == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        assert block.double().norm1(x.double()).dtype == torch.float64


@pytest.mark.parametrize('kind', [SAGA, RAVLT, SoLAVision])
def test_reference_is_for_the_layers_around_attention_as_well(kind):
    for impl, expected in dict(reference='reference', auto='auto', triton='auto').items():
        layers = [m for m in kind(SMALL, impl=impl).modules() if hasattr(m, 'before_linear')]
        layers += [m for m in kind(SMALL, impl=impl).modules() if type(m) is DepthwiseConv2d]
        assert {layer.impl for layer in layers} == {expected}
        assert not [m for m in kind(SMALL).modules() if type(m) is nn.LayerNorm]
