"""Malformed data files: each row is used as it was written or listed, each refusal is clear, and nothing crashes.

    python -m bench.malformed_files --case 137 FOLDER   # one case; its file stays in FOLDER where it fails

The cases are those of `tests/contract/malformed.py`, with bytes of tables changed at random, too; the tests have the
first 96. Each runs the whole command `fulltune data` in a forked process with 12 GB of address space and 60 seconds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.results import Figure
from bench.runs import SMOKE, script
from tests import tiny
from tests.contract import malformed
from tests.contract.command import fulltune
from tests.contract.malformed import Case, Outcome

ADDRESS_SPACE_BYTES = 12 * 10**9
MOST_SECONDS = 60
CODES = (2, 4)
"""Exit codes of refusals: of the recipe, of the data."""
FIRST_SEED = 96


def run_forked(case: Case, model: Path, processors: dict[str, Any]) -> tuple[Outcome, list[str]]:
    """Run the command on a case and judge what it left, both in a forked process."""
    answer = case.folder / "answer.json"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        try:
            outcome = _run(case, model, processors)
            answered = {"problems": malformed.judge(case, outcome), "refused": bool(outcome.problems)}
            answer.write_text(json.dumps(answered))
        finally:
            os._exit(0)
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Outcome(crash=f"hang: not done after {MOST_SECONDS} s"), [f"hang: not done after {MOST_SECONDS} s"]
    if not answer.exists():
        return Outcome(crash="killed"), [f"killed: wait status {status}"]
    answered = json.loads(answer.read_text())
    return Outcome(problems=("refused",) if answered["refused"] else ()), answered["problems"]


def _run(case: Case, model: Path, processors: dict[str, Any]) -> Outcome:
    values = malformed.recipe_values(case)
    recipe = tiny.write_recipe(case.folder / "recipe.yaml", model, "", task=case.task, data=values["data"])
    result = fulltune("data", recipe, "--run-folder", case.folder / "run")
    if "Traceback" in result.err or result.code not in (0, *CODES):
        return Outcome(crash=f"exit code {result.code}: {result.err.strip()[-1500:]}")
    if result.code:
        return Outcome(problems=tuple(line.removeprefix("error: ") for line in result.problems))
    return malformed.outcome_of(case, case.folder / "run" / "data", processors[case.task])


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    models, processors = _models(folder / "models")
    # Loads in this process what the command loads: each fork has it then.
    _run(malformed.make(0, folder / "first"), models["text-classification"], processors)
    count = 2 if SMOKE else 60 if quick else 1000
    wrong = sum(bool(problems(seed, folder, models, processors)) for seed in range(FIRST_SEED, FIRST_SEED + count))
    name = f"malformed files of {count:,} that are read wrong, refused without a reason, or crash"
    yield Figure(name, wrong, "files", at_most=0)


def problems(seed: int, folder: Path, models: dict[str, Path], processors: dict[str, Any]) -> list[str]:
    """What went wrong with a case; its folder stays where something did."""
    case = malformed.make(seed, folder / str(seed), wild=True)
    _, found = run_forked(case, models[case.task], processors)
    for problem in found[:3]:
        print(f"{seed} {case}\n    {problem[-1500:]}", flush=True)
    if not found:
        shutil.rmtree(case.folder, ignore_errors=True)
    return found


def _models(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """A tiny model and its tokenizer, or image processor, for each task."""
    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    encoder = tiny.save_model(folder / "bert", "bert")
    models = {
        "question-answering": encoder,
        "text-classification": encoder,
        "token-classification": encoder,
        "causal-lm": tiny.save_model(folder / "llama", "llama"),
        "image-classification": tiny.save_image_model(folder / "vit"),
    }
    loaded = {
        task: Base.from_block(ModelBlock(name=str(model)), task).processor  # type: ignore[arg-type]  # a TaskName
        for task, model in models.items()
    }
    return models, loaded


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        place = Path(sys.argv[3])
        sys.exit(bool(problems(int(sys.argv[2]), place, *_models(place / "models"))))
    script(measure, __doc__)
