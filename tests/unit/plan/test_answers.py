"""The plan of generated answers: how many, how long, how much memory and time, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from fulltune.errors import RecipeError
from fulltune.models.base import Base
from fulltune.models.shapes import measure_shapes
from fulltune.plan import gpus
from fulltune.plan.fit import make_plan
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import TaskName
from fulltune.records.plan import AnswersPlan, Plan
from fulltune.tasks import written
from tests.unit.plan import sizes

GB = 10**9
TRAIN = {"global_batch_size": 64, "num_train_epochs": 3, "device": "auto"}


def planned(
    metric: str | None, hardware: str = "1x H200", p95: int = 40, train: dict[str, Any] | None = None, **evaluate: Any
) -> Plan:
    given = {"metric": metric, **evaluate}
    task = sizes.llama(evaluate=given, train=TRAIN | (train or {}), preserve={"drift": False})
    summary, shapes = task.summary, task.shapes.model_copy(update={"cached_values": 2 * 32 * 32 * 128})
    splits = {name: split.model_copy(update={"trained_p95": p95}) for name, split in summary.splits.items()}
    task = replace(task, summary=summary.model_copy(update={"splits": splits}), shapes=shapes)
    return make_plan(task, gpus.parse_hardware(hardware))


def answers_of(plan: Plan) -> AnswersPlan:
    assert plan.answers is not None
    return plan.answers


def reason(plan: Plan) -> str:
    return next(setting.reason for setting in plan.settings if setting.name == "evaluate.choose_rows")


def test_answers_are_planned_only_where_they_choose_or_are_asked_for() -> None:
    assert planned(None).answers is None
    assert planned("perplexity").answers is None
    chosen = answers_of(planned("exact_match"))
    assert (chosen.rows, chosen.batch_size, chosen.max_new_tokens) == (100, 32, 60)
    assert answers_of(planned(None, choose_rows=7)).rows == 7
    assert answers_of(planned("bleu", choose_rows=5000)).rows == 1000, "no more than there are eval rows"


def test_length_is_one_and_a_half_of_long_expected_answers_and_bounded() -> None:
    assert answers_of(planned("chrf", p95=400)).max_new_tokens == 256
    assert answers_of(planned("chrf", p95=400, max_new_tokens=300)).max_new_tokens == 300
    assert answers_of(planned("chrf", p95=10, max_new_tokens=300)).max_new_tokens == 15


def test_cache_counts_in_the_memory_of_an_evaluation_and_lowers_the_batch_only_where_it_must() -> None:
    long: dict[str, Any] = {"p95": 2000, "max_new_tokens": 2000}
    plain, plan = planned(None), planned("exact_match", **long)
    answers = answers_of(plan)
    cached = answers.batch_size * (2 * 2 * 32 * 32 * 128 * (512 + 2000) + 4 * 32_000)  # keys and values in 16 bits
    assert plain.memory is not None
    assert plan.memory is not None
    assert plan.memory.phases["evaluation"] > plan.state["weights"] + plan.state["optimizer"] + cached
    assert plan.memory.phases["evaluation"] > plain.memory.phases["evaluation"]
    assert plan.memory.peak <= (plan.available_bytes or 0)
    tight = planned("exact_match", **long, train={"memory_limit": f"{plain.memory.peak / GB + 1:.2f}GB"})
    assert answers_of(tight).batch_size < answers.batch_size


def test_time_counts_in_the_run_and_a_large_share_names_what_lowers_it() -> None:
    plain, plan = planned(None), planned("exact_match")
    seconds = answers_of(plan).seconds
    assert seconds is not None
    assert plain.time is not None
    assert plan.time is not None
    assert plan.time.eval_seconds == pytest.approx(plain.time.eval_seconds + seconds)
    assert reason(plan).startswith("the metric compares answers: up to 60 tokens at each of 4 evaluations, in batches")
    assert "to save time" not in reason(plan)
    often = planned("exact_match", p95=200, choose_rows=1000, train={"eval_strategy": "steps", "eval_steps": 5})
    for name in ("evaluate.choose_rows", "evaluate.max_new_tokens", "train.eval_steps"):
        assert name in reason(often)


def test_sharded_weights_are_gathered_once_where_they_fit() -> None:
    roomy, tight = (
        planned("exact_match", f"8x {card}", train={"placement": "fsdp2", "num_processes": 8})
        for card in ("H200", "RTX 4090")
    )
    assert answers_of(roomy).gather_once
    assert not answers_of(tight).gather_once
    assert not answers_of(planned("exact_match")).gather_once, "nothing is sharded"


def test_metric_without_its_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "can_score", lambda metric: metric != "chrf")
    with pytest.raises(
        RecipeError, match=r"'chrf' needs a package; install it: pip install 'fulltune\[text-metrics\]'"
    ):
        planned("chrf")
    planned("rougeL")


@pytest.mark.parametrize(
    ("config", "task", "cached"),
    [
        (
            transformers.LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
            "causal-lm",
            64,
        ),
        (transformers.T5Config(num_layers=3, num_decoder_layers=2, d_model=32, d_kv=8, num_heads=2), "seq2seq", 64),
        (transformers.Gemma4TextConfig(), "causal-lm", 2 * 30 * 4 * 256),
        (
            transformers.SwinConfig(image_size=32, embed_dim=12, depths=[1, 1], num_heads=[2, 4]),
            "image-classification",
            0,
        ),
    ],
)
def test_cache_is_counted_for_models_that_write_whatever_their_config_calls_it(
    config: Any, task: TaskName, cached: int
) -> None:
    assert measure_shapes(Base(ModelBlock(name="m"), task, None, config), {}).cached_values == cached
