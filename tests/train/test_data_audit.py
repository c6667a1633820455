"""`fulltune data` from the command line: the audit with a model, its page, a proof, a patch, and the patched run."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path

import pytest

from fulltune.audit.texts.private import passes_luhn, passes_mod_97
from fulltune.files import SEAL
from fulltune.records.audit import Audit, Proofs
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs


def noisy_rows(count: int, wrong: int) -> list[dict[str, str]]:
    """Rows that a tiny model's states tell apart, the first ones with a wrong label."""
    drawn, words = random.Random(0), {"animals": ["cat", "dog", "bird"], "numbers": ["one", "two", "three"]}
    rows = []
    for at in range(count):
        label = ("animals", "numbers")[at % 2]
        text = " ".join(drawn.choices(words[label], k=6)) + f" {at}"
        other = ("numbers", "animals")[at % 2]
        rows.append({"text": text, "label": other if at < wrong else label})
    return rows


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    rows = noisy_rows(600, 50)
    rows[200] = {**rows[200], "text": "write to jane.miller@mail-of-jane.net <b>now</b>"}
    data = tiny.write_csv(folder / "rows.csv", rows)
    tiny.write_recipe(folder / "recipe.yaml", tiny_encoder, data, data={"eval_fraction": 0.2}, train={"max_steps": 50})
    result = fulltune("data", str(folder / "recipe.yaml"), "--run-folder", str(folder / "run"), "--prove")
    assert result.code == 0, result.err
    (folder / "out.txt").write_text(result.out, encoding="utf-8")
    return folder


def test_wrong_labels_are_found_and_said_with_how_far_to_trust_it(audited: Path) -> None:
    found = Audit.load(audited / "run" / "data" / "audit.json")
    assert found.labels is not None
    assert found.labels.planted >= 100
    places = {int(one.place.rpartition(":")[2]) - 2 for one in found.examples_of("label error")}
    assert len(places) == 10
    assert len([place for place in places if place < 50]) >= 8
    out = " ".join((audited / "out.txt").read_text(encoding="utf-8").split())
    assert "given a wrong label on purpose" in out
    assert "personal data" in out
    assert "jane.miller" not in out


def test_page_has_every_part_and_masks_what_is_private(audited: Path) -> None:
    page = (audited / "run" / "data.html").read_text(encoding="utf-8")
    text = (audited / "run" / "data.md").read_text(encoding="utf-8")
    for part in ("Findings", "Would cleaning help?", "Label error", "Personal data", "Markup", "What to do next"):
        assert part in page
        assert part in text
    assert "&lt;b&gt;now" in page
    assert "<b>now" not in page


def test_proof_compares_each_step_on_the_same_eval_rows(audited: Path) -> None:
    proofs = Proofs.load(audited / "run" / "data" / "proofs.json")
    by_step = {(one.check, one.action): one for one in proofs.proofs}
    assert {("label error", "drop"), ("label error", "replace"), ("personal data", "drop")} <= set(by_step)
    for one in proofs.proofs:
        assert one.low <= one.difference <= one.high
    assert by_step["personal data", "drop"].rows == 1
    assert proofs.verdict(by_step["personal data", "drop"]) == "no difference found"


def test_patch_of_a_check_is_applied_by_the_recipe(audited: Path) -> None:
    recipe, patch = audited / "recipe.yaml", audited / "recipe.patch.jsonl"
    result = fulltune("data", str(recipe), "--run-folder", str(audited / "run"), "--accept", "label error")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in patch.read_text(encoding="utf-8").splitlines()]
    assert all(line["remedy"]["action"] == "replace" for line in lines)
    found = Audit.load(audited / "run" / "data" / "audit.json")
    assert found.labels is not None
    assert len(lines) == found.labels.suspects
    setting = f"--set=data.patch={patch}"
    result = fulltune("data", str(recipe), "--run-folder", str(audited / "again"), setting)
    assert result.code == 0, result.err
    after = Audit.load(audited / "again" / "data" / "audit.json")
    assert after.labels is not None
    assert after.labels.suspects < found.labels.suspects / 2


def test_without_labels_nothing_is_loaded_and_a_proof_of_other_tasks_is_refused(tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pair_rows(40))
    model = tiny.save_model(tmp_path / "model", "llama")
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, rows, task="causal-lm")
    result = fulltune("data", str(recipe), "--run-folder", str(tmp_path / "run"))
    assert result.code == 0, result.err
    assert Audit.load(tmp_path / "run" / "data" / "audit.json").labels is None
    result = fulltune("data", str(recipe), "--run-folder", str(tmp_path / "run"), "--prove")
    assert result.code != 0
    assert "--prove" in result.err
    assert "Traceback" not in result.err


