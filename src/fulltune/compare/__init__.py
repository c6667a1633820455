"""Full fine-tuning against its cheaper rivals on the same rows: fair, counted and with a verdict."""
