"""Model types of our own, which transformers' Auto classes load once `attn_plugins` is imported."""