def test_proof_by_too_few_eval_rows_is_refused_before_the_audit(tiny_encoder: Path, tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", noisy_rows(300, 0))
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data)
    result = fulltune("data", str(recipe), "--run-folder", str(tmp_path / "run"), "--prove")
    assert result.code == 2
    assert "--prove: 30 eval rows are too few, expected at least 50" in " ".join(result.err.split())
    assert "data.eval_fraction" in result.err
    assert (tmp_path / "run" / "data" / "summary.json").exists()
    assert not (tmp_path / "run" / "data" / "audit.json").exists()
    enough = fulltune("data", str(recipe), "--set=data.eval_fraction=0.21", "--no-labels", "--prove")
    assert enough.code == 0, enough.err


@pytest.mark.long
def test_trainings_compare_each_step_and_further_seeds_take_only_further_runs(audited: Path) -> None:
    recipe, run = str(audited / "recipe.yaml"), audited / "run"
    asked = ["data", recipe, "--run-folder", str(run), "--check", "label error", "--trainings"]
    with runs.in_this_process():
        result = fulltune(*asked, "2")
    assert result.code == 0, result.err
    assert "training 6 of 6: label error" in " ".join(result.err.split())
    proofs = Proofs.load(run / "data" / "trained_proofs.json")
    assert (proofs.source, proofs.metric, proofs.repetitions) == ("trainings", "accuracy", 2)
    assert {(one.check, one.action) for one in proofs.proofs} == {("label error", "drop"), ("label error", "replace")}
    assert all(one.low <= one.difference <= one.high for one in proofs.proofs)
    assert "Measured with trainings" in (run / "data.md").read_text(encoding="utf-8")
    kept = {path: path.stat().st_mtime_ns for path in (run / "cleaning").glob("*.npz")}
    assert len(kept) == 6
    assert not [path for path in (run / "cleaning").glob("*-[01]") if path.is_dir()]
    with runs.in_this_process():
        result = fulltune(*asked, "3")
    assert result.code == 0, result.err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list((run / "cleaning").glob("*.npz"))) == 9


