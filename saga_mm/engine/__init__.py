"""What training needs: hooks, an optimizer constructor, safe checkpoints, tools' common parts."""

from .hooks import CheckpointCheckHook, DataCheckHook, ExactResumeHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .saving import AtomicCheckpointHook

__all__ = [
    'AtomicCheckpointHook',
    'CheckpointCheckHook',
    'DataCheckHook',
    'ExactResumeHook',
    'LayerDecayOptimWrapperConstructor',
]
