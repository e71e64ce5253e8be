"""The decay module: what it adds to the op."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import decay_linear_attention
from saga_mm.attention import DecayLinearAttention


def test_projections_size_and_lepe_reach_the_op():
    dim, heads = 12, 3
    module = DecayLinearAttention(dim, heads).double()
    x = torch.randn(2, 5, 7, dim, dtype=torch.float64)
    projected = F.linear(x, module.in_proj.weight, module.in_proj.bias)
    packed = projected.reshape(2, 35, 3, heads, dim // heads)
    log_decay = module.decay_logit.sigmoid().log()
    mixed = decay_linear_attention(packed, log_decay, (5, 7)).reshape(2, 5, 7, dim)
    v = projected[..., 2 * dim :].permute(0, 3, 1, 2)
    lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=1, groups=dim)
    truth = F.linear(mixed + lepe.permute(0, 2, 3, 1), module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), truth)


@pytest.mark.parametrize('heads', [1, 2, 5])
def test_lengths_spread_over_the_heads_of_each_scan(heads):
    module = DecayLinearAttention(10, heads, decay_lengths=(2, 50))
    lengths = -1 / module.decay_logit.detach().sigmoid().log()
    assert ((lengths > 2) & (lengths < 50)).all()
    for scan in lengths.split([heads - heads // 2, heads // 2]):
        # In equal ratios around the geometric mean.
        assert scan.numel() == 0 or scan.log().mean().exp().item() == pytest.approx(10, rel=1e-4)
        assert (scan.diff() > 0).all()


@pytest.mark.parametrize('logit', [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_any_logit_is_a_decay(logit):
    module = DecayLinearAttention(8, 2)
    torch.nn.init.constant_(module.decay_logit, logit)
    out = module(torch.randn(1, 9, 11, 8))
    assert out.isfinite().all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_decay_is_learned():
    module = DecayLinearAttention(8, 2)
    module(torch.randn(1, 9, 11, 8)).square().sum().backward()
    assert (module.decay_logit.grad != 0).all()


@pytest.mark.parametrize('lengths', [(0, 4), (5, 4), (float('nan'), 4)])
def test_wrong_lengths(lengths):
    with pytest.raises(ValueError, match='decay_lengths must be positive and in order, got'):
        DecayLinearAttention(8, 2, decay_lengths=lengths)


def test_exports_with_dynamic_size_and_compiles_as_one_graph():
    module = DecayLinearAttention(8, 2).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        module, (torch.randn(1, 9, 11, 8),), dynamic_shapes={'x': {1: dynamic, 2: dynamic}}
    )
    compiled = torch.compile(module, backend='eager', fullgraph=True)
    x = torch.randn(1, 20, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), module(x))
        torch.testing.assert_close(compiled(x), module(x))


def test_padding_is_no_distance():
    # Images of 5 x 7 and 3 x 2 tokens in maps of 6 x 9.
    module = DecayLinearAttention(12, 3, lepe_kernel_size=0).double()
    images = [torch.randn(1, *size, 12, dtype=torch.float64) for size in ((5, 7), (3, 2))]
    maps = torch.full((2, 6, 9, 12), 1e3, dtype=torch.float64)
    mask = torch.zeros(2, 6, 9, 1, dtype=torch.bool)
    for i, image in enumerate(images):
        _, height, width, _ = image.shape
        maps[i, :height, :width], mask[i, :height, :width] = image, True
    for out, image, inside in zip(module(maps, mask), images, mask, strict=True):
        torch.testing.assert_close(out[inside[..., 0]], module(image).flatten(0, 2))


def test_masked_exports_with_dynamic_size_and_compiles_as_one_graph():
    module = DecayLinearAttention(8, 2).eval()
    dynamic = torch.export.Dim.DYNAMIC
    sides = {1: dynamic, 2: dynamic}

    def inputs(height, width):
        mask = torch.zeros(2, height, width, 1, dtype=torch.bool)
        mask[0, :5, :4] = mask[1, :, :3] = True
        return torch.randn(2, height, width, 8), mask

    program = torch.export.export(module, inputs(9, 11), dynamic_shapes=dict(x=sides, mask=sides))
    compiled = torch.compile(module, backend='eager', fullgraph=True)
    x = inputs(20, 7)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*x), module(*x))
        torch.testing.assert_close(compiled(*x), module(*x))


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('with_grad', [False, True])
def test_empty_batch(masked, with_grad):
    module = DecayLinearAttention(8, 2)
    x = torch.zeros(0, 5, 7, 8)
    mask = torch.zeros(0, 5, 7, 1, dtype=torch.bool) if masked else None
    with torch.set_grad_enabled(with_grad):
        assert module(x, mask).shape == x.shape


def test_exports_with_a_mask_and_a_dynamic_batch():
    module = DecayLinearAttention(8, 2).eval()
    dynamic = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    x, mask = torch.randn(2, 5, 7, 8), torch.rand(2, 5, 7, 1) > 0.3
    program = torch.export.export(module, (x, mask), dynamic_shapes=(dynamic, dynamic))
    x, mask = torch.randn(3, 9, 4, 8), torch.rand(3, 9, 4, 1) > 0.3
    torch.testing.assert_close(program.module()(x, mask), module(x, mask))
