"""Time that the CPU takes to start each op, on a GPU or on a driver that does nothing.

    python tests/kernels/host_time.py

The maps are so small that a GPU waits for the CPU. Times are in microseconds.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    sys.path.insert(0, os.environ.get('STUB', str(Path(__file__).parent)))
    import stub_driver

    stub_driver.install()

import triton

from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    depthwise_conv2d,
    gated_linear_attention,
    layer_norm,
    rank_augmented_linear_attention,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
REPEATS, CALLS = 200, 10
# Other processes do not count without a GPU.
clock = time.perf_counter if DEVICE == 'cuda' else time.process_time


def microseconds(function):
    """The least mean time of some calls; waits for the GPU are not in it."""
    for _ in range(20):
        function()
    best = float('inf')
    for _ in range(REPEATS):
        wait()
        start = clock()
        for _ in range(CALLS):
            function()
        best = min(best, (clock() - start) / CALLS)
    return best * 1e6


def wait():
    if DEVICE == 'cuda':
        torch.cuda.synchronize()


class Nothing(torch.autograd.Function):
    """What PyTorch itself takes for an op such as `gated`: it makes the results, and no more."""

    @staticmethod
    def forward(ctx, packed):
        batch, tokens, _, heads, dim = packed.shape
        out = packed.new_empty((batch, tokens, heads, dim))
        state = packed.new_empty((batch, heads, dim + 1, dim), dtype=torch.float32)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, state)
        ctx.mark_non_differentiable(state)
        return out, state

    @staticmethod
    def backward(ctx, grad, _):
        return torch.empty_like(ctx.saved_tensors[0])


def cases():
    """The ops, and a tensor that each of them takes."""
    packed = torch.randn(1, 64, 5, 8, 64, device=DEVICE).bfloat16()
    qkv = packed[:, :, :3].contiguous()
    frequencies = torch.rand(16, device=DEVICE)
    log_decay = -torch.rand(8, device=DEVICE)
    tokens = torch.randn(1, 64, 192, device=DEVICE).bfloat16()
    w, u = torch.rand(2, 192, device=DEVICE)
    size = 8, 8
    image = packed[:, :, 0].flatten(2).unflatten(1, size).contiguous()
    weight, bias = torch.rand(512, 1, 3, 3, device=DEVICE), torch.rand(512, device=DEVICE)
    return {
        'nothing': (lambda x: Nothing.apply(x)[0], packed),
        'gated': (lambda x: gated_linear_attention(x, impl='triton'), packed),
        'rank_augmented': (
            lambda x: rank_augmented_linear_attention(x, size, frequencies, impl='triton'),
            qkv,
        ),
        'decay': (lambda x: decay_linear_attention(x, log_decay, size, impl='triton'), qkv),
        'wkv': (lambda x: bidirectional_wkv(x, x, w, u, impl='triton'), tokens),
        'depthwise': (lambda x: depthwise_conv2d(x, weight, bias, add=x, impl='triton'), image),
        'layer_norm': (lambda x: layer_norm(x, bias, bias, impl='triton'), image),
    }


def main():
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if DEVICE == 'cuda' else 'stub driver'
    source = importlib.util.find_spec('saga_kernels').origin
    print(f'torch {torch.__version__}, triton {triton.__version__}, {device}, {source}')
    print('| op | forward, no gradient | forward | forward and backward |')
    print('|---|--:|--:|--:|')
    for name, (op, x) in cases().items():
        leaf = x.clone().requires_grad_()
        grad = torch.ones_like(op(x))

        def both(op=op, leaf=leaf, grad=grad):
            torch.autograd.grad(op(leaf), leaf, grad)

        with torch.no_grad():
            times = [microseconds(lambda op=op, x=x: op(x))]
        times += [microseconds(lambda op=op, leaf=leaf: op(leaf)), microseconds(both)]
        print(f'| {name} |', ' | '.join(f'{time:.1f}' for time in times), '|', flush=True)


if __name__ == '__main__':
    main()
