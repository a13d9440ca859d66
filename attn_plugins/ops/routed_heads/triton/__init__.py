"""The Triton kernel: gathered rows of a head against all its keys."""
