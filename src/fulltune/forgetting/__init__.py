"""What a model could do before: generic text, and how far training moves the model away on it."""
