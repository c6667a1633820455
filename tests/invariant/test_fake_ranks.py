"""The plan of a process of N against torch's tracker on a group that does not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from tests.invariant.fake_ranks import Cell, planned, sizes_of

pytestmark = pytest.mark.slow
MOST_OFF, MOST_BELOW = 0.05, 0.02
SIZE = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 704}
LLAMA = Cell("llama", SIZE | {"num_key_value_heads": 2, "vocab_size": 4000}, rows=2, length=128)
TIED = Cell("qwen2", LLAMA.config | {"num_hidden_layers": 4, "tie_word_embeddings": True}, ranks=8, rows=4, length=256)
BERT = Cell("bert", SIZE | {"num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 8000}, ranks=8, rows=4)
EXPERTS = Cell(
    "qwen3_moe",
    LLAMA.config | {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 352},
    **{"ranks": 8, "rows": 4, "length": 256, "weights_dtype": "bf16"},
)
T5_SIZE = {
    "d_model": 256,
    "num_layers": 3,
    "num_heads": 4,
    "d_ff": 1024,
    "vocab_size": 4000,
    "decoder_start_token_id": 0,
}
SHORT = {
    "1": LLAMA,
    "8": replace(LLAMA, ranks=8),
    "8, recomputed": replace(LLAMA, ranks=8, recomputed=True),
}
SMOLLM2 = Cell(
    "llama",
    {
        **{"hidden_size": 576, "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
    },
)
LONG = {
    "width of 135M, 64": replace(SMOLLM2, ranks=64),
    "not shared out": replace(TIED, ranks=1, shared=False),
    "tied, 64": replace(TIED, ranks=64, recomputed=True, weights_dtype="bf16"),
    "tied, whole logits": replace(TIED, chunked=False),
    "several micro batches": replace(TIED, accumulation=2, precision="fp32"),
    "bert, recomputed": replace(BERT, task="text-classification", ranks=64, recomputed=True, precision="fp32"),
    # In bf16: torch's shape function of the experts' products takes nothing else.
    "experts": replace(EXPERTS, ranks=1),
    "experts, 8": EXPERTS,
    "experts, recomputed": replace(EXPERTS, recomputed=True),
    "t5": Cell("t5", T5_SIZE, task="seq2seq", ranks=8, rows=4, length=128),
}


def totals(cells: dict[str, Cell]) -> dict[str, int]:
    """Bytes at the highest moment of each cell."""
    given = json.dumps([asdict(one) for one in cells.values()])
    command = [sys.executable, "-m", "tests.invariant.fake_ranks", given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: one["Total"] for name, one in zip(cells, found, strict=True)}


def beyond(cells: dict[str, Cell], found: dict[str, int]) -> dict[str, float]:
    """Planned over tracked, where it is not within the bar."""
    alike = {one.model: [other for other in cells.values() if other.model == one.model] for one in cells.values()}
    known = {model: sizes_of(several) for model, several in alike.items()}
    ratios = {name: planned(one, known[one.model]).phases["step"] / found[name] for name, one in cells.items()}
    return {name: ratio for name, ratio in ratios.items() if not 1 - MOST_BELOW <= ratio <= 1 + MOST_OFF}


@pytest.mark.long
def test_plan_of_one_and_of_eight_is_within_the_bar() -> None:
    found = totals(SHORT)
    assert found["8, recomputed"] < found["8"] < found["1"]
    assert beyond(SHORT, found) == {}


@pytest.mark.long
def test_plan_of_other_models_is_within_the_bar() -> None:
    assert beyond(LONG, totals(LONG)) == {}
