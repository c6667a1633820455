from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fulltune.errors import DoesNotFitError, FulltuneError, InterruptedRun, SetupError
from fulltune.files import write_json, write_text
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import IMPORTED, import_functions
from fulltune.records.comparison import Comparison
from fulltune.records.data import SOURCES, DataSummary
from fulltune.records.plan import Plan
from fulltune.records.run import Environment, PairsChoice
from fulltune.records.scores import Scores
from fulltune.records.training import Outcome
from fulltune.system import parallel_layout
from fulltune.system.hardware import Machine, is_disk_full
from fulltune.text import first_few

IDENTITY = "recipe.json"
"""File with the checked recipe and its fingerprint, which identifies a run folder."""
REPORT = "report.html"
ENVIRONMENT = "environment.json"
CARD = "card.html"
FOLDS, PAIRS = "folds.json", "pairs.json"
COMPARISONS = ("compare/comparison.json", "proof.json")
"""Files with the record of a finished comparison; the second is a copy."""
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "scikit-learn", "numpy")


@dataclass(frozen=True, repr=False)
class RunResult:
    """The results of a run's stages."""

    folder: Path
    summary: DataSummary
    plan: Plan | None = None
    outcome: Outcome | None = None
    scores: tuple[Scores, ...] = ()
    report: Path | None = None

    def __repr__(self) -> str:
        lines = [f"RunResult: {self.folder}"]
        for entry in self.scores:
            if (score := entry.metrics.get(entry.main_metric)) is not None:
                lines.append(
                    f"  {entry.name}: {entry.main_metric} {score.value:.4g} [{score.low:.4g}, {score.high:.4g}]"
                )
        return "\n".join([*lines, *([f"  report: {self.report}"] if self.report else [])])


def load_finished_run(recipe: Recipe, folder: Path) -> RunResult | None:
    """Return a finished run's results, or None if unfinished; raise `SetupError` if its weights are missing."""
    plan_path, summary_path = folder / "plan" / f"{recipe.method.label}.json", folder / "data" / "summary.json"
    if recipe.is_cross_validated or not (is_complete(folder) and plan_path.exists() and summary_path.exists()):
        return None
    plan = Plan.load(plan_path)
    lost = missing_weight_file(folder / plan.model_folder)
    if lost is not None:
        raise SetupError(
            f"{lost}: is missing, although this run finished at {finished_at(folder):%Y-%m-%d %H:%M}; restore the "
            "file, or train a new run: 'fulltune run RECIPE --fresh'"
        )
    files = sorted((folder / "scores").glob("*.json"), key=lambda file: file.stat().st_mtime)
    scores = tuple(sorted(map(Scores.load, files), key=lambda entry: entry.kind == "trained"))
    return RunResult(folder, DataSummary.of_run(folder), plan, None, scores, folder / REPORT)


def load_plan_to_continue(path: Path, machine: Machine) -> Plan:
    """Return the plan of a started run; raise `SetupError` if it needs a GPU and the machine has none."""
    plan = Plan.load(path)
    if plan.device == "cuda" and not machine.gpus:
        raise SetupError(
            f"{path.parents[1]}: was planned for a GPU, but this machine has none; start a new run (--fresh)"
        )
    return plan


def load_trained_plan(recipe: Recipe, folder: Path, machine: Machine) -> Plan:
    """Return the plan of a run with a trained model; raise `SetupError` if the folder has none."""
    if recipe.methods:
        raise SetupError(f"{folder}: belongs to a comparison; give the folder of a single run instead")
    path = folder / "plan" / f"{recipe.method.label}.json"
    if not path.exists() or missing_weight_file(folder / Plan.load(path).model_folder) is not None:
        raise SetupError(f"{folder}: has no trained model; train it first: fulltune run {folder}")
    return load_plan_to_continue(path, machine)


def save_plan(folder: Path, recipe: Recipe, plan: Plan) -> None:
    """Save the plan; if the run uses ZeRO, save ZeRO's settings first."""
    settings = (folder / plan.file).with_suffix(parallel_layout.SETTINGS_FILE)
    if recipe.train.zero_enabled_by:
        write_json(settings, parallel_layout.resolve_settings(recipe, plan))
    else:  # an earlier placement may have written it
        settings.unlink(missing_ok=True)
    plan.save(folder / plan.file)


def find_or_make_folder(
    recipe: Recipe, recipe_text: str, name: str, wanted_folder: Path | None, fresh: bool, function_marks: str = ""
) -> tuple[Path, bool]:
    """Return the folder of a recipe's run, and whether it resumes an earlier run.

    Uses `wanted_folder` if set, otherwise the newest unfinished run unless `fresh`, otherwise a new folder;
    `function_marks` identify the user's functions. Raises `SetupError` if the folder belongs to another recipe or
    cannot be written.
    """
    fingerprint = recipe.fingerprint() + function_marks + _marks_of_files(recipe)
    if wanted_folder is not None:
        return wanted_folder, _claim_folder(wanted_folder, recipe, recipe_text, fingerprint)
    output = Path(recipe.output)
    alike = [] if fresh else [path for path in output.glob(f"*/{IDENTITY}") if _stored_fingerprint(path) == fingerprint]
    for path in sorted(alike, key=lambda path: path.stat().st_mtime, reverse=True):
        if not is_complete(path.parent):
            return path.parent, True
    stem = f"{name}-{datetime.now():%Y-%m-%d-%H%M}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    folder = next(output / free for free in names if not (output / free).exists())
    return folder, _claim_folder(folder, recipe, recipe_text, fingerprint)


