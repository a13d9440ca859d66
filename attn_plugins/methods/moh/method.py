"""Mixture-of-head attention (arXiv 2410.11842) as a method: which router each layer gets."""

from __future__ import annotations

import dataclasses
import functools

from torch import nn

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind, SiteShape
from attn_plugins.methods.moh.config import MoHConfig
from attn_plugins.methods.moh.processor import MoHProcessor
from attn_plugins.methods.moh.weights import HeadRouter

_REMEDY = (
    "the model loses quality until it is tuned (docs/moh.md), or patched with router='ridge' and calibrated: "
    "attn_plugins.methods.moh.calibrate(handle, batches)"
)
_UNTRAINED = {
    "learned": f"moh: its routers are new and choose heads at random: {_REMEDY}",
    "ridge": "moh: its routers are not calibrated, and leave the last heads of each layer out: call "
    "attn_plugins.methods.moh.calibrate(handle, batches)",
    "query_norm": "moh: chosen by the norms of their queries, heads are left out that the model needs: " + _REMEDY,
}


class MoH(Method):
    name = "moh"
    title = "Mixture of heads: a router chooses each token's heads"
    kind = "module"
    paper = "arXiv 2410.11842"
    config_class = MoHConfig
    sites = frozenset({"self", "causal"})

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "self"
    ) -> Processor | None:
        assert isinstance(config, MoHConfig)  # patching makes it with config_class
        return _processor(config)

    def weights(self, config: MethodConfig, shape: SiteShape, layer_index: int) -> nn.Module | None:
        assert isinstance(config, MoHConfig)  # patching makes it with config_class
        if config.router == "query_norm":
            return None
        budget = config.budget(shape.heads, shape.group)
        return HeadRouter(
            config.router, shape.width, budget, scale=config.scale, seed=layer_index, output=shape.output
        )  # fmt: skip

    def settled(self, config: MethodConfig, sites: list[tuple[SiteKind, SiteShape]]) -> MethodConfig:
        """A router by name, and numbers of heads as shares of these layers', so that a file says what it is of."""
        assert isinstance(config, MoHConfig)  # patching makes it with config_class
        normed = any(shape.q_norm for _, shape in sites)
        if config.router == "auto":
            plain = all(kind == "causal" for kind, _ in sites) and not normed and config.scale == "code"
            plain = plain and not config.skip_projections
            config = dataclasses.replace(config, router="query_norm" if plain else "learned")
        if config.router == "query_norm" and normed:
            raise ValueError(
                "router='query_norm': this model norms the queries of each head, which leaves their norms nothing to "
                "say; legal are 'learned' and 'ridge'"
            )
        sizes = sorted({(shape.heads, shape.group) for _, shape in sites})
        budgets = [config.budget(*size) for size in sizes]
        if len(sizes) > 1:
            if isinstance(config.active, int) or isinstance(config.shared, int):
                raise ValueError(
                    f"active={config.active}, shared={config.shared}: the layers of this model have "
                    f"{sizes[0][0]} to {sizes[-1][0]} heads: give shares of them"
                )
            return config
        (budget,) = budgets
        return dataclasses.replace(
            config, active=budget.active / budget.units, shared=budget.shared / budget.units
        )  # fmt: skip

    def advice(self, config: MethodConfig) -> str | None:
        assert isinstance(config, MoHConfig)  # patching makes it with config_class
        return None if config.active == 1.0 else _UNTRAINED[config.router]


@functools.lru_cache(maxsize=64)
def _processor(config: MoHConfig) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return MoHProcessor(config)
