"""Generic texts and the budget, as functions without a model."""
