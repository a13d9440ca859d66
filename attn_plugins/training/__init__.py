"""Data and losses for the models that this library trains itself."""
