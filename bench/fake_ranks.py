"""Planned memory of each of N GPUs against torch's own tracker on a process group that does not exist.

    python bench/fake_ranks.py [--set grid|whole|others] [--only NAME ...] [--ranks N ...] [--records FILE] [--show]

Each cell runs two training steps of one of N processes in a process of its own, on tensors without values
(`tests/invariant/fake_ranks.py`): any number of ranks and any size of model, in seconds, on a CPU. Both figures are
bytes of tensors: what a GPU takes beyond them is in neither. The plan was repaired while the cells of the set `grid`
were looked at; those of the set `others` were run afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

# The benches are no installed package, nor are the tests: they are found by the path that was set above.
from tests.invariant.fake_ranks import Cell, planned, sizes_of, tracked  # noqa: E402  # after what it needs

MIB = 2**20
MOST_OFF, MOST_BELOW = 0.05, 0.02
RANKS = (1, 8, 64)


def _llama(hidden: int, layers: int, heads: int, shared_heads: int, inner: int, vocabulary: int) -> dict[str, Any]:
    names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    names |= {"num_key_value_heads": shared_heads, "intermediate_size": inner, "vocab_size": vocabulary}
    return names | {"max_position_embeddings": 8192}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "135M": ("llama", _llama(576, 30, 9, 3, 1536, 49152) | {"tie_word_embeddings": True}),
    "1.1B": ("llama", _llama(2048, 22, 32, 4, 5632, 32000)),
    "6.7B": ("llama", _llama(4096, 32, 32, 32, 11008, 32000)),
}
"""SmolLM2-135M, TinyLlama and Llama 2 by their configs."""
TYPES = ({"precision": "bf16", "weights_dtype": "fp32"}, {"precision": "bf16", "weights_dtype": "bf16"})


def grid() -> Iterator[tuple[str, Cell]]:
    """The cells that were looked at while the plan was repaired."""
    settings = itertools.product(MODELS, TYPES, (False, True), ((1, 512), (4, 1024)), RANKS)
    for name, types, recomputed, (rows, length), ranks in settings:
        kind, config = MODELS[name]
        yield name, Cell(kind, config, ranks=ranks, rows=rows, length=length, recomputed=recomputed, **types)


def whole() -> Iterator[tuple[str, Cell]]:
    """As a run is on one GPU: not shared out."""
    for name, one in grid():
        if name != "6.7B" and one.ranks == 1 and one.rows == 1:
            yield name, replace(one, shared=False)


_BERT = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_T5 = {
    "d_model": 1024,
    "num_layers": 24,
    "num_heads": 16,
    "d_ff": 4096,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2": ("qwen2", _llama(896, 24, 14, 2, 4864, 151936) | {"tie_word_embeddings": True}, "causal-lm"),
    "8B": ("llama", _llama(4096, 32, 32, 8, 14336, 128256), "causal-lm"),
    "GPT-2": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, "causal-lm"),
    "1.1B": (*MODELS["1.1B"], "causal-lm"),
    "BERT": ("bert", _BERT, "text-classification"),
    "T5": ("t5", _T5, "seq2seq"),
}
"""Qwen2-0.5B, Llama 3 8B, GPT-2 medium, TinyLlama, BERT large and T5 large by their configs."""
_PLAIN, _NARROW, _FP32 = {}, {"weights_dtype": "bf16"}, {"precision": "fp32"}
_AGAIN, _WHOLE = {"recomputed": True}, {"in_pieces": False}
UNSEEN: tuple[tuple[str, int, int, int, dict[str, Any]], ...] = (
    *(("Qwen2", 8, 2, 768, one) for one in (_PLAIN, _NARROW | _AGAIN, _WHOLE)),
    *(("Qwen2", 64, 2, 768, one) for one in (_AGAIN, _NARROW)),
    *(("8B", 8, 1, 2048, one) for one in (_AGAIN, _NARROW, _NARROW | _AGAIN | _WHOLE)),
    *(("8B", 64, 1, 2048, one) for one in (_AGAIN, _NARROW | _AGAIN)),
    *(("GPT-2", 8, 2, 512, one) for one in (_FP32 | _WHOLE, _AGAIN)),
    ("1.1B", 8, 2, 512, _AGAIN | {"accumulation": 2}),
    ("1.1B", 2, 3, 640, _WHOLE),
    *(("BERT", 8, 8, 384, one) for one in (_PLAIN, _NARROW)),
    ("BERT", 64, 8, 384, _FP32 | _AGAIN),
    ("BERT", 2, 32, 128, _FP32),
    *(("T5", 8, 4, 256, one) for one in (_PLAIN, _FP32 | _WHOLE)),
    ("T5", 64, 4, 256, _AGAIN),
)
"""Name, ranks, rows, length and what is otherwise than in the usual cell."""


def others() -> Iterator[tuple[str, Cell]]:
    """Cells that nobody looked at before."""
    for name, ranks, rows, length, more in UNSEEN:
        kind, config, task = OTHERS[name]
        yield name, Cell(kind, config, task, ranks, rows=rows, length=length, **more)


SETS = {"grid": grid, "whole": whole, "others": others}


def measure(cell: Cell) -> dict[str, Any]:
    """In a process of its own, which has the libraries already."""
    begun = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return {"tracked": pool.apply(tracked, (cell,)), "seconds": round(time.perf_counter() - begun, 1)}


def show(models: dict[str, Any], cells: list[dict[str, Any]], kinds: bool) -> None:
    """A line for each cell, and how many are within the bar."""
    head = f"{'model':<7}{'ranks':>6} {'weights':<8}{'again':<6}{'batch':>8} {'pieces':<7}"
    print(f"{head}{'tracked, MiB':>13}{'planned, MiB':>13}{'ratio':>8}")
    inside = []
    for one in cells:
        cell = Cell(**one["cell"])
        need = planned(cell, models[cell.model])
        total, peak = one["tracked"]["Total"], need.phases["step"]
        ratio = peak / total
        inside.append(1 - MOST_BELOW <= ratio <= 1 + MOST_OFF)
        ranks = f"{cell.ranks}" if cell.shared else "whole"
        begin = f"{one['name']:<7}{ranks:>6} {cell.weights_dtype:<8}{'yes' if cell.recomputed else 'no':<6}"
        begin += f"{f'{cell.rows}x{cell.length}':>8} {'yes' if cell.in_pieces else 'no':<7}"
        print(f"{begin}{total / MIB:>13,.0f}{peak / MIB:>13,.0f}{ratio:>8.3f}{'' if inside[-1] else ' *'}")
        if kinds:
            print("   ", {name: round(size / MIB) for name, size in one["tracked"].items()})
            print("   ", {name: round(size / MIB) for name, size in need.kinds.items()})
    print(f"{sum(inside)} of {len(inside)} cells at most {MOST_BELOW:.0%} below and {MOST_OFF:.0%} above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="grid")
    parser.add_argument("--only", nargs="*", default=None, help="names of models")
    parser.add_argument("--ranks", nargs="*", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path(tempfile.gettempdir()) / "fulltune-fake-ranks.json")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--kinds", action="store_true", help="of memory as well")
    chosen = parser.parse_args()
    known: dict[str, Any] = {"models": {}, "cells": {}}
    if chosen.records.exists():
        known = json.loads(chosen.records.read_text(encoding="utf-8"))
    cells = {json.dumps(asdict(cell)): (name, cell) for name, cell in SETS[chosen.set]()}
    for key, (name, cell) in cells.items() if not chosen.show else ():
        left_out = chosen.only is not None and name not in chosen.only
        if key in known["cells"] or left_out or (chosen.ranks is not None and cell.ranks not in chosen.ranks):
            continue
        if cell.model not in known["models"]:
            known["models"][cell.model] = sizes_of(cell)
        known["cells"][key] = found = {"name": name, "cell": asdict(cell), **measure(cell)}
        chosen.records.write_text(json.dumps(known), encoding="utf-8")
        print(name, cell.ranks, found["tracked"]["Total"] // MIB, "MiB", found["seconds"], "s", flush=True)
    show(known["models"], [known["cells"][key] for key in cells if key in known["cells"]], chosen.kinds)


if __name__ == "__main__":
    main()
