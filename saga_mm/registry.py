"""Registries of saga_mm.

They are children of mmengine's root registries, so that mmdet, mmseg and mmengine find `saga_mm.X`
by name. Configs are found by name as well: `_base_ = 'saga_mm::segmentation/upernet_saga_t.py'`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from .shipped import configs_dir

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='saga_mm',
    locations=['saga_mm.backbones', 'saga_mm.preprocessors'],
)
DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='saga_mm', locations=['saga_mm.datasets']
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='saga_mm', locations=['saga_mm.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='saga_mm',
    locations=['saga_mm.engine'],
)
TRANSFORMS = Registry(
    'transform', parent=MMENGINE_TRANSFORMS, scope='saga_mm', locations=['saga_mm.transforms']
)
REGISTRIES = (MODELS, DATASETS, HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS)


def _find_configs_by_package() -> None:
    """Let `_base_ = 'PACKAGE::...'` find the configs of this package, and of the OneDL fork.

    mmengine looks for a distribution with the name of a package, and if there is none, for a module
    with that name. The names of the fork's distributions differ from those in mmengine's table.
    """
    for module, package in MODULE2PACKAGE.items():
        try:
            distribution(package)
        except PackageNotFoundError:
            if find_spec(module):
                MODULE2PACKAGE[module] = module
    # The name of a module, because mmengine would take the first package of the distribution.
    MODULE2PACKAGE['saga_mm'] = __name__
    # what a package's config names is looked up in its registries, but ours name classes of mmdet
    # and mmseg, as a config of one's own does
    find = Config._get_cfg_path

    def find_without_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if separator and package == 'saga_mm':
            return f'{configs_dir()}/{name}', None
        return find(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find_without_scope)


_find_configs_by_package()
