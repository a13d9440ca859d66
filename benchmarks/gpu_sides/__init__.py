"""The implementations that are measured beside ours, and ours."""
