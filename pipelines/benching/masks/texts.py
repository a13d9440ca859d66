"""Masks of packed text, as the Long-Context Attention Benchmark has them (arXiv 2510.17896): row intervals all.

Each is written twice: as intervals, which plans, tables and areas are made of, and as a rule in arithmetic, by which
results are checked.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from attn_plugins.pipelines.benching.documents import packed_lengths
from attn_plugins.pipelines.benching.masks.mask import Shape, Told
from attn_plugins.pipelines.benching.masks.rows import RowMask, Rows

WINDOW = 8  # windows hold an eighth of the sequence
GLOBAL = 64  # a sixty-fourth of it sees all and is seen by all
PREFIX = 4  # a fourth of it is a prefix
BLOCKS = 32  # blocks of a document mask by blocks: so many in the sequence, 1 to 8 of them a document


def full(shape: Shape) -> RowMask:
    """Every query sees every key."""
    i = torch.arange(shape.tokens)
    rows = _rows(i, low=0, high=shape.tokens)
    return RowMask(shape, "-", rows, lambda h, q, k: (q >= 0) & (k >= 0) & (h >= 0), told=Told())


def causal(shape: Shape) -> RowMask:
    """A query sees the keys up to its own."""
    i = torch.arange(shape.tokens)
    return RowMask(
        shape, "-", _rows(i, low=0, high=i + 1), lambda h, q, k: (k <= q) & (h >= 0), told=Told(True), causal=True
    )


def document(shape: Shape, is_causal: bool = False) -> RowMask:
    """Documents side by side: a query sees its own, up to its own token where `is_causal`."""
    packed = _Packed(packed_lengths(shape.tokens))
    i = torch.arange(shape.tokens)
    rows = _rows(i, low=packed.start[packed.of], high=i + 1 if is_causal else packed.end[packed.of])

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of = packed.of.to(q.device)
        same = (of[q] == of[k]) & (h >= 0)
        return same & (k <= q) if is_causal else same

    return RowMask(shape, packed.option, rows, rule, packed.edges, Told(is_causal, packed.lengths), is_causal)


def sliding(shape: Shape, is_causal: bool = False) -> RowMask:
    """A query sees the keys nearest to it: as many on both sides, or those behind it."""
    size = max(shape.tokens // WINDOW, 2)
    left, right = (size - 1, 0) if is_causal else (size // 2, size // 2)
    i = torch.arange(shape.tokens)
    rows = _rows(i, low=(i - left).clamp(min=0), high=(i + right + 1).clamp(max=shape.tokens))

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q - k <= left) & (k - q <= right) & (h >= 0)

    option = f"{left} before" if is_causal else f"{left} before, {right} after"
    return RowMask(shape, option, rows, rule, told=Told(is_causal, window=(left, right)), causal=is_causal)


def share_question(shape: Shape) -> RowMask:
    """The first document is a question, which all others, its answers, see besides themselves; causal."""
    packed = _Packed(packed_lengths(shape.tokens))
    question = packed.lengths[0]
    i = torch.arange(shape.tokens)
    start = packed.start[packed.of]
    rows = _rows(i, lead=torch.where(start > 0, question, 0), low=start, high=i + 1)

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of = packed.of.to(q.device)
        return (k <= q) & ((k < question) | (of[q] == of[k])) & (h >= 0)

    return RowMask(shape, packed.option, rows, rule, packed.edges, causal=True)


def causal_blockwise(shape: Shape) -> RowMask:
    """Demonstrations that see themselves, and a last document that sees all of them; causal."""
    packed = _Packed(packed_lengths(shape.tokens))
    last = int(packed.start[-1])
    i = torch.arange(shape.tokens)
    rows = _rows(i, low=torch.where(i >= last, 0, packed.start[packed.of]), high=i + 1)

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of = packed.of.to(q.device)
        return (k <= q) & ((q >= last) | (of[q] == of[k])) & (h >= 0)

    return RowMask(shape, packed.option, rows, rule, packed.edges, causal=True)


def prefix_lm_causal(shape: Shape) -> RowMask:
    """A prefix that sees itself whole, and a causal rest."""
    prefix = max(shape.tokens // PREFIX, 1)
    i = torch.arange(shape.tokens)

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((k < prefix) | (k <= q)) & (h >= 0)

    rows = _rows(i, low=0, high=(i + 1).clamp(min=prefix))
    return RowMask(shape, f"prefix {prefix}", rows, rule, (prefix,))


def prefix_lm_document(shape: Shape) -> RowMask:
    """Documents, the first half of each a prefix that it sees whole, the rest causal."""
    packed = _Packed(packed_lengths(shape.tokens))
    half = packed.start + (packed.end - packed.start) // 2
    i = torch.arange(shape.tokens)
    rows = _rows(i, low=packed.start[packed.of], high=torch.maximum(i + 1, half[packed.of]))

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of, prefix = packed.of.to(q.device), half.to(q.device)
        return (of[q] == of[k]) & ((k <= q) | (k < prefix[of[q]])) & (h >= 0)

    edges = sorted({*packed.edges, *half.tolist()})
    return RowMask(shape, f"{packed.option}, half of each a prefix", rows, rule, tuple(edges))


def global_sliding(shape: Shape) -> RowMask:
    """A sliding window on both sides; the first tokens see all and are seen by all."""
    held, half = max(shape.tokens // GLOBAL, 1), max(shape.tokens // (2 * WINDOW), 1)
    i = torch.arange(shape.tokens)
    everything = i < held
    rows = _rows(
        i,
        lead=torch.where(everything, 0, held),
        low=torch.where(everything, 0, (i - half).clamp(min=0)),
        high=torch.where(everything, shape.tokens, (i + half + 1).clamp(max=shape.tokens)),
    )

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q < held) | (k < held) | ((q - k).abs() <= half)) & (h >= 0)

    return RowMask(shape, f"{held} global, {half} on both sides", rows, rule, (held,))


def block_causal_document(shape: Shape) -> RowMask:
    """Documents of blocks (frames, say): a query sees the blocks of its document up to its own, that one whole."""
    block = max(shape.tokens // BLOCKS, 1)
    packed = _Packed(tuple(_block_documents(shape.tokens, block)))
    i = torch.arange(shape.tokens)
    start, end = packed.start[packed.of], packed.end[packed.of]
    high = torch.minimum(start + ((i - start) // block + 1) * block, end)

    def rule(h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        of, first = packed.of.to(q.device), packed.start.to(q.device)
        return (of[q] == of[k]) & ((k - first[of[k]]) // block <= (q - first[of[q]]) // block) & (h >= 0)

    edges = tuple(sorted({0, *high.tolist()}))
    option = f"{len(packed.lengths)} documents of blocks of {block}"
    return RowMask(shape, option, _rows(i, low=start, high=high), rule, edges)


def _block_documents(tokens: int, block: int) -> list[int]:
    """1 to 8 blocks each, in a fixed order that looks like chance."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min((1 + 5 * len(lengths) % 8) * block, left))
    return lengths


class _Packed:
    """Documents by their lengths: `start` and `end` of each, and the document `of` each token."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.edges = tuple(accumulate(lengths, initial=0))
        self.start, self.end = torch.tensor(self.edges[:-1]), torch.tensor(self.edges[1:])
        self.of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        self.option = f"{len(lengths)} documents of {min(lengths)} to {max(lengths)}"


def _rows(i: torch.Tensor, *, low: torch.Tensor | int, high: torch.Tensor | int, lead: torch.Tensor | int = 0) -> Rows:
    """Of all heads alike: (1, N) each."""
    return Rows(*((torch.as_tensor(t) + torch.zeros_like(i))[None] for t in (lead, low, high)))
