"""`docs/gpu.md` has every place that touches a GPU; a new one is found by itself and asks for a test."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.gpu_paths import hook, page
from tests.gpu_paths.sites import all_sites, sites_of

TESTS = Path(__file__).parents[1]
RUN = "docs/gpu.md: run `make gpu-paths`, which says what no test executes"
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


def test_page_has_the_places_that_there_are() -> None:
    found = Counter(site.name for site in all_sites())
    assert page.counted_in(page.PAGE.read_text(encoding="utf-8")) == found, RUN


def test_page_names_tests_that_exist_and_leaves_no_place_without() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    there = {
        node.name
        for file in TESTS.rglob("test_*.py")
        if "mark.stand_in" in (source := file.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }
    assert page.tests_in(text)
    assert set(page.tests_in(text)) <= there, RUN
    assert "**none**" not in text, RUN


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


def test_table_goes_where_it_was_and_leaves_the_rest_of_the_page() -> None:
    made = f"{page.BEGIN}\nnew\n{page.END}"
    once = page.with_table("# GPUs\n", made)
    assert once == f"# GPUs\n\n{made}\n"
    assert page.with_table(once.replace("new", "old") + "## More\n", made) == once + "## More\n"
