"""Rows in common forms become chat messages, and what would not be read back the same is refused with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.patch import save_patch
from fulltune.inference.store import row_id
from fulltune.records.audit import Remedy, RowDecision
from fulltune.tasks.chat import clean_messages
from tests.contract.command import fulltune

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "Q?"), ("assistant", "A"), ("assistant", "B")))
S = {"role": "system", "content": "Be kind"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
RECIPE = "model: none\ntask: causal-lm\ndata: {train: rows.jsonl%s}\n"


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _convert(*rows: dict[str, Any], settings: str | None = None, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("recipe.yaml").write_text(RECIPE % settings, encoding="utf-8")
    result = fulltune("data", "rows.jsonl" if settings is None else "recipe.yaml", "--convert", "out.jsonl")
    assert result.code == code, result.err
    written = Path("out.jsonl").read_text(encoding="utf-8") if not code else ""
    assert Path("out.jsonl").exists() == (not code)
    return [json.loads(line) for line in written.splitlines()], result.out + result.err


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}], "id": 1}, [Q, A]),
        ({"system": "Be kind", "conversations": [{"from": "human", "value": "Q?"}, A]}, [S, Q, A]),
        ({"system": "Be kind", "messages": [S, Q, A]}, [S, Q, A]),
        ({"chat": json.dumps([{"role": "Human", "value": "Q?"}, {"from": "bot", "content": "A"}])}, [Q, A]),
        ({"messages": [Q, CALL, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]}, [Q, CALL, A]),
        ({"instruction": "Q?", "input": "", "output": "A", "text": "all of it"}, [Q, A]),
        ({"instruction": "Q?", "input": "1", "output": "[1]"}, [Q | {"content": "Q?\n\n1"}, A | {"content": "[1]"}]),
        ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
        ({"instruction": "Q?", "output": "A", "history": [["Q?", "B"], ["Q?", "A"]]}, [Q, B, Q, A, Q, A]),
        ({"instruction": "Q?", "output": "A", "history": [], "system": "Be kind"}, [S, Q, A]),
    ],
)
def test_conversations_and_pairs_become_messages(row: dict[str, Any], messages: list[Any]) -> None:
    (written,), _ = _convert(row)
    assert written == {"messages": messages}
    assert clean_messages(written["messages"]) == messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "A", "rejected": "B", "score": 1},
        {"question": "Q?", "chosen": [A], "rejected": [B]},
        {"prompt": "Q?", "chosen": [Q, A], "rejected": [Q, B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
    ],
)
def test_preferences_become_prompt_and_answers(row: dict[str, Any]) -> None:
    assert _convert(row)[0] == [{"prompt": [Q], "chosen": [A], "rejected": [B]}]


def test_columns_of_the_recipe_win_and_columns_that_split_are_copied() -> None:
    row = {"prompt": "other", "chosen": "A", "rejected": "B", "q": "Q?", "who": 7}
    settings = ", prompt: q, completion: chosen, group: who"
    assert _convert(row, settings=settings)[0] == [{"who": 7, "messages": [Q, A]}]
    Path("out.jsonl").unlink()
    assert "did you mean 'who'" in _convert(row, settings=settings + "m", code=4)[1]


def test_three_rows_are_shown_masked_and_refused_rows_are_listed() -> None:
    good = [{"messages": [{"role": "user", "content": f"Write to bob.smith@gmail.com {n}"}, A]} for n in range(4)]
    bad: list[Any] = [[Q, {"role": "narrator", "content": "x"}, A], [], [Q | {"content": 5}, A], [Q], "none", [Q, {}]]
    written, told = _convert(*good, *({"messages": messages} for messages in bad))
    assert written == good
    assert "gmail" not in told
    assert [told.count(f"+ rows.jsonl:{n} messages") for n in (1, 2, 3, 4)] == [2, 2, 2, 0]
    assert [f"rows.jsonl:{5 + n}: " in told for n in range(len(bad))] == [True] * 5 + [False]
    assert "4 rows written, 6 refused" in told
    assert max(len(line) for line in told.splitlines() if line.startswith(("+", "-"))) <= 80


@pytest.mark.parametrize(
    "row",
    [
        {"text": "raw"},
        {"prompt": "Q?", "chosen": "A", "rejected": "A"},
        {"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]},
        {"chosen": "Q? A", "rejected": "Q? B"},
        {"instruction": "Q?", "input": ["1"], "output": "A"},
        {"instruction": "Q?", "output": "A", "history": [{"user": "Q?", "assistant": "B"}]},
        {"instruction": "Q?", "output": "A", "history": 5},
        {"instruction": "Q?", "output": "A", "history": ["QA"]},
        {"messages": [S, Q, A], "system": "Be rude"},
        {"messages": [Q, A, S, Q, A], "system": "Be rude"},
    ],
)
def test_nothing_is_written_if_no_row_can_be_converted(row: dict[str, Any]) -> None:
    _convert(row, code=4)
    assert [*Path.cwd().glob("out*")] == []


def test_rows_are_sampled_patched_and_preprocessed_as_for_training() -> None:
    rows = [{"prompt": "Q?", "completion": text} for text in ("A", "A", "B")]
    Path("convert_own.py").write_text("def doubled(row):\n    return row | {'completion': 2 * row['completion']}\n")
    decision = RowDecision(row=row_id(rows[0]), remedy=Remedy(action="drop"))
    save_patch(Path("patch.jsonl"), [decision])
    settings = ", preprocess: 'convert_own:doubled', patch: patch.jsonl"
    assert [row["messages"][1]["content"] for row in _convert(*rows, settings=settings)[0]] == ["AA", "BB"]
    Path("out.jsonl").unlink()
    assert len(_convert(*rows * 9, settings=", max_rows: 10")[0]) == 10


def test_packed_file_is_converted() -> None:
    Path("rows.jsonl.gz").write_bytes(gzip.compress(json.dumps({"messages": [Q, A]}).encode()))
    result = fulltune("data", "rows.jsonl.gz", "--convert", "out.jsonl")
    assert (result.code, Path("out.jsonl").read_text().count("\n")) == (0, 1), result.err


def test_existing_file_is_kept_and_other_options_are_refused() -> None:
    _convert({"messages": [Q, A]})
    before = Path("out.jsonl").read_bytes()
    again = fulltune("data", "rows.jsonl", "--convert", "out.jsonl")
    assert (again.code, "new .jsonl file" in again.err, Path("out.jsonl").read_bytes()) == (2, True, before)
    for option in ("--json", "--review", "--set=data.prompt=q"):
        other = fulltune("data", "rows.jsonl", "--convert", "new.jsonl", option)
        assert (other.code, "remove the other options" in other.err, Path("new.jsonl").exists()) == (2, True, False)
