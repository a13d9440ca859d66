"""Algorithms from papers. None of them knows a model; none imports another."""
