"""Forged checkpoints: programs for the unpickler, built from the opcodes that exist.

Each is read in a separate process, so that a crash of the interpreter is a failed test.
"""

import copy
import itertools
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from saga_mm.checkpoint import CheckpointError, load_file

MARK, TUPLE, REDUCE, NEWOBJ, BUILD = b'(', b't', b'R', b'\x81', b'b'


class Name(str):
    """A class or function, as module and name."""


class Program(bytes):
    """Opcodes that leave one object on the stack."""


def assemble(value):
    """Opcodes that make a value, restricted to those that `torch.save` writes."""
    if isinstance(value, Program):
        return value
    if isinstance(value, Name):
        module, _, name = value.rpartition('.')
        return b'c' + f'{module}\n{name}\n'.encode()
    if isinstance(value, bytes):
        return call(Name('_codecs.encode'), value.decode('latin1'), 'latin1')
    if isinstance(value, tuple):
        return MARK + b''.join(map(assemble, value)) + TUPLE
    if isinstance(value, list):
        return b'](' + b''.join(map(assemble, value)) + b'e'
    if isinstance(value, dict):
        pairs = itertools.chain.from_iterable(value.items())
        return b'}(' + b''.join(map(assemble, pairs)) + b'u'
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 31:
        data = pickle.encode_long(value)
        return b'\x8a' + bytes([len(data)]) + data
    # Without protocol header and memo.
    if isinstance(value, str):
        data = value.encode('utf-8', 'surrogatepass')
        return b'X' + struct.pack('<I', len(data)) + data
    return pickle.dumps(value, 2)[2:-1]


def call(function, *arguments):
    return Program(assemble(function) + assemble(arguments) + REDUCE)


def new(kind, *arguments):
    return Program(assemble(kind) + assemble(arguments) + NEWOBJ)


def build(value, state):
    return Program(assemble(value) + assemble(state) + BUILD)


def write(path, value):
    """A file of torch's format that holds a tensor and a value."""
    storage = Program(assemble(('storage', Name('torch.FloatStorage'), '0', 'cpu', 2)) + b'Q')
    hooks = call(Name('collections.OrderedDict'))
    tensor = call(Name('torch._utils._rebuild_tensor_v2'), storage, 0, (2,), (1,), False, hooks)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', b'\x80\x02' + assemble({'w': tensor, 'x': value}) + b'.')
        archive.writestr('a/byteorder', 'little')
        archive.writestr('a/data/0', struct.pack('<2f', 1, 2))
        archive.writestr('a/version', '3\n')
    return path


CORE = np._core.__name__ if hasattr(np, '_core') else 'numpy.core'
NDARRAY, DTYPE = Name('numpy.ndarray'), Name('numpy.dtype')
RECONSTRUCT, SCALAR = Name(f'{CORE}.multiarray._reconstruct'), Name(f'{CORE}.multiarray.scalar')
HISTORY = Name('mmengine.logging.history_buffer.HistoryBuffer')
GETATTR = Name('builtins.getattr')
NAMES = [
    NDARRAY,
    DTYPE,
    RECONSTRUCT,
    SCALAR,
    HISTORY,
    GETATTR,
    Name('builtins.bytes'),
    Name('numpy.dtypes.Float64DType'),
    Name('numpy.core.multiarray._reconstruct'),
    Name('numpy._core.multiarray.scalar'),
    Name('collections.OrderedDict'),
    Name('collections.Counter'),
    Name('torch.Tensor'),
    Name('torch.Size'),
    Name('torch.nn.parameter.Parameter'),
    Name('torch._utils._rebuild_parameter'),
]
# Eight bytes that are not the address of an object.
POINTER = b'A' * 8


def dtype(code='f8', order='<', rest=(None, None, None, -1, -1, 0), version=3):
    return build(call(DTYPE, code, False, True), (version, order, *rest))


def array(shape=(1,), kind=None, data=POINTER, fortran=False, made=None):
    made = call(RECONSTRUCT, NDARRAY, (0,), b'b') if made is None else made
    return build(made, (1, shape, dtype() if kind is None else kind, fortran, data))


def history(**state):
    series = dict(_log_history=array(), _count_history=array(), max_length=10)
    return build(new(HISTORY), {**series, **state})


