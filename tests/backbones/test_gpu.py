"""Backbones on a GPU: against float64, in mixed precision, compiled, and as a CUDA graph."""

import copy

import pytest
import torch

from harness import capture, rms_ratio
from saga_mm.backbones import RAVLT, SAGA, SoLAVision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

MODELS = {
    'SAGA': SAGA,
    'SAGA without gates': lambda **options: SAGA(gated=False, **options),
    'SoLA-Vision': SoLAVision,
    'SoLA-Vision, gated': lambda **options: SoLAVision(linear='gated', **options),
    'SoLA-Vision, decay': lambda **options: SoLAVision(linear='decay', **options),
    'RAVLT': RAVLT,
}
SMALL = dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
# The largest RMS ratios of errors: of float32 without TF32, and of mixed precision.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def build(name, **options):
    model = MODELS[name](drop_path_rate=0, **options).cuda()
    # Otherwise a factor that starts at zero would hide a branch.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def outputs_and_gradients(model, x, dtype=None):
    """The outputs, and the gradients of all parameters, each in one tensor."""
    generator = torch.Generator('cuda').manual_seed(1)
    with torch.autocast('cuda', dtype=dtype, enabled=dtype is not None):
        outs = model(x)
    weights = [torch.randn(out.shape, device='cuda', generator=generator) for out in outs]
    loss = sum((out * weight).mean() for out, weight in zip(outs, weights, strict=True))
    # fp16 can't represent small gradients
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    gradients = torch.autograd.grad(scale * loss, list(model.parameters()))
    return tuple(
        torch.cat([x.detach().double().flatten() for x in tensors])
        for tensors in (outs, [gradient / scale for gradient in gradients])
    )


@pytest.mark.parametrize('size', [(224, 224), (509, 403)])
def test_outputs_and_gradients_against_float64(model, size):
    x = torch.randn(2, 3, *size, device='cuda')
    model.eval()
    truth = outputs_and_gradients(copy.deepcopy(model).double(), x.double())
    with torch.backends.cudnn.flags(allow_tf32=False):
        for dtype, bound in BOUNDS.items():
            half = None if dtype == torch.float32 else dtype
            for value, exact in zip(outputs_and_gradients(model, x, half), truth, strict=True):
                assert rms_ratio(value, exact) < bound, dtype


@pytest.mark.parametrize('name', MODELS)
def test_padding_does_not_leak(name):
    model = build(name, pad_mask=True).eval()
    x = torch.randn(1, 3, 224, 256, device='cuda')
    x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
    padded = torch.nn.functional.pad(x, (0, 64, 0, 32))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        outs = model(x), model(padded)
    for expected, out in zip(*outs, strict=True):
        height, width = expected.shape[2:]
        assert rms_ratio(out[..., :height, :width], expected.double()) < BOUNDS[torch.float32]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_training_in_mixed_precision_lowers_the_loss(model, dtype):
    x = torch.randn(4, 3, 128, 160, device='cuda')
    target = torch.randn_like(model(x)[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast('cuda', dtype=dtype):
            loss = (model(x)[-1] - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_training_step_is_bitwise_repeatable(model):
    x = torch.randn(2, 3, 128, 160, device='cuda')
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        first, second = (outputs_and_gradients(model, x, torch.bfloat16) for _ in range(2))
    for value, again in zip(first, second, strict=True):
        assert torch.equal(value, again)


def test_cuda_graph_of_inference(model):
    model.eval()
    x = torch.randn(1, 3, 256, 320, device='cuda')
    with torch.no_grad(), torch.autocast('cuda', dtype=torch.bfloat16, cache_enabled=False):
        graph, captured = capture(lambda: model(x))
        x.copy_(torch.randn_like(x))
        graph.replay()
        for out, expected in zip(captured, model(x), strict=True):
            assert torch.equal(out, expected)


@pytest.mark.parametrize('name', MODELS)
def test_compiled_models_take_images_of_several_sizes(name):
    options = dict(pattern=('L', 'L', 'S', 'L')) if 'SoLA' in name else {}
    model = build(name, arch=SMALL, **options).eval()
    compiled = torch.compile(model)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for shape in [(2, 3, 128, 160), (2, 3, 150, 100), (3, 3, 192, 128)]:
            x = torch.randn(shape, device='cuda')
            values, truth = outputs_and_gradients(compiled, x), outputs_and_gradients(model, x)
            for value, exact in zip(values, truth, strict=True):
                assert rms_ratio(value, exact) < BOUNDS[torch.float32]


def test_an_export_runs_on_the_gpu_that_it_was_made_on(model):
    model.eval()
    x = torch.randn(1, 3, 128, 160, device='cuda')
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        exported = torch.export.export(model, (x,)).module()
        for out, expected in zip(exported(x), model(x), strict=True):
            assert rms_ratio(out, expected.double()) < BOUNDS[torch.float32]
