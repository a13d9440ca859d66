"""What a searched plan is compared with: other plans that keep as much, made of the same profile if one is needed."""

from __future__ import annotations

from collections.abc import Callable

from attn_plugins.methods.moa import SpanPlan, patterns
from attn_plugins.pipelines.moa.options import Options, SearchSettings
from attn_plugins.pipelines.moa.profile import Profile
from attn_plugins.search import choose, grouped, hidden_loss

PlanAt = Callable[[int], SpanPlan | None]  # the plan for a length; None is dense

STREAMING_SINK = 4
DUO_SINK, DUO_RECENT = 128, 256


def contenders(plan: SpanPlan, profile: Profile, settings: SearchSettings) -> dict[str, PlanAt]:
    """Dense, the searched plan and its rivals, by name.

    The rivals get the budget at every length anew, also those whose papers fix a number of tokens: StreamingLLM's
    window is the budget's, and DuoAttention has as many dense heads as fit beside its short windows. Its gates are not
    trained here, they are the influence of what its short window would hide.

    Raises:
        ValueError: a budget that the rules of whole layers cannot meet.
    """
    shape = (plan.layers, plan.query_heads, plan.kv_heads)
    options = Options.of(profile, settings, shape, "layer")
    chosen = choose(options.problem, solver=settings.solver)
    if chosen is None:
        raise ValueError(f"no windows of whole layers keep {settings.density:g} at all of {settings.bounded}")
    by_layer = options.plan(chosen, pattern="per layer")
    gates = duo_gates(profile, settings, shape)

    def duo(n: int) -> SpanPlan:
        heads = shape[0] * shape[2]
        kept = min(DUO_SINK + DUO_RECENT, int(settings.density * n) // settings.block * settings.block)
        sink = min(DUO_SINK, kept // 2)
        dense = int(heads * (settings.density - kept / n) / (1 - kept / n) + 1e-9) if kept < n else heads
        return patterns.duo(gates, shape[1], sparsity=1 - dense / heads, sink=sink, recent=kept - sink)

    def streaming(n: int) -> SpanPlan:
        kept = int(settings.density * n) // settings.block * settings.block
        return patterns.streaming(*shape, window=kept - STREAMING_SINK, sink=STREAMING_SINK)

    uniform = patterns.uniform(*shape, beta=settings.density, sink=settings.sink, block=settings.block)
    return {
        "dense": lambda n: None,
        "searched": lambda n: plan,
        "per layer": lambda n: by_layer,
        "uniform": lambda n: uniform,
        "streaming": streaming,
        "duo": duo,
    }


def duo_gates(profile: Profile, settings: SearchSettings, shape: tuple[int, int, int]) -> list[list[float]]:
    """(layers, KV heads), 0 to 1: influence behind DuoAttention's window at the longest length, over the largest."""
    layers, _, kv_heads = shape
    maps = profile.maps(profile.lengths[-1])
    hidden = hidden_loss(maps, [DUO_RECENT // settings.block], sink=settings.sink // settings.block)
    per_head = grouped(hidden[..., 0], kv_heads, dim=1).clamp(min=0)
    return (per_head / per_head.max().clamp(min=1e-30)).view(layers, kv_heads).tolist()
