"""Models compiled by Inductor work for images of several sizes, forward and backward."""

import pytest
import torch

from saga_mm.backbones import RAVLT, SAGA, SoLAVision

ARCH = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
PATTERN = ('L', 'L', 'S', 'L')
MODELS = {
    'SAGA': lambda: SAGA(ARCH, out_indices=(0, 1)),
    'SoLA-Vision': lambda: SoLAVision(ARCH, PATTERN, out_indices=(0, 1)),
    'SoLA-Vision, gated': lambda: SoLAVision(ARCH, PATTERN, linear='gated'),
    'SoLA-Vision, decay': lambda: SoLAVision(ARCH, PATTERN, linear='decay', out_indices=(0, 1)),
    'RAVLT': lambda: RAVLT(ARCH, linear_stages=1, out_indices=(0, 1)),
}


@pytest.mark.long
@pytest.mark.parametrize('name', MODELS)
def test_compiled_models_take_images_of_several_sizes(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    compiled = torch.compile(model)
    parameters = list(model.parameters())
    for shape in [(2, 3, 64, 96), (2, 3, 75, 50), (3, 3, 96, 61)]:
        images = torch.randn(shape)
        with torch.no_grad():
            for out, expected in zip(compiled(images), model(images), strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        gradients = [
            torch.autograd.grad(sum(out.square().mean() for out in call(images)), parameters)
            for call in (compiled, model)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
