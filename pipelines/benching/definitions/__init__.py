"""Rules and results by their definitions, in arithmetic that shares nothing with the library: what a check goes by."""