def is_complete(folder: Path) -> bool:
    """Return True if a run's report is newer than its scores, or if a comparison has ended and cannot be resumed."""
    if (folder / CARD).exists():
        try:
            comparison = load_comparison(folder)
        except SetupError:  # written by another version
            return True
        return comparison is None or not comparison.can_resume
    scored = [path.stat().st_mtime for path in (*folder.glob("scores/*-seed*.json"), *folder.glob(FOLDS))]
    report = folder / REPORT
    return bool(scored) and report.exists() and report.stat().st_mtime >= max(scored)


def finished_at(folder: Path) -> datetime:
    return datetime.fromtimestamp(max(path.stat().st_mtime for path in (folder / "scores").glob("*-seed*.json")))


def record_duration(folder: Path, began: float) -> None:
    """Record how long the command took since `began` (Unix time), if it did the whole run from plan to report."""
    files = [path for part in ("plan", "attempts/*", "scores") for path in folder.glob(f"{part}/*.json")]
    is_scored = any(folder.glob("scores/*-seed*.json"))
    if is_scored and all(path.stat().st_mtime >= began for path in files):
        change_environment(folder, seconds=round(time.time() - began, 3))


def change_environment(folder: Path, **changes: Any) -> None:
    path = folder / ENVIRONMENT
    Environment.load(path).model_copy(update=changes).save(path)


def missing_weight_file(model_folder: Path) -> Path | None:
    """Return the first weight file that is missing from a model folder, or None if all are there."""
    index = model_folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return next((model_folder / name for name in sorted(names) if not (model_folder / name).is_file()), None)
    is_adapter = (model_folder / "adapter_config.json").exists()
    file = model_folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
    return None if file.is_file() else file


def _claim_folder(folder: Path, recipe: Recipe, recipe_text: str, fingerprint: str) -> bool:
    """Write the recipe into a new or empty folder; return True if the folder already belonged to this recipe.

    Raises `SetupError` if the folder holds anything else.
    """
    identity = folder / IDENTITY
    if identity.exists():
        if _stored_fingerprint(identity) != fingerprint:
            before, now = (flatten_settings(one.result_settings()) for one in (load_run_recipe(folder), recipe))
            names = [name for name in {**before, **now} if before.get(name, {}) != now.get(name, {})]
            which = first_few(names) or "files of your own functions"
            raise SetupError(
                f"{folder}: belongs to a run with other settings ({which}); choose another folder, or omit "
                "--run-folder to start a new run"
            )
        return True
    if folder.is_file():
        raise SetupError(f"{folder}: is a file, expected a folder for the run")
    # What a start that failed has read of other places stays the same when it is repeated.
    if folder.exists() and any(file.name != SOURCES for file in folder.iterdir()):
        raise SetupError(f"{folder}: is neither empty nor a run folder; choose another folder")
    with explain_os_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            raise SetupError(f"{folder}: cannot be created here; choose another folder") from None
        write_json(identity, {"fingerprint": fingerprint, "recipe": recipe.model_dump(mode="json")})
        write_text(folder / "recipe.yaml", recipe_text)
    return False


def flatten_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted name, omitting empty blocks."""
    settings: dict[str, Any] = {}
    for name, value in values.items():
        settings |= flatten_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return settings


def _stored_fingerprint(identity_file: Path) -> str | None:
    """Return the fingerprint of the stored recipe and the user's functions, or None if unreadable."""
    try:
        stored = str(json.loads(identity_file.read_text(encoding="utf-8"))["fingerprint"])
        fingerprint = load_run_recipe(identity_file.parent).fingerprint()
    except (ValueError, KeyError, TypeError, OSError, SetupError):
        return None
    return fingerprint + stored[len(fingerprint) :]


