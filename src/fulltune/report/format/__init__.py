"""Blocks, words and plots of both reports; as Markdown and HTML."""
