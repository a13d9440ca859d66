"""The method: which rule each layer of a model is bound to."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.moa.files import plan_of, to_mapping
from attn_plugins.methods.moa.plan import SpanPlan
from attn_plugins.methods.moa.processor import MoAProcessor
from attn_plugins.methods.moa.rule import LayerRule
from attn_plugins.plan.spans import BLOCK

PATTERNS = {"uniform": 64, "streaming": 4}  # and their sinks


@dataclass(frozen=True)
class MoAConfig(MethodConfig):
    """A plan of spans, or one rule for all heads.

    Args:
        plan: a plan, or the file of one: ours, MoA's or DuoAttention's (docs/moa.md).
        span: without a plan: what every head keeps, sinks included: tokens, or as a float a share of the length.
        pattern: "uniform", or "streaming": StreamingLLM, `window` tokens and 4 sinks.
        window: tokens behind a query in the streaming pattern.
        sink: first tokens that all later ones see; None: the plan's, or the pattern's (64, 4).
        block: without a plan, what is kept is whole blocks of so many tokens, and at least two.
        length: the least N of the rules. N is the prompt, its padding and what `generate` is asked for; in a plain
            forward, the keys that there are.
        granularity: "token", or "block": a prefill sees whole blocks of 64, as published; decoding goes by tokens.
        backend: "auto", "cpu", "triton" or "reference".
    """

    plan: Any = None
    span: float | int | None = None
    pattern: str = "uniform"
    window: int | None = None
    sink: int | None = None
    block: int = 64
    length: int | None = None
    granularity: str = "token"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sink", 0), ("block", 1), ("length", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: give {least} or more tokens")
        if self.granularity not in ("token", "block"):
            raise ValueError(f"granularity={self.granularity!r}: legal are 'token' and 'block'")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r}: legal are {', '.join(PATTERNS)}; or give a plan")
        given = [name for name in ("plan", "span", "window") if getattr(self, name) is not None]
        wanted = "plan" if self.plan is not None else "window" if self.pattern == "streaming" else "span"
        if given != [wanted]:
            raise ValueError(
                f"moa with {', '.join(given) or 'no rule'}: give one of plan=... (a file or a SpanPlan), span=... "
                "(tokens, or a share of the length), or pattern='streaming' with window=..."
            )
        if self.plan is not None:
            plan = plan_of(_mapping(self.plan))
            if self.sink is not None:
                plan = dataclasses.replace(plan, sink=self.sink)
            object.__setattr__(self, "plan", plan)
            object.__setattr__(self, "sink", None)  # the plan has it: one way to say it, or equal settings differ
        if self.span is not None and (isinstance(self.span, bool) or not self.span > 0):
            raise ValueError(f"span={self.span!r}: give tokens, or a float as a share of the length")
        rule = self.rule(0)
        if self.granularity == "block" and (rule.sink % BLOCK or rule.block % BLOCK):
            raise ValueError(
                f"granularity='block' with sink={rule.sink}, block={rule.block}: both must be multiples of {BLOCK}"
            )

    def rule(self, layer: int) -> LayerRule:
        """What a layer is bound to."""
        if self.plan is not None:
            return LayerRule.of(self.plan, min(layer, self.plan.layers - 1), self.length or 1)
        sink = PATTERNS[self.pattern] if self.sink is None else self.sink
        if self.pattern == "streaming":
            return LayerRule((sink + (self.window or 0),), (0.0,), sink, self.block, self.length or 1)
        share = self.span if isinstance(self.span, float) else 0.0
        return LayerRule((0 if share else self.span or 0,), (share,), sink, self.block, self.length or 1)

    def to_options(self) -> dict[str, Any]:
        options = super().to_options()
        if self.plan is not None:
            options["plan"] = to_mapping(self.plan)
        return options


class MoA(Method):
    name = "moa"
    title = "Mixture of sparse attention spans, one per head, with ring caches"
    kind = "sparse"
    paper = "arXiv 2406.14909"
    config_class = MoAConfig
    sites = frozenset({"causal"})
    own_settings = frozenset({"plan", "span", "pattern", "window"})

    def ladder(self, kind: SiteKind, grid: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
        return {"span": 0.5}, {"span": 0.25}, {"span": 0.125}

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "causal"
    ) -> Processor | None:
        assert isinstance(config, MoAConfig)  # patching makes it with config_class
        return _processor(config.rule(layer_index), config.granularity, config.backend, config.plan)


@functools.lru_cache(maxsize=1024)
def _processor(rule: LayerRule, granularity: str, backend: str, plan: SpanPlan | None) -> MoAProcessor:
    return MoAProcessor(rule, granularity, backend, plan)


def _mapping(given: Any) -> Any:
    """`MethodConfig.from_options` has made tuples of pairs of a mapping."""
    if isinstance(given, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in given):
        return {key: _mapping(value) if key == "provenance" else value for key, value in given}
    return given
