"""FLOPs against counts by hand, activations against what autograd must keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saga_mm.analysis.cost import measure_cost
from saga_mm.attention import GatedLinearAttention


def cost_of(module, x):
    return measure_cost(module, lambda: module(x))


def test_linear_layers_by_hand():
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 4))
    costs = cost_of(model, torch.randn(7, 6, requires_grad=True))
    assert [costs[name].flops for name in ('', '0', '1', '2')] == [1400, 840, 0, 560]
    assert [costs[name].parameters for name in ('', '0', '1', '2')] == [104, 60, 0, 44]
    # The input, and the output of the ReLU, which the next layer reads as well.
    assert [costs[name].activations for name in ('', '0', '1', '2')] == [448, 168, 280, 0]


@pytest.mark.parametrize('parts', [3, 5])
def test_gated_linear_attention_by_hand(parts):
    height, width, dim, heads = 6, 7, 16, 2
    tokens = height * width
    attention = GatedLinearAttention(dim, heads, gated=parts == 5, lepe_kernel_size=3)
    flops = cost_of(attention, torch.randn(2, height, width, dim))[''].flops
    projections = 2 * tokens * dim * (parts * dim + dim)
    lepe = 2 * tokens * dim * 9
    # Per head S and o, (D x N)(N x D) each, and the normaliser, (N x D)(D x 1).
    head = dim // heads
    mixing = heads * (2 * 2 * tokens * head**2 + 2 * tokens * head)
    assert flops == 2 * (projections + lepe + mixing)


class Softmax(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_softmax_attention_by_hand():
    # Two products of (N x D) and (D x N) per head. torch's own counter sees none on a CPU.
    x = torch.randn(2, 3, 50, 16, requires_grad=True)
    assert cost_of(Softmax(), x)[''].flops == 2 * 3 * 2 * (2 * 50**2 * 16)


class Method(nn.Module):
    """Not called itself, as the heads of detectors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def predict(self, x):
        return self.layer(x) @ self.layer.weight


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Method()

    def forward(self, x):
        return self.head.predict(x)


def test_modules_that_are_not_called_have_what_is_below_them():
    costs = cost_of(Model(), torch.randn(3, 4))
    assert costs['head.layer'].flops == costs['head'].flops == 2 * 3 * 4 * 4
    # A product outside of any called module is the caller's.
    assert costs[''].flops == 2 * costs['head'].flops


def test_nothing_stays_behind():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        cost_of(model, torch.randn(1, 3))
    assert not model._forward_hooks and not model._forward_pre_hooks
