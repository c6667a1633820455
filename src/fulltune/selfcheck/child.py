"""What `processes.py` runs: `python -m fulltune.selfcheck.child all-reduce|compile DEVICE`; one line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch


def all_reduce(device: str) -> dict[str, Any] | None:
    """Add up the ranks' numbers; only the first rank answers."""
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Half of the parent's patience: a worker that waits for nothing ends by itself.
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=30))
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    answer = {"sum": float(numbers.sum()), "expected": 1000.0 * size * (size + 1) / 2}
    dist.destroy_process_group()
    return answer if rank == 0 else None


def compiled(device: str) -> dict[str, Any]:
    """Loss and gradients of a compiled model against the plain one, or why it cannot be compiled."""
    from fulltune.models.compiled import compile_blocks
    from fulltune.selfcheck import tiny
    from fulltune.selfcheck.precision import relative_error

    ids, model = tiny.tokens(device), tiny.decoder(device, layers=1)
    plain, plain_gradients = tiny.backward(model, input_ids=ids, labels=ids)
    started = time.monotonic()
    try:
        compile_blocks(model.train(), device)
        found, gradients = tiny.backward(model, input_ids=ids, labels=ids)
    except Exception as error:  # whatever a compiler may say: it is the answer
        # Its first line only names the backend.
        said = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        return {"error": said[0] if said else type(error).__name__}
    return {
        "loss_error": relative_error(found.loss, plain.loss),
        "gradient_error": relative_error(gradients, plain_gradients),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Entry of the child process."""
    what, device = sys.argv[1:]
    answer = all_reduce(device) if what == "all-reduce" else compiled(device)
    if answer is not None:
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
