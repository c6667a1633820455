"""What `fulltune push` shows, sends and refuses, against a Hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from fulltune import push
from tests.contract.command import Result, fulltune
from tests.unit.push.conftest import MODEL
from tests.unit.push.hub import Hub, Repository

NAME = "acme/cooking"


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in MODEL}


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2, result
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


# ---- without --yes -----------------------------------------------------------------------------------------------


def test_without_yes_shows_everything_and_asks_nobody(hub: Hub, run: Path) -> None:
    result = fulltune("push", run, NAME)
    assert (result.code, hub.requests) == (0, [])
    shown = " ".join(result.out.split())
    for word in ("acme/cooking (private), main branch", "cooking: A tiny model.", "8 files, ", "in one commit"):
        assert word in shown
    for path in (run / "models" / "full" / name for name in MODEL):
        assert path.name in shown
    for name in ("data/", "scores/", "attempts/", "recipe.json", "models/full/rows.csv", "models/full/optimizer.pt"):
        assert name in shown.partition("not sent")[2].partition("8 files")[0]
    assert "nothing was sent" in shown
    assert "PROBLEM" not in shown


def test_record_has_sizes_checks_and_no_address(hub: Hub, run: Path) -> None:
    record = json.loads(fulltune("push", run, NAME, "--json", "--pr", "--public").out)
    assert hub.requests == []
    folder = run / "models" / "full"
    assert record["files"] == {name: (folder / name).stat().st_size for name in MODEL}
    secret = ("notes.txt", "optimizer.pt", "rows.csv", "training_args.bin")
    parts = ["attempts/", "data/", *(f"models/full/{name}" for name in secret), "recipe.json", "scores/"]
    assert record["left_out"] == parts
    assert all(check["passed"] for check in record["checks"])
    assert record["url"] is None


# ---- what arrives ------------------------------------------------------------------------------------------------


def test_files_arrive_private_and_equal_in_one_commit(hub: Hub, run: Path) -> None:
    result = fulltune("push", run, NAME, "--yes")
    assert result.code == 0, result.err
    assert hub.files(NAME) == files_of(run / "models" / "full")
    assert (hub.repositories[NAME].private, hub.repositories[NAME].commits) == (True, 1)
    assert f"sent: {hub.address}/{NAME}/commit/bbbb" in result.out
    assert hub.tokens == {"Bearer hf_of_a_test", None}  # None: large files go to an address without it


def test_model_folder_is_sent_as_the_run_is(hub: Hub, run: Path) -> None:
    assert json.loads(fulltune("push", run / "models" / "full", NAME, "--yes", "--json").out)["url"]
    assert hub.files(NAME) == files_of(run / "models" / "full")


def test_public_only_if_asked(hub: Hub, run: Path) -> None:
    assert fulltune("push", run, NAME, "--yes", "--public").code == 0
    assert not hub.repositories[NAME].private


def test_branch_takes_the_files_and_main_does_not(hub: Hub, run: Path) -> None:
    assert fulltune("push", run, NAME, "--yes", "--branch", "v2").code == 0
    assert hub.files(NAME, "v2") == files_of(run / "models" / "full")
    assert hub.files(NAME) == {}


def test_pull_request_leaves_main_as_it_is(hub: Hub, run: Path) -> None:
    hub.repositories[NAME] = Repository(private=True, branches={"main": {"other.bin": b"1"}})
    result = fulltune("push", run, NAME, "--yes", "--pr")
    assert f"sent: {hub.address}/{NAME}/discussions/1" in result.out
    assert hub.files(NAME, "refs/pr/1") == {"other.bin": b"1", **files_of(run / "models" / "full")}
    assert hub.files(NAME) == {"other.bin": b"1"}


def test_next_version_replaces_the_last(hub: Hub, run: Path) -> None:
    assert fulltune("push", run, NAME, "--yes").code == 0
    (run / "models" / "full" / "README.md").write_text("---\ntags:\n- fulltune\n---\n\n# second\n", encoding="utf-8")
    assert fulltune("push", run, NAME, "--yes").code == 0
    assert hub.files(NAME) == files_of(run / "models" / "full")
    assert hub.repositories[NAME].commits == 2


def test_export_is_sent_with_its_verification(hub: Hub, tmp_path: Path) -> None:
    sent = {"model.gguf", "Modelfile", "verify.json", "README.md", "fulltune.json"}
    for name in (*sent, "whole.gguf.part"):
        (tmp_path / name).write_text('{"checks": []}', encoding="utf-8")
    assert fulltune("push", tmp_path, NAME, "--yes").code == 0
    assert set(hub.files(NAME)) == sent


# ---- which files -------------------------------------------------------------------------------------------------


def test_links_out_of_the_folder_are_not_followed(run: Path, tmp_path: Path) -> None:
    folder = run / "models" / "full"
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    (folder / "vocab.json").symlink_to(tmp_path / "secret.json")
    (folder / "merges.txt").symlink_to("missing")
    (folder / "LICENSE").symlink_to("notes.txt")  # inside the folder
    assert set(push.choose_files(folder)) == {*MODEL, "LICENSE"}


def test_modules_of_sentence_transformers_are_files_of_the_model(tmp_path: Path) -> None:
    sent = {"modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    for name in (*sent, "1_Pooling/rows.csv", "checkpoint-5/model.safetensors", "train.json", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert set(push.choose_files(tmp_path)) == sent


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cooking", "a/b/c", "acme/", "acme/co--oking", "acme/my model", "acme/x.git", "../x"])
def test_name_is_checked_before_anything(hub: Hub, run: Path, name: str) -> None:
    assert_refused(fulltune("push", run, name, "--yes"), name, "OWNER/NAME")
    assert hub.requests == []


def test_branch_and_pull_request_exclude_each_other(hub: Hub, run: Path) -> None:
    assert_refused(fulltune("push", run, NAME, "--yes", "--pr", "--branch", "v2"), "--branch", "--pr")


def test_run_without_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    assert_refused(fulltune("push", tmp_path, NAME, "--yes"), "no finished model")


@pytest.mark.parametrize(
    "there",
    [
        {"model.safetensors": b"1", "config.json": b"{}", "README.md": b"x"},  # the same names, but not ours
        {"fulltune.json": b"{}", "model.onnx": b"1"},
    ],
)
def test_files_of_others_are_not_replaced(hub: Hub, run: Path, there: dict[str, bytes]) -> None:
    hub.repositories[NAME] = Repository(private=True, branches={"main": there})
    result = fulltune("push", run, NAME, "--yes")
    assert_refused(result, NAME, sorted(there)[-1], "--branch NAME", "--pr")
    assert hub.files(NAME) == there
    assert fulltune("push", run, NAME, "--yes", "--branch", "v2").code == 0


def test_repository_with_only_a_card_is_filled(hub: Hub, run: Path) -> None:
    hub.repositories[NAME] = Repository(private=True, branches={"main": {".gitattributes": b"", "README.md": b"soon"}})
    assert fulltune("push", run, NAME, "--yes").code == 0
    assert hub.files(NAME) == files_of(run / "models" / "full")


@pytest.mark.parametrize("is_private", [True, False])
def test_visibility_of_the_repository_must_be_meant(hub: Hub, run: Path, is_private: bool) -> None:
    hub.repositories[NAME] = Repository(private=is_private)
    result = fulltune("push", run, NAME, "--yes", *["--public"] * is_private)
    assert_refused(result, "is private, so omit --public" if is_private else "is public, so confirm with --public")
    assert hub.files(NAME) == {}


@pytest.mark.parametrize(
    ("pattern", "status", "message"),
    [
        ("POST /api/repos/create", 401, "Invalid username or password."),
        ("POST /api/repos/create", 403, "You don't have the rights to create a model under this namespace"),
        ("POST /api/repos/create", 404, "There is no such organization"),
        ("commit", 403, "Forbidden: pass create_pr=1"),
        ("lfs", 507, "Storage limit reached"),
    ],
)
def test_refusal_of_the_hub_is_repeated(hub: Hub, run: Path, pattern: str, status: int, message: str) -> None:
    hub.refuses[pattern] = (status, message)
    assert_refused(fulltune("push", run, NAME, "--yes"), NAME, message, "'hf auth login'")
    assert not hub.repositories or hub.files(NAME) == {}


def test_connection_that_breaks_in_a_file_leaves_nothing(hub: Hub, run: Path) -> None:
    hub.cuts = True
    result = fulltune("push", run, NAME, "--yes")
    assert_refused(result, NAME, "one commit of all files")
    assert "Error while uploading" not in result.err  # of the broken connection, which says why
    assert any(call.startswith("PUT") for call in hub.requests)
    assert hub.files(NAME) == {}
    hub.cuts = False
    assert fulltune("push", run, NAME, "--yes").code == 0
    assert hub.files(NAME) == files_of(run / "models" / "full")


def test_hub_that_nobody_answers_for_is_named(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert_refused(fulltune("push", run, NAME, "--yes"), NAME, "onnect")


def test_offline_mode_is_named(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(fulltune("push", run, NAME, "--yes"), NAME, "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_model_that_nobody_could_load_is_shown_and_not_sent(hub: Hub, run: Path) -> None:
    weights = run / "models" / "full" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    shutil.copy(weights, run / "models" / "full" / "pytorch_model.bin")
    for options in ((), ("--yes",)):
        assert_refused(fulltune("push", run, NAME, *options), "model.safetensors is truncated or damaged")
    assert hub.requests == []


def test_card_names_the_repository_to_load(hub: Hub, run: Path) -> None:
    card = run / "models" / "full" / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + 'AutoModel.from_pretrained("full")\n', encoding="utf-8")
    assert fulltune("push", run, NAME, "--yes").code == 0
    assert f'AutoModel.from_pretrained("{NAME}")'.encode() in hub.files(NAME)["README.md"]
    assert '"full"' in card.read_text(encoding="utf-8")


def test_warning_is_shown_and_does_not_stop_the_files(hub: Hub, run: Path) -> None:
    (run / "models" / "full" / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    result = fulltune("push", run, NAME, "--yes")
    assert "PROBLEM end tokens" in " ".join(result.out.split())
    assert result.code == 0
    assert hub.files(NAME) == files_of(run / "models" / "full")
