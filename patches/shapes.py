"""The sizes of an attention module, read from what its projections and norms are called in the two libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from attn_plugins.method import SiteShape

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
_DIM = ("head_dim", "attention_head_size", "head_size", "dim_head")
_QUERY = ("q_proj", "to_q", "query", "to_query")
_PLAIN_FUSED = ("qkv_proj", "query_key_value", "qkv", "to_qkv")
_FUSED = (*_PLAIN_FUSED, "to_qkv_mlp_proj")
_KEY = ("k_proj", "to_k", "key", "to_key")
_NORMS = ("q_norm", "norm_q", "query_norm", "q_layernorm", "query_layernorm")
_OUTPUT = ("o_proj", "to_out.0", "to_out", "out_proj", "dense", "proj", "projection_layer", "out_layer")


def of_attention(root: Any, attention: Any) -> SiteShape | str:
    """Heads, sizes and names of an attention module; a sentence where they cannot be told. It knows of no grid."""
    config = getattr(attention, "config", None)
    heads = _number(attention, _HEADS) or _number(config, ("num_attention_heads",))
    query = _linear(attention, _QUERY)
    entry = query or _linear(attention, _FUSED)
    if not heads or entry is None:
        return f"{type(attention).__name__} of {type(root).__name__} does not tell the sizes of its attention layers"
    dim = _number(attention, _DIM) or (query.out_features // heads if query else entry.in_features // heads)
    if query is not None and query.out_features % dim == 0:
        heads = query.out_features // dim  # a mixture's attention has those of all experts, its config those of one
    key = _linear(attention, _KEY)
    groups = _number(attention, ("num_key_value_groups",))
    if groups:
        kv_heads = heads // groups
    elif key is not None:
        kv_heads = key.out_features // dim
    else:
        kv_heads = _number(config, ("num_key_value_heads",)) or heads
    if entry is _linear(attention, _PLAIN_FUSED):  # likewise
        wide = max(entry.out_features // ((heads + 2 * kv_heads) * dim), 1)
        heads, kv_heads = wide * heads, wide * kv_heads
    return SiteShape(
        heads, dim, width=entry.in_features, kv_heads=kv_heads, q_norm=_norms_each_head(attention, heads * dim),
        output=_fitting(attention, output_name(attention), heads * dim),
    )  # fmt: skip


def _number(owner: Any, names: Iterable[str]) -> int | None:
    found = (getattr(owner, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _linear(attention: Any, names: Iterable[str]) -> Any:
    found = (getattr(attention, name, None) for name in names)
    return next((part for part in found if isinstance(part, nn.Module) and hasattr(part, "in_features")), None)


def _norms_each_head(attention: Any, inner: int) -> bool:
    """Whether queries are normed head by head: a norm over all heads at once leaves them their sizes."""
    norm = next((part for name in _NORMS if isinstance(part := getattr(attention, name, None), nn.Module)), None)
    if norm is None or isinstance(norm, nn.Identity):
        return False
    weight = getattr(norm, "weight", None)
    return not (weight is not None and weight.ndim == 1 and weight.numel() == inner)


def query_name(attention: nn.Module) -> str | None:
    """The name of the projection of the queries alone, from the attention module on."""
    return _named(attention, _QUERY)


def output_name(attention: nn.Module) -> str | None:
    """The name of the projection of what the heads give."""
    return _named(attention, _OUTPUT)


def _named(attention: nn.Module, names: Iterable[str]) -> str | None:
    modules = dict(attention.named_modules())
    return next((name for name in names if hasattr(modules.get(name), "in_features")), None)


def _fitting(attention: nn.Module, name: str | None, inner: int) -> str | None:
    fits = name is not None and getattr(attention.get_submodule(name), "in_features", None) == inner
    return name if fits else None
