"""Attention rows and KV states agree with what the modules compute."""

import pytest
import torch
import torch.nn.functional as F

from saga_kernels import apply_rotary_2d
from saga_mm.analysis.mixing import record_inputs, take_apart
from saga_mm.attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    RankAugmentedAttention,
    SoftmaxAttention,
    WKVAttention,
)
from saga_mm.backbones import SAGA
from saga_mm.layers import rotary_frequencies

DIM, HEADS, SIZE = 24, 3, (5, 7)
MAKERS = {
    'gated': lambda: GatedLinearAttention(DIM, HEADS),
    'relu': lambda: GatedLinearAttention(DIM, HEADS, feature_map='relu'),
    'normalised': lambda: GatedLinearAttention(DIM, HEADS, qk_norm=(1, 0)),
    'plain': lambda: GatedLinearAttention(DIM, HEADS, gated=False),
    'output gate': lambda: GatedLinearAttention(DIM, HEADS, output_gate=True),
    'rank_augmented': lambda: RankAugmentedAttention(DIM, HEADS),
    'rotary_softmax': lambda: RankAugmentedAttention(DIM, HEADS, mixer='softmax'),
    'decay': lambda: DecayLinearAttention(DIM, HEADS, decay_lengths=(1, 5)),
    'softmax': lambda: SoftmaxAttention(DIM, HEADS),
    'wkv': lambda: WKVAttention(DIM, lepe_kernel_size=3),
    'wkv, per token': lambda: WKVAttention(DIM, lepe_kernel_size=3, decay_per='token'),
}


def make(kind):
    module = MAKERS[kind]().double()
    # This makes attention far from uniform.
    torch.nn.init.normal_(module.in_proj.weight, std=0.5)
    return module, torch.randn(2, *SIZE, DIM, dtype=torch.float64)


def forward(module, mixing, x):
    """Compute the output of the module from that of attention."""
    out = mixing.features.get('gated output', mixing.features['output']).reshape(x.shape)
    projected = module.in_proj(x)
    lepe = module.lepe(projected[..., 2 * DIM : 3 * DIM])
    if isinstance(module, RankAugmentedAttention) and 'gated output' in mixing.features:
        lepe = lepe * projected[..., 3 * DIM :]
    if isinstance(module, WKVAttention):
        lepe = lepe * projected[..., :DIM].sigmoid()
    if module.output_gate is not None:
        lepe = lepe * module.output_gate(x)
    return module.proj(out + lepe)


@pytest.mark.parametrize('kind', MAKERS)
def test_rows_times_values_are_the_output(kind):
    module, x = make(kind)
    mixing = take_apart(module, x)
    torch.testing.assert_close(forward(module, mixing, x), module(x))
    # (B, heads, N, N)
    matrix = torch.stack([mixing.row(i) for i in range(35)], 2)
    out = (matrix @ mixing.values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, mixing.features['output'])
    if kind != 'rank_augmented':
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:3]).double())


def test_rows_of_rank_augmented_attention_are_rotated_above_the_line_only():
    module, x = make('rank_augmented')
    sums = torch.stack([take_apart(module, x).row(i).sum(-1) for i in range(35)])
    assert sums.std() > 0.1
    # A single token is not rotated.
    sums = take_apart(module, x[:, :1, :1]).row(0).sum(-1)
    torch.testing.assert_close(sums, torch.ones(2, HEADS).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('kind', ['gated', 'plain'])
def test_states_are_sums_of_outer_products(kind):
    module, x = make(kind)
    # (parts, N, heads, D) of the first image
    parts = module.in_proj(x)[0].reshape(35, -1, HEADS, DIM // HEADS).transpose(0, 1).detach()
    state = torch.zeros(HEADS, 8, 8, dtype=torch.float64)
    bare = torch.zeros_like(state)
    for i in range(35):
        for head in range(HEADS):
            _, k, v, *gates = parts[:, i, head]
            product = torch.outer(F.elu(k) + 1, v)
            bare[head] += product
            state[head] += (
                torch.outer(*(g.sigmoid() for g in gates)) * product if gates else product
            )
    states = take_apart(module, x).states
    torch.testing.assert_close(states['state'][0], state)
    assert set(states) == ({'state', 'state without gates'} if kind == 'gated' else {'state'})
    if kind == 'gated':
        torch.testing.assert_close(states['state without gates'][0], bare)


def test_states_of_rank_augmented_attention():
    module, x = make('rank_augmented')
    mixing = take_apart(module, x)
    # (B, N, heads, D)
    q, k, v, _ = module.in_proj(x).detach().reshape(2, 35, 4, HEADS, DIM // HEADS).unbind(2)
    q, k = (F.elu(part) + 1 for part in (q, k))
    frequencies = rotary_frequencies(DIM // HEADS)
    turned_q, turned_k = (apply_rotary_2d(x, SIZE, frequencies) for x in (q, k))
    states = {
        'state without weights': turned_k.transpose(1, 2).mT @ v.transpose(1, 2),
        'state without weights and rotation': k.transpose(1, 2).mT @ v.transpose(1, 2),
    }
    assert list(mixing.states) == ['state', *states]
    for name, state in states.items():
        torch.testing.assert_close(mixing.states[name], state)
    # The output is what a rotated query reads, divided by a denominator.
    read = (turned_q.transpose(1, 2) @ mixing.states['state']).transpose(1, 2)
    out = mixing.features['output'].reshape(read.shape)
    similarity = F.cosine_similarity(read, out, dim=-1)
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_gates_are_told():
    module, x = make('gated')
    logits = module.in_proj(x)[..., 3 * DIM :].reshape(2, 35, 2, HEADS, -1).transpose(1, 3)
    gates = take_apart(module, x).gates
    assert list(gates) == ['k', 'v']
    for i, gate in enumerate(gates.values()):
        torch.testing.assert_close(gate, logits[:, :, i].sigmoid())
    assert take_apart(*make('plain')).gates == {}


def test_hooks_see_every_layer_and_go():
    arch = dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2))
    model = SAGA(arch, out_indices=(0, 1)).eval()
    image = torch.randn(2, 3, 32, 48)
    inputs = record_inputs(model, image)
    assert {name: tuple(x.shape) for name, x in inputs.items()} == {
        'stages.0.blocks.0.attn': (2, 8, 12, 8),
        'stages.1.blocks.0.attn': (2, 4, 6, 16),
        'stages.1.blocks.1.attn': (2, 4, 6, 16),
    }
    assert not any(module._forward_pre_hooks for module in model.modules())
    first = model.stages[0]
    x = first.embed(image.permute(0, 2, 3, 1))
    torch.testing.assert_close(
        inputs['stages.0.blocks.0.attn'], first.blocks[0].norm1(x + first.blocks[0].cpe(x))
    )


def test_a_model_without_attention():
    with pytest.raises(ValueError, match='Linear has no attention of saga_mm'):
        record_inputs(torch.nn.Linear(1, 1), torch.zeros(1))
