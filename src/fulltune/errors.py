from __future__ import annotations

from collections.abc import Sequence


class FulltuneError(Exception):
    """A problem that the user can understand and act on, shown without a traceback."""

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeError(FulltuneError):
    """The recipe or an override is wrong: unknown key, wrong type, impossible combination."""

    exit_code = 2


class SetupError(FulltuneError):
    """The environment is wrong: a missing model or package, an unwritable folder, or another recipe's run folder."""

    exit_code = 2


class DoesNotFitError(FulltuneError):
    """The run does not fit into memory or onto the disk."""

    exit_code = 3


class DataError(FulltuneError):
    """The data was refused: missing, empty, broken or impossible to learn from."""

    exit_code = 4


class GuardStop(FulltuneError):
    """A guard stopped the run: non-finite loss, weights that never changed, a process that died."""

    exit_code = 5


class Diverged(GuardStop):
    """The loss or a gradient became non-finite, or the loss rose back to its initial value or higher."""


class Spiked(Diverged):
    """Training became unstable at step `since`; an earlier checkpoint may still be good."""

    def __init__(self, problems: str | list[str], since: int) -> None:
        super().__init__(problems)
        self.since = since


class InterruptedRun(FulltuneError):
    """The user or the system interrupted the run; the same command resumes it."""

    exit_code = 75
