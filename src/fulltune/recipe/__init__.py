"""Settings of a recipe, read from a YAML file and checked."""
