"""Writes what the models cost into configs/metafile.yml and into the tables of docs/methods.

    python website/models.py

Each config is built, and run on fake tensors, which takes a few minutes in all. Classifiers need
the extra `pretrain`. Tests compare the files with each other and with the models.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml
from mmengine.config import Config

from saga_mm.analysis.model_cost import model_cost
from saga_mm.apis import build_model
from saga_mm.cli import load_config

ROOT = Path(__file__).resolve().parents[1]
METAFILE = ROOT / 'configs/metafile.yml'
PAGES = sorted(ROOT.glob('docs/methods/*.md'))
# a row of a table: link, data, batch, schedule, and then what is written here
ROW = re.compile(r'^(\| \[\w+\]\(\.\./\.\./(configs/\S+\.py)\)(?: \|[^|\n]*){3}) \|.*$', re.M)


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width of the image for which a model's multiply-adds are counted.

    Detectors: 800 x 1280, as in tables of mmdet, or the size that the config resizes images to.
    Segmentors and classifiers: the size that the config crops images to for training or testing.
    """
    if cfg.default_scope == 'mmseg':
        return tuple(cfg.model.data_preprocessor.size)
    pipeline = cfg.test_dataloader.dataset.pipeline
    options = {name: value for step in pipeline for name, value in step.items()}
    if cfg.default_scope == 'mmpretrain':
        return (options.get('crop_size', 64),) * 2
    width, height = options['scale']
    return height, min(width, 1280)


def measure(config: str) -> dict[str, int]:
    """What the metafile says of a config: parameters, and multiply-adds rounded to 10 million."""
    cfg = load_config(ROOT / config, {}, ('model',))
    model = build_model(cfg)
    channels = getattr(model.backbone, 'input_channels', 3)
    cost = model_cost(model, image_size(cfg), channels)['']
    return dict(FLOPs=round(cost.flops // 2, -7), Parameters=cost.parameters)


def rewrite_metafile(measured: dict[str, dict[str, int]]) -> None:
    text = METAFILE.read_text()
    for config, values in measured.items():
        block = re.compile(
            rf'(Config: {re.escape(config)}\n    Metadata:\n      Training Data: .*\n)'
            r'(?:      (?:FLOPs|Parameters): .*\n)*'
        )
        lines = ''.join(f'      {name}: {value}\n' for name, value in values.items())
        text, count = block.subn(rf'\g<1>{lines}', text)
        assert count == 1, config
    METAFILE.write_text(text)


def costs() -> dict[str, dict[str, int]]:
    """The metadata of each config in the metafile, by its path."""
    models = yaml.safe_load(METAFILE.read_text())['Models']
    return {model['Config']: model['Metadata'] for model in models}


def with_costs(page: str) -> str:
    """The text of a page, with the columns of parameters and multiply-adds from the metafile."""
    known = costs()

    def row(match: re.Match) -> str:
        values = known[match[2]]
        millions, billions = values['Parameters'] / 1e6, values['FLOPs'] / 1e9
        return f'{match[1]} | {millions:.1f}M | {billions:.1f}G |'

    return ROW.sub(row, page)


def main(names: list[str]) -> None:
    measured = {}
    for config in costs():
        if not names or Path(config).stem in names:
            measured[config] = measure(config)
            print(config, measured[config], flush=True)
    rewrite_metafile(measured)
    for page in PAGES:
        page.write_text(with_costs(page.read_text()))


if __name__ == '__main__':
    main(sys.argv[1:])
