"""Tests for RAVLT alone: the published formulas, names, shapes and sizes."""

import copy
from dataclasses import replace

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from published_ravlt import published
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saga_mm.backbones import RAVLT
from saga_mm.checkpoint import load_weights

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 2))


def save(path, weights):
    torch.save(weights, path)
    return str(path)


@pytest.mark.parametrize('size', [(64, 64), (96, 160), (75, 130), (33, 31), (1, 90)])
def test_equals_the_published_formulas(size, tmp_path):
    truth = published(SMALL)
    file = save(tmp_path / 'ravlt.pth', {'model': truth.state_dict()})
    model = RAVLT(SMALL, init_cfg=dict(type='Pretrained', checkpoint=file)).eval()
    model.init_weights()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for out, expected in zip(model(x), truth(x), strict=True):
            assert out.shape == expected.shape
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ('dims', 'millions', 'with_classifier'),
    [('t', 13.345, 14.90), ('s', 24.039, 25.59), ('b', 46.689, 48.24), ('l', 93.559, 95.24)],
)
def test_sizes(dims, millions, with_classifier):
    with torch.device('meta'):
        model = RAVLT(dims)
        dim = model.arch_settings[{a[0]: a for a in model.arch_settings}[dims]].embed_dims[-1]
        classifier = nn.Sequential(
            nn.Conv2d(dim, 1024, 1), nn.BatchNorm2d(1024), nn.Conv2d(1024, 1000, 1)
        )
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith('norms.'))
    assert count / 1e6 == pytest.approx(millions, abs=5e-4)
    count += sum(p.numel() for p in classifier.parameters())
    assert count / 1e6 == pytest.approx(with_classifier, abs=5e-3)


@pytest.mark.parametrize(
    ('arch', 'rate', 'scales'),
    [
        ('tiny', 0.1, (1, 1, 1, 1)),
        ('small', 0.15, (1, 1, 1, 1)),
        ('base', 0.4, (1, 1, 1e-6, 1e-6)),
        ('large', 0.55, (1e-6,) * 4),
        (SMALL, 0.1, (1, 1, 1, 1)),
    ],
)
def test_each_size_has_its_drop_path_and_layer_scale(arch, rate, scales, monkeypatch):
    if arch is not SMALL:
        # It has the same depths, and small widths.
        settings = RAVLT.arch_settings[arch]
        narrow = replace(settings, embed_dims=(4,) * 4, num_heads=(1,) * 4)
        monkeypatch.setitem(RAVLT.arch_settings, arch, narrow)
    model = RAVLT(arch)
    assert model.stages[-1].blocks[-1].drop_path2.rate == pytest.approx(rate)
    for stage, scale in zip(model.stages, scales, strict=True):
        for block in stage.blocks:
            assert torch.equal(block.gamma1, torch.full_like(block.gamma1, scale))
            assert torch.equal(block.gamma2, torch.full_like(block.gamma2, scale))


