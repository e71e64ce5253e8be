"""Tests for SAGA alone."""

import pytest
import torch
from torch import nn

from harness import peak_memory
from saga_mm.analysis.rank import layer_ranks
from saga_mm.backbones import SAGA

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ('arch', 'alias', 'blocks', 'millions'),
    [
        ('tiny', 't', 8, 13.9),
        ('small', 's', 16, 24.9),
        ('medium', 'm', 28, 43.5),
        ('large', 'l', 41, 58.9),
    ],
)
def test_arch_names(arch, alias, blocks, millions):
    with torch.device('meta'):
        model, same = SAGA(arch), SAGA(alias)
    assert sum(len(stage.blocks) for stage in model.stages) == blocks
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == sum(p.numel() for p in same.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_swin_widths_as_dict():
    model = SAGA(
        dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    )
    outs = model.eval()(torch.randn(1, 3, 32, 32))
    assert [out.shape[1] for out in outs] == [96, 192, 384, 768]


@pytest.mark.parametrize(
    'options',
    [
        dict(patch_embed='plain'),
        dict(patch_embed='overlap'),
        dict(cpe_kernel_size=0),
        dict(lepe_kernel_size=5),
        dict(lepe_kernel_size=0),
        dict(gated=False),
        dict(feature_map='relu'),
        dict(qk_norm=(2, -4)),
        dict(attention='plain', qk_norm=(2, -4)),
        dict(output_gate=False),
        dict(output_gate=0),
        dict(attention='plain', output_gate=True),
        dict(attention='decay'),
        dict(ffn_kernel_size=3),
        dict(layer_scale=0.1),
        dict(impl='reference'),
        dict(norm_cfg=dict(type='LN', eps=1e-3)),
        dict(embed_norm_cfg=dict(type='BN')),
        dict(arch=dict(**SMALL, mlp_ratios=(8, 8, 4, 2.5))),
    ],
)
def test_each_option_changes_the_model_and_works(options):
    torch.manual_seed(1)
    default = SAGA(SMALL).eval()
    torch.manual_seed(1)
    model = SAGA(**dict(arch=SMALL) | options).eval()
    x = torch.randn(1, 3, 45, 61)
    outs = model(x)
    for i, out in enumerate(outs):
        assert out.shape[2:] == (-(-45 // (4 * 2**i)), -(-61 // (4 * 2**i)))
    if options != dict(impl='reference'):
        assert not torch.allclose(outs[0], default(x)[0], atol=1e-5)
    model.train()
    sum(out.exp().mean() for out in model(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(feature_map='gelu'), "feature_map must be one of .* got 'gelu'"),
        (dict(qk_norm=2), 'qk_norm must be two numbers, gain and bias, or None, got 2'),
        (dict(qk_norm=(1, 2, 3)), r'qk_norm must be two numbers, .* got \(1, 2, 3\)'),
        (dict(attention='decay', qk_norm=(1, 0)), "qk_norm is for .* got 'decay'"),
        (dict(attention='decay', output_gate=True), "output_gate is for .* got 'decay'"),
        (dict(ffn_kernel_size=2), 'kernel_size must be odd and positive, got 2'),
        (dict(patch_embed='linear'), "patch_embed must be .* got 'linear'"),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
        (dict(cpe_kernel_size=2), 'kernel_size must be odd and positive, got 2'),
        (dict(cpe_kernel_size=-1), 'kernel_size must be odd and positive, got -1'),
        (dict(embed_norm_cfg=dict(typ='BN')), 'embed_norm_cfg must have the type of a norm'),
        (dict(norm_cfg=dict(type='BN')), 'norm_cfg must name a norm over channels'),
        (
            dict(embed_norm_cfg=dict(type='LN')),
            'embed_norm_cfg must name a norm of maps such as BN',
        ),
        (
            dict(embed_norm_cfg=dict(type='BN'), patch_embed='plain'),
            "embed_norm_cfg is for patch_embed='conv', got 'plain'",
        ),
    ],
)
def test_wrong_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        SAGA(SMALL, **options)


def test_batch_norms_of_patch_embeddings_can_keep_their_statistics():
    x = torch.randn(2, 3, 64, 64)
    for norm_eval in (False, True):
        model = SAGA(SMALL, embed_norm_cfg=dict(type='BN'), norm_eval=norm_eval)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert len(norms) == 2 + 3
        model.train()(x)
        assert all((norm.num_batches_tracked == 0) == norm_eval for norm in norms)
        assert model.stages[3].blocks[0].training


def test_global_receptive_field_in_the_first_stage():
    # Even one layer of the first stage sees the far corner, which no convolution does.
    model = SAGA(SMALL, out_indices=(0,)).eval()
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    model(x)[0][0, 0, 0, 0].backward()
    assert x.grad[0, :, -8:, -8:].abs().max() > 0


def test_gates_start_nearly_open():
    model = SAGA(SMALL, gate_bias=2.0)
    bias = model.stages[0].blocks[0].attn.in_proj.bias
    assert torch.equal(bias, torch.tensor([0.0] * 24 + [2.0] * 16))


@torch.no_grad()
def test_the_norm_of_queries_and_keys_makes_new_attention_selective():
    arch = dict(embed_dims=(64,), depths=(1,), num_heads=(2,))
    image = torch.randn(1, 3, 64, 64)
    ranks = []
    for qk_norm in (None, (2, -4)):
        torch.manual_seed(0)
        model = SAGA(arch, out_indices=0, qk_norm=qk_norm).eval()
        ranks.append(layer_ranks(model, [image])['0.0']['matrices']['output']['effective_rank'])
    # all tokens get nearly the same mean, and then means of their own
    assert ranks[0] < 1.5
    assert ranks[1] > 3


def test_explicit_triton_raises_where_it_cannot_run():
    with pytest.raises(RuntimeError, match="impl='triton' can't run"):
        SAGA(SMALL, impl='triton')(torch.randn(1, 3, 32, 32))


def test_inference_needs_four_maps():
    setup = """
from saga_mm.backbones import SAGA
from saga_mm.inference import chunked
chunked.BUDGET = 2**14
arch = dict(embed_dims=(16,), depths=(2,), num_heads=(1,), mlp_ratios=(8,))
model = SAGA(arch, out_indices=0).eval()
images = torch.randn(1, 3, 2048, 512)
"""
    # what a block gets, its sum with the positional encoding, queries and values; and chunks, of
    # 16 of 512 rows at least
    assert peak_memory(setup, 'model(images)[0]') < 4.5
