"""Loss in pieces against whole logits: memory and time of a head's product and its loss, forward and backward.

    python bench/chunked_loss.py                 # 4,096 tokens, 49,152 words, hidden size 576 (SmolLM2-135M's head)
    python bench/chunked_loss.py --sizes         # times of other sizes, from which the plan's rule comes
    python bench/chunked_loss.py --native        # also torch's own linear_cross_entropy (torch 2.13 and later)

Each contestant runs in a fresh process for its memory (growth of the resident set over one forward and backward pass
after the inputs exist, the gradients included) and in turns with the others, in one process, for its time (medians).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fulltune.models.chunked_loss import Pieces
from fulltune.system.memory import Meter

TOKENS, WORDS, HIDDEN = 4096, 49152, 576
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = [(tokens, 49152, 576) for tokens in (16, 64, 256, 1024)]
SIZES += [(256, 2048, 576), (2048, 2048, 576), (2048, 400, 64), (1024, 32128, 512)]


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The head as the model applies it at trained tokens, and the task's loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return Pieces(hidden.to(kind), weight, None, hidden[:0]).loss(targets)


def native(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    own: Any = F
    options = torch.nn.LinearCrossEntropyOptions()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        loss: torch.Tensor = own.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)
    return loss


WAYS: dict[str, Callable[..., torch.Tensor]] = {"whole": whole, "chunked": chunked, "native": native}


class Case:
    """Inputs of one size."""

    def __init__(self, tokens: int, words: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(words, hidden, generator=generator) * 0.05)
        self.hidden = torch.randn(tokens, hidden, generator=generator).requires_grad_()
        self.targets = torch.randint(0, words, (tokens,), generator=generator)

    def seconds(self, way: str, precision: str) -> float:
        """One forward and backward pass."""
        self.weight.grad = self.hidden.grad = None
        began = time.perf_counter()
        loss = WAYS[way](self.hidden, self.weight, self.targets, KINDS[precision])
        (loss / len(self.targets)).backward()
        return time.perf_counter() - began


def growth_mib(way: str, precision: str) -> float:
    """In a fresh process."""
    command = [sys.executable, __file__, "--child", way, precision]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(way: str, precision: str) -> None:
    Case(64, 512, 64).seconds(way, precision)  # what libraries take at their first use is not the loss's
    case = Case(TOKENS, WORDS, HIDDEN)
    meter = Meter("cpu")
    case.seconds(way, precision)
    print(meter.growth_bytes() / 2**20)


def medians(case: Case, ways: list[str], precision: str, rounds: int) -> dict[str, float]:
    """Seconds of each contestant, in turns; a first round is left out."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways:
            seconds = case.seconds(way, precision)
            if number:
                times[way].append(seconds)
    return {way: statistics.median(found) for way, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "PRECISION"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    ways = ["whole", "chunked", *(["native"] if given.native else [])]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if given.sizes:
        for size in SIZES:
            for precision in KINDS:
                found = medians(Case(*size), ways[:2], precision, given.rounds)
                ratio = found["chunked"] / found["whole"]
                tokens, words, hidden = size
                print(f"{tokens:6} tokens x {words:6} words, hidden {hidden:4}, {precision}: time x {ratio:.2f}")
        return
    case = Case(TOKENS, WORDS, HIDDEN)
    for precision in KINDS:
        times = medians(case, ways, precision, given.rounds)
        growth = {way: growth_mib(way, precision) for way in ways}
        for way in ways:
            less, slower = growth["whole"] / growth[way], times[way] / times["whole"]
            print(
                f"{precision} {way:8} {growth[way]:6.0f} MiB (1/{less:.1f}) {times[way]:6.2f} s (x {slower:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
