"""Draws the results of the other modules, which are dicts by the name of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .field import SHARES
from .files import make_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Results = dict[str, dict[str, dict]]
DPI = 90
# Number of colours of a picture: with all of their colours, photographs take twice as many bytes.
COLORS = 256


def _save(figure: Figure, path: Path) -> None:
    write_figure(path, figure, DPI, COLORS)


def in_order(found: Results) -> list[str]:
    """The names of layers or stages of all models, in numerical order: 2.10 after 2.9."""
    names = {name for results in found.values() for name in results}
    return sorted(names, key=lambda name: [int(number) for number in name.split('.')])


def matrix_kinds(found: Results, states: bool) -> list[tuple[str, str]]:
    """(model, name of a matrix) of all states or of all features in results of `layer_ranks`."""
    pairs = (
        (name, kind)
        for name, layers in found.items()
        for layer in layers.values()
        for kind in layer['matrices']
        if kind.startswith('state') == states
    )
    return list(dict.fromkeys(pairs))


def rank_curves(found: Results, path: Path) -> None:
    """Draw singular values against their index, as medians over the layers of each stage."""
    stages = sorted({layer.split('.')[0] for layers in found.values() for layer in layers})
    figure = make_figure(3.6 * len(stages), 6.4)
    grid = figure.subplots(2, len(stages), squeeze=False, sharey=True)
    for row, states in zip(grid, (True, False), strict=True):
        for axes, stage in zip(row, stages, strict=True):
            for name, kind in matrix_kinds(found, states):
                curves = [
                    layer['matrices'][kind]['singular_values']
                    for label, layer in found[name].items()
                    if label.split('.')[0] == stage and kind in layer['matrices']
                ]
                if curves:
                    curve = np.median(curves, axis=0)
                    axes.plot(np.arange(len(curve)) + 1, curve, **_style(found, name, kind))
            axes.set(yscale='log', ylim=(1e-5, 1.3), xlabel='index')
            axes.set_title(f'stage {stage}, {_title(states)}')
        row[0].set_ylabel('singular value / largest')
    _legend(figure, grid[:, 0])
    _save(figure, path)


def rank_layers(found: Results, path: Path) -> None:
    """Draw the effective rank of each layer."""
    places = in_order(found)
    figure = make_figure(11, 4.4)
    grid = figure.subplots(1, 2)
    for axes, states in zip(grid, (True, False), strict=True):
        for name, kind in matrix_kinds(found, states):
            ranks = {
                places.index(label): layer['matrices'][kind]['effective_rank']
                for label, layer in found[name].items()
                if kind in layer['matrices']
            }
            style = _style(found, name, kind)
            axes.plot(ranks.keys(), ranks.values(), marker='o', markersize=3, **style)
        axes.set_xticks(range(len(places)), places)
        axes.set(xlabel='layer', title=_title(states))
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel('effective rank')
    _legend(figure, grid)
    _save(figure, path)


def _title(states: bool) -> str:
    return 'KV state' if states else 'output features'


def _style(found: Results, name: str, kind: str) -> dict[str, str]:
    """The style of a line: a colour for each model, a dash pattern for each kind of matrix."""
    lines = {'state': '-', 'output': '-', 'state without weights and rotation': ':'}
    text = name if kind in ('state', 'output') else f'{name}, {kind}'
    return dict(color=f'C{list(found).index(name)}', linestyle=lines.get(kind, '--'), label=text)


def _legend(figure: Figure, grid: np.ndarray) -> None:
    """Add one legend of all lines below the plots."""
    lines = {}
    for axes in grid:
        lines.update({line.get_label(): line for line in axes.get_lines()})
    figure.legend(
        lines.values(), lines.keys(), loc='outside lower center', ncols=4, fontsize='small'
    )


def stage_fields(found: Results, path: Path) -> None:
    """Draw the mass of each patch, in one scale of colours for all models and stages."""
    from matplotlib.colors import LogNorm

    stages = in_order(found)
    figure = make_figure(3.2 * len(stages) + 0.8, 2.7 * len(found))
    grid = figure.subplots(len(found), len(stages), squeeze=False)
    largest = max(one['mass'].max().item() for fields in found.values() for one in fields.values())
    # masses differ by orders of magnitude
    norm = LogNorm(largest / 1e4, largest, clip=True)
    for row, (name, fields) in zip(grid, found.items(), strict=True):
        for axes, stage in zip(row, stages, strict=True):
            axes.set_axis_off()
            if stage in fields:
                axes.imshow(fields[stage]['mass'].numpy(), cmap='inferno', norm=norm)
                radii = ' / '.join(f'{radius:.0f}' for radius in fields[stage]['radii'])
                axes.set_title(f'{name}, stage {stage}: {radii} px', fontsize='small')
    _color_bar(figure, grid, norm, 'share of the gradient in a patch of 4 x 4 pixels')
    _save(figure, path)


def layer_decays(found: Results, path: Path) -> None:
    """Draw the range and the median of the decay lengths of each layer, as shares of its map."""
    figure = make_figure(8, 4)
    axes = figure.subplots()
    layers = in_order(found)
    for i, (name, decays) in enumerate(found.items()):
        for layer, one in decays.items():
            place = layers.index(layer) + 0.8 * (i + 0.5) / len(found) - 0.4
            low, median, high = (length / math.prod(one['size']) for length in one['lengths'])
            axes.vlines(place, low, high, color=f'C{i}')
            axes.plot(place, median, 'o', color=f'C{i}')
        axes.plot([], 'o-', color=f'C{i}', label=name)
    axes.set(xlabel='layer', ylabel='tokens to 1 / e, over all tokens of the map', yscale='log')
    axes.set_xticks(range(len(layers)), layers)
    axes.legend()
    _save(figure, path)


def field_by_depth(found: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the radii of stacks of layers against their depth."""
    figure = make_figure(5 * len(SHARES), 4)
    for i, (axes, share) in enumerate(zip(figure.subplots(1, len(SHARES)), SHARES, strict=True)):
        for kind, radii in found.items():
            style = {'uniform': '--', 'law': ':'}.get(kind, 'o-')
            axes.plot(range(1, len(radii) + 1), [row[i] for row in radii], style, label=kind)
        axes.set(xlabel='layers', ylabel='tokens', title=f'radius that holds {share:.0%}')
        axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def attention_maps(
    found: Results, image: np.ndarray, size: Sequence[int], pixel: Sequence[int], path: Path
) -> None:
    """Draw the weights of all tokens over an image, in one scale of colours for all maps.

    Args:
        found: Results of `attention_maps`, by model and layer.
        image: (H, W, 3), uint8, RGB.
        size: (height, width) of the input of the models, which may be padded below and on the
            right.
        pixel: Row and column of the pixel that attends.
        path: File of the picture.
    """
    from matplotlib.colors import LogNorm

    height, width = image.shape[:2]
    columns = max(len(layers) for layers in found.values())
    figure = make_figure(3.2 * columns + 0.8, 2.4 * len(found))
    grid = figure.subplots(len(found), columns, squeeze=False)
    largest = max(
        one['weights'].max().item() for layers in found.values() for one in layers.values()
    )
    # Uniform attention is in the middle, or below it if there are weights above 10. Those below
    # 0.1, which rotation can make negative, have the darkest colour.
    norm = LogNorm(0.1, max(10, largest), clip=True)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (name, layers) in zip(grid, found.items(), strict=True):
        for axes, (layer, one) in zip(row, layers.items(), strict=False):
            axes.imshow(image.mean(-1), cmap='gray', extent=(0, width, height, 0))
            axes.imshow(
                one['weights'].numpy(),
                cmap='inferno',
                norm=norm,
                alpha=0.6,
                extent=(0, size[1], size[0], 0),
                interpolation='bilinear',
            )
            place = pixel[1] + 0.5, pixel[0] + 0.5
            for color, thickness in (('black', 3), ('white', 1)):
                axes.plot(*place, '+', color=color, markersize=12, markeredgewidth=thickness)
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.set_title(f'{name} {layer}: {one["mechanism"]}', fontsize='small')
    _color_bar(figure, grid, norm, 'weight x number of tokens; uniform attention is 1')
    _save(figure, path)


def _color_bar(figure: Figure, grid: np.ndarray, norm: Normalize, label: str) -> None:
    """Add the scale of colours that all pictures of a figure share."""
    from matplotlib.cm import ScalarMappable

    figure.colorbar(ScalarMappable(norm, 'inferno'), ax=grid, shrink=0.9, label=label)
