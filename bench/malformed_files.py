"""Thousands of malformed data files: is each row used as it was written or listed, each refusal clear, nothing killed?

    python bench/malformed_files.py --count 1000 --seed 96       # cases 96 to 1095
    python bench/malformed_files.py --seed 137 --count 1 --keep FOLDER   # one case, its file kept

The cases are those of `tests/contract/malformed.py`, with bytes of tables changed at random, too. Each runs the whole
command `fulltune data` in a forked process with 12 GB of address space and 60 seconds. Prints each case that is not
right, then the counts; the exit code is 1 where there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# The tests are no installed package: they are found by the path that was set above.
from tests import tiny  # noqa: E402  # after what it needs
from tests.contract import malformed  # noqa: E402  # after what it needs
from tests.contract.command import fulltune  # noqa: E402  # after what it needs
from tests.contract.malformed import Case, Outcome  # noqa: E402  # after what it needs

ADDRESS_SPACE_BYTES = 12 * 10**9
MOST_SECONDS = 60
CODES = (2, 4)
"""Of refusals: the recipe, the data."""


def run_forked(case: Case, model: Path, processors: dict[str, Any]) -> tuple[Outcome, list[str]]:
    """The command on a case, in a process of its own; what it left is read and judged there, too."""
    answer = case.folder / "answer.json"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        try:
            outcome = _run(case, model, processors)
            found = {"problems": malformed.judge(case, outcome), "refused": bool(outcome.problems)}
            answer.write_text(json.dumps(found))
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
    found = json.loads(answer.read_text())
    return Outcome(problems=("refused",) if found["refused"] else ()), found["problems"]


def _run(case: Case, model: Path, processors: dict[str, Any]) -> Outcome:
    values = malformed.recipe_values(case)
    recipe = tiny.write_recipe(case.folder / "recipe.yaml", model, "", task=case.task, data=values["data"])
    result = fulltune("data", recipe, "--run-folder", case.folder / "run")
    if "Traceback" in result.err or result.code not in (0, *CODES):
        return Outcome(crash=f"exit code {result.code}: {result.err.strip()[-1500:]}")
    if result.code:
        return Outcome(problems=tuple(line.removeprefix("error: ") for line in result.problems))
    return malformed.outcome_of(case, case.folder / "run" / "data", processors[case.task])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=96, help="of the first case; the tests have those below 96")
    parser.add_argument("--keep", type=Path, help="a new folder in which the cases stay")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # stdout is a TextIOWrapper
    folder = given.keep or Path(tempfile.mkdtemp(prefix="malformed-"))
    models, processors = _models(folder / "models")
    # Loads in this process what the command loads: each fork has it then.
    _run(malformed.make(0, folder / "first"), models["text-classification"], processors)
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        if given.keep is None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for seed in range(given.seed, given.seed + given.count):
            case = malformed.make(seed, folder / str(seed), wild=True)
            outcome, problems = run_forked(case, models[case.task], processors)
            kind = "wrong" if problems else "refused" if outcome.problems else "read"
            counts[f"{malformed.FORMS[seed % len(malformed.FORMS)]} {kind}"] += 1
            counts[kind] += 1
            for problem in problems[:3]:
                print(f"{seed} {case}\n    {problem[-1500:]}", flush=True)
            if given.keep is None:
                shutil.rmtree(case.folder, ignore_errors=True)
    print(json.dumps(dict(sorted(counts.items())), indent=1))
    return 1 if counts["wrong"] else 0


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
        task: Base.of(ModelBlock(name=str(model)), task).processor  # type: ignore[arg-type]  # a TaskName
        for task, model in models.items()
    }
    return models, loaded


if __name__ == "__main__":
    sys.exit(main())
