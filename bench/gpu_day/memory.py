"""The parts about memory: planned against measured over a grid, memory that runs out, and models of 1 B to 8 B."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.gpu_day.cell import against_plan, measured
from bench.gpu_day.day import Rows
from bench.gpu_day.here import Here
from bench.gpu_day.parts import GIB, Wanted, obstacle
from bench.random_models import TIED, Cell, model_parts, sized, write_recipe
from bench.runs import fresh

from fulltune.system.hardware import num_cores

CELL_SECONDS = 75
"""Seconds that a cell may take; none starts with less left of the part."""
STAND_IN_SECONDS = 140
"""The same on a CPU, which other processes may be using."""
FIGURES = (
    *("planned_bytes", "allocated_bytes", "reserved_bytes", "outside_bytes"),
    *("planned_error", "planned_tensors_error", "tokens_per_second"),
)
LEAST_ERROR, MOST_ERROR = -0.02, 0.10
"""A plan must hold; one that is far too high refuses trainings that would fit."""

BERT = ("bert", (768, 12, 30000))
SMALL = ("llama", (576, 30, 49152))
MIDDLE = ("llama", (960, 32, 49152))
BILLION = ("llama", (2048, 20, 32000))
"""Hidden size, layers, vocabulary: like BERT base, SmolLM2 of 135 M and 360 M, and a Llama of 1 B."""
HALF: dict[str, Any] = {"precision": "bf16"}
TIGHT: dict[str, Any] = {"optim": "adamw_8bit", "checkpointing": True}
NARROW: dict[str, Any] = {"weights_dtype": "bf16", "precision": "bf16"}
GRID = (
    sized("bert 110 M, fp32", *BERT, (16, 256)),
    sized("bert 110 M, bf16", *BERT, (16, 256), **HALF),
    sized("bert 110 M, fp16", *BERT, (16, 256), precision="fp16"),
    sized("llama 150 M, bf16", *SMALL, (4, 512), config=TIED, heads=9, **HALF),
    sized("llama 150 M, bf16, chunked loss", *SMALL, (4, 512), config=TIED, heads=9, chunked=True, **HALF),
    sized("llama 150 M, bf16, accumulated, recomputed", *SMALL, (4, 512), config=TIED, heads=9, accumulation=2,
          checkpointing=True, **HALF),
    sized("llama 400 M, fp32, recomputed", *MIDDLE, (2, 1024), config=TIED, heads=15, checkpointing=True),
    sized("llama 400 M, bf16, 8-bit moments", *MIDDLE, (2, 1024), config=TIED, heads=15, optim="adamw_8bit", **HALF),
    sized("llama 400 M, bf16 weights", *MIDDLE, (2, 1024), config=TIED, heads=15, optim="adamw_bf16", **NARROW),
    sized("llama 1.1 B, bf16, 8-bit moments, recomputed", *BILLION, (2, 1024), **HALF | TIGHT),
)  # fmt: skip
TINY = (sized("tiny llama, bf16, 8-bit moments, recomputed", "llama", (64, 2, 2000), (2, 64), **HALF | TIGHT),)

SMALLEST = sized("smallest", "llama", (64, 2, 2000), (2, 64), **HALF)


def grid(here: Here, folder: Path, rows: Rows) -> None:
    """Measure the plan's peak against allocated, reserved and outside memory for each cell."""
    fresh(folder)
    seconds = CELL_SECONDS if here.cards else STAND_IN_SECONDS
    for number, cell in enumerate(GRID if here.cards else TINY):
        reason = obstacle(Wanted(cell.precision), here) if here.cards else ""
        if reason or rows.left_seconds < seconds:
            rows.add(cell.name, dict.fromkeys(FIGURES), None, reason or "no time was left for it")
            continue
        device = "cuda" if here.cards else "cpu"
        _show(here, cell.name, measured(cell, folder / f"{number}", seconds, device=device), rows)


def _show(here: Here, case: str, answer: dict[str, Any], rows: Rows) -> None:
    """Add a row of planned and measured bytes."""
    if "skipped" in answer:
        rows.add(case, dict.fromkeys(FIGURES), None, answer["skipped"])
        return
    problem = answer.get("problem", "")
    if here.cards:
        errors = against_plan(answer)
        figures = {name: answer.get(name) for name in FIGURES} | errors
        error = errors["planned_error"]
        ok = False if problem else error is not None and LEAST_ERROR <= error <= MOST_ERROR
        rows.add(case, figures, ok, problem)
        return
    note = problem or (
        f"on the CPU: {answer['planned_bytes'] / 1e6:,.0f} MB planned, {answer['growth_bytes'] / 1e6:,.0f} MB measured"
    )
    rows.add(case, dict.fromkeys(FIGURES), False if problem else None, note)


# ---- memory that runs out ------------------------------------------------------------------------------------------

LADDER = ("limit_bytes", "peak_bytes", "attempts", "rows_at_first", "rows_at_last", "took_seconds")


