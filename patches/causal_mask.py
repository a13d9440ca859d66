"""The mask of a causal transformers model, as positions instead of a matrix.

`create_causal_mask` asks one function per attention implementation for a mask and hands it to all layers. Ours returns
None where shapes tell everything; else, for plain causal attention with padding or a static cache, an int64 tensor
(B, 1, 1, 2 + N_kv), of four dimensions, or `generate` and the model would take it for a padding mask; and a bool matrix
for whatever is not plainly causal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_plugins.method import CausalKeys


def make_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, use_vmap: bool = False, device: torch.device | str = "cpu", **kwargs: Any,
) -> torch.Tensor | None:  # fmt: skip
    """The function for transformers' AttentionMaskInterface; arguments as in `transformers.masking_utils.sdpa_mask`."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = mask_function in (None, causal_mask_function)
    if use_vmap or not (plain or (local_size is not None and _is_sliding_window(mask_function, kwargs.get("config")))):
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap,
            device=device, **{**kwargs, "allow_is_causal_skip": False},
        )  # fmt: skip
    aligned = (
        not isinstance(q_offset, torch.Tensor)
        and q_offset + q_length == kv_offset + kv_length
        and (kv_offset == 0 or local_size is not None)
    )
    # reading the values costs what it costs transformers' own masks; compiled code cannot
    if aligned and (attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all()))):
        return None
    slot = torch.arange(kv_length, device=device) + kv_offset
    if attention_mask is None:
        position = slot.expand(batch_size, -1)
        skipped = torch.zeros(batch_size, dtype=torch.int64, device=device)
    else:
        skipped = attention_mask.int().argmax(-1)  # padding on the left
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        if missing > 0:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        position = torch.where(real, slot - skipped[:, None], -1)
    first = torch.as_tensor(q_offset, device=device).reshape(1) - skipped
    column = (torch.as_tensor(q_offset, device=device).reshape(1) - kv_offset).expand(batch_size)
    return torch.cat([first[:, None], column[:, None], position], dim=1).to(torch.int64)[:, None, None]


def read_mask(mask: torch.Tensor | None) -> CausalKeys | None:
    """What `make_mask` wrote. Only for masks that `is_ours` recognises."""
    if mask is None:
        return None
    rows = mask[:, 0, 0]
    return CausalKeys(positions=rows[:, 2:], first=rows[:, 0], column=rows[:1, 1])


def is_ours(mask: object) -> bool:
    """Whether a mask is None or of positions; a bool or float one is a matrix, the model's or the user's own."""
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dtype == torch.int64 and mask.ndim == 4)


def as_matrix(
    mask: torch.Tensor | None, queries: int, keys: int, limit: int | None, device: torch.device
) -> torch.Tensor:
    """The bool matrix (B or 1, 1, queries, keys) that the model's own attention would have been given."""
    where = read_mask(mask)
    if where is None:
        key = torch.arange(keys, device=device)[None]
        query = key[:, keys - queries :]
    else:
        key = where.positions
        query = where.first[:, None] + torch.arange(queries, device=device)
    seen = (key[:, None] <= query[..., None]) & (key >= 0)[:, None]
    if limit is not None:
        seen &= key[:, None] > query[..., None] - limit
    return seen[:, None]


def _is_sliding_window(mask_function: Any, config: Any) -> bool:
    """Whether this is the sliding window that the config names (chunked attention looks alike from outside)."""
    from transformers.masking_utils import sliding_window_overlay

    if torch.compiler.is_compiling():  # closures cannot be looked into there; the config tells of chunks
        return getattr(config, "attention_chunk_size", None) is None
    cells = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    parts = [part for cell in cells if isinstance(cell, tuple) for part in cell]
    return len(parts) == 2 and getattr(parts[0], "__code__", None) is sliding_window_overlay(1).__code__
