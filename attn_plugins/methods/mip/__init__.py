"""MIP (arXiv 2409.17920): several reference images, each bound to its name."""

from attn_plugins.methods.mip.checkpoint import has_text_weights, read_adapter, read_text_weights, write_adapter
from attn_plugins.methods.mip.config import MIPConfig
from attn_plugins.methods.mip.maps import ReferenceMaps
from attn_plugins.methods.mip.method import MIP, MIPProcessor
from attn_plugins.methods.mip.training import Strengths, make_adapter_trainable, save_adapter

__all__ = [
    "MIP",
    "MIPConfig",
    "MIPProcessor",
    "ReferenceMaps",
    "Strengths",
    "has_text_weights",
    "make_adapter_trainable",
    "read_adapter",
    "read_text_weights",
    "save_adapter",
    "write_adapter",
]