def ladder(here: Here, folder: Path, rows: Rows) -> None:
    """Train with a plan that is changed to 32 rows at once, under a limit that torch (on a CPU the kernel) enforces.

    The attention scores of 32 rows of 512 tokens alone are above it; the run must end well with fewer rows at once.
    """
    import time

    from fulltune import api, pipeline
    from fulltune.records.plan import Plan
    from fulltune.records.training import Outcome
    from fulltune.train.request import attempt_folders

    big = ("bert", (768, 12, 30000)) if here.cards else ("bert", (64, 2, 2000))
    cell = sized("ladder", *big, (32, 500), heads=12 if here.cards else 4)
    limit = 4 * GIB if here.cards else GIB
    train: dict[str, Any] = {"device": "cuda" if here.cards else "cpu", "max_steps": 1}
    train["memory_limit"] = f"{limit // GIB}GiB"
    recipe = write_recipe(cell, "single", 1, folder, micro_batch_size=None, oversubscribe=False, **train)
    values = json.loads(recipe.read_text(encoding="utf-8"))
    values["model"]["attn_implementation"] = "eager"
    values["evaluate"].pop("batch_size")
    recipe.write_text(json.dumps(values), encoding="utf-8")
    job = api.job(recipe, run_folder=folder / "run", listener=lambda event: None)
    path = folder / "run" / "plan" / "full.json"
    pipeline.run(job, "plan")
    Plan.load(path).model_copy(update={"micro_batch_size": 32, "gradient_accumulation_steps": 1, "busy": ""}).save(path)
    began = time.monotonic()
    last = pipeline.run(job, "train").outcome
    assert last is not None
    attempts = attempt_folders(folder / "run", last.trial)
    plans = [json.loads((attempt / "request.json").read_text(encoding="utf-8"))["plan"] for attempt in attempts]
    first = Outcome.load(attempts[0] / "outcome.json")
    sizes = [plan["micro_batch_size"] for plan in plans]
    figures = {
        "limit_bytes": limit,
        "peak_bytes": last.peak_memory_bytes,
        "attempts": len(attempts),
        "rows_at_first": sizes[0],
        "rows_at_last": sizes[-1],
        "took_seconds": time.monotonic() - began,
    }
    same_batch = {plan["global_batch_size"] for plan in plans} == {32}
    good = last.status == "done" and same_batch and first.status == "out_of_memory"
    if here.cards:  # a CPU's kernel limits data, and what a process holds of libraries' files is on top
        good = good and last.peak_memory_bytes <= limit
    states = f"at first: {first.status} in {first.phase}; at last: {last.status}"
    if here.cards:
        rows.add("bert 110 M, 32 rows of 500 tokens", figures, good, states)
        return
    note = f"on the CPU, under 1 GiB: rows at once {' to '.join(map(str, dict.fromkeys(sizes)))}; {states}"
    rows.add("bert 110 M, 32 rows of 500 tokens", dict.fromkeys(LADDER), good, note)


# ---- 1 B to 8 B ----------------------------------------------------------------------------------------------------

CARD, LIMIT, LIMIT_BYTES = "RTX 4090", "23.5GiB", int(23.5 * GIB)
"""A card of 24 GB, and the part of it that torch sees."""
STAND_IN_HOST = 192
"""Host memory in GB that is assumed without a card."""
LENGTH = 512


@dataclass(frozen=True)
class Way:
    """A way to train, named as in the plan's survey."""

    name: str
    settings: dict[str, Any]
    weights_dtype: str = "fp32"


WAYS = (
    Way("one device, AdamW fp32", {}),
    Way("one device, 8-bit AdamW", {"optim": "adamw_8bit"}),
    Way("one device, bf16 + 8-bit", {"optim": "adamw_8bit"}, "bf16"),
    Way("ZeRO-2, optimizer on host", {"placement": "zero2", "offload": "optimizer"}),
    Way("ZeRO-3, all on host", {"placement": "zero3", "offload": "all"}),
)


