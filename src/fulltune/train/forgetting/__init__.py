"""A run that keeps what the model could do before: generic text is watched, trained along, and decides what is kept."""
