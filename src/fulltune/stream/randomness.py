from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def derived_random_state(states: Sequence[Tensor], number: int, device: torch.device) -> list[Tensor]:
    """Return another random state that depends only on `states` and `number`."""
    digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in states) + f"{number}".encode())
    with torch.random.fork_rng(devices=[device for _ in states[1:]]):
        torch.manual_seed(int(digest.hexdigest()[:8], 16))
        return random_state(device)