def load_run_recipe(folder: Path) -> Recipe:
    """Return a run folder's recipe; raise `SetupError` if the folder holds no readable recipe."""
    identity = folder / IDENTITY
    if not identity.exists():
        raise SetupError(f"{folder}: is not a run folder of fulltune ({IDENTITY} is missing)")
    try:
        recipe = Recipe.model_validate(json.loads(identity.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError, OSError):  # pydantic's ValidationError is a ValueError
        raise SetupError(
            f"{identity}: is damaged or was written by another version of fulltune; start a new run from the recipe"
        ) from None
    choice = load_pairs_choice(recipe, folder)
    return recipe if choice is None else recipe.read(choice.pairs)


def load_pairs_choice(recipe: Recipe, folder: Path) -> PairsChoice | None:
    """Return how an earlier command chose to read the texts of pairs, or None if it did not."""
    return PairsChoice.load(folder / PAIRS) if recipe.model.pairs == "auto" and (folder / PAIRS).exists() else None


def is_comparison(folder: Path) -> bool:
    return (folder / IDENTITY).exists() and bool(load_run_recipe(folder).methods)


def load_comparison(folder: Path) -> Comparison | None:
    """Return the record of a finished comparison, or None."""
    record = next((folder / name for name in COMPARISONS if (folder / name).exists()), None)
    return None if record is None else Comparison.load(record)


def raise_if_comparison(folder: Path) -> None:
    if is_comparison(folder):
        raise SetupError(
            f"{folder}: belongs to a comparison, not to a single run; 'fulltune compare {folder}' resumes it, "
            f"'fulltune report {folder}' writes its report again, 'fulltune predict {folder} --method METHOD' uses its "
            "models"
        )


def raise_if_started_with_functions(folder: Path, recipe: Recipe) -> None:
    """Raise `SetupError` for an unfinished run that was started from Python with the user's functions."""
    if is_complete(folder):
        return
    if _stored_fingerprint(folder / IDENTITY) != recipe.fingerprint() + _marks_of_files(recipe):
        raise SetupError(
            f"{folder}: was started with other functions of yours, from Python or before the file of train.loss or "
            "data.preprocess changed; resume it from Python, or start a new run from the recipe"
        )


def _marks_of_files(recipe: Recipe) -> str:
    """Import the recipe's functions, and return hashes of the files of those that change rows or weights."""
    import_functions(recipe.own_functions, recipe.functions)
    changing = {name for name, setting in recipe.own_functions.items() if not setting.startswith("evaluate.")}
    return "".join(IMPORTED[name].digest for name in sorted(changing))


def changed_functions(folder: Path) -> str:
    """Return the names of functions whose file has changed since the run was planned."""
    path = folder / ENVIRONMENT
    functions = Environment.load(path).functions if path.exists() else {}
    return first_few([name for name, digest in functions.items() if IMPORTED[name].digest != digest])


@contextlib.contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn errors from writing to the folder into `SetupError`, or `DoesNotFitError` if the disk is full."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error, folder):
            raise DoesNotFitError(
                f"{folder}: the disk is full; free some space, then run the same command again"
            ) from None
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
        if not isinstance(error, OSError) or error.errno not in refusals:
            raise
        why = str(error.strerror).lower()
        if _concerns_folder(error, folder):
            raise SetupError(f"{folder}: cannot be written ({why}); choose another folder") from None
        raise SetupError(
            f"{error.filename}: cannot be opened ({why}), expected a file that you can read; change the file's "
            "permissions, or use another file"
        ) from None


def _concerns_folder(error: OSError, folder: Path) -> bool:
    """Return whether the error's file is unknown, or in, beside or above the folder."""
    if not isinstance(error.filename, str):
        return True
    file, folder = Path.cwd() / error.filename, Path.cwd() / folder
    return file.is_relative_to(folder.parent) or folder.is_relative_to(file)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the run folder during the block; raise `SetupError` if another command has locked it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(f"{folder}: another fulltune command is using this run folder") from None
        yield


@contextlib.contextmanager
def remove_new_run_on_error(folder: Path, *except_for: type[FulltuneError]) -> Iterator[None]:
    """Remove a new run's files if the block fails before any work, unless with an error in `except_for`."""
    began = (folder / "data" / "summary.json").exists()
    try:
        yield
    except FulltuneError as error:
        if not began and not any(folder.glob("pairs*")) and not isinstance(error, (InterruptedRun, *except_for)):
            for own in ("data", "plan"):
                shutil.rmtree(folder / own, ignore_errors=True)
            for name in (IDENTITY, "recipe.yaml", ENVIRONMENT, ".lock"):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are left in it
                folder.rmdir()
        raise


def describe_environment(machine: Machine, recipe: Recipe) -> Environment:
    """Return the versions of packages, the hardware, the user's functions and, in a git checkout, the commit."""
    return Environment(
        start_time=datetime.now().astimezone().isoformat(timespec="seconds"),
        fulltune=metadata.version("fulltune"),
        python=sys.version.split()[0],
        platform=platform.platform(),
        packages={name: metadata.version(name) for name in PACKAGES},
        cpu=machine.cpu,
        num_cores=machine.num_cores,
        memory_bytes=machine.memory_bytes,
        devices=tuple(gpu.name for gpu in machine.gpus),
        commit=_git_commit_hash(),
        functions={name: IMPORTED[name].digest for name in recipe.own_functions},
    )


def _git_commit_hash() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def hide_progress_bars() -> None:
    """Set environment variables that turn off libraries' progress bars and info messages."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
