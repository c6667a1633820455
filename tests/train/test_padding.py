"""What stands beside a row in its batch changes nothing: logits and generated answers are those of the row alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fulltune.inference.run import Batching, generate_answers, run_rows
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.model import ModelBlock
from fulltune.tasks import Target, causal_lm, text_classification
from tests import tiny

TARGET = Target("single_label", {"text": "text", "label": "label"}, ("a", "b", "c"))
PAIR = Target("prompt_completion", {"prompt": "prompt", "completion": "completion"})
EOS = "<|im_end|>"
TEXTS = (
    "rain",
    f"the sun {EOS} shines over the town",
    f"we cook soup with bread{EOS}",
    f"{EOS}",
    "an apple after dinner" * 3,
)


@pytest.fixture(scope="module", params=(*tiny.ENCODERS, *tiny.DECODERS))
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and tokenizer as training loads them; decoders pad with their end token, which also stands in the texts."""
    folder = tiny.save_model(tmp_path_factory.mktemp("classifier") / request.param, request.param)
    base = Base.from_block(ModelBlock(name=str(folder)))
    tokenizer = base.processor
    torch.manual_seed(1)
    changes = text_classification.config_changes(TARGET, tokenizer)
    model = load_model(base, changes, head_is_new=True).eval()
    # The head starts near 0 (RoBERTa's, GPT-2's): make differences visible.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == 3:
                parameter.normal_()
    return model, tokenizer


@pytest.fixture(scope="module", params=tiny.DECODERS)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tiny.save_model(tmp_path_factory.mktemp("decoder") / request.param, request.param, initializer_range=0.2)
    base = Base.from_block(ModelBlock(name=str(folder)), "causal-lm")
    return load_model(base, {}, head_is_new=False).eval(), base.processor


def encode(tokenizer: Any) -> list[dict[str, Any]]:
    rows = [{"text": text, "label": "b"} for text in TEXTS]
    return [dict(one[0].features) for one in text_classification.encode(rows, TARGET, tokenizer, 64)]


def classified(model: Any, tokenizer: Any, rows: Any, batch_size: int) -> np.ndarray:
    kept = run_rows(model, rows, text_classification, TARGET, tokenizer.pad_token_id, Batching(batch_size))
    return np.asarray(kept["logits"])


def test_classifier_logits_alone_equal_those_in_a_padded_batch(classifier: tuple[Any, Any]) -> None:
    model, tokenizer = classifier
    encoded = encode(tokenizer)
    assert len({len(row["input_ids"]) for row in encoded}) > 2

    alone = np.concatenate([classified(model, tokenizer, [row], 1) for row in encoded])
    together = classified(model, tokenizer, encoded, len(encoded))

    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(alone - alone[0]).max() > 1e-3, "all rows look the same: this test shows nothing"


def test_language_model_logits_and_losses_alone_equal_those_in_a_padded_batch(decoder: tuple[Any, Any]) -> None:
    model, tokenizer = decoder
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [{"prompt": f"{text} {EOS}", "completion": f" {TEXTS[-number]}"} for number, text in enumerate(TEXTS)]
    encoded = [dict(one[0].features) for one in causal_lm.encode(rows, PAIR, tokenizer, 128)]
    batch = causal_lm.collate(encoded, tokenizer.pad_token_id)
    labels = batch.pop("labels")

    with torch.no_grad():
        together = model(**batch).logits
        for position, row in enumerate(encoded):
            single = causal_lm.collate([row], tokenizer.pad_token_id)
            single.pop("labels")
            alone = model(**single).logits[0]
            torch.testing.assert_close(together[position, : len(alone)], alone, rtol=1e-4, atol=1e-4)
            # The end token of the answer is trained although padding has the same id.
            assert labels[position][len(alone) - 1] == tokenizer.eos_token_id
            assert bool((labels[position][len(alone) :] == causal_lm.IGNORED).all())

    def kept(batch_size: int) -> Any:
        return run_rows(model, encoded, causal_lm, PAIR, tokenizer.pad_token_id, Batching(batch_size))

    one, many = kept(1), kept(5)
    np.testing.assert_allclose(many["nll"], one["nll"], rtol=1e-4)
    np.testing.assert_array_equal(many["tokens"], one["tokens"])


def test_greedy_answers_alone_equal_those_in_a_padded_batch(decoder: tuple[Any, Any]) -> None:
    model, tokenizer = decoder
    model.generation_config.eos_token_id = None  # a random model would stop by chance
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]

    def answers(batch_size: int) -> list[str]:
        return generate_answers(model, tokenizer, prompts, 12, Batching(batch_size))

    alone = answers(1)
    assert answers(5) == alone
    assert len(set(alone)) > 2
    # And what plain transformers gives without any padding.
    ids = torch.tensor([prompts[1]])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert alone[1] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_beyond_the_positions_keeps_prompt_and_answer_within_them(kind: str, tmp_path: Path) -> None:
    """The default of 128 new tokens on a model with 128 positions; the longest prompt alone fills them."""
    folder = tiny.save_model(tmp_path / kind, kind)
    tokenizer = Base.from_block(ModelBlock(name=str(folder))).processor
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    widths = []
    forward = model.generate

    def watched(**given: Any) -> Any:
        made = forward(**given)
        widths.append(made.shape[1])
        return made

    model.generate = watched
    prompts = [[7] * 3, [7] * 200]

    assert len(generate_answers(model, tokenizer, prompts, 128, Batching(1))) == 2
    assert max(widths) <= tiny.POSITIONS
