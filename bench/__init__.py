"""What stands behind the claims of docs/evidence.md; `python -m bench` measures them again."""
