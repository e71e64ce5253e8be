"""Checkpoints: read without running anything in them, matched with a model, written whole."""

from .errors import CheckpointError
from .files import make_folder, write_atomically
from .loading import load_file, remove_configs, use_safe_loading
from .resume import (
    check_fused_state,
    check_training_state,
    latest_checkpoint,
    missing_for_resume,
)
from .weights import LoadReport, extract_state_dict, load_weights, match_weights, translate

__all__ = [
    'CheckpointError',
    'LoadReport',
    'check_fused_state',
    'check_training_state',
    'extract_state_dict',
    'latest_checkpoint',
    'load_file',
    'load_weights',
    'make_folder',
    'match_weights',
    'missing_for_resume',
    'remove_configs',
    'translate',
    'use_safe_loading',
    'write_atomically',
]
