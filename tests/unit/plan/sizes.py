"""A model of Llama-2-7B's size, BERT-base, and data for them, as the plan's records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fulltune.footprint.records import Footprint, LiveMemory, Variant
from fulltune.models.shapes import Shapes
from fulltune.models.sharding import Units
from fulltune.plan.workload import Workload
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary, SplitSummary

GB, GIB = 10**9, 2**30
LLAMA = Shapes(
    model_type="llama",
    is_decoder=True,
    num_parameters=6_738_415_616,
    num_layers=32,
    hidden_size=4096,
    vocab_size=32_000,
    position_limit=4096,
    units=Units(root=0, persistent=131_076_096, freed=6_607_339_520, block=202_383_360, apart=131_072_000),
)
BERT = Shapes(
    model_type="bert",
    is_decoder=False,
    num_parameters=110_000_000,
    num_layers=12,
    hidden_size=768,
    vocab_size=30_000,
    position_limit=512,
    units=Units(root=110_000_000 - 12 * 7_087_872, persistent=0, freed=12 * 7_087_872, block=7_087_872, apart=0),
)


def moment(
    place: str,
    *,
    gradients: float = 0,
    activations: float = 0,
    pair: float = 0,
    logits: float = 0,
    buffers: float = 0,
) -> LiveMemory:
    """A constant number of bytes of gradients and buffers, of logits and activations for each token, of these also for
    each pair of tokens."""
    return LiveMemory(
        place=place,
        coefficients={
            "gradients": (gradients, 0, 0, 0, 0, 0),
            "activations": (0, 0, activations, pair, 0, 0),
            "logits": (0, 0, logits, 0, 0, 0),
            "buffers": (buffers, 0, 0, 0, 0, 0),
        },
    )


PRECISIONS = ("fp32", "bf16", "fp16")


def variants(kept: LiveMemory, recomputed: LiveMemory, precisions: Sequence[str] = PRECISIONS) -> tuple[Variant, ...]:
    """Both ways to compute in each precision, of one moment each."""
    return tuple(
        Variant(precision=precision, activation_checkpointing=again, first=(one,), later=(one,))
        for precision in precisions
        for again, one in ((False, kept), (True, recomputed))
    )


def footprint(shapes: Shapes) -> Footprint:
    """Two bytes for each of 34 values a token, layer and hidden unit; 2 values when they are recomputed."""
    value, all_gradients = 2.0 * shapes.hidden_size * shapes.num_layers, 4.0 * shapes.num_parameters
    logits = 10.0 * shapes.vocab_size if shapes.is_decoder else 0.0
    kept, recomputed = (
        moment("end of backward", gradients=all_gradients, activations=values * value, logits=logits)
        for values in (34, 2)
    )
    # Autocast keeps a copy of the weights in 16 bits.
    copies = {precision: 0.0 if precision == "fp32" else 2.0 * shapes.num_parameters for precision in PRECISIONS}
    return Footprint(
        weights_dtype="fp32",
        largest_tensor=shapes.vocab_size * shapes.hidden_size,
        sequences_per_row=1,
        variants=variants(kept, recomputed),
        evaluation={
            precision: (moment("layer", activations=value, logits=logits, buffers=copy),)
            for precision, copy in copies.items()
        },
        flops_per_token=2.0 * (shapes.num_parameters - shapes.vocab_size * shapes.hidden_size),
        attention_flops_per_pair=4.0 * shapes.num_layers * shapes.hidden_size,
    )


def summary(task: str, rows: int, tokens: int) -> DataSummary:
    """Rows of one length."""

    def split(number: int) -> SplitSummary:
        return SplitSummary(
            rows=number,
            tokens=number * tokens,
            trained_tokens=number,
            truncated_rows=0,
            dropped_rows=0,
            length_percentiles={"p50": tokens, "p95": tokens, "max": tokens},
        )

    return DataSummary(
        task=task,
        problem_type="prompt_completion" if task == "causal-lm" else "single_label",
        columns={},
        max_length=tokens,
        max_length_reason="the longest row",
        splits={"train": split(rows), "eval": split(1000), "test": split(1000)},
        sources={},
        fingerprint="x",
    )


def llama(rows: int = 50_000, tokens: int = 512, **blocks: Any) -> Workload:
    """Chat rows for the 7B model; global batch 64 unless another is given."""
    return _task("causal-lm", LLAMA, rows, tokens, {"train": {"global_batch_size": 64}, **blocks})


def bert(rows: int = 10_000, tokens: int = 64, **blocks: Any) -> Workload:
    return _task("text-classification", BERT, rows, tokens, blocks)


def _task(task: Any, shapes: Shapes, rows: int, tokens: int, blocks: dict[str, Any]) -> Workload:
    recipe = Recipe.model_validate({"model": "m", "task": task, "data": {"train": "a"}, **blocks})
    return Workload(recipe, shapes, lambda weights_dtype: footprint(shapes), summary(task, rows, tokens))
