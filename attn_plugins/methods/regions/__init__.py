"""Regions: a prompt for each part of the picture (attention couple; masked object attention, arXiv 2501.03059)."""

from attn_plugins.methods.regions.config import Region, RegionsConfig
from attn_plugins.methods.regions.layout import RegionLayout
from attn_plugins.methods.regions.maps import RegionMaps
from attn_plugins.methods.regions.method import Regions
from attn_plugins.methods.regions.processor import RegionsProcessor

__all__ = ["Region", "RegionLayout", "RegionMaps", "Regions", "RegionsConfig", "RegionsProcessor"]
