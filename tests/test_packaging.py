"""The package as users get it: installs, the set-up script, and the commands of the README.

The tests need no network, because the temporary environments see the packages of the environment
that runs the tests.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from saga_mm import __version__, stack

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FILES = ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'model-index.yml')
SHIPPED = ('configs', 'docs', 'tools')
SOURCE_FOLDERS = ('kernels', 'saga_mm', *SHIPPED)


def test_the_version_is_the_same_everywhere():
    assert (
        re.search(r'^version: (.*)$', (ROOT / 'CITATION.cff').read_text(), re.M)[1] == __version__
    )
    latest = re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.M)[1]
    assert latest == __version__


needs_setup = pytest.mark.skipif(
    not Path(sys.prefix, '.setup-stamp').exists(),
    reason='needs the environment that tools/setup_env.sh makes',
)


def clean_environ(**changes):
    """The environment without variables by which packages are found or downloaded elsewhere."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(('PIP_', 'PYTHON', 'STACK', 'VENV', 'TORCH_SPEC', 'MAKE', 'MFLAGS'))
    }
    return {**environ, 'PIP_NO_INDEX': '1', 'OMP_NUM_THREADS': '1', **changes}


def run(*command, **options):
    options.setdefault('env', clean_environ())
    command = [str(part) for part in command]
    streams = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return subprocess.run(command, **streams, **options)


def succeed(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_sources(folder):
    folder.mkdir()
    for name in SOURCE_FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in SOURCE_FOLDERS:
        ignored = shutil.ignore_patterns('__pycache__', '.mim')
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}


def make_environment(folder):
    """Make an environment that sees the packages of this one, except editable ones."""
    succeed(sys.executable, '-m', 'venv', '--without-pip', folder)
    (site,) = folder.glob('lib/python*/site-packages')
    outer = [path for path in sys.path if Path(path).name == 'site-packages']
    (site / 'outer.pth').write_text('\n'.join(outer) + '\n')
    return folder / 'bin' / 'python'


def pip_install(python, *arguments, **options):
    # The saga_mm of the environment that runs the tests is ignored.
    flags = ('--no-deps', '--no-build-isolation', '--ignore-installed')
    return succeed(python, '-m', 'pip', 'install', *flags, *arguments, **options)


@pytest.fixture
def source(tmp_path):
    return copy_sources(tmp_path / 'source')


@pytest.fixture
def python(tmp_path):
    return make_environment(tmp_path / 'environment')


def build_wheel(source, folder):
    flags = ('--no-deps', '--no-build-isolation')
    succeed(sys.executable, '-m', 'pip', 'wheel', *flags, '-w', folder, source)
    (wheel,) = folder.glob('saga_mm-*.whl')
    return wheel


def where_imported(python, folder):
    code = 'import saga_kernels, saga_mm; print(saga_kernels.__file__, saga_mm.__file__, sep="\\n")'
    kernels, saga_mm = succeed(python, '-W', 'ignore', '-c', code, cwd=folder).splitlines()[-2:]
    return Path(kernels), Path(saga_mm)


@pytest.mark.parametrize('kind', ['plain', 'wheel'])
def test_installed_copies_import(kind, source, python, tmp_path):
    target = source if kind == 'plain' else build_wheel(source, tmp_path / 'dist')
    pip_install(python, target)
    shutil.rmtree(source)  # Nothing may be imported from there any more.
    kernels, saga_mm = where_imported(python, tmp_path)
    assert python.parents[1] in kernels.parents
    assert python.parents[1] in saga_mm.parents
    mim = saga_mm.parent / '.mim'
    assert (mim / 'configs/segmentation/upernet_saga_t.py').is_file()
    assert not mim.is_symlink() and not (mim / 'configs').is_symlink()
    if kind == 'wheel':
        commands_work(python, tmp_path, mim / 'configs')


def commands_work(python, folder, configs):
    """Try the package in a folder without any of its files."""
    where = 'import saga_mm; print(saga_mm.configs_dir())'
    assert succeed(python, '-W', 'ignore', '-c', where, cwd=folder).strip() == str(configs)
    (folder / 'mine.py').write_text("_base_ = 'saga_mm::segmentation/upernet_saga_t.py'\n")
    table = succeed(python, '-m', 'saga_mm', 'flops', 'mine.py', '--size', 64, 64, cwd=folder)
    assert '| backbone | ' in table
    command = (python.with_name('saga_mm'), 'flops', 'saga_mm::segmentation/upernet_saga_t.py')
    assert succeed(*command, '--size', 64, 64, cwd=folder) == table


