"""Processors for models whose attention asks for more than the common interception can see."""
