"""What each package may import, and that it works without packages that it does not need.

1. saga_kernels imports torch, and triton in each op's kernel.py, in tiles.py, which these share,
   and in interpreter.py; all are imported lazily.
2. saga_mm.attention and saga_mm.layers import torch and saga_kernels.
3. Nothing in saga_mm imports mmdet or mmseg at module level.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {'saga_kernels': ROOT / 'kernels', 'saga_mm': ROOT}


def modules(package):
    """Yields (module name, path) of everything in a package, given as a dotted name."""
    root = SOURCE_ROOTS[package.partition('.')[0]]
    folder = root / package.replace('.', '/')
    assert folder.is_dir(), folder
    for path in sorted(folder.rglob('*.py')):
        if '.mim' not in path.parts:
            module = '.'.join(path.relative_to(root).with_suffix('').parts)
            yield module.removesuffix('.__init__'), path


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Yields (imported module, whether only when a function runs), relative imports resolved."""
    parents = module.split('.') if is_package else module.split('.')[:-1]

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = '.'.join([*base, *filter(None, [node.module])])
            # `from . import x` imports a module of that name
            yield from ((f'{base}.{alias.name}', lazy) for alias in node.names)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), lazy=False)


def imports_of(package):
    for module, path in modules(package):
        for name, lazy in imports(path.read_text(), module, path.name == '__init__.py'):
            yield module, name, lazy


def within(name, *packages):
    return any(name == package or name.startswith(f'{package}.') for package in packages)


def is_stdlib(name):
    return name.partition('.')[0] in sys.stdlib_module_names


def test_the_walker_sees_every_kind_of_import():
    source = """
import os.path as p, mmdet
from . import b
from ..c.d import e as f
if p:
    try:
        from mmseg.models import g
    except ImportError:
        pass
class C:
    import in_class
    def method(self):
        from mmdet.apis import h
"""
    assert list(imports(source, 'top.sub.a', is_package=False)) == [
        ('os.path', False),
        ('mmdet', False),
        ('top.sub.b', False),
        ('top.c.d.e', False),
        ('mmseg.models.g', False),
        ('in_class', False),
        ('mmdet.apis.h', True),
    ]
    assert list(imports('from .x import y', 'top.sub', is_package=True)) == [('top.sub.x.y', False)]


def test_kernels_import_torch_and_triton_only():
    allowed = ('torch', 'triton', 'saga_kernels')
    assert not [
        (module, name)
        for module, name, _ in imports_of('saga_kernels')
        if not within(name, *allowed) and not is_stdlib(name)
    ]


def test_triton_is_imported_in_kernel_modules_only_and_those_lazily():
    triton_modules = {'kernel', 'tiles', 'interpreter', 'starter'}
    for module, name, lazy in imports_of('saga_kernels'):
        is_kernel = module.rpartition('.')[2] in triton_modules
        assert is_kernel or not within(name, 'triton'), f'{module} imports {name}'
        imports_kernel = triton_modules & set(name.split('.'))
        assert is_kernel or lazy or not imports_kernel, f'{module} imports {name} at module level'


@pytest.mark.parametrize('package', ['saga_mm.attention', 'saga_mm.layers', 'saga_mm.inference'])
def test_attention_layers_and_inference_import_torch_and_kernels_only(package):
    allowed = 'torch', 'saga_kernels', 'saga_mm.attention', 'saga_mm.layers', 'saga_mm.inference'
    assert not [
        (module, name)
        for module, name, _ in imports_of(package)
        if not within(name, *allowed) and not is_stdlib(name)
    ]


# From bottom to top: each room may import only those before it.
ROOMS = [
    *(
        'shipped',
        'stack',
        'registry',
        'transforms',
        'datasets',
        'preprocessors',
        'layers',
        'attention',
    ),
    *(
        'inference',
        'checkpoint',
        'backbones',
        'engine',
        'cli',
        'apis',
        'own_data',
        'analysis',
        'timm',
        '__main__',
    ),
]


def test_no_import_points_up():
    rooms = {module.split('.')[1] for module, _ in modules('saga_mm') if '.' in module}
    assert rooms == set(ROOMS)
    for module, name, _ in imports_of('saga_mm'):
        (_, room, *_), (_, other, *_) = (f'{path}..'.split('.') for path in (module, name))
        if within(name, 'saga_mm') and room and other in rooms:
            assert ROOMS.index(other) <= ROOMS.index(room), f'{module} imports {name}'


def test_saga_mm_imports_mmdet_and_mmseg_lazily_only():
    assert not [
        (module, name)
        for module, name, lazy in imports_of('saga_mm')
        if within(name, 'mmdet', 'mmseg') and not lazy
    ]


def test_no_tool_imports_another():
    tools = {path.stem for path in (ROOT / 'tools').glob('*.py')}
    assert not [
        (path.name, name)
        for path in (ROOT / 'tools').glob('*.py')
        for name, _ in imports(path.read_text(), path.stem, is_package=False)
        if within(name, *tools)
    ]


# None makes an import fail, and importlib.util.find_spec() find nothing.
BLOCKER = 'import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n'


def run_without(blocked, code, cwd):
    environ = {name: value for name, value in os.environ.items() if name != 'SAGA_KERNELS_IMPL'}
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', BLOCKER.format(blocked=blocked) + code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environ, 'OMP_NUM_THREADS': '1'},
    )
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks(tmp_path):
    with pytest.raises(AssertionError, match='import of mmseg halted'):
        run_without(['mmseg'], 'import mmseg', tmp_path)


def test_kernels_run_without_triton_and_openmmlab(tmp_path):
    code = """
import torch
from saga_kernels import gated_linear_attention, linear_attention

x = torch.randn(1, 6, 5, 2, 4, requires_grad=True)
out = gated_linear_attention(x)
assert out.shape == (1, 6, 2, 4)
assert linear_attention(x[:, :, :3]).shape == (1, 6, 2, 4)
out.sum().backward()
assert x.grad.isfinite().all()
"""
    run_without(['triton', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'saga_mm'], code, tmp_path)


SAGA_RUNS = """
arch = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
maps = {registry}.build(dict(type='saga_mm.SAGA', arch=arch))(torch.randn(1, 3, 40, 72))
shapes = [tuple(m.shape) for m in maps]
assert shapes == [(1, 8, 10, 18), (1, 8, 5, 9), (1, 16, 3, 5), (1, 16, 2, 3)], shapes
"""


@pytest.mark.parametrize(
    ('blocked', 'toolbox'),
    [
        (['mmdet'], 'mmseg'),
        (['mmseg'], 'mmdet'),
        (['mmdet', 'mmseg', 'triton', 'skimage', 'matplotlib'], 'mmengine'),
    ],
)
def test_saga_runs_with_one_toolbox_or_none(blocked, toolbox, tmp_path):
    code = f"""
import torch
import saga_mm
import {toolbox}.registry
# torch's own FLOP counter imports triton where there is one
loaded = {{name for name in ('mmdet', 'mmseg', 'skimage') if sys.modules.get(name)}}
assert loaded <= {{'{toolbox}'}}, loaded
"""
    run_without(blocked, code + SAGA_RUNS.format(registry=f'{toolbox}.registry.MODELS'), tmp_path)
