"""The trial of a disk leaves nothing behind, and says what is not a disk or too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import SetupError
from fulltune.stream import trial
from fulltune.stream.store import PIECE


def test_speed_is_measured_where_the_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TRIAL_BYTES", 2 * PIECE)
    read, written = trial.measure_disk(tmp_path / "missing" / "state", 0)
    assert min(read, written) > 0
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_and_folder_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `plan` shows an error that is not `DoesNotFitError` before it compares placements.
    with pytest.raises(SetupError, match=r"the training state needs .* set train\.stream\.disk"):
        trial.measure_disk(tmp_path, 10**18)
    file = tmp_path / "file"
    file.touch()
    for where in (file, file / "below" / "it"):
        with pytest.raises(SetupError, match=r"is no folder that can be written; set train\.stream\.disk"):
            trial.measure_disk(where, 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(SetupError, match="is no folder that can be written"):
            trial.measure_disk(tmp_path / "missing", 0)

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(SetupError, match="cannot be measured"):
        trial.measure_disk(tmp_path, 0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder in memory")  # that is the point
def test_folder_in_memory_is_refused() -> None:
    with pytest.raises(SetupError, match="is in memory"):
        trial.measure_disk(Path("/dev/shm/state"), 0)
