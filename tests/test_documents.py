"""Links in the documentation lead somewhere, and the output of commands in it is theirs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# in a wheel, these are side by side in `saga_mm/.mim`
SHIPPED = ('configs', 'docs', 'tools')
PAGES = sorted(
    path
    for pattern in ('*.md', *(f'{name}/**/*.md' for name in (*SHIPPED, 'website')))
    for path in ROOT.glob(pattern)
)
# commands whose output is the same on every machine
PRINTED = re.compile(r'```bash\npython (-m saga_mm flops [^\n]+)\n```\s+```\n(.*?)```', re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_to_files_that_are_shipped_together(page):
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    for link in re.findall(r'\]\(([^)#\s]+)', text):
        if '://' in link:
            continue
        target = (page.parent / link).resolve()
        assert target.exists(), link
        if page.parent != ROOT:
            assert target.relative_to(ROOT).parts[0] in SHIPPED, f'{link} is not in the wheel'


def printed():
    found = {}
    for page in PAGES:
        for i, (command, output) in enumerate(PRINTED.findall(page.read_text())):
            found[f'{page.stem}-{i}'] = command, output
    return found


def test_some_output_is_shown():
    assert 'ravlt-0' in printed()


@pytest.mark.parametrize(('command', 'output'), printed().values(), ids=printed())
def test_output_is_what_the_command_prints(command, output):
    """Paste what the command prints into the page if this fails."""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', *shlex.split(command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == output
