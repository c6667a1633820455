"""Bytes of a training run, by arithmetic."""

from __future__ import annotations

from fulltune.records import StateBytes

BYTES = {"fp32": 4, "bf16": 2}


def state_bytes(num_parameters: int, weights_dtype: str) -> StateBytes:
    """Bytes that exist between steps with AdamW: gradients and both moments have the weights' type."""
    size = BYTES[weights_dtype]
    return StateBytes(
        weights=num_parameters * size, gradients=num_parameters * size, optimizer=2 * num_parameters * size
    )


def row_bytes(
    num_tokens: int, num_layers: int, hidden_size: int, vocab_size: int, task: str, checkpointing: bool
) -> int:
    """Activation bytes of one row of so many tokens in the forward pass, a cautious estimate.

    About 34 values per token, layer and hidden unit with a fused attention kernel (Korthikanti et al. 2022, arXiv
    2205.05198, equation 1 without the attention scores, in bytes for 2-byte types; doubled here for fp32), 2 with
    activation checkpointing; language models add logits: fp32, with their gradient and softmax.
    """
    per_token = (4 if checkpointing else 68) * hidden_size * num_layers
    if task in ("causal-lm", "seq2seq"):
        per_token += 3 * 4 * vocab_size
    return num_tokens * per_token


def row_tokens(max_length: int, problem_type: str, num_choices: int) -> int:
    """Most tokens of a row: each of its choices, or source and target, may be as long as the longest."""
    sequences = {"choice": num_choices, "source_target": 2}
    return max_length * sequences.get(problem_type, 1)


def checkpoint_bytes(num_parameters: int, weights_dtype: str) -> int:
    """Bytes on disk of one checkpoint: weights and both moments."""
    return 3 * num_parameters * BYTES[weights_dtype]
