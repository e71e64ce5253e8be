"""A fixture that sets the size of chunks."""

import pytest

from saga_kernels import chunks


@pytest.fixture
def chunk_budget(monkeypatch):
    """Sets the bytes of the largest temporary of a chunk."""
    return lambda size: monkeypatch.setattr(chunks, 'BUDGET', size)
