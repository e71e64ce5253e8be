"""Chunks of rows give the results of plain modules; some modules must not run over chunks."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from saga_mm.attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    RankAugmentedAttention,
    SoftmaxAttention,
    WKVAttention,
)
from saga_mm.inference import ImageRows, chunked, run_block, run_embed
from saga_mm.layers import FFN, Block, ChannelMix, ConvNormEmbed, ConvStem, PatchEmbed

DIM, HEADS = 12, 3
KINDS = {
    'gated': lambda: GatedLinearAttention(DIM, HEADS),
    'plain, relu': lambda: GatedLinearAttention(DIM, HEADS, gated=False, feature_map='relu'),
    'normalised': lambda: GatedLinearAttention(DIM, HEADS, qk_norm=(1, -1)),
    'output gate': lambda: GatedLinearAttention(DIM, HEADS, output_gate=True),
    'without LePE': lambda: GatedLinearAttention(DIM, HEADS, lepe_kernel_size=0),
    'wide LePE': lambda: GatedLinearAttention(DIM, HEADS, lepe_kernel_size=5),
    'decay': lambda: DecayLinearAttention(DIM, HEADS),
    'softmax': lambda: SoftmaxAttention(DIM, HEADS),
    'rank-augmented': lambda: RankAugmentedAttention(DIM, HEADS),
    'wkv': lambda: WKVAttention(DIM),
}


@pytest.fixture
def budget(monkeypatch):
    """Sets the bytes of the widest temporary of a chunk."""
    return lambda size: monkeypatch.setattr(chunked, 'BUDGET', size)


@pytest.fixture
def calls(monkeypatch):
    """Records the names of the functions that ran blocks over chunks."""
    names = []
    for name in ('chunked_block', 'block_with_chunked_ffn'):
        original = getattr(chunked, name)

        def call(*args, name=name, original=original):
            names.append(name)
            return original(*args)

        monkeypatch.setattr(chunked, name, call)
    return names


def make_block(
    attention=None,
    *,
    kernel_size=3,
    conv_kernel_size=0,
    layer_scale=None,
    drop_path=0,
    ffn=None,
):
    torch.manual_seed(0)
    block = Block(
        attention or GatedLinearAttention(DIM, HEADS),
        ffn or FFN(DIM, 20, conv_kernel_size),
        DIM,
        cpe_kernel_size=kernel_size,
        drop_path=drop_path,
        norm_layer=nn.LayerNorm,
        layer_scale=layer_scale,
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def make_mask(height, padded):
    if not padded:
        return None
    mask = torch.zeros(2, height, 7, 1, dtype=torch.bool)
    mask[0, : height // 2 + 1, :5] = mask[1, :, :6] = True
    return mask


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize(
    'options',
    [dict(), dict(kernel_size=0), dict(kernel_size=5, conv_kernel_size=3, layer_scale=0.5)],
)
@pytest.mark.parametrize('height', [1, 16, 33, 90])
def test_inference_equals_the_plain_block(kind, padded, options, height, budget, calls):
    block = make_block(KINDS[kind](), **options).double()
    x, mask = torch.randn(2, height, 7, DIM, dtype=torch.float64), make_mask(height, padded)
    truth, given = block(x, mask), x.clone()
    for size in (1, 7 * 2 * 7 * 20 * 8):
        budget(size)
        with torch.no_grad():
            torch.testing.assert_close(run_block(block, x, mask), truth)
    assert torch.equal(x, given)
    assert bool(calls) == (height > 16 or (height == 16 and not options.get('conv_kernel_size')))


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', ['gated', 'wkv'])
@pytest.mark.parametrize('shifts', [False, True])
def test_channel_mix_and_hidden_states_over_chunks(kind, padded, shifts, budget, calls):
    attention = KINDS[kind]()
    attention.returns_state = True
    block = make_block(attention, ffn=ChannelMix(DIM, 20, token_shift=shifts)).double()
    x, mask = torch.randn(2, 40, 7, DIM, dtype=torch.float64), make_mask(40, padded)
    truth = block(x, mask)
    budget(1)
    with torch.no_grad():
        for out, expected in zip(run_block(block, x, mask), truth, strict=True):
            torch.testing.assert_close(out, expected)
    assert calls == ['chunked_block']
    for out, expected in zip(run_block(block, x, mask), truth, strict=True):
        torch.testing.assert_close(out, expected)
    assert calls == ['chunked_block', 'block_with_chunked_ffn'][: 1 if shifts else 2]


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', ['gated', 'softmax'])
def test_gradients_equal_those_of_the_plain_block(kind, padded, budget, calls):
    block = make_block(KINDS[kind](), layer_scale=0.5, drop_path=0.5).double().train()
    x = torch.randn(2, 33, 7, DIM, dtype=torch.float64, requires_grad=True)
    mask, tensors = make_mask(33, padded), (x, *block.parameters())
    torch.manual_seed(0)
    truth = block(x, mask)
    weights = torch.randn_like(truth)
    gradients = torch.autograd.grad((truth * weights).sum(), tensors)
    budget(5 * 2 * 7 * 20 * 8)
    torch.manual_seed(0)
    out = run_block(block, x, mask)
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), tensors), gradients)
    assert calls == ['block_with_chunked_ffn']


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_gives_the_same_dtype_and_sums_in_fp32(dtype, budget):
    block, x = make_block(layer_scale=0.5), torch.randn(1, 64, 64, DIM, dtype=dtype)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        truth = block(x)
        budget(2**12)
        out = run_block(block, x)
    assert out.dtype == truth.dtype
    torch.testing.assert_close(out, truth, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize('height', [1, 63, 64, 65, 66, 67, 68, 140])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('batch_norm', [False, True])
def test_stem_equals_the_plain_stem(height, padded, batch_norm, budget, monkeypatch):
    x, mask = torch.randn(2, height, 7, 3), make_mask(height, padded)
    if batch_norm:
        stem = ConvNormEmbed(3, (4, 4, 8), (2, 1, 2), nn.BatchNorm2d).eval()
    else:
        stem = ConvStem(3, 8, nn.LayerNorm).eval()
    truth, with_halo, chunks = stem(x, mask), chunked.with_halo, []
    monkeypatch.setattr(chunked, 'with_halo', lambda *a: chunks.append(a) or with_halo(*a))
    for size in (1, 2**12):
        budget(size)
        with torch.no_grad():
            torch.testing.assert_close(run_embed(stem, x, mask), truth)
    assert chunks or height < 140


def no_hook(*_):
    pass


class Lora(nn.Module):
    """A linear layer in a wrapper that hides its attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class OwnBlock(Block):
    pass


