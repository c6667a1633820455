"""Generic texts and the budget for forgetting, as functions without a model."""
