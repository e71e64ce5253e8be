"""The Triton op as PyTorch sees it: opcheck, compile, export. On a GPU, or in the interpreter."""

import pytest
import torch

from saga_kernels import gated_linear_attention, linear_attention

forward_op = torch.ops.saga_kernels.gated_forward.default
backward_op = torch.ops.saga_kernels.gated_backward.default


@pytest.mark.parametrize('parts', [3, 5])
@pytest.mark.parametrize('masked', [False, True])
def test_opcheck(parts, masked, triton_device):
    # opcheck compares values that come from torch.empty too.
    packed = torch.randn(2, 12, parts, 1, 8, device=triton_device)
    mask = torch.rand(2, 12, device=triton_device) > 0.3 if masked else None
    out, state = forward_op(packed, mask, 'elu', 1e-6)
    torch.library.opcheck(forward_op, (packed.clone().requires_grad_(), mask, 'elu', 1e-6))
    torch.library.opcheck(backward_op, (torch.randn_like(out), packed, state, mask, 'elu', 1e-6))


def test_opcheck_of_a_strided_view(triton_device):
    packed = torch.randn(2, 12, 7, 2, 8, device=triton_device)[:, ::2, 1:6]
    torch.library.opcheck(forward_op, (packed.requires_grad_(), None, 'relu', 1e-3))


class Block(torch.nn.Module):
    """Projection, attention, projection: the shape of an attention block."""

    def __init__(self, parts, impl):
        super().__init__()
        self.parts, self.impl = parts, impl
        self.inputs = torch.nn.Linear(16, parts * 16)
        self.outputs = torch.nn.Linear(16, 16)

    def forward(self, x):
        op = gated_linear_attention if self.parts == 5 else linear_attention
        packed = self.inputs(x).unflatten(-1, (self.parts, 2, 8))
        return x + self.outputs(op(packed, impl=self.impl).flatten(-2))


@pytest.mark.parametrize('parts', [3, 5])
def test_compiles_without_a_graph_break(parts, triton_device):
    block = Block(parts, 'triton').to(triton_device)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager', dynamic=True)
    for tokens in (20, 33):
        x = torch.randn(1, tokens, 16, device=triton_device)
        grads = []
        for model in (block, compiled):
            block.zero_grad()
            out = model(x)
            out.square().sum().backward()
            grads.append((out.detach(), *(p.grad.clone() for p in block.parameters())))
        for value, expected in zip(*grads, strict=True):
            torch.testing.assert_close(value, expected)


def test_exports_with_dynamic_tokens(triton_device):
    block = Block(5, 'triton').to(triton_device)
    x = torch.randn(2, 20, 16, device=triton_device)
    dynamic = {'x': {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    assert any(node.target == forward_op for node in program.graph.nodes)
    longer = torch.randn(3, 33, 16, device=triton_device)
    torch.testing.assert_close(program.module()(longer), block(longer))


def test_the_reference_goes_through_no_custom_op(triton_device):
    block = Block(5, 'reference').to(triton_device)
    program = torch.export.export(block, (torch.randn(2, 20, 16, device=triton_device),))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any('saga_kernels' in name for name in names)


def test_the_op_itself_refuses_a_cpu():
    with pytest.raises(RuntimeError, match='it needs a GPU, and the input is on the CPU'):
        forward_op(torch.zeros(1, 4, 5, 1, 8), None, 'elu', 1e-6)
