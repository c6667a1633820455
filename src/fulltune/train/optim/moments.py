"""AdamW's two moments in 32, 16 or 8 bits: written from fp32 and read back, slice by slice.

8 bits, in groups of 128 values with one fp32 scale each (2.0625 bytes a parameter for both moments):

    m = s_m * q |q|      q in [-1, 1], in 254 steps      s_m: largest |m| of the group
    v = (s_v * r)^4      r in [0, 1], in 255 steps       s_v: largest v^(1/4) of the group

With even steps small values would become 0, and 0 in v divides by epsilon (other curves: arXiv 2602.23349). Codes, and
moments in bf16, are rounded up or down at random, or small changes would be lost; a positive v never gets code 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Format = Literal["fp32", "bf16", "8bit"]
Name = Literal["exp_avg", "exp_avg_sq"]
State = dict[str, Tensor]

GROUP = 128
"""Values that share a scale."""
SMALL = 4096
"""Tensors with fewer values keep fp32 moments where larger ones have 8 bits: norms and biases, 0.1 % of a model."""
_FIRST_TOP, _SECOND_TOP = 126.99, 254.99
"""Largest code; with the noise, which is below 1, it stays below 127 and 256."""
_SHIFT = 128.0
"""Second codes are 0 to 255, kept as int8: from fp32 that is five times as fast as uint8."""
_TINY = torch.finfo(torch.float32).tiny
_LEAST_SCALE = 1e-30
"""Where a whole group is 0."""


class Noise:
    """Random numbers for rounding, which depend on seed, step and place alone: stretches of a table that is drawn once,
    because drawing anew would cost more than the whole update."""

    def __init__(self, seed: int, slice_values: int, device: torch.device) -> None:
        self._seed = seed
        self._places = max(2**20, 2 * slice_values) - slice_values
        drawn = torch.Generator().manual_seed(seed)
        table = torch.randint(0, 2**16, (self._places + slice_values,), generator=drawn, dtype=torch.int32)
        self._bits = table.to(device)
        self._units = self._bits.float().div_(2**16)

    def bits(self, count: int, *numbers: int) -> Tensor:
        """int32 [count], 0 to 65,535."""
        return self._bits.narrow(0, self._place(numbers), count)

    def units(self, count: int, *numbers: int) -> Tensor:
        """fp32 [count], 0 to below 1."""
        return self._units.narrow(0, self._place(numbers), count)

    def _place(self, numbers: tuple[int, ...]) -> int:
        mixed = 0
        for number in (self._seed, *numbers):  # splitmix64
            mixed = (mixed + number + 0x9E3779B97F4A7C15) & _64_BITS
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64_BITS
            mixed ^= mixed >> 31
        return mixed % self._places


_64_BITS = 2**64 - 1


def start(num_values: int, moments: Format, device: torch.device) -> State:
    """Moments of 0: `exp_avg` and `exp_avg_sq` [values]; in 8 bits padded to whole groups, with `*_scale` [groups]."""
    if moments == "8bit" and num_values >= SMALL:
        groups = -(-num_values // GROUP)
        return {
            "exp_avg": torch.zeros(groups * GROUP, dtype=torch.int8, device=device),
            "exp_avg_scale": torch.full((groups,), _LEAST_SCALE, device=device),
            "exp_avg_sq": torch.full((groups * GROUP,), -int(_SHIFT), dtype=torch.int8, device=device),
            "exp_avg_sq_scale": torch.full((groups,), _LEAST_SCALE, device=device),
        }
    kind = torch.bfloat16 if moments == "bf16" else torch.float32
    return {name: torch.zeros(num_values, dtype=kind, device=device) for name in ("exp_avg", "exp_avg_sq")}


def read(state: Mapping[str, Tensor], name: Name, begin: int, end: int, factor: float, out: Tensor) -> Tensor:
    """`factor` times a moment, fp32 [end - begin]: fp32 moments are multiplied in place and returned themselves, others
    are written into out[whole groups]."""
    kept = state[name]
    if kept.dtype != torch.int8:
        values = kept[begin:end]
        return (values if kept.dtype == torch.float32 else out[: end - begin].copy_(values)).mul_(factor)
    codes, scales = _groups(state, name, begin, end)
    values = out[: len(codes)].copy_(codes)
    if name == "exp_avg":
        values.mul_(values.abs())
        values.view(-1, GROUP).mul_((scales * (factor / _FIRST_TOP**2)).unsqueeze(1))
    else:
        values.add_(_SHIFT).view(-1, GROUP).mul_((scales * (factor**0.25 / _SECOND_TOP)).unsqueeze(1))
        values.square_().square_()
    return values[: end - begin]


def write(
    state: State, name: Name, begin: int, values: Tensor, other: Tensor, noise: Noise, numbers: tuple[int, ...]
) -> None:
    """Keep a moment's fp32 values[count], in a buffer of whole groups that is overwritten, from `begin` on; `other` is
    a buffer for the first moment, and for the second its square root."""
    place = state[name][begin : begin + len(values)]
    if place.dtype == torch.bfloat16:
        round_at_random(values, noise.bits(len(values), *numbers))
    if place.dtype != torch.int8:
        if place.data_ptr() != values.data_ptr():
            place.copy_(values)
        return
    codes, scales = _groups(state, name, begin, begin + len(values))
    values = _padded(values, len(codes))
    grouped = values.view(-1, GROUP)
    if name == "exp_avg":
        size = torch.abs(values, out=other[: len(values)])
        torch.amax(size.view(-1, GROUP), 1, out=scales)
        scales.clamp_min_(_LEAST_SCALE)
        # x / sqrt|x| is the signed root.
        values.mul_(size.clamp_min_(_TINY).rsqrt_())
        grouped.mul_((_FIRST_TOP * scales.rsqrt()).unsqueeze(1))
        codes.copy_(values.add_(noise.units(len(values), *numbers)).floor_())
        return
    root(_padded(other, len(codes)), values)
    torch.amax(grouped, 1, out=scales)
    scales.clamp_min_(_LEAST_SCALE)
    grouped.mul_((_SECOND_TOP / scales).unsqueeze(1))
    positive = values.sign()
    values.add_(noise.units(len(values), *numbers))
    # At least code 1 where v is positive.
    codes.copy_(torch.maximum(values, positive, out=values).floor_().sub_(_SHIFT))


def round_at_random(values: Tensor, bits: Tensor) -> None:
    """Make fp32 values[count] bf16 ones in place, up or down at random (bits[count]), right on average."""
    values.view(torch.int32).add_(bits).bitwise_and_(-(2**16))


def root(values: Tensor, out: Tensor) -> Tensor:
    """Square roots out[count] of values[count], 0 only of 0; on the CPU torch.sqrt takes five times as long."""
    return torch.clamp_min(values, _TINY, out=out).rsqrt_().mul_(values)


def _groups(state: Mapping[str, Tensor], name: str, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """codes[groups * GROUP] and scales[groups]; `begin` is at the start of one."""
    first, last = begin // GROUP, -(-end // GROUP)
    return state[name][first * GROUP : last * GROUP], state[f"{name}_scale"][first:last]


def _padded(values: Tensor, length: int) -> Tensor:
    """values[count], which lie in a buffer of whole groups, with zeros up to [length]."""
    longer = values if len(values) == length else values.as_strided((length,), (1,))
    longer[len(values) :] = 0.0
    return longer
