"""Checkpoints: read as data, matched with a model, written atomically."""

from .errors import CheckpointError, printable
from .files import make_folder, write_atomically
from .loading import load_file, remove_configs, use_safe_loading
from .meta import read_dataset_meta
from .resume import (
    check_fused_state,
    check_groups,
    check_training_state,
    latest_checkpoint,
    missing_for_resume,
)
from .safetensors import import_safetensors, is_safetensors, to_safetensors
from .state_dict import extract_state_dict
from .weights import (
    LoadReport,
    load_matching,
    load_model_weights,
    load_weights,
    match_weights,
    report_pretrained,
)

__all__ = [
    'CheckpointError',
    'LoadReport',
    'check_fused_state',
    'check_groups',
    'check_training_state',
    'extract_state_dict',
    'import_safetensors',
    'is_safetensors',
    'latest_checkpoint',
    'load_file',
    'load_matching',
    'load_model_weights',
    'load_weights',
    'make_folder',
    'match_weights',
    'missing_for_resume',
    'printable',
    'read_dataset_meta',
    'remove_configs',
    'report_pretrained',
    'to_safetensors',
    'use_safe_loading',
    'write_atomically',
]
