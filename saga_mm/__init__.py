"""Linear-attention vision backbones for OpenMMLab.

Importing the package registers everything it ships. What a config calls `saga_mm.NAME` has the same
name in Python, and subpackages are imported when they are used. `use_safe_loading` makes mmengine
read checkpoints without running anything in them.
"""

from importlib import import_module

try:
    from . import backbones, datasets, engine, preprocessors, transforms
    from .backbones import RAVLT, SAGA, SoLAVision
    from .backbones.create import create_backbone, list_backbones
    from .checkpoint import use_safe_loading
    from .registry import REGISTRIES
    from .shipped import configs_dir
except ModuleNotFoundError as error:
    package = (error.name or '').partition('.')[0]
    if package not in ('mmcv', 'mmengine'):
        raise
    raise ModuleNotFoundError(
        f'saga_mm needs mmengine and mmcv, and there is no {package}: install one of its extras, '
        "`pip install --no-build-isolation 'saga_mm[onedl]'` or 'saga_mm[openmmlab]', after "
        "`pip install torch 'setuptools<81' wheel ninja psutil`, with which mmcv compiles its ops",
        name=error.name,
    ) from None

__version__ = '0.2.0'
__all__ = [
    'RAVLT',
    'SAGA',
    'SoLAVision',
    '__version__',
    'backbones',
    'configs_dir',
    'create_backbone',
    'datasets',
    'engine',
    'list_backbones',
    'preprocessors',
    'transforms',
    'use_safe_loading',
]
_IMPORTED_WHEN_USED = ('analysis', 'apis', 'cli', 'own_data')


def __getattr__(name: str) -> object:
    for registry in REGISTRIES:
        if name in registry.module_dict:
            return registry.module_dict[name]
    if name in _IMPORTED_WHEN_USED:
        return import_module(f'{__name__}.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    registered = (name for registry in REGISTRIES for name in registry.module_dict)
    return sorted({*globals(), *registered, *_IMPORTED_WHEN_USED})
