"""Generated answers choose the checkpoint: which one, what is said of ties, and that training is not touched by it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fulltune.errors import FulltuneError
from fulltune.inference.run import Batching, generate_tokens
from fulltune.records.scores import Answer
from fulltune.records.training import Outcome
from fulltune.stats.bootstrap import find_metric
from fulltune.stats.choice import choose_evaluation
from fulltune.tasks import Target
from fulltune.train.worker import answers
from tests import tiny
from tests.train import runs

ROWS = [
    {"prompt": f"what is number {number}?", "completion": ("soup", "bread", "cheese")[number % 3]}
    for number in range(60)
]
TRAIN: dict[str, Any] = {
    **{"max_steps": 12, "global_batch_size": 8, "micro_batch_size": 4, "logging_steps": 1},
    **{"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 10},
}
BLOCKS: dict[str, Any] = {
    "task": "causal-lm",
    "data": {"eval_fraction": 0.3},
    "train": TRAIN,
    "evaluate": {"metric": "exact_match", "choose_rows": 12, "max_new_tokens": 6, "generate_rows": 9},
    "method": {"learning_rate": 3e-3},
}


def go(folder: Path, model: Path, *, listener: Any = None, rows: Sequence[Any] = ROWS, **blocks: Any) -> Outcome:
    options = {} if listener is None else {"listener": listener}
    reached = runs.run(folder, model, rows, options=options, **{**BLOCKS, **blocks})
    assert reached.outcome is not None
    return reached.outcome


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    return {event["step"]: event["metrics"] for event in runs.events(folder, "eval")}


# ---- the choice --------------------------------------------------------------------------------------------------


def matches(*shares: float, rows: int = 100) -> list[np.ndarray]:
    """Terms of exact_match of several evaluations, in each of which the first rows are right."""
    right = [(np.arange(rows) < share * rows).astype(float) for share in shares]
    return [np.stack([values, np.ones(rows)], axis=1) for values in right]


@pytest.mark.parametrize(
    ("shares", "losses", "kept", "best"),
    [
        ((0.2, 0.5, 0.3), (1.0, 0.9, 0.8), 1, 1),  # clearly better, whatever the loss
        ((0.50, 0.51, 0.50), (1.0, 0.9, 0.8), 2, 1),  # one row more is no difference
        ((0.50, 0.51, 0.50), (0.8, 0.9, 1.0), 0, 1),
        ((0.5, 0.5, 0.5), (0.9, 0.8, 0.9), 1, 0),  # a constant metric
        ((0.50, 0.49, 0.9), (1.0, 0.5, 0.9), 2, 2),  # what was kept falls behind
        ((0.5, 0.48, 0.46), (1.0, 0.9, 0.8), 1, 0),  # ties are with the best, not from one to the next
    ],
)
def test_of_evaluations_like_the_best_the_one_with_the_lowest_loss_is_kept(
    shares: tuple[float, ...], losses: tuple[float, ...], kept: int, best: int
) -> None:
    measure = find_metric("causal-lm", Target("prompt_completion", {}), "exact_match")
    assert choose_evaluation(measure, matches(*shares), losses) == (kept, best)


def scripted(right_until: dict[int, int], rows: int) -> Any:
    """Generation whose first `right_until[step]` answers are the expected ones."""

    def scores(scorer: Any) -> tuple[list[str], np.ndarray]:
        right = right_until.get(scorer.trainer.state.global_step, 0)
        return [*scorer.expected[:right], *["?"] * (len(scorer.expected) - right)], np.zeros(rows, bool)

    return mock.patch.object(answers.AnswerScorer, "_generate", scores)


@pytest.mark.parametrize(
    ("right", "kept", "says"),
    [({3: 12, 6: 0, 9: 0, 12: 0}, 3, None), ({3: 6, 6: 6, 9: 6, 12: 6}, 12, "exact_match"), ({9: 12}, 9, None)],
    ids=["early", "tied", "late"],
)
def test_run_keeps_the_checkpoint_with_the_best_answers(
    right: dict[int, int], kept: int, says: str | None, tiny_decoder: Path, tmp_path: Path
) -> None:
    with scripted(right, 12):
        outcome = go(tmp_path, tiny_decoder, train={**TRAIN, "save_total_limit": 1})
    losses = {step: metrics["loss"] for step, metrics in evaluations(tmp_path).items() if step}
    assert min(losses, key=losses.__getitem__) == 12, "loss alone would keep the last"
    assert (outcome.best_step, outcome.best_metric) == (kept, right[kept] / 12)
    if says is None:
        assert outcome.weights_reason is None
    else:
        assert outcome.weights_reason is not None
        assert "the best exact_match was 50.0% at step 3" in outcome.weights_reason
        assert "(12 answers), and the loss was lower" in outcome.weights_reason


# ---- the loop ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, go(folder, tiny_decoder)


def test_answers_are_recorded_at_each_evaluation(unbroken: tuple[Path, Outcome]) -> None:
    folder, outcome = unbroken
    found = runs.events(folder, "answers")
    assert [event["step"] for event in found] == [0, 3, 6, 9, 12]
    [forecast] = runs.events(folder, "forecast")
    assert 0 < forecast["time"]["answers_seconds"] <= forecast["time"]["eval_seconds"]
    assert {event["rows"] for event in found} == {12}
    assert len({tuple((answer["text"], answer["expected"]) for answer in event["answers"]) for event in found}) == 1
    scores = evaluations(folder)
    assert all(0 <= metrics["exact_match"] <= 1 and metrics["loss"] > 0 for metrics in scores.values())
    assert max(metrics["exact_match"] for metrics in scores.values()) > 0, "it learns one of three words"
    assert outcome.best_metric == scores[outcome.best_step or 0]["exact_match"]


def test_recorded_answers_hold_no_personal_data() -> None:
    mail = "jane.doe@gmail.com"
    task = SimpleNamespace(prompt_text=lambda row, _: row["prompt"])
    scorer: Any = SimpleNamespace(
        rows=[{"prompt": f"write to {mail}"}], expected=[mail], target=None, inputs=SimpleNamespace(task=task)
    )
    (shown,) = answers.AnswerScorer._shown(scorer, [f"to {mail}"])
    assert shown == Answer(text="write to [EMAIL]", expected="[EMAIL]", predicted="to [EMAIL]")


def test_training_is_the_same_with_and_without_answers(
    tmp_path: Path,
) -> None:
    train = {**TRAIN, "load_best_model_at_end": False}
    model = tiny.save_model(tmp_path / "model", "gpt2")  # with dropout
    for folder, evaluate in (("with", BLOCKS["evaluate"]), ("without", {"metric": "loss"})):
        go(tmp_path / folder, model, train=train, evaluate=evaluate)
    one, other = (runs.final_weights(tmp_path / folder) for folder in ("with", "without"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [event["loss"] for event in runs.events(tmp_path / "with", "train")] == [
        event["loss"] for event in runs.events(tmp_path / "without", "train")
    ]


@pytest.mark.parametrize("step", [4, 7, 10])
def test_resumed_run_chooses_the_same_checkpoint(
    step: int, unbroken: tuple[Path, Outcome], tiny_decoder: Path, tmp_path: Path
) -> None:
    folder, outcome = unbroken
    with pytest.raises(FulltuneError):
        go(tmp_path, tiny_decoder, listener=runs.at_step(step, runs.fail))
    again = go(tmp_path, tiny_decoder)
    assert (again.best_step, again.best_metric, again.weights_reason) == (
        *(outcome.best_step, outcome.best_metric, outcome.weights_reason),
    )
    one, other = runs.final_weights(folder), runs.final_weights(tmp_path)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    last = [
        {event["step"]: event["answers"] for event in runs.events(place, "answers")} for place in (folder, tmp_path)
    ]
    assert last[0] == last[1]


def test_prompts_without_room_for_an_answer_are_cut_as_for_test_rows(tiny_decoder: Path, tmp_path: Path) -> None:
    long = [
        {**row, "prompt": row["prompt"] + " the" * (tiny.POSITIONS - 20 + number % 2)}
        for number, row in enumerate(ROWS)
    ]
    go(tmp_path, tiny_decoder, rows=long)
    assert runs.events(tmp_path, "answers")[0]["rows"] == 12
    warned = [event["text"] for event in runs.events(tmp_path, "message") if "choose_rows" in event["text"]]
    assert "is cut, because prompt and answer would exceed the model's 128 positions" in warned[0]


def test_answers_that_never_stop_are_bounded_and_counted(decoder_tokenizer: Any, tiny_decoder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval()
    model.generation_config.eos_token_id = None
    generate = functools.partial(generate_tokens, model, decoder_tokenizer, [[5, 6, 7], [8]], 7, Batching(2))
    assert [(len(answer.tokens), answer.has_ended) for answer in generate()] == [(7, False)] * 2
    third = generate()[0].tokens[2]
    model.generation_config.eos_token_id = third
    stopped = generate()[0]
    assert stopped.has_ended
    assert stopped.tokens[-1] == third
    assert len(stopped.tokens) <= 3


@pytest.mark.parametrize(
    "blocks",
    [
        {"methods": ["full", "lora"]},
        {"method": {"learning_rate": "search"}},
        {"preserve": {"budget": "1%"}},
        {"data": {"folds": 3}},
    ],
    ids=["comparison", "search", "budget", "folds"],
)
def test_answers_choose_in_single_runs_only(blocks: dict[str, Any], tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(FulltuneError, match="exact_match compares generated answers, which only a single run"):
        go(tmp_path, tiny_decoder, **blocks)


def test_metric_of_answers_needs_test_rows_with_answers(tiny_decoder: Path, tmp_path: Path) -> None:
    with pytest.raises(FulltuneError, match="generate_rows: 0, but"):
        go(tmp_path, tiny_decoder, evaluate={**BLOCKS["evaluate"], "generate_rows": 0})


@pytest.mark.parametrize(("kind", "once"), [("full", True), ("lora", False)])
def test_only_weights_without_added_parameters_are_gathered_once(kind: str, once: bool, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    train = {**TRAIN, "placement": "fsdp2", "num_processes": 2, "oversubscribe": True}
    plan = runs.run(tmp_path, model, ROWS, until="plan", **{**BLOCKS, "train": train, "method": {"kind": kind}}).plan
    assert plan is not None
    assert plan.answers is not None
    assert plan.answers.gather_once == once
