"""Side-by-side measurements; their data as CSV under results/."""
