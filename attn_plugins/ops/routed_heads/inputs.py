"""What `routed_head_attention` is given besides q, k, v: checks, and one form for all ways to say it."""

from __future__ import annotations

from typing import Any

import torch

from attn_plugins.ops.checks import DTYPES, INTEGERS


def check_gates(q: torch.Tensor, gates: torch.Tensor, active: torch.Tensor | None) -> torch.Tensor:
    """(B, N, H) bool: the heads to compute for each token, those of a gate that is not 0 and of `active`.

    Raises:
        ValueError, TypeError: another shape, dtype or device.
    """
    batch, heads, tokens, _ = q.shape
    for name, given in (("gates", gates), ("active", active)):
        if given is None and name == "active":
            continue
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}: give a tensor (batch, tokens, heads)")
        if tuple(given.shape) != (batch, tokens, heads):
            raise ValueError(
                f"{name} {tuple(given.shape)}: with q {tuple(q.shape)}, (batch, heads, tokens, head_dim), legal is "
                f"({batch}, {tokens}, {heads}), (batch, tokens, heads)"
            )
        if given.device != q.device:
            raise ValueError(f"{name} is on {given.device}, q on {q.device}: move them to one device")
    if gates.dtype not in DTYPES:
        legal = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        raise TypeError(f"gates are {gates.dtype}: give one floating dtype: {legal}")
    if active is not None and active.dtype != torch.bool:
        raise TypeError(f"active is {active.dtype}: give bool, True where a head is computed")
    chosen = gates.detach() != 0
    return chosen if active is None else chosen & active


def check_bounds(q: torch.Tensor, k: torch.Tensor, causal: bool, lengths: Any) -> torch.Tensor | None:
    """(B, 2) int64, [first, end) of the real tokens of each item in k; None where all are.

    Raises:
        ValueError, TypeError: another shape or dtype, more queries than keys where causal. Values are checked where
            they are read.
    """
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    if causal and queries > keys:
        raise ValueError(f"causal with {queries} queries, but {keys} keys: a query's own key is among the keys")
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor):
        lengths = torch.tensor(lengths, device=q.device)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"lengths are {lengths.dtype}: give int32 or int64")
    if lengths.dim() == 0:
        lengths = lengths.expand(batch)
    if tuple(lengths.shape) not in ((batch,), (batch, 2)):
        raise ValueError(
            f"lengths {tuple(lengths.shape)}: legal is one number, or ({batch},) or ({batch}, 2) [before, valid]"
        )
    valid = lengths.to(q.device, torch.int64)
    first = valid[:, 0] if valid.dim() == 2 else torch.zeros_like(valid)
    return torch.stack([first, first + (valid[:, 1] if valid.dim() == 2 else valid)], dim=1)


def host_bounds(bounds: torch.Tensor | None, batch: int, keys: int) -> list[tuple[int, int]]:
    """[first, end) of each item, read on the host.

    Raises:
        ValueError: tokens outside of k.
    """
    if bounds is None:
        return [(0, keys)] * batch
    found = [(first, end) for first, end in bounds.tolist()]
    for item, (first, end) in enumerate(found):
        if not 0 <= first <= end <= keys:
            raise ValueError(
                f"item {item}: tokens [{first}, {end}) are valid, but k has {keys}: lengths are 0..{keys}, pairs "
                f"[before, valid] add up to {keys} at most"
            )
    return found


def query_offset(queries: int, keys: int, causal: bool) -> int | None:
    """The index in k of the first query; None where queries are other tokens than keys."""
    return keys - queries if causal or queries == keys else None


def real_rows(mask: torch.Tensor, bounds: torch.Tensor | None, keys: int, causal: bool) -> torch.Tensor:
    """The mask (B, N, H) without what cannot be computed: queries that are padding, and items without keys."""
    if bounds is None:
        return mask if keys else torch.zeros_like(mask)
    first, end = bounds[:, :1], bounds[:, 1:]
    real = (end > first).expand(-1, mask.shape[1])
    offset = query_offset(mask.shape[1], keys, causal)
    if offset is not None:
        place = offset + torch.arange(mask.shape[1], device=mask.device)
        real = real & (place >= first) & (place < end)
    return mask & real[..., None]
