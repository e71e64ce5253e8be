"""The site of the documentation has every page, and is built without warnings."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import saga_kernels
import saga_mm
import saga_mm.analysis
import saga_mm.apis
import saga_mm.attention

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / 'mkdocs.yml').read_text())
# pages that website/hooks.py adds from the folders above docs/
ADDED = {'index.md', 'changelog.md', 'contributing.md', 'configs/index.md'}


def pages_of(nav):
    """The pages that a menu names, with those of its submenus."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from pages_of(value)
        else:
            yield value


def test_menu_names_every_page_once():
    written = {
        path.relative_to(folder).as_posix()
        for folder in (ROOT / 'docs', ROOT / 'website')
        for path in folder.glob('**/*.md')
    }
    assert sorted(pages_of(CONFIG['nav'])) == sorted(written | ADDED)


@pytest.mark.parametrize(
    'module', [saga_mm, saga_mm.analysis, saga_mm.apis, saga_mm.attention, saga_kernels]
)
def test_reference_has_every_public_function_and_class(module):
    pages = (path.read_text() for path in ROOT.glob('website/reference/*.md'))
    shown = {name for page in pages for name in re.findall('^::: (.+)$', page, re.MULTILINE)}
    names = [name for name in module.__all__ if callable(getattr(module, name))]
    public = {f'{module.__name__}.{name}' for name in names}
    assert public and public <= shown


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    needed = ('latex2mathml', 'material', 'mkdocs', 'mkdocstrings')
    if not all(find_spec(name) for name in needed):
        pytest.skip('needs the extra `docs`')
    folder = tmp_path_factory.mktemp('site')
    result = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', folder],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder


def html_of(site, page):
    path = site / page.removesuffix('index.md').removesuffix('.md') / 'index.html'
    return path.read_text()


@pytest.mark.parametrize('page', list(pages_of(CONFIG['nav'])))
def test_page_is_built_as_written(page, site):
    text = re.sub(r'<(pre|code).*?</\1>', '', html_of(site, page), flags=re.DOTALL)
    assert '<h1' in text
    # what Markdown leaves as it is when a fence, a table, a formula or a directive is malformed
    for unread in ('```', '|---', ':math:', '.. math', ':::', 'class="arithmatex"'):
        assert unread not in text


def test_operators_have_their_formulas(site):
    assert html_of(site, 'reference/kernels.md').count('<math') > 10


def test_files_that_pages_link_to_have_pages(site):
    page = site / 'files/configs/segmentation/upernet_saga_t.py/index.html'
    assert '_base_' in page.read_text()
