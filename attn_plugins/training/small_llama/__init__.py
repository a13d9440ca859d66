"""The embedded language model: its text, its tokenizer, its retrieval tasks, its training steps and its evaluation."""
