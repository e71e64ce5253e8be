"""What the CPU does around the kernels, without a GPU and without Triton's interpreter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(not shutil.which('cc'), reason='compiles a stub of the GPU driver')

HERE = Path(__file__).parent


def run(*arguments):
    """Output of a Python process of its own, as this one interprets kernels."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    command = [sys.executable, *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=path)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    ('files', 'options', 'most'),
    [
        # On a machine with a GPU, 12 processes compile these in a minute.
        (('kernels/stub_cases.py', 'kernels/test_triton_gpu.py'), (), 650),
        pytest.param(
            ('kernels/test_triton_layers.py', 'backbones/test_gpu.py'),
            ('-k', 'layers or cuda_graph or repeatable or leak'),
            160,
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_tests_for_a_gpu_are_walked_through_without_one(files, options, most):
    """Each launch is checked against what its kernel was compiled for, see `stub_gpu.py`."""
    tests = [HERE.parent / name for name in files]
    output = run('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'stub_gpu', *options, *tests)
    counts = re.search(r'compiled: (\d+), by Triton: (\d+), directly: (\d+)', output).groups()
    compiled, by_triton, directly = map(int, counts)
    assert 0 < compiled <= most
    assert compiled <= by_triton < directly


LAUNCHES = """
import ctypes
import stub_driver

launches = ctypes.c_int.in_dll(stub_driver.install(), 'launches')

import torch
from triton.runtime.jit import JITFunction
from saga_kernels import gated_linear_attention

by_triton, run = [], JITFunction.run

def counted(self, *args, **kwargs):
    by_triton.append(self)
    return run(self, *args, **kwargs)

JITFunction.run = counted
packed = torch.randn(1, 300, 5, 2, 16).half()
for _ in range(3):
    gated_linear_attention(packed, impl='triton')
    print(launches.value, len(by_triton))
"""


def test_what_triton_compiled_is_launched_without_its_launcher():
    # Two kernels, by all launchers and by Triton's.
    assert run('-c', LAUNCHES).split() == ['2', '2', '4', '2', '6', '2']


HOOKS = """
from triton import knobs

names = []
knobs.runtime.launch_enter_hook.add(lambda metadata: names.append(metadata.get()['name']))
gated_linear_attention(packed, impl='triton')
print(*names)
"""


def test_a_profiler_hears_of_launches():
    assert run('-c', LAUNCHES + HOOKS).split()[6:] == ['kv_forward', 'out_forward']
