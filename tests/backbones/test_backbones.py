"""Tests that hold for every backbone: each runs for all that are registered."""

import copy

import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS

import saga_mm
from saga_mm.layers import DropPath
from saga_mm.registry import MODELS

BACKBONES = saga_mm.backbones.__all__
WIDTHS = (8, 16, 24, 32)
ARCH = dict(embed_dims=WIDTHS, depths=(1, 2, 1, 1), num_heads=(1, 2, 3, 4))
SMALL = dict(arch=ARCH)

pytestmark = pytest.mark.parametrize('name', BACKBONES)


def build(name, **options):
    model = MODELS.get(name)(**SMALL | options)
    for parameter in model.parameters():
        # A factor that starts at zero would hide the features that it multiplies.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(outs):
    """A loss that a norm does not make constant, unlike the mean of squares."""
    weights = torch.Generator().manual_seed(0)
    return sum((out * torch.randn(out.shape, generator=weights)).mean() for out in outs)


def ceil_div(a, b):
    return -(-a // b)


def test_registered_once_and_found_from_the_root(name):
    model = ROOT_MODELS.build(dict(type=f'saga_mm.{name}', **SMALL))
    assert type(model) is MODELS.get(name)
    assert ROOT_MODELS.module_dict.get(name) is None


@pytest.mark.parametrize('size', [(1, 1), (1, 97), (31, 33), (64, 64), (70, 45)])
@pytest.mark.parametrize('training', [False, True])
def test_any_size_gives_ceil_sized_maps(name, size, training):
    model = build(name).train(training)
    outs = model(torch.randn(2, 3, *size))
    assert isinstance(outs, tuple)
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        assert out.shape == (2, WIDTHS[i], ceil_div(size[0], stride), ceil_div(size[1], stride))
        assert out.isfinite().all()
        # mmcv's RoIAlign expects contiguous maps.
        assert out.is_contiguous()


def test_every_parameter_gets_a_gradient(name):
    for out_indices in [(0, 1, 2, 3), (1, 2), (3,), (0,)]:
        model = build(name, out_indices=out_indices, drop_path_rate=0)
        loss_of(model(torch.randn(2, 3, 64, 48))).backward()
        without = [key for key, p in model.named_parameters() if p.grad is None]
        zero = [
            key for key, p in model.named_parameters() if p.grad is not None and not p.grad.any()
        ]
        assert without == zero == []


def test_no_stage_and_no_norm_beyond_what_is_used(name):
    model = build(name, out_indices=(1, 2))
    assert len(model.stages) == 3
    assert list(model.norms) == ['1', '2']
    full = build(name)
    full.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 3, 40, 40)
    outs = model.eval()(x)
    for out, expected in zip(outs, full.eval()(x)[1:3], strict=True):
        assert torch.equal(out, expected)


def test_checkpointing_gives_equal_outputs_and_gradients(name):
    # Drop path is used, so that the random state must be restored as well.
    plain = build(name, drop_path_rate=0.5).train()
    saving = build(name, drop_path_rate=0.5, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 48, 48)
    for model in (plain, saving):
        torch.manual_seed(1)
        loss_of(model(x)).backward()
    for (key, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key


def test_checkpointing_keeps_fewer_activations(name):
    def saved_elements(model):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, 3, 64, 64))
        return count

    assert saved_elements(build(name, with_cp=True)) < 0.5 * saved_elements(build(name))


def test_frozen_stages_stay_frozen_after_train(name):
    for frozen in (-1, 0, 1, 2, 4):
        model = build(name, frozen_stages=frozen, drop_path_rate=0)
        model.train()
        before = copy.deepcopy(model.state_dict())
        trainable = [p for p in model.parameters() if p.requires_grad]
        if frozen < 4:
            loss_of(model(torch.randn(2, 3, 64, 64))).backward()
            torch.optim.SGD(trainable, lr=1.0).step()
        prefixes = [f'stages.{i}.' for i in range(frozen)] + [f'norms.{i}.' for i in range(frozen)]
        if frozen >= 0:
            prefixes.append('stages.0.embed.')
        for key, p in model.named_parameters():
            is_frozen = key.startswith(tuple(prefixes))
            assert p.requires_grad != is_frozen, key
            assert torch.equal(p, before[key]) == is_frozen, key
        for i, stage in enumerate(model.stages):
            assert stage.training == (i >= frozen)
        model.eval()
        assert not model.training and not any(stage.training for stage in model.stages)


def test_frozen_stage_is_deterministic_in_training(name):
    model = build(name, frozen_stages=2, drop_path_rate=0.9).train()
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(model(x)[1], model(x)[1])
    assert not torch.equal(model(x)[3], model(x)[3])


