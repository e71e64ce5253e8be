"""Every backbone on the Triton ops, on a GPU or in the interpreter."""

import subprocess
import sys

import pytest
import torch

import saga_mm
from saga_mm.registry import MODELS

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2))
COMMON = dict(arch=SMALL, drop_path_rate=0)
BACKBONES = [
    *(pytest.param(dict(COMMON, type=name), id=name) for name in saga_mm.backbones.__all__),
    pytest.param(
        dict(COMMON, type='SoLAVision', linear='decay'), id='decay', marks=pytest.mark.long
    ),
]

pytestmark = pytest.mark.parametrize('cfg', BACKBONES)


def build(cfg, impl):
    torch.manual_seed(0)
    options = {key: value for key, value in cfg.items() if key != 'type'}
    return MODELS.get(cfg['type'])(impl=impl, **options)


def outputs_and_gradients(model, call, x):
    model.zero_grad()
    outs = call(x)
    sum(out.square().sum() for out in outs).backward()
    return [*(out.detach() for out in outs), *(p.grad.clone() for p in model.parameters())]


def test_whole_backbone_compiles_without_a_graph_break(cfg, triton_device):
    model = build(cfg, 'triton').to(triton_device)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager', dynamic=True)
    reference = build(cfg, 'reference').to(triton_device)
    for size in (40, 44), (48, 36):
        x = torch.randn(1, 3, *size, device=triton_device)
        expected = outputs_and_gradients(reference, reference, x)
        for call in (model, compiled):
            for value, truth in zip(outputs_and_gradients(model, call, x), expected, strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-4)


DISTRIBUTED = """
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import saga_mm
from saga_mm.registry import MODELS

def gradients(model, images):
    model.zero_grad()
    sum(out.square().sum() for image in images for out in model(image[None])).backward()
    return [p.grad / len(images) for p in model.parameters()]

dist.init_process_group('gloo')
rank, cfg = dist.get_rank(), {cfg}
torch.manual_seed(0)
model = MODELS.build(cfg)
images = torch.randn(2, 3, 32, 40)
expected = gradients(model, images)
found = gradients(DistributedDataParallel(model), images[rank : rank + 1])
for value, truth in zip(found, expected, strict=True):
    torch.testing.assert_close(value, truth, rtol=1e-3, atol=1e-4)
"""


def test_two_processes_get_the_mean_gradient(cfg, triton_device, tmp_path):
    if triton_device != 'cpu':
        pytest.skip('two processes on one GPU need another backend than the interpreter')
    script = tmp_path / 'distributed.py'
    script.write_text(DISTRIBUTED.format(cfg=dict(cfg, impl='triton')))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
    subprocess.run([*command, str(script)], check=True)
