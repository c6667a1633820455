"""The command line for tests about processes: it plans by the rule of thumb, because tracing a model takes seconds.

python tests/untraced_command.py train recipe.yaml ...
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from fulltune.cli import app
from fulltune.footprint import trace


def untraced(*_: Any, **__: Any) -> Any:
    raise ValueError("left out by a test")


if __name__ == "__main__":
    with mock.patch.object(trace, "trace_footprint", untraced):
        app.main()