# What is wrong with each; the project needs none of them.
FORGED = {
    'array of objects, as a class': call(NDARRAY, (1,), 'O', POINTER),
    'array of objects, new': new(NDARRAY, (1,), 'O', POINTER),
    'array of numbers, as a class': call(NDARRAY, (1,), 'f8', POINTER),
    'reconstructed with elements': call(RECONSTRUCT, NDARRAY, (1,), 'O'),
    'reconstructed as objects': call(RECONSTRUCT, NDARRAY, (0,), b'O'),
    'reconstructed as another class': call(RECONSTRUCT, Name('torch.Tensor'), (0,), b'b'),
    'never built': call(RECONSTRUCT, NDARRAY, (0,), b'b'),
    'objects': array(
        kind=build(call(DTYPE, 'O8', False, True), (3, '|', None, None, None, -1, -1, 63))
    ),
    'objects, as a list': array(data=[1]),
    'too short': array((2,)),
    'too long': array((1,), data=POINTER * 2),
    'negative': array((-1, -1)),
    'huge': array((2**62, 4)),
    'text': array(kind=call(DTYPE, 'S8')),
    'structure': array(kind=call(DTYPE, 'f4,f4')),
    'half a structure': array(kind=call(DTYPE, '((,f4')),
    'no dtype': array(kind=DTYPE),
    'dtype of an array': array(kind=array()),
    'byte order': array(kind=dtype(order='x')),
    'scalar of objects': call(SCALAR, call(DTYPE, 'O8'), POINTER),
    'scalar of a class': call(SCALAR, NDARRAY, POINTER),
    'scalar that is too short': call(SCALAR, dtype(), b''),
    'getattr': call(GETATTR, Name('collections.OrderedDict'), 'update'),
    'getattr of a dunder': call(GETATTR, HISTORY, '__init__'),
    'history with arguments': call(HISTORY, [1.0], [1]),
    'history of objects': history(_log_history=[None]),
    'history of a class': history(_log_history=NDARRAY),
    'history of a matrix': history(_log_history=array((1, 1)), _count_history=array((1, 1))),
    'history of two lengths': history(_count_history=array((2,), data=POINTER * 2)),
    'history without a length': history(max_length=None),
    'history that is too short': history(max_length=0),
    'history, never built': new(HISTORY),
    'bytes of a size': call(Name('builtins.bytes'), 10),
    'a class': Name('torch.Tensor'),
    'a stand-in': NDARRAY,
    'a function': Name('_codecs.encode'),
    'itself': Program(b'}q\x01X\x01\x00\x00\x00ah\x01s'),
    'itself in a list': Program(b']q\x01h\x01a'),
    'very deep': Program(b'(' * 1 + b'N' + b'\x85' * 5000 + b't'),
}


@pytest.mark.parametrize('name', FORGED)
def test_forged_objects_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r'a\.pth (is refused|can not be read)') as error:
        load_file(write(tmp_path / 'a.pth', FORGED[name]))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('code', ['f2', 'f4', 'f8', 'c8', 'i2', 'i8', 'u4', '?'])
@pytest.mark.parametrize('zipped', [True, False])
def test_numbers_of_either_byte_order_are_read(tmp_path, code, order, zipped):
    numbers = np.array([[0, 1, 2], [3, 4, 5]]).astype(np.dtype(code).newbyteorder(order))
    content = {
        'w': torch.ones(1),
        'array': numbers,
        'columns': np.asfortranarray(numbers),
        'number': numbers[1, 2],
        'none': numbers[:0],
    }
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    loaded = load_file(tmp_path / 'a.pth')
    for key in ('array', 'columns', 'number', 'none'):
        assert np.array_equal(loaded[key], content[key]), key
        assert loaded[key].dtype == np.dtype(code), key
        assert loaded[key].dtype.isnative, key
    loaded['array'][0, 0] = 1


def test_flags_of_a_file_change_no_type(tmp_path):
    # flags, fields and subarrays would make objects or structures of numbers
    for order, rest in itertools.product(
        '<>=|',
        [
            (None, None, None, -1, -1, 63),
            (None, ('a',), {'a': (dtype(), 0)}, 8, 1, 0),
            ((dtype(), (1,)), None, None, 8, 1, 63),
        ],
    ):
        loaded = load_file(write(tmp_path / 'a.pth', array(kind=dtype(order=order, rest=rest))))
        assert loaded['x'].dtype == np.float64
        assert loaded['x'].dtype.isnative
        assert not loaded['x'].dtype.hasobject
    assert np.dtype('f8').flags == 0
    assert np.dtype('>f8').flags == 0


def test_statistics_of_a_file_are_not_taken(tmp_path):
    before = dict(HistoryBuffer([1.0], [1])._statistics_methods)
    forged = history(statistics_methods={'mean': call(GETATTR, HISTORY, 'max'), 'new': 3})
    loaded = load_file(write(tmp_path / 'a.pth', forged))['x']
    assert HistoryBuffer._statistics_methods == before
    assert type(loaded) is HistoryBuffer
    loaded.update(2.0)
    assert loaded.statistics('max') == max(2.0, np.frombuffer(POINTER)[0])


