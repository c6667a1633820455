"""The pure computing of a streamed step: one block, the head and the optimizer, measured with their weights in memory.

`python -m bench.block_seconds FOLDER MICRO_BATCHES LENGTH` prints JSON for a Llama's config in FOLDER, in bf16 with
AdamW in 8 bits: seconds of one optimizer step by part. Nothing is read, nothing waits, and a step with other parts
cannot be faster than their sum.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPEATS = 5
CHUNK = 256
"""Tokens whose logits are computed at once, as in training."""


def seconds(call: Callable[[], object]) -> float:
    """The median time of some calls, after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measured(folder: Path, micro_batches: int, length: int) -> dict[str, float]:
    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import AutoConfig, AutoModelForCausalLM

    from fulltune.train.optim.optimizers import AdamW

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in whole.parameters())
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    inner: Any = whole.base_model
    block = type(inner.layers[0])(config, 0).to(torch.bfloat16)
    states = torch.randn(1, length, config.hidden_size).bfloat16()
    rotary = type(inner.rotary_emb)(config)(states, torch.arange(length)[None])
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).bfloat16()
    targets = torch.randint(config.vocab_size, (length,))

    def forward(grad: bool) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            output: torch.Tensor = block(states.detach().requires_grad_(grad), position_embeddings=rotary)
            return output

    def loss() -> None:
        for begin in range(0, length, CHUNK):
            part = slice(begin, begin + CHUNK)
            logits = head(states[0, part].detach().requires_grad_())
            functional.cross_entropy(logits.float(), targets[part]).backward()

    # One matrix of the block: the optimizer's time is in proportion to the values.
    weights = nn.Parameter(block.mlp.down_proj.weight.detach().clone())
    weights.grad = torch.randn_like(weights) * 1e-3
    optimizer = AdamW([weights], lr=1e-5, moments_format="8bit")
    return {
        "forward": layers * micro_batches * seconds(lambda: forward(False)),
        "backward": layers * micro_batches * seconds(lambda: forward(True).backward(torch.ones_like(states))),
        "head": micro_batches * seconds(loss),
        "optimizer": seconds(optimizer.step) * total / weights.numel(),
        "parameters": total,
        "blocks": layers,
    }


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), *map(int, sys.argv[2:4]))))
