"""An attention mechanism in a file outside the package: docs/attention.md with its example."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from saga_mm.analysis.attention_map import attention_maps
from saga_mm.analysis.mixing import take_apart
from saga_mm.analysis.rank import layer_ranks
from saga_mm.attention import (
    LINEAR,
    GatedLinearAttention,
    PackedAttention,
    register_attention,
)
from saga_mm.backbones import SAGA, SoLAVision
from saga_mm.inference import chunked

EXAMPLES = Path(__file__).resolve().parents[2] / 'docs/examples'
ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))


@pytest.fixture
def focused(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    before = dict(LINEAR)
    sys.modules.pop('focused_attention', None)
    yield importlib.import_module('focused_attention')
    sys.modules.pop('focused_attention', None)
    LINEAR.clear()
    LINEAR.update(before)


BUILDERS = {
    'saga': lambda **options: SAGA(ARCH, attention='focused', **options),
    'sola_vision': lambda **options: SoLAVision(
        ARCH, ('L', 'L', 'L', 'S'), linear='focused', **options
    ),
}


@pytest.mark.parametrize('backbone', BUILDERS)
def test_trains_masks_and_can_be_analysed(backbone, focused, monkeypatch):
    torch.manual_seed(0)
    model = BUILDERS[backbone](pad_mask=True).eval()
    assert isinstance(model.stages[0].blocks[0].attn, focused.FocusedLinearAttention)
    images = torch.randn(2, 4, 90, 70)
    images[:, 3], images[0, 3, 50:] = 1, 0
    maps = model(images)
    sum(out.square().mean() for out in maps).backward()
    assert all(p.grad is not None for p in model.stages[0].blocks[0].attn.parameters())

    # Padding does not leak, and inference over chunks gives the same result.
    monkeypatch.setattr(chunked, 'BUDGET', 2**12)
    alone = torch.cat([images[:1, :3, :50], torch.ones(1, 1, 50, 70)], dim=1)
    with torch.no_grad():
        for out, expected in zip(model(images), maps, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for out, expected in zip(maps, model(alone), strict=True):
            height = expected.shape[2]
            torch.testing.assert_close(out[:1, :, :height], expected, rtol=1e-3, atol=1e-4)

    plain = BUILDERS[backbone]().eval()
    image = torch.randn(1, 3, 64, 64)
    ranks = layer_ranks(plain, [image])
    assert ranks['0.0']['mechanism'] == 'focused'
    assert 'state' in ranks['0.0']['matrices']
    shown = attention_maps(plain, image, (10, 10), None)
    assert all(torch.as_tensor(layer['weights']).isfinite().all() for layer in shown.values())


def test_attention_is_that_of_all_pairs_of_tokens(focused):
    torch.manual_seed(0)
    layer = focused.FocusedLinearAttention(8, 2).double()
    parts = take_apart(layer, torch.randn(2, 5, 7, 8, dtype=torch.float64))
    rows = torch.stack([parts.row(token) for token in range(35)], dim=2)
    mixed = (rows @ parts.values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, parts.features['output'])


def test_names_are_kept(focused):
    importlib.reload(focused)
    with pytest.raises(
        ValueError, match=r"name must be a new one, got 'gated', which is saga_mm\."
    ):
        register_attention('gated')(focused.FocusedLinearAttention)
    for build, option in ((SAGA, 'attention'), (SoLAVision, 'linear')):
        with pytest.raises(ValueError, match=rf"{option} must be one of .*'focused'.*'unknown'"):
            build(ARCH, **{option: 'unknown'})


@pytest.mark.parametrize('name', ['gated', 'plain', 'decay', 'wkv'])
def test_saga_takes_the_mechanisms_of_the_package(name):
    maps = SAGA(ARCH, attention=name)(torch.randn(1, 3, 64, 64))
    sum(out.square().mean() for out in maps).backward()
    assert [out.shape[1] for out in maps] == [8, 16, 24, 32]
    with pytest.raises(ValueError, match='gated=False is for'):
        SAGA(ARCH, attention='decay', gated=False)


def test_analysis_names_what_it_needs():
    class Unexplained(PackedAttention):
        def attend(self, packed, size, mask=None):
            return packed[:, :, 2]

    layer = Unexplained(8, 2, parts=3, lepe_kernel_size=0)
    layer(torch.randn(1, 5, 7, 8))
    with pytest.raises(ValueError, match='Unexplained can not be analysed: register a function'):
        take_apart(layer, torch.randn(1, 5, 7, 8))


def test_analysis_notices_a_subclass_that_computes_something_else():
    class Doubled(GatedLinearAttention):
        def attend(self, packed, size, mask=None):
            return 2 * super().attend(packed, size, mask)

    x = torch.randn(1, 5, 7, 8)
    take_apart(GatedLinearAttention(8, 2), x)
    with pytest.raises(ValueError, match=r"Doubled can not be analysed: .* 'gated' is not its"):
        take_apart(Doubled(8, 2), x)
