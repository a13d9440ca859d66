"""What is known of other people's models: where their attention is, how to get between, what their tokens are."""
