"""Stores AdamW's two moments in 32, 16 or 8 bits, slice by slice.

With 8 bits, groups of 128 values share an fp32 scale (2.0625 bytes per parameter for both moments):

    m = s_m * q |q|      q in [-1, 1], in 254 steps      s_m: largest |m| of the group
    v = (s_v * r)^4      r in [0, 1], in 255 steps       s_v: largest v^(1/4) of the group

A linear code would round small values to 0, and v = 0 divides by epsilon (other codes: arXiv 2602.23349). Codes and
bf16 moments are rounded stochastically, because small changes would otherwise be lost; a positive v never gets code 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Format = Literal["fp32", "bf16", "8bit"]
Name = Literal["exp_avg", "exp_avg_sq"]
State = dict[str, Tensor]

GROUP = 128
SMALL = 4096
"""Tensors with fewer values, such as norms and biases (0.1 % of a model), keep fp32 moments."""
_FIRST_TOP, _SECOND_TOP = 126.99, 254.99
"""Largest codes of the first and second moment. Rounding noise below 1 is added, so codes stay below 128 and 256."""
_SHIFT = 128.0
"""Offset of second-moment codes stored as int8, the dtype to which fp32 converts fastest."""
_TINY = torch.finfo(torch.float32).tiny
_MIN_SCALE = 1e-30


class Noise:
    """Random numbers for rounding, read from a table for speed. They depend only on seed, step and position."""

    def __init__(self, seed: int, slice_values: int, device: torch.device) -> None:
        """At most `slice_values` numbers are read at a time."""
        self._seed = seed
        self._num_offsets = max(2**20, 2 * slice_values) - slice_values
        drawn = torch.Generator().manual_seed(seed)
        table = torch.randint(0, 2**16, (self._num_offsets + slice_values,), generator=drawn, dtype=torch.int32)
        self._bits = table.to(device)
        self._units = self._bits.float().div_(2**16)

    def bits(self, count: int, *numbers: int) -> Tensor:
        """Return `count` integers from 0 to 65,535, determined by `numbers`: int32 [count]."""
        return self._bits.narrow(0, self._table_offset(numbers), count)

    def units(self, count: int, *numbers: int) -> Tensor:
        """Return `count` values in [0, 1), determined by `numbers`: fp32 [count]."""
        return self._units.narrow(0, self._table_offset(numbers), count)

    def _table_offset(self, numbers: tuple[int, ...]) -> int:
        """Hash the seed and `numbers` to an offset in the table."""
        digest = hashlib.blake2b(repr((self._seed, *numbers)).encode(), digest_size=8).digest()
        return int.from_bytes(digest) % self._num_offsets


def create_moments(num_values: int, moments: Format, device: torch.device) -> State:
    """Create `exp_avg` and `exp_avg_sq` as zeros [values]; 8 bits are padded to whole groups, with scales [groups]."""
    if moments == "8bit" and num_values >= SMALL:
        groups = -(-num_values // GROUP)
        return {
            "exp_avg": torch.zeros(groups * GROUP, dtype=torch.int8, device=device),
            "exp_avg_scale": torch.full((groups,), _MIN_SCALE, device=device),
            "exp_avg_sq": torch.full((groups * GROUP,), -int(_SHIFT), dtype=torch.int8, device=device),
            "exp_avg_sq_scale": torch.full((groups,), _MIN_SCALE, device=device),
        }
    kind = torch.bfloat16 if moments == "bf16" else torch.float32
    return {name: torch.zeros(num_values, dtype=kind, device=device) for name in ("exp_avg", "exp_avg_sq")}


def read_moment(state: Mapping[str, Tensor], name: Name, begin: int, end: int, factor: float, out: Tensor) -> Tensor:
    """Return values `begin` to `end` of a moment, multiplied by `factor`: fp32 [end - begin]. An fp32 moment is
    multiplied in place; other formats are converted into the buffer `out`, which must hold whole groups."""
    moment = state[name]
    if moment.dtype != torch.int8:
        values = moment[begin:end]
        return (values if moment.dtype == torch.float32 else out[: end - begin].copy_(values)).mul_(factor)
    codes, scales = _overlapping_groups(state, name, begin, end)
    values = out[: len(codes)].copy_(codes)
    if name == "exp_avg":
        values.mul_(values.abs())
        values.view(-1, GROUP).mul_((scales * (factor / _FIRST_TOP**2)).unsqueeze(1))
    else:
        values.add_(_SHIFT).view(-1, GROUP).mul_((scales * (factor**0.25 / _SECOND_TOP)).unsqueeze(1))
        values.square_().square_()
    return values[: end - begin]


def write_moment(
    state: State, name: Name, begin: int, values: Tensor, other: Tensor, noise: Noise, numbers: tuple[int, ...]
) -> None:
    """Store fp32 values[count] in a moment from position `begin`; `values` is overwritten.

    `other` holds the square roots for the second moment and scratch space for the first. `numbers` (step, parameter,
    position, purpose) seed the noise.
    """
    place = state[name][begin : begin + len(values)]
    if place.dtype == torch.bfloat16:
        round_at_random(values, noise.bits(len(values), *numbers))
    if place.dtype != torch.int8:
        if place.data_ptr() != values.data_ptr():
            place.copy_(values)
        return
    codes, scales = _overlapping_groups(state, name, begin, begin + len(values))
    values = _pad_with_zeros(values, len(codes))
    grouped = values.view(-1, GROUP)
    if name == "exp_avg":
        size = torch.abs(values, out=other[: len(values)])
        torch.amax(size.view(-1, GROUP), 1, out=scales)
        scales.clamp_min_(_MIN_SCALE)
        # x / sqrt|x| is the signed root.
        values.mul_(size.clamp_min_(_TINY).rsqrt_())
        grouped.mul_((_FIRST_TOP * scales.rsqrt()).unsqueeze(1))
        codes.copy_(values.add_(noise.units(len(values), *numbers)).floor_())
        return
    root(_pad_with_zeros(other, len(codes)), values)
    torch.amax(grouped, 1, out=scales)
    scales.clamp_min_(_MIN_SCALE)
    grouped.mul_((_SECOND_TOP / scales).unsqueeze(1))
    positive = values.sign()
    values.add_(noise.units(len(values), *numbers))
    # At least code 1 where v is positive.
    codes.copy_(torch.maximum(values, positive, out=values).floor_().sub_(_SHIFT))


def round_at_random(values: Tensor, bits: Tensor) -> None:
    """Round fp32 values[count] to bf16 in place, up or down at random by bits[count]."""
    values.view(torch.int32).add_(bits).bitwise_and_(-(2**16))


def root(values: Tensor, out: Tensor) -> Tensor:
    """Write the square roots of values[count] to out[count], five times as fast as torch.sqrt on a CPU."""
    return torch.clamp_min(values, _TINY, out=out).rsqrt_().mul_(values)


def _overlapping_groups(state: Mapping[str, Tensor], name: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
    first, last = begin // GROUP, -(-end // GROUP)
    return state[name][first * GROUP : last * GROUP], state[f"{name}_scale"][first:last]


def _pad_with_zeros(values: Tensor, length: int) -> Tensor:
    """Return `values`, a view of a larger buffer, extended to `length` with zeros."""
    longer = values if len(values) == length else values.as_strided((length,), (1,))
    longer[len(values) :] = 0.0
    return longer