def test_first_stages_are_linear():
    model = RAVLT(SMALL)
    assert [stage.blocks[0].attn.mixer for stage in model.stages] == [
        'linear',
        'linear',
        'softmax',
        'softmax',
    ]
    model = RAVLT(SMALL, linear_stages=4)
    assert {stage.blocks[0].attn.mixer for stage in model.stages} == {'linear'}


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('nested', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('dense', [True, False])
def test_published_weights_load_as_they_are(prefix, nested, dense, tmp_path):
    weights = published(SMALL, dense).state_dict()
    if prefix:
        weights = {prefix + name: weight for name, weight in weights.items()}
        weights['neck.conv.weight'] = torch.zeros(2, 2, 1, 1)
    others = [name for name in weights if not name.removeprefix(prefix).startswith(OWN)]
    content = {nested: weights, 'epoch': 3} if nested else weights

    model = RAVLT(SMALL)
    norms = copy.deepcopy(model.norms.state_dict())
    match = load_weights(model, save(tmp_path / 'a.pth', content))
    assert match.mismatched == []
    assert match.unexpected == sorted(others)
    assert match.missing == ([] if dense else sorted(f'norms.{name}' for name in norms))

    plain = RAVLT(SMALL)
    plain.load_state_dict(content)
    for (name, weight), expected in zip(
        plain.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, expected), name
    assert dense or all(torch.equal(w, norms[n]) for n, w in plain.norms.state_dict().items())


OWN = ('patch_embed.', 'layers.', 'extra_norms.')


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = RAVLT(SMALL)
        self.neck = nn.Conv2d(8, 8, 1)


def test_published_weights_load_into_a_whole_detector():
    truth = published(SMALL)
    weights = {f'backbone.{name}': weight for name, weight in truth.state_dict().items()}
    weights |= {'neck.weight': torch.ones(8, 8, 1, 1), 'neck.bias': torch.ones(8)}
    detector = Detector().eval()
    detector.load_state_dict(weights)
    assert detector.neck.bias.sum() == 8
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(detector.backbone(x)[3], truth(x)[3], rtol=1e-4, atol=1e-5)


def test_own_weights_still_load_strictly():
    source = RAVLT(SMALL)
    RAVLT(SMALL).load_state_dict(source.state_dict())
    weights = source.state_dict()
    weights['stages.0.blocks.0.typo'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match='typo'):
        RAVLT(SMALL).load_state_dict(weights)


def test_unknown_published_weights_are_errors():
    weights = published(SMALL).state_dict()
    weights['layers.0.blocks.0.attn.temperature'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'stages\.0\.blocks\.0\.attn\.temperature'):
        RAVLT(SMALL).load_state_dict(weights)


def test_what_is_left_out_is_reported(monkeypatch):
    lines = []
    monkeypatch.setattr('saga_mm.backbones.ravlt.print_log', lambda text, **_: lines.append(text))
    RAVLT(SMALL).load_state_dict(published(SMALL, dense=False).state_dict())
    assert len(lines) == 1
    assert lines[0].startswith('RAVLT: left out head.bias, head.weight, norm.bias')


@pytest.mark.parametrize(
    'angles', [torch.ones(8), torch.ones(4), torch.tensor([1.0, 1.0, 0.1, 0.1])]
)
def test_other_angles_are_refused(angles):
    weights = published(SMALL).state_dict()
    weights['layers.1.RoPE.angle'] = angles
    with pytest.raises(ValueError, match=r'layers\.1\.RoPE\.angle must hold 4 angles') as error:
        RAVLT(SMALL).load_state_dict(weights)
    assert '\n' not in str(error.value)


def test_angles_in_half_precision_are_accepted():
    weights = {name: weight.half() for name, weight in published(SMALL).state_dict().items()}
    RAVLT(SMALL).load_state_dict(weights)


@pytest.mark.parametrize('kind', ['BN', 'SyncBN'])
@pytest.mark.parametrize('frozen_stages', [-1, 1])
@pytest.mark.parametrize('norm_eval', [True, False])
def test_norm_eval_and_freezing(kind, frozen_stages, norm_eval):
    norm_cfg = dict(type=kind, requires_grad=True)
    model = RAVLT(SMALL, norm_cfg=norm_cfg, norm_eval=norm_eval, frozen_stages=frozen_stages)
    expected = dict(BN=nn.BatchNorm2d, SyncBN=nn.SyncBatchNorm)[kind]
    norms = [module for module in model.modules() if isinstance(module, expected)]
    assert len(norms) == 4 + 3
    for mode in (None, False, True):
        if mode is not None:
            model.train(mode)
        for i, norm in enumerate(norms):
            frozen = frozen_stages > 0 and i < 4
            assert norm.training == (mode is not False and not norm_eval and not frozen)
            assert norm.weight.requires_grad != frozen
        assert model.stages[3].blocks[0].training == (mode is not False)


def test_sync_batch_norm_gives_the_same_in_one_process():
    model = RAVLT(SMALL, norm_cfg=dict(type='SyncBN'), norm_eval=True)
    plain = RAVLT(SMALL)
    plain.load_state_dict(model.state_dict())
    reverted = revert_sync_batchnorm(copy.deepcopy(model)).train()
    assert not any(m.training for m in reverted.modules() if isinstance(m, _BatchNorm))
    x = torch.randn(2, 3, 64, 64)
    for out, same, expected in zip(
        model.eval()(x), reverted.eval()(x), plain.eval()(x), strict=True
    ):
        assert torch.equal(out, expected)
        torch.testing.assert_close(same, expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(norm_cfg=dict(type='LN')), 'norm_cfg must name a norm of maps such as BN'),
        *(
            (dict(norm_cfg=norm_cfg, pad_mask=True), 'norm_cfg must name a batch norm .* pad_mask')
            for norm_cfg in (dict(type='GN', num_groups=2), dict(type='IN'))
        ),
        (dict(linear_stages=5), 'linear_stages must be from 0 to 4, got 5'),
        (dict(layer_scale=(1, 1)), r'layer_scale must be a number or 4 of them, got \(1, 1\)'),
        (dict(layer_scale='none'), "layer_scale must be a number or 4 of them, got 'none'"),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
        (dict(arch=dict(SMALL, embed_dims=(8, 16, 18, 32))), 'dim must be a multiple of 4'),
    ],
)
def test_wrong_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message) as error:
        RAVLT(**dict(arch=SMALL) | options)
    assert '\n' not in str(error.value)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize('training', [False, True])
def test_no_tensor_of_n_by_n(training):
    # The third stage has 24 x 40 tokens, so an N x N matrix has 0.9 M elements per head.
    model = RAVLT(dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))
    model.train(training)
    x = torch.randn(1, 3, 384, 640)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        outs = model(x)
        if training:
            sum(out.mean() for out in outs).backward()
    # The image, and the FFN's map at a quarter of the image's size.
    assert largest.elements <= max(x.numel(), 28 * 96 * 160)
    assert largest.elements < 960**2
