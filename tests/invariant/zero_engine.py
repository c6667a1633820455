"""Two processes with DeepSpeed's engines: saved, put into new ones, trained on. Prints a line of JSON for each pair.

torchrun --nproc-per-node=2 -m tests.invariant.zero_engine FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file

from fulltune.train.optim import zero

KINDS = ((2, False, False), (3, False, False), (3, True, False), (2, False, True), (3, True, True))
"""Stage, bf16, offloaded to the host."""
OTHERS = ((KINDS[0], KINDS[1]), (KINDS[1], KINDS[0]), (KINDS[1], KINDS[3]), (KINDS[3], KINDS[1]))
Kind = tuple[int, bool, bool]


class Small(torch.nn.Module):
    """Sizes that two processes cannot share out evenly, and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.frozen(self.last(self.norm(torch.tanh(self.first(rows)))))
        return answer


def built(kind: Kind) -> tuple[Any, Any, list[str]]:
    """A model, its engine, and the trained names in the optimizer's order."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    stage, bf16, offload = kind
    torch.manual_seed(0)
    model = Small()
    block: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if offload:
        block |= {"offload_optimizer": {"device": "cpu"}} | ({"offload_param": {"device": "cpu"}} if stage == 3 else {})
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": block, "bf16": {"enabled": bf16}}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    names = [[name for name, one in trained.items() if (one.dim() > 1) is matrix] for matrix in (True, False)]
    groups = [{"params": [trained[name] for name in group]} for group in names]
    optimizer = (DeepSpeedCPUAdam if offload else torch.optim.AdamW)(groups, lr=1e-2, weight_decay=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return model, engine, [*names[0], *names[1]]


def train(engine: Any, first: int, last: int, bf16: bool) -> None:
    for step in range(first, last):
        torch.manual_seed(100 + 2 * step + torch.distributed.get_rank())
        rows = torch.randn(2, 7)
        engine.backward((engine(rows.bfloat16() if bf16 else rows).float() ** 2).sum())
        engine.step()


def values(model: Any) -> list[torch.Tensor]:
    """What is trained, and what passes compute with."""
    found = [zero.whole(one).float() for one in model.parameters()]
    for one in model.parameters():
        with deepspeed.zero.GatheredParameters([one]):
            found.append(one.detach().float().clone())
    return found


def furthest(model: Any, expected: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(values(model), expected, strict=True))


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    saved: dict[Kind, tuple[Path, list[torch.Tensor], list[torch.Tensor]]] = {}
    for number, kind in enumerate(KINDS):
        model, engine, _ = built(kind)
        train(engine, 0, 3, kind[1])
        zero.save(model, engine, folder / str(number))
        (folder / f"{number}-finished").mkdir(exist_ok=True)
        zero.write_whole(model, folder / f"{number}-finished")
        torch.distributed.barrier()
        then = values(model)
        written = load_file(folder / f"{number}-finished" / "model.safetensors")
        for name, one in model.named_parameters():
            assert torch.equal(written[name], zero.whole(one)), name
        train(engine, 3, 5, kind[1])
        saved[kind] = folder / str(number), then, values(model)
    for before, after in (*zip(KINDS, KINDS, strict=True), *OTHERS):
        path, then, end = saved[before]
        model, engine, ordered = built(after)
        zero.load(model, engine, path, ordered)
        found = {"before": before, "after": after, "loaded": furthest(model, then)}
        train(engine, 3, 5, after[1])
        found["trained"] = furthest(model, end)
        zero.load(model, engine, path, ordered, weights_only=True)
        found["weights"] = furthest(model, then)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
