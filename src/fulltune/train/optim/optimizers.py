"""AdamW with moments in 32, 16 or 8 bits (`adamw_bf16`, `adamw_8bit`) for CPU and CUDA.

Updates are computed in fp32. bf16 weights are rounded stochastically, to nearest, or to nearest with the error added to
the next update (kahan).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fulltune.errors import SetupError
from fulltune.models.sharding import local_tensor
from fulltune.train.optim import moments
from fulltune.train.optim.moments import Format, Noise

Rounding = Literal["stochastic", "kahan", "nearest"]

CPU_SLICE = 2**18
"""Values per slice on a CPU: with fewer, waking the other threads for each operation takes longer than computing."""
GPU_SLICE = 2**20
"""Values per slice on a GPU: 20 MiB of buffers."""
_GROUP_KEYS = {"params", "lr", "initial_lr", "betas", "eps", "weight_decay"}
_WEIGHT, _FIRST, _SECOND = range(3)


def adamw_arguments(optim: str, rounding: Rounding | None, seed: int) -> dict[str, Any] | None:
    """Return `AdamW`'s keyword arguments if `optim` is one of fulltune's optimizers, else None."""
    formats: dict[str, Format] = {"adamw_8bit": "8bit", "adamw_bf16": "bf16"}
    return {"moments_format": formats[optim], "rounding": rounding, "seed": seed} if optim in formats else None


class _Buffers:
    """A thread's noise and fp32 scratch tensors on a device, each as long as a slice."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.size = CPU_SLICE if device.type == "cpu" else GPU_SLICE
        self.first, self.second, self.other, self.weights, self.gradient = (
            torch.empty(self.size, device=device) for _ in range(5)
        )
        self.noise = Noise(seed, self.size, device)


