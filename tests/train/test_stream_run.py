"""A run that is streamed from a disk trains as one in memory, and goes on after it was killed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DebertaV2Config, DebertaV2Model

from fulltune.errors import FulltuneError, GuardStop, SetupError
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.stream.state import DiskState
from fulltune.train import checkpoints
from fulltune.train.loop import step_guard, streamed
from fulltune.train.loop.streamed import StreamedTrainer
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import weights
from tests import tiny
from tests.cases import others_long
from tests.train import runs

STEPS = 6
SEQ2SEQ = {"task": "seq2seq", "data": {"source": "prompt", "target": "completion"}}
RANDOM_HEAD = {"method": {"kind": "full", "head_init": "random", "learning_rate": 1e-3}}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def decoder(folder: Path, **changes: Any) -> tuple[Path, Sequence[Mapping[str, Any]], dict[str, Any]]:
    return tiny.save_model(folder, "llama", **changes), tiny.chat_rows(), {"task": "causal-lm"}


def case(folder: Path, family: str) -> tuple[Path, Sequence[Mapping[str, Any]], dict[str, Any]]:
    """A model, its rows and its task."""
    match family:
        case "encoder":
            return tiny.save_model(folder, "bert", **NO_DROPOUT), tiny.topic_rows(), RANDOM_HEAD
        case "decoder":
            return decoder(folder, tie_word_embeddings=False)
        case "experts":
            return tiny.save_model(folder, "qwen3_moe"), tiny.chat_rows(), {"task": "causal-lm"}
        case "tied decoder":
            return decoder(folder, tie_word_embeddings=True)
        case "images":
            rows = tiny.write_images(folder.parent / "images", 40)
            blocks = {"task": "image-classification", "data": {"train": str(rows)}}
            return tiny.save_image_model(folder), tiny.topic_rows(), blocks | RANDOM_HEAD
        case _:
            return tiny.save_model(folder, "t5", dropout_rate=0.0), tiny.pair_rows(), SEQ2SEQ


class Killed(BaseException):
    """Ends a run as a kill does: nothing handles it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    """Let the run die just before a method's call of this number."""
    method, calls = getattr(place, name), iter(range(1, 10**6))

    def counted(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return method(*given, **named)

    monkeypatch.setattr(place, name, counted)


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> Path:
    """The folder of a run that was killed so."""
    with monkeypatch.context() as patch:
        killed_at(patch, place, name, call)
        with pytest.raises((FulltuneError, Killed)):
            train(folder, "tied decoder", placement="stream")
    return folder / "run"


def train(
    folder: Path, family: str, dtype: str = "fp32", **settings: Any
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The losses and final weights of a run."""
    model, rows, blocks = case(folder / "model", family)
    usual = {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "logging_steps": 1}
    with runs.without_tracing():
        blocks |= {"model": {"weights_dtype": dtype}}
        runs.run(folder, model, rows, train=usual | {"eval_on_start": False} | settings, **blocks)
    lines = runs.events(folder, "train")
    return [(line["loss"], line["grad_norm"]) for line in lines], runs.final_weights(folder)


@pytest.mark.parametrize(
    ("family", "clipping"),
    others_long(
        itertools.product(["encoder-decoder", "encoder", "decoder", "tied decoder", "experts"], [0.0, 0.5]),
        *(("encoder-decoder", 0.5), ("tied decoder", 0.0), ("experts", 0.5)),
    ),
)
def test_losses_and_weights_are_those_of_a_run_in_memory(tmp_path: Path, family: str, clipping: float) -> None:
    losses, weights = train(tmp_path / "memory", family, placement="single", max_grad_norm=clipping)
    streamed, streamed_weights = train(tmp_path / "stream", family, placement="stream", max_grad_norm=clipping)
    assert len(losses) == STEPS
    assert streamed == losses
    assert streamed_weights.keys() == weights.keys()
    assert [name for name, one in weights.items() if not torch.equal(one, streamed_weights[name])] == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "micro_batch"),
    [("encoder-decoder", 2), ("encoder", 2), ("decoder", 2), ("decoder", 16), ("tied decoder", 2), ("images", 2)],
)
def test_fifty_steps_are_those_of_a_run_in_memory(tmp_path: Path, family: str, micro_batch: int) -> None:
    settings = {"max_steps": 50, "global_batch_size": 16, "micro_batch_size": micro_batch, "max_grad_norm": 0.5}
    losses, weights = train(tmp_path / "memory", family, placement="single", **settings)
    streamed, streamed_weights = train(tmp_path / "stream", family, placement="stream", **settings)
    assert len(losses) == 50
    assert streamed == losses
    assert [name for name, one in weights.items() if not torch.equal(one, streamed_weights[name])] == []


@pytest.mark.parametrize(
    ("optim", "dtype"),
    others_long(itertools.product(["adamw_8bit", "adamw_bf16"], ["fp32", "bf16"]), ("adamw_8bit", "fp32")),
)
def test_compressed_state_is_that_of_a_run_in_memory(tmp_path: Path, optim: str, dtype: str) -> None:
    settings = {"optim": optim, "precision": "bf16", "max_grad_norm": 0.0, "dtype": dtype}
    losses, weights = train(tmp_path / "memory", "decoder", placement="single", **settings)
    streamed, streamed_weights = train(tmp_path / "stream", "decoder", placement="stream", **settings)
    assert [loss for loss, _ in streamed] == [loss for loss, _ in losses]
    # In memory, the norm of bf16 gradients is rounded to bf16 itself.
    assert [norm for _, norm in streamed] == pytest.approx([norm for _, norm in losses], rel=2**-7 * (dtype == "bf16"))
    assert [name for name, one in weights.items() if not torch.equal(one, streamed_weights[name])] == []


@pytest.mark.parametrize(
    ("place", "name", "call"),
    others_long(
        [
            (DiskState, "park", 9),  # in a backward pass
            (DiskState, "begin", 3),  # before an update
            (DiskState, "_commit", 20),  # in an update, after some units
            (DiskState, "_unchanged", 4),  # where an update ends
            (StreamedTrainer, "_save_checkpoint", 3),  # after the update, before the checkpoint
            (StreamedTrainer, "_save_checkpoint", 1),
            (StreamedTrainer, "_save_checkpoint", STEPS),  # after the last update
            (weights, "save_model", 1),
            (checkpoints, "delete_state", 2),  # once the outcome is saved
        ],
        *((DiskState, "_commit", 20), (StreamedTrainer, "_save_checkpoint", STEPS)),
    ),
)
def test_run_that_was_killed_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int
) -> None:
    losses, expected = train(tmp_path / "whole", "tied decoder", placement="stream")
    run = interrupted(tmp_path / "killed", monkeypatch, place, name, call)
    run.symlink_to(run.rename(tmp_path / "moved"))
    later, found = train(tmp_path / "killed", "tied decoder", placement="stream")
    assert {*later} == {*losses}  # a step may be logged twice
    assert [name for name, one in expected.items() if not torch.equal(one, found[name])] == []
    assert not list(run.rglob("state*"))


@pytest.mark.parametrize("lost", others_long(["journal.json", "state.bin", "samples.safetensors", "all"], "all"))
def test_run_whose_state_is_lost_never_starts_from_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run = interrupted(tmp_path, monkeypatch, StreamedTrainer, "_save_checkpoint", 3)
    state = next(run.rglob("state.bin")).parent
    for file in [*state.iterdir()] if lost == "all" else [state / lost]:
        file.unlink()
    left = sorted(state.iterdir())
    with pytest.raises(FulltuneError, match=r"no complete training state, although this run is at step 2.*--fresh"):
        train(tmp_path, "tied decoder", placement="stream")
    assert sorted(state.iterdir()) == left


def test_last_checkpoint_without_its_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(tmp_path, monkeypatch, weights, "save_model", 1)
    journal = next(run.rglob("journal.json"))
    journal.write_text(journal.read_text("utf-8").replace(f'"step": {STEPS}', '"step": 1'), "utf-8")
    with pytest.raises(FulltuneError, match=f"state is at step 1, but the checkpoint is of step {STEPS}"):
        train(tmp_path, "tied decoder", placement="stream")


def test_state_that_another_process_uses_is_not_deleted(tmp_path: Path) -> None:
    (file := tmp_path / "state" / "state.bin").parent.mkdir()
    file.touch()
    lock = "import fcntl; one = open({!r}, 'r+'); fcntl.lockf(one, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", lock.format(str(file))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(SetupError, match="cannot be deleted"):
            checkpoints.delete_state(file.parent)
        assert file.exists()
        other.communicate("\n")
    checkpoints.delete_state(file.parent)
    assert not file.parent.exists()


def test_skipped_step_leaves_the_state_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, steps = step_guard.judge_step, []

    def judge(history: Any, step: int, *given: Any, **named: Any) -> Any:
        steps.append(step)
        verdict = real(history, step, *given, **named)
        return replace(verdict, action="skip", reason="a test") if step == 3 else verdict

    monkeypatch.setattr(step_guard, "judge_step", judge)
    losses, weights = train(tmp_path / "memory", "decoder", placement="single")
    streamed, streamed_weights = train(tmp_path / "stream", "decoder", placement="stream")
    assert [event["step"] for event in runs.events(tmp_path / "stream", "skipped")] == [3]
    assert streamed == losses
    assert [name for name, one in weights.items() if not torch.equal(one, streamed_weights[name])] == []


@pytest.mark.parametrize("family", others_long(["decoder", "images"], "images"))  # in files ViT's names differ
def test_best_weights_are_kept_and_the_state_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 3, "lr_scheduler_type": "constant"}
    judge = StreamedTrainer._determine_best_metric

    def judge_three(trainer: Any, **given: Any) -> bool:
        return trainer.state.global_step <= 3 and judge(trainer, **given)

    monkeypatch.setattr(FullTrainer, "_determine_best_metric", judge_three)
    _, expected = train(tmp_path / "memory", family, placement="single", **settings)
    real, kept = checkpoints.delete_old_checkpoints, list[int]()

    def delete(folder: Path, *given: Any) -> None:
        real(folder, *given)
        kept.append(len(list(folder.glob("*/model*.safetensors"))))

    monkeypatch.setattr(checkpoints, "delete_old_checkpoints", delete)
    _, found = train(tmp_path / "stream", family, placement="stream", **settings)
    assert found.keys() == expected.keys()
    assert [name for name, one in expected.items() if not torch.equal(one, found[name])] == []
    assert Outcome.load(next(tmp_path.glob("stream/run/attempts/*/outcome.json"))).best_step in (1, 2, 3)
    assert kept == [1] * STEPS  # what the plan counts as needed on the disk
    assert not list((tmp_path / "stream").rglob("state.bin"))
    (outcome,) = (tmp_path / "stream" / "run").glob("attempts/*/outcome.json")
    planned = Plan.load(tmp_path / "stream" / "run" / "plan" / "full.json").disk.checkpoint_bytes
    assert Outcome.load(outcome).disk_bytes > planned > 0  # the state is counted
    opened = [str(file.resolve()) for file in Path("/proc/self/fd").iterdir()]
    assert not [file for file in opened if file.startswith(str(tmp_path)) and "state.bin" in file]


def test_plan_refuses_weights_that_cannot_be_read_in_parts(tmp_path: Path) -> None:
    model, rows, blocks = decoder(tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    trusted = {"allow_pickled_weights": True}
    with runs.without_tracing(), pytest.raises(SetupError, match="cannot be streamed from their files"):
        runs.run(tmp_path, model, rows, until="plan", model=trusted, train={"placement": "stream"}, **blocks)


def test_progress_within_a_step_names_units_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_SECONDS_BETWEEN_LINES", 0.0)
    beats: list[int] = []
    monkeypatch.setattr(StreamedTrainer, "write_heartbeat", lambda self, *_: beats.append(self.state.global_step))
    train(tmp_path, "decoder", placement="stream", max_steps=1)
    lines = [line for line in runs.events(tmp_path, "rows") if line["name"].startswith("step 1, ")]
    assert [line["part"] for line in lines if "forward" in line["name"]][:5] == [f"unit {n} of 5" for n in range(1, 6)]
    assert lines[-1]["name"] == "step 1, backward"
    assert lines[-1]["part"] == "unit 5 of 5"
    assert lines[-1]["done"] == lines[-1]["total"]
    assert len(beats) > 2 * 5  # in the update too


def test_model_that_reads_weights_of_a_module_without_calling_it_is_refused_before_step_1(tmp_path: Path) -> None:
    positions = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = tiny.usual_tokenizer("bert")
    DebertaV2Model(DebertaV2Config(vocab_size=len(tokenizer), **size, **positions)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"placement": "stream", "max_steps": 1}
    with runs.without_tracing(), pytest.raises(GuardStop, match=r"of deberta\.encoder\.rel_embeddings\), so it cannot"):
        runs.run(tmp_path, tmp_path / "model", tiny.topic_rows(), train=settings)
    assert [line["name"] for line in runs.events(tmp_path, "phase")][-1] == "checking"  # there is no dry run
