"""What looks wrong is listed with its row, reason and remedy; a patch does what was decided, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune import data
from fulltune.audit import stage
from fulltune.audit.pretrained import JudgedLabels, RowReader
from fulltune.audit.stage import load_issues
from fulltune.data.patch import load_patch, numbered_row_hash, save_patch
from fulltune.errors import DataError, SetupError
from fulltune.inference.store import read_original_rows, row_id
from fulltune.probe.linear import NoProbe
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import Audit, LabelErrors, Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary
from tests import tiny

LIMITS = data.Limits(tiny.POSITIONS)
CLEAN = [{"text": f"{row['text']} number {at}", "label": row["label"]} for at, row in enumerate(tiny.topic_rows(40))]


def prepared(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    task: str = "text-classification",
    *,
    limits: data.Limits = LIMITS,
    **settings: Any,
) -> DataSummary:
    """The data stage over these rows, with what it needs to be audited."""
    files = {"train": str(tiny.write_jsonl(folder / "rows.jsonl", rows))}
    for split in ("eval", "test"):
        if split in settings:
            files[split] = str(tiny.write_jsonl(folder / f"{split}.jsonl", settings.pop(split)))
    recipe = Recipe.model_validate({"model": "x", "task": task, "data": {**files, **settings}})
    (folder / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    tokenizer = tiny.decoder_tokenizer() if task == "causal-lm" else tiny.encoder_tokenizer()
    return data.prepare(data.Stage(recipe, folder / "data", tokenizer, limits))


def cannot(why: str) -> Any:
    raise NoProbe(why)


def audited(
    folder: Path, summary: DataSummary, judge: Any = None, outlie: Any = None
) -> tuple[Audit, dict[str, list[RowIssue]]]:
    """The audit, and its issues by check."""
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text(encoding="utf-8"))
    reader = RowReader(recipe, None, summary, folder / "data", lambda event: None)  # type: ignore[arg-type]  # reads nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "judge_labels", lambda reader: judge() if judge else cannot("not asked"))
        patch.setattr(stage, "find_outliers", lambda reader, *of: outlie(*of) if outlie else cannot("not asked"))
        result = stage.audit_rows(reader, judge is not None or outlie is not None)
    issues: dict[str, list[RowIssue]] = {}
    for issue in load_issues(folder / "data"):
        issues.setdefault(issue.check, []).append(issue)
    return result, issues


def test_clean_rows_have_no_issues(tmp_path: Path) -> None:
    result, issues = audited(tmp_path, prepared(tmp_path, CLEAN))
    assert issues == {}
    assert result.checks == {}
    assert {"duplicate", "leak", "near leak", "conflicting labels", "broken encoding", "secret"} <= set(result.clean)
    assert sum(result.rows.values()) == len(CLEAN)


def test_each_planted_fault_is_listed_with_its_place_and_remedy(tmp_path: Path) -> None:
    pytest.importorskip("ftfy", reason="the extra audit is not installed")
    held_out = [{"text": f"a held out text about number {at}", "label": "animals"} for at in range(4)]
    held_out += [{"text": f"a held out text about sum {at}", "label": "numbers"} for at in range(4)]
    labels = sorted({row["label"] for row in CLEAN})
    held_out = [{**row, "label": labels[at % len(labels)]} for at, row in enumerate(held_out)]
    wrong = [
        {"text": "the schÃ¶ne cafÃ© in town", "label": labels[0]},
        {"text": "write to jane.miller@mail-of-jane.net for more", "label": labels[0]},
        CLEAN[3],
        held_out[0],
        {"text": CLEAN[5]["text"], "label": next(one for one in labels if one != CLEAN[5]["label"])},
    ]
    rows = [*CLEAN, *wrong, CLEAN[5]]
    result, issues = audited(tmp_path, prepared(tmp_path, rows, eval=held_out[:4], test=held_out[4:]))
    place = {check: [one.place.rpartition(":")[2] for one in them] for check, them in issues.items()}
    first = len(CLEAN) + 1
    assert place["broken encoding"] == [str(first)]
    assert issues["broken encoding"][0].remedy == Remedy(
        action="replace", column="text", value="the schöne café in town"
    )
    assert place["personal data"] == [str(first + 1)]
    assert "jane.miller" not in issues["personal data"][0].reason
    assert place["duplicate"] == [str(first + 2), str(first + 5)]
    assert all(one.row.endswith("-2") for one in issues["duplicate"])  # the second of two equal rows
    assert place["leak"] == [str(first + 3)]
    # Two of three say the same label: the third row's would be replaced.
    assert place["conflicting labels"] == [str(first + 4)]
    assert issues["conflicting labels"][0].remedy == Remedy(action="replace", column="label", value=CLEAN[5]["label"])
    assert "jane.miller" not in (tmp_path / "data" / "issues.jsonl").read_text(encoding="utf-8")
    assert result.checks["duplicate"] == 2


def test_text_nearly_that_of_a_test_row_is_a_near_leak(tmp_path: Path) -> None:
    labels = sorted({row["label"] for row in CLEAN})
    text = "could you please tell me where the parcel that I ordered last week may be at the moment"
    held_out = [
        {"text": text if at == 5 else f"a held out text {at}", "label": labels[at % len(labels)]} for at in range(8)
    ]
    rows = [*CLEAN, {"text": f"{text} now", "label": labels[0]}]
    _, issues = audited(tmp_path, prepared(tmp_path, rows, eval=held_out[:4], test=held_out[4:]))
    assert list(issues) == ["near leak"]
    assert issues["near leak"][0].text == f"{text} now"


def test_outliers_of_each_split_are_listed_the_farthest_first(tmp_path: Path) -> None:
    summary, asked = prepared(tmp_path, CLEAN), list[Any]()

    def outlie(keys: Any, counts: Any) -> Any:
        asked.append((keys, dict(counts)))
        return {"train": {2: 0.6, 5: 0.81234}, "test": {1: 0.7}}, 0.3, 4

    result, issues = audited(tmp_path, summary, outlie=outlie)
    train, test = (list(read_original_rows(tmp_path / "data" / split)) for split in ("train", "test"))
    assert [one.row for one in issues["outlier"]] == [row_id(train[5]), row_id(test[1]), row_id(train[2])]
    first = issues["outlier"][0]
    assert (first.split, first.score, first.remedy) == ("train", 0.8123, Remedy(action="drop"))
    assert "0.19" in first.reason
    assert "0.70" in first.reason
    assert "4 rows" in result.not_run["outlier"]
    [(keys, counts)] = asked
    assert counts == result.rows
    assert len(set(keys.tolist())) == len({row["text"] for row in train})


def test_outliers_that_cannot_be_told_or_were_not_asked_for_are_said(tmp_path: Path) -> None:
    summary = prepared(tmp_path, CLEAN)
    result, _ = audited(tmp_path, summary)
    assert result.not_run["outlier"] == "skipped by --no-labels"
    result, _ = audited(
        tmp_path, summary, outlie=lambda *of: cannot("too few")
    )  # looked at again: it was not asked before
    assert result.not_run["outlier"] == "too few"
    assert "outlier" not in result.clean


def test_judged_labels_are_listed_the_surest_first(tmp_path: Path) -> None:
    summary = prepared(tmp_path, CLEAN)
    margins = np.ones(summary.splits["train"].rows)
    margins[[2, 7, 9]] = -0.9, -0.99, -0.6
    about = LabelErrors.model_construct(suspects=2, planted=20)
    judged = JudgedLabels(margins, np.zeros(len(margins), int), margins < -0.8, np.isin(margins, -0.6), about)
    result, issues = audited(tmp_path, summary, lambda: (np.arange(len(margins)), judged))
    rows = list(read_original_rows(tmp_path / "data" / "train"))
    assert [one.row for one in issues["label error"]] == [row_id(rows[7]), row_id(rows[2])]
    assert [one.row for one in issues["doubtful label"]] == [row_id(rows[9])]
    assert issues["label error"][0].remedy == Remedy(action="replace", column="label", value=summary.labels[0])
    assert result.labels == about


def test_labels_that_cannot_be_judged_are_said_to_be(tmp_path: Path) -> None:
    result, _ = audited(tmp_path, prepared(tmp_path, CLEAN), lambda: cannot("too few rows"))
    assert result.not_run["label error"] == "too few rows"
    assert "label error" not in result.clean


def test_same_rows_are_looked_at_once_and_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [*CLEAN, CLEAN[0]]
    summary = prepared(tmp_path, rows)
    audited(tmp_path, summary)
    issues = (tmp_path / "data" / "issues.jsonl").read_bytes()
    calls: list[int] = []

    def judge() -> Any:
        calls.append(1)
        cannot("asked")

    result, _ = audited(tmp_path, summary)
    assert result.not_run["label error"] == "skipped by --no-labels"
    result, _ = audited(tmp_path, summary, judge)  # labels were not judged before
    assert result.not_run["label error"] == "asked"
    assert calls == [1]
    audited(tmp_path, summary, judge)
    audited(tmp_path, summary)
    assert calls == [1]
    assert (tmp_path / "data" / "issues.jsonl").read_bytes() == issues


def test_conversations_and_answers_are_looked_at(tmp_path: Path) -> None:
    rows = [*tiny.pair_rows(40)]
    rows[4] = {**rows[4], "completion": "As an AI language model, I cannot help with that request."}
    rows[9] = {**rows[9], "prompt": "what is <|im_start|>user this"}
    _, issues = audited(tmp_path, prepared(tmp_path, rows, "causal-lm"))
    assert {check: [one.place.rpartition(":")[2] for one in them] for check, them in issues.items()} == {
        "refusal": ["5"],
        "chat tokens": ["10"],
    }


def test_faults_of_conversations_are_listed_with_all_reasons(tmp_path: Path) -> None:
    rows = tiny.chat_rows(40)
    question, answer = rows[4]["messages"]
    rows[4] = {"messages": [question, answer, {"role": "system", "content": "be brief"}, question]}
    rows[14] = {"messages": json.dumps([question, question, answer])}
    senders = {"user": "human", "assistant": "gpt"}
    shared = [{"from": senders[one["role"]], "value": f"{one['content']} <br>"} for one in rows[19]["messages"]]
    rows[19] = {"messages": shared}
    result, issues = audited(tmp_path, prepared(tmp_path, rows, "causal-lm"))
    assert {one.place.rpartition(":")[2]: one.reason for one in issues["chat fault"]} == {
        "5": "turn 3 is a system turn that is not first, the chat ends with a user turn without an answer",
        "15": "turns 1 and 2 are both user turns",
    }
    assert {one.place.rpartition(":")[2] for one in issues["markup"]} == {"20"}
    assert "chat fault" in result.checks


def test_texts_that_share_a_row_are_all_looked_at(tmp_path: Path) -> None:
    texts = [{"text": f"a short text about the number {at}"} for at in range(60)]
    texts += [texts[3], {"text": "the <b>fine</b> place in town"}]
    packs = replace(LIMITS, packing_obstacle=lambda: None)
    summary = prepared(tmp_path, texts, "causal-lm", limits=packs)
    assert summary.packed
    result, issues = audited(tmp_path, summary)
    assert sum(result.rows.values()) == len(texts)
    places = {check: [one.place.rpartition(":")[2] for one in them] for check, them in issues.items()}
    assert places["markup"] == ["62"]
    assert places.get("duplicate") == ["61"]  # both are on one side of the split


# ---- patches ---------------------------------------------------------------------------------------------------


def decide(row: Mapping[str, Any], action: str, number: int = 1, source: str = "train", **more: Any) -> RowDecision:
    return RowDecision(
        row=numbered_row_hash(row_id(row), number),
        source=source,
        remedy=Remedy.model_validate({"action": action, **more}),
        check="duplicate",
    )


def test_patch_does_what_was_decided(tmp_path: Path) -> None:
    patch = tmp_path / "p.jsonl"
    other = next(row["label"] for row in CLEAN if row["label"] != CLEAN[1]["label"])
    changed = {**CLEAN[2], "text": "another text"}
    save_patch(
        patch,
        [
            decide(CLEAN[0], "drop"),
            decide(CLEAN[1], "replace", column="label", value=other),
            decide(CLEAN[2], "replace", column="text", value="another text"),
            decide(changed, "replace", column="label", value=other),  # decided about when the text was new already
            decide(CLEAN[3], "keep"),
        ],
    )
    summary = prepared(tmp_path, CLEAN, patch=str(patch))
    rows = [row for split in ("train", "eval", "test") for row in read_original_rows(tmp_path / "data" / split)]
    labels = {row["text"]: row["label"] for row in rows}
    assert len(rows) == len(CLEAN) - 1
    assert CLEAN[0]["text"] not in labels
    assert labels[CLEAN[1]["text"]] == labels["another text"] == other
    assert labels[CLEAN[3]["text"]] == CLEAN[3]["label"]
    # What is dropped is listed.
    assert summary.dropped == {"patch": 1}
    [line] = (tmp_path / "data" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["row"] == CLEAN[0]
    assert json.loads(line)["reason"] == "duplicate (data.patch)"


def test_what_was_looked_at_and_kept_is_not_listed_again(tmp_path: Path) -> None:
    rows = [*CLEAN, CLEAN[0], CLEAN[1]]
    _, issues = audited(tmp_path, prepared(tmp_path, rows))
    assert len(issues["duplicate"]) == 2
    save_patch(tmp_path / "p.jsonl", [decide(CLEAN[0], "keep", 2)])
    _, issues = audited(tmp_path, prepared(tmp_path, rows, patch=str(tmp_path / "p.jsonl")))
    assert [one.row for one in issues["duplicate"]] == [numbered_row_hash(row_id(CLEAN[1]), 2)]


def test_patch_changes_what_is_prepared_only_by_its_content(tmp_path: Path) -> None:
    save_patch(tmp_path / "one.jsonl", [decide(CLEAN[0], "drop")])
    save_patch(tmp_path / "two.jsonl", [decide(CLEAN[0], "drop")])
    save_patch(tmp_path / "three.jsonl", [decide(CLEAN[1], "drop")])
    prints = [
        prepared(tmp_path / name, CLEAN, patch=str(tmp_path / f"{name}.jsonl")).fingerprint
        for name in ("one", "two", "three")
        if not (tmp_path / name).mkdir()
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_text("no json\n"), "p.jsonl:1: not a decision"),
        (lambda path: path.write_text('{"row": "1"}\n'), "p.jsonl:1: not a decision"),
        (lambda path: save_patch(path, [decide(CLEAN[0], "replace", value="x")]), "p.jsonl:1: 'replace' needs"),
        (lambda path: save_patch(path, [decide(CLEAN[0], "replace", column="label")]), "p.jsonl:1: 'replace' needs"),
        (lambda path: save_patch(path, [decide(CLEAN[0], "replace", column="lable", value="x")]), "column 'lable'"),
        (lambda path: path.write_text("no\n" * 9), "9 invalid lines"),
        (lambda path: save_patch(path, [decide({"text": "of another file", "label": "x"}, "drop")]), "1 row of the 1"),
    ],
)
def test_patch_that_does_not_fit_is_refused(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, CLEAN, patch=str(tmp_path / "p.jsonl"))
    assert not (tmp_path / "data").exists()


def test_last_decision_about_a_row_counts(tmp_path: Path) -> None:
    first = decide(CLEAN[0], "drop")
    save_patch(tmp_path / "p.jsonl", [first, decide(CLEAN[0], "keep")])
    assert load_patch(tmp_path / "p.jsonl")[first.key].remedy.action == "keep"


def test_of_equal_rows_the_one_that_was_decided_about_is_dropped(tmp_path: Path) -> None:
    save_patch(tmp_path / "p.jsonl", [decide(CLEAN[0], "drop", 2)])
    prepared(tmp_path, [*CLEAN, CLEAN[0], CLEAN[0]], patch=str(tmp_path / "p.jsonl"))
    [line] = (tmp_path / "data" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["place"].endswith(f":{len(CLEAN) + 1}")
    rows = [row for split in ("train", "eval", "test") for row in read_original_rows(tmp_path / "data" / split)]
    assert sum(row["text"] == CLEAN[0]["text"] for row in rows) == 2


def test_what_is_decided_about_a_train_row_leaves_the_test_file_alone(tmp_path: Path) -> None:
    held_out = [*CLEAN[:3], *CLEAN[20:23]]
    save_patch(tmp_path / "p.jsonl", [decide(CLEAN[0], "drop")])
    summary = prepared(tmp_path, CLEAN, test=held_out, patch=str(tmp_path / "p.jsonl"))
    assert summary.splits["test"].rows == len(held_out)
    assert summary.dropped == {"patch": 1}
    save_patch(tmp_path / "p.jsonl", [decide(CLEAN[0], "drop", source="test")])
    summary = prepared(tmp_path, CLEAN, test=held_out, patch=str(tmp_path / "p.jsonl"))
    assert summary.splits["test"].rows == len(held_out) - 1


def test_rows_with_secrets_are_no_examples_and_are_masked_where_dropped_ones_are_shown(tmp_path: Path) -> None:
    token = "ghp_" + "a8Xk2Lm9Qw" * 4
    rows = [{"text": f"my key {token[:40]} is new", "label": CLEAN[0]["label"]}, *CLEAN]
    summary = prepared(tmp_path, rows)
    assert len(summary.previews) == 5
    assert "key" not in summary.model_dump_json()


def test_a_broken_list_of_issues_is_said_and_a_missing_one_made_anew(tmp_path: Path) -> None:
    summary = prepared(tmp_path, [*CLEAN, CLEAN[0]])
    audited(tmp_path, summary)
    (tmp_path / "data" / "issues.jsonl").write_text('{"bad', encoding="utf-8")
    with pytest.raises(SetupError, match="cannot be read; delete it"):
        load_issues(tmp_path / "data")
    (tmp_path / "data" / "issues.jsonl").unlink()
    _, issues = audited(tmp_path, summary)
    assert list(issues) == ["duplicate"]


def test_rows_of_classes_that_may_be_one_are_proposed_the_most_frequent_name(tmp_path: Path) -> None:
    rows = [{**row, "label": row["label"].title() if at % 7 < 2 else row["label"]} for at, row in enumerate(CLEAN)]
    other = [str(at) for at, (row, old) in enumerate(zip(rows, CLEAN, strict=True), start=1) if row != old]
    summary = prepared(tmp_path, rows)
    assert any("may be the same" in note and '"class names"' in note for note in summary.notes)
    _, issues = audited(tmp_path, summary)
    assert sorted(one.place.rpartition(":")[2] for one in issues["class names"]) == sorted(other)
    assert {one.remedy.value for one in issues["class names"]} == {row["label"] for row in CLEAN}
    save_patch(tmp_path / "p.jsonl", [one.decision(one.remedy) for one in issues["class names"]])
    (tmp_path / "again").mkdir()
    joined = prepared(tmp_path / "again", rows, patch=str(tmp_path / "p.jsonl"))
    assert set(joined.labels) == {row["label"] for row in CLEAN}
    assert audited(tmp_path / "again", joined)[1] == {}


def test_reason_of_a_dropped_row_quotes_no_part_of_a_secret(tmp_path: Path) -> None:
    key = "gh" + "p_" + "qX7vR2mLp9Zt4Wb8Ks1Yd6Hn3Jc5Gf0AeuT2"
    rows: list[dict[str, Any]] = [{"text": f"a text {at}", "label": ["a", "b"][: at % 2 + 1]} for at in range(60)]
    rows[7]["label"] = f"[half of a list in a wrong column, with {key}"  # 60 characters of it are quoted
    prepared(tmp_path, rows)
    [dropped] = [json.loads(line) for line in (tmp_path / "data" / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert "half of a list" in dropped["reason"]
    assert "[SECRET]" in dropped["row"]["label"]
    assert key[:12] not in json.dumps(dropped)


def test_rows_are_not_read_again_where_none_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = prepared(tmp_path, [*CLEAN, {"text": "left <br> over", "label": CLEAN[0]["label"]}])
    monkeypatch.setattr("fulltune.audit.rows.identify_rows", lambda *given: pytest.fail("reads the rows again"))
    _, issues = audited(tmp_path, summary)
    assert [one.row.count("-") for one in issues["markup"]] == [0]
