"""The WKV module: what it adds to the op."""

import math

import pytest
import torch
import torch.nn.functional as F

from saga_mm.attention import WKVAttention

DIM, SIZE = 8, (4, 5)


def make(**options):
    torch.manual_seed(0)
    module = WKVAttention(DIM, **options).double()
    for parameter in module.parameters():
        if not parameter.any() or parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return module, torch.randn(2, *SIZE, DIM, dtype=torch.float64)


def wkv_over_all_pairs(k, v, w, u, scale):
    """The formula for one image: (N, C) -> (N, C), with decay w / scale and bonus u / scale."""
    out = torch.zeros_like(v)
    for t in range(len(k)):
        exponents = torch.stack(
            [
                u / scale + k[t] if i == t else k[i] - (abs(t - i) - 1) * w / scale
                for i in range(len(k))
            ]
        )
        out[t] = (exponents.softmax(0) * v).sum(0)
    return out


@pytest.mark.parametrize('decay_per', ['image', 'token'])
@pytest.mark.parametrize('lepe', [0, 3])
def test_the_module_is_its_formula(decay_per, lepe):
    module, x = make(decay_per=decay_per, lepe_kernel_size=lepe)
    r, k, v = F.linear(x, module.in_proj.weight, module.in_proj.bias).chunk(3, dim=-1)
    scale = math.prod(SIZE) if decay_per == 'image' else 1
    wkv = torch.stack(
        [
            wkv_over_all_pairs(*pair, module.log_decay.exp(), module.bonus, scale)
            for pair in zip(k.flatten(1, 2), v.flatten(1, 2), strict=True)
        ]
    ).reshape(x.shape)
    inner = wkv
    if lepe:
        conv = F.conv2d(
            v.permute(0, 3, 1, 2), module.lepe.weight, module.lepe.bias, padding=1, groups=DIM
        )
        inner = wkv + conv.permute(0, 2, 3, 1)
    truth = F.linear(r.sigmoid() * inner, module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), truth)
    module.returns_state = True
    out, state = module(x)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(state, wkv)


def q_shift(x, height, width):
    """Quarters of the channels of one image (H, W, C) from the left, right, above and below."""
    out = torch.zeros_like(x)
    quarter = x.shape[-1] // 4
    steps = [(0, -1), (0, 1), (-1, 0), (1, 0)]
    for row in range(x.shape[0]):
        for column in range(x.shape[1]):
            for i, (down, right) in enumerate(steps):
                part = slice(i * quarter, (i + 1) * quarter)
                y, z = row + down, column + right
                if 0 <= y < height and 0 <= z < width:
                    out[row, column, part] = x[y, z, part]
    out[..., 4 * quarter :] = x[..., 4 * quarter :]
    return out


@pytest.mark.parametrize('decay_per', ['image', 'token'])
@pytest.mark.parametrize('shifts', [False, True])
def test_an_image_in_padding_gets_what_it_gets_alone(decay_per, shifts):
    module, _ = make(decay_per=decay_per, token_shift=shifts, lepe_kernel_size=3)
    images = [torch.randn(1, *size, DIM, dtype=torch.float64) for size in ((5, 7), (3, 2))]
    maps = torch.full((2, 6, 9, DIM), math.nan, dtype=torch.float64)
    mask = torch.zeros(2, 6, 9, 1, dtype=torch.bool)
    for i, image in enumerate(images):
        _, height, width, _ = image.shape
        maps[i, :height, :width], mask[i, :height, :width] = image, True
    for out, image in zip(module(maps, mask), images, strict=True):
        _, height, width, _ = image.shape
        torch.testing.assert_close(out[None, :height, :width], module(image))


def test_shifted_inputs_reach_each_projection():
    module, x = make(token_shift=True)
    shifted = torch.stack([q_shift(image, *SIZE) for image in x])
    parts = []
    for i in range(3):
        mix = module.shift.mix[i * DIM : (i + 1) * DIM]
        rows = slice(i * DIM, (i + 1) * DIM)
        y = x * mix + shifted * (1 - mix)
        parts.append(F.linear(y, module.in_proj.weight[rows], module.in_proj.bias[rows]))
    torch.testing.assert_close(module.project(x, None), torch.cat(parts, -1))


@pytest.mark.parametrize(
    ('decay_per', 'limits'),
    [('image', (math.exp(-5), math.exp(3))), ('token', (1 / 64, 1 / 4))],
)
def test_decays_spread_over_the_channels(decay_per, limits):
    decays = WKVAttention(33, decay_per=decay_per).log_decay.detach().exp()
    torch.testing.assert_close(decays[[0, -1]], torch.tensor(limits))
    ratios = decays[1:] / decays[:-1]
    own = WKVAttention(3, decay_per=decay_per, decays=(0.5, 8)).log_decay.detach().exp()
    torch.testing.assert_close(own, torch.tensor([0.5, 2.0, 8.0]))
    torch.testing.assert_close(ratios, ratios[0].expand(32), rtol=1e-4, atol=0)


@pytest.mark.parametrize('value', [-1e4, -90.0, 0.0, 9.0])
def test_any_parameter_is_a_decay(value):
    module = WKVAttention(8)
    torch.nn.init.constant_(module.log_decay, value)
    out = module(torch.randn(1, 9, 11, 8))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize('decay_per', ['image', 'token'])
def test_decay_and_bonus_are_learned(decay_per):
    module, x = make(decay_per=decay_per)
    module(x).square().sum().backward()
    assert (module.log_decay.grad != 0).all()
    assert (module.bonus.grad != 0).all()


def test_decay_per_image_reaches_the_same_share_of_a_larger_image():
    """Where each token is repeated, the weights stay the same up to the size of a token."""
    share = {}
    for decay_per in ('image', 'token'):
        module, _ = make(decay_per=decay_per)
        with torch.no_grad():
            module.in_proj.weight[DIM : 2 * DIM] = 0
            module.in_proj.bias[DIM : 2 * DIM] = 0
            torch.nn.init.constant_(
                module.log_decay, math.log(5.0 if decay_per == 'image' else 0.1)
            )
        for tokens in (64, 256):
            packed = torch.zeros(1, tokens, 3, DIM, 1, dtype=torch.float64)
            packed[:, : tokens // 2, 2] = 1
            out = module.attend(packed, (1, tokens))
            share[decay_per, tokens] = out[0, 3 * tokens // 4, 0, 0].item()
    assert share['image', 64] == pytest.approx(share['image', 256], rel=0.1)
    assert share['token', 64] > 10 * share['token', 256]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(decay_per='pixel'), "decay_per must be one of .* got 'pixel'"),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
        (dict(lepe_kernel_size=2), 'kernel_size must be odd and positive, got 2'),
        (dict(decays=(0, 1)), r'decays must be positive and in order, got \(0, 1\)'),
        (dict(decays=(2, 1)), r'decays must be positive and in order, got \(2, 1\)'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        WKVAttention(8, **options)


def test_exports_with_dynamic_size_and_compiles_as_one_graph():
    module = WKVAttention(8, token_shift=True).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        module, (torch.randn(1, 9, 11, 8),), dynamic_shapes={'x': {1: dynamic, 2: dynamic}}
    )
    compiled = torch.compile(module, backend='eager', fullgraph=True)
    x = torch.randn(1, 20, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), module(x))
        torch.testing.assert_close(compiled(x), module(x))
