"""What a benchmark of attention is made of: masks, backends, a check, a stopwatch, rows, a table, a plot."""
