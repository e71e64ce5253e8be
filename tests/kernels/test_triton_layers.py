"""The kernels around attention in compiled and exported models."""

import pytest
import torch

from saga_kernels import depthwise_conv2d, ffn, layer_norm

OPS = ('layer_norm_forward', 'depthwise_forward')


class Block(torch.nn.Module):
    """A norm in bfloat16, a product, and a convolution of a part of it, added to the input."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        self.linear = torch.nn.Linear(8, 16)
        self.norm = torch.nn.LayerNorm(8)
        self.conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        norm, conv = self.norm, self.conv
        y = layer_norm(x, norm.weight, norm.bias, dtype=torch.bfloat16, impl=self.impl)
        part = self.linear(y.float())[..., 8:]
        return depthwise_conv2d(part, conv.weight, conv.bias, add=x, impl=self.impl)


def test_compiles_without_a_graph_break(triton_device):
    block = Block('triton').to(triton_device)
    reference = Block('reference').to(triton_device)
    reference.load_state_dict(block.state_dict())
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager', dynamic=True)
    for height, width in ((4, 5), (11, 3)):
        x = torch.randn(1, height, width, 8, device=triton_device)
        grads = []
        for model in (block, compiled, reference):
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
            grads.append((out.detach(), *(p.grad.clone() for p in model.parameters())))
        for value, expected, truth in zip(*grads, strict=True):
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(value, truth, rtol=1e-2, atol=1e-2)


class FeedForward(torch.nn.Module):
    """The second half of a transformer block."""

    def __init__(self, impl):
        super().__init__()
        self.impl = impl
        self.layers = torch.nn.ModuleList(
            [torch.nn.LayerNorm(8), torch.nn.Linear(8, 20), torch.nn.Linear(20, 8)]
        )

    def forward(self, x):
        pairs = [(layer.weight, layer.bias) for layer in self.layers]
        return ffn(x, *pairs, impl=self.impl)


@pytest.mark.parametrize('impl', ['auto', 'reference', 'triton'])
def test_a_feed_forward_network_is_compiled_and_exported(impl, triton_device):
    block = FeedForward(impl).to(triton_device)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager', dynamic=True)
    x, larger = (torch.randn(size, 4, 5, 8, device=triton_device) for size in (2, 3))
    with torch.no_grad():
        for y in (x, larger):
            torch.testing.assert_close(compiled(y), block(y))
        dynamic = {'x': dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)}
        program = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    names = {str(node.target) for node in program.graph.nodes}
    assert ('saga_kernels.ffn_forward.default' in names) == (impl == 'triton')
    torch.testing.assert_close(program.module()(larger), block.requires_grad_(False)(larger))


@pytest.mark.parametrize('impl', ['auto', 'reference', 'triton'])
def test_kernels_are_exported_if_asked_for(impl, triton_device):
    block = Block(impl).to(triton_device)
    dynamic = {'x': dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)}
    x = torch.randn(2, 4, 5, 8, device=triton_device)
    program = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    names = {str(node.target) for node in program.graph.nodes}
    for op in OPS:
        assert (f'saga_kernels.{op}.default' in names) == (impl == 'triton')
    larger = torch.randn(3, 11, 3, 8, device=triton_device)
    torch.testing.assert_close(program.module()(larger), block(larger), rtol=1e-2, atol=1e-2)


def test_no_double_backward(triton_device):
    block = Block('triton').to(triton_device)
    x = torch.randn(1, 2, 3, 8, device=triton_device, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no double backward'):
        grad.sum().backward()
