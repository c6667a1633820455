"""Texts that the untouched model writes by itself, to be replayed: what it could do, without a file that shows it
(Huang et al. 2024, arXiv 2403.01244, of answers; here of whole texts).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from fulltune.errors import InterruptedRun, SetupError
from fulltune.files import write_text
from fulltune.inference.run import autocast
from fulltune.train.worker.no_trace import same_randomness

if TYPE_CHECKING:
    from fulltune.train.worker.context import AttemptContext

MOST = 256
"""Texts: each of its tokens takes a pass through the model."""
_AT_ONCE = 32
PHASE = "having the untouched model write texts"


def samples(attempt: AttemptContext, tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Texts of at least two tokens and at most so many, drawn from the model's own probabilities. They are drawn once
    and kept in the run folder, so that a run that goes on, on whatever machine, has those that it began with.

    Args:
        attempt: Its model is the untouched one, on its device.
        tokenizer: The model's.
        count: At most so many, and `MOST`.
        tokens: Of each, at most.

    Raises:
        SetupError: When the tokenizer has no token that a text begins after, or the model writes nothing.
        InterruptedRun: Told to stop.
    """
    file = Path(attempt.request.run_folder) / "preserve" / f"{attempt.plan.trial}.samples"
    if file.exists():
        return [list(map(int, row)) for row in json.loads(file.read_text(encoding="utf-8"))]
    attempt.recorder.phase(PHASE)
    texts = _drawn(attempt, tokenizer, min(count, MOST), tokens)
    if attempt.is_main:
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(texts))
    return texts


def _drawn(attempt: AttemptContext, tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SetupError(
            "preserve.replay: samples: the tokenizer has neither a token that begins a text nor one that ends it, so "
            "the model cannot begin one; name a text file, or leave replay out"
        )
    model: Any = attempt.trainer.model
    device, at_once = model.device, min(_AT_ONCE, attempt.plan.eval_batch_size)

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        attempt.alive()
        return torch.full((len(ids),), may_stop and attempt.stop.asked, device=device)

    # Several processes agree on stopping only after a step.
    may_stop = attempt.plan.num_processes == 1
    was_training, settings, found = model.training, model.generation_config, []
    model.eval()
    # Nothing that a model's own settings make of its probabilities.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    try:
        on_gpu = device.type == "cuda"
        with same_randomness(on_gpu=on_gpu), torch.no_grad(), autocast(model, attempt.plan.precision):
            torch.manual_seed(attempt.plan.seed)
            for begin in range(0, count, at_once):
                start = torch.full((min(at_once, count - begin), 1), first, device=device)
                shown = torch.ones_like(start)
                made = model.generate(start, attention_mask=shown, max_new_tokens=tokens - 1, stopping_criteria=[watch])
                if may_stop and attempt.stop.asked:
                    raise InterruptedRun("stopped on request before step 1")
                found += [_until_end(row.tolist(), tokenizer.eos_token_id) for row in made]
    finally:
        model.generation_config = settings
        model.train(was_training)
    texts = [row for row in found if len(row) > 1]
    if not texts:
        raise SetupError(
            f"preserve.replay: samples: the model ended each of {len(found)} texts at once; name a text file, or leave "
            "replay out"
        )
    return texts


def _until_end(row: list[int], end: int | None) -> list[int]:
    """With the first token that ends it, without the padding behind that."""
    return row[: row.index(end, 1) + 1] if end in row[1:] else row
