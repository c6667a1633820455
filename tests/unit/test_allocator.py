"""Which variables of torch's allocator a training on a GPU gets, by system and by what the user has set."""

from __future__ import annotations

import pytest

from fulltune.system import memory

pytestmark = pytest.mark.stand_in("variables as a table", card="that the allocator does as they say")
LINUX = ("Linux", "6.8.0-45-generic")
BOTH = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "machine", "found"),
    [
        ({}, LINUX, BOTH),
        ({"PYTORCH_ALLOC_CONF": ""}, LINUX, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, LINUX, {}),
        ({"PYTORCH_HIP_ALLOC_CONF": "expandable_segments:False"}, LINUX, {}),
        ({}, ("Linux", "5.15.167.4-microsoft-standard-WSL2"), {}),
        ({}, ("Windows", "11"), {}),
    ],
)
def test_segments_grow_unless_the_user_or_the_system_says_otherwise(
    given: dict[str, str], machine: tuple[str, str], found: dict[str, str]
) -> None:
    assert memory.allocator_variables(given, *machine) == found
