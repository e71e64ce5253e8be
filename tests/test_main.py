"""`saga_mm` as a command and as a Python package, and its messages where parts are missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import saga_mm
from saga_mm import __main__ as command
from saga_mm.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / name for name in ('README.md', 'CHANGELOG.md', 'configs/README.md')]
TEXTS += sorted(ROOT.glob('docs/**/*.md'))


def run_python(code, *arguments):
    process = [sys.executable, '-W', 'ignore', '-c', code, *arguments]
    return subprocess.run(process, capture_output=True, text=True, check=False)


def test_each_tool_is_a_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['saga_mm', '--help'])
    command.main()
    listed = re.findall(r'^  (\w+) +(.+)$', capsys.readouterr().out, re.MULTILINE)
    tools = {path.stem for path in (ROOT / 'tools').glob('*.py')} - {'compile_kernels'}
    assert {name for name, _ in listed} == tools | set(command.ALIASES)


def test_a_command_takes_the_options_of_its_tool(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['saga_mm', 'flops', '--help'])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith('usage: saga_mm flops [-h] [--size H W]')


def test_a_mistyped_command_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['saga_mm', 'trian', 'config.py'])
    with pytest.raises(SystemExit) as end:
        command.main()
    expected = "error: there is no command 'trian': did you mean `saga_mm train`?"
    assert end.value.code == expected


def documented_names():
    text = '\n'.join(path.read_text() for path in TEXTS)
    return sorted(set(re.findall(r'\bsaga_mm\.([A-Za-z_]\w*(?:\.\w+)?)', text)) - {'NAME', 'timm'})


def test_documented_names_exist():
    names = documented_names()
    assert {'SAGA', 'MaskedDetDataPreprocessor', 'FiniteCheckHook', 'apis.train'} <= set(names)
    # in a new process, where nothing has imported the subpackages
    code = f'import pkgutil\nfor name in {names}: pkgutil.resolve_name(f"saga_mm.{{name}}")'
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_registered_names_are_those_of_python():
    names = {name: found for registry in REGISTRIES for name, found in registry.module_dict.items()}
    assert {'SAGA', 'RAVLT', 'SoLAVision', 'AtomicCheckpointHook'} <= names.keys()
    for name, found in names.items():
        assert getattr(saga_mm, name) is found
        assert name in dir(saga_mm)
    with pytest.raises(AttributeError, match="module 'saga_mm' has no attribute 'SAGE'"):
        saga_mm.SAGE  # noqa: B018


def test_import_is_cheap():
    code = """
import sys, saga_mm
heavy = 'matplotlib', 'mmdet', 'mmseg', 'skimage', 'timm'
print([name for name in heavy if name in sys.modules], 'saga_mm.apis' in sys.modules)
"""
    # mmengine imports matplotlib where it is
    assert run_python(code).stdout.strip() in ('[] False', "['matplotlib'] False")


@pytest.mark.parametrize('package', ['mmcv', 'mmengine'])
def test_a_missing_stack_is_named(package):
    # as Python itself names a package that is not there
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {package!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
import saga_mm
"""
    last = run_python(code).stderr.strip().splitlines()[-1]
    assert last.startswith('ModuleNotFoundError: saga_mm needs mmengine and mmcv, and there is no ')
    assert f'there is no {package}: ' in last and "'saga_mm[onedl]'" in last


@pytest.mark.parametrize(
    'arguments',
    [
        ('flops', 'saga_mm::detection/mask_rcnn_saga_t.py', '--size', '64', '64'),
        ('train', 'saga_mm::detection/mask_rcnn_saga_t_demo.py', '--work-dir'),
    ],
)
def test_an_mmcv_without_ops_is_named(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[-1] == '--work-dir':
        arguments += (str(tmp_path / 'work'),)
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from saga_mm.__main__ import main
main()
"""
    result = run_python(code, *arguments)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r'error: (onedl-)?mmcv has no compiled ops \(mmcv\._ext\)', last)
    assert re.search(r'--no-build-isolation .* (onedl-)?mmcv==[\d.]+`$', last)
