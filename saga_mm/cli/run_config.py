"""The config of one run, and what is saved of it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from mmengine import fileio
from mmengine.config import Config

from ..checkpoint import write_atomically


class RunConfig(Config):
    """A config to run, which is saved as it was before it was changed for this run.

    What belongs to one run, such as the checkpoint that it resumes from, would else be in the
    config that mmengine writes into the work dir, and come into effect again wherever that is used.
    The file is written whole or not at all.

    Args:
        cfg (Config): What is saved. A copy of it is run, and may be changed.
    """

    def __init__(self, cfg: Config) -> None:
        self.__setstate__(cfg.__deepcopy__({}).__getstate__())
        # `Config` makes an entry of each attribute
        object.__setattr__(self, 'saved', cfg)

    def __reduce__(self) -> tuple:
        return _make_config, (self.__getstate__(),)

    @cached_property
    def pretty_text(self) -> str:
        # it takes seconds for a config of nested data sets, and a run asks several times
        return self.saved.pretty_text

    def dump(self, file: str | Path | None = None) -> str | None:
        if file is None:
            return self.saved.dump()
        kind = Path(file).suffix.removeprefix('.')
        if kind == 'py':
            text = self.pretty_text
        else:
            text = fileio.dump(self.saved.to_dict(), file_format=kind)
        write_atomically(file, text.encode())
        return None


def _make_config(state: tuple) -> Config:
    """What a config of a run is in another process: one like others."""
    cfg = Config()
    cfg.__setstate__(state)
    return cfg
