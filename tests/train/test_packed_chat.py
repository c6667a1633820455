"""Chats packed within each micro batch: the same curve as without, and refused or off where that cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fulltune.errors import RecipeError
from fulltune.records.plan import Plan
from fulltune.system.run_folder import RunResult
from fulltune.tasks import causal_lm
from tests import tiny
from tests.contract.command import fulltune
from tests.contract.test_measure import answered
from tests.train import runs

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {
                "role": "assistant",
                "content": " ".join(tiny.PLACES * 2 if number % 6 == 0 else tiny.PLACES[: 1 + number % 2]),
            },
        ]
    }
    for number in range(48)
]
TRAIN = {"max_steps": 4, "global_batch_size": 12, "micro_batch_size": 6, "logging_steps": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny.decoder_tokenizer(chat_template=tiny.CHATML)
    return tiny.save_model(tmp_path_factory.mktemp("chat") / "llama", "llama", tokenizer=tokenizer)


def go(folder: Path, model: Path, until: Any = "train", rows: Any = ROWS, **blocks: Any) -> RunResult:
    train = TRAIN | blocks.pop("train", {})
    with runs.without_tracing():
        return runs.run(folder, model, rows, until=until, task="causal-lm", train=train, **blocks)


def curve(folder: Path, model: Path, packing: bool) -> tuple[list[float], list[float], dict[str, Any], set[str], int]:
    """Train losses, eval losses, final weights, names of checks, and the sequences that were collated."""
    sequences, collate = 0, causal_lm.collate

    def counting(rows: Any, pad: int) -> Any:
        nonlocal sequences
        sequences += len(rows)
        return collate(rows, pad)

    folder.mkdir()
    with mock.patch.object(causal_lm, "collate", counting):
        train = {} if packing else {"group_by_length": False}
        go(folder, model, data={"packing": packing}, train=train, preserve={"drift": False})
    losses = [event["loss"] for event in runs.events(folder, "train")]
    evaluated = [event["metrics"]["loss"] for event in runs.events(folder, "eval")]
    checks = {check["name"] for event in runs.events(folder, "checks") for check in event["checks"]}
    return losses, evaluated, runs.final_weights(folder), checks, sequences


def test_packed_run_has_the_curve_and_weights_of_a_run_with_single_rows(model: Path, tmp_path: Path) -> None:
    losses, evaluated, weights, checks, sequences = curve(tmp_path / "packed", model, packing=True)
    others = curve(tmp_path / "single", model, packing=False)

    assert len(losses) == TRAIN["max_steps"]
    assert losses == pytest.approx(others[0], rel=1e-5)
    assert evaluated == pytest.approx(others[1], rel=1e-5)
    for name, tensor in others[2].items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-4)
    assert checks - others[3] == {"packed texts are isolated"}
    assert sequences < 0.8 * others[4]
    plan = Plan.load(tmp_path / "packed" / "run" / "plan" / "full.json")
    assert (plan.packing, plan.group_by_length) == (True, False)
    reasons = {setting.name: setting.reason for setting in plan.settings}
    assert reasons["data.packing"] == "from the recipe"
    assert reasons["train.group_by_length"] == "packing leaves little padding"


@pytest.mark.parametrize(
    ("kind", "task", "rows", "method", "reason"),
    [
        ("opt", "causal-lm", tiny.chat_rows(), {}, "'opt' model does not keep packed texts separate"),
        ("llama", "causal-lm", tiny.pair_rows(), {"kind": "prompt"}, "prompt tuning puts virtual tokens before"),
        ("t5", "seq2seq", [{"source": "a", "target": "b"}] * 20, {}, "only rows of causal-lm are packed"),
    ],
)
def test_packing_that_cannot_be_had_is_refused(
    kind: str, task: str, rows: Any, method: Any, reason: str, tmp_path: Path
) -> None:
    folder = tiny.save_model(tmp_path / "model", kind)
    more = {"method": method} if method else {}
    with pytest.raises(RecipeError, match=f"data.packing: impossible because .*{reason}.*; remove the setting"):
        runs.run(tmp_path, folder, rows, until="data", task=task, data={"packing": True}, **more)


def test_own_loss_never_sees_several_rows_as_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own_loss_of_rows.py").write_text(
        "def loss(outputs, labels, num_items_in_batch=None): ...\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError, match=r"data\.packing: your own loss would get several rows as one; remove"):
        go(
            tmp_path,
            model,
            "plan",
            data={"packing": True},
            train={"loss": "own_loss_of_rows:loss"},
            functions=str(tmp_path),
        )


@pytest.mark.parametrize(("packed", "taken"), [(3.0, True), (4.9, False)])
def test_measured_plan_packs_where_that_is_clearly_faster(
    packed: float, taken: bool, model: Path, tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    data_block = {"packing": "auto"}
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, data, task="causal-lm", data=data_block, train=TRAIN)

    def seconds(plan: Plan) -> float:
        assert plan.packing != plan.group_by_length
        return packed if plan.packing else 5.0

    with runs.in_this_process(answered(seconds)), runs.without_tracing():
        result = fulltune("plan", recipe, "--measure", "--json", "--run-folder", tmp_path / "run")

    assert result.code == 0, result.err
    plan = Plan.load(tmp_path / "run" / "plan" / "full.json")
    assert (plan.packing, plan.group_by_length) == (taken, not taken)
    (reason,) = (setting.reason for setting in plan.settings if setting.name == "data.packing")
    words = "measured: the fastest of " if taken else "one sequence per row; measured with packing: "
    assert reason.startswith(words)
    assert taken or " tokens/s, but " in reason