SMALL_RUN = ('train_cfg.max_iters=2', 'train_cfg.val_interval=5', 'train_dataloader.batch_size=2')


@pytest.mark.long
@pytest.mark.parametrize('mim', ['onedl-mim', 'openmim'])
def test_mim_finds_trains_and_runs(mim, source, python, tmp_path):
    settings = {name: value for name, value in os.environ.items() if name.startswith('PIP_')}
    environ = {**clean_environ(DATA_ROOT=str(tmp_path / 'scenes')), **settings}
    if 'PIP_NO_INDEX' not in settings:
        del environ['PIP_NO_INDEX']
    if run(python, '-m', 'pip', 'install', mim, env=environ).returncode:
        pytest.skip(f'pip can not install {mim} here')
    pip_install(python, build_wheel(source, tmp_path / 'dist'))
    make = ('make_scenes', tmp_path / 'scenes', '--train', 4, '--val', 2)
    succeed(python, '-m', 'saga_mm', *make, env=environ, cwd=tmp_path)

    def call(*command):
        return succeed(python.with_name('mim'), *command, env=environ, cwd=tmp_path)

    assert 'sola_vision' in call('search', 'saga_mm')
    options = ('--gpus', 0, '--cfg-options', *SMALL_RUN)
    call('train', 'saga_mm', 'upernet_saga_t_demo.py', '--work-dir', 'work', *options)
    weights = ('--checkpoint', 'work/iter_2.pth')
    assert 'mIoU: ' in call('test', 'saga_mm', 'upernet_saga_t_demo.py', *weights, '--gpus', 0)
    (tmp_path / 'mine.py').write_text("_base_ = 'saga_mm::segmentation/upernet_saga_t.py'\n")
    assert '| backbone | ' in call('run', 'saga_mm', 'get_flops', 'mine.py', '--size', 64, 64)


def test_editable_install_imports_the_source(source, python, tmp_path):
    before = files_in(source)
    pip_install(python, '-e', source)
    assert where_imported(python, tmp_path) == (
        source / 'kernels/saga_kernels/__init__.py',
        source / 'saga_mm/__init__.py',
    )
    commands_work(python, tmp_path, source / 'configs')
    for name in ('configs', 'docs', 'tools', 'model-index.yml'):
        link = source / 'saga_mm/.mim' / name
        assert link.is_symlink()
        assert link.resolve() == source / name
    left = [Path(name).parts for name in files_in(source) - before]
    expected = {'.mim', '__pycache__', 'saga_mm.egg-info'}
    assert not [parts for parts in left if expected.isdisjoint(parts)]

    pip_install(python, '-e', source)  # The links exist already.


def test_wheel_holds_both_packages_and_what_openmim_looks_for(source, tmp_path):
    before = files_in(source)
    wheel = build_wheel(source, tmp_path / 'dist')
    packed = set(zipfile.ZipFile(wheel).namelist())

    expected = {f'saga_mm/{name}' for name in files_in(source / 'saga_mm')}
    expected |= {f'saga_kernels/{name}' for name in files_in(source / 'kernels/saga_kernels')}
    mim = {f'{folder}/{name}' for folder in SHIPPED for name in files_in(source / folder)}
    expected |= {f'saga_mm/.mim/{name}' for name in mim | {'model-index.yml'}}
    # for OneDL's MIM, which takes the first folder of the sorted files, commands among them
    used = {name for name in mim if not name.startswith('docs/') and not name.endswith('.md')}
    expected |= {f'+saga_mm/.mim/{name}' for name in used | {'model-index.yml'}}
    assert {name for name in packed if '.dist-info/' not in name} == expected
    assert any(name.endswith('licenses/LICENSE') for name in packed)

    # The only new folders in the source are those of setuptools.
    left = {name.split('/')[0] for name in files_in(source) - before}
    assert left <= {'build', 'saga_mm.egg-info'}


