"""A plugin for pytest that walks through the tests of the kernels as if there were a GPU.

    python -m pytest -p stub_gpu tests/kernels/test_triton_gpu.py

Tensors stay on the CPU, and no kernel is compiled or run, so what tests say of values is ignored.
Everything around the kernels runs: each launch is checked against what its kernel was compiled for.
Large maps become smaller. At the end, compiles and launches are counted.
"""

import collections
import contextlib
import functools
from unittest import mock

import pytest
import torch

# isort: split
import stub_driver

stub_driver.install()

import triton  # noqa: E402
from triton._utils import type_canonicalisation_dict as type_names  # noqa: E402

counts: collections.Counter = collections.Counter()


class MismatchError(RuntimeError):
    """A launch does not fit the compiled kernel that it takes."""


def require(condition, *facts):
    if not condition:
        raise MismatchError(' '.join(map(str, facts)))


class Compiled:
    """What `triton.compile` returns, if it compiled nothing."""

    function = packed_metadata = None

    def __init__(self, source, target, options):
        counts['compiled'] += 1
        self.source, self.options = source, options
        self.name = source.fn.__name__

    def launch_metadata(self, grid, stream, *values):
        return None

    def __getitem__(self, grid):
        return functools.partial(self.launch, 'by Triton', grid)

    def run(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *values):
        way = 'by Triton' if enter_hook is not None else 'directly'
        self.launch(way, (x, y, z), *values)

    def launch(self, way, grid, *values):
        counts[way] += 1
        x, y, z = grid
        require(type(x) is int and 0 < x < 2**31 and (y, z) == (1, 1), self.name, 'grid', grid)
        require(len(values) == len(self.source.signature), self.name, 'number of arguments')
        for i, (name, kind) in enumerate(self.source.signature.items()):
            facts = self.name, name, kind, values[i]
            if kind == 'constexpr':
                constant = self.source.constants[(i,)]
                same = type(values[i]) is type(constant) and values[i] == constant
                require(same, *facts, 'compiled for', constant)
                continue
            divisible = any(
                name == 'tt.divisibility' for name, _ in self.source.attrs.get((i,), ())
            )
            if kind.startswith('*'):
                require(isinstance(values[i], torch.Tensor), *facts)
                dtype = str(values[i].dtype).removeprefix('torch.')
                require(kind == f'*{type_names[dtype]}', *facts[:3], dtype)
                require(
                    not divisible or values[i].data_ptr() % 16 == 0, *facts[:3], 'is not aligned'
                )
            elif kind.startswith('i'):
                bits = int(kind[1:]) - 1
                require(type(values[i]) is int and -(2**bits) <= values[i] < 2**bits, *facts)
                require(not divisible or values[i] % 16 == 0, *facts)
            else:
                require(kind == 'fp32' and type(values[i]) is float, *facts)


def compile_nothing(source, target=None, options=None, **kwargs):
    return Compiled(source, target, options)


def on_cpu(function):
    """The function with tensors on the CPU in place of the GPU, and with smaller maps."""

    def local(x):
        if isinstance(x, str) and x.startswith('cuda'):
            return 'cpu'
        return SMALLER.get(x, x) if type(x) is int else x

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        args = [local(x) for x in args]
        return function(*args, **{name: local(x) for name, x in kwargs.items()})

    return wrapped


class Nothing:
    """Streams, graphs, events."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Generator(torch.Generator):
    """A class, as annotations of PyTorch name it."""

    def __new__(cls, device):
        return super().__new__(cls, 'cpu')


@contextlib.contextmanager
def nothing(*args, **kwargs):
    yield


# Tokens of the large maps of tests.
SMALLER = {102400: 1024, 50_000: 500}
FACTORIES = ('randn', 'rand', 'linspace', 'arange', 'empty', 'zeros', 'ones', 'full', 'tensor')
PATCHES = [
    mock.patch.object(torch.cuda, 'is_available', lambda: True),
    mock.patch.object(torch.cuda, 'device_count', lambda: 2),
]
PATCHES_OF_TESTS = [
    *(mock.patch.object(torch, name, on_cpu(getattr(torch, name))) for name in FACTORIES),
    mock.patch.object(torch.Tensor, 'to', on_cpu(torch.Tensor.to)),
    mock.patch.object(torch.nn.Module, 'to', on_cpu(torch.nn.Module.to)),
    mock.patch.object(torch.nn.Module, 'cuda', lambda self: self),
    mock.patch.object(torch, 'Generator', Generator),
    mock.patch.object(torch, 'autocast', on_cpu(torch.autocast)),
    mock.patch.object(torch.amp, 'GradScaler', on_cpu(torch.amp.GradScaler)),
    mock.patch.object(torch, 'compile', functools.partial(torch.compile, backend='aot_eager')),
    mock.patch.multiple(
        torch.cuda, Stream=Nothing, CUDAGraph=Nothing, current_stream=Nothing, graph=nothing,
        stream=nothing, synchronize=nothing,
    ),
    mock.patch.object(torch, 'equal', lambda *args: True),
    mock.patch.object(torch.testing, 'assert_close', lambda *args, **kwargs: None),
]  # fmt: skip


triton.compiler.compile = compile_nothing
# conftest.py asks for a GPU when it is imported.
for patch in PATCHES:
    patch.start()


def pytest_collection_finish():
    # Whatever else asks for a GPU gets the truth.
    for patch in PATCHES:
        patch.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with contextlib.ExitStack() as stack:
        for patch in PATCHES_OF_TESTS:
            stack.enter_context(patch)
        if hasattr(item.module, 'rms_ratio'):
            stack.enter_context(mock.patch.object(item.module, 'rms_ratio', lambda *args: 0.0))
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except AssertionError as error:
        # Most are about values, which are not there. PyTorch asserts that it was built for CUDA.
        if item.module.__name__ == 'stub_cases' or 'CUDA' in str(error):
            raise


def pytest_terminal_summary(terminalreporter):
    names = 'compiled', 'by Triton', 'directly'
    text = ', '.join(f'{name}: {counts[name]}' for name in names)
    terminalreporter.write_line(f'stub GPU: {text}')
