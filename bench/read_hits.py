"""What the readings in `bench/readings` say of each check: how many hits were right, with a 95 % Wilson interval.

python bench/read_hits.py
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

READINGS = Path(__file__).parent / "readings"
_SIGMAS = 1.96
_SAME = {"odd": "right", "fits": "wrong"}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Bounds of a share (Wilson 1927), good for few and for shares near 0 or 1."""
    share, square = right / count, _SIGMAS**2
    centre, spread = (
        share + square / (2 * count),
        _SIGMAS * math.sqrt(share * (1 - share) / count + square / (4 * count**2)),
    )
    return max(0.0, centre - spread) / (1 + square / count), (centre + spread) / (1 + square / count)


def main() -> None:
    """Print a line for each file, and one for each set in it."""
    print("In banking77-labels the verdict is on the label: where it is wrong, the check is right.")
    print("Of outliers the odd ones are right.\n")
    print("| readings | right | unclear | wrong | right, 95 % |\n|---|---:|---:|---:|---:|")
    for file in sorted(READINGS.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        sets = dict.fromkeys(line["set"] for line in lines if "set" in line)
        for name in (None, *(sets if len(sets) > 1 else ())):
            counts = Counter(
                _SAME.get(line["verdict"], line["verdict"]) for line in lines if name in (None, line.get("set"))
            )
            low, high = wilson(counts["right"], counts.total())
            title = file.stem if name is None else f"&nbsp;&nbsp;{name}"
            print(
                f"| {title} | {counts['right']} | {counts['unclear']} | {counts['wrong']} | {low:.0%} to {high:.0%} |"
            )


if __name__ == "__main__":
    main()
