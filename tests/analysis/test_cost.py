"""FLOPs agree with counts by hand, and activations with what autograd must keep."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from saga_mm.analysis.cost import FORMULAS, measure_cost
from saga_mm.attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    RankAugmentedAttention,
    SoftmaxAttention,
)
from saga_mm.backbones import RAVLT


def cost_of(module, x):
    return measure_cost(module, lambda: module(x))


def test_linear_layers_by_hand():
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 4))
    costs = cost_of(model, torch.randn(7, 6, requires_grad=True))
    assert [costs[name].flops for name in ('', '0', '1', '2')] == [1400, 840, 0, 560]
    assert [costs[name].parameters for name in ('', '0', '1', '2')] == [104, 60, 0, 44]
    # The input, and the output of the ReLU, which the next layer reads as well.
    assert [costs[name].activations for name in ('', '0', '1', '2')] == [448, 168, 280, 0]


def test_backward_pass_of_a_depthwise_convolution_by_hand():
    conv = nn.Conv2d(5, 5, 3, padding=1, groups=5)
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        conv(x).sum().backward()
    # The output, and the gradients of the input and the weight.
    assert counter.get_total_flops() == 3 * 2 * (2 * 5 * 6 * 7) * 9


# Used below: H, W, C, the number of heads, and values derived from them.
HEIGHT, WIDTH, DIM, HEADS = 6, 7, 16, 2
TOKENS, HEAD_DIM = HEIGHT * WIDTH, DIM // HEADS


def mixing_flops(module, lepe_kernel_size):
    """FLOPs of an attention module for one image, by hand, without projections and LePE."""
    flops = cost_of(module, torch.randn(3, HEIGHT, WIDTH, DIM, requires_grad=True))[''].flops
    projections = 2 * TOKENS * DIM * (module.parts * DIM + DIM)
    lepe = 2 * TOKENS * DIM * lepe_kernel_size**2
    assert flops % 3 == 0
    return flops // 3 - projections - lepe


@pytest.mark.parametrize('gated', [True, False])
def test_gated_linear_attention_by_hand(gated):
    module = GatedLinearAttention(DIM, HEADS, gated=gated, lepe_kernel_size=3)
    assert module.parts == (5 if gated else 3)
    # Per head S and o, (D x N)(N x D) each, and the normaliser, (N x D)(D x 1).
    head = 2 * 2 * TOKENS * HEAD_DIM**2 + 2 * TOKENS * HEAD_DIM
    assert mixing_flops(module, 3) == HEADS * head


def test_rank_augmented_attention_by_hand():
    module = RankAugmentedAttention(DIM, HEADS, lepe_kernel_size=5)
    assert module.parts == 4
    # Like the gated one, plus the products of all keys with the mean query, (N x D)(D x 1).
    head = 2 * 2 * TOKENS * HEAD_DIM**2 + 2 * 2 * TOKENS * HEAD_DIM
    assert mixing_flops(module, 5) == HEADS * head


def test_decay_linear_attention_by_hand():
    module = DecayLinearAttention(DIM, HEADS, lepe_kernel_size=3)
    assert module.parts == 3
    # 42 tokens: one chunk, and one more; one group of 8 chunks, and one more. One column of v more,
    # for the denominator.
    chunks, chunk, groups, group = 2, 64, 2, 8
    state = HEAD_DIM * (HEAD_DIM + 1)
    within = 2 * chunks * chunk * chunk * (HEAD_DIM + HEAD_DIM + 1)
    # States that are computed and read, in both directions.
    states = 2 * 2 * 2 * chunks * chunk * state
    # Totals of groups, these between groups, and states within each group, in both directions.
    carried = 2 * 2 * (groups * group + groups**2 + groups * group**2) * state
    assert mixing_flops(module, 3) == HEADS * (within + states + carried)


@pytest.mark.parametrize('rotary', [False, True])
def test_softmax_attention_by_hand(rotary):
    if rotary:
        module = RankAugmentedAttention(DIM, HEADS, mixer='softmax', lepe_kernel_size=5)
    else:
        module = SoftmaxAttention(DIM, HEADS, lepe_kernel_size=5)
    # Two products of (N x D) and (D x N) per head. torch's own counter sees none on a CPU.
    assert mixing_flops(module, 5) == HEADS * 2 * 2 * TOKENS**2 * HEAD_DIM


@pytest.mark.parametrize(('arch', 'published'), [('tiny', 219), ('small', 262)])
def test_published_multiply_adds_of_ravlt_leave_out_attention(arch, published):
    """Mask R-CNN at 800 x 1280: docs/methods/ravlt.md."""
    model = RAVLT(arch, impl='reference').eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(1, 3, 800, 1280)
        flops = measure_cost(model, lambda: model(image))[''].flops
    products = 0
    for i, stage in enumerate(model.stages):
        tokens, attention = 800 * 1280 // (4 * 2**i) ** 2, stage.blocks[0].attn
        channels = attention.num_heads * attention.head_dim
        # Multiply-adds per channel of v: two products with states and two with vectors, or two with
        # all tokens.
        each = 2 * (attention.head_dim + 1 if i < 2 else tokens)
        products += len(stage.blocks) * tokens * channels * each
    neck_and_heads = 170.07
    rest = (flops // 2 - products) / 1e9 + neck_and_heads
    # The published counts may include norms; ours do not.
    assert rest == pytest.approx(published, rel=0.005)


class Method(nn.Module):
    """A module that is never called as a module, like the heads of detectors."""

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
    # A product outside of any called module is counted for the caller.
    assert costs[''].flops == 2 * costs['head'].flops


def test_nothing_stays_behind():
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        cost_of(model, torch.randn(1, 3))
    assert not model._forward_hooks and not model._forward_pre_hooks


class ReadsPartsOfAnEmbedding(nn.Module):
    """Passes a part of a parameter to a layer, as Deformable DETR does with its queries."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.layer = nn.Linear(4, 5)

    def forward(self):
        position, _ = self.queries.split(4, dim=1)
        return self.layer(position)


def test_parts_of_parameters_without_autograd():
    model = ReadsPartsOfAnEmbedding()
    assert measure_cost(model, model, grad=False)['layer'].flops == 2 * 3 * 4 * 5
    assert all(parameter.requires_grad for parameter in model.parameters())
