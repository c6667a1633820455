"""Defaults that depend on the model and the data.

Sources: Devlin et al. 2018 (BERT: 2e-5 to 5e-5, batch 16 to 32); Mosbach et al. 2020, arXiv 2006.04884 (small data:
2e-5, warm-up, more epochs); Clark et al. 2020 (ELECTRA: 5e-5 to 1e-4); Schulman et al. 2025 (decoders: a tenth of
LoRA's 3e-4 to 1e-3); MiniLM-L6 on Banking77 (2e-4, 2026-11-24).
"""

from __future__ import annotations

from fulltune.models.shapes import Shapes
from fulltune.recipe.methods import Method
from fulltune.recipe.tasks import FACTS, TEXT_PAIRS

DefaultWithReason = tuple[float, str]
ADAPTER_TIMES = 20.0
"""An adapter's best learning rate relative to full fine-tuning's (Houlsby et al. 2019: 1e-3, up to 3e-3)."""
LORA_TIMES, MAX_LORA = 10.0, 8e-4
"""LoRA's best learning rate relative to full fine-tuning's (Schulman et al. 2025), and the highest default rate."""

RATES = {
    "decoders": ((50, 2e-4), (1_000, 5e-5), (5_000, 2e-5), (15_000, 1e-5), (float("inf"), 5e-6)),
    "encoders": ((50, 2e-4), (200, 5e-5), (500, 2e-5), (float("inf"), 1e-5)),
}
"""Peak learning rates by maximum model size, in millions of parameters."""
MAX_APART = 5e-5  # for pairs read apart, whose start is already good


def full_learning_rate(num_parameters: int, is_decoder: bool) -> DefaultWithReason:
    """Return the default learning rate of full fine-tuning, and the reason; larger models get lower rates."""
    millions = num_parameters / 1e6
    size = f"{millions:,.0f} M parameters" if millions >= 1 else f"{num_parameters:,} parameters"
    kind = "decoders" if is_decoder else "encoders"
    return next(rate for most, rate in RATES[kind] if millions <= most), f"usual rate for {kind} of this size ({size})"


def default_learning_rate(method: Method, shapes: Shapes, task: str) -> DefaultWithReason:
    """Return a method's default learning rate, and the reason; methods that train less get higher rates."""
    full, why = full_learning_rate(shapes.num_parameters, shapes.is_decoder)
    if task == TEXT_PAIRS and full > MAX_APART:
        full, why = MAX_APART, "highest default rate for pairs read apart"
    if method.kind in ("lora", "adapter"):
        rate = min(LORA_TIMES * full, MAX_LORA) if method.kind == "lora" else ADAPTER_TIMES * full
        return rate, f"{rate / full:g} times the rate of full fine-tuning ({full:g}, the {why})"
    usual: dict[str, DefaultWithReason] = {
        "head": (1e-3, "usual for a head alone"),
        "prompt": (3e-2, "the few virtual tokens need large steps (Lester et al. 2021: 0.3 with Adafactor)"),
        "peft": (3e-3, "usual for methods that train scaling factors (Liu et al. 2022, IA3: 3e-3)"),
    }
    return usual.get(method.kind, (full, why))


def default_num_epochs(task: str, num_rows: int) -> DefaultWithReason:
    """Return the default number of epochs (more for fewer rows), and the reason."""
    few, usual = (3.0, 2.0) if FACTS[task].writes else (3.0, 1.0) if FACTS[task].contrasts else (5.0, 3.0)
    if num_rows < 2_000 and FACTS[task].head_is_new:
        return 10.0, "fewer than 2,000 rows"
    return (few, "fewer than 10,000 rows") if num_rows < 10_000 else (usual, "10,000 rows or more")


def default_warmup(task: str, has_pretrained_head: bool) -> DefaultWithReason:
    """Return the default share of steps over which the learning rate rises, and the reason."""
    if FACTS[task].writes:
        return 0.03, "usual for language models"
    return 0.1, "usual for this kind of task" if has_pretrained_head else "usual with a new head"


MAX_LENGTH_EXPLAINED = 0.25


def should_group_by_length(explained_share: float, contrasts: bool = False) -> tuple[bool, str]:
    """Return whether to batch rows of similar length, and the reason.

    `explained_share` is the share of the variance in row length that the labels explain. When labels depended on the
    length, F1 was 0.75 with grouping and 1.0 without (2026-11-24).
    """
    if contrasts:
        return False, "a batch's rows are each other's negatives, which should not be told apart by their length"
    share = f"the target explains {explained_share:.0%} of the variance in length"
    if explained_share >= MAX_LENGTH_EXPLAINED:
        return False, f"{share}: rows of similar length would have similar targets"
    return True, f"less padding, and {share}" if explained_share else "less padding"
