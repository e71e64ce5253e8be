"""Analyse attention: ranks, receptive fields, and what one pixel attends to.

    python -m saga_mm analyze_attention rank --models NAME=CONFIG:CHECKPOINT ... --images FOLDER
    python -m saga_mm analyze_attention field --models NAME=CONFIG:CHECKPOINT ... --images FOLDER
    python -m saga_mm analyze_attention field --depth 8
    python -m saga_mm analyze_attention map --models NAME=CONFIG:CHECKPOINT ... --images FILE \\
        --pixel 90 120

Each command writes pictures, a table, and all numbers as JSON; `rank --help` and so on explain
them. A model without `:CHECKPOINT` is untrained. Layers are called STAGE.BLOCK; both numbers start
at 0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from saga_mm.analysis import plots
from saga_mm.analysis.attention_map import attention_maps
from saga_mm.analysis.field import (
    SHARES,
    law_radii,
    layer_decays,
    radii,
    stack_radii,
    stage_fields,
)
from saga_mm.analysis.files import check_drawing, write_json, write_text
from saga_mm.analysis.rank import layer_ranks
from saga_mm.analysis.subjects import Subject, load_subject
from saga_mm.analysis.tables import gate_table, make_rows, rank_table, table, token_table
from saga_mm.apis import find_images, name_outputs, select_device, to_8_bit
from saga_mm.attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    SoftmaxAttention,
    WKVAttention,
)
from saga_mm.checkpoint import make_folder, printable
from saga_mm.cli import add_options, print_written, run_tool

KINDS = ('wkv', 'decay', 'gated', 'plain', 'softmax')
# the config may be one of a package, such as saga_mm::segmentation/upernet_saga_t.py
MODEL = re.compile(r'(?P<name>[^=]+)=(?P<config>(?:\w+::)?[^:]+)(?::(?P<checkpoint>.*))?')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar='rank|field|map')
    for name, run in (('rank', run_rank), ('field', run_field), ('map', run_map)):
        command = commands.add_parser(
            name,
            description=run.__doc__,
            help=(run.__doc__ or '').splitlines()[0],
            formatter_class=formatter,
        )
        command.set_defaults(command=run)
        add_common_arguments(command, required=name != 'field')
        if name == 'field':
            add_stack_arguments(command)
        if name == 'map':
            command.add_argument(
                '--pixel',
                nargs=2,
                type=int,
                required=True,
                metavar=('Y', 'X'),
                help='the pixel that attends',
            )
            command.add_argument(
                '--layers', nargs='+', metavar='LAYER', help='Defaults to the last of each stage'
            )
    return parser.parse_args(argv)


def add_common_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        '--models',
        nargs='+',
        default=[],
        required=required,
        metavar='NAME=CONFIG[:CHECKPOINT]',
        help='models to compare',
    )
    parser.add_argument(
        '--images', nargs='+', default=[], required=required, help='files, folders or globs'
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size to resize images to. By default, they must have one size, and keep it',
    )
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/attention'))
    add_options(parser, config=False)


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('stacks of untrained layers, without --models')
    group.add_argument('--kinds', nargs='+', choices=KINDS, default=['decay', 'gated', 'softmax'])
    group.add_argument(
        '--depth', type=int, default=8, help='number of layers of the deepest stack. Defaults to 8'
    )
    group.add_argument(
        '--tokens', type=int, default=48, help='height and width of the map. Defaults to 48'
    )
    group.add_argument('--dim', type=int, default=64, help='number of channels. Defaults to 64')
    group.add_argument('--heads', type=int, default=4, help='number of heads. Defaults to 4')
    group.add_argument(
        '--inputs',
        type=int,
        default=4,
        help='number of random inputs to average over. Defaults to 4',
    )
    group.add_argument(
        '--decay-lengths',
        type=float,
        nargs=2,
        default=(4.0, 64.0),
        metavar=('SHORTEST', 'LONGEST'),
        help='range over the heads of decay layers and the channels of WKV layers, in tokens along '
        'the scan. Defaults to 4 64',
    )


def load_models(args: argparse.Namespace) -> dict[str, Subject]:
    """Load the models of `--models`, by name."""
    models: dict[str, Subject] = {}
    for text in args.models:
        match = MODEL.fullmatch(text)
        if not match or match['name'] in models:
            raise ValueError(
                f'--models must be NAME=CONFIG[:CHECKPOINT], each name once, got {text!r}'
            )
        models[match['name']] = load_subject(match['config'], match['checkpoint'], args.device)
    return models


def find(args: argparse.Namespace) -> list[Path]:
    """Find the files of `--images`."""
    if args.size and min(args.size) < 1:
        raise ValueError(f'--size must be two positive numbers, got {args.size}')
    if not args.images:
        raise ValueError('--models needs --images')
    return find_images(args.images)


def load_images(
    args: argparse.Namespace, paths: list[Path], models: dict[str, Subject]
) -> dict[str, list[np.ndarray]]:
    """Load the images for each model, as its config does; ValueError if their sizes differ."""
    images = {
        name: [model.load(path, args.size) for path in paths] for name, model in models.items()
    }
    sizes = sorted({image.shape[:2] for loaded in images.values() for image in loaded})
    if len(sizes) > 1:
        raise ValueError(f'images must be of one size, unless --size is given, got {sizes}')
    return images


def run_rank(args: argparse.Namespace) -> None:
    """Measure ranks of KV states and of output features for each layer.

    state: the KV state of a head, (D, D), that queries read. For comparison, there is also the
    state of the same keys and values without gates, or without weights and rotation. Softmax has no
    state; decay has one for each token, which is left out.
    output: the output of attention for all tokens, (tokens, channels), before LePE and the output
    projection. gated output: the same, times the output gate of RAVLT.

    Singular values are divided by the largest one. Matrices are not centred. The effective rank is
    exp of the entropy of the singular values as shares of their sum (Roy & Vetterli 2007). The
    numerical rank is the number of singular values above 1 % of the largest. Ranks are medians over
    heads and images.

    The effective number of tokens is exp of the entropy of a row of the attention matrix, in
    absolute values as shares of their sum: the mean over heads, images, and up to 16 tokens.
    """
    paths, models = find(args), load_models(args)
    images = load_images(args, paths, models)
    found = {
        name: layer_ranks(one.model.backbone, map(one.prepare, images[name]))
        for name, one in models.items()
    }
    head = f'{describe(images)}. Effective rank / numerical rank of full rank.'
    # a network with softmax attention only has no states
    kinds = [states for states in (True, False) if plots.matrix_kinds(found, states)]
    texts = [head, *(rank_table(found, states) for states in kinds)]
    if any(one['gates'] for layers in found.values() for one in layers.values()):
        texts += ['Gates: mean and standard deviation over tokens.', gate_table(found)]
    texts += ['Effective number of tokens that a token attends to.', token_table(found)]
    files = write(args.out_dir / 'rank', found, '\n\n'.join(texts))
    curves, layers = args.out_dir / 'rank_curves.png', args.out_dir / 'rank_layers.png'
    plots.rank_curves(found, curves)
    plots.rank_layers(found, layers)
    print_written(*files, curves, layers)


def run_field(args: argparse.Namespace) -> None:
    """Measure how far models see, for each stage; without --models, how far stacks of layers see.

    The mass of a position is the absolute value of the gradient of the centre token of the output
    with respect to it, summed over channels and averaged over inputs. The radius is the Euclidean
    distance from the centre within which a share of the mass lies. For comparison, "uniform" is the
    radius if all positions have the same mass. Source: arXiv 1701.04128.

    With --models: from the map of each stage to the image, in pixels, through convolutions and
    residuals. For WKV and decay layers, there is also a table of the distances, in tokens of the
    scan, at which their weights fall to 1 / e: the shortest, the median and the longest over
    channels or heads.

    Without: through 1 to DEPTH untrained layers on random maps, in tokens. Such a layer is a norm
    and attention, without LePE and without a residual, so that only the mixing of tokens counts. If
    there are WKV layers, all with one decay length, "law" is the radius if the positions that they
    see spread along the scan like a sum of independent steps.
    """
    if args.models:
        field_by_stage(args)
    else:
        field_by_depth(args)


def field_by_stage(args: argparse.Namespace) -> None:
    paths, models = find(args), load_models(args)
    images = load_images(args, paths, models)
    found = {}
    for name, one in models.items():
        torch.manual_seed(0)
        found[name] = stage_fields(one.model.backbone, [*map(one.prepare, images[name])])
    rows = make_rows(found, lambda field: cell(field['radii']))
    uniform = cell(radii(torch.ones(next(iter(images.values()))[0].shape[:2])))
    text = f'{describe(images)}; uniform: {uniform}. {shares("pixels")}'
    files = write(args.out_dir / 'field', found, f'{text}\n\n{table("stage", found, rows)}')
    plots.stage_fields(found, args.out_dir / 'field.png')
    print_written(*files, args.out_dir / 'field.png')
    decays = {
        name: layer_decays(one.model.backbone, one.prepare(images[name][0]))
        for name, one in models.items()
    }
    decays = {name: layers for name, layers in decays.items() if layers}
    if decays:
        rows = make_rows(decays, lambda layer: cell(layer['lengths']))
        text = 'Tokens of the scan at which weights fall to 1 / e: shortest / median / longest.'
        files = write(args.out_dir / 'decay', decays, f'{text}\n\n{table("layer", decays, rows)}')
        plots.layer_decays(decays, args.out_dir / 'decay.png')
        print_written(*files, args.out_dir / 'decay.png')


def field_by_depth(args: argparse.Namespace) -> None:
    for name in ('depth', 'tokens', 'inputs'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name} must be at least 1, got {getattr(args, name)}')
    shortest, longest = args.decay_lengths
    if not 0 < shortest <= longest:
        raise ValueError(
            f'--decay-lengths must be positive and in order, got {shortest:g} {longest:g}'
        )
    found = {}
    for kind in dict.fromkeys(args.kinds):
        torch.manual_seed(0)
        x = torch.randn(args.inputs, args.tokens, args.tokens, args.dim, device=args.device)
        found[kind] = stack_radii((make_layer(kind, args) for _ in range(args.depth)), x)
    found['uniform'] = [radii(torch.ones(args.tokens, args.tokens))] * args.depth
    if 'wkv' in args.kinds and shortest == longest:
        found['law'] = [law_radii(shortest, i + 1) for i in range(args.depth)]
    rows = {
        str(i + 1): [cell(by_depth[i]) for by_depth in found.values()] for i in range(args.depth)
    }
    text = (
        f'{args.tokens} x {args.tokens} tokens, {args.dim} channels, {args.heads} heads, '
        f'{args.inputs} inputs; decay lengths {" to ".join(map(str, args.decay_lengths))}. '
        f'{shares("tokens")}\n\n{table("depth", found, rows)}'
    )
    files = write(args.out_dir / 'field_by_depth', found, text)
    plots.field_by_depth(found, args.out_dir / 'field_by_depth.png')
    print_written(*files, args.out_dir / 'field_by_depth.png')


def make_layer(kind: str, args: argparse.Namespace) -> nn.Module:
    """A norm and attention on maps (B, H, W, C)."""
    shortest, longest = args.decay_lengths
    makers: dict[str, Callable[..., nn.Module]] = dict(
        decay=partial(DecayLinearAttention, decay_lengths=tuple(args.decay_lengths)),
        gated=GatedLinearAttention,
        plain=partial(GatedLinearAttention, gated=False),
        softmax=SoftmaxAttention,
        # it has no heads
        wkv=lambda dim, heads, **options: WKVAttention(
            dim, decay_per='token', decays=(1 / longest, 1 / shortest), **options
        ),
    )
    norm = nn.LayerNorm(args.dim)
    return nn.Sequential(norm, makers[kind](args.dim, args.heads, lepe_kernel_size=0))


def run_map(args: argparse.Namespace) -> None:
    """Draw what one pixel attends to: its row of the attention matrix, over the image.

    Linear attention does not build this matrix, but a row of it can be computed in O(N). The
    picture shows, for each token, its weight times the mean over channels of its gate on v,
    averaged over heads and multiplied by the number of tokens, so that uniform attention gives 1.
    In linear layers of RAVLT, the rotation can make weights negative and their sum different from
    1.

    The numbers for each layer are the map and, for each head, the sum of the row and the effective
    number of tokens: exp of the entropy of the absolute values of the weights as shares of their
    sum. The table shows the mean of the latter over heads.
    """
    paths, models = find(args), load_models(args)
    images = load_images(args, paths, models)
    height, width = next(iter(images.values()))[0].shape[:2]
    if not (0 <= args.pixel[0] < height and 0 <= args.pixel[1] < width):
        raise ValueError(f'--pixel must lie in {height} x {width} pixels, got {args.pixel}')
    for i, (path, out) in enumerate(zip(paths, name_outputs(paths, args.out_dir), strict=True)):
        found = {}
        for name, one in models.items():
            x = one.prepare(images[name][i])
            found[name] = attention_maps(one.model.backbone, x, args.pixel, args.layers)
        out = out.with_name(f'map_{out.name}')
        rows = make_rows(found, tokens_that_count)
        text = f'{printable(str(path))}\n\n{table("layer", found, rows)}'
        files = write(out.with_suffix(''), found, text)
        # the image as the first model loads it
        picture = to_8_bit(next(iter(images.values()))[i])
        plots.attention_maps(found, picture[..., ::-1], x.shape[2:], args.pixel, out)
        print_written(*files, out)


def tokens_that_count(row: dict) -> str:
    return f'{np.mean(row["effective_tokens"]):.1f} of {row["weights"].numel()}'


def describe(images: dict[str, list[np.ndarray]]) -> str:
    loaded = next(iter(images.values()))
    height, width = loaded[0].shape[:2]
    return f'{len(loaded)} images of {height} x {width} pixels'


def shares(unit: str) -> str:
    return f'Radius in {unit} that holds {" / ".join(f"{share:.0%}" for share in SHARES)}.'


def cell(values: list[float]) -> str:
    return ' / '.join(f'{value:.1f}' for value in values)


def write(path: Path, found: object, text: str) -> list[str]:
    """Write numbers to `path`.json and a text to `path`.md; print the text; return the files."""
    files = [f'{path}.json', f'{path}.md']
    write_json(files[0], found)
    write_text(files[1], text)
    print(f'{text}\n')
    return files


def run(args: argparse.Namespace) -> None:
    check_drawing()
    args.device = select_device(args.device)
    make_folder(args.out_dir)
    args.command(args)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
