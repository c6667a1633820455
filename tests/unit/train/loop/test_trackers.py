"""Experiment trackers have a run's curves, name, settings and final score, and none of them ends a training."""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from fulltune.errors import FulltuneError
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.worker.evaluation import Evaluator
from tests import plans, tiny
from tests.train import runs

pytestmark = pytest.mark.slow

Curves = Mapping[str, Mapping[int, float | None]]
PACKAGES = ("tensorboard", "mlflow", "trackio", "wandb")
TRAIN = {"max_steps": 4, "logging_steps": 1, "global_batch_size": 8, "warmup_steps": 0}
METHOD = {"head_init": "random"}
LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Tracked:
    """What a tracker's own files say."""

    names: list[str]
    settings: Mapping[str, Any]
    curves: Curves


def installed() -> list[str]:
    return [name for name in PACKAGES if name in integration_utils.get_available_reporting_integrations()]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def asked(patch: pytest.MonkeyPatch) -> list[str]:
    """Addresses other than this machine's that anything in this process wants to reach."""
    addresses, connect, resolve = list[str](), socket.socket.connect, socket.getaddrinfo

    def connect_locally(sock: socket.socket, address: Any) -> None:
        if sock.family != socket.AF_UNIX and address[0] not in LOCAL:
            addresses.append(str(address))
            raise OSError("no network in this test")
        connect(sock, address)

    def resolve_locally(host: Any, *rest: Any, **named: Any) -> Any:
        if host not in LOCAL:
            addresses.append(str(host))
            raise socket.gaierror("no network in this test")
        return resolve(host, *rest, **named)

    patch.setattr(socket.socket, "connect", connect_locally)
    patch.setattr(socket, "getaddrinfo", resolve_locally)
    return addresses


@pytest.fixture(scope="module")
def tracked_run(
    patch: pytest.MonkeyPatch, asked: list[str], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that reports to all trackers that are installed, with a score that is not a number."""
    folder = tmp_path_factory.mktemp("tracked")
    variables = {
        "MLFLOW_TRACKING_URI": f"file:{folder / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HTTPS_PROXY": "http://127.0.0.1:9",  # its service is a process of its own
    }
    for name, value in variables.items():
        patch.setenv(name, value)
    patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    scores = Evaluator.scores
    patch.setattr(Evaluator, "scores", lambda evaluator: {**scores(evaluator), "undefined": math.nan})
    with runs.without_tracing():
        runs.run(folder, tiny_encoder, tiny.topic_rows(), method=METHOD, train={**TRAIN, "report_to": installed()})
    if "wandb" in installed():
        import wandb

        wandb.finish()  # as the end of a training process does
    return folder


def curves_of(lines: Iterator[tuple[int, Mapping[str, Any]]]) -> Curves:
    curves: dict[str, dict[int, float | None]] = defaultdict(dict)
    for step, values in lines:
        for name, value in values.items():
            curves[name][step] = value
    return curves


def read_tensorboard(folder: Path) -> Tracked:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = (folder / "run" / "tensorboard").iterdir()
    events = EventAccumulator(str(place)).Reload()
    curves = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("args/text_summary")
    settings = json.loads(text.tensor_proto.string_val[0])
    return Tracked([settings["run_name"]], settings, curves)


def read_mlflow(folder: Path) -> Tracked:
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlruns'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    curves = {name: {point.step: point.value for point in points} for name, points in histories.items()}
    assert run.info.status == "FINISHED"
    return Tracked([run.info.run_name], run.data.params, curves)


def read_trackio(folder: Path) -> Tracked:
    with sqlite3.connect(folder / "trackio" / "huggingface.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
        (config,) = database.execute("select config from configs").fetchall()
        names = [name for (name,) in database.execute("select distinct run_name from metrics")]
    return Tracked(names, json.loads(config[0]), curves_of((row["train/global_step"], row) for row in rows))


def wandb_records(content: bytes) -> Iterator[Any]:
    """Records of a .wandb file: a LevelDB log in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read_wandb(folder: Path) -> Tracked:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(file.read_bytes()))

    def values(items: Any) -> dict[str, Any]:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    lines = [values(record.history.item) for record in records if record.HasField("history")]
    settings = [values(record.config.update) for record in records if record.HasField("config")]
    return Tracked(
        [record.run.display_name for record in records if record.HasField("run")],
        {name: value for part in settings for name, value in part.items()},
        curves_of((line["train/global_step"], line) for line in lines),
    )


