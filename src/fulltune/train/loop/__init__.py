"""transformers' Trainer, and fulltune's additions to it."""
