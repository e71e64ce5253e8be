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


def numbers(cell):
    """The numbers of a table's cell, such as '1.89, 43.8 / 40.0', of which there may be none."""
    return [float(number) for number in re.findall(r'\d+\.\d+', cell)]


def published(pages):
    """Of each config, the numbers of its authors that the pages tell."""
    ravlt = (
        *('classifier_ravlt_{}', 'mask_rcnn_ravlt_{}', 'mask_rcnn_ravlt_{}_3x'),
        *('retinanet_ravlt_{}', 'cascade_mask_rcnn_ravlt_{}_3x', 'upernet_ravlt_{}'),
        'fpn_ravlt_{}',
    )
    sola = 'classifier_sola_vision_{}', 'mask_rcnn_sola_vision_{}', 'upernet_sola_vision_{}'
    found = {}
    table = pages['ravlt'].partition('Published by the authors')[2].partition('\n## ')[0]
    for size, cells in re.findall(r'^\| RAVLT-(\w) (\|.*\|)$', table, re.M):
        for name, cell in zip(ravlt, cells.strip('|').split('|'), strict=True):
            found[name.format(size.lower())] = numbers(cell)
    for size, cells in re.findall(r'\n\| (\w) \| [\d.]+M \|(.*)\|', pages['sola_vision']):
        for name, cell in zip(sola, cells.split('|'), strict=True):
            # the first number is that of FLOPs
            found[name.format(size.lower())] = numbers(cell)[1:]
    return {name: values for name, values in found.items() if values}


def measured():
    """Of each config, what the page on small runs reports of it."""
    page = (ROOT / 'docs/benchmarks/learning.md').read_text()
    found = {}
    rows = re.findall(r'^\|[^|]*\| `(\w+)\.py`[^|]*\|.*\| (.* mIoU|.* AP .*) \|', page, re.M)
    for name, result in rows:
        aps = re.findall(r'(?:box|mask) AP (\d+\.\d)', result)
        found[name] = [float(value) for value in aps or re.findall(r'(\d+\.\d) mIoU', result)]
    return found


@pytest.mark.parametrize('origin', ['published', 'measured here'])
def test_index_tells_results_by_their_origin(metafile, pages, origin):
    expected = published(pages) if origin == 'published' else measured()
    assert len(expected) > 4
    found = {}
    for model in metafile['Models']:
        for result in model.get('Results', ()):
            assert result['Dataset'] == model['Metadata']['Training Data']
            for metric, value in result['Metrics'].items():
                assert metric.endswith((' (published)', ' (measured here)'))
                if metric.endswith(f' ({origin})'):
                    found.setdefault(model['Name'], []).append(value)
    names = {model['Name'] for model in metafile['Models']}
    assert found == {name: values for name, values in expected.items() if name in names}


def test_index_names_the_weights_of_the_authors_as_theirs(metafile):
    weights = {model['Name']: model for model in metafile['Models'] if 'Weights' in model}
    assert len(weights) == 19
    assert all('_ravlt_' in name for name in weights)
    urls = {model['Weights'] for model in weights.values()}
    assert len(urls) == len(weights)
    for model in weights.values():
        size = re.search(r'ravlt_(\w)', model['Name'])[1]
        address = rf'https://huggingface\.co/aldjalkdf/RAVLT/resolve/main/\w+_{size}(_\w+)?\.pth'
        assert re.fullmatch(address, model['Weights'], re.IGNORECASE)
        assert model['Weights From'] == 'the authors of RAVLT'


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


def test_the_readme_links_to_all_published_weights(metafile, config_dir):
    readme = (config_dir.parent / 'README.md').read_text()
    linked = re.findall(r'\[([\d.]+)\]\((https://\S+\.pth)\)', readme)
    published = [model for model in metafile['Models'] if 'Weights' in model]
    expected = {
        (str(next(iter(model['Results'][0]['Metrics'].values()))), model['Weights'])
        for model in published
    }
    assert len(linked) == len(published) and set(linked) == expected
