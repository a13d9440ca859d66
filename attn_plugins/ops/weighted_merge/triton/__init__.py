"""Triton kernels of `weighted_merge`, forward alone. Imported only where they run."""
