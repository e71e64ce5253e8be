"""Padding does not leak: an image of a padded batch gets the features that it gets alone."""

from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness import rms_ratio
from saga_mm.backbones import RAVLT, SAGA, SoLAVision

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 2))
LAYERS = ('L', 'L', 'SL', 'S')
CONVOLUTIONS = dict(cpe_kernel_size=3, lepe_kernel_size=3)
CASES = {
    'saga': (SAGA, {}),
    'saga-plain': (SAGA, dict(gated=False, patch_embed='plain', feature_map='relu')),
    'saga-overlap': (SAGA, dict(patch_embed='overlap', cpe_kernel_size=5, lepe_kernel_size=0)),
    'saga-options': (
        SAGA,
        dict(qk_norm=(2, -4), ffn_kernel_size=3, layer_scale=0.5),
    ),
    'saga-batch-norm': (SAGA, dict(embed_norm_cfg=dict(type='BN'))),
    'sola': (SoLAVision, dict(layers=LAYERS)),
    'sola-shift': (
        SoLAVision,
        dict(layers=LAYERS, token_shift='q_shift', decay_per='token', bridges=[(1, 1, 4, 1)]),
    ),
    'sola-gated': (SoLAVision, dict(layers=LAYERS, linear='gated', patch_embed='conv')),
    'sola-plain': (SoLAVision, dict(layers=LAYERS, linear='plain', bridges=(), **CONVOLUTIONS)),
    'sola-decay': (SoLAVision, dict(layers=LAYERS, linear='decay', **CONVOLUTIONS)),
    'ravlt': (RAVLT, {}),
    'ravlt-linear': (RAVLT, dict(linear_stages=4)),
}
BATCH = (64, 96)
# One image has odd sides, one fills the batch, and one is smaller than any stride.
SIZES = [(37, 61), BATCH, (51, 13), (1, 3)]

every_case = pytest.mark.parametrize('case', CASES)


def build(case, **options):
    torch.manual_seed(1)
    kind, own = CASES[case]
    model = kind(SMALL, **{'drop_path_rate': 0, 'pad_mask': True, **own, **options}).eval()
    for parameter in model.parameters():
        # A factor that starts at zero would hide the features that it multiplies.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
        elif kind is SoLAVision and parameter.ndim == 2:
            # New linear layers are so small that a layer hardly changes its input.
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_mask(images, value=0.0, size=BATCH):
    """Images (3, h, w) padded at the bottom and the right, and their mask: (B, 4, *size)."""
    batch = torch.full((len(images), 4, *size), value, dtype=images[0].dtype)
    batch[:, 3] = 0
    for target, image in zip(batch, images, strict=True):
        height, width = image.shape[1:]
        target[:3, :height, :width] = image
        target[3, :height, :width] = 1
    return batch


def some_images(dtype=torch.float32):
    return [torch.randn(3, *size, dtype=dtype) for size in SIZES]


def alone(model, image):
    return model(with_mask([image], size=image.shape[1:]))


@every_case
@pytest.mark.parametrize('value', [0.0, 1e4, float('nan')])
def test_maps_are_those_of_the_image_alone(case, value):
    model, images = build(case), some_images()
    with torch.no_grad():
        batch = model(with_mask(images, value))
        for i, image in enumerate(images):
            for padded, truth in zip(batch, alone(model, image), strict=True):
                height, width = truth.shape[2:]
                assert rms_ratio(padded[i, :, :height, :width], truth[0].double()) < 1e-5
                assert not padded[i, :, height:].any() and not padded[i, :, :, width:].any()


@every_case
def test_an_image_alone_needs_no_mask(case):
    model, without = build(case), build(case, pad_mask=False)
    assert without.state_dict().keys() == model.state_dict().keys()
    image = some_images()[0]
    with torch.no_grad():
        for out, expected in zip(alone(model, image), without(image[None]), strict=True):
            assert rms_ratio(out, expected.double()) < 1e-6


