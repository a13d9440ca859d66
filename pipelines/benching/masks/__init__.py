"""The masks that are measured, by name: one registry of rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attn_plugins.pipelines.benching.masks import agents, blocks, grids, heads, texts
from attn_plugins.pipelines.benching.masks.mask import Mask, Shape


@dataclass(frozen=True)
class Entry:
    """A kind of mask. `make` raises `Cannot` for a shape that it does not have."""

    title: str
    make: Callable[[Shape], Mask]


MASKS: dict[str, Entry] = {
    "full": Entry("every pair", texts.full),
    "causal": Entry("causal", lambda shape: heads.with_spans(texts.causal(shape))),
    "document": Entry("documents", texts.document),
    "causal_document": Entry("causal documents", functools.partial(texts.document, is_causal=True)),
    "sliding": Entry("sliding window", texts.sliding),
    "causal_sliding": Entry("causal sliding window", lambda s: heads.with_spans(texts.sliding(s, is_causal=True))),
    "share_question": Entry("answers that share a question", texts.share_question),
    "causal_blockwise": Entry("causal blocks, the last of which sees all", texts.causal_blockwise),
    "prefix_lm_causal": Entry("prefix LM", texts.prefix_lm_causal),
    "prefix_lm_document": Entry("prefix LM by document", texts.prefix_lm_document),
    "global_sliding": Entry("global tokens and a sliding window", texts.global_sliding),
    "block_causal_document": Entry("documents, causal by blocks", texts.block_causal_document),
    "block_sparse": Entry("blocks of one size", blocks.uniform),
    "variable_block_sparse": Entry("blocks of any size", blocks.variable),
    "gna_aligned": Entry("GNA, windows that tiles share", grids.gna),
    "gna": Entry("GNA, a window for every query", functools.partial(grids.gna, aligned=False)),
    "vmoba": Entry("VMoBA, blocks chosen by content", blocks.vmoba),
    "moa_spans": Entry("MoA, a span for every head", heads.spans),
    "agent": Entry("agent attention", agents.agents),
    "moh": Entry("MoH, half of the heads of a token", heads.routed),
}


def named(names: Iterable[str]) -> list[str]:
    """The names, checked; all of them for none.

    Raises:
        ValueError: an unknown one; the message lists the legal ones.
    """
    found = list(names)
    for name in found:
        if name not in MASKS:
            raise ValueError(f"mask {name!r}: legal are {', '.join(MASKS)}")
    return found or list(MASKS)


__all__ = ["MASKS", "Entry", "Mask", "Shape", "named"]
