"""Places that touch a GPU are found in the syntax, and each can be broken; `make gpu-paths` asks for their tests."""

from __future__ import annotations

import ast

import pytest

from tests.gpu_paths import hook
from tests.gpu_paths.sites import sites_of

SOURCE = '''
"""Of `torch.cuda` and "cuda"."""
from typing import Literal
TOKENS = {"cpu": 256, "cuda": 1024}
SAID = {"no_cuda": "cuda", "mps": "Apple's"}
def take(device: Literal["cpu", "cuda"], batch, model, **named: torch.cuda.Event) -> "cuda":
    """On "cuda"."""
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize()
    with torch.autocast(device, enabled=False):
        batch.to(device, non_blocking=True)
    match device:
        case "cuda":
            return int(torch.cuda.memory_stats()["peak"])
    return Loader(batch, pin_memory=self.pinned) or getattr(model, "scaler", None)
'''
FOUND = [
    "'cuda'",
    "device == 'cuda'",
    "torch.cuda.is_available()",
    "torch.cuda.synchronize()",
    "torch.autocast(device, enabled=False)",
    "True",
    "'cuda'",
    "torch.cuda.memory_stats()['peak']",
    "self.pinned",
    "getattr(model, 'scaler', None)",
]


def test_places_are_found_in_the_syntax() -> None:
    assert [site.text for site, _ in sites_of("m", ast.parse(SOURCE))] == FOUND


@pytest.mark.parametrize(
    ("text", "ways"),
    [
        ("device == 'cuda'", ["False", "True"]),
        ("device != 'cuda'", ["True", "False"]),
        ("'nccl'", ["'gloo'"]),
        ("False", ["True"]),
        ("torch.cuda.empty_cache()", ["0"]),
        ("torch.cuda.is_available()", ["False", "True"]),
        ("self.on_gpu", ["False", "True"]),
        ("scaler.scale(loss)", ["loss"]),
        ("getattr(accelerator, 'scaler', None)", ["None"]),
        ("self.args.dataloader_pin_memory", ["not self.args.dataloader_pin_memory"]),
        ("autocast(model, precision)", ["__import__('contextlib').nullcontext()"]),
    ],
)
def test_each_kind_of_place_has_ways_to_be_wrong(text: str, ways: list[str]) -> None:
    node = ast.parse(text, mode="eval").body
    assert [ast.unparse(wrong) for wrong in hook.broken(node)] == ways