def _shape(name: str, size: tuple[int, int, int], **config: Any) -> Cell:
    return sized(name, "llama", size, (1, LENGTH), heads=size[0] // 128, checkpointing=True, config=config, **HALF)


SHAPES = (
    _shape("1.3 B", (2048, 16, 128256), intermediate_size=8192, num_key_value_heads=8, **TIED),
    _shape("3.2 B", (3072, 28, 128256), intermediate_size=8192, num_key_value_heads=8, **TIED),
    _shape("6.7 B", (4096, 32, 32000), intermediate_size=11008, num_key_value_heads=32),
    _shape("8.0 B", (4096, 32, 128256), intermediate_size=14336, num_key_value_heads=8),
)
"""Like Llama 3.2 1B and 3B, Llama 2 7B and Llama 3 8B."""
MEASURED = (
    ("6.7 B", "ZeRO-2, optimizer on host"),
    ("1.3 B", "one device, AdamW fp32"),
    ("3.2 B", "one device, bf16 + 8-bit"),
    ("6.7 B", "one device, bf16 + 8-bit"),
    ("6.7 B", "ZeRO-3, all on host"),
    ("1.3 B", "one device, 8-bit AdamW"),
    ("8.0 B", "ZeRO-2, optimizer on host"),
)
"""Measured in this order as long as there is time; the others are only planned."""
LARGE_SECONDS = 120
LARGE = (
    *("planned_bytes", "planned_host_bytes", "in_24_GB", "reserved_bytes", "outside_bytes", "planned_error"),
    *("host_bytes", "tokens_per_second"),
)


def large(here: Here, folder: Path, rows: Rows) -> None:
    """Plan each shape and way for a card of 24 GB and its host, and measure those that fit here.

    Without a card, the smallest shape is planned.
    """
    fresh(folder)
    host = round(here.host_bytes / 1e9) if here.cards else STAND_IN_HOST
    hardware = f"{CARD}, {host}GB host"
    planned = SHAPES if here.cards else SHAPES[:1]
    with ProcessPoolExecutor(min(len(planned), num_cores()), mp_context=multiprocessing.get_context("spawn")) as pool:
        surveys = list(pool.map(_survey, planned, [folder] * len(planned), [hardware] * len(planned)))
    plans = {
        (shape.name, way.name): survey[way.name] for shape, survey in zip(planned, surveys, strict=True) for way in WAYS
    }
    shapes, ways = {shape.name: shape for shape in planned}, {way.name: way for way in WAYS}
    measured_first = [pair for pair in MEASURED if pair in plans]
    for shape, way in (*measured_first, *(pair for pair in plans if pair not in MEASURED)):
        _add_large(here, shapes[shape], ways[way], plans[shape, way], folder, rows)
    for tried in (WAYS[1], WAYS[3]) if not here.cards else ():
        if "placement" in tried.settings and "deepspeed" not in here.packages:
            continue
        answer = measured(
            SMALLEST, folder / "tiny", STAND_IN_SECONDS, device="cpu", memory_limit="4GiB", **tried.settings
        )
        note = answer.get("problem") or f"on the CPU, held to 4 GiB: {answer['growth_bytes'] / 1e6:,.0f} MB measured"
        rows.add(f"tiny, {tried.name}", dict.fromkeys(LARGE[3:]), False if "problem" in answer else None, note)


def _survey(shape: Cell, folder: Path, hardware: str) -> dict[str, dict[str, Any]]:
    """Return the plan's survey of a shape by the name of each way, from the config alone."""
    from fulltune.cli import plan

    place = folder / f"plan {shape.name}"
    tokenizer, config, kind = model_parts(shape)
    config.architectures = [kind._model_mapping[type(config)].__name__]
    config.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    train = {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 1, "activation_checkpointing": True}
    data = {"train": "rows.jsonl", "prompt": "prompt", "completion": "completion"}
    recipe = {"model": str(place / "model"), "task": "causal-lm", "data": data, "train": train, "output": "."}
    (place / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    survey, _ = plan.plan_without_data(place / "recipe.yaml", [], 64, LENGTH, hardware, None)
    weights = 2 * survey.num_parameters
    return {layout.name: layout.model_dump(mode="json") | {"file_bytes": weights} for layout in survey.placements}


def _add_large(here: Here, shape: Cell, way: Way, plan: dict[str, Any], folder: Path, rows: Rows) -> None:
    """Add a row with planned figures, and with measured ones or the reason why there are none."""
    case = f"{shape.name}, {way.name.removeprefix('one device, ')}"
    fits = plan["device_bytes"] <= LIMIT_BYTES
    figures: dict[str, Any] = dict.fromkeys(LARGE) | {
        "planned_bytes": plan["device_bytes"],
        "planned_host_bytes": plan["host_bytes"] or "-",
        "in_24_GB": "yes" if fits else "no",
    }
    wanted = here.cards and (shape.name, way.name) in MEASURED
    reason = _why_skipped(here, way, plan, rows) if wanted else ""
    if reason or not wanted:
        rows.add(case, figures, None, reason)
        return
    limited = {"memory_limit": LIMIT} if fits else {}
    cell = replace(shape, weights_dtype=way.weights_dtype)
    answer = measured(cell, folder / "cell", LARGE_SECONDS, device="cuda", **limited, **way.settings)
    if "skipped" in answer:
        rows.add(case, figures, None, answer["skipped"])
        return
    figures |= {name: answer[name] for name in LARGE if answer.get(name)}
    figures["planned_error"] = against_plan(answer)["planned_error"]
    used = answer.get("reserved_bytes", 0) + answer.get("outside_bytes", 0)
    note = f"held to {LIMIT}" if fits else "on the whole card"
    ok = "problem" not in answer and (not fits or used <= LIMIT_BYTES)
    rows.add(case, figures, ok, answer.get("problem") or note)


def _why_skipped(here: Here, way: Way, plan: dict[str, Any], rows: Rows) -> str:
    """Return why a row is not measured on this card; empty if it is."""
    is_zero, file = "placement" in way.settings, int(plan["file_bytes"])
    wanted = Wanted(
        "bf16",
        plan["device_bytes"],
        plan["host_bytes"] + 2 * file,  # the weights in fp32, while they are read
        3 * file if is_zero else file,  # those before step 1 as well
        ("deepspeed",) if is_zero else (),
    )
    if reason := obstacle(wanted, here):
        return reason
    return "no time was left for it" if rows.left_seconds < LARGE_SECONDS else ""
