"""The command line with a pull towards the weights before step 1 (L2-SP, Li et al. 2018, arXiv 1802.01483).

    PULL=10 python bench/pull.py evaluate recipe.yaml ...

As the parent it is `fulltune`, except that the workers which it starts are this file. After each update of AdamW a
worker moves every weight by rate x pull towards where it began, as weight decay moves it towards 0: decoupled, so that
the pull does not pass through AdamW's normalising. The decay towards 0 stays beside it. The head of a new task is
pulled towards its own beginning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE, WORKER = Path(__file__).resolve(), "worker-with-a-pull"


def command_line() -> None:
    """`fulltune` with this file's workers."""
    from planted import workers_of

    from fulltune.cli import app

    with workers_of(HERE, WORKER):
        app.main()


def worker(file: str, pull: float) -> int:
    """The real worker, pulled back after each update."""
    import torch
    from torch.optim import optimizer

    from fulltune.train.worker import main

    began: dict[torch.Tensor, torch.Tensor] = {}

    def before(updated: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(updated, torch.optim.AdamW):
            for group in updated.param_groups:
                for weight in group["params"]:
                    began.setdefault(weight, weight.detach().clone())

    @torch.no_grad()
    def after(updated: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(updated, torch.optim.AdamW):
            for group in updated.param_groups:
                for weight in group["params"]:
                    weight.lerp_(began[weight], min(1.0, group["lr"] * pull))

    optimizer.register_optimizer_step_pre_hook(before)
    optimizer.register_optimizer_step_post_hook(after)
    code = main.main(file)
    assert began or code, "no AdamW made an update"
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        sys.exit(worker(sys.argv[2], float(os.environ["PULL"])))
    command_line()
