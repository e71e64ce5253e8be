"""What torch guarantees for modules: hooks, wrappers, and modules that are called once."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import saga_mm
from saga_mm.inference import chunked
from saga_mm.layers import unpack
from saga_mm.registry import MODELS

ARCH = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
OPTIONS = {
    'SAGA': [{}, dict(patch_embed='plain', pad_mask=True)],
    'SoLAVision': [
        {},
        dict(linear='decay', layers=('L', 'L', 'S', 'L'), pad_mask=True, lepe_kernel_size=3),
        dict(token_shift='q_shift', patch_embed='conv', cpe_kernel_size=3),
    ],
    'RAVLT': [{}, dict(pad_mask=True)],
}
CASES = [(name, options) for name in saga_mm.backbones.__all__ for options in OPTIONS[name]]
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def build(name, options):
    torch.manual_seed(0)
    model = MODELS.get(name)(arch=ARCH, drop_path_rate=0.1, **options).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def make_images(model, *size):
    images = torch.randn(1, model.input_channels, *size)
    if model.pad_mask:
        images[:, -1], images[:, -1, size[0] // 2 :] = 1, 0
    return images


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, 'BUDGET', 2**12)


@pytest.mark.parametrize(('name', 'options'), CASES)
@pytest.mark.parametrize('with_grad', [False, True])
def test_hooks_fire_once_with_whole_maps_that_stay(name, options, with_grad):
    model = build(name, options).requires_grad_(with_grad)
    images = make_images(model, 264, 200)
    truth = model(images)
    modules = {n: m for n, m in model.named_modules() if not isinstance(m, CONTAINERS)}
    # For each module: the output, and a copy that was made when the hook was called.
    seen = {n: [] for n in modules}
    backward = {n: [] for n in modules}
    for n, module in modules.items():
        module.register_forward_hook(
            lambda module, args, out, n=n: seen[n].append(
                [(x, x.detach().clone()) for x in unpack(out)]
            )
        )
        if with_grad:
            module.register_full_backward_hook(
                lambda module, inputs, outputs, n=n: backward[n].append(
                    [(x, x.clone()) for x in outputs if x is not None]
                )
            )
    with torch.set_grad_enabled(with_grad):
        outs = model(images)
    for out, expected in zip(outs, truth, strict=True):
        torch.testing.assert_close(out, expected)
    assert {n for n, calls in seen.items() if len(calls) != 1} == set()
    for i, stage in enumerate(outs):
        height, width = stage.shape[2:]
        for n, [calls] in ((n, c) for n, c in seen.items() if n.startswith(f'stages.{i}.b')):
            for out, _ in calls:
                rows = out.shape[1:3] if out.shape[1] == height else out.shape[2:]
                assert tuple(rows) == (height, width), n
    if with_grad:
        sum(out.square().mean() for out in outs).backward()
        assert {n for n, calls in backward.items() if len(calls) != 1} == set()
    for calls in (*seen.values(), *backward.values()):
        for tensors in calls:
            assert all(torch.equal(kept, then) for kept, then in tensors)


@pytest.mark.parametrize(('name', 'options'), CASES)
def test_tensor_hooks_on_outputs_fire(name, options):
    model = build(name, options)
    fired, expected = [], []
    for n, module in model.named_modules():
        if isinstance(module, CONTAINERS) or n == '':
            continue
        expected.append(n)
        module.register_forward_hook(
            lambda module, args, out, n=n: hook_all(unpack(out), lambda grad: fired.append(n))
        )
    sum(out.square().mean() for out in model(make_images(model, 64, 96))).backward()
    assert set(fired) == set(expected)


def hook_all(tensors, hook):
    for tensor in tensors:
        tensor.register_hook(hook)


class Wrapper(nn.Module):
    """Calls a module and hides its attributes."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, *args):
        return self.inner(*args)


def wrap_all(model, wanted):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if wanted(child) and not isinstance(parent, Wrapper):
                setattr(parent, name, Wrapper(child))


WRAPPED = {
    'leaves': lambda module: not any(module.children()),
    'attention and FFN': lambda module: any(
        hasattr(module, name) for name in ('fc1', 'receptance', 'in_proj')
    ),
    'blocks': lambda module: hasattr(module, 'cpe'),
    'stages': lambda module: hasattr(module, 'embed') and hasattr(module, 'blocks'),
}


@pytest.mark.parametrize(('name', 'options'), CASES)
@pytest.mark.parametrize('wrapped', WRAPPED)
def test_no_parent_reads_its_children(name, options, wrapped):
    model = build(name, options)
    images = make_images(model, 72, 100)
    truth = model(images)
    wrap_all(model, WRAPPED[wrapped])
    assert any(isinstance(module, Wrapper) for module in model.modules())
    for with_grad in (False, True):
        with torch.set_grad_enabled(with_grad):
            for out, expected in zip(model(images), truth, strict=True):
                torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('name', ['SAGA'])
def test_grad_cam_has_a_value_for_each_token(name):
    model = build(name, {})
    images = make_images(model, 264, 200)
    norm = model.stages[0].blocks[-1].norm2
    kept = {}
    norm.register_forward_hook(lambda module, args, out: kept.update(activation=out))
    norm.register_full_backward_hook(lambda module, inputs, outs: kept.update(gradient=outs[0]))
    model(images)[0][:, 3].square().mean().backward()
    weights = kept['gradient'].mean((1, 2), keepdim=True)
    assert (weights * kept['activation']).sum(-1).shape == (1, 66, 50)


@pytest.mark.parametrize('name', saga_mm.backbones.__all__)
@torch.no_grad()
def test_vmap_over_images(name):
    model = build(name, {})
    images = torch.randn(3, 3, 164, 96)
    outs = torch.func.vmap(lambda image: model(image[None]))(images)
    for out, expected in zip(outs, model(images), strict=True):
        torch.testing.assert_close(out[:, 0], expected, rtol=1e-4, atol=1e-5)


SHARD = """
import sys, torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from saga_mm.inference import chunked
from saga_mm.registry import MODELS

init_process_group('gloo', init_method='file://' + sys.argv[2], rank=0, world_size=1)
chunked.BUDGET = 2**12
arch = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
model = MODELS.get(sys.argv[1])(arch=arch).eval()
images = torch.randn(1, 3, 200, 160)
with torch.no_grad():
    truth = model(images)
mesh = init_device_mesh('cpu', (1,))
for stage in model.stages:
    for block in stage.blocks:
        fully_shard(block.attn.proj, mesh=mesh)
        if block.cpe is not None:
            fully_shard(block.cpe, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(stage, mesh=mesh)
fully_shard(model, mesh=mesh)
for with_grad in (True, False):
    with torch.set_grad_enabled(with_grad):
        outs = model(images)
    for out, expected in zip(outs, truth):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if with_grad:
        sum(out.square().mean() for out in outs).backward()
"""


@pytest.mark.parametrize('name', saga_mm.backbones.__all__)
def test_stages_blocks_and_convolutions_can_be_sharded(name, tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', SHARD, name, str(tmp_path / 'store')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
