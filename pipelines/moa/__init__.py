"""What the search for spans and its evaluation are made of."""
