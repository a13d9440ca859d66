"""Whole jobs over the library, and the command line over them."""
