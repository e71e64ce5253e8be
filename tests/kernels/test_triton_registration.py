"""The registration of the Triton ops: opcheck, compile, export, on a GPU or in the interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    gated_linear_attention,
    linear_attention,
    rank_augmented_linear_attention,
)

ops = torch.ops.saga_kernels


def check_gated(packed, mask, *options):
    arguments = (mask, *options)
    out, state = ops.gated_forward(packed, *arguments)
    torch.library.opcheck(ops.gated_forward.default, (packed.clone().requires_grad_(), *arguments))
    grad = torch.randn_like(out)
    torch.library.opcheck(ops.gated_backward.default, (grad, packed, state, *arguments))


def check_rank_augmented(qkv, mask, width, eps):
    frequencies = torch.rand(qkv.shape[-1] // 4, device=qkv.device)
    arguments = (mask, width, eps)
    out, *kept = ops.rank_augmented_forward(qkv, frequencies, *arguments)
    forward = (qkv.clone().requires_grad_(), frequencies, *arguments)
    torch.library.opcheck(ops.rank_augmented_forward.default, forward)
    backward = (torch.randn_like(out), qkv, *kept, *arguments)
    torch.library.opcheck(ops.rank_augmented_backward.default, backward)


def check_decay(qkv, mask, width, feature_map, eps):
    log_decay = -torch.rand(qkv.shape[3], device=qkv.device)
    out, *sums = ops.decay_forward(qkv, log_decay, mask, width, feature_map, eps)
    leaves = qkv.clone().requires_grad_(), log_decay.clone().requires_grad_()
    forward = (*leaves, mask, width, feature_map, eps)
    torch.library.opcheck(ops.decay_forward.default, forward)
    backward = (torch.randn_like(out), qkv, log_decay, out, *sums, mask, width, feature_map)
    torch.library.opcheck(ops.decay_backward.default, backward)


def check_depthwise(packed, mask, residual):
    # (B, H, W, C): a part of the projection
    x = packed[:, :, 1].flatten(2).unflatten(1, (3, 4))
    mask = None if mask is None else mask.view(*x.shape[:3], 1)
    weight, bias = torch.randn(8, 1, 3, 3, device=x.device), torch.randn(8, device=x.device)
    add = None if residual else torch.randn_like(x)
    out = ops.depthwise_forward(x, weight, bias, add, mask, residual)
    leaves = [y.detach().clone().requires_grad_() for y in (x, weight, bias)]
    torch.library.opcheck(ops.depthwise_forward.default, (*leaves, add, mask, residual))
    grad = torch.randn_like(out)
    torch.library.opcheck(ops.depthwise_backward.default, (grad, x, weight, mask, residual))


def check_layer_norm(packed, mask, eps):
    x = packed[:, :, 1].flatten(2)
    weight, bias = torch.randn(2, 8, device=x.device)
    out = ops.layer_norm_forward(x, weight, bias, eps, torch.bfloat16)
    leaves = [y.detach().clone().requires_grad_() for y in (x, weight, bias)]
    torch.library.opcheck(ops.layer_norm_forward.default, (*leaves, eps, torch.float32))
    torch.library.opcheck(ops.layer_norm_backward.default, (torch.randn_like(out), x, weight, eps))


def check_ffn(packed, mask, scaled):
    x = packed[:, :, 1].flatten(2)
    gamma = torch.randn(8, device=x.device) if scaled else None
    fc1, fc2 = torch.randn(2, 12, 8, device=x.device).bfloat16()
    norm, (bias1, bias2) = x[0, :2], torch.randn(2, 12, device=x.device)
    layers = fc1, bias1, fc2.T.contiguous(), bias2[:8]
    torch.library.opcheck(ops.ffn_forward.default, (x, *norm.unbind(), *layers, gamma, 1e-6))


def check_gated_attention(packed, mask, optional):
    x = packed[:, :, 1].reshape(len(packed), 3, 4, 8)
    mask = None if mask is None else mask.view(len(packed), 3, 4, 1)
    in_proj, proj = torch.randn(24, 8, device=x.device), torch.randn(8, 8, device=x.device)
    vector, lepe = proj[0], torch.randn(8, 1, 3, 3, device=x.device)
    layers = vector, vector, in_proj.bfloat16(), in_proj[:, 0], proj.bfloat16(), vector, 1
    extra = (lepe, vector, proj.bfloat16(), vector, vector) if optional else (None,) * 5
    torch.library.opcheck(
        ops.gated_attention_forward.default, (x, *layers, *extra, mask, 'elu', 1e-6, 1e-6)
    )


def check_wkv(packed, mask):
    k, v = packed[:, :, :2].flatten(3).unbind(2)
    w, u = torch.rand(2, 1, k.shape[2], device=k.device)
    out, *sums = ops.wkv_forward(k, v, w, u, mask)
    leaves = [x.clone().requires_grad_() for x in (k, v, w, u)]
    torch.library.opcheck(ops.wkv_forward.default, (*leaves, mask))
    backward = (torch.randn_like(out), k, v, w, u, *sums, mask)
    torch.library.opcheck(ops.wkv_backward.default, backward)


@pytest.mark.parametrize(
    ('check', 'parts', 'options'),
    [
        (check_gated, 3, ('elu', 1e-6)),
        (check_gated, 5, ('elu', 1e-6)),
        (check_rank_augmented, 3, (4, 1e-6)),
        (check_decay, 3, (4, 'elu', 1e-6)),
        (check_wkv, 3, ()),
        (check_depthwise, 3, (True,)),
        (check_depthwise, 3, (False,)),
        (check_layer_norm, 3, (1e-6,)),
        (check_ffn, 3, (True,)),
        (check_ffn, 3, (False,)),
        (check_gated_attention, 3, (True,)),
        (check_gated_attention, 3, (False,)),
    ],
)
@pytest.mark.parametrize('masked', [False, True])
def test_opcheck(check, parts, options, masked, triton_device):
    # opcheck also compares values that come from torch.empty.
    packed = torch.randn(2, 12, parts, 1, 8, device=triton_device)
    mask = torch.rand(2, 12).to(triton_device) > 0.3 if masked else None
    check(packed, mask, *options)


@pytest.mark.parametrize(
    ('check', 'parts', 'options'),
    [
        (check_gated, 5, ('relu', 1e-3)),
        (check_rank_augmented, 3, (2, 1e-3)),
        (check_decay, 3, (2, 'relu', 1e-3)),
        (check_wkv, 3, ()),
    ],
)
def test_opcheck_of_a_strided_view(check, parts, options, triton_device):
    packed = torch.randn(2, 12, 7, 2, 8, device=triton_device)[:, ::2, 1 : 1 + parts]
    check(packed, None, *options)


class Block(torch.nn.Module):
    """Projection, attention and projection on (B, height, width, C), as in an attention block."""

    def __init__(self, op, parts, impl):
        super().__init__()
        self.op, self.parts, self.impl = op, parts, impl
        self.inputs = torch.nn.Linear(16, parts * 16)
        self.outputs = torch.nn.Linear(16, 16)
        self.register_buffer('frequencies', torch.tensor([1.0, 0.1]))
        if op is decay_linear_attention:
            self.log_decay = torch.nn.Parameter(torch.tensor([-0.1, -1.0]))
        elif op is bidirectional_wkv:
            self.w, self.u = (torch.nn.Parameter(torch.rand(16)) for _ in range(2))

    def forward(self, x):
        packed = self.inputs(x).flatten(1, 2).unflatten(-1, (self.parts, 2, 8))
        if self.op is bidirectional_wkv:
            out = self.op(*packed.flatten(3).unbind(2), self.w, self.u, impl=self.impl)
            return x + self.outputs(out).view(x.shape)
        image = ()
        if self.op is rank_augmented_linear_attention:
            image = x.shape[1:3], self.frequencies
        elif self.op is decay_linear_attention:
            image = self.log_decay, x.shape[1:3]
        return x + self.outputs(self.op(packed, *image, impl=self.impl).flatten(-2)).view(x.shape)


OPS = {
    'gated_forward': (gated_linear_attention, 5),
    'rank_augmented_forward': (rank_augmented_linear_attention, 3),
    'decay_forward': (decay_linear_attention, 3),
    'wkv_forward': (bidirectional_wkv, 2),
}


@pytest.mark.parametrize(('op', 'parts'), [*OPS.values(), (linear_attention, 3)])
def test_compiles_without_a_graph_break(op, parts, triton_device):
    block = Block(op, parts, 'triton').to(triton_device)
    compiled = torch.compile(block, fullgraph=True, backend='aot_eager', dynamic=True)
    for height, width in ((4, 5), (11, 3)):
        x = torch.randn(1, height, width, 16, device=triton_device)
        grads = []
        for model in (block, compiled):
            block.zero_grad()
            out = model(x)
            out.square().sum().backward()
            grads.append((out.detach(), *(p.grad.clone() for p in block.parameters())))
        for value, expected in zip(*grads, strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize('name', OPS)
def test_auto_takes_the_kernel_in_compiled_code(name, triton_device):
    block = Block(*OPS[name], 'auto').to(triton_device)
    targets = []

    def backend(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    torch.compile(block, fullgraph=True, backend=backend)(
        torch.randn(1, 4, 5, 16).to(triton_device)
    )
    assert f'saga_kernels.{name}.default' in targets


@pytest.mark.parametrize('name', OPS)
def test_exports_with_dynamic_height_and_width(name, triton_device):
    block = Block(*OPS[name], 'triton').to(triton_device)
    x = torch.randn(2, 4, 5, 16, device=triton_device)
    dynamic = {'x': dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)}
    program = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    target = getattr(ops, name).default
    assert any(node.target == target for node in program.graph.nodes)
    larger = torch.randn(3, 11, 3, 16, device=triton_device)
    torch.testing.assert_close(program.module()(larger), block(larger))


@pytest.mark.parametrize('impl', ['auto', 'reference'])
@pytest.mark.parametrize('name', OPS)
def test_no_custom_op_is_exported_unless_asked_for(name, impl, triton_device):
    block = Block(*OPS[name], impl).to(triton_device)
    program = torch.export.export(block, (torch.randn(2, 4, 5, 16, device=triton_device),))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any('saga_kernels' in name for name in names)


@pytest.mark.parametrize('name', OPS)
def test_no_double_backward(name, triton_device):
    block = Block(*OPS[name], 'triton').to(triton_device)
    x = torch.randn(1, 2, 5, 16, device=triton_device, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='no double backward'):
        grad.sum().backward()


def test_the_op_itself_refuses_a_cpu():
    refused = pytest.raises(RuntimeError, match='it needs a GPU, and the input is on the CPU')
    with refused:
        ops.gated_forward(torch.zeros(1, 4, 5, 1, 8), None, 'elu', 1e-6)
    with refused:
        ops.rank_augmented_forward(torch.zeros(1, 4, 3, 1, 8), torch.ones(2), None, 2, 1e-6)
    with refused:
        ops.decay_forward(torch.zeros(1, 4, 3, 1, 8), torch.zeros(1), None, 2, 'elu', 1e-6)
    with refused:
        ops.wkv_forward(*torch.zeros(2, 1, 4, 8), *torch.zeros(2, 1, 8), None)


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('op', ['gated', 'rank_augmented', 'decay', 'wkv'])
def test_a_backward_pass_makes_no_zeros_for_states(op, triton_device):
    packed = torch.randn(1, 12, 3, 1, 8, device=triton_device)
    k, v = (x.requires_grad_() for x in packed[:, :, :2].flatten(3).unbind(2))
    w = torch.rand(1, 8, device=triton_device)
    qkv = packed.clone().requires_grad_()
    out = dict(
        gated=lambda: ops.gated_forward(qkv, None, 'elu', 1e-6),
        rank_augmented=lambda: ops.rank_augmented_forward(qkv, w[0, :2], None, 4, 1e-6),
        decay=lambda: ops.decay_forward(qkv, -w[0, :1], None, 4, 'elu', 1e-6),
        wkv=lambda: ops.wkv_forward(k, v, w, w, None),
    )[op]()[0]
    with Recorder() as recorder:
        torch.autograd.grad(out, k if op == 'wkv' else qkv, torch.ones_like(out))
    assert f'{op}_backward' in recorder.names
    assert not {'zeros', 'zeros_like', 'new_zeros'} & set(recorder.names)