def test_rows_of_the_highest_loss_are_listed_by_the_trained_model(tmp_path: Path, tiny_encoder: Path) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", noisy_rows(160, 12))
    tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data, train={"num_train_epochs": 2})
    recipe, run = str(tmp_path / "recipe.yaml"), tmp_path / "run"
    result = fulltune("data", recipe, "--run-folder", str(run), "--no-labels")
    assert result.code == 0, result.err
    for given, said in ((recipe, "give a run folder"), (str(run), "fulltune run")):
        result = fulltune("data", given, "--losses", "--no-labels")
        assert result.code != 0
        assert said in result.err
        assert "Traceback" not in result.err
    with runs.in_this_process():
        result = fulltune("train", recipe, "--run-folder", str(run))
    assert result.code == 0, result.err
    result = fulltune("data", str(run), "--losses", "--no-labels")
    assert result.code == 0, result.err
    assert "high loss" in result.out
    losses = [json.loads(line) for line in (run / "data" / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    found = Audit.load(run / "data" / "audit.json")
    assert len(losses) == found.rows["train"] + found.rows["eval"]
    assert len({(one["split"], one["row"]) for one in losses}) == len(losses)
    issues = [json.loads(line) for line in (run / "data" / "issues.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = [one for one in issues if one["check"] == "high loss"]
    for split in ("train", "eval"):
        of_split = sorted((one["loss"] for one in losses if one["split"] == split), reverse=True)
        scores = [one["score"] for one in listed if one["split"] == split]
        assert scores == of_split[: -(-len(of_split) // 10)]
    train = [one for one in listed if one["split"] == "train"]
    wrong = [one for one in train if int(one["place"].rpartition(":")[2]) - 2 < 12]
    assert len(wrong) >= len(train) // 2
    assert "the model predicts" in train[0]["reason"]
    assert "memorised" in (run / "data.md").read_text(encoding="utf-8")
    again = (run / "data" / "issues.jsonl").read_bytes()
    result = fulltune("data", str(run), "--losses", "--no-labels")
    assert result.code == 0, result.err
    assert (run / "data" / "issues.jsonl").read_bytes() == again
    result = fulltune("data", str(run), "--accept", "high loss")
    assert "'high loss' has no remedy" in result.err


def private_texts() -> dict[str, tuple[str, str]]:
    """By kind what must stand nowhere, and a text with it; put together here, so that no file holds a key."""
    drawn = random.Random(1)
    letters = "".join(chr(65 + at) + chr(97 + at) for at in range(26)) + "23456789"

    def some(count: int, of: str = letters) -> str:
        return "".join(drawn.choices(of, k=count))

    def encoded(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    def card() -> str:
        start = "453" + some(12, "23456789")
        return start + next(one for one in "0123456789" if passes_luhn(start + one))

    def account() -> str:
        number = some(18, "23456789")
        return next(f"DE{at:02}{number}" for at in range(2, 99) if passes_mod_97(f"DE{at:02}{number}"))

    block = f"{some(64)}\n{some(64)}\n{some(40)}"
    token = f"{encoded({'alg': 'HS256'})}.{encoded({'sub': some(12)})}.{some(43)}"
    kinds = {
        "AWS id": ("AK" + "IA" + some(16, "ABCDEFGHJKLMNP234567"), "{}"),
        "AWS secret": (some(40), "aws_secret_access_" + "key = {}"),
        "GitHub": ("gh" + "p_" + some(36), "{}"),
        "Stripe": ("sk_" + "live_" + some(24), "{}"),
        "OpenAI": ("sk" + "-proj-A2" + some(46), "{}"),
        "Slack": ("xox" + f"b-{some(12, '23456789')}-{some(24)}", "{}"),
        "Google": ("AI" + "za" + some(35), "{}"),
        "private key": (block, "-----BEGIN RSA PRIVATE" + " KEY-----\n{}\n-----END RSA PRIVATE" + " KEY-----"),
        "address": ("x7" + some(14), "postgres://app:{}@db.mail-of-jane.net/shop"),
        "JSON web token": (token, "{}"),
        "bearer": ("a2" + some(38), "Authorization: Bearer {}"),
        "e-mail": (f"jane.{some(8)}@mail-of-jane.net", "{}"),
        "card": (card(), "{}"),
        "IBAN": (account(), "{}"),
        "phone": (f"+49 30 {some(8, '23456789')}", "{}"),
    }
    return {
        kind: (value, f"my line {some(5)} is {around.format(value)} thanks") for kind, (value, around) in kinds.items()
    }


FAULTS = (
    "{} <b>bold</b>",
    "the cafÃ© {}",
    "<p>cafÃ© {} nobody\u200b sees</p>",
    "{0} {0}",
    "as an AI language model I cannot {} help",
    "{} dear {{name}} <|im_start|>",
)


@pytest.mark.slow
def test_what_is_private_stands_in_no_file_of_an_audit_but_the_rows(tiny_encoder: Path, tmp_path: Path) -> None:
    found, rows = private_texts(), noisy_rows(240, 20)
    for at, (_, text) in enumerate(found.values()):
        said = [fault.format(text) for fault in FAULTS]
        said += [said[0], f"{said[0]} now", text[: len(text) // 2] + "\u200b" + text[len(text) // 2 :] + " split"]
        rows += [{"text": one, "label": ("animals", "numbers")[(at + place) % 2]} for place, one in enumerate(said)]
    rows += [{"text": text, "label": ""} for _, text in found.values()][:8]  # is dropped, and listed
    data = tiny.write_csv(tmp_path / "rows.csv", rows)
    recipe, run = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data), tmp_path / "run"
    asked = ["data", str(recipe), "--run-folder", str(run)]
    said = []
    repetition = ["--accept", "repetition"]
    for more in ([], ["--accept", "markup", "--accept", "broken encoding"], ["--review"], repetition, repetition):
        result = fulltune(*asked, *more)
        assert result.code == 0, result.err
        said += [result.out, result.err]
    counts = [
        re.search(r"(\d+) new decisions?; in .*: (\d+) decided, (\d+) open", out) for out in said[2::4] + said[8:9]
    ]
    [accepted, more, none] = [tuple(map(int, one.groups())) for one in counts if one]
    assert accepted[0] == accepted[1] > 0 == accepted[2]
    assert more[1] - accepted[1] == more[0] > 0 < more[2]
    assert none == (0, more[1], more[2])
    files = [path for path in run.rglob("*") if path.is_file() and path.suffix not in (".arrow", ".npy")]
    files.append(tmp_path / "recipe.patch.jsonl")
    texts = {path.name: path.read_text(encoding="utf-8") for path in files} | {"terminal": " ".join(said)}
    assert {"data.html", "data.md", "issues.jsonl", "audit.json", "dropped.jsonl", "summary.json"} <= texts.keys()
    shown = [
        (kind, name)
        for kind, (value, _) in found.items()
        for name, text in texts.items()
        if value[len(value) // 4 : -len(value) // 4] in text.replace("\\n", "\n").replace("\u200b", "")
    ]
    assert shown == []
    assert Audit.load(run / "data" / "audit.json").checks.keys() >= {
        *("secret", "personal data", "phone number", "markup", "broken encoding", "control characters", "near leak"),
        *("repetition", "placeholder", "chat tokens"),
    }
    # What was accepted is applied: the repaired text, with what is private masked.
    patched = fulltune("data", str(recipe), "--run-folder", str(tmp_path / "again"), f"--set=data.patch={files[-1]}")
    assert patched.code == 0, patched.err
    before, after = (Audit.load(folder / "data" / "audit.json").checks for folder in (run, tmp_path / "again"))
    assert after["markup"] < before["markup"] / 2
    assert after["secret"] < before["secret"]
    private = [run / "data.html", run / "data.md", files[-1], *(run / "data").rglob("*.json*"), *run.rglob("*.arrow")]
    assert {path.name for path in private if path.stat().st_mode & 0o077} <= {SEAL}
