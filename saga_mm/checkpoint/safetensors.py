"""Files of safetensors, a format that holds tensors and text, and no code.

The package is needed only by those who read or write such a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .errors import CheckpointError

SUFFIX = '.safetensors'


def is_safetensors(path: str | Path) -> bool:
    """Whether the name of a file says that it is one of safetensors."""
    return Path(path).suffix == SUFFIX


def read_safetensors(file: Path, map_location: str | torch.device | None) -> dict[str, Tensor]:
    """The tensors of a file, by name; ValueError if it is damaged."""
    package = import_safetensors(file)
    device = map_location if isinstance(map_location, str | torch.device) else 'cpu'
    try:
        return package.torch.load_file(file, device=str(device))
    except package.SafetensorError as error:
        raise ValueError(str(error)) from error


def to_safetensors(weights: Mapping[str, Tensor], file: str | Path) -> bytes:
    """The content of a file of these weights, in which each has memory of its own.

    Args:
        weights: On any device, and with any strides. Weights may share memory.
        file: Its name, for the error.

    Raises:
        CheckpointError: The package is missing.
    """
    package = import_safetensors(file)
    # 'format' is what other programs look for
    return package.torch.save(
        {
            name: weight.detach().clone(memory_format=torch.contiguous_format)
            for name, weight in weights.items()
        },
        metadata={'format': 'pt'},
    )


def import_safetensors(file: str | Path) -> ModuleType:
    """The package, with its part for torch; CheckpointError, which names the file, without it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            f'{file} is a file of safetensors, and the package is missing: pip install safetensors'
        ) from error
    return safetensors
