"""The operators. Semantics in each `reference.py`; everything faster is compared with it."""

from attn_plugins.ops.agent import agent_attention
from attn_plugins.ops.block_sparse import block_sparse_attention
from attn_plugins.ops.decode import decode_attention
from attn_plugins.ops.merge import merge_attention_states
from attn_plugins.ops.neighborhood import neighborhood_attention
from attn_plugins.ops.spans import span_attention
from attn_plugins.ops.vmoba import vmoba_attention

__all__ = [
    "agent_attention",
    "block_sparse_attention",
    "decode_attention",
    "merge_attention_states",
    "neighborhood_attention",
    "span_attention",
    "vmoba_attention",
]
