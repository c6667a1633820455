"""What is read of a card's memory, and what is asked of its allocator."""

from __future__ import annotations

import pytest
import torch

from fulltune.errors import SetupError
from fulltune.system import hardware, memory
from fulltune.system.memory import Meter, is_out_of_memory, run_with_smaller_batches
from fulltune.train.usage import memory_limit
from tests.gpu_paths.cards import GIB, Cards

books = pytest.mark.stand_in(
    "cards by a patched torch.cuda, with an allocator's books",
    card="fragmentation, the size of CUDA's own context",
)


@pytest.mark.stand_in("an A100 and a T4 by a patched torch.cuda", card="that the driver says so")
def test_cards_of_different_kinds_are_each_read(an_a100_and_a_t4: Cards) -> None:
    a100, t4 = hardware._list_gpus()

    assert (a100.name, a100.memory_bytes, a100.free_bytes, a100.bf16) == (
        "NVIDIA A100-SXM4-40GB",
        40 * GIB,
        39 * GIB,
        True,
    )
    assert (t4.name, t4.memory_bytes, t4.free_bytes, t4.bf16) == ("Tesla T4", 16 * GIB, 15 * GIB, False)


@pytest.mark.stand_in("cards that a patched torch.cuda counts and cannot use", card="the driver itself")
def test_cards_whose_driver_is_too_old_are_none(an_a100_and_a_t4: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware._list_gpus() == ()


@books
def test_meter_reads_what_the_allocator_has_reserved_since_it_began(two_h100s: Cards) -> None:
    card = two_h100s[0]
    card.take(5 * GIB)
    card.free(4 * GIB)  # stays reserved, and is given back before anything is measured

    meter = Meter("cuda")
    card.take(3 * GIB)
    card.free(2 * GIB)

    assert (meter.base_bytes, meter.bytes_in_use(), meter.peak_bytes()) == (GIB, 4 * GIB, 4 * GIB)
    assert meter.growth_bytes() == 3 * GIB
    meter.reset_peak()
    assert meter.peak_bytes() == meter.bytes_in_use() == 2 * GIB


@books
def test_meter_of_a_cpu_asks_no_card(two_h100s: Cards) -> None:
    two_h100s[0].take(3 * GIB)
    two_h100s[0].free(3 * GIB)

    meter = Meter("cpu")

    assert 0 < meter.bytes_in_use() <= meter.peak_bytes() != 3 * GIB
    assert two_h100s[0].reserved == 3 * GIB, "its cache was given back for nothing"


@books
def test_limit_is_a_share_of_the_current_card_until_its_end(an_a100_and_a_t4: Cards) -> None:
    a100, t4 = an_a100_and_a_t4.cards

    with memory_limit(4 * GIB, "cuda", print):
        assert (a100.share, t4.share) == (1.0, 0.25)
        t4.take(3 * GIB)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            t4.take(2 * GIB)
        assert is_out_of_memory(raised.value)
    assert t4.share == 1.0
    t4.take(2 * GIB)


@books
def test_limit_on_a_cpu_leaves_the_cards_alone(two_h100s: Cards) -> None:
    with memory_limit(64 * GIB, "cpu", print):
        assert two_h100s[0].share == 1.0


@books
def test_smaller_batch_begins_with_what_the_larger_one_left_given_back(two_h100s: Cards) -> None:
    card = two_h100s[0]

    def run(rows: int) -> tuple[int, int]:
        reserved = card.reserved
        card.take(rows * 30 * GIB)
        return rows, reserved

    def leaves(rows: int) -> tuple[int, int]:
        try:
            return run(rows)
        except torch.OutOfMemoryError:
            card.take(20 * GIB)
            card.free(20 * GIB)
            raise

    assert run_with_smaller_batches("scoring", 8, leaves) == (2, 0)


@pytest.mark.stand_in("torch.OutOfMemoryError raised by hand", card="that the driver raises it")
def test_error_of_the_allocator_is_known_by_its_kind() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("in words that nobody knows"))


@pytest.mark.stand_in("torch.OutOfMemoryError raised by hand", card="that the driver raises it")
@pytest.mark.parametrize(
    ("error", "told"), [(torch.OutOfMemoryError("full"), torch.OutOfMemoryError), (ValueError("no"), SetupError)]
)
def test_own_function_for_which_a_card_is_too_small_is_not_called_wrong(
    error: Exception, told: type[Exception]
) -> None:
    def function() -> None:
        raise error

    with pytest.raises(told):
        memory.call_own("train.loss", function)
