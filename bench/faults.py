"""Faults planted in whole runs: does the run guard save them?

    FULLTUNE_BENCH_DATA=... python bench/faults.py run FOLDER [--kinds classes-minilm] [--seeds 1] [--arms guard]
    python bench/faults.py table FOLDER

Each fault comes at the middle of a run (`tests/train/faults.py`). Arms: `guard` as by default; `clipping`, which has
max_grad_norm: 1 and nothing else, as most trainers. A run counts as saved when its test metric is not worse than that
of the clean run with the same seed by more than one standard error of their paired difference. Kinds of runs are those
of `bench/clean_steps.py`; thresholds were settled on `TUNING` of there, and before faults in `UNSEEN` were planted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests' faults

from clean_steps import KINDS, prepared
from tests.train import faults
from tests.train.runs import in_this_process

from fulltune import api, load_recipe, pipeline
from fulltune.errors import FulltuneError
from fulltune.records.events import Event, StepSkipped
from fulltune.records.plan import Plan
from fulltune.stats.bootstrap import Resampled
from fulltune.train.loop import guarded_step, step_guard


@dataclass(frozen=True)
class Planted:
    """A fault and for how many steps."""

    fault: faults.Fault | None
    steps: int = 1


FAULTS = {
    "clean": Planted(None, 0),
    "NaN gradient": Planted(faults.nan_gradient),
    "NaN gradient, 5 steps": Planted(faults.nan_gradient, 5),
    "infinite logits": Planted(faults.infinite_logits),
    "gradient x10": Planted(faults.large_gradient),
    "corrupted labels, 3 steps": Planted(faults.corrupted_labels, 3),
    "corrupted labels, 20 steps": Planted(faults.corrupted_labels, 20),
    "rate x30, 20 steps": Planted(faults.high_rate, 20),
    "rate x30, 5 steps": Planted(faults.high_rate, 5),
    "infinite gradient": Planted(faults.infinite_gradient),
    "shuffled inputs, 20 steps": Planted(faults.shuffled_inputs, 20),
}
UNSEEN = ("rate x30, 5 steps", "infinite gradient", "shuffled inputs, 20 steps")
ARMS: dict[str, list[str]] = {
    "guard": [],
    "clipping": ["train.skip_suspect_steps=false", "train.max_rollbacks=0"],
}
WANTED = {"classes-minilm": (2e-4, 315), "prompts-llama": (3e-3, 600), "written-t5": (3e-3, 600)}
"""Kinds with their rate and steps."""


def do(folder: Path, name: str, fault: str, arm: str, seed: int) -> dict[str, Any]:
    """One run."""
    kind, (rate, steps), planted = KINDS[name], WANTED[name], FAULTS[fault]
    place = prepared(folder, name)
    run = place / f"{arm}-{fault.replace(' ', '-').replace(',', '')}-{seed}"
    chosen = [
        f"method.learning_rate={rate}",
        f"train.max_steps={steps}",
        f"train.global_batch_size={kind.batch}",
        "train.eval_strategy=steps",
        f"train.eval_steps={steps // 6}",
        f"train.seed={seed}",
        "evaluate.baselines=false",
        "evaluate.generate_rows=0",
        *ARMS[arm],
    ]
    skipped: list[int] = []

    def listener(event: Event) -> None:
        if isinstance(event, StepSkipped):
            skipped.append(event.step)

    job = api.job(load_recipe(place / "recipe.yaml", chosen), run_folder=run, listener=listener)
    middle = steps // 2 + 5
    line: dict[str, Any] = {"kind": name, "fault": fault, "arm": arm, "seed": seed, "exit": 0, "reason": ""}
    act = planted.fault or faults.large_gradient
    unguarded = mock.patch.object(guarded_step.step_guard, "judge", _never)
    try:
        with in_this_process(), faults.planted(act, range(middle, middle + planted.steps).__contains__):
            if arm == "guard":
                reached = pipeline.run(job, "evaluate")
            else:
                with unguarded:
                    reached = pipeline.run(job, "evaluate")
        line["value"] = reached.scores[-1].metrics[reached.scores[-1].main_metric].value
    except FulltuneError as error:
        line |= {"exit": error.exit_code, "reason": error.problems[0][:200]}
    line["skipped"] = skipped
    line["rollbacks"] = list(Plan.load(job.plan_path).rollbacks)
    return line


def _never(seen: step_guard.StepMemory, *_: Any, **__: Any) -> step_guard.Judged:
    return step_guard.Judged("go on", seen)


def compared(folder: Path, line: dict[str, Any]) -> tuple[float, float]:
    """How much better the clean run with the same seed is, and the standard error, both in the metric's units."""
    place = folder / line["kind"]
    files = []
    for fault, arm in ((line["fault"], line["arm"]), ("clean", "guard")):
        run = place / f"{arm}-{fault.replace(' ', '-').replace(',', '')}-{line['seed']}"
        files += list(run.glob("scores/full-*.npz"))
    if len(files) < 2:
        return float("nan"), float("nan")
    mine, other = map(Resampled.load, files)
    plan = Plan.load(next(place.glob(f"guard-clean-{line['seed']}/plan/full.json")))
    sign = 1 if plan.greater_is_better else -1
    differences = sign * (other.draws - mine.draws)
    return float(sign * (other.value - mine.value)), float(differences.std())


def table(folder: Path) -> None:
    """Each fault by arm: saved runs, and what was lost."""
    lines = [json.loads(line) for line in (folder / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    print("| kind | fault | arm | seed | lost ± error | saved | skipped | rollbacks | |")
    print("|---|---|---|---:|---:|---|---:|---|---|")
    saved: dict[str, list[bool]] = {arm: [] for arm in ARMS}
    for line in lines:
        lost, error = compared(folder, line)
        is_saved = line["exit"] == 0 and lost <= error + 1e-9
        if line["fault"] != "clean":
            saved[line["arm"]].append(is_saved)
        fields = (line["kind"], line["fault"], line["arm"], line["seed"], f"{lost:+.4f} ± {error:.4f}")
        more = ("yes" if is_saved else "no", len(line["skipped"]), line["rollbacks"] or "", line["reason"][:60])
        print("| " + " | ".join(map(str, (*fields, *more))) + " |")
    for arm, found in saved.items():
        if found:
            print(f"{arm}: {sum(found)} of {len(found)} saved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(WANTED), choices=list(WANTED))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.what == "table":
        table(folder)
        return
    file = folder / "faults.jsonl"
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(one["kind"], one["fault"], one["arm"], one["seed"]) for one in known}
    for seed in given.seeds:
        for name in given.kinds:
            for fault in given.faults:
                for arm in given.arms:
                    if (name, fault, arm, seed) in done or (fault, arm) == ("clean", "clipping"):
                        continue
                    line = do(folder, name, fault, arm, seed)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(line) + "\n")
                    lost, error = compared(folder, line)
                    said = f"lost {lost:+.4f} ± {error:.4f}, skipped {line['skipped']}, back to {line['rollbacks']}"
                    print(f"{name}, {fault}, {arm}: {said} {line['reason']}", flush=True)


if __name__ == "__main__":
    main()
