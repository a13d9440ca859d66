"""MoA: mixture of sparse attention, a span per head that grows with the text (arXiv 2406.14909)."""

from attn_plugins.methods.moa.files import load_plan, plan_of
from attn_plugins.methods.moa.method import MoA, MoAConfig
from attn_plugins.methods.moa.plan import SpanPlan

__all__ = ["MoA", "MoAConfig", "SpanPlan", "load_plan", "plan_of"]
