"""What the attention heads of a model look at, how much each is worth, and which sparse settings follow.

    found = profile(pipe, lambda: pipe(prompt="a cat", num_inference_steps=8))
    print("\\n".join(found[0].summary()))
    for one in suggest(found[0], keep=0.95):
        print(one.method, one.options)

After the visual analytics of vision transformers (arXiv 2303.13731): importance of heads by switching them off,
attention strength by hops, groups of patterns (there by an autoencoder, here by k-means over a few numbers), trends
over layers, and here over the steps of a generation. A few query rows of each head are looked at, exactly, as
`handle.measure` does; the model is patched meanwhile and exactly as before afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attn_plugins.measures import Measures
from attn_plugins.patching import patched as patched_
from attn_plugins.pipelines.profiling.clusters import clusters as cluster
from attn_plugins.pipelines.profiling.importance import importance as measure_importance
from attn_plugins.pipelines.profiling.result import Profile
from attn_plugins.pipelines.profiling.suggestions import Suggestion, suggest
from attn_plugins.pipelines.profiling.watching import Watch, watched
from attn_plugins.targets import find

__all__ = ["Profile", "Suggestion", "check", "profile", "suggest", "work"]

Tick = Callable[[str], None]


def profile(
    obj: Any,
    run: Callable[[], object],
    *,
    rows: int = 32,
    sinks: int = 64,
    importance: int = 1,
    copies: int = 8,
    groups: int = 5,
    inputs: str = "",
    tick: Tick = lambda what: None,
) -> list[Profile]:
    """Profile `obj` while `run` runs it: one profile per model (a pipeline may have two).

    Args:
        obj: a pipeline or model, not patched, in evaluation mode.
        run: calls it, once or several times; its result is not looked at. Language models without a cache
            (use_cache=False), so that all keys are there.
        rows: query rows of each head and call.
        sinks: first tokens of a text that spans leave out of the count, as MoA keeps them anyway.
        importance: how many forwards, spread evenly over the run, measure the importance of heads; 0: none.
        copies: heads that are tried at once.
        groups: most groups of heads.
        inputs: what `run` does, in words.
        tick: called as the work goes on; `work` tells how often at most.

    Raises:
        ValueError: numbers below what is legal; no family knows `obj`, or it is patched; `run` ran no attention of it.
    """
    given = {"rows": rows, "copies": copies, "groups": groups, "sinks": sinks, "importance": importance}
    for name, value in given.items():
        least = 0 if name in ("sinks", "importance") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: give a whole number of {least} or more")
    with watched(obj, rows, sinks) as watches:
        with torch.no_grad():
            run()
        tick("run")
        found = []
        for target, watch in zip(find(obj), watches, strict=True):
            for name in [name for name, sums in watch.layers.items() if not sums.rows]:
                del watch.layers[name]
            if watch.layers:
                found.append(
                    _profile(watch, target.family.title, rows, sinks, importance, copies, groups, inputs, tick)
                )
    if not found:
        raise ValueError(
            f"the run asked for no attention of {type(obj).__name__} whose tokens are known (texts: no padding)"
        )
    return found


def _profile(
    watch: Watch, family: str, rows: int, sinks: int, forwards: int, copies: int, groups: int, inputs: str, tick: Tick
) -> Profile:
    steps = sorted(watch.forwards)
    chosen = [steps[(2 * number + 1) * len(steps) // (2 * forwards)] for number in range(min(forwards, len(steps)))]
    change, loss = measure_importance(watch, chosen, copies, tick) if chosen else ({}, None)
    watch.forwards.clear()
    grouped = cluster(watch.layers, groups)
    model = type(watch.root).__name__
    return Profile(model, family, watch.layers, change, loss, grouped, len(steps), rows, sinks, inputs)


def work(obj: Any, importance: int, copies: int) -> int:
    """About how many ticks a profile of `obj` makes, for a progress bar."""
    total = 1
    for root, family, _ in find(obj):
        for site in family.find_sites(root):
            shape = family.shape(root, site.module) if family.shape is not None and site.kind != "cross" else None
            heads = getattr(shape, "heads", 0)
            total += importance * -(-heads // copies)
    return total


def check(obj: Any, run: Callable[[], object], one: Suggestion, rows: int = 64) -> Measures:
    """Run `obj` patched as suggested, and measure the recall that was predicted (`Suggestion.recall`)."""
    with (
        patched_(obj, one.method, layers=one.layers, dense_steps=0, min_tokens=0, **one.options) as handle,
        handle.measure(rows) as measures,
        torch.no_grad(),
    ):
        run()
    return measures
