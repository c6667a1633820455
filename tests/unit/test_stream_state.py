"""A training state on disk: what is written comes back, whenever the process ends."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from fulltune.errors import SetupError
from fulltune.stream import state as module
from fulltune.stream import store
from fulltune.stream.layout import SectionLayout, TensorLayout
from fulltune.stream.state import DiskState, exists

FULL = {name: SectionLayout(torch.float32) for name in ("weights", "exp_avg", "exp_avg_sq")}
SMALL = {
    "weights": SectionLayout(torch.bfloat16),
    "exp_avg": SectionLayout(torch.int8, multiple=128),
    "exp_avg_scale": SectionLayout(torch.float32, per=128, multiple=128),
}
BLOCK = (("q", (64, 48)), ("norm", (48,)))
UNITS: list[list[TensorLayout]] = [
    [TensorLayout("embedding", (100, 48), FULL)],
    *([TensorLayout(f"{block}.{name}", shape, FULL) for name, shape in BLOCK] for block in range(3)),
    [],
]
IDENTITY = {"model": "a", "recipe": "b"}


def make(folder: Path, units: Sequence[Sequence[TensorLayout]] = UNITS, host_bytes: int = 0) -> DiskState:
    """A new state of random weights."""
    state = DiskState(folder, units, gradients=torch.float32, identity=IDENTITY, host_bytes=host_bytes, create=True)
    torch.manual_seed(0)
    for number, unit in enumerate(units):
        state.write(number, {one.name: {"weights": torch.randn(one.shape)} for one in unit})
    return state


def reopen(folder: Path, host_bytes: int = 0) -> DiskState:
    return DiskState(folder, UNITS, gradients=torch.float32, identity=IDENTITY, host_bytes=host_bytes)


def park_all(state: DiskState, step: int) -> None:
    for number in reversed(range(len(UNITS))):
        for gradient in state.gradients(number).values():
            gradient.fill_(step / 7).add_(torch.arange(gradient.numel()).view(gradient.shape), alpha=0.01)
        state.park(number)


def descend(name: str, begin: int, tensors: dict[str, Tensor]) -> None:
    """An update whose result shows if it is made twice, or of another gradient."""
    tensors["exp_avg"].mul_(0.9).add_(tensors["gradient"])
    tensors["exp_avg_sq"].add_(tensors["gradient"].square())
    tensors["weights"].sub_(tensors["exp_avg"] * 0.1)


def train(state: DiskState, steps: int) -> None:
    """Go on to a step, as a run does after it was killed; two units are needed again before an update ends."""
    if state.journal.pending is not None:
        state.update(descend)
        state.finish()
    done = state.journal.finished
    for step in range(int(done["step"]) + 1 if done else 1, steps + 1):  # type: ignore[call-overload]  # JSON
        park_all(state, step)
        state.begin({"step": step})
        state.update(descend)
        for number in (0, 2):
            state.weights(number)
            state.release(number)
        state.finish()


def content(state: DiskState) -> list[Tensor]:
    return [value for unit in UNITS for one in unit for value in state.read(one.name).values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_sections_of_all_formats_come_back_after_slicing_and_padding(tmp_path: Path) -> None:
    length = 10 * 2**20 + 130  # two slices, the last not a whole group
    layout = TensorLayout("w", (2, length // 2), SMALL)
    state = DiskState(tmp_path, [[layout]], gradients=torch.bfloat16, identity={}, create=True)
    weights = torch.arange(length, dtype=torch.int32).to(torch.bfloat16).view(layout.shape)
    codes, groups = torch.arange(10 * 2**20 + 256, dtype=torch.int32).to(torch.int8), 10 * 2**13 + 2
    scales = torch.rand(groups)
    state.write(0, {"w": {"weights": weights, "exp_avg": codes, "exp_avg_scale": scales}})
    begins: list[int] = []

    def change(name: str, begin: int, tensors: dict[str, Tensor]) -> None:
        begins.append(begin)
        assert len(tensors["exp_avg"]) == 128 * len(tensors["exp_avg_scale"]) >= len(tensors["gradient"])
        tensors["weights"].copy_(tensors["gradient"])
        tensors["exp_avg"].neg_()

    state.gradients(0)["w"].copy_(weights * 2)
    state.park(0)
    state.begin({"step": 1})
    state.update(change)
    state.finish()
    assert min(begins) == 0
    assert len(begins) > 1
    assert all(begin % 2**20 == 0 for begin in begins)
    read = state.read("w")
    assert torch.equal(read["weights"], weights * 2)
    assert torch.equal(read["exp_avg"], -codes)
    assert torch.equal(read["exp_avg_scale"], scales)
    assert state.read("w", "exp_avg").keys() == {"exp_avg"}
    state.close()


def test_new_sections_are_zeros_or_filled_and_others_stay_when_weights_are_written(tmp_path: Path) -> None:
    layout = TensorLayout("w", (3, 5), FULL)
    state = DiskState(tmp_path, [[layout]], gradients=torch.float32, identity={}, create=True)
    with pytest.raises(ValueError, match="expected values of"):
        state.write(0, {})
    with pytest.raises(ValueError, match="elements"):
        state.write(0, {"w": {"weights": torch.ones(14)}})
    assert not exists(tmp_path)
    state.write(0, {"w": {"weights": torch.ones(3, 5), "exp_avg_sq": 2.0}})
    assert exists(tmp_path)
    state.write(0, {"w": {"weights": torch.zeros(3, 5)}})
    means = {key: value.mean().item() for key, value in state.read("w").items()}
    assert means == {"weights": 0, "exp_avg": 0, "exp_avg_sq": 2}
    state.close()


@pytest.mark.parametrize("host_bytes", [0, 30_000, 10**9])
def test_weights_are_the_same_however_many_stay_in_memory(tmp_path: Path, host_bytes: int) -> None:
    state = make(tmp_path / "a", host_bytes=host_bytes)
    train(state, 2)
    expected = make(tmp_path / "b")
    train(expected, 2)
    assert same(content(state), content(expected))
    for number, unit in enumerate(UNITS):
        state.prefetch(number)
        for following in range(len(UNITS)):
            state.prefetch(following)
        weights = state.weights(number)
        assert same(list(weights.values()), [expected.read(one.name)["weights"] for one in unit])
        assert [value.shape for value in weights.values()] == [one.shape for one in unit]
        state.release(number)
    state.close()
    again = reopen(tmp_path / "a", host_bytes)
    assert same(content(again), content(expected))


def test_units_in_use_are_not_overwritten(tmp_path: Path) -> None:
    state = make(tmp_path)
    expected = [state.read(name)["weights"] for name in ("0.q", "1.q")]
    first, second = state.weights(1), state.weights(2)
    state.prefetch(3)
    with pytest.raises(ValueError, match="release"):
        state.weights(3)
    assert same([first["0.q"], second["1.q"]], expected)
    state.release(1)
    assert torch.equal(state.weights(3)["2.q"], state.read("2.q")["weights"])
    assert torch.equal(second["1.q"], expected[1])


def test_parameters_without_gradient_and_skipped_steps_change_nothing(tmp_path: Path) -> None:
    state = make(tmp_path)
    before = {one.name: state.read(one.name) for unit in UNITS for one in unit}
    park_all(state, 1)
    state.discard()
    for gradient in state.gradients(1).values():
        gradient.fill_(1)
    state.park(1, ["0.q"])
    state.begin({"step": 1})
    calls: list[str] = []

    def change(name: str, begin: int, tensors: dict[str, Tensor]) -> None:
        calls.append(name)
        descend(name, begin, tensors)

    state.update(change)
    state.finish()
    assert calls == ["0.q"]
    for name, old in before.items():
        assert same(list(old.values()), list(state.read(name).values())) == (name != "0.q")


def train_until_killed(folder: Path) -> None:
    torch.set_num_threads(1)
    train(reopen(folder), 10**6)


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path: Path, times: int) -> None:
    folder, moments = tmp_path / "killed", random.Random(0)
    make(folder).close()
    kills, between_units = 0, 0
    while kills < times or not between_units:
        before = (folder / "journal.json").read_bytes()
        child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(folder,))
        child.start()
        while child.is_alive() and (folder / "journal.json").read_bytes() == before:
            child.join(0.001)
        child.join(0.03 * moments.random())
        assert child.is_alive()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        journal = module.StateJournal.load(folder / "journal.json")
        kills += 1
        between_units += journal.pending is not None and 0 < len(journal.done) < 4
    state = reopen(folder)
    last = state.journal.pending or state.journal.finished or {}
    steps = int(last["step"]) + 1  # type: ignore[call-overload]  # JSON
    train(state, steps)
    undisturbed = make(tmp_path / "other")
    train(undisturbed, steps)
    assert same(content(state), content(undisturbed))


def test_two_processes_cannot_use_one_state(tmp_path: Path) -> None:
    make(tmp_path)

    def open_again() -> None:
        with pytest.raises(SetupError, match="end the run that uses it"):
            reopen(tmp_path)

    child = multiprocessing.get_context("fork").Process(target=open_again)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_update_begins_only_after_the_last_one_has_ended(tmp_path: Path) -> None:
    state = make(tmp_path)
    state.begin({"step": 1})
    assert state.journal.pending == {"step": 1}
    with pytest.raises(ValueError, match="finish the pending update"):
        state.begin({"step": 2})
    with pytest.raises(ValueError, match="no pending update"):
        state.write(1, {"0.q": {"weights": torch.zeros(64, 48)}})


def test_state_of_another_model_recipe_or_layout_is_refused(tmp_path: Path) -> None:
    make(tmp_path).close()
    with pytest.raises(SetupError, match=r"belongs to recipe b, expected c"):
        DiskState(tmp_path, UNITS, gradients=torch.float32, identity={**IDENTITY, "recipe": "c"})
    with pytest.raises(SetupError, match="layout"):
        DiskState(tmp_path, UNITS, gradients=torch.bfloat16, identity=IDENTITY)
    with pytest.raises(SetupError, match="contains a training state"):
        make(tmp_path)
    path = tmp_path / "journal.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(SetupError, match="another version"):
        reopen(tmp_path)


def forget(folder: Path) -> object:
    return (folder / "state.bin").unlink()


def cut(folder: Path) -> object:
    return os.truncate(folder / "state.bin", 4096)


def spoil(folder: Path) -> object:
    return (folder / "journal.json").write_text("{")


@pytest.mark.parametrize("lose", [forget, cut, spoil])
def test_state_that_cannot_be_read_is_lost_and_stays_as_it_is(tmp_path: Path, lose: Callable[[Path], object]) -> None:
    make(tmp_path).close()
    lose(tmp_path)
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SetupError, match=r"the training state is lost, so start a new run \(--fresh\)"):
        reopen(tmp_path).weights(3)
    if lose is spoil:
        with pytest.raises(SetupError, match="is lost"):
            exists(tmp_path)  # a run that asks must not take it for a missing one
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("host_bytes", [0, 2**20])
def test_unit_is_updated_when_it_is_needed_next(tmp_path: Path, host_bytes: int) -> None:
    state, expected = (make(tmp_path / name, host_bytes=host_bytes) for name in "ab")
    train(expected, 1)
    state.weights(1)
    state.release(1)
    park_all(state, 1)
    state.begin({"step": 1})
    state.update(descend)
    for number in (1, 0):
        for name, values in state.weights(number).items():
            assert torch.equal(values, expected.read(name)["weights"]), name
        state.release(number)
    assert state.journal.done == [1, 0]
    assert state.journal.pending == {"step": 1}
    state.close()
    with pytest.raises(ValueError, match="continue the pending update"):
        reopen(tmp_path / "a").finish()
    state = reopen(tmp_path / "a")
    train(state, 1)
    assert same(content(state), content(expected))


def test_folder_that_is_deleted_during_a_run_is_noticed_at_the_next_commit(tmp_path: Path) -> None:
    state = make(tmp_path / "state")
    park_all(state, 1)
    state.begin({"step": 1})
    shutil.rmtree(tmp_path / "state")
    state.update(descend)
    with pytest.raises(SetupError, match="was deleted while a run used it; the training state is lost"):
        state.finish()


def test_unfinished_creation_is_noticed_and_replaced(tmp_path: Path) -> None:
    assert not exists(tmp_path)
    DiskState(tmp_path, UNITS, gradients=torch.float32, identity=IDENTITY, create=True).close()
    assert not exists(tmp_path)
    with pytest.raises(SetupError, match="no complete training state"):
        reopen(tmp_path)
    make(tmp_path).close()
    assert exists(tmp_path)
    reopen(tmp_path).close()


def test_disk_that_is_too_small_or_memory_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"needs .* GiB, but only .* GiB are free"):
        store.check_disk(tmp_path / "missing" / "folder", 2**60)
    assert not list(tmp_path.iterdir())
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if any(" /dev/shm " in line and " - tmpfs " in line for line in mounts):
        with pytest.raises(SetupError, match="is in memory"):
            store.check_disk(Path("/dev/shm/fulltune-missing"), 1)


@pytest.mark.parametrize("name", ["pwritev", "preadv"])
def test_errors_of_the_disk_in_the_background_are_raised_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    state = make(tmp_path / "a")
    park_all(state, 1)
    state.begin({"step": 1})
    real, calls = getattr(os, name), iter(range(10**6))

    def fail(*arguments: object) -> int:
        if next(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(real(*arguments))

    monkeypatch.setattr(os, name, fail)
    state.update(descend)
    with pytest.raises(SetupError, match=r"state.bin: cannot be (read|written) \(No space left on device\); check"):
        state.finish()
    monkeypatch.undo()
    if name == "pwritev":
        state.close()
        state = reopen(tmp_path / "a")
    assert len(state.journal.done) < 4  # how many were done by then is up to the threads
    train(state, 1)
    expected = make(tmp_path / "b")
    train(expected, 1)
    assert same(content(state), content(expected))


def test_gradients_that_could_not_be_parked_are_reported_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make(tmp_path)

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    state.gradients(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        state.park(0)
        with pytest.raises(SetupError, match="Input/output error"):
            state.gradients(1)


def test_record_that_the_disk_changed_is_noticed(tmp_path: Path) -> None:
    make(tmp_path).close()
    offset = module.StateJournal.load(tmp_path / "journal.json").offsets[0]
    with (tmp_path / "state.bin").open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    state = reopen(tmp_path)
    park_all(state, 1)
    state.begin({"step": 1})
    state.update(descend)
    with pytest.raises(SetupError, match=r"the disk returned other data of embedding"):
        state.finish()
    assert state.journal.done == [1, 2, 3]


@pytest.fixture
def _without_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)  # type: ignore[arg-type]  # a path

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.usefixtures("_without_direct_io")
def test_disk_that_refuses_direct_io_works_without_filling_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: dropped.append(length))
    state = make(tmp_path / "a")
    monkeypatch.undo()
    expected = make(tmp_path / "b")
    assert same(content(state), content(expected))
    assert sum(dropped) >= sum(value.nbytes for value in content(expected))


def test_memory_does_not_grow_with_steps_or_depth(tmp_path: Path) -> None:
    def growth(blocks: int, steps: int) -> int:
        units = [[TensorLayout(f"{block}", (2**18,), FULL)] for block in range(blocks)]
        before = psutil.Process().memory_info().rss
        state = make(tmp_path / f"{blocks} blocks, {steps} steps", units)
        for step in range(steps):
            for number in range(blocks):
                state.weights(number)
                state.release(number)
                state.gradients(number)
                state.park(number)
            state.begin({"step": step})
            state.update(descend)
            state.finish()
        after = psutil.Process().memory_info().rss
        state.close()
        return after - before

    growth(10, 2)
    few, deep, long = growth(10, 1), growth(20, 1), growth(10, 8)
    assert deep - few < 8 * 2**20, "ten more blocks are 40 MiB"
    assert long - few < 8 * 2**20
