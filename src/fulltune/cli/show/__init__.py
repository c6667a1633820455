"""What a person sees in the terminal, in 80 columns."""
