"""What methods share that choose blocks of a grid's keys by content: their processor and the check of their options."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch

from attn_plugins.method import AttentionCall, Kept, MethodConfig, Processor
from attn_plugins.ops import vmoba_attention
from attn_plugins.ops.checks import choose_backend, kernel_refusal, resolve_scale
from attn_plugins.ops.vmoba.choice import choose_for_tiles, choose_for_tokens
from attn_plugins.ops.vmoba.layout import decode, encode, fit_block, fit_tile
from attn_plugins.ops.vmoba.selection import Selection
from attn_plugins.sequence import Sequence

SELECTION = ("rule", "scope", "k_blocks", "tau", "min_blocks", "max_blocks")
THRESHOLD_DENSITY = 0.75  # blocks kept, of tau: min-max normalised scores of random fields need .65 to .8


class BlockChoiceProcessor(Processor):
    """Calls `ops.vmoba_attention` with the options that `setting` gives for a grid."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def setting(self, grid: tuple[int, ...]) -> dict[str, Any]:
        """`block`, `rule`, `scope`, `k_blocks` or `tau`, and what else the operator takes, for this grid."""

    def refuses(self, call: AttentionCall) -> str | None:
        if call.q.shape[2] != call.k.shape[2]:
            return f"{call.k.shape[2]} keys for {call.q.shape[2]} queries: blocks need one grid for both"
        if call.causal:
            return "the model masks the future, and blocks of a grid know no order"
        return super().refuses(call)

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        sequence = call.sequence
        assert sequence is not None  # Layer.attend calls no processor without one
        out = vmoba_attention(
            call.q,
            call.k,
            call.v,
            grid=sequence.grid,
            **self.setting(sequence.grid),
            text_before=_text(sequence.text_before, sequence.valid_before, call.q.shape[0]),
            text_after=_text(sequence.text_after, sequence.valid_after, call.q.shape[0]),
            scale=call.scale,
            backend=getattr(self.config, "backend", "auto"),
        )
        assert isinstance(out, torch.Tensor)  # no LSE was asked for
        return out

    def kept(self, call: AttentionCall, rows: torch.Tensor) -> Kept:
        sequence = call.sequence
        assert sequence is not None  # it has taken the call
        options = {"tile": None, "exact": False, **self.setting(sequence.grid)}
        how = Selection(**{name: options[name] for name in SELECTION if name in options})
        block = fit_block(sequence.grid, options["block"])
        spec = encode(sequence, block, fit_tile(block, options["tile"]))
        layout = decode(spec)[0][1]  # blocks and tiles of the grid are the same for every item
        backend = getattr(self.config, "backend", "auto")
        backend = choose_backend(backend, call.q.device, kernels=True, refusal=kernel_refusal(call.q))
        backend = "cpu" if backend == "reference" else backend
        asked = call.q, call.k, spec, how, resolve_scale(call.scale, call.q.shape[-1]), backend
        tokens = (rows - sequence.text_before).clamp(0, sequence.tokens - 1)
        if options["exact"]:
            chosen = choose_for_tokens(*asked)[:, :, tokens.to(call.q.device)]
        else:
            tiles = layout.tile_of[tokens].to(call.q.device)
            lists, count = (t[:, :, tiles] for t in choose_for_tiles(*asked))
            behind = torch.arange(lists.shape[-1], device=lists.device) >= count[..., None]
            none = lists.new_zeros(*lists.shape[:3], layout.count + 1, dtype=torch.bool)
            listed = lists.long().masked_fill(behind, layout.count)
            chosen = none.scatter_(-1, listed, True)[..., : layout.count]
        return Kept.on_grid(sequence, rows, layout.own[layout.tile_of], chosen)

    def density(self, sequence: Sequence) -> float:
        """Share of the dense pairs, text included. By a threshold it depends on the content: an estimate.

        For "top_p" it is what even weights would need; weights that differ need less.
        """
        options = self.setting(sequence.grid)
        blocks = block_count(sequence.grid, options["block"])
        if options["rule"] == "topk":
            kept = float(options["k_blocks"])
        elif options["tau"] >= 1:
            kept = float(blocks)
        else:
            kept = blocks * options["tau"] * (THRESHOLD_DENSITY if options["rule"] == "threshold" else 1.0)
        most = options.get("max_blocks") or blocks
        share = min(max(kept, options.get("min_blocks", 1), 1), most, blocks) / blocks
        rows = []
        for item in range(sequence.batch or 1):
            one = sequence.item(item)
            assert isinstance(one.valid_before, int) and isinstance(one.valid_after, int)  # an item's are
            text = one.valid_before + one.valid_after
            rows.append(one.tokens * (share * one.tokens + 2 * text) + text * text)
        return sum(rows) / len(rows) / sequence.length**2


def block_count(grid: tuple[int, ...], block: tuple[int, ...]) -> int:
    """How many blocks a grid has."""
    return math.prod([-(-length // size) for length, size in zip(grid, fit_block(grid, block), strict=True)])


def share_of_blocks(value: int | float, blocks: int) -> int:
    """A number of blocks, given as one or as a share of them."""
    return min(value if isinstance(value, int) else max(1, round(value * blocks)), blocks)


def check_share(name: str, value: Any) -> None:
    """A number of blocks (an int of 1 and more) or a share of them (a float in (0, 1]).

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not (
        (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
    ):
        raise ValueError(
            f"{name}={value!r}: give a number of blocks (1 or more), or a share of them as a float in (0, 1]"
        )


def _text(length: int, valid: Any, batch: int) -> Any:
    """`text_before` or `text_after` as the operator takes it."""
    if valid == length:
        return length
    return [[length, v] for v in (valid if isinstance(valid, tuple) else (valid,) * batch)]
