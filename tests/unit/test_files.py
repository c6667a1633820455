"""A file is whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fulltune import files
from fulltune.errors import SetupError
from fulltune.records.base import Record


def test_text_and_json_are_written_into_folders_that_are_made(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "ä\n")
    files.write_json(tmp_path / "new" / "b.json", {"a": 1})
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ä\n".encode()
    assert (tmp_path / "new" / "b.json").read_text(encoding="utf-8") == '{\n  "a": 1\n}\n'
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.json"]


def test_writing_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="full"), files.replace_atomically(path) as part:  # noqa: PT012  # what fails in the block
        part.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_what_is_private_is_its_owners_alone_from_the_first_byte_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "anyone")
    assert path.stat().st_mode & 0o077
    with files.replace_atomically(path, private=True) as part:
        assert part.stat().st_mode & 0o777 == 0o600
        part.write_text("rows")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "rows"


def test_record_that_another_user_keeps_is_named_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", forbidden)  # root may read anything
    with pytest.raises(SetupError) as raised:
        Record.load(tmp_path / "plan.json")
    assert raised.value.problems == (
        f"{tmp_path}/plan.json: permission denied, because only its owner may read it; run the command as "
        "the owner, or make the file readable (chmod)",
    )
