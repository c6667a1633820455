"""`method.head_learning_rate`: the head, with its pooler, has a rate of its own; everything else keeps the method's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune import methods
from fulltune.train.optim.groups import parameter_groups
from fulltune.train.worker.weights import InitialWeights
from tests import plans, tiny
from tests.train import runs

BODY, HEAD = 1e-5, 1e-2
RATES = {"learning_rate": BODY, "head_learning_rate": HEAD}
FIRST = {"max_steps": 1, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
FULL: dict[str, Any] = {"kind": "full"}

NAMES = [
    "m.embeddings.weight",
    "m.layer.0.w.weight",
    "m.layer.1.w.weight",
    "m.layer.1.w.bias",
    "top.weight",
    "top.bias",
]
DECAYED = {name for name in NAMES if name.endswith("weight")}


# ---- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_groups_of_the_head_come_last_and_leave_the_bodys_rates(factor: float) -> None:
    head = {"top.weight", "top.bias"}
    planned = plans.plan(layerwise_lr_decay=factor, head_learning_rate=0.2)
    before = parameter_groups(NAMES, DECAYED, planned, 0.1)
    groups = parameter_groups(NAMES, DECAYED, planned, 0.1, head)

    assert groups[-2:] == [
        {"params": ["top.weight"], "weight_decay": 0.1, "lr": 0.2},
        {"params": ["top.bias"], "weight_decay": 0.0, "lr": 0.2},
    ]
    kept = [{**one, "params": [name for name in one["params"] if name not in head]} for one in before]
    assert groups[:-2] == [one for one in kept if one["params"]]


# ---- runs --------------------------------------------------------------------------------------------------------


def first_step(folder: Path, model: Path, **blocks: Any) -> dict[str, float]:
    """Name to the longest way of a value of each trained tensor; of AdamW's first step it is the rate itself."""
    ways: dict[str, float] = {}
    original = InitialWeights.count_changes

    def moved(self: InitialWeights, model: Any, optimizer: Any, with_gradient: frozenset[str]) -> Any:
        for name, parameter in methods.trainable_parameters(model).items():
            ways[name] = float((parameter.detach().float() - self._initial_values(name).float()).abs().max())
        return original(self, model, optimizer, with_gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialWeights, "count_changes", moved)
        reached = runs.run(folder, model, tiny.topic_rows(), **blocks)
    assert reached.plan is not None
    assert (reached.plan.learning_rate, reached.plan.head_learning_rate) == (BODY, HEAD)
    assert [line["learning_rate"] for line in runs.events(folder, "train")] == pytest.approx([BODY])
    return ways


@pytest.mark.parametrize(
    ("kind", "method", "train"),
    [
        ("bert", FULL, {}),
        ("llama", FULL, {}),
        ("bert", FULL, {"optim": "adamw_torch"}),
        ("bert", FULL, {"optim": "adamw_bf16"}),
        ("bert", {"kind": "lora"}, {}),
        ("llama", {"kind": "lora"}, {"optim": "adamw_8bit"}),
        ("bert", {"kind": "adapter"}, {}),
        ("bert", {"kind": "prompt"}, {}),
        ("bert", {"kind": "peft", "type": "IA3"}, {}),
    ],
)
def test_head_moves_by_its_rate_and_everything_else_by_the_methods(
    kind: str, method: dict[str, Any], train: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.save_model(tmp_path / "model", kind)
    ways = first_step(tmp_path, model, method={**method, **RATES}, train={**FIRST, **train})

    of_head = {name: way for name, way in ways.items() if name.startswith(("classifier.", "score.", "bert.pooler."))}
    body = {name: way for name, way in ways.items() if name not in of_head}
    assert of_head
    assert body
    assert {name for name, way in of_head.items() if not 0.5 * HEAD < way < 1.1 * HEAD} == set()
    assert max(body.values()) == pytest.approx(BODY, rel=0.1)


# ---- plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "value", "reason"), [(0.01, 0.01, "from the recipe"), (None, 2e-3, "the same as")])
def test_plan_says_the_heads_rate_and_why(
    given: float | None, value: float, reason: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    method = {**FULL, "learning_rate": 2e-3, "head_learning_rate": given}
    plan = runs.run(tmp_path, tiny_encoder, tiny.topic_rows(), method=method, until="plan").plan
    assert plan is not None
    assert plan.head_learning_rate == given
    noted = next(one for one in plan.settings if one.name == "method.head_learning_rate")
    assert (noted.value, noted.is_automatic) == (value, given is None)
    assert noted.reason.startswith(reason)
