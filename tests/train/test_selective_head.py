"""The head at trained positions only: the same loss and gradients, less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fulltune.inference import selective_head
from fulltune.inference.run import extract_logits
from fulltune.tasks import Target, causal_lm
from tests import tiny
from tests.train import runs

TARGET = Target("prompt_completion", {"prompt": "prompt", "completion": "completion"})
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def batch(pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different length with 1, 5 and 0 trained tokens."""
    rows = [
        {"input_ids": list(range(5, 9)), "labels": [-100, -100, -100, 8]},
        {"input_ids": list(range(20, 32)), "labels": [-100] * 7 + list(range(27, 32))},
        {"input_ids": [7, 8], "labels": [-100, -100]},
    ]
    return causal_lm.collate(rows, pad)


def model_of(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    changes = {"initializer_range": 0.2, **NO_DROPOUT.get(kind, {})}
    return AutoModelForCausalLM.from_config(tiny.config(kind, tiny.decoder_tokenizer(), **changes))


class Misplacing(torch.nn.Linear):
    """A head that looks at its neighbours: picked hidden states have others."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden + hidden.roll(1, dims=-2))


def test_a_head_that_needs_all_places_is_found_out() -> None:
    model = model_of("llama")
    plain = model.lm_head
    model.lm_head = Misplacing(plain.in_features, plain.out_features, bias=False)

    head, found = selective_head.verify_selective_head(model, causal_lm, batch())

    assert head is None
    assert "differ by" in found


def check_of(outcome: Any) -> str:
    return next(check.result for check in outcome.checks if check.name == "logits of trained tokens only")


def test_with_a_loss_of_the_users_own_all_logits_are_there(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "llama")
    shapes: list[int] = []

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = extract_logits(outputs)
        shapes.append(logits.dim())
        return causal_lm.loss(logits, labels, TARGET) / num_items_in_batch

    options = {"compute_loss": compute_loss}
    outcome = runs.run(
        tmp_path, model, tiny.pair_rows(), task="causal-lm", train={"max_steps": 2}, options=options
    ).outcome

    assert outcome is not None
    assert check_of(outcome) == "off: you supply the loss"
    assert set(shapes) == {3}
