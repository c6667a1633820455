"""The card of a merged model: everything that is known of what was trained, loaded as a whole model."""

from __future__ import annotations

from fulltune.report.run.model_card import merged_card

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

## Versions

torch 2.9
"""


def test_card_keeps_what_is_known_and_loads_the_whole_model() -> None:
    found = merged_card(CARD, "merged", "text-classification")
    before, _, loading = found.partition("## How to load")
    assert before == CARD.partition("## How to load")[0]
    assert 'AutoModelForSequenceClassification.from_pretrained("merged")' in loading
    assert "PeftModel" not in found
    assert found.endswith("## Versions\n\ntorch 2.9\n")


def test_card_of_a_model_without_one_says_how_to_load_it() -> None:
    found = merged_card("", "merged", "causal-lm")
    assert found.startswith("---\nlibrary_name: transformers")
    assert 'AutoModelForCausalLM.from_pretrained("merged")' in found
