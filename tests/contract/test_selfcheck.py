"""`fulltune selfcheck`: the page, what may not stand on it, and that each check notices what it is there for."""

from __future__ import annotations

import getpass
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import selfcheck
from fulltune.cli import app as cli
from fulltune.selfcheck import CheckOutcome, NotHere, mask_names
from tests.contract.command import fulltune

CPU = "cpu"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other at every one of a tiny model's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names_in(text: str) -> list[str]:
    """What a page that is shared must not hold; `root` as a user's name says nothing."""
    names = {str(Path.home()), socket.gethostname(), getpass.getuser(), str(Path.cwd())} - {"root", "/"}
    return [name for name in names if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def only(monkeypatch: pytest.MonkeyPatch, *chosen: Any) -> None:
    monkeypatch.setattr(selfcheck, "CHECKS", chosen)
    monkeypatch.setattr(selfcheck, "devices_to_check", lambda: (CPU,))


@pytest.mark.slow
def test_command_on_the_cpu_passes_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [check for check in selfcheck.CHECKS if "two processes" not in check[0]]
    only(monkeypatch, *chosen)
    monkeypatch.setattr(cli.out, "width", 80)

    result = fulltune("selfcheck", "--output", tmp_path / "page.md")

    assert result.code == 0, result.out + result.err
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(check[0] in page for check in chosen)
    assert len(re.findall(r"\| (?:pass|not here) +\|", page)) == len(chosen)
    # A command or a path on a line of its own: nothing breaks inside it at 80 columns.
    assert result.out.splitlines()[-1] == f"share {tmp_path / 'page.md'}"
    assert not names_in(page)
    assert max(map(len, result.out.splitlines()[:-1])) <= 80  # the last line holds the user's own path
    assert re.fullmatch(r"\d+ passed, 0 failed, \d+ not here; \d+ seconds", result.out.splitlines()[-2])


@pytest.mark.parametrize("broken", ["result", "error"])
def test_broken_check_is_on_the_page_and_exits_2(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Path.home() / "models" / "weights.bin"

    def function(device: str) -> CheckOutcome:
        if broken == "error":
            raise OSError(f"cannot open '{secret}' on {socket.gethostname()}")
        return (False, "off by 1")

    def absent(device: str) -> CheckOutcome:
        raise NotHere("there is none")

    only(monkeypatch, ("a broken one", function), ("an absent one", absent))
    result = fulltune("selfcheck", "--json", "-o", tmp_path / "page.md")

    assert result.code == 2
    expected = {"error": "OSError: cannot open 'weights.bin' on HOST", "result": "off by 1"}[broken]
    assert result.problems == [f"selfcheck: cpu: a broken one: {expected}"]
    record = json.loads(result.out)
    assert [finding["status"] for finding in record["findings"]] == ["fail", "not here"]
    assert record["findings"][0]["result"] == expected
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| FAIL " in page
    assert not names_in(result.out + page)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no such file: /opt/jane/x/y.bin", "no such file: y.bin"),
        ("(/usr/lib/a.so) and ~/b/c", "(a.so) and c"),
        ("logits/gradients off by 1/2", "logits/gradients off by 1/2"),
        ("two\n  lines", "two lines"),
    ],
)
def test_names_and_paths_are_taken_out(text: str, expected: str) -> None:
    assert mask_names(text) == expected


# ---- each check notices its fault ------------------------------------------------------------------------------


def other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = selfcheck.make_llama

    def wrong(device: str, **options: Any) -> Any:
        model = right(device, **options)
        if options["attn_implementation"] == "sdpa":
            model.model.layers[0].self_attn.q_proj.weight.data += 0.01
        return model

    monkeypatch.setattr(selfcheck, "make_llama", wrong)


def less_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selfcheck.TYPES, "fp32", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        (less_exact, lambda: selfcheck.check_matrix_product(CPU, "fp32"), "relative error 2.9e-03"),
        (other_weights, lambda: selfcheck.check_sdpa(CPU, None), "unpadded off by"),
    ],
    ids=["precision", "attention"],
)
def test_check_notices_its_fault(
    fault: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[], CheckOutcome],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    passed, text = check()
    assert not passed
    assert words in text


@pytest.mark.long
def test_two_processes_add_up_whatever_lies_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    assert selfcheck.check_all_reduce(CPU) == (True, "sum 3000, expected 3000")


@pytest.mark.long
def test_process_that_hangs_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "SECONDS", 0.2)
    assert selfcheck.check_all_reduce(CPU) == (False, "no answer within 0.2 seconds")


def test_device_without_the_means_is_not_here() -> None:
    with pytest.raises(NotHere, match=r"needs an .*GPU"):
        selfcheck.check_flash_attention_2(CPU)
