"""The page of the day, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu_day.here import Here, in_gib, notes
from bench.gpu_day.parts import PARTS

from fulltune.text import format_bytes, format_number, format_percent, format_seconds

MISSING = "not measured"
_UNITS = {
    "_bytes": format_bytes,
    "_seconds": format_seconds,
    "_error": lambda share: f"{100 * share:+.1f} %",
    "_share": format_percent,
    "_ratio": lambda ratio: f"{ratio:.2f}x",
    "_per_second": format_number,
}


def markdown(day: Mapping[str, Any]) -> str:
    """Render the page."""
    here = Here.of({name: value for name, value in day["here"].items() if name != "key"})
    results = [_result(day, part.name) for part in PARTS]
    lines = ["# fulltune gpu-day", "", _verdict(here, results), ""]
    lines += [f"- {note}." for note in notes(here)]
    lines += [f"- Not as it should be: {problem}." for problem in _wrong(results)]
    lines += ["", "| here | |", "|---|---|", *_facts(here)]
    for part, result in zip(PARTS, results, strict=True):
        lines += ["", f"## {part.title}", "", f"{part.what} {_how(result)}"]
        if result["rows"]:
            lines += ["", *_table(result["rows"])]
    return "\n".join(lines) + "\n"


def _result(day: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the part's result on this machine, or an empty result with the reason."""
    decision = day["decisions"][part]
    nothing: dict[str, Any] = {"status": "skipped", "reason": decision["reason"], "rows": [], "seconds": 0}
    if decision["how"] == "skip":
        return nothing
    return day["results"].get(f"{part} | {day['here']['key']}", nothing | {"status": "open"})


def _verdict(here: Here, results: Sequence[Mapping[str, Any]]) -> str:
    rows = [row for result in results for row in result["rows"]]
    values = [value for row in rows for value in row["figures"].values()]
    missing, wrong = sum(value is None for value in values), [row for row in rows if row["ok"] is False]
    where = f"on {here.cards[0].name}" if here.cards else "**without a card**: nothing here was measured on a GPU"
    done = sum(result["status"] == "done" for result in results)
    summary = f"{done} of {len(results)} parts ran {where}. "
    summary += f"{len(values) - missing} figures, {missing} not measured; {len(wrong)} not as they should be"
    return f"{summary}. {sum(result['seconds'] for result in results) / 60:.1f} minutes."


def _wrong(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe each measurement that is not as expected, with its part."""
    titles = [(part.title, result["rows"]) for part, result in zip(PARTS, results, strict=True)]
    bad = [(title, row) for title, rows in titles for row in rows if row["ok"] is False]
    return [f"{title}, {row['case']}" + (f": {row['note']}" if row["note"] else "") for title, row in bad]


def _facts(here: Here) -> list[str]:
    facts = {"fulltune": here.fulltune, "torch": f"{here.torch}, built for CUDA {here.torch_cuda or '- (none)'}"}
    facts["driver"] = here.driver or "none"
    for number, card in enumerate(here.cards):
        major, minor = card.capability
        free = f"{in_gib(card.free_bytes)} of {in_gib(card.memory_bytes)} free"
        facts[f"card {number}"] = f"{card.name}, {free}, compute capability {major}.{minor}"
    facts["host"] = f"{in_gib(here.host_bytes)} of memory free, {in_gib(here.disk_bytes)} of disk"
    return [f"| {name} | {_cell(value)} |" for name, value in facts.items()]


def _how(result: Mapping[str, Any]) -> str:
    match result["status"]:
        case "skipped":
            return f"Skipped: {result['reason']}."
        case "open":
            return "Not run yet."
        case "done":
            where = "on the card" if result["how"] == "card" else "on the CPU, as a stand-in"
            return f"Ran {where} in {result['seconds']:.0f} s."
        case status:
            return f"**{status.capitalize()}** after {result['seconds']:.0f} s: {result['reason']}."


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render all rows as one table, with empty cells for missing figures."""
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    lines = [f"| case | {' | '.join(map(_title, names))} | as it should be | |", f"|---|{'---:|' * len(names)}---|---|"]
    for row in rows:
        values = [_shown(name, row["figures"][name]) if name in row["figures"] else "" for name in names]
        ok = {True: "yes", False: "**NO**", None: ""}[row["ok"]]
        lines.append(f"| {_cell(row['case'])} | {' | '.join(values)} | {ok} | {_cell(row['note'])} |")
    return lines


def _unit(name: str) -> str:
    return next((unit for unit in _UNITS if name.endswith(unit)), "")


def _title(name: str) -> str:
    suffixes = {"_error": " error", "_per_second": " per s", "_ratio": " ratio"}
    unit = _unit(name)
    return (name.removesuffix(unit) + suffixes.get(unit, "")).replace("_", " ").strip()


def _shown(name: str, value: float | str | None) -> str:
    if value is None:
        return MISSING
    if isinstance(value, str):
        return _cell(value)
    return _UNITS.get(_unit(name), format_number)(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
