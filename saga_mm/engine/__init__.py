"""What training needs: hooks, one file each, and an optimizer constructor."""

from .atomic_checkpoint import AtomicCheckpointHook
from .checkpoint_check import CheckpointCheckHook
from .data_check import DataCheckHook
from .exact_resume import ExactResumeHook
from .finite_check import FiniteCheckHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .move_drawings import MoveDrawingsHook
from .progress import ProgressHook
from .resume_schedule import ResumeScheduleHook

__all__ = [
    'AtomicCheckpointHook',
    'CheckpointCheckHook',
    'DataCheckHook',
    'ExactResumeHook',
    'FiniteCheckHook',
    'LayerDecayOptimWrapperConstructor',
    'MoveDrawingsHook',
    'ProgressHook',
    'ResumeScheduleHook',
]
