"""A run whose settings are searched: several runs on the same rows, the best of which by the eval rows goes on."""
