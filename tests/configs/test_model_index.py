"""The model index and the model page name every config, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

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


def test_pages_list_every_config(configs, config_dir):
    pages = [config_dir / 'README.md', *(ROOT / 'docs/methods').glob('*.md')]
    text = ''.join(page.read_text() for page in pages)
    found = re.findall(r'\]\((?:\.\./\.\./configs/)?(\w+/\w+\.py)\)', text)
    assert {f'configs/{link}' for link in found} == configs


def test_page_tells_batch_size(config_dir, load_config):
    page = (config_dir / 'README.md').read_text()
    rows = re.findall(r'\((\S+\.py)\) \| \w+ \| (\d+) x (\d+) \|', page)
    assert rows
    for path, batch, gpus in rows:
        cfg = load_config(path)
        assert int(batch) == cfg.train_dataloader.batch_size
        assert int(batch) * int(gpus) == cfg.auto_scale_lr.base_batch_size


def test_parameter_counts_of_the_page(config_dir):
    from saga_mm.backbones import SAGA

    page = (config_dir / 'README.md').read_text()
    rows = re.findall(r'\| `(\w+)` \|.*\| ([\d.]+)M \|', page)
    assert [name for name, _ in rows] == list(SAGA.arch_settings)
    for name, millions in rows:
        count = sum(p.numel() for p in SAGA(arch=name).parameters())
        assert float(millions) == round(count / 1e6, 1)
