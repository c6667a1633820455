"""Compare full fine-tuning with cheaper methods on the same rows."""
