"""Every command on every page exists, with its options, in a clone and in an installed package.

The tests of the tools run the commands; this one reads them.
"""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

from saga_mm.__main__ import commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ('*.md', *(f'{folder}/**/*.md' for folder in ('configs', 'docs', 'website')))
    for path in ROOT.glob(pattern)
)
# programs that are no tools of this project
OTHERS = {'cat', 'cd', 'export', 'git', 'make', 'mim', 'pip', 'source', 'trtexec'}
# what only a clone has: programs that develop or measure the project itself
CLONE = re.compile(
    r'tools/(compile_kernels\.py|\w+\.sh)|(tests|website)/[\w/]+\.py|-m (pytest|mkdocs)'
)


def lines_of(text):
    """The commands of a page: in blocks, without what a program reads there, and in sentences."""
    text = text.replace('\\\n', ' ')
    for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL):
        block = re.sub(r"<<'END'\n.*?^END$", '', block, flags=re.DOTALL | re.MULTILINE)
        yield from (line for line in block.splitlines() if not line.startswith('#'))
    text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    for command in re.findall(r'`((?:time )?python [^`]+)`', text):
        if '...' not in command:
            yield command


def statements_of(line):
    """The words of each program that a line runs, without the settings before it."""
    line = re.sub(r'\$\([^)]*\)', 'SUBSTITUTED', line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|<>')
    lexer.whitespace_split = True
    for separates, group in itertools.groupby(lexer, lambda word: word in (';', '&&', '|')):
        words = [part for word in group for part in expanded(word)]
        words = list(itertools.dropwhile(re.compile(r'(\w+=.*|do|time)$').match, words))
        if words and not separates and words[0] not in ('for', 'done'):
            yield words


def expanded(word):
    """What the shell makes of a word with braces, or of a variable with an option."""
    if re.fullmatch(r'\$\w+', word):
        return ['name=value']
    if word == 'OPTIONS':  # those of a table on the page
        return []
    match = re.search(r'(?<!\$)\{([^}]*,[^}]*)\}', word)
    if not match:
        return [word]
    return [f'{word[: match.start()]}{part}{word[match.end() :]}' for part in match[1].split(',')]


def documented():
    found = {}
    for page in PAGES:
        for line in lines_of(page.read_text()):
            for words in statements_of(line):
                found[f'{page.relative_to(ROOT)}: {shlex.join(words)}'] = words
    return found


@pytest.fixture(scope='module')
def parsers():
    """For each tool, the function that reads its arguments."""
    found = {}
    for name, path in commands().items():
        spec = importlib.util.spec_from_file_location(f'documented_{name}', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[name] = module.parse_args
    return found


@pytest.mark.parametrize('words', documented().values(), ids=documented())
def test_documented_commands_exist(words, parsers):
    if 'saga_mm' not in words:
        command = shlex.join(words)
        # the others are programs of the page itself
        assert words[0] in OTHERS or CLONE.search(command) or words[1] in ('-c', '-'), command
        return
    name, *arguments = words[words.index('saga_mm') + 1 :] or ['--help']
    if name == '--help' or '--help' in arguments:
        assert name == '--help' or name in parsers
    elif arguments:
        parsers[name](arguments)
    for config in re.findall(r'saga_mm::([\w/]+\.py)', ' '.join(arguments)):
        assert (ROOT / 'configs' / config).is_file(), config


def test_commands_are_found():
    found = documented()
    assert 'docs/own_data.md: python -m saga_mm train nuclei.py' in found
    assert len([words for words in found.values() if 'saga_mm' in words]) > 90
