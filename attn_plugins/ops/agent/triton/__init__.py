"""Triton kernels of `agent_attention`. Imported only where they run."""
