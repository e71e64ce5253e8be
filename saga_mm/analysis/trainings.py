"""Trains models of several configs with several learning rates and seeds, and tabulates results."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch
from mmengine.config import Config

from ..apis import test, train
from ..apis.runs import TRAINING
from ..checkpoint import CheckpointError, latest_checkpoint, load_file
from ..cli import load_config

# Metrics of validations, in the order in which they are looked for.
METRICS = ('accuracy/top1', 'mIoU', 'coco/segm_mAP', 'coco/bbox_mAP')


def make_cell(
    cfg: Config,
    folder: Path,
    learning_rate: float,
    seed: int,
    metric: str | None,
    options: Mapping[str, object],
) -> dict:
    """The settings of one training, which JSON can hold.

    Args:
        cfg: The config, with its `options` merged in.
        folder: Output folder of all trainings of this config.
        learning_rate: Value of `optim_wrapper.optimizer.lr`.
        seed: Value of `randomness.seed`.
        metric: Name of a metric of the validation; None for the first of `METRICS` that is there.
        options: Entries of the config that differ from its file, by dotted names.
    """
    # A config that has changed since gets a folder of its own, and does not resume the other one.
    digest = hashlib.sha256(cfg.pretty_text.encode()).hexdigest()[:8]
    return dict(
        name=Path(cfg.filename).stem,
        config=str(Path(cfg.filename).resolve()),
        folder=str(folder / f'lr{learning_rate:g}_seed{seed}_{digest}'),
        learning_rate=learning_rate,
        seed=seed,
        metric=metric,
        options=dict(options),
        threads=torch.get_num_threads(),
    )


def measure(cell: dict) -> dict:
    """Train, or go on with an interrupted training; return the metric of the last validation.

    If the config tests other data than it validates, the result has the metric of that, too.

    Raises:
        ValueError: There is no such metric, or it is not a finite number.
    """
    torch.set_num_threads(cell['threads'])
    options = {
        **cell['options'],
        'optim_wrapper.optimizer.lr': cell['learning_rate'],
        'randomness.seed': cell['seed'],
    }
    cfg = load_config(cell['config'], options, TRAINING)
    if is_finished(cfg, cell['folder']):
        # It may have been stopped in its last validation, after its last checkpoint.
        data = {
            f'test_{part}': _instead(cfg[f'val_{part}']) for part in ('dataloader', 'evaluator')
        }
        found = _test(cell, 'val', {**options, **data, 'test_cfg': {}})
    else:
        train(cell['config'], work_dir=cell['folder'], options=options, resume='auto')
        found = last_metrics(cell['folder'])
    name = cell['metric'] or next((name for name in METRICS if name in found), None)
    if name not in found:
        raise ValueError(f'metric must be one of {tuple(found)}, got {name!r}')
    if not math.isfinite(found[name]):
        raise ValueError(f'{name} must be a finite number, got {found[name]}')
    result = dict(metric=name, value=found[name])
    if has_test_data(cfg):
        metrics = _test(cell, 'test', options)
        # An evaluator may only write files.
        if name in metrics:
            result['test'] = metrics[name]
    return result


def is_finished(cfg: Config, folder: str | Path) -> bool:
    """Whether a work dir has the checkpoint with which the training of a config ends."""
    try:
        meta = load_file(latest_checkpoint(folder))['meta']
    except CheckpointError:
        return False
    return any(
        meta.get(unit, 0) >= cfg.train_cfg.get(f'max_{unit}s', math.inf)
        for unit in ('epoch', 'iter')
    )


def _instead(value: object) -> object:
    """An entry for `--cfg-options` that replaces the one of the config, and is not merged in."""
    return {'_delete_': True, **value} if isinstance(value, Mapping) else value


def _test(cell: dict, name: str, options: dict) -> dict[str, float]:
    """Test the last checkpoint of a training; its metrics that are numbers."""
    # a name of its own, because mmengine shares what logs between runs of one name
    options = {**options, 'experiment_name': name}
    checkpoint = latest_checkpoint(cell['folder'])
    metrics = test(cell['config'], checkpoint, work_dir=Path(cell['folder'], name), options=options)
    # those of NumPy as well
    return {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}


def has_test_data(cfg: Config) -> bool:
    """Whether a config has a test on other data, or by other rules, than its validation."""
    loaders = [cfg.get(f'{split}_dataloader') or {} for split in ('val', 'test')]
    evaluators = [cfg.get(f'{split}_evaluator') for split in ('val', 'test')]
    val, test = zip((loader.get('dataset') for loader in loaders), evaluators, strict=True)
    return None not in test and val != test


def last_metrics(folder: str | Path) -> dict[str, float]:
    """The metrics of the last validation in a work dir, by name."""
    found: dict[str, float] = {}
    for path in sorted(Path(folder).glob('*/vis_data/scalars.json')):
        for entry in map(json.loads, path.read_text().splitlines()):
            # entries of a training have a loss
            if 'loss' not in entry:
                found = {
                    name: value for name, value in entry.items() if isinstance(value, int | float)
                }
    return found


def best_rates(results: Sequence[dict], lowest: bool = False) -> dict[str, float]:
    """The learning rate with the best value for each config, of those that trained to the end.

    Args:
        results: Of `measure`, each with the name of its config and its learning rate.
        lowest: Whether the best value is the lowest one, and not the highest.
    """
    sign = -1 if lowest else 1
    best: dict[str, dict] = {}
    for result in results:
        if 'error' not in result:
            rival = best.get(result['name'])
            if rival is None or sign * result['value'] > sign * rival['value']:
                best[result['name']] = result
    return {name: result['learning_rate'] for name, result in best.items()}


def table(results: Sequence[dict], lowest: bool = False) -> Iterator[str]:
    """The lines of a table in Markdown: mean and range over seeds, at the best learning rate.

    Args:
        results: As in `best_rates`.
        lowest: Likewise.
    """
    tests = any('test' in result for result in results)
    yield (
        '| config | metric | mean | range |'
        + (' test mean | test range |' if tests else '')
        + ' seeds | learning rate | others | failed |'
    )
    yield '|---|---|--:|--:|' + ('--:|--:|' if tests else '') + '--:|--:|---|---|'
    rates = best_rates(results, lowest)
    for name in dict.fromkeys(result['name'] for result in results):
        own = [result for result in results if result['name'] == name]
        errors = ', '.join(dict.fromkeys(r['error'] for r in own if 'error' in r)).replace('|', '/')
        done = [result for result in own if 'error' not in result]
        if not done:
            yield f'| {name} | - | - | - |{" - | - |" * tests} 0 | - | - | {errors} |'
            continue
        best = [r for r in done if r['learning_rate'] == rates[name]]
        others = [
            f'{r["learning_rate"]:g}: {_digits(r["value"])}'
            for r in done
            if r['learning_rate'] != rates[name]
        ]
        columns = [
            _mean_and_range([r[key] for r in best if key in r])
            for key in ('value', 'test')[: 1 + tests]
        ]
        yield (
            f'| {name} | {done[0]["metric"]} | {" | ".join(columns)} | {len(best)} '
            f'| {rates[name]:g} | {", ".join(others)} | {errors} |'
        )


def _mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return '- | -'
    return f'{_digits(statistics.mean(values))} | {_digits(min(values))} to {_digits(max(values))}'


def _digits(value: float) -> str:
    # Some metrics are percentages, and others shares.
    return f'{value:#.4g}'
