"""How far attention layers see: the effective receptive field of stacks of one kind of layer.

    python tools/receptive_field.py --depth 8 --size 48 --out-dir work_dirs/receptive_field

For each stack of 1 to DEPTH untrained layers, the gradient of the centre token of the output with
respect to the input map: its absolute value, summed over channels and averaged over random inputs,
is the mass of each token. The radius is the Euclidean distance from the centre, in tokens, within
which a share of the mass lies. A layer is a norm and attention, without LePE and without a
residual, so that nothing but the mixing of tokens counts. `uniform` is the radius where every token
has the same mass.

Writes receptive_field.md and receptive_field.png. Source of the measure: arXiv 1701.04128.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from infer import pick_device
from matplotlib.figure import Figure
from torch import Tensor, nn

from saga_mm.attention import DecayLinearAttention, GatedLinearAttention, SoftmaxAttention
from saga_mm.engine.cli import command_line
from saga_mm.engine.launch import make_folder

SHARES = (0.5, 0.9)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ('decay', 'gated', 'plain', 'softmax')
    parser.add_argument('--kinds', nargs='+', choices=kinds, default=['decay', 'gated', 'softmax'])
    parser.add_argument('--depth', type=int, default=8, help='of the deepest stack. Defaults to 8')
    parser.add_argument('--size', type=int, default=48, help='of the map. Defaults to 48')
    parser.add_argument('--dim', type=int, default=64, help='channels. Defaults to 64')
    parser.add_argument('--heads', type=int, default=4, help='Defaults to 4')
    parser.add_argument('--inputs', type=int, default=4, help='to average over. Defaults to 4')
    parser.add_argument(
        '--decay-lengths',
        type=float,
        nargs=2,
        default=(4.0, 64.0),
        metavar=('SHORTEST', 'LONGEST'),
        help='of decay layers, over their heads, in tokens along the scan. Defaults to 4 64',
    )
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to cuda, else cpu')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/receptive_field'))
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def make_mixer(kind: str, dim: int, heads: int, decay_lengths: tuple[float, float]) -> nn.Module:
    """An attention module on maps (B, H, W, C), without LePE."""
    makers = dict(
        decay=partial(DecayLinearAttention, decay_lengths=tuple(decay_lengths)),
        gated=GatedLinearAttention,
        plain=partial(GatedLinearAttention, gated=False),
        softmax=SoftmaxAttention,
    )
    return makers[kind](dim, heads, lepe_kernel_size=0)


def gradient_mass(stack: nn.Module, x: Tensor) -> Tensor:
    """What each token of maps (B, H, W, C) means to the centre token: (H, W), of sum 1.

    The gradient is that of a random projection of the centre token's channels.
    """
    x = x.detach().requires_grad_()
    out = stack(x)
    centre = out[:, out.shape[1] // 2, out.shape[2] // 2]
    (gradient,) = torch.autograd.grad(centre, x, torch.randn_like(centre))
    # (B, H, W), each map of sum 1
    mass = gradient.abs().sum(-1)
    return (mass / mass.sum((1, 2), keepdim=True)).mean(0)


def radius(mass: Tensor, share: float) -> float:
    """Distance from the centre of a map (H, W) within which at least `share` of its mass lies."""
    height, width = mass.shape
    rows = torch.arange(height, device=mass.device) - height // 2
    columns = torch.arange(width, device=mass.device) - width // 2
    distances = torch.hypot(rows[:, None].double(), columns.double()).flatten()
    # tokens at one distance are in or out together
    rings, ring = distances.unique(return_inverse=True)
    held = torch.zeros_like(rings).index_add_(0, ring, mass.flatten().double()).cumsum(0)
    index = torch.searchsorted(held, share * held[-1] * (1 - 1e-9))
    return rings[index].item()


def radii_by_depth(kind: str, args: argparse.Namespace) -> list[list[float]]:
    """Per depth from 1, the radius for each of `SHARES`."""
    torch.manual_seed(0)
    x = torch.randn(args.inputs, args.size, args.size, args.dim)
    layers: list[nn.Module] = []
    radii = []
    for _ in range(args.depth):
        layers.append(nn.LayerNorm(args.dim))
        layers.append(make_mixer(kind, args.dim, args.heads, args.decay_lengths))
        mass = gradient_mass(nn.Sequential(*layers).to(args.device), x.to(args.device))
        radii.append([radius(mass, share) for share in SHARES])
    return radii


def table(found: dict[str, list[list[float]]], args: argparse.Namespace) -> str:
    lines = [
        f'{args.size} x {args.size} tokens, {args.dim} channels, {args.heads} heads, '
        f'{args.inputs} inputs; decay lengths {" to ".join(map(str, args.decay_lengths))}. '
        f'Radius in tokens that holds {" / ".join(f"{share:.0%}" for share in SHARES)}.',
        '',
        f'| depth | {" | ".join(found)} |',
        '|---|' + '---|' * len(found),
    ]
    for depth in range(args.depth):
        cells = [' / '.join(f'{r:.1f}' for r in radii[depth]) for radii in found.values()]
        lines.append(f'| {depth + 1} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def draw(found: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(5 * len(SHARES), 4), layout='constrained')
    for i, (axes, share) in enumerate(zip(figure.subplots(1, len(SHARES)), SHARES, strict=True)):
        for kind, radii in found.items():
            style = '--' if kind == 'uniform' else 'o-'
            axes.plot(range(1, len(radii) + 1), [row[i] for row in radii], style, label=kind)
        axes.set(xlabel='layers', ylabel='tokens', title=f'radius that holds {share:.0%}')
        axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> None:
    for name in ('depth', 'size', 'inputs'):
        if getattr(args, name) < 1:
            raise ValueError(f'{name} must be at least 1, got {getattr(args, name)}')
    args.device = pick_device(args.device)
    make_folder(args.out_dir)
    found = {kind: radii_by_depth(kind, args) for kind in dict.fromkeys(args.kinds)}
    uniform = torch.ones(args.size, args.size)
    found['uniform'] = [[radius(uniform, share) for share in SHARES]] * args.depth
    (args.out_dir / 'receptive_field.md').write_text(table(found, args))
    draw(found, args.out_dir / 'receptive_field.png')
    print(f'{table(found, args)}\n{args.out_dir}/receptive_field.png')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command_line(args.debug):
        run(args)


if __name__ == '__main__':
    main()