def test_drop_path_grows_with_depth(name):
    model = build(name, drop_path_rate=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    # The attention and the FFN of a block.
    assert rates[::2] == rates[1::2]
    rates = rates[::2]
    assert rates == pytest.approx([0.4 * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_bad_pixels_stay_visible(name, value):
    x = torch.randn(1, 3, 64, 64)
    x[0, 1, 10, 10] = value
    for out in build(name).eval()(x):
        assert not out.isfinite().all()


def test_batch_does_not_matter(name):
    model = build(name).eval()
    x = torch.randn(3, 3, 50, 70)
    for out, alone in zip(model(x), model(x[1:2]), strict=True):
        torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-5)


def test_empty_batch_gives_empty_maps(name):
    outs = build(name).eval()(torch.zeros(0, 3, 64, 64))
    assert [tuple(out.shape) for out in outs] == [
        (0, width, 16 // 2**i, 16 // 2**i) for i, width in enumerate(WIDTHS)
    ]


def test_other_image_channels(name):
    model = build(name, in_channels=5).eval()
    assert model(torch.randn(1, 5, 32, 32))[0].shape == (1, 8, 8, 8)
    with pytest.raises(ValueError, match=r'\(B, 5, H, W\), got \(1, 3, 32, 32\)'):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 1, 32, 32), (1, 3, 0, 32), (1, 3, 32)])
def test_wrong_input_shape(name, shape):
    with pytest.raises(ValueError, match=r'the input must have shape \(B, 3, H, W\), got'):
        build(name)(torch.randn(shape))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='huge'), "arch must be one of .* got 'huge'"),
        (dict(arch=3), 'arch must be a name or a dict, got int'),
        (dict(arch=dict(depths=(1, 1))), r"arch must have the keys .* got \['depths'\]"),
        (
            dict(arch=dict(embed_dims=(8, 8), depths=(1, 1, 1), num_heads=(1, 1))),
            'one entry per stage',
        ),
        (dict(arch=dict(embed_dims=(8,), depths=(0,), num_heads=(1,))), "arch.'depths'. must be"),
        (dict(arch=dict(embed_dims=(8,), depths=(1,), num_heads=(3,))), 'multiples of num_heads'),
        (dict(arch=dict(embed_dims=8, depths=(1,), num_heads=(1,))), "arch.'embed_dims'. must be"),
        (dict(out_indices=()), r'out_indices must be .* got \(\)'),
        (dict(out_indices=(0, 4)), r'out_indices must be .* got \(0, 4\)'),
        (dict(out_indices=(2, 1)), r'out_indices must be .* got \(2, 1\)'),
        (dict(out_indices=(1, 1)), r'out_indices must be .* got \(1, 1\)'),
        (dict(out_indices=(1.0,)), r'out_indices must be .* got \(1\.0,\)'),
        (dict(out_indices=1.0), r'out_indices must be .* got \(1\.0,\)'),
        (dict(out_indices=None), r'out_indices must be .* got \(None,\)'),
        (dict(norm_cfg=dict(typ='LN')), "norm_cfg must have the type of a norm, .* got {'typ': "),
        (dict(norm_cfg=dict(type='LM')), "norm_cfg must have the type of a norm, .* got {'type': "),
        (dict(frozen_stages=5), 'frozen_stages must be from -1 to 4, got 5'),
        (dict(out_indices=(0,), frozen_stages=2), 'frozen_stages must be from -1 to 1, got 2'),
        (dict(drop_path_rate=1.0), r'drop_path_rate must be in \[0, 1\), got 1.0'),
        (dict(in_channels=0), 'in_channels must be a positive int, got 0'),
    ],
)
def test_wrong_options_name_the_argument(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        MODELS.get(name)(**SMALL | options)
    assert '\n' not in str(error.value)


def test_unknown_keyword_is_an_error(name):
    with pytest.raises(TypeError, match='drop_path_rat'):
        MODELS.get(name)(**SMALL, drop_path_rat=0.1)


def test_exports_with_dynamic_size(name):
    model = build(name).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(1, 3, 64, 96),), dynamic_shapes={'x': {2: dynamic, 3: dynamic}}
    )
    for size in [(64, 96), (75, 130)]:
        x = torch.randn(1, 3, *size)
        for out, expected in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_compiles_as_one_graph(name):
    # A graph break is detected without generating code.
    model = build(name, out_indices=(0, 2)).eval()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    x = torch.randn(1, 3, 60, 44)
    with torch.no_grad():
        for out, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_pretrained_weights_are_loaded_and_reported(name, tmp_path):
    source = build(name)
    detector = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    torch.save({'state_dict': {**detector, 'head.weight': torch.zeros(3)}}, tmp_path / 'a.pth')
    checkpoint = str(tmp_path / 'a.pth')

    model = build(name, init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.'))
    model.init_weights()
    for (key, value), expected in zip(
        model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), key

    foreign = build(name, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
    with pytest.raises(ValueError, match='no weight that fits'):
        foreign.init_weights()
