"""Find, check, load and look at a pretrained model."""
