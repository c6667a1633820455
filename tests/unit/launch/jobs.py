"""What the tests of launchers share: recipes, programs that stand in for others, and fulltune itself as one of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests import tiny
from tests.contract.command import Result, fulltune

NASTY = "it's $(touch HURT) `touch HURT` \"$HOME\" %j #x\nline & ;'"
"""A name for files and folders that no shell and no YAML may read otherwise."""

FULLTUNE = r"""#!/bin/bash
# Stands in for fulltune: notes its arguments, each ended by a NUL; waits for TERM if told to; ends with codes in turn.
rank=0
for ((i = 1; i < $#; i++)); do if [[ "${!i}" == --machine-rank ]]; then j=$((i + 1)) rank="${!j}"; fi; done
printf '%s\0' "$PWD" "$@" >"NOTES/called-$rank"
env >"NOTES/env-$rank"
echo "start $rank" >>"NOTES/events"
trap 'echo "TERM $rank" >>"NOTES/events"; sleep 0.3; exit 75' TERM
if [[ -e "NOTES/hold-$rank" ]]; then for ((i = 0; i < 600; i++)); do sleep 0.1; done; fi
codes="NOTES/codes-$rank"
code="$(head -n 1 "$codes" 2>/dev/null)"
if [[ -s "$codes" ]]; then sed -i 1d "$codes"; fi
echo "end $rank ${code:-0}" >>"NOTES/events"
exit "${code:-0}"
"""


class Place:
    """A folder with a recipe, programs of its own on the PATH, and notes of what they were told."""

    def __init__(self, folder: Path, recipe: str = "recipe.yaml", inside: str = "work", machines: int = 2) -> None:
        self.notes, self.programs = folder / "notes", folder / "programs"
        self.work = folder / inside
        for made in (self.notes, self.programs, self.work):
            made.mkdir()
        train = {"num_machines": machines, "num_processes": machines, "global_batch_size": 64}
        self.recipe = tiny.write_recipe(self.work / recipe, "MODEL", "train.csv", train=train)
        self.program("fulltune", FULLTUNE.replace("NOTES", str(self.notes)))

    def program(self, name: str, text: str) -> Path:
        """Put a script on the PATH."""
        path = self.programs / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return path

    def launch(self, launcher: str, *arguments: object) -> Result:
        return fulltune("launch", self.recipe, "--on", launcher, *arguments)

    def written(self, ending: str) -> Path:
        """What lies beside the recipe by now."""
        return self.recipe.with_name(f"{self.recipe.stem}.{ending}")

    def edit(self, ending: str, *changes: tuple[str, str]) -> Path:
        """Change lines of what was written, as its user does."""
        path = self.written(ending)
        text = path.read_text(encoding="utf-8")
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")
        return path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}"}

    def shell(self, *command: object, more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command with the programs."""
        words = [str(word) for word in command]
        return subprocess.run(
            words,
            env={**self.environment, **(more or {})},
            cwd=self.notes,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def called(self, rank: int = 0) -> list[str]:
        """Folder and arguments that fulltune was called with."""
        return (self.notes / f"called-{rank}").read_text(encoding="utf-8").split("\0")[:-1]

    def events(self) -> list[str]:
        path = self.notes / "events"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def codes(self, rank: int, *codes: int) -> None:
        """What fulltune ends with, call by call."""
        (self.notes / f"codes-{rank}").write_text("".join(f"{code}\n" for code in codes), encoding="utf-8")

    def hold(self, *ranks: int) -> None:
        """Have these wait for TERM."""
        for rank in ranks:
            (self.notes / f"hold-{rank}").touch()
