"""transformers' Trainer, and what is ours in it."""
