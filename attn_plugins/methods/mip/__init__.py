"""MIP (arXiv 2409.17920): several reference images, each bound to its name."""

from attn_plugins.methods.mip.checkpoint import has_text_weights, read_text_weights
from attn_plugins.methods.mip.config import MIPConfig
from attn_plugins.methods.mip.maps import ReferenceMaps
from attn_plugins.methods.mip.method import MIP, MIPProcessor

__all__ = ["MIP", "MIPConfig", "MIPProcessor", "ReferenceMaps", "has_text_weights", "read_text_weights"]
