"""Layers on channels-last maps agree with the torch functions that they replace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saga_mm.layers import (
    FFN,
    Block,
    Conv2d,
    ConvNormEmbed,
    ConvStem,
    DepthwiseConv2d,
    DropPath,
    PatchEmbed,
    QKNorm,
    drop_path_schedule,
    rotary_frequencies,
)


def test_conv_equals_torch_on_the_usual_layout():
    conv = Conv2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 9, 11, 4)
    truth = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(conv(x), truth.permute(0, 2, 3, 1))
    assert conv(x).is_contiguous()


def test_depthwise_conv_keeps_channels_apart():
    conv = DepthwiseConv2d(3, 5)
    x = torch.zeros(1, 8, 8, 3)
    x[..., 1] = torch.randn(8, 8)
    change = conv(x) - conv(torch.zeros_like(x))
    assert change[..., 1].abs().max() > 0
    assert (change[..., [0, 2]] == 0).all()


@pytest.mark.parametrize('overlap', [False, True])
@pytest.mark.parametrize('stride', [2, 4])
@pytest.mark.parametrize('size', [(1, 1), (7, 9), (16, 8)])
def test_patch_embed_rounds_up(overlap, stride, size):
    embed = PatchEmbed(3, 8, stride, overlap, nn.LayerNorm)
    out = embed(torch.randn(2, *size, 3))
    assert out.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 8)


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (7, 9), (16, 8)])
def test_conv_stem_rounds_up(size):
    out = ConvStem(3, 9, nn.LayerNorm)(torch.randn(2, *size, 3))
    assert out.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 9)


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (7, 9), (16, 8)])
def test_conv_norm_embed_is_a_sequence_on_the_usual_layout(size):
    embed = ConvNormEmbed(3, (4, 4, 9), (2, 1, 2), nn.BatchNorm2d)
    assert [type(layer) for layer in embed] == [nn.Conv2d, nn.BatchNorm2d, nn.GELU] * 2 + [
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    x = torch.randn(2, *size, 3)
    out = embed(x)
    assert out.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 9)
    truth = x.permute(0, 3, 1, 2)
    for layer in embed:
        truth = layer(truth)
    torch.testing.assert_close(out, truth.permute(0, 2, 3, 1))


def test_ffn_with_a_convolution_between():
    ffn = FFN(4, 6, conv_kernel_size=3)
    x = torch.randn(1, 5, 7, 4)
    hidden = F.gelu(ffn.fc1(x))
    truth = ffn.fc2(hidden + ffn.dwconv(hidden))
    torch.testing.assert_close(ffn(x), truth)
    with torch.no_grad():
        ffn.dwconv.weight.zero_()
        ffn.dwconv.bias.zero_()
    torch.testing.assert_close(ffn(x), ffn.fc2(hidden))


class OnMaps(nn.Linear):
    """Takes the place of attention or an FFN."""

    def forward(self, x, mask):
        return super().forward(x)


@pytest.mark.parametrize('cpe_kernel_size', [0, 3])
@pytest.mark.parametrize('layer_scale', [None, 0.5])
def test_block_adds_three_residuals(cpe_kernel_size, layer_scale):
    options = dict(drop_path=0, norm_layer=nn.LayerNorm, layer_scale=layer_scale)
    block = Block(OnMaps(4, 4), OnMaps(4, 4), 4, cpe_kernel_size=cpe_kernel_size, **options)
    x = torch.randn(2, 6, 5, 4)
    truth = x + block.cpe(x) if cpe_kernel_size else x
    factor = layer_scale or 1
    truth = truth + factor * block.attn(block.norm1(truth), None)
    truth = truth + factor * block.ffn(block.norm2(truth), None)
    torch.testing.assert_close(block(x), truth)


def test_rotary_frequencies_include_both_ends():
    frequencies = rotary_frequencies(16)
    assert frequencies.tolist() == pytest.approx([1, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    drop = DropPath(0.3).train()
    out = drop(torch.ones(20000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    x = torch.randn(4, 3)
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_drop_path_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r'rate must be in \[0, 1\)'):
        DropPath(rate)


def test_drop_path_schedule():
    assert drop_path_schedule(0.3, (1, 2, 1)) == [
        [0.0],
        [pytest.approx(0.1), pytest.approx(0.2)],
        [0.3],
    ]
    assert drop_path_schedule(0.3, (1,)) == [[0.0]]


def test_qk_norm_is_a_layer_norm_of_each_head_of_queries_and_keys():
    norm = QKNorm(6, 2, gain=2, bias=-1)
    x = torch.randn(2, 4, 5, 18)
    query, key, rest = norm(x).split(6, dim=-1)
    assert torch.equal(rest, x[..., 12:])
    for part, start in ((query, 0), (key, 6)):
        for head in (0, 3):
            truth = F.layer_norm(x[..., start + head : start + head + 3], (3,), eps=1e-6) * 2 - 1
            torch.testing.assert_close(part[..., head : head + 3], truth)
    assert [name for name, _ in norm.named_parameters()] == ['weight', 'bias']
    assert norm(x.half()).dtype == torch.half