class Identity(nn.Module):
    def forward(self, x):
        return x


def wrap(block, name):
    parent, _, child = name.rpartition('.')
    owner = block.get_submodule(parent)
    setattr(owner, child, Lora(getattr(owner, child)))


CHANGES = {
    'a forward hook': lambda block: block.register_forward_hook(no_hook),
    'a hook inside': lambda block: block.attn.lepe.register_forward_pre_hook(no_hook),
    'a backward hook': lambda block: block.ffn.fc1.register_full_backward_hook(no_hook),
    'a forward of its own': lambda block: setattr(block.ffn.fc1, 'forward', block.ffn.fc1.forward),
    'a wrapped layer': lambda block: wrap(block, 'ffn.fc1'),
    'a wrapped convolution': lambda block: wrap(block, 'attn.lepe'),
    'a wrapped norm': lambda block: wrap(block, 'norm1'),
    'a wrapped attention': lambda block: wrap(block, 'attn.in_proj'),
    'a class of its own': lambda block: setattr(block, '__class__', OwnBlock),
    'a parametrization': lambda block: parametrize.register_parametrization(
        block.attn.proj, 'weight', Identity()
    ),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('with_grad', [False, True])
def test_blocks_that_are_watched_or_changed_are_called(change, with_grad, budget, calls):
    block, x = make_block(), torch.randn(2, 40, 7, DIM)
    truth = block(x)
    budget(1)
    CHANGES[change](block)
    with torch.set_grad_enabled(with_grad):
        torch.testing.assert_close(run_block(block, x), truth)
    assert not calls


def test_global_hooks_see_each_module_once(budget, calls):
    block, x, seen = make_block(), torch.randn(2, 40, 7, DIM), []
    budget(1)
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        run_block(block, x)
    handle.remove()
    assert not calls
    assert len(seen) == len(set(seen)) > 5


def test_drop_path_draws_once_per_sample_without_grad(budget, calls):
    block, x = make_block(drop_path=0.5).train(), torch.randn(8, 40, 7, DIM)
    torch.manual_seed(0)
    truth = block(x)
    budget(1)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(run_block(block, x), truth)
    assert calls == ['block_with_chunked_ffn']


def test_shapes_without_memory_are_not_cut(budget, calls):
    budget(1)
    block = make_block()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert run_block(block, torch.randn(2, 40, 7, DIM)).shape == (2, 40, 7, DIM)
    assert not calls


def test_an_explicit_kernel_is_never_replaced(monkeypatch, budget):
    budget(1)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    block = make_block(GatedLinearAttention(DIM, HEADS, impl='triton'))
    why = r"gated_linear_attention: impl='triton' can't run: it needs a GPU"
    with torch.no_grad(), pytest.raises(RuntimeError, match=why):
        run_block(block, torch.randn(1, 40, 4, DIM))


EMBEDS = {
    'stem': lambda: ConvStem(3, 12, nn.LayerNorm),
    'plain patches': lambda: PatchEmbed(3, 12, 4, False, nn.LayerNorm),
    'overlapping patches': lambda: PatchEmbed(3, 12, 4, True, nn.LayerNorm),
    'four convolutions': lambda: ConvNormEmbed(
        3, (6, 6, 6, 12), (2, 1, 1, 2), nn.BatchNorm2d, fp32_start=True
    ),
    'late strides': lambda: ConvNormEmbed(3, (6, 12), (1, 4), nn.BatchNorm2d),
    'a norm of the whole map': lambda: ConvNormEmbed(
        3, (6, 12), (2, 2), lambda dim: nn.GroupNorm(2, dim)
    ),
}


@pytest.mark.parametrize('height', [1, 37, 300])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('kind', EMBEDS)
def test_images_that_are_read_by_rows(kind, padded, height, budget):
    budget(2**10)
    torch.manual_seed(0)
    embed = EMBEDS[kind]().eval()
    for parameter in embed.parameters():
        nn.init.normal_(parameter, std=0.3)
    image, mask = torch.randn(1, 3, height, 18), None
    if padded:
        mask = torch.ones(1, height, 18, 1, dtype=torch.bool)
        mask[:, height // 2 :, 11:] = False
    reads = []

    def read(rows):
        reads.append(len(rows))
        return image[:, :, rows.start : rows.stop]

    with torch.no_grad():
        expected = embed(image.permute(0, 2, 3, 1), mask)
        found = run_embed(embed, ImageRows((1, height, 18, 3), read), mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if height == 300 and kind != 'a norm of the whole map':
        assert max(reads) < height
