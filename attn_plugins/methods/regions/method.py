"""Regions as a method: prompts of their own for parts of the picture."""

from __future__ import annotations

import functools

from attn_plugins.method import Method, MethodConfig, Processor, SiteKind
from attn_plugins.methods.regions.config import RegionsConfig
from attn_plugins.methods.regions.layout import RegionLayout
from attn_plugins.methods.regions.processor import RegionsProcessor


class Regions(Method):
    name = "regions"
    title = "Regions: a prompt for each part of the picture, masked object attention"
    kind = "operator"
    paper = "arXiv 2501.03059, 2509.21953"
    config_class = RegionsConfig
    sites = frozenset({"self", "cross", "joint"})
    needs_prompts = True

    def processor(
        self, config: MethodConfig, layer_index: int, layer_count: int, kind: SiteKind = "cross"
    ) -> Processor | None:
        assert isinstance(config, RegionsConfig)  # patching makes it with config_class
        if kind == "self" and config.self_attention == "full":
            return None
        return _processor(config, kind)


@functools.lru_cache(maxsize=64)
def _processor(config: RegionsConfig, kind: SiteKind) -> Processor:
    """One object for equal settings: a compiled model needs a graph for each distinct one."""
    return RegionsProcessor(config, kind, _layout(config))


@functools.lru_cache(maxsize=64)
def _layout(config: RegionsConfig) -> RegionLayout:
    regions = config.regions
    return RegionLayout(
        [region.area for region in regions], [region.weight for region in regions], config.base,
        [region.name for region in regions],
    )  # fmt: skip
