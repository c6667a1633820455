"""The train stage: attempts in processes of their own (`worker/attempt.py`), started and retried by
`parent/retry.py`."""
