"""Each test has the same random numbers and no compiled code, whatever ran before it.

No GPU: Triton's interpreter.
"""

import importlib
import importlib.util
import os
import random

import numpy as np
import pytest
import torch

if importlib.util.find_spec('triton') and not torch.cuda.is_available():
    # Triton decides on import whether kernels are compiled or interpreted, so this must come before
    # any other import of it. The variable is removed again, because CPU tests run the reference.
    os.environ['TRITON_INTERPRET'] = '1'
    from saga_kernels.launch import KERNELS

    for op in KERNELS:
        importlib.import_module(f'saga_kernels.{op}.kernel')

    del os.environ['TRITON_INTERPRET']


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Allow only a few compilations of code that tests share, such as the forward of backbones."""
    yield
    torch.compiler.reset()


@pytest.fixture
def triton_device(monkeypatch):
    """'cuda', or 'cpu' with the kernels interpreted; every `torch.empty` is full of NaN."""
    pytest.importorskip('triton')
    torch.use_deterministic_algorithms(True, warn_only=True)
    if torch.cuda.is_available():
        yield 'cuda'
    else:
        monkeypatch.setenv('TRITON_INTERPRET', '1')
        yield 'cpu'
    torch.use_deterministic_algorithms(False)
