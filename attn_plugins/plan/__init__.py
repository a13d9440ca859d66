"""Block plans: which key blocks each query block sees. Kernels know nothing else."""

from attn_plugins.plan.block_plan import BlockPlan

__all__ = ["BlockPlan"]