def test_a_second_wheel_forgets_what_was_removed(source, tmp_path):
    build_wheel(source, tmp_path / 'first')
    (source / 'configs/segmentation/upernet_saga_t.py').unlink()
    (source / 'saga_mm/stack.py').unlink()
    packed = zipfile.ZipFile(build_wheel(source, tmp_path / 'second')).namelist()
    assert not [name for name in packed if name.endswith(('/upernet_saga_t.py', '/stack.py'))]


def test_kernels_is_a_source_root_and_no_package():
    # As a package, it would shadow another of that name wherever this root is on sys.path.
    assert not (ROOT / 'kernels/__init__.py').exists()
    assert (ROOT / 'kernels/saga_kernels/__init__.py').exists()


# Commands


def readme_commands():
    readme = (ROOT / 'README.md').read_text()
    blocks = re.findall(r'```bash\n(.*?)```', readme, flags=re.DOTALL)
    return [line.split('#')[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize('target', ['setup', 'demo', 'test', 'test-all', 'test-stack', 'lint'])
def test_each_command_sets_up_first(target):
    steps = succeed('make', '-n', target, cwd=ROOT).splitlines()
    assert steps[0] == 'tools/setup_env.sh'
    documents = [(ROOT / name).read_text() for name in ('README.md', 'CONTRIBUTING.md')]
    assert any(f'make {target}' in text for text in documents)


def test_the_readme_names_the_commands():
    assert {'make demo', 'make test'} <= set(readme_commands())
    assert '`make test-all`' in (ROOT / 'README.md').read_text()


def test_only_the_long_tests_are_left_out():
    assert "-m 'not long'" in succeed('make', '-n', 'test', cwd=ROOT)
    steps = succeed('make', '-n', 'test-all', 'STACK=openmmlab', cwd=ROOT)
    assert 'long' not in steps


def test_all_tests_end_with_those_of_the_original_packages():
    steps = succeed('make', '-n', 'test-all', cwd=ROOT).splitlines()
    everything, *_, some = (step for step in steps if ' -m pytest ' in step)
    assert ' .venv/bin/python ' in everything and 'long' not in everything
    assert ' .venv-openmmlab/bin/python ' in some
    paths = [part for part in some.split() if part.startswith('tests/')]
    assert 'tests/configs' in paths
    assert all((ROOT / path).exists() for path in paths)


@pytest.fixture
def recording_make(tmp_path):
    """A folder for the PATH, whose `make` prints how it was called."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    make = folder / 'make'
    make.write_text(
        '#!/bin/sh\necho "in $PWD: make $*; links: $PIP_FIND_LINKS"\nexit ${MAKE_STATUS:-0}\n'
    )
    make.chmod(0o755)
    return f'{folder}{os.pathsep}{os.environ["PATH"]}'


@pytest.mark.parametrize('known', ['', '/some/wheels'])
def test_ci_runs_all_tests_with_the_wheels_at_hand(known, recording_make, tmp_path):
    wheels = tmp_path / 'wheels'
    wheels.mkdir()
    environ = clean_environ(PATH=recording_make, WHEELHOUSE=str(wheels), PIP_CONFIG_FILE=os.devnull)
    environ |= {'PIP_FIND_LINKS': known}
    result = run(ROOT / '.ci/run', cwd=tmp_path, env=environ)
    links = f'{known} {wheels}'.strip()
    assert result.returncode == 0
    commands = ['make test', 'make test-stack STACK=openmmlab']
    assert result.stdout.splitlines() == [f'in {ROOT}: {x}; links: {links}' for x in commands]
    readme = (ROOT / 'README.md').read_text()
    assert 'what a server runs: ' + ' and '.join(f'`{x}`' for x in commands) in readme

    failed = run(ROOT / '.ci/run', cwd=tmp_path, env={**environ, 'MAKE_STATUS': '7'})
    assert failed.returncode == 7
    assert len(failed.stdout.splitlines()) == 1


def test_ci_needs_no_wheels(recording_make, tmp_path):
    environ = clean_environ(PATH=recording_make, WHEELHOUSE=str(tmp_path / 'nothing'))
    result = run(ROOT / '.ci/run', env={**environ, 'PIP_FIND_LINKS': '/some/wheels'})
    assert result.stdout.splitlines()[0] == f'in {ROOT}: make test; links: /some/wheels'


# The set-up script


def setup_in(folder, **environ):
    return run('bash', folder / 'tools/setup_env.sh', env=clean_environ(**environ))


def error_of(result):
    assert result.returncode not in (0, None)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(('setup: error: ', 'error: '))
    return lines[0]


def fake_python(path, version):
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit\nexit 1\n')
    path.chmod(0o755)
    return path


def bare_path(folder):
    """A folder for the PATH with the programs that the script needs, but no Python or compiler."""
    folder.mkdir()
    always = (
        'bash cat cksum dirname basename find getconf grep head mkdir mktemp mv rm sed tail tar'
    )
    for name in (*always.split(), 'flock', 'nproc', 'uname'):
        if program := shutil.which(name):
            (folder / name).symlink_to(program)
    return folder


def test_unknown_stack(source):
    assert "unknown STACK 'torchvision'" in error_of(setup_in(source, STACK='torchvision'))


@pytest.mark.parametrize('version', ['3.9.18', '3.13.0'])
def test_unsupported_python(version, source, tmp_path):
    error = error_of(setup_in(source, PYTHON=str(fake_python(tmp_path / 'python', version))))
    assert 'Python 3.10 to 3.12 is needed' in error
    assert version in error
    assert not (source / '.venv').exists()


def test_no_supported_python_on_the_path(source, tmp_path):
    programs = bare_path(tmp_path / 'bin')
    fake_python(programs / 'python3', '3.13.0')
    error = error_of(setup_in(source, PATH=str(programs)))
    assert 'Python 3.10 to 3.12 is needed' in error
    assert '3.13.0' in error


def test_a_folder_with_other_things_is_left_alone(source, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes.txt').touch()
    error = error_of(setup_in(source, VENV=str(tmp_path / 'mine'), PYTHON=sys.executable))
    assert 'no virtual environment' in error
    assert [path.name for path in (tmp_path / 'mine').iterdir()] == ['notes.txt']


@pytest.fixture
def installed_stack():
    return 'onedl' if stack.providers()['mmcv'] == {'onedl-mmcv'} else 'openmmlab'


@needs_setup
def test_missing_compiler(source, python, tmp_path, installed_stack):
    # No index has this version, so pip finds no wheel, and the script would have to compile it.
    settings = source / 'pyproject.toml'
    settings.write_text(re.sub(r'mmcv==[\d.]+', 'mmcv==0.0.1', settings.read_text()))
    programs = bare_path(tmp_path / 'bin')
    environ = dict(STACK=installed_stack, VENV=str(python.parents[1]), TORCH_SPEC='keep', CXX='')
    error = error_of(setup_in(source, PATH=str(programs), **environ))
    assert "there is no C++ compiler 'c++'" in error
    # without it, the `pip` of an activated environment would be that of another Python
    assert f'sys.executable: {python}' in succeed(python.with_name('pip'), 'debug')


# Takes the place of mmcv's build: the first one is killed when one of two objects exists.
BUILD_KILLED_ONCE = """
import sys
from pathlib import Path
from setuptools import setup

if 'bdist_wheel' in sys.argv:
    print('[1/2] c++ first.cpp', flush=True)
    if not Path('first.o').exists():
        Path('first.o').touch()
        sys.exit('c++: killed')
    print('[2/2] c++ second.cpp', flush=True)
setup(name='{name}', version='0.0.1', packages=['mmcv'])
"""


def fake_mmcv(folder, name):
    """A folder for PIP_FIND_LINKS with a source of mmcv and no wheel."""
    source = folder / f'{name.replace("-", "_")}-0.0.1'
    (source / 'mmcv').mkdir(parents=True)
    (source / 'setup.py').write_text(BUILD_KILLED_ONCE.format(name=name))
    (source / 'mmcv/__init__.py').touch()
    (source / 'mmcv/ops.py').write_text(
        'def nms(boxes, scores, iou_threshold): return boxes[:1], None\n'
    )
    (folder / 'links').mkdir()
    archive = folder / 'links' / f'{source.name}.tar.gz'
    succeed('tar', '-czf', archive, '-C', folder, source.name)
    return folder / 'links'


@needs_setup
def test_a_killed_build_goes_on_and_its_wheel_is_kept(source, python, tmp_path, installed_stack):
    settings = source / 'pyproject.toml'
    settings.write_text(re.sub(r'mmcv==[\d.]+', 'mmcv==0.0.1', settings.read_text()))
    compiler = tmp_path / 'c++'
    compiler.write_text('#!/bin/sh\n')
    compiler.chmod(0o755)
    environ = dict(
        STACK=installed_stack,
        VENV=str(python.parents[1]),
        TORCH_SPEC='keep',
        CXX=str(compiler),
        PIP_FIND_LINKS=str(
            fake_mmcv(tmp_path, 'onedl-mmcv' if installed_stack == 'onedl' else 'mmcv')
        ),
    )
    killed = setup_in(source, **environ)
    assert killed.returncode != 0
    assert 'about 12 minutes' in killed.stdout
    assert 'c++: killed' in killed.stderr
    assert 'the lines above are from .cache/build/' in killed.stderr.splitlines()[-1]

    resumed = setup_in(source, **environ)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert 'setup: 1 of 2 files compiled' in resumed.stdout
    assert len(list(source.glob('.cache/wheels/*/*mmcv-0.0.1-*.whl'))) == 1
    assert not [path for path in source.glob('.cache/build/*') if path.is_dir()]

    (ops,) = python.parents[1].glob('lib/python*/site-packages/mmcv/ops.py')
    ops.unlink()
    repaired = setup_in(source, **environ)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert 'building it' not in repaired.stdout
    assert ops.exists()


@needs_setup
def test_setup_completes_repeats_and_repairs(source, python, installed_stack):
    environ = dict(STACK=installed_stack, VENV=str(python.parents[1]), TORCH_SPEC='keep')

    def ready(result):
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.splitlines()[-1].startswith('setup: ready: ')
        return result.stdout

    assert 'Successfully installed saga_mm' in ready(setup_in(source, **environ))
    assert len(ready(setup_in(source, **environ)).splitlines()) == 1

    # As if pip had been killed.
    (info,) = python.parents[1].glob('lib/python*/site-packages/saga_mm-*.dist-info')
    (info / 'RECORD').unlink()
    assert 'is incomplete: installing it again' in ready(setup_in(source, **environ))
    assert (info / 'RECORD').exists()

    other = 'openmmlab' if installed_stack == 'onedl' else 'onedl'
    assert 'holds another stack' in error_of(setup_in(source, **{**environ, 'STACK': other}))

    add_distribution(info.parent, 'mmcv-from-elsewhere', 'mmcv')
    assert 'mmcv-from-elsewhere' in error_of(setup_in(source, **environ))


# Two distributions behind one import name


def add_distribution(folder, name, package, declared=False):
    info = folder / f'{name}-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (info / 'RECORD').write_text(f'{package}/__init__.py,,\n')
    (folder / package).mkdir(exist_ok=True)
    (folder / package / '__init__.py').touch()
    if declared:  # As build back ends do that write a top_level.txt.
        (info / 'top_level.txt').write_text(f'docs\n{package}\n')
        (info / 'RECORD').write_text('')


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / 'site'
    folder.mkdir()
    monkeypatch.setattr(sys, 'path', [str(folder)])
    return folder


def test_this_environment_holds_one_stack():
    stack.check_stack()


def test_one_distribution_per_name_is_fine(site):
    add_distribution(site, 'onedl-mmcv', 'mmcv')
    add_distribution(site, 'mmdet', 'mmdet')
    add_distribution(site, 'opencv-python', 'cv2')
    add_distribution(site, 'opencv-python-headless', 'cv2')
    stack.check_stack()
    found = {name: names for name, names in stack.providers().items() if names}
    assert found == {'mmcv': {'onedl-mmcv'}, 'mmdet': {'mmdet'}}


@pytest.mark.parametrize('declared', [False, True])
@pytest.mark.parametrize('package', stack.IMPORT_NAMES)
def test_two_distributions_are_an_error_that_names_both(package, declared, site):
    add_distribution(site, 'the-original', package, declared)
    add_distribution(site, 'the-fork', package)
    with pytest.raises(stack.StackError) as error:
        stack.check_stack()
    message = str(error.value)
    assert f'{package}: the-fork and the-original' in message
    assert 'pip uninstall -y the-fork the-original' in message
    assert '\n' not in message
