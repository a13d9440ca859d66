"""The operators. Semantics in each `reference.py`; everything faster is compared with it."""

from attn_plugins.ops.agent import agent_attention
from attn_plugins.ops.block_sparse import block_sparse_attention
from attn_plugins.ops.decode import decode_attention
from attn_plugins.ops.merge import merge_attention_states
from attn_plugins.ops.neighborhood import neighborhood_attention
from attn_plugins.ops.routed_heads import routed_head_attention
from attn_plugins.ops.spans import span_attention
from attn_plugins.ops.vmoba import vmoba_attention
from attn_plugins.ops.weighted_merge import weighted_merge

__all__ = [
    "agent_attention",
    "block_sparse_attention",
    "decode_attention",
    "merge_attention_states",
    "neighborhood_attention",
    "routed_head_attention",
    "span_attention",
    "vmoba_attention",
    "weighted_merge",
]
