from .hooks import CheckpointCheckHook, ExactResumeHook

__all__ = ['CheckpointCheckHook', 'ExactResumeHook']
