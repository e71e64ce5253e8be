"""The attention module of RAVLT by itself; test_ravlt.py tests its formulas."""

import pytest
import torch

from saga_mm.attention import RankAugmentedAttention


@pytest.mark.parametrize('mixer', ['linear', 'softmax'])
def test_gate_has_no_activation(mixer):
    module = RankAugmentedAttention(8, 2, mixer=mixer).double()
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    out = module(x) - module.proj.bias
    with torch.no_grad():
        module.in_proj.weight[24:] *= -3
        module.in_proj.bias[24:] *= -3
    torch.testing.assert_close(module(x) - module.proj.bias, -3 * out)


@pytest.mark.parametrize('mixer', ['linear', 'softmax'])
def test_tokens_are_told_apart_by_their_place(mixer):
    module = RankAugmentedAttention(8, 2, mixer=mixer, lepe_kernel_size=0).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    turned = module(x.transpose(1, 2)).transpose(1, 2)
    assert not torch.allclose(module(x), turned)


@pytest.mark.parametrize(
    ('arguments', 'options', 'message'),
    [
        ((8, 3), {}, 'dim must be a multiple of num_heads, got 8 and 3'),
        ((12, 2), {}, r'dim must be a multiple of 4 \* num_heads, got 12 and 2'),
        ((8, 2), dict(mixer='rala'), "mixer must be one of .* got 'rala'"),
        ((8, 2), dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_options_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        RankAugmentedAttention(*arguments, **options)
