"""How torch keeps a GPU's memory in a training process, by a variable that it reads once, before its first tensor.

Its default asks the driver for blocks of fixed size, and what is free in them cannot be joined: rows of many lengths
leave gaps that no later tensor fits. Expandable segments grow in place instead. A LoRA training of an 8B model on an
A100 reserved 10.8 GiB with them and 16.4 without, as fast (torchtune issue 1185); not measured by us.

Left alone: what the user has set, in any of its three names; Windows, where torch has them not; and WSL, where the
first tensor may fail (pytorch issue 192330). `train.memory_limit` holds with them too: torch compares all that it has
mapped with `set_per_process_memory_fraction` before it grows a segment.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def of_a_gpu(variables: Mapping[str, str], system: str, release: str) -> dict[str, str]:
    """Variables for a training process on a GPU; none where they stay as they are.

    Args:
        variables: The user's.
        system: `platform.system()`.
        release: `platform.release()`, in which WSL names itself.
    """
    if system != "Linux" or "microsoft" in release.lower() or any(name in variables for name in NAMES):
        return {}
    # torch 2.9 reads the second name alone, later ones the first.
    return dict.fromkeys(NAMES[:2], EXPANDABLE)


def in_words(variables: Mapping[str, str]) -> str:
    """What torch reads in them, for the journal."""
    return ", ".join(f"{name}={variables[name]}" for name in NAMES if name in variables) or "torch's default"
