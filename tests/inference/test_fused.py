"""Fused kernels for the halves of a block give the results of the plain modules.

It runs on a GPU if there is one, and in Triton's interpreter otherwise.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from saga_mm.attention import GatedLinearAttention, SoftmaxAttention
from saga_mm.inference import chunked, run_block
from saga_mm.layers import FFN, Block, ChannelMix, LayerNorm, QKNorm

DIM = 8


@pytest.fixture
def calls(monkeypatch, triton_device):
    """Records the blocks that ran with fused kernels."""
    blocks, original = [], chunked.fused_block

    def call(block, *args):
        blocks.append(block)
        return original(block, *args)

    monkeypatch.setattr(chunked, 'fused_block', call)
    return blocks


def make_block(device, *, attention=SoftmaxAttention, dim=DIM, conv_kernel_size=0, **options):
    block = Block(
        attention(dim, 1),
        FFN(dim, 20, conv_kernel_size),
        dim,
        cpe_kernel_size=3,
        drop_path=0.5,
        norm_layer=LayerNorm,
        **options,
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.to(device).eval()


@pytest.mark.parametrize('layer_scale', [None, 0.5])
@pytest.mark.parametrize('attention', [GatedLinearAttention, SoftmaxAttention])
@pytest.mark.parametrize('padded', [False, True])
def test_equals_the_plain_block(layer_scale, attention, padded, calls, triton_device):
    block = make_block(triton_device, attention=attention, layer_scale=layer_scale)
    x = torch.randn(2, 4, 5, DIM, device=triton_device)
    mask = torch.rand(2, 4, 5, 1, device=triton_device) > 0.3 if padded else None
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x, mask), block(x, mask))
    assert calls == [block]


GATED = partial(GatedLinearAttention, output_gate=True)
PLAIN = partial(GatedLinearAttention, gated=False, lepe_kernel_size=0, feature_map='relu')


@pytest.mark.parametrize('attention', [GATED, PLAIN])
@pytest.mark.parametrize('padded', [False, True])
def test_the_first_half_alone(attention, padded, calls, triton_device):
    # The FFN has a convolution, and so no kernel.
    block = make_block(triton_device, attention=attention, conv_kernel_size=3)
    x = torch.randn(2, 4, 5, DIM, device=triton_device)
    mask = torch.rand(2, 4, 5, 1, device=triton_device) > 0.3 if padded else None
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x, mask), block(x, mask))
    assert calls == [block]


@pytest.mark.parametrize('stream', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layer_scale', [None, 0.5])
@pytest.mark.parametrize('attention', [GATED, SoftmaxAttention])
def test_autocast(attention, stream, layer_scale, calls, triton_device):
    block = make_block(triton_device, attention=attention, layer_scale=layer_scale)
    x = torch.randn(2, 4, 5, DIM, device=triton_device, dtype=stream)
    with torch.no_grad(), torch.autocast(torch.device(triton_device).type, torch.bfloat16):
        out, truth = run_block(block, x), block(x)
    assert out.dtype == truth.dtype
    torch.testing.assert_close(out, truth, rtol=3e-2, atol=3e-2)
    assert calls == [block]


def test_a_hidden_state_is_returned(calls, triton_device):
    block = make_block(triton_device)
    block.attn.returns_state = True
    x = torch.randn(2, 4, 5, DIM, device=triton_device)
    with torch.no_grad():
        for out, truth in zip(run_block(block, x), block(x), strict=True):
            torch.testing.assert_close(out, truth)
    assert calls == [block]


class Same(nn.Module):
    def forward(self, x):
        return x


class Wrapped(torch.Tensor):
    """Stands for a quantised weight."""


CHANGES = {
    'a hook': lambda block: block.register_forward_hook(lambda *_: None),
    'a hook inside': lambda block: block.ffn.fc1.register_forward_pre_hook(lambda *_: None),
    'a forward of its own': lambda block: setattr(block.ffn, 'forward', block.ffn.forward),
    'another layer': lambda block: setattr(block.ffn, 'fc1', nn.Sequential(block.ffn.fc1)),
    'another norm': lambda block: setattr(block.norm2, '__class__', nn.LayerNorm),
    'a norm without bias': lambda block: setattr(block.norm2, 'bias', None),
    'a layer without bias': lambda block: setattr(block.ffn.fc2, 'bias', None),
    'a class of its own': lambda block: setattr(block, '__class__', type('Own', (Block,), {})),
    'a parametrization': lambda block: parametrize.register_parametrization(
        block.ffn.fc1, 'weight', Same()
    ),
    'a weight of another type': lambda block: setattr(
        block.ffn.fc1, 'weight', nn.Parameter(block.ffn.fc1.weight.detach().as_subclass(Wrapped))
    ),
    'a convolution': lambda block: setattr(
        block, 'ffn', FFN(DIM, 20, 3).to(block.norm2.weight.device)
    ),
    'another FFN': lambda block: setattr(
        block, 'ffn', ChannelMix(DIM, 20).to(block.norm2.weight.device)
    ),
    'the reference': lambda block: setattr(block.ffn, 'impl', 'reference'),
}


CHANGES_OF_ATTENTION = {
    'another layer': lambda block: setattr(block.attn, 'proj', nn.Sequential(block.attn.proj)),
    'another norm': lambda block: setattr(block.norm1, '__class__', nn.LayerNorm),
    'a layer without bias': lambda block: setattr(block.attn.lepe, 'bias', None),
    'a weight of another type': lambda block: setattr(
        block.attn.output_gate,
        'weight',
        nn.Parameter(block.attn.output_gate.weight.detach().as_subclass(Wrapped)),
    ),
    'a norm of q and k': lambda block: setattr(
        block.attn, 'qk_norm', QKNorm(DIM, 1, 1.0, 0.0).to(block.norm1.weight.device)
    ),
    'a hidden state': lambda block: setattr(block.attn, 'returns_state', True),
    'the reference': lambda block: setattr(block.attn, 'impl', 'reference'),
}


@pytest.mark.parametrize('change', CHANGES_OF_ATTENTION)
def test_attention_that_is_changed_is_called(change, calls, triton_device):
    block = make_block(triton_device, attention=GATED, conv_kernel_size=3)
    x = torch.randn(1, 4, 5, DIM, device=triton_device)
    CHANGES_OF_ATTENTION[change](block)
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x), block(x))
    assert not calls


@pytest.mark.parametrize('change', CHANGES)
def test_blocks_that_are_watched_or_changed_are_called(change, calls, triton_device):
    block, x = make_block(triton_device), torch.randn(1, 4, 5, DIM, device=triton_device)
    CHANGES[change](block)
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x), block(x))
    assert not calls


def test_gradients_and_training_take_the_plain_block(calls, triton_device):
    block, x = make_block(triton_device), torch.randn(1, 4, 5, DIM, device=triton_device)
    run_block(block, x).sum().backward()
    with torch.no_grad():
        run_block(block.train(), x)
    assert not calls
    run_block(block.eval().requires_grad_(False), x)
    assert calls == [block]


# 'triton' asks for the kernel where there is one.
@pytest.mark.parametrize(
    ('impl', 'dim', 'fused'),
    [('auto', 8, True), ('triton', 8, True), ('triton', 65, False), ('ffn=reference', 8, False)],
)
def test_the_environment_decides(impl, dim, fused, calls, triton_device, monkeypatch):
    monkeypatch.setenv('SAGA_KERNELS_IMPL', impl)
    block = make_block(triton_device, dim=dim)
    with torch.no_grad():
        run_block(block, torch.randn(1, 2, 3, dim, device=triton_device))
    assert bool(calls) == fused


def test_compiled_code_takes_the_kernels(triton_device):
    block = make_block(triton_device, attention=GATED)
    x = torch.randn(1, 4, 5, DIM, device=triton_device)
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    with torch.no_grad():
        compiled = torch.compile(lambda x: run_block(block, x), fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), block(x))
    for op in ('gated_attention', 'ffn'):
        assert targets.count(f'saga_kernels.{op}_forward.default') == 1
