"""Half precision through `torch.autocast` on a CPU is close to fp32, for images of every kind."""

import copy
import itertools

import pytest
import torch

import saga_mm
from harness import rms_ratio
from saga_mm.registry import MODELS

BACKBONES = saga_mm.backbones.__all__
SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
# The largest RMS ratio of an error.
BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 3e-2}
# As in mixed precision training, because fp16 cannot represent small gradients.
LOSS_SCALE = {torch.float16: 2.0**10, torch.bfloat16: 1.0}
IMAGES = {
    'random': torch.randn,
    'constant': lambda *shape: torch.full(shape, 0.7),
    'one_hot': lambda *shape: one_hot(*shape),
    # Pixels without the normalisation of a data preprocessor.
    'pixels': lambda *shape: 300 * torch.rand(*shape),
}

pytestmark = [
    pytest.mark.parametrize('name', BACKBONES),
    pytest.mark.parametrize('arch', [SMALL, pytest.param('tiny', marks=pytest.mark.long)]),
]


def one_hot(*shape):
    image = torch.zeros(shape)
    image[:, 1, shape[2] // 2, shape[3] // 3] = 1
    return image


def packed(tensors):
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def check_close(value, truth, dtype, what):
    """Compare the RMS ratios of errors with the bound. `pytest -s` shows the ratios."""
    ratio = rms_ratio(value, truth.double())
    print(f'\n{dtype}, {what}: {ratio:.1e}', end='')
    assert value.isfinite().all()
    assert ratio < BOUNDS[dtype], f'{dtype}, {what}'


def effective(model):
    """The parameters without the biases of convolutions before batch norm.

    These biases have no effect in training: their gradients are zero except for rounding errors.
    """
    pairs = [
        pair
        for layers in model.modules()
        if isinstance(layers, torch.nn.Sequential)
        for pair in itertools.pairwise(layers)
    ]
    idle = {id(conv.bias) for conv, norm in pairs if isinstance(norm, torch.nn.BatchNorm2d)}
    return [p for p in model.parameters() if id(p) not in idle]


def loss_of(outs):
    """A loss with random weights, because norms make the mean of squares constant."""
    weights = torch.Generator().manual_seed(1)
    return sum((out * torch.randn(out.shape, generator=weights)).mean() for out in outs)


@pytest.mark.parametrize(
    'kind', ['pixels', *(pytest.param(kind, marks=pytest.mark.long) for kind in list(IMAGES)[:3])]
)
def test_inference(name, arch, kind):
    # There are more tokens than the largest number of fp16, 65,504.
    model = MODELS.get(name)(arch=arch).eval()
    x = IMAGES[kind](1, 3, 1280, 1280)
    with torch.no_grad():
        truth = model(x)
        for dtype in BOUNDS:
            with torch.autocast('cpu', dtype=dtype):
                outs = model(x)
            for i, (out, expected) in enumerate(zip(outs, truth, strict=True)):
                check_close(out, expected, dtype, f'output {i}')


@pytest.mark.parametrize('kind', IMAGES)
def test_training_step(name, arch, kind):
    model = MODELS.get(name)(arch=arch, drop_path_rate=0)
    x = IMAGES[kind](2, 3, 256, 256)

    def step(dtype, scale):
        model.zero_grad()
        with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
            outs = model(x)
        (scale * loss_of(outs)).backward()
        return packed(outs), packed(p.grad for p in effective(model)) / scale

    truth = step(None, 1.0)
    for dtype, scale in LOSS_SCALE.items():
        outputs, gradients = step(dtype, scale)
        check_close(outputs, truth[0], dtype, 'outputs')
        check_close(gradients, truth[1], dtype, 'gradients')


def test_training_recovers_from_skipped_steps(name, arch):
    half = MODELS.get(name)(arch=arch, drop_path_rate=0)
    full = copy.deepcopy(half)
    x = torch.randn(2, 3, 64, 64)
    # The initial scale is too large, so the gradients overflow and the scaler skips the step.
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**40, backoff_factor=2.0**-6)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (half, full)]
    skipped, losses = 0, []
    while len(losses) < 5:
        before = packed(half.parameters())
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast('cpu', dtype=torch.float16):
            loss = loss_of(half(x))
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            assert torch.equal(packed(half.parameters()), before)
            skipped += 1
            assert skipped < 6
            continue
        expected = loss_of(full(x))
        expected.backward()
        optimizers[1].step()
        losses.append(loss.item())
        assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert skipped > 0
    assert losses[-1] < losses[0]
    check_close(packed(half.parameters()), packed(full.parameters()), torch.float16, 'weights')