def test_what_two_places_share_is_still_shared(tmp_path):
    shared = {'a': [1, 2]}
    weights = OrderedDict(w=torch.ones(2))
    weights._metadata = {'': {'version': 1}}
    torch.save({'w': weights, 'x': shared, 'y': (shared, shared)}, tmp_path / 'a.pth')
    loaded = load_file(tmp_path / 'a.pth')
    assert loaded['y'][0] is loaded['y'][1] is loaded['x']
    assert loaded['w']._metadata == {'': {'version': 1}}


def test_a_file_that_unfolds_without_end_is_read_at_once(tmp_path):
    # 50 lists, each twice in the next one
    value = []
    for _ in range(50):
        value = [value, value]
    torch.save({'w': torch.ones(1), 'x': value}, tmp_path / 'a.pth')
    assert len(load_file(tmp_path / 'a.pth')['x']) == 2


def test_bytes_that_are_used_again_and_again_are_refused(tmp_path):
    # the program keeps one megabyte of bytes, and makes a thousand arrays of it
    data = Program(assemble(b'a' * 2**20) + b'q\x01')
    arrays = [array((2**17,), data=data), *[array((2**17,), data=Program(b'h\x01'))] * 1000]
    with pytest.raises(CheckpointError, match=r'holds .* over the same bytes'):
        load_file(write(tmp_path / 'a.pth', arrays))


def random_value(choose, depth=3):
    """A random value that a file can hold, forged or not."""
    plain = [0, 1, -1, 8, 2**31, 2**63, 2**70, 0.5, True, None, 'O', 'f8', '>f8', 'max', 'b', '']
    plain += [b'', b'b', POINTER, POINTER * 3, (), (0,), (1,), (3,), (-1,), (2**40, 2**40)]
    if depth == 0 or choose.random() < 0.3:
        return choose.choice(plain + NAMES)
    inner = [random_value(choose, depth - 1) for _ in range(choose.randrange(4))]
    rest = [choose.choice([None, -1, 0, 8, 63, *inner]) for _ in range(choose.randrange(8))]
    makers = [
        lambda: call(choose.choice(NAMES), *inner),
        lambda: new(choose.choice(NAMES), *inner),
        lambda: build(random_value(choose, depth - 1), tuple(inner)),
        lambda: build(random_value(choose, depth - 1), random_value(choose, depth - 1)),
        lambda: build(random_value(choose, depth - 1), {'_log_history': inner, 'array': None}),
        lambda: dtype(choose.choice(['f8', 'O8', 'b1', 'V8']), choose.choice('<>=|x'), rest),
        lambda: array(choose.choice(plain), choose.choice([None, DTYPE, *inner])),
        lambda: array((1,), dtype(choose.choice(['O8', 'i8']), '>', rest), *inner[:1]),
        lambda: call(RECONSTRUCT, NDARRAY, *inner),
        lambda: call(SCALAR, dtype(rest=rest), *inner),
        lambda: history(_log_history=random_value(choose, depth - 1)),
        lambda: tuple(inner),
        lambda: list(inner),
    ]
    return choose.choice(makers)()


def use(value):
    """Use a value as training and inference do."""
    for part in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        repr(part)
        str(part)


def read_random_files(folder, seed, number):
    """Runs in its own process. Returns how many of the files were read and how many refused."""
    choose = random.Random(seed)
    counts = [0, 0]
    for _ in range(number):
        path = write(Path(folder, 'a.pth'), random_value(choose))
        try:
            loaded = load_file(path)
        except CheckpointError:
            counts[1] += 1
            continue
        use(loaded['x'])
        counts[0] += 1
    assert np.array([1.0]).dtype.flags == np.dtype('>f8').flags == 0
    print(*counts)


@pytest.mark.parametrize('seed', range(2))
def test_no_program_crashes_the_interpreter(tmp_path, seed):
    script = (
        f'from test_forged import read_random_files as read; read({str(tmp_path)!r}, {seed}, 500)'
    )
    command = [sys.executable, '-W', 'ignore', '-c', script]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    read, refused = map(int, result.stdout.split())
    assert read > 40
    assert refused > 200


def test_further_types_of_training_checkpoints_are_read(tmp_path):
    content = {
        'w': torch.ones(1),
        'args': Namespace(lr=0.1, names=['a']),
        'meta': ConfigDict(a=dict(b=(1, 2))),
        'empty': np.zeros((0, 3)),
    }
    torch.save(content, tmp_path / 'a.pth')
    loaded = load_file(tmp_path / 'a.pth')
    assert loaded['args'] == dict(lr=0.1, names=['a'])
    assert type(loaded['args']) is dict
    assert loaded['meta'] == dict(a=dict(b=(1, 2)))
    assert type(loaded['meta']['a']) is dict
    assert loaded['empty'].shape == (0, 3)
