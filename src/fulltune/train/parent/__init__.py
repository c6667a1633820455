"""The parent process, which starts attempts."""
