"""The model index and the model pages name every config, and no file that does not exist."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml

from saga_mm.registry import MODELS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def metafile():
    (name,) = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def configs(config_dir):
    return {path.relative_to(ROOT).as_posix() for path in config_dir.glob('*/*.py')}


def test_index_lists_every_config(metafile, configs):
    models = metafile['Models']
    assert {model['Config'] for model in models} == configs
    assert len(models) == len(configs)
    for model in models:
        assert model['Name'] == Path(model['Config']).stem
        assert model['In Collection'] in {item['Name'] for item in metafile['Collections']}


@pytest.fixture
def pages():
    """The text of the page of each method, which is named like the module of the backbone."""
    return {path.stem: path.read_text() for path in (ROOT / 'docs' / 'methods').glob('*.md')}


def test_index_names_the_page_of_each_method(metafile, pages, config_dir):
    named = {collection['README'] for collection in metafile['Collections']}
    assert named == {f'docs/methods/{name}.md' for name in pages}
    index = (config_dir / 'README.md').read_text()
    assert set(re.findall(r'\]\(\.\./docs/methods/(\w+)\.md\)', index)) == pages.keys()


def test_pages_list_every_config(configs, pages):
    links = {
        name: re.findall(r'\]\(\.\./\.\./(configs/\w+/\w+\.py)\)', page)
        for name, page in pages.items()
    }
    assert sorted(itertools.chain(*links.values())) == sorted(configs)
    for name, own in links.items():
        method = name.partition('_')[0]
        assert all(f'_{method}_' in config for config in own)


def test_pages_tell_batch_size(pages, load_config):
    for page in pages.values():
        rows = re.findall(r'\(\.\./\.\./configs/(\S+\.py)\) \| \w+ \| (\d+) x (\d+) \|', page)
        assert rows
        for path, batch, gpus in rows:
            cfg = load_config(path)
            assert int(batch) == cfg.train_dataloader.batch_size
            assert int(batch) * int(gpus) == cfg.auto_scale_lr.base_batch_size


def test_parameter_counts_of_the_pages(pages):
    backbones = {cls.__module__.rpartition('.')[2]: cls for cls in MODELS.module_dict.values()}
    for name, page in pages.items():
        rows = re.findall(r'\| `(\w+)` \|.*\| ([\d.]+)M \|', page)
        assert [arch for arch, _ in rows] == list(backbones[name].arch_settings)
        for arch, millions in rows:
            with torch.device('meta'):
                count = sum(p.numel() for p in backbones[name](arch=arch).parameters())
            assert float(millions) == round(count / 1e6, 1)
