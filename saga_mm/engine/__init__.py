"""What training needs: hooks, one file each, and an optimizer constructor."""

from .atomic_checkpoint import AtomicCheckpointHook
from .checkpoint_check import CheckpointCheckHook
from .data_check import DataCheckHook
from .exact_resume import ExactResumeHook
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = [
    'AtomicCheckpointHook',
    'CheckpointCheckHook',
    'DataCheckHook',
    'ExactResumeHook',
    'LayerDecayOptimWrapperConstructor',
]
