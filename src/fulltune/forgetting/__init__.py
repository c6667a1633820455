"""Generic text and the budget for forgetting, as functions without a model."""
