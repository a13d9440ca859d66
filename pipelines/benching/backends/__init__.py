"""The implementations that are measured, ours among them."""
