"""What training needs: hooks, an optimizer constructor, safe checkpoints, tools' common parts."""

from .hooks import CheckpointCheckHook, ExactResumeHook
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['CheckpointCheckHook', 'ExactResumeHook', 'LayerDecayOptimWrapperConstructor']
