"""The recipe "Add an attention mechanism" of CONTRIBUTING.md, followed once.

The mechanism is focused linear attention, arXiv 2308.00442: its feature map sharpens the direction
of queries and keys and keeps their norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saga_kernels import kv_state, read_state
from saga_mm.analysis import mixing
from saga_mm.attention.base import PackedAttention
from saga_mm.backbones import SoLAVision, sola_vision
from saga_mm.inference import chunked


# Step 1: a subclass of PackedAttention that mixes the tokens.
class FocusedLinearAttention(PackedAttention):
    def __init__(
        self, dim, num_heads, *, power=3, lepe_kernel_size=3, feature_map='relu', impl='auto'
    ):
        super().__init__(dim, num_heads, parts=3, lepe_kernel_size=lepe_kernel_size)
        self.power = power

    def focus(self, x: Tensor) -> Tensor:
        x = F.relu(x) + 1e-6
        sharp = x**self.power
        return sharp * (x.norm(dim=-1, keepdim=True) / sharp.norm(dim=-1, keepdim=True))

    def attend(self, packed, size, mask=None):
        query, key, value = packed.unbind(2)
        state = kv_state(self.focus(key), value, feature_map='relu', mask=mask)
        return read_state(self.focus(query), state, feature_map='relu', mask=mask)


# Step 3: what the analyses need to know of it.
def take_focused_apart(module, packed, size):
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    q, k = module.focus(query), module.focus(key)

    def row(token):
        weights = (k @ q[:, :, token, :, None]).squeeze(-1)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6)

    return 'focused', {'state': k.transpose(2, 3) @ value}, {}, value, row


def test_a_new_mechanism_has_all_that_the_others_have(monkeypatch):
    # Step 2: a name for `linear=`.
    monkeypatch.setitem(sola_vision.LINEAR, 'focused', FocusedLinearAttention)
    monkeypatch.setitem(mixing.MECHANISMS, FocusedLinearAttention, take_focused_apart)
    arch = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
    torch.manual_seed(0)
    model = SoLAVision(arch, ('L', 'L', 'LS', 'L'), linear='focused', pad_mask=True).eval()
    images = torch.randn(2, 4, 90, 70)
    images[:, 3], images[0, 3, 50:] = 1, 0

    # It can be trained.
    sum(out.square().mean() for out in model(images)).backward()
    assert all(p.grad is not None for p in model.stages[0].blocks[0].attn.parameters())
    # Inference over chunks gives the same result, and padding does not leak.
    truth = model(images)
    monkeypatch.setattr(chunked, 'BUDGET', 2**12)
    alone = torch.cat([images[:1, :3, :50], torch.ones(1, 1, 50, 70)], dim=1)
    with torch.no_grad():
        for out, expected in zip(model(images), truth, strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for out, expected in zip(model(images), model(alone), strict=True):
            height = expected.shape[2]
            torch.testing.assert_close(out[:1, :, :height], expected, rtol=1e-3, atol=1e-4)
    # It can be analysed: a row of the attention matrix times the values is the output.
    layer = model.stages[0].blocks[0].attn
    apart = mixing.take_apart(layer.double(), torch.randn(1, 5, 7, 8, dtype=torch.float64))
    mixed = (apart.row(11).unsqueeze(-1) * apart.values).sum(2)
    torch.testing.assert_close(mixed.flatten(1), apart.features['output'][:, 11])
