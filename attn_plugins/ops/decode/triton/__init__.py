"""Triton kernels of `decode_attention`: split over the keys, combined by LSE. Imported only where they run."""
