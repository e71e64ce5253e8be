"""The one place that picks an implementation.

- `impl='reference'`: the reference, always.
- `impl='triton'`: the Triton kernel, or an error that says why it can't run.
- `impl='auto'` (default): the Triton kernel where it can run, else the reference; logged once.
- environment `SAGA_KERNELS_IMPL=...`: replaces 'auto'; an explicit argument wins over it.
"""

import logging
import os
from typing import Literal

import torch

from .validation import check_impl

Impl = Literal['auto', 'reference', 'triton']
ENV_VAR = 'SAGA_KERNELS_IMPL'

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str, str | None]] = set()


def resolve_impl(impl: str, op: str, why_not_triton: str | None) -> str:
    """Turn a request into `'reference'` or `'triton'`.

    Args:
        impl: What the caller asked for, 'auto', 'reference' or 'triton'.
        op: Name of the op, for messages.
        why_not_triton: Why the Triton kernel can't take this input; None if it can.

    Raises:
        ValueError: Unknown `impl`, or unknown value of the environment variable.
        RuntimeError: `'triton'` was asked for and can't run.
    """
    check_impl(impl)
    if impl == 'auto':
        impl = os.environ.get(ENV_VAR, 'auto')
        check_impl(impl, ENV_VAR)
    if impl == 'triton' and why_not_triton:
        raise RuntimeError(f"{op}: impl='triton' can't run: {why_not_triton}")
    if impl != 'auto':
        return impl
    choice = 'reference' if why_not_triton else 'triton'
    if not torch.compiler.is_compiling():
        _log_once(op, choice, why_not_triton)
    return choice


def _log_once(op: str, choice: str, why: str | None) -> None:
    if (op, choice, why) not in _logged:
        _logged.add((op, choice, why))
        logger.info('%s runs as %s%s', op, choice, f' ({why})' if why else '')
