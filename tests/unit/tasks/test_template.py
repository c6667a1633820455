"""The chat template of a saved model asks as the model was trained."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.recipe.data import DataBlock
from fulltune.tasks import Target, causal_lm
from tests import tiny


@pytest.mark.parametrize("joint", ["\n", "", " => "])
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_template_renders_a_message_as_the_prompt_that_was_trained(joint: str, bos: str | None) -> None:
    tokenizer = tiny.decoder_tokenizer(eos="<|endoftext|>", bos=bos)
    target = Target("prompt_completion", {"prompt": "p", "completion": "c"}, joint=joint)
    row = {"p": "What is {{ 6 }} x 7?\n", "c": "42"}
    ((example,),) = causal_lm.encode([row], target, tokenizer, 128)
    ids, labels = example.features["input_ids"], example.features["labels"]
    asked = [token for token, label in zip(ids, labels, strict=True) if label == -100]
    tokenizer = causal_lm.with_prompt_template(tokenizer, target)

    def rendered(*messages: dict[str, str], **options: Any) -> list[int]:
        return list(tokenizer.apply_chat_template(list(messages), return_dict=False, **options))

    user, assistant = {"role": "user", "content": row["p"]}, {"role": "assistant", "content": row["c"]}
    assert rendered(user, add_generation_prompt=True) == asked
    assert rendered(user, assistant) == list(ids)


def test_a_tokenizer_that_opens_otherwise_gets_no_template(encoder_tokenizer: Any) -> None:
    pairs = Target("prompt_completion", {"prompt": "p", "completion": "c"})
    assert (
        causal_lm.with_prompt_template(encoder_tokenizer, pairs).chat_template is None
    )  # opens with [CLS], which is no bos token


@pytest.mark.parametrize(
    ("about", "asked"), [("two apples", "Translate.\n\ntwo apples\n"), (" ", "Translate.\n"), (None, "Translate.\n")]
)
def test_what_an_instruction_is_about_stands_behind_it(about: str | None, asked: str) -> None:
    columns, tokenizer = {"prompt": "instruction", "input": "input", "completion": "output"}, tiny.decoder_tokenizer()
    row = {"instruction": "Translate.", "input": about, "output": "zwei"}
    target = causal_lm.find_target([row], columns, DataBlock(train="a.csv"), "a.csv")
    assert causal_lm.why_unusable(row, target) is None
    assert tokenizer.decode(causal_lm.generation_ids(row, target, tokenizer)) == asked
    example = causal_lm.encode([row], target, tokenizer, 100)[0][0]
    assert tokenizer.decode(example.features["input_ids"]).startswith(f"{asked}zwei")
