"""Softmax attention agrees with its formula, and does not store its matrix."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from saga_mm.attention import SoftmaxAttention


def test_channel_order_and_lepe():
    dim, heads = 12, 3
    module = SoftmaxAttention(dim, heads).double()
    torch.nn.init.normal_(module.in_proj.weight)
    x = torch.randn(2, 5, 7, dim, dtype=torch.float64)
    projected = F.linear(x, module.in_proj.weight, module.in_proj.bias)
    # Projection p, head h and channel d are at index p * C + h * D + d; each is (B, heads, N, D).
    q, k, v = (
        torch.stack(part.flatten(1, 2).chunk(heads, -1), 1) for part in projected.chunk(3, -1)
    )
    scores = (q @ k.transpose(2, 3) / (dim // heads) ** 0.5).softmax(-1)
    mixed = (scores @ v).transpose(1, 2).reshape(2, 5, 7, dim)
    v = projected[..., 2 * dim :].permute(0, 3, 1, 2)
    lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=1, groups=dim)
    truth = F.linear(mixed + lepe.permute(0, 2, 3, 1), module.proj.weight, module.proj.bias)
    torch.testing.assert_close(module(x), truth)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any op returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_scores_are_never_a_matrix(dtype, padded):
    module = SoftmaxAttention(8, 2).to(dtype)
    x = torch.randn(1, 32, 40, 8, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 32, 40, 1, dtype=torch.bool) if padded else None
    with Largest() as largest:
        module(x, mask).sum().backward()
    assert 3 * 8 * 1280 <= largest.elements < 1280**2


def test_wrong_heads():
    with pytest.raises(ValueError, match='dim must be a multiple of num_heads, got 8 and 3'):
        SoftmaxAttention(8, 3)
