from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.models import evaluation_mode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ROUNDINGS, _LEAST = 4, 1e-5
"""A leak exceeds this many times the rounding in texts that nothing precedes, by this share of the largest logit."""
_TEXTS = (20, 12, 8)
"""Lengths of the check's texts: the first fills one block, the others a second one."""
_VOCABULARY = 1000
_FAILURES = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, ImportError)


def fill_blocks(lengths: Sequence[int]) -> list[list[int]]:
    """Return the numbers of the rows in each block, with little padding and no more attention than single rows have."""
    longest, order = max(lengths), sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best, area = [[row] for row in order], len(lengths) * longest
    for count in range(min(len(lengths), sum(lengths) // longest + 2), 0, -1):
        blocks, filled = [list[int]() for _ in range(count)], [0] * count
        for row in order:  # each into the emptiest block
            at = filled.index(min(filled))
            blocks[at].append(row)
            filled[at] += lengths[row]
        width = max(filled)
        if count * width < area and count * width**2 <= len(lengths) * longest**2:
            best, area = blocks, count * width
    return best


def join_texts(texts: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the features of a block of texts; position ids restart at each text."""
    ids, labels = (np.concatenate([text[name] for text in texts]) for name in ("input_ids", "labels"))
    # Position ids that restart at 0 tell transformers' models where a text begins.
    positions = np.concatenate([np.arange(len(text["input_ids"]), dtype=np.int32) for text in texts])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def why_not_packable(config: PretrainedConfig, attn_implementation: str | None = None) -> str | None:
    """Return the reason why texts cannot be packed for this model, or None if they can."""
    import torch
    import transformers

    if attn_implementation is not None and attn_implementation.startswith("flash"):
        # transformers 5.24 gives flash attention the ends of the texts only in a batch of one row.
        return f"{attn_implementation} separates packed texts only in batches of one row; use sdpa"
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))  # one layer of each
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if hasattr(text, name):
            setattr(text, name, max(1, len(kinds)))
    if kinds:
        with contextlib.suppress(AttributeError):  # some configs derive it from their number of layers
            text.layer_types = kinds
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    for part in (small, text):
        part.pad_token_id = None
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    keywords = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32, **keywords)
        except _FAILURES as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            return f"a small copy of the '{config.model_type}' model cannot be created ({why})"
    model.config.get_text_config().use_cache = False
    blocks = rows_for_check(model, joined=True)
    batch = {name: torch.from_numpy(np.stack([block[name] for block in blocks])).long() for name in blocks[0]}
    return find_packing_leak(model, batch)


def rows_for_check(model: PreTrainedModel, *, joined: bool) -> list[dict[str, np.ndarray]]:
    """Return tokenised rows, or two blocks of them if `joined`, as a collator takes them for `find_packing_leak`."""
    vocabulary = min(model.config.get_text_config().vocab_size, _VOCABULARY)
    ids = np.arange(3, 3 + sum(_TEXTS)) % vocabulary
    rows = [{"input_ids": text, "labels": text} for text in np.split(ids, np.cumsum(_TEXTS[:-1]))]
    return [join_texts(rows[:1]), join_texts(rows[1:])] if joined else rows


def find_packing_leak(model: PreTrainedModel, batch: Mapping[str, Any]) -> str | None:
    """Return an error message if packed texts attend to each other, else None. `batch` has `rows_for_check` as
    training packs them; the model is called with it as in training."""
    import torch

    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    rounding, difference, largest, named = 0.0, 0.0, 0.0, f"a '{model.config.model_type}' model"
    try:
        with evaluation_mode(model), torch.no_grad():
            together = model(**inputs).logits.float()
            for row in range(len(ids)):
                starts = (positions[row] == 0).nonzero()[:, 0].tolist()
                for text in map(slice, starts, [*starts[1:], None]):
                    alone = model(input_ids=ids[row : row + 1, text], use_cache=False).logits[0].float()
                    apart = float((together[row, text] - alone).abs().max())
                    rounding, difference = max(rounding, apart * (not text.start)), max(difference, apart)
                    largest = max(largest, float(alone.abs().max()))
    except _FAILURES as error:
        return f"{named} fails with position ids ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    if difference > _ROUNDINGS * rounding + max(_LEAST, torch.finfo(model.dtype).eps) * largest:
        return f"{named} does not keep packed texts separate (its logits differ by {difference:.2g})"
    return None
