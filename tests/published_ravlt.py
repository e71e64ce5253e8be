"""RAVLT as its paper and code define it, formula by formula, to compare our implementation with.

Legend: B batch, H height, W width, N = H * W tokens, C channels, d head dim. Maps are (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import nn


class Rotation(nn.Module):
    """The tables sin and cos, (H * W, d)."""

    def __init__(self, head_dim):
        super().__init__()
        angle = 10000 ** -torch.linspace(0, 1, head_dim // 4)
        self.register_buffer('angle', angle.repeat_interleave(2))

    def forward(self, height, width):
        angles = torch.zeros(height, width, 2, len(self.angle))
        for i in range(height):
            angles[i, :, 0] = i * self.angle
        for j in range(width):
            angles[:, j, 1] = j * self.angle
        angles = angles.reshape(height * width, -1)
        return angles.sin(), angles.cos()


def rotated(x, sin, cos):
    partner = torch.empty_like(x)
    partner[..., 0::2] = -x[..., 1::2]
    partner[..., 1::2] = x[..., 0::2]
    return x * cos + partner * sin


class Attention(nn.Module):
    """Explicit N x N matrices where the published model has them."""

    def __init__(self, dim, heads, softmax):
        super().__init__()
        self.heads, self.softmax = heads, softmax
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x, sin, cos):
        q, k, v, gate = self.qkvo(x).chunk(4, dim=1)
        lepe = self.lepe(v)
        # (B, heads, N, d)
        q, k, v = (
            part.reshape(len(x), self.heads, -1, x[0, 0].numel()).transpose(2, 3)
            for part in (q, k, v)
        )
        tokens, dim = q.shape[2:]
        if self.softmax:
            scores = rotated(q, sin, cos) @ rotated(k, sin, cos).transpose(2, 3)
            mixed = (dim**-0.5 * scores).softmax(-1) @ v
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
            alpha = (dim**-0.5 * (q.mean(2, keepdim=True) @ k.transpose(2, 3))).softmax(-1)
            k = tokens * alpha.transpose(2, 3) * k
            z = 1 / (q @ k.mean(2, keepdim=True).transpose(2, 3) + 1e-6)
            state = (rotated(k, sin, cos) * tokens**-0.5).transpose(2, 3) @ (v * tokens**-0.5)
            mixed = rotated(q, sin, cos) @ state * z
        mixed = mixed.transpose(2, 3).reshape(x.shape)
        return self.proj((mixed + lepe) * gate)


class ChannelNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x):
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class PublishedBlock(nn.Module):
    def __init__(self, dim, heads, softmax):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.attn = Attention(dim, heads, softmax)
        self.ffn = FeedForward(dim, int(3.5 * dim))
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gamma_1 = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.gamma_2 = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x, sin, cos):
        x = x + self.pos(x)
        x = x + self.gamma_1 * self.attn(self.norm1(x), sin, cos)
        return x + self.gamma_2 * self.ffn(self.norm2(x))


class Published(nn.Module):
    """The whole model, with the published names and order of channels."""

    FIELDS = ('embed_dims', 'depths', 'num_heads')

    def __init__(self, embed_dims, depths, num_heads, dense=True):
        super().__init__()
        half = embed_dims[0] // 2
        self.patch_embed = nn.Module()
        layers = []
        for inner, outer, stride in (
            (3, half, 2),
            (half, half, 1),
            (half, half, 1),
            (half, embed_dims[0], 2),
        ):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.BatchNorm2d(outer), nn.GELU()]
        self.patch_embed.proj = nn.Sequential(*layers[:-1])
        self.layers = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            stage = nn.Module()
            stage.RoPE = Rotation(dim // num_heads[i])
            stage.blocks = nn.ModuleList(
                PublishedBlock(dim, num_heads[i], softmax=i >= 2) for _ in range(depths[i])
            )
            if i < 3:
                stage.downsample = nn.Module()
                stage.downsample.reduction = nn.Conv2d(dim, embed_dims[i + 1], 3, 2, 1)
                stage.downsample.norm = nn.BatchNorm2d(embed_dims[i + 1])
            self.layers.append(stage)
        if dense:
            self.extra_norms = nn.ModuleList(ChannelNorm(dim) for dim in embed_dims)
        else:
            self.proj = nn.Conv2d(embed_dims[-1], 40, 1)
            self.norm = nn.BatchNorm2d(40)
            self.head = nn.Conv2d(40, 10, 1)

    def forward(self, x):
        outs = []
        x = self.patch_embed.proj(x)
        for i, stage in enumerate(self.layers):
            tables = stage.RoPE(*x.shape[2:])
            for block in stage.blocks:
                x = block(x, *tables)
            outs.append(self.extra_norms[i](x))
            if i < 3:
                x = stage.downsample.norm(stage.downsample.reduction(x))
        return outs


def published(arch, dense=True):
    """A published model with random weights, statistics of batch norms included."""
    model = Published(**arch, dense=dense).eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith('angle'):
            # Small weights would hide the effect of attention.
            scale = 1.0 if value.ndim == 1 or 'gamma' in name else 2 * value[0].numel() ** -0.5
            value.copy_(torch.randn_like(value) * scale)
            if name.endswith('running_var'):
                value.abs_().add_(0.5)
    return model
