"""What training needs: hooks, one file each, and two constructors of optimizers."""

from .atomic_checkpoint import AtomicCheckpointHook
from .checkpoint_check import CheckpointCheckHook
from .data_check import DataCheckHook
from .exact_resume import ExactResumeHook
from .finite_check import FiniteCheckHook
from .joined_groups import JoinedGroupsOptimWrapperConstructor
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
    'JoinedGroupsOptimWrapperConstructor',
    'LayerDecayOptimWrapperConstructor',
    'MoveDrawingsHook',
    'ProgressHook',
    'ResumeScheduleHook',
]
