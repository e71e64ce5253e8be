"""Registries of saga_mm.

Children of mmengine's roots, so that mmdet, mmseg and mmengine find `saga_mm.X` by name.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

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