READERS: Mapping[str, Callable[[Path], Tracked]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "wandb": read_wandb,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_tracker_has_the_curves_name_settings_and_final_score(package: str, tracked_run: Path) -> None:
    if package not in installed():
        pytest.skip(f"{package} is not installed")
    tracked = READERS[package](tracked_run)
    train, evaluation, separator = ("", "eval_", "_") if package == "mlflow" else ("train/", "eval/", "/")

    steps = runs.events(tracked_run, "train")
    for name in ("loss", "grad_norm", "learning_rate"):
        assert tracked.curves[f"{train}{name}"] == pytest.approx({line["step"]: line[name] for line in steps})
    assert len(steps) == TRAIN["max_steps"]

    scores = {line["step"]: line["metrics"] for line in runs.events(tracked_run, "eval")}
    accuracy = {step: metrics["accuracy"] for step, metrics in scores.items()}
    assert tracked.curves[f"{evaluation}accuracy"] == pytest.approx(accuracy)
    undefined = tracked.curves[f"{evaluation}undefined"]
    assert undefined.keys() == scores.keys()
    assert all(value is None or math.isnan(float(value)) for value in undefined.values())

    outcome = json.loads(next(tracked_run.glob("run/attempts/*/outcome.json")).read_text(encoding="utf-8"))
    final = tracked.curves[f"eval{separator}final_accuracy"]
    assert final == pytest.approx({TRAIN["max_steps"]: outcome["best_metric"]})

    assert tracked.names == ["run-full-seed42"]
    assert tracked.settings["recipe.task"] == "text-classification"
    assert str(tracked.settings["recipe.train.max_steps"]) == "4"
    assert float(tracked.settings["learning_rate"]) == pytest.approx(steps[0]["learning_rate"])


def test_no_tracker_fails_asks_the_network_or_changes_the_weights(
    tracked_run: Path, asked: list[str], plain_weights: Mapping[str, torch.Tensor]
) -> None:
    assert installed()
    assert_equal_weights(tracked_run, plain_weights)
    assert [line for line in runs.events(tracked_run, "message") if "report_to" in line["text"]] == []
    assert asked == []


def test_trackers_send_no_telemetry_unless_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    training_arguments(plans.recipe(), plans.plan(), tmp_path / "checkpoints" / "full")
    assert (os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["WANDB_ERROR_REPORTING"]) == ("true", "true")


# ---- trackers that fail ------------------------------------------------------------------------------------------


class Recording(TrainerCallback):
    """Notes events, and fails at one of them."""

    events: list[tuple[str, Any]]
    fails_at = ""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name == "on_init_end":
            return super().__getattribute__(name)

        def event(args: Any, state: Any, control: Any, **named: Any) -> None:
            self.events.append((name, named.get("logs")))
            if name == self.fails_at:
                raise ConnectionError("no route\nto host")

        return event


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    """In the place of TensorBoard's."""
    kind = type("FailingCallback", (Recording,), {"events": []})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", kind)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    return kind


def run_with_tracker(folder: Path, model: Path, name: str = "tensorboard", **more: Any) -> None:
    with runs.without_tracing():
        runs.run(folder, model, tiny.topic_rows(), method=METHOD, train={**TRAIN, "report_to": name}, **more)


@pytest.fixture(scope="module")
def plain_weights(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    with runs.without_tracing():
        runs.run(folder, tiny_encoder, tiny.topic_rows(), method=METHOD, train=TRAIN)
    return runs.final_weights(folder)


def assert_equal_weights(folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    weights = runs.final_weights(folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fails_at", ["", "on_train_begin", "on_log", "on_save", "on_train_end"])
def test_tracker_that_fails_is_warned_of_once_and_changes_nothing(
    fails_at: str,
    tracker: type[Recording],
    tiny_encoder: Path,
    tmp_path: Path,
    plain_weights: Mapping[str, torch.Tensor],
) -> None:
    tracker.fails_at = fails_at
    run_with_tracker(tmp_path, tiny_encoder)
    warnings = [line for line in runs.events(tmp_path, "message") if line["text"].startswith("train.report_to: ")]
    expected = "train.report_to: Failing failed (ConnectionError: no route to host); training goes on without it"
    assert [(line["level"], line["text"]) for line in warnings] == [("warning", expected)] * bool(fails_at)
    assert_equal_weights(tmp_path, plain_weights)
    names = [name for name, _ in tracker.events]
    assert names.count(fails_at or "on_train_end") == 1
    assert names[-1] == (fails_at or "on_train_end"), "it gets nothing after its failure"
    if not fails_at:
        (name, logs) = tracker.events[-2]
        assert (name, "eval_final_accuracy" in logs) == ("on_log", True)


def test_tracker_whose_server_cannot_be_reached_changes_nothing(
    tiny_encoder: Path,
    tmp_path: Path,
    plain_weights: Mapping[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    import mlflow

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    try:
        run_with_tracker(tmp_path, tiny_encoder, "mlflow")
    finally:
        mlflow.set_tracking_uri(before or "")
    (warning,) = [line["text"] for line in runs.events(tmp_path, "message") if "report_to" in line["text"]]
    assert warning.startswith("train.report_to: MLflow failed (MlflowException: API request")
    assert_equal_weights(tmp_path, plain_weights)


def test_tracker_of_a_training_that_fails_is_closed(
    tracker: type[Recording], tiny_encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FulltuneError):
        run_with_tracker(tmp_path, tiny_encoder, options={"listener": runs.at_step(2, runs.fail)})
    assert [name for name, _ in tracker.events][-1] == "on_train_end"
