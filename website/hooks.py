"""Hooks of MkDocs: pages from outside of docs/, links between them, and formulas.

Pages link to files of the repository, so that the same text works in a clone, in an installed
package and here.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# where the pages are that are not in docs/, whose paths on the site are those below docs/
ELSEWHERE = {
    'README.md': 'index.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'configs/README.md': 'configs/index.md',
    'website/site.css': 'site.css',
    **{
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / 'website').as_posix()
        for path in ROOT.glob('website/reference/*.md')
    },
}
LANGUAGES = {'.cff': 'yaml', '.py': 'python', '.sh': 'bash', '.yml': 'yaml'}
FENCED = re.compile(r'(^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$)', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'(?<=\]\()([^)\s#]+)')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and a page for each file that a page links to."""
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    unread = [file for file in files.documentation_pages() if not file.inclusion.is_excluded()]
    while unread:
        page = unread.pop()
        for source in _targets(page.content_string, _source(page.src_uri)):
            target = _target(source)
            if files.get_file_from_path(target) is None and (ROOT / source).exists():
                added = File.generated(config, target, content=_shown(source))
                files.append(added)
                unread.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links to files of the repository lead to their pages."""
    uri = page.file.src_uri
    source = _source(uri)

    def relink(match: re.Match) -> str:
        link = match[1]
        if '://' in link:
            return link
        target = _target(_resolve(link, source))
        return posixpath.relpath(target, posixpath.dirname(uri))

    return _outside_fences(markdown, lambda text: LINK.sub(relink, text))


def on_page_content(content: str, **_: object) -> str:
    """Write formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match) -> str:
        display = 'block' if match[1] == 'div' else 'inline'
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(formula, content)


def _source(uri: str) -> str:
    """The path in the repository of what is at a path of the site."""
    if uri.startswith('files/'):
        return uri.removeprefix('files/').removesuffix('.md')
    return {target: source for source, target in ELSEWHERE.items()}.get(uri, f'docs/{uri}')


def _target(source: str) -> str:
    """The path on the site of what is at a path in the repository."""
    if source in ELSEWHERE:
        return ELSEWHERE[source]
    path = Path(source)
    if path.parts[0] == 'docs' and path.suffix in ('.md', '.png'):
        return source.removeprefix('docs/')
    return f'files/{source}.md'


def _resolve(link: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _targets(markdown: str, source: str) -> Iterator[str]:
    """Files and folders of the repository that a page links to."""
    for link in LINK.findall(FENCED.sub('', markdown)):
        if '://' not in link:
            yield _resolve(link, source)


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    # split by a pattern with two groups: text, fenced block, its fence, text, ...
    parts = FENCED.split(markdown)
    parts[::3] = map(change, parts[::3])
    del parts[2::3]
    return ''.join(parts)


def _shown(source: str) -> str:
    """The page of a file, with its text, or of a folder, with links to what is in it."""
    path = ROOT / source
    lines = ['---', 'search:', '  exclude: true', 'hide: [toc]', '---', '', f'# {source}', '']
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
        shown = [name for name in names if Path(name).suffix in ('', '.md', '.py', '.sh')]
        lines += [f'- [{name}]({path.name}/{name})' for name in shown if name != '__pycache__']
    else:
        language = LANGUAGES.get(path.suffix, 'text')
        lines += [f'````````{language}', path.read_text().rstrip(), '````````']
    return '\n'.join(lines) + '\n'
