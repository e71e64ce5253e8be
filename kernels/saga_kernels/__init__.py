"""Linear attention for images in PyTorch.

Each op has a specification and an eager implementation in PyTorch, and fused kernels in Triton.
"""

from .decay.api import decay_linear_attention
from .depthwise.api import depthwise_conv2d
from .ffn.api import ffn
from .gated.api import gated_linear_attention, linear_attention
from .gated.state import KVState, kv_state, read_state, sum_states
from .gated_attention.api import gated_attention
from .layer_norm.api import layer_norm
from .rank_augmented.api import rank_augmented_linear_attention
from .rotary import apply_rotary_2d
from .tracing import is_tracing_or_compiling
from .wkv.api import bidirectional_wkv

__all__ = [
    'KVState',
    'apply_rotary_2d',
    'bidirectional_wkv',
    'decay_linear_attention',
    'depthwise_conv2d',
    'ffn',
    'gated_attention',
    'gated_linear_attention',
    'is_tracing_or_compiling',
    'kv_state',
    'layer_norm',
    'linear_attention',
    'rank_augmented_linear_attention',
    'read_state',
    'sum_states',
]
