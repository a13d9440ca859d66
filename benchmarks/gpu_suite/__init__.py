"""How a GPU benchmark is run, whatever it measures: check, time, memory, clocks, rows, table."""
