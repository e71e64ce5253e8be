"""Finds the file behind a path, a URL or a name that mmengine knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from .errors import CheckpointError


def find_file(path: str) -> Path:
    """The file behind a path, a URL or a name in mmengine's tables."""
    scheme, separator, name = path.partition('://')
    if scheme in ('torchvision', 'modelzoo') and separator:
        path = _look_up(path, name, get_torchvision_models())
    elif scheme in ('open-mmlab', 'openmmlab') and separator:
        name = get_deprecated_model_names().get(name, name)
        path = _look_up(path, name, get_external_models())
    elif scheme == 'mmcls' and separator:
        path = _look_up(path, name, get_mmcls_models())
    if path.startswith(('http://', 'https://')):
        return _download(path)
    if '://' in path:
        raise CheckpointError(f'{path} can not be loaded: download it, and name the file')
    file = Path(path).expanduser()
    if file.is_dir():
        raise CheckpointError(f'{path} is a folder: name a checkpoint in it')
    if not file.is_file():
        raise CheckpointError(f'{path} does not exist: check the path of the checkpoint')
    return file


def _look_up(path: str, name: str, urls: Mapping[str, str]) -> str:
    if name not in urls:
        raise CheckpointError(f'{path} is unknown to mmengine: name a file or a URL')
    return urls[name]


def _download(url: str) -> Path:
    """The file of a URL in torch's cache; one process per machine fetches it, if need be."""
    file = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    if is_main_process():
        _fetch(url, file)
    barrier()
    # on the other machines of a cluster
    _fetch(url, file)
    return file


def _fetch(url: str, file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    # published files end in the start of their hash, as in resnet50-0676ba61.pth
    digest = re.search(r'-([a-f0-9]{8,})\.', file.name)
    try:
        torch.hub.download_url_to_file(url, str(file), digest and digest[1], progress=True)
    # a wrong hash is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f'{url} can not be downloaded: {error}') from error
