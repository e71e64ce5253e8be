"""Finds the file behind a path, a URL or a name that mmengine knows."""

from __future__ import annotations

import hashlib
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from .errors import CheckpointError
from .files import open_atomically

# Published names often end in the start of the file's SHA-256, as in resnet50-0676ba61.pth. A date,
# as in 20221018, is not a hash.
DIGEST = re.compile(r'-(?!(?:19|20)\d{6}\.)([a-f0-9]{8,})\.')
# Seconds that a server may be silent, and the bytes per second that it must send after that time.
PATIENCE = 60
SLOWEST = 1000


def find_file(path: str) -> Path:
    """The file behind a path, a URL or a name in mmengine's tables.

    Raises:
        CheckpointError: There is none.
    """
    scheme, separator, name = path.partition('://')
    if scheme in ('torchvision', 'modelzoo') and separator:
        path = _look_up(path, name, get_torchvision_models())
    elif scheme in ('open-mmlab', 'openmmlab') and separator:
        name = get_deprecated_model_names().get(name, name)
        path = _look_up(path, name, get_external_models())
    elif scheme == 'mmcls' and separator:
        path = _look_up(path, name, get_mmcls_models())
    if is_url(path):
        return _download(path)
    if '://' in path:
        raise CheckpointError(f'{path} can not be loaded: download it, and name the file')
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            raise CheckpointError(f'{path} is a folder: name a checkpoint in it')
        if not file.is_file():
            raise CheckpointError(f'{path} does not exist: check the path of the checkpoint')
    # the name is too long, a folder is not readable, or ~user does not exist
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f'{path} can not be opened: {error}') from error
    return file


def is_url(path: str) -> bool:
    return path.startswith(('http://', 'https://'))


def forget(path: str, file: Path) -> None:
    """Remove an unreadable download from the cache, unless its hash has shown it to be complete."""
    if '://' in path and not DIGEST.search(file.name):
        file.unlink(missing_ok=True)


def _look_up(path: str, name: str, urls: Mapping[str, str]) -> str:
    if name not in urls:
        raise CheckpointError(f'{path} is unknown to mmengine: name a file or a URL')
    return urls[name]


def _download(url: str) -> Path:
    """The file of a URL in torch's cache; one process per machine fetches it, if need be."""
    if is_main_process():
        try:
            file = _fetch(url)
        finally:
            # also after an error: the other processes then meet the same error
            barrier()
        return file
    barrier()
    # the file is not there yet on the other machines of a cluster
    return _fetch(url)


def _fetch(url: str) -> Path:
    """The file of a URL in torch's cache, downloaded unless it is there."""
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    try:
        name = Path(urlsplit(url).path).name
        digest = DIGEST.search(name)
        if digest:
            # the name that torch uses: it may have downloaded the file already
            file = folder / name
            if file.is_file() and _hash(file).startswith(digest[1]):
                return file
        else:
            # other URLs may end in the same name
            key = hashlib.sha256(url.encode()).hexdigest()[:16]
            file = folder / f'{Path(name).stem[:40]}.{key}{Path(name).suffix[:20]}'
            if file.is_file():
                return file
        folder.mkdir(parents=True, exist_ok=True)
        print_log(f'downloading {url} to {file}', 'current')
        _save(url, file, digest[1] if digest else '')
    # ValueError: the text is not a URL
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(f'{url} can not be downloaded: {error}') from error
    return file


def _save(url: str, file: Path, digest: str) -> None:
    """Download a URL to a file, and check that it is complete and that its hash is right."""
    request = urllib.request.Request(url, headers={'User-Agent': 'torch.hub'})
    with (
        urllib.request.urlopen(request, timeout=PATIENCE) as response,
        open_atomically(file) as out,
    ):
        found = hashlib.sha256()
        for piece in _pieces(response):
            out.write(piece)
            found.update(piece)
        if not found.hexdigest().startswith(digest):
            raise OSError(f'invalid hash, expected {digest}, got {found.hexdigest()}')


def _pieces(response: HTTPResponse) -> Iterator[bytes]:
    """The content of a response; OSError if it is incomplete or too slow."""
    start, received = time.monotonic(), 0
    while piece := response.read1(1 << 16):
        yield piece
        received += len(piece)
        if time.monotonic() - start > PATIENCE + received / SLOWEST:
            raise OSError(f'the server sends less than {SLOWEST} bytes per second')
    length = response.headers['Content-Length']
    if length is not None and received != int(length):
        raise OSError(f'it was cut off after {received} of {length} bytes')


def _hash(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, 'rb') as content:
        while piece := content.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
