"""Exported ops where a runtime computes in float16 throughout, at the sizes of large images.

There is no such runtime on every machine: a graph is interpreted here, and every tensor and scalar
is rounded to float16, also sums and products after every few terms. What does not depend on the
input is computed before, in float32, as runtimes do when they load a graph.
"""

import functools
import math

import pytest
import torch
from torch import fx

from harness import rms_ratio
from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    gated_linear_attention,
    linear_attention,
    rank_augmented_linear_attention,
)

aten = torch.ops.aten
HEADS, DIM = 1, 64


class Map(torch.nn.Module):
    """An op over a map (B, height, width, parts * HEADS * DIM), as a backbone calls it."""

    def __init__(self, op, parts, log_decay=-0.05):
        super().__init__()
        self.op, self.parts = op, parts
        self.register_buffer('frequencies', 10000 ** -torch.linspace(0, 1, DIM // 4))
        self.register_buffer('log_decay', torch.full((HEADS,), log_decay))
        self.register_buffer('decays', torch.logspace(-2, 1, HEADS * DIM))

    def forward(self, x, mask=None):
        size = x.shape[1:3]
        packed = x.flatten(1, 2).unflatten(-1, (self.parts, HEADS, DIM))
        image = {
            rank_augmented_linear_attention: (size, self.frequencies),
            decay_linear_attention: (self.log_decay, size),
            wkv: (self.decays,),
        }.get(self.op, ())
        mask = None if mask is None else mask.flatten(1)
        return self.op(packed, *image, mask=mask).unflatten(1, size)


def wkv(packed, decays, mask=None):
    """Of the second and third part, whose weights fade within the image or hardly."""
    k, v = packed[:, :, 1:].flatten(3).unbind(2)
    return bidirectional_wkv(k, v, decays, -decays, mask=mask).unflatten(2, packed.shape[3:])


class Float16(fx.Interpreter):
    """Runs a graph in float16."""

    # Terms of a sum that are added up exactly.
    TERMS = 32

    def run(self, *args):
        self.variable = set()
        return super().run(*args)

    def run_node(self, node):
        if node.op == 'placeholder' or self.variable & set(node.all_input_nodes):
            self.variable.add(node)
        result = super().run_node(node)
        return fx.node.map_aggregate(result, rounded) if node in self.variable else result

    def fetch_args_kwargs_from_env(self, node):
        args, kwargs = super().fetch_args_kwargs_from_env(node)
        if node in self.variable:
            args, kwargs = (fx.node.map_aggregate(x, rounded) for x in (args, kwargs))
        return args, kwargs

    def call_function(self, target, args, kwargs):
        if target is aten._assert_tensor_metadata.default:
            return None
        if not any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in args):
            return super().call_function(target, args, kwargs)
        if target is aten.matmul.default:
            left, right = (x.float() for x in args)
            pairs = zip(left.split(self.TERMS, -1), right.split(self.TERMS, -2), strict=True)
            return added(a @ b for a, b in pairs)
        if target in (aten.sum.dim_IntList, aten.mean.dim):
            return self.total(*args, mean=target is aten.mean.dim, **kwargs)
        if target is aten.to.dtype:
            dtype = args[1]
            return args[0] if dtype.is_floating_point else args[0].to(dtype)
        if target.overloadpacket in (aten.add, aten.sub, aten.mul, aten.div):
            # A scalar of the graph, such as the number of tokens, is a number of float16 too.
            args = [rounded(torch.tensor(float(x))) if is_number(x) else x for x in args]
        return super().call_function(target, args, kwargs)

    def total(self, x, axes, keepdim=False, *, mean, **kwargs):
        (axis,) = axes
        result = added(part.float().sum(axis, True) for part in x.split(self.TERMS, axis))
        if mean:
            result = result / rounded(torch.tensor(float(x.shape[axis])))
        return result if keepdim else result.squeeze(axis)


def rounded(x):
    is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.half() if is_float else x


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def added(parts):
    result = None
    for part in parts:
        result = part.half() if result is None else (result.float() + part.half()).half()
    return result


OPS = {
    'gated': (gated_linear_attention, 5),
    'plain': (linear_attention, 3),
    'rank_augmented': (rank_augmented_linear_attention, 3),
    'decay': (decay_linear_attention, 3),
    'no decay': (decay_linear_attention, 3, 0.0),
    'wkv': (wkv, 3),
}


def inputs(parts, height, width, masked):
    x = torch.randn(1, height, width, parts * HEADS * DIM)
    return (x, torch.rand(1, height, width) > 0.3) if masked else (x,)


@functools.cache
def exported(name, masked):
    """The module, and its graph for maps of any size."""
    module = Map(*OPS[name])
    axes = dict.fromkeys((1, 2), torch.export.Dim.DYNAMIC)
    small = inputs(module.parts, 12, 13, masked)
    program = torch.export.export(module, small, dynamic_shapes=(axes,) * len(small))
    return module, program.module()


def error_in_float16(name, height, width, change=None, masked=False):
    """RMS ratio of the error of an exported op in float16."""
    module, graph = exported(name, masked)
    x, *mask = inputs(module.parts, height, width, masked)
    x = x.unflatten(-1, (module.parts, -1))
    if change is not None:
        change(x)
    x = x.flatten(3).half().float()
    with torch.no_grad():
        exact = module(x.double(), *mask)
        return rms_ratio(Float16(graph).run(x, *mask), exact)


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('size', [(5, 7), (64, 64), (512, 512)])
def test_any_size_up_to_2048_pixels(name, size):
    # 512 x 512 tokens: patches of 4 pixels. WKV is a mean of values of both signs, so that it is
    # small beside the values, by which its error is to be measured.
    assert error_in_float16(name, *size) < (4e-2 if name == 'wkv' else 5e-3)


@pytest.mark.parametrize('name', OPS)
def test_masked_tokens(name):
    assert error_in_float16(name, 40, 50, masked=True) < 5e-3


def large_values(x):
    x[:, :, :, 2] *= 100


def large_features(x):
    x[:, :, :, :2] *= 10


def small_features(x):
    x[:, :, :, 1] -= 8


def one_large_key(x):
    x[:, 5, 7, 1] += 50


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('change', [large_values, large_features, small_features, one_large_key])
def test_any_scale(name, change):
    # Logits of several hundred, which large features lead to, have an error of 1/8 in float16.
    assert error_in_float16(name, 64, 64, change) < 2e-2


def test_the_simulation_sees_sums_over_all_tokens():
    # 64 x 64 ones add up to 4096; beyond 65504 there is infinity, and ones are lost before.
    class Sum(torch.nn.Module):
        def forward(self, x):
            return (x.sum(1), x.transpose(1, 2) @ x, x * x.shape[1])

    axes = {1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Sum(), (torch.ones(1, 9, 2),), dynamic_shapes=(axes,))
    run = Float16(program.module()).run
    assert all((value == 4096).all() for value in run(torch.ones(1, 4096, 2)))
    total, product, scaled = run(torch.full((1, 70_000, 2), 0.5))
    assert total.max() < 35_000
    assert product.max() < 17_500
    assert scaled.min() == math.inf
