"""`fulltune plan --measure`: dry runs with other settings, each in a process of its own; the fastest is taken."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune.errors import DoesNotFitError, InterruptedRun, SetupError
from fulltune.models.kernels import lacking
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.events import Listener, PhaseBegan
from fulltune.records.plan import Plan
from fulltune.records.training import Measured, Measurements, Outcome
from fulltune.system import deepspeed
from fulltune.text import format_bytes
from fulltune.train.hooks import Hooks
from fulltune.train.parent import child, measure_candidates
from fulltune.train.parent.measure_candidates import Candidate
from fulltune.train.parent.next_attempt import Need
from fulltune.train.request import Request


@dataclass
class _Probes:
    """What the probes share, and what they found."""

    recipe: Recipe
    plan: Plan
    folder: Path
    tokens: float
    """Of all steps, without padding."""
    available_bytes: int
    listener: Listener
    rows: list[Measured]

    def all(self, found: Sequence[Candidate]) -> list[Measured]:
        """Try them one after another."""
        rows = [self.one(candidate) for candidate in found]
        self.rows += rows
        return rows

    def one(self, candidate: Candidate) -> Measured:
        row = Measured(name=candidate.name, kind=candidate.kind, changes=candidate.changes, problem=candidate.problem)
        if candidate.problem:
            return row
        self.listener(PhaseBegan(name=f"measuring: {candidate.name}"))
        outcome = _probe(self.recipe, self.plan.model_copy(update=candidate.changes), self.folder)
        return measured(row, outcome, self.tokens, self.available_bytes)


def measure(
    recipe: Recipe,
    plan: Plan,
    summary: DataSummary,
    folder: Path,
    hooks: Hooks,
    available_bytes: int,
    need: Need,
    listener: Listener,
) -> Plan:
    """Measure and return the plan with the fastest settings that fit; what was tried is written beside it."""
    if hooks.needs_this_process:
        raise SetupError("measure: compute_loss cannot be handed to the processes that measure")
    if any((folder / "attempts").glob("*")):
        raise SetupError(f"{folder}: has begun to train with these settings; measure in a new run (--fresh)")
    if deepspeed.wanted(recipe):
        raise SetupError("plan --measure: DeepSpeed shares out the model, which is not measured; leave out --measure")
    shutil.rmtree(folder / "plan" / "probes", ignore_errors=True)
    tokens = summary.tokens_per_epoch * plan.num_train_epochs
    probes = _Probes(recipe, plan, folder, tokens, available_bytes, listener, [])
    levers = probes.all(measure_candidates.levers(recipe, plan))
    best = measure_candidates.fastest(levers)
    # Where nothing fits: with all levers, fewer rows may.
    batches = measure_candidates.micro_batches(recipe, plan, best.changes if best else levers[-1].changes)
    if best is None:
        batches = [one for one in batches if one.changes["micro_batch_size"] < plan.micro_batch_size]
    best = measure_candidates.fastest([*([best] if best else []), *probes.all(batches)])
    if best is None:
        raise DoesNotFitError([f"measured: {row.name}: {row.problem}" for row in probes.rows])
    others = measure_candidates.attentions(recipe, best.changes, summary.packed, _flash(plan, best.changes))
    best = measure_candidates.fastest([best, *probes.all(others)]) or best
    compiled = probes.all(measure_candidates.compilations(recipe, best, lacking(plan.device)))
    best = measure_candidates.fastest([best, *compiled]) or best
    rows = tuple(row.model_copy(update={"taken": row is best}) for row in probes.rows)
    Measurements(available_bytes=available_bytes, rows=rows).save(folder / "plan" / "measured.json")
    return _taken(plan, best, probes, need)


def _short(reason: str) -> str:
    first = " ".join(reason.split())
    return first if len(first) <= 120 else first[:117] + "..."


def _taken(plan: Plan, best: Measured, probes: _Probes, need: Need) -> Plan:
    reason = measure_candidates.why(best, probes.rows, probes.available_bytes)
    settings = measure_candidates.noted(plan.settings, plan, best.changes, reason)
    changed = plan.model_copy(update={**best.changes, "settings": settings})
    time = None
    if plan.time is not None:
        measured = {"train_seconds": best.train_seconds, "tokens_per_second": best.tokens_per_second}
        time = plan.time.model_copy(update={**measured, "source": "measured"})
    return changed.model_copy(update={"memory": need(changed), "time": time})


def measured(row: Measured, outcome: Outcome, tokens: float, available_bytes: int) -> Measured:
    """The row with what a probe's outcome says."""
    if outcome.status == "out_of_memory":
        return row.model_copy(update={"problem": f"memory ran out: {_short(outcome.reason)}"})
    forecast = outcome.forecast
    if outcome.status != "done" or forecast is None:
        return row.model_copy(update={"problem": _short(outcome.reason)})
    peak = outcome.dry_run_growth_bytes
    return row.model_copy(
        update={
            "peak_memory_bytes": peak,
            "train_seconds": forecast.train_seconds,
            "tokens_per_second": round(tokens / forecast.train_seconds, 1),
            "loss": outcome.dry_run_loss,
            "problem": "" if peak <= available_bytes else f"does not fit into {format_bytes(available_bytes)}",
        }
    )


def _probe(recipe: Recipe, plan: Plan, folder: Path) -> Outcome:
    number = 1 + len(list((folder / "plan" / "probes").glob("*")))
    request = Request(
        run_folder=str(folder),
        recipe=recipe,
        plan=plan,
        attempt=number,
        checkpoint=None,
        parent_pid=os.getpid(),
        probe=True,
    )
    request.folder.mkdir(parents=True)
    request.save(request.folder / "request.json")
    outcome = child.run(request, lambda event: None)
    if outcome.status == "interrupted":
        raise InterruptedRun("interrupted while measuring; the same command measures again")
    return outcome


def _flash(plan: Plan, changes: Mapping[str, Any]) -> list[str]:
    """Flash attention that is installed and may work here; a card that a kernel was not made for says so itself."""
    halves = changes.get("precision", plan.precision) != "fp32"
    if plan.device != "cuda" or not plan.fast_bf16 or not halves:
        return []
    modules = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]