def to_torch_state(state: Mapping[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
    """Convert a parameter's state to the form of torch's AdamW: the step, and fp32 moments of this shape."""
    count = shape.numel()
    converted = {"step": state["step"]}
    for name in ("exp_avg", "exp_avg_sq"):
        out = torch.empty(-(-count // moments.GROUP) * moments.GROUP, device=state[name].device)
        flat = {**state, name: state[name].reshape(-1)}
        converted[name] = moments.read_moment(flat, name, 0, count, 1.0, out).reshape(shape).clone()
    if "compensation" in state:
        converted["compensation"] = state["compensation"].reshape(shape)
    return converted


class AdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with compact moments and bf16 weights. State dicts can be exchanged with torch's."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments_format: Format = "fp32",
        rounding: Rounding | None = "stochastic",
        seed: int = 0,
    ) -> None:
        """Raise `SetupError` unless weights are fp32 or bf16. `rounding` is for bf16; None rounds to nearest."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._format: Format = moments_format
        self._rounding = rounding
        self._seed = seed
        tensors = [parameter for group in self.param_groups for parameter in group["params"]]
        self._places = {parameter: place for place, parameter in enumerate(tensors)}
        self._scratch: dict[tuple[torch.device, int], _Buffers] = {}
        for parameter in tensors:
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise SetupError(f"train.optim: expected weights in fp32 or bf16, found {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> object:  # type: ignore[override]  # any loss
        """Update all parameters with a gradient; return the result of `closure`, if Lightning passes one."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and local_tensor(parameter).numel():
                    self._update_parameter(parameter, local_tensor(parameter.grad).reshape(-1), group)
        return loss

    def _update_parameter(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        """Update this rank's shard of a parameter, slice by slice."""
        state = self.state[parameter]
        if not state:
            state.update(self._new_state(parameter))
        state["step"] += 1
        shard = local_tensor(parameter.detach())
        weights = shard.reshape(-1)
        self.update_values(parameter, weights, gradient, state, group)
        if not shard.is_contiguous():
            shard.copy_(weights.view(shard.shape))

    def update_values(
        self,
        parameter: Tensor,
        weights: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        offset: int = 0,
    ) -> None:
        """Update `weights`, which are the parameter's flat values from `offset`, and their state, slice by slice."""
        size = self._buffers(weights).size
        for begin in range(0, len(weights), size):
            part, numbers = slice(begin, begin + size), (self._places[parameter], offset + begin)
            self._update_slice(weights[part], gradient[part], state, group, begin, numbers)

    def _update_slice(
        self,
        stored: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        begin: int,
        place: tuple[int, int],
    ) -> None:
        """Update the slice `stored` of the weights, and its moments from position `begin`. `place` is the parameter's
        number and the slice's position in it."""
        buffers = self._buffers(stored)
        end, step = begin + len(stored), int(state["step"])
        numbers = (step, *place)
        beta1, beta2 = group["betas"]
        if gradient.dtype != torch.float32:
            gradient = buffers.gradient[: len(stored)].copy_(gradient)
        first = moments.read_moment(state, "exp_avg", begin, end, beta1, buffers.first).add_(gradient, alpha=1 - beta1)
        second = moments.read_moment(state, "exp_avg_sq", begin, end, beta2, buffers.second)
        second.addcmul_(gradient, gradient, value=1 - beta2)
        square_root = moments.root(second, buffers.other[: len(stored)])
        moments.write_moment(state, "exp_avg_sq", begin, second, square_root, buffers.noise, (*numbers, _SECOND))
        # lr m' / (sqrt(v') + eps) with m' and v' divided by 1 - beta^step, rearranged to save a division.
        correction = (1 - beta2**step) ** 0.5
        rate = group["lr"] * correction / (1 - beta1**step)
        weights = stored
        compensation = state["compensation"][begin:end] if "compensation" in state else None
        if stored.dtype != torch.float32:
            weights = buffers.weights[: len(stored)].copy_(stored)
            if compensation is not None:
                weights.add_(compensation)
        if group["weight_decay"]:
            weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(first, square_root.add_(group["eps"] * correction), value=-rate)
        if stored.dtype != torch.float32:
            self._store_rounded(weights, stored, compensation, buffers, numbers)
        moments.write_moment(state, "exp_avg", begin, first, buffers.other, buffers.noise, (*numbers, _FIRST))

    def _store_rounded(
        self, weights: Tensor, stored: Tensor, compensation: Tensor | None, buffers: _Buffers, numbers: tuple[int, ...]
    ) -> None:
        """Write fp32 `weights`, rounded, to bf16 `stored`, and the rounding error to `compensation` if given.
        Overwrites `weights` and the scratch `buffers`. `numbers` (step, parameter, position) select the noise."""
        noise = buffers.noise.bits(len(weights), *numbers, _WEIGHT)
        if self._rounding == "stochastic":
            moments.round_at_random(weights, noise)
        stored.copy_(weights)
        if compensation is not None:
            error = weights.sub_(buffers.other[: len(stored)].copy_(stored))
            moments.round_at_random(error, noise)
            compensation.copy_(error)

    def _buffers(self, values: Tensor) -> _Buffers:
        user = values.device, threading.get_ident()
        if user not in self._scratch:
            self._scratch[user] = _Buffers(values.device, self._seed)
        return self._scratch[user]

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Create a parameter's state: step, moments and, for kahan rounding, compensation."""
        count, device = local_tensor(parameter).numel(), parameter.device
        state = moments.create_moments(count, self._format, device)
        if parameter.dtype == torch.bfloat16 and self._rounding == "kahan":
            state["compensation"] = torch.zeros(count, dtype=torch.bfloat16, device=device)
        return {"step": torch.tensor(0.0), **state}

    @torch.no_grad()
    def second_moment(self, parameter: Tensor) -> Tensor | None:
        """Return the running mean of squared gradients: fp32, shaped like this rank's shard, or None before the first
        update. It is positive exactly where a gradient was not 0."""
        state = self.state.get(parameter)
        return to_torch_state(state, local_tensor(parameter).shape)["exp_avg_sq"] if state else None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, converting moments from another format."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for group in self.param_groups:
            for key in group.keys() - _GROUP_KEYS:
                del group[key]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, self._places, strict=True):
            if index in state_dict["state"]:
                self.load_parameter_state(state_dict["state"][index], parameter)

    @torch.no_grad()
    def load_parameter_state(self, saved: Mapping[str, Any], parameter: Tensor) -> None:
        """Load a parameter's AdamW state in any moment format from a checkpoint; raise `SetupError` for other state."""
        missing = {"step", "exp_avg", "exp_avg_sq"} - set(saved)
        if missing:
            raise SetupError(
                f"checkpoint: the optimizer's state has no {', '.join(sorted(missing))} (found {', '.join(saved)}), "
                "because AdamW did not write it; start a new run"
            )
        source = {
            name: value.to(parameter.device).reshape(-1)
            for name, value in saved.items()
            if isinstance(value, Tensor) and name != "step"
        }
        state = self.state[parameter] = self._new_state(parameter)
        state["step"].fill_(float(saved["step"]))
        same_format = source["exp_avg"].dtype == state["exp_avg"].dtype
        for name in state.keys() & source.keys() if same_format else state.keys() & source.keys() & {"compensation"}:
            state[name].copy_(source[name])
        if same_format:
            return
        buffers, step, place = self._buffers(parameter), int(saved["step"]), self._places[parameter]
        count = local_tensor(parameter).numel()
        for begin in range(0, count, buffers.size):
            end = min(begin + buffers.size, count)
            numbers = (step, place, begin)
            second = moments.read_moment(source, "exp_avg_sq", begin, end, 1.0, buffers.second)
            second = buffers.second[: end - begin].copy_(second)
            square_root = moments.root(second, buffers.other[: end - begin])
            moments.write_moment(state, "exp_avg_sq", begin, second, square_root, buffers.noise, (*numbers, _SECOND))
            first = moments.read_moment(source, "exp_avg", begin, end, 1.0, buffers.first)
            first = buffers.first[: end - begin].copy_(first)
            moments.write_moment(state, "exp_avg", begin, first, buffers.other, buffers.noise, (*numbers, _FIRST))
