"""What Linux says of processes and memory in /proc and /sys, and this user's limits; nothing where it does not."""

from __future__ import annotations

import resource
from pathlib import Path


def lines_of(path: str) -> list[str]:
    """A file's lines; none where it is not there or may not be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def sizes_of(path: str) -> dict[str, int]:
    """Lines such as `VmRSS:  123 kB`, in bytes by name."""
    parts = (line.split() for line in lines_of(path))
    return {name.rstrip(":"): int(size) * 1024 for name, size, *_ in (part for part in parts if part[2:] == ["kB"])}


def limit_bytes() -> int | None:
    """Most that a process of this user may take (`ulimit -d`, `ulimit -v`); None without such a limit."""
    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    limits = [limit for limit, _ in map(resource.getrlimit, kinds) if limit != resource.RLIM_INFINITY]
    return min(limits, default=None)
