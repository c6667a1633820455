"""Files in, rows out: each format, and what a table gives."""
