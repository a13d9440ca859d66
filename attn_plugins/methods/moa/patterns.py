"""Plans that need no search: one rule for all heads, one per layer, StreamingLLM's, DuoAttention's.

They are what a searched plan has to beat. A rule counts the sinks in: `alpha` tokens are `alpha - sink` behind a query
and the sinks. Each takes the model's shape: layers, query heads, and KV heads (None: as many as query heads).
"""

from __future__ import annotations

from collections.abc import Sequence

from attn_plugins.methods.moa.plan import SpanPlan


def uniform(
    layers: int,
    query_heads: int,
    kv_heads: int | None = None,
    *,
    alpha: float = 0,
    beta: float = 0.0,
    sink: int = 64,
    block: int = 64,
) -> SpanPlan:
    """The same rule for every head: `alpha` tokens and the share `beta` of the length.

    Raises:
        ValueError: as `SpanPlan`; or a rule that keeps nothing.
    """
    return per_layer([alpha] * layers, [beta] * layers, query_heads, kv_heads, sink=sink, block=block, name="uniform")


def per_layer(
    alphas: Sequence[float],
    betas: Sequence[float],
    query_heads: int,
    kv_heads: int | None = None,
    *,
    sink: int = 64,
    block: int = 64,
    name: str = "per layer",
) -> SpanPlan:
    """A rule for each layer, the same for its heads.

    Raises:
        ValueError: as `SpanPlan`; or a rule that keeps nothing.
    """
    kv_heads = query_heads if kv_heads is None else kv_heads
    for alpha, beta in zip(alphas, betas, strict=False):
        if alpha <= 0 and beta <= 0:
            raise ValueError(
                f"alpha={alpha}, beta={beta}: the rule keeps nothing; give tokens, or a share of the length"
            )
    rows, shares = (tuple((value,) * kv_heads for value in values) for values in (alphas, betas))
    return SpanPlan(rows, shares, "kv", query_heads, kv_heads, sink, block, provenance={"pattern": name})


def streaming(
    layers: int, query_heads: int, kv_heads: int | None = None, *, window: int, sink: int = 4, block: int = 64
) -> SpanPlan:
    """StreamingLLM (arXiv 2309.17453): `sink` first tokens and a window of `window`, whatever the length.

    The window grows to where sinks and window are whole blocks; with block=1 it is exact.

    Raises:
        ValueError: a window below 1.
    """
    if window < 1:
        raise ValueError(f"window={window}: give 1 or more tokens")
    return per_layer(
        [sink + window] * layers, [0.0] * layers, query_heads, kv_heads, sink=sink, block=block, name="streaming"
    )


def duo(
    gates: Sequence[Sequence[float]],
    query_heads: int | None = None,
    *,
    threshold: float = 0.5,
    sparsity: float | None = None,
    sink: int = 128,
    recent: int = 256,
    block: int = 64,
) -> SpanPlan:
    """DuoAttention (arXiv 2410.10819): some KV heads stay dense, the others keep `sink` and `recent` tokens.

    Args:
        gates: (layers, KV heads), clipped to [0, 1]: how much a head needs all of the text.
        query_heads: of a layer; None: the gates alone do not tell.
        threshold: heads of this gate and more stay dense.
        sparsity: instead, the share of heads that do not: those of the smallest gates (of equal ones, the earlier).

    Raises:
        ValueError: as `SpanPlan`; a sparsity outside of [0, 1].
    """
    rows = [[min(max(float(gate), 0.0), 1.0) for gate in row] for row in gates]
    dense = [[gate >= threshold for gate in row] for row in rows]
    if sparsity is not None:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity={sparsity}: legal is 0..1, the share of heads that do not stay dense")
        places = [(gate, layer, head) for layer, row in enumerate(rows) for head, gate in enumerate(row)]
        cut = {place[1:] for place in sorted(places)[: round(sparsity * len(places))]}
        dense = [[(layer, head) not in cut for head in range(len(row))] for layer, row in enumerate(rows)]
    heads = len(rows[0]) if rows else 0
    return SpanPlan(
        tuple(tuple(0 if full else sink + recent for full in row) for row in dense),
        tuple(tuple(1.0 if full else 0.0 for full in row) for row in dense),
        "kv", query_heads or max(heads, 1), max(heads, 1), sink, block, provenance={"pattern": "DuoAttention"},
    )  # fmt: skip
