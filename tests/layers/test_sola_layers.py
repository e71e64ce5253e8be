"""The layers of SoLA-Vision: bridge, channel mix, shift."""

import math

import pytest
import torch
import torch.nn.functional as F

from saga_mm.layers import ChannelMix, HiddenStateBridge, QShift
from saga_mm.layers.bridge import window_means


def means_by_hand(x, mask, stride):
    """Means over the tokens of each window for which the mask is 1, or zeros."""
    batch, height, width, dim = x.shape
    out = torch.zeros(batch, -(-height // stride), -(-width // stride), dim, dtype=x.dtype)
    for b in range(batch):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                rows = slice(i * stride, (i + 1) * stride)
                columns = slice(j * stride, (j + 1) * stride)
                window = x[b, rows, columns][mask[b, rows, columns, 0]]
                if len(window):
                    out[b, i, j] = window.mean(0)
    return out


@pytest.mark.parametrize('stride', [1, 2, 4, 8])
@pytest.mark.parametrize('size', [(1, 1), (3, 8), (9, 5)])
@pytest.mark.parametrize('padded', [False, True])
def test_sampling_is_the_mean_over_the_tokens_of_the_image(stride, size, padded):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    mask = torch.ones(2, *size, 1, dtype=torch.bool)
    if padded:
        mask[0, -(-2 * size[0] // 3) :] = False
        mask[1, :, 1:] = False
        mask[1, 1:] = False
        x = x.masked_fill(~mask, math.nan)
    expected = means_by_hand(x, mask, stride)
    torch.testing.assert_close(window_means(x, mask if padded else None, stride), expected)


def test_the_bridge_is_its_formula():
    bridge = HiddenStateBridge(3, 5, stride=2).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    state = torch.randn(2, 5, 8, 3, dtype=torch.float64)
    sampled = means_by_hand(state, torch.ones(2, 5, 8, 1, dtype=torch.bool), 2)
    expected = x + x.sigmoid() * F.linear(sampled, bridge.linear.weight, bridge.linear.bias)
    torch.testing.assert_close(bridge(x, state), expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_bridge_in_half_precision(dtype):
    bridge = HiddenStateBridge(3, 5, stride=4)
    x, state = torch.randn(1, 40, 30, 5), 1e3 * torch.randn(1, 160, 120, 3)
    with torch.autocast('cpu', dtype=dtype):
        out = bridge(x, state.to(dtype))
    truth = bridge(x, state)
    assert (out - truth).norm() / truth.norm() < 2e-2


def test_channel_mix_is_its_formula():
    ffn = ChannelMix(6, 24).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    k = (x @ ffn.key.weight.T).clamp(min=0) ** 2
    expected = (k @ ffn.value.weight.T) * (x @ ffn.receptance.weight.T).sigmoid()
    torch.testing.assert_close(ffn(x), expected)
    # 9 C^2 at the ratio 4, without biases
    assert sum(p.numel() for p in ffn.parameters()) == 9 * 6**2


def test_channel_mix_reads_two_mixtures():
    ffn = ChannelMix(6, 24, token_shift=True)
    plain = ChannelMix(6, 24)
    plain.load_state_dict(ffn.state_dict(), strict=False)
    x = torch.randn(2, 3, 4, 6)
    k, r = ffn.shift(x)
    expected = F.relu(plain.key(k)).square() @ plain.value.weight.T * plain.receptance(r).sigmoid()
    torch.testing.assert_close(ffn(x), expected)
    assert not torch.allclose(ffn(x), plain(x))
    torch.nn.init.ones_(ffn.shift.mix)
    torch.testing.assert_close(ffn(x), plain(x))


@pytest.mark.parametrize('dim', [1, 4, 9])
@pytest.mark.parametrize('size', [(1, 1), (1, 5), (4, 3)])
def test_shift_moves_quarters_of_the_channels(dim, size):
    shift = QShift(dim, 1)
    torch.nn.init.zeros_(shift.mix)
    x = torch.randn(2, *size, dim)
    (out,) = shift(x)
    rolled = torch.zeros_like(x)
    rolled[:, :, 1:, : dim // 4] = x[:, :, :-1, : dim // 4]
    parts = [slice(i * (dim // 4), (i + 1) * (dim // 4)) for i in range(4)]
    rolled[:, :, :-1, parts[1]] = x[:, :, 1:, parts[1]]
    rolled[:, 1:, :, parts[2]] = x[:, :-1, :, parts[2]]
    rolled[:, :-1, :, parts[3]] = x[:, 1:, :, parts[3]]
    rolled[..., 4 * (dim // 4) :] = x[..., 4 * (dim // 4) :]
    torch.testing.assert_close(out, rolled)


def test_shift_does_not_read_padding():
    shift, mask = QShift(8, 2), torch.zeros(1, 5, 6, 1, dtype=torch.bool)
    mask[:, :3, :4] = True
    x = torch.randn(1, 5, 6, 8)
    padded = x.masked_fill(~mask, math.nan)
    for out, alone in zip(shift(padded, mask), shift(x[:, :3, :4]), strict=True):
        torch.testing.assert_close(out[:, :3, :4], alone)
