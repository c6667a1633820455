"""The train stage: attempts in processes of their own (`worker/attempt.py`), retried by `parent/retry.py`."""
