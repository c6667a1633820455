"""A training step's memory and work, from the model's class without its weights."""
