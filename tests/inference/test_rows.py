"""Functions that run over chunks of rows give the results of plain calls, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from saga_mm.inference import LiveBytes, NotByRowsError, RowProgram
from saga_mm.inference import rows as rows_module

CHANNELS = 4


def conv(kernel_size=3, **options):
    layer = nn.Conv2d(CHANNELS, CHANNELS, kernel_size, **options)
    return layer.requires_grad_(False)


def norm():
    layer = nn.BatchNorm2d(CHANNELS)
    layer(torch.randn(4, CHANNELS, 5, 5))
    return layer.eval().requires_grad_(False)


def resized(size, mode='bilinear', **options):
    return lambda x: F.interpolate(x, size, mode=mode, **options)


def scaled(factor, mode='bilinear'):
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode)


def pyramid(x):
    """Two scales that are read by several calls, with halos, and a global context."""
    fine = first(x)
    coarse = second(F.interpolate(fine, scale_factor=0.5, mode='bilinear'))
    context = F.interpolate(F.adaptive_avg_pool2d(coarse, 2), fine.shape[2:], mode='bilinear')
    fine = third(fine + F.interpolate(coarse, fine.shape[2:], mode='nearest'))
    return torch.cat([fine, context, F.interpolate(coarse, fine.shape[2:], mode='bilinear')], 1)


torch.manual_seed(0)
first, third = conv(padding=1), conv(5, padding=2)
second = nn.Sequential(conv(padding=1), norm(), nn.ReLU(inplace=True))
FUNCTIONS = {
    'convolution': conv(padding=1),
    'without padding, stride 2': conv(stride=2),
    'dilated': conv(padding=2, dilation=2),
    'stride 2, padding 2': conv(5, padding=2, stride=2),
    'norm and activation': nn.Sequential(norm(), nn.GELU(), nn.Dropout()).eval(),
    'norm of channels': lambda x: x.softmax(1) + x.mean(1, keepdim=True),
    'constant of all rows': lambda x: x * torch.arange(x.shape[2] * 1.0)[:, None],
    'bilinear, larger': resized((29, 40)),
    'bilinear, smaller': resized((5, 3)),
    'bilinear, one row': resized((1, 1)),
    'bilinear, aligned corners': resized((29, 40), align_corners=True),
    'bilinear, aligned corners, one row': resized((1, 7), align_corners=True),
    'bilinear, by a factor': scaled((2.3, 1.7)),
    'nearest, larger': resized((29, 40), 'nearest'),
    'nearest, smaller': resized((5, 3), 'nearest'),
    'nearest, by a factor': scaled(1.5, 'nearest'),
    'slice and flip': lambda x: x[:, :, 2:-1, 1:].flip(2, 3),
    'convolution of a flip': lambda x: first(second(x).flip(2)),
    'pooling': lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    'global pooling': lambda x: x * F.adaptive_avg_pool2d(first(x), 1),
    'classes': lambda x: x.squeeze(0).argmax(0, keepdim=True),
    'pyramid': pyramid,
}


@pytest.mark.parametrize('rows', [1, 2, 5, 100])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_results_are_those_of_a_plain_call(name, rows):
    function = FUNCTIONS[name]
    x = torch.randn(1, CHANNELS, 13, 9)
    expected = function(x)
    found = [(part, value.clone()) for part, value in RowProgram(function, [x]).run(rows)]
    assert [i for part, _ in found for i in part] == list(range(expected.shape[-2]))
    torch.testing.assert_close(torch.cat([value for _, value in found], -2), expected)


@pytest.mark.parametrize('height', [1, 2, 3])
def test_maps_of_few_rows(height):
    x = torch.randn(2, CHANNELS, height, 5)
    for name in ('convolution', 'bilinear, larger', 'nearest, larger', 'pooling', 'pyramid'):
        # half of one row is none
        if name == 'pyramid' and height == 1:
            continue
        found = [value.clone() for _, value in RowProgram(FUNCTIONS[name], [x]).run(1)]
        torch.testing.assert_close(torch.cat(found, -2), FUNCTIONS[name](x), msg=name)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('rows', 'result'), [(4099, 16390), (1025, 4097), (4100, 4000)])
def test_rows_far_down_have_the_weights_of_torch(rows, result, align_corners):
    """In float32, another order of rounding changes the weights by 1e-4 there."""
    x = torch.randn(1, 1, rows, 1)
    function = resized((result, 1), align_corners=align_corners)
    found = [value.clone() for _, value in RowProgram(function, [x]).run(1000)]
    torch.testing.assert_close(torch.cat(found, -2), function(x), rtol=0, atol=2e-6)


def test_no_row_is_computed_twice():
    x = torch.randn(1, CHANNELS, 64, 5)
    program = RowProgram(pyramid, [x])
    computed = {}
    call = program._call

    def count(node, rows, held):
        computed[node] = computed.get(node, 0) + len(rows)
        return call(node, rows, held)

    program._call = count
    chunks = list(program._sweep(program.result, [range(i, i + 4) for i in range(0, 64, 4)]))
    assert len(chunks) == 16
    heights = {node: node.meta['val'] for node in computed}
    for node, rows in computed.items():
        value = heights[node]
        value = value[0] if isinstance(value, tuple) else value
        assert rows <= value.shape[-2], node


def test_memory_is_that_of_a_chunk_and_known_before():
    maps = [torch.randn(1, CHANNELS, 512, 32)]
    with LiveBytes() as plain:
        pyramid(*maps)
    program = RowProgram(pyramid, maps)
    expected = program.peak_bytes(16)
    with LiveBytes() as live:
        for _ in program.run(16):
            pass
    assert live.peak < plain.peak / 10
    assert live.largest < plain.largest / 10
    assert abs(expected - live.peak) < 0.2 * live.peak
    # a quarter of the rows: halos stay
    assert program.peak_bytes(4) < 0.6 * expected


def test_the_memory_of_equal_programs_is_counted_once(monkeypatch):
    counted, count_bytes = [], RowProgram._count_bytes

    def count(program, rows):
        counted.append(rows)
        return count_bytes(program, rows)

    monkeypatch.setattr(RowProgram, '_count_bytes', count)
    monkeypatch.setattr(rows_module, '_peaks', {})

    def peak(function=pyramid, width=5, dtype=torch.float32, rows=8):
        maps = [torch.randn(1, CHANNELS, 64, width).to(dtype)]
        return RowProgram(function, maps).peak_bytes(rows)

    first = peak()
    assert peak() == first
    assert counted == [8]
    # what the number depends on
    assert peak(width=10) > first
    assert peak(rows=16) > first
    assert peak(lambda x: torch.cat([x] * 16, 1).relu()) != first
    assert peak(lambda x: x.relu(), dtype=torch.float64) == 2 * peak(lambda x: x.relu())
    assert len(counted) == 6
    # numbers that are not needed any more do not pile up
    monkeypatch.setattr(rows_module, 'MOST_PEAKS', 2)
    for rows in range(1, 6):
        peak(rows=rows)
    assert len(rows_module._peaks) <= 2


@pytest.mark.parametrize(
    ('function', 'name'),
    [
        (lambda x: x.softmax(2), '_softmax'),
        (lambda x: x.transpose(2, 3), 'transpose'),
        (lambda x: x.flatten(2), 'view'),
        (lambda x: torch.cat([x, x], 2), 'cat'),
        (lambda x: F.group_norm(x, 2), 'group_norm'),
        (lambda x: x[:, :, ::2], 'slice'),
        (lambda x: x * x.max().item(), 'aten'),
        (lambda x: x, 'one map'),
    ],
)
def test_other_calls_are_named(function, name):
    with pytest.raises(NotByRowsError, match=name):
        RowProgram(function, [torch.randn(1, CHANNELS, 6, 6)])
