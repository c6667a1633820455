"""What a user asks for: every setting on its field, read from a file, checked."""
