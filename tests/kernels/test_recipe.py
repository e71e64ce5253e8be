"""The recipe "Add an operator" of CONTRIBUTING.md, followed once in a copy of the package.

The operator is linear attention whose feature map is the square of ReLU.
"""

import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / 'kernels' / 'saga_kernels'

REFERENCE = '''
from torch import Tensor

from ..gated.state import kv_state, read_state


def squared_relu(x: Tensor) -> Tensor:
    return x.relu().square()


def attend(qkv: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D)."""
    query, key, value = qkv.unbind(2)
    state = kv_state(key, value, feature_map=squared_relu, mask=mask)
    return read_state(query, state, squared_relu, eps, mask)
'''

EAGER = '''
from torch import Tensor

from ..gated import eager
from .reference import squared_relu


def attend(qkv: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """`reference.attend`, in chunks of tokens where these pay."""
    return eager.attend(qkv, squared_relu, eps, mask)
'''

API = """
from torch import Tensor

from ..defaults import EPS
from ..dispatch import Impl, resolve_impl
from ..validation import check_eps, check_mask, check_packed
from .eager import attend


def squared_linear_attention(
    qkv: Tensor, *, eps: float = EPS, mask: Tensor | None = None, impl: Impl = 'auto'
) -> Tensor:
    check_packed('qkv', qkv, parts=3)
    eps = check_eps(eps)
    check_mask(mask, qkv)
    resolve_impl(impl, 'squared_linear_attention', 'it has no Triton kernel')
    return attend(qkv, eps, mask)
"""

# A test of the operator checks the formula, chunks, exports and messages.
CHECKS = """
import torch
from saga_kernels import chunks, squared_linear_attention as op
from saga_kernels.squared import reference

torch.manual_seed(0)
qkv = torch.randn(2, 70, 3, 2, 8, dtype=torch.float64, requires_grad=True)
mask = torch.rand(2, 70) > 0.3
q, k, v = qkv.transpose(1, 3).unbind(2)
weights = q.relu().square() @ k.relu().square().transpose(2, 3) * mask[:, None, None]
truth = (weights @ v / (weights.sum(3, keepdim=True) + 1e-6)).transpose(1, 2)
truth = truth * mask[:, :, None, None]
out = op(qkv, mask=mask)
torch.testing.assert_close(out, truth)
torch.testing.assert_close(reference.attend(qkv, 1e-6, mask), truth)
grads = (torch.autograd.grad(x.sin().sum(), qkv)[0] for x in (out, truth))
torch.testing.assert_close(*grads)

with torch.no_grad():
    chunks.BUDGET = 5000
    torch.testing.assert_close(op(qkv, mask=mask), truth.detach())

class Module(torch.nn.Module):
    def forward(self, x):
        return op(x)

axes = {1: torch.export.Dim.DYNAMIC}
program = torch.export.export(Module(), (torch.randn(1, 20, 3, 1, 8),), dynamic_shapes=(axes,))
other = torch.randn(1, 300, 3, 1, 8)
torch.testing.assert_close(program.module()(other), op(other))

for options, message in (
    (dict(impl='triton'), 'it has no Triton kernel'),
    (dict(eps=0), 'eps must be a positive number'),
):
    try:
        op(other, **options)
    except (RuntimeError, ValueError) as error:
        assert message in str(error)
    else:
        raise AssertionError(options)
"""


def test_a_new_operator_has_what_the_others_have(tmp_path):
    package = tmp_path / 'saga_kernels'
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns('__pycache__'))
    # Steps 1 to 3.
    (package / 'squared').mkdir()
    for name, source in dict(__init__='', reference=REFERENCE, eager=EAGER, api=API).items():
        (package / 'squared' / f'{name}.py').write_text(source)
    with open(package / '__init__.py', 'a') as file:
        file.write('from .squared.api import squared_linear_attention\n')
    # Step 4.
    checks = tmp_path / 'checks.py'
    checks.write_text(CHECKS)
    environment = dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1')
    result = subprocess.run(
        [sys.executable, checks], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