class Dtypes(TorchDispatchMode):
    """Records the dtypes of all maps, such as masks (B, H, W, 1), that any op returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.seen |= {x.dtype for x in tensors if x.ndim == 4}
        return out


@every_case
def test_no_mask_is_made_when_off(case):
    image = some_images()[0]
    for pad_mask in (False, True):
        model = build(case, pad_mask=pad_mask)
        with Dtypes() as dtypes:
            model(with_mask([image])[:, : 3 + pad_mask])
        assert (torch.bool in dtypes.seen) == pad_mask


@every_case
def test_padding_leaks_without_the_mask(case):
    model, image = build(case, pad_mask=False), some_images()[0]
    with torch.no_grad():
        padded = model(with_mask([image])[:, :3])
        for out, truth in zip(padded, model(image[None]), strict=True):
            height, width = truth.shape[2:]
            assert rms_ratio(out[:, :, :height, :width], truth.double()) > 1e-2


@every_case
def test_gradients_are_those_of_the_images_alone(case):
    # In float64, because a small gradient is a difference of large terms.
    model, images = build(case).double(), some_images(torch.float64)
    weights = [torch.randn(dim, 1, 1, dtype=torch.float64) for dim in SMALL['embed_dims']]

    def gradients(outputs):
        model.zero_grad()
        # The padding is zero, so it adds nothing.
        sum((x.exp() * w * (x != 0)).sum() for x, w in zip(outputs, cycle(weights))).backward()
        return [p.grad.clone() for p in model.parameters()]

    together = gradients(model(with_mask(images, 1e4)))
    apart = gradients([x for image in images for x in alone(model, image)])
    for (name, _), a, b in zip(model.named_parameters(), together, apart, strict=True):
        assert rms_ratio(a, b) < 1e-9, name


@every_case
def test_an_image_that_is_all_padding_is_zero_and_harmless(case):
    model = build(case)
    image = some_images()[0]
    batch = with_mask([image, torch.zeros(3, 0, 0)], float('nan')).requires_grad_()
    outs = model(batch)
    for out, truth in zip(outs, alone(model, image), strict=True):
        assert not out[1].any()
        height, width = truth.shape[2:]
        assert rms_ratio(out[0, :, :height, :width], truth[0].double()) < 1e-5
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert batch.grad.isfinite().all() and not batch.grad[1].any()


@every_case
def test_checkpointing_gives_equal_outputs_and_gradients(case):
    found = []
    for with_cp in (False, True):
        model = build(case, with_cp=with_cp)
        torch.manual_seed(0)
        outs = model(with_mask(some_images()))
        sum(out.exp().sum() for out in outs).backward()
        found.append([*outs, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ('case', 'options'),
    [
        ('saga', dict(out_indices=0)),
        ('saga-options', dict(out_indices=0)),
        pytest.param(
            'sola', dict(out_indices=(0, 2), layers=('L', 'L', 'S', 'S')), marks=pytest.mark.long
        ),
        ('sola-gated', dict(out_indices=(0, 2), layers=('L', 'L', 'S', 'S'))),
        ('ravlt', dict(out_indices=(0, 1), linear_stages=1)),
    ],
)
def test_compiles_as_one_graph_and_exports_with_dynamic_size(case, options):
    model = build(case, **options)
    images = some_images()[:2]
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (with_mask(images),), dynamic_shapes={'x': {2: dynamic, 3: dynamic}}
    ).module()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    x = with_mask([images[0], images[0][:, :30, :50]], 1e4, size=(75, 130))
    with torch.no_grad():
        for out, *others in zip(model(x), program(x), compiled(x), strict=True):
            for other in others:
                assert rms_ratio(other, out.double()) < 1e-5


@every_case
def test_autocast_stays_finite_and_close(case):
    model, batch = build(case), with_mask(some_images(), 1e4)
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 5e-3)):
        with torch.no_grad(), torch.autocast('cpu', dtype=dtype):
            outs = model(batch)
        for out, truth in zip(outs, model(batch), strict=True):
            assert rms_ratio(out, truth.detach().double()) < bound


@pytest.mark.parametrize('kind', [SAGA, SoLAVision, RAVLT])
def test_an_input_without_a_mask_is_an_error(kind):
    model = kind(SMALL, pad_mask=True)
    message = r'must have shape \(B, 4, H, W\), the last channel a mask, .* got \(2, 3, 32, 32\)$'
    with pytest.raises(ValueError, match=message):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r'must have shape \(B, 3, H, W\), got \(2, 4, 32, 32\)$'):
        kind(SMALL)(torch.randn(2, 4, 32, 32))


@pytest.mark.parametrize(
    'case', ['saga', 'saga-options', 'sola-shift', 'sola-plain', 'sola-decay', 'ravlt-linear']
)
def test_the_triton_ops_leave_padding_out(case, triton_device):
    model = build(case, impl='triton', out_indices=(0, 1)).to(triton_device)
    images = [torch.randn(3, *size) for size in ((21, 26), (30, 17))]
    batch = with_mask(images, float('nan'), size=(32, 40)).to(triton_device)
    weights = [torch.randn(dim, 1, 1, device=triton_device) for dim in SMALL['embed_dims'][:2]]

    def outputs_and_gradients(model):
        model.zero_grad()
        outs = model(batch)
        sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
        return [*outs, *(p.grad for p in model.parameters())]

    found = outputs_and_gradients(model)
    reference = build(case, impl='reference', out_indices=(0, 1)).to(triton_device)
    for value, truth in zip(found, outputs_and_gradients(reference), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-4)


@every_case
def test_distributed_training_finds_every_parameter(case):
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(build(case, with_cp=True).train())
        for _ in range(2):
            # The second step fails if the first one left a parameter without a gradient.
            sum(out.sum() for out in model(with_mask(some_images()))).backward()
    finally:
        # If the model were the last owner of the group, it would wait for threads of gloo that may
        # wait for the interpreter lock, which it holds.
        model = None
        dist.destroy_process_group()
