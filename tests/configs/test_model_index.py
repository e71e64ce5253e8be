"""The model index and the model pages name every config, and no file that does not exist."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
import yaml

from saga_mm.registry import MODELS

ROOT = Path(__file__).parents[2]


spec = importlib.util.spec_from_file_location('models', ROOT / 'website/models.py')
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


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


def test_pages_tell_data_batch_size_and_schedule(pages, load_config):
    index = models.costs()
    cells = r'(.+) \| (\d+) x (\d+) \| (\d+)(k?) (epochs|iterations)'
    for page in pages.values():
        rows = re.findall(rf'\(\.\./\.\./configs/(\S+\.py)\) \| {cells}', page)
        assert rows
        for path, data, batch, gpus, length, kilo, unit in rows:
            cfg = load_config(path)
            assert data == index[f'configs/{path}']['Training Data']
            assert int(batch) == cfg.train_dataloader.batch_size
            assert int(batch) * int(gpus) == cfg.auto_scale_lr.base_batch_size
            key = dict(epochs='max_epochs', iterations='max_iters')[unit]
            assert int(length) * (1000 if kilo else 1) == cfg.train_cfg[key]


def test_pages_tell_what_the_index_tells(pages):
    """Run `python website/models.py` if this fails."""
    for page in pages.values():
        assert len(models.ROW.findall(page)) > 10
        assert models.with_costs(page) == page


# those of SoLA-Vision take long, because WKV is many operators
@pytest.mark.parametrize('method', ['saga', 'ravlt'])
def test_index_tells_what_models_cost(method):
    check_costs(f'configs/segmentation/fpn_{method}_t.py')


@pytest.mark.long
def test_index_tells_what_each_model_costs(config_path):
    check_costs(config_path.relative_to(ROOT).as_posix())


def check_costs(config):
    """Run `python website/models.py` if this fails."""
    known = models.costs()[config]
    measured = models.measure(config)
    assert {name: known[name] for name in measured} == measured


def test_parameter_counts_of_the_pages(pages):
    backbones = {cls.__module__.rpartition('.')[2]: cls for cls in MODELS.module_dict.values()}
    for name, page in pages.items():
        rows = re.findall(r'\| `(\w+)` \|.*\| ([\d.]+)M \|', page)
        assert [arch for arch, _ in rows] == list(backbones[name].arch_settings)
        for arch, millions in rows:
            with torch.device('meta'):
                count = sum(p.numel() for p in backbones[name](arch=arch).parameters())
            assert float(millions) == round(count / 1e6, 1)
