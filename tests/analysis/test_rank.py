"""Ranks are tested on matrices whose ranks are known."""

import pytest
import torch

from saga_mm.analysis.rank import (
    effective_rank,
    layer_ranks,
    normalized_singular_values,
    numerical_rank,
    summarize,
)
from saga_mm.backbones import SAGA


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def test_known_ranks():
    assert effective_rank(normalized_singular_values(3 * orthogonal(6))) == pytest.approx(6)
    outer = torch.outer(torch.randn(5).double(), torch.randn(7).double())
    assert effective_rank(normalized_singular_values(outer)) == pytest.approx(1)
    # shares of 1/2, 1/4 and 1/4 have an entropy of 1.5 bits
    matrix = orthogonal(3) @ torch.diag(torch.tensor([2.0, 1, 1]).double()) @ orthogonal(3)
    values = normalized_singular_values(matrix)
    torch.testing.assert_close(values, torch.tensor([1, 0.5, 0.5]).double())
    assert effective_rank(values) == pytest.approx(2**1.5)


def test_numerical_rank_counts_from_one_percent():
    values = torch.tensor([[10, 5, 0.11, 0.09], [1, 0.02, 0.011, 0]])
    assert numerical_rank(values).tolist() == [3, 3]
    assert numerical_rank(values, 0.4).tolist() == [2, 1]


def test_zeros_have_no_rank_and_no_nan():
    values = normalized_singular_values(torch.zeros(2, 3, 4))
    assert effective_rank(values).tolist() == [1, 1]
    assert numerical_rank(values).tolist() == [0, 0]


def test_summary_is_the_median_over_matrices():
    summary = summarize(torch.tensor([[1, 1], [1, 0.5], [1, 0]]).double())
    assert summary['singular_values'] == [1, 0.5]
    assert summary['full_rank'] == summary['numerical_rank'] == 2
    # shares of 2/3 and 1/3
    assert summary['effective_rank'] == pytest.approx(3 / 2 ** (2 / 3), rel=1e-6)


@pytest.mark.parametrize(('gain', 'share'), [(0, 1), (100, 0.5)])
def test_number_of_tokens_that_a_token_attends_to(gain, share):
    arch = dict(embed_dims=(16,), depths=(1,), num_heads=(2,))
    # equal keys give uniform attention, and very large ones attention to few tokens
    model = SAGA(arch, out_indices=0, gated=False, qk_norm=(gain, -gain)).eval()
    number, full = layer_ranks(model, [torch.randn(1, 3, 32, 24)])['0.0']['tokens']
    assert full == 48
    assert number == pytest.approx(48) if gain == 0 else 1 <= number < share * 48
