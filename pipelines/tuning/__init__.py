"""The jobs behind the examples that continue-tune, and what they share."""
