"""The proof card: what it says, that untrusted text stays text, and that its one JSON makes it again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fulltune import report
from fulltune.errors import SetupError
from fulltune.records.comparison import Comparison
from fulltune.report.format import words
from fulltune.report.format.words import MetricFormatter
from tests import comparisons
from tests.unit.report.test_write import Page


def cards(folder: Path, comparison: Comparison) -> tuple[str, str]:
    """Write the card; return Markdown and HTML."""
    comparison.save(folder / "compare" / "comparison.json")
    report.write_comparison_report(folder)
    return (folder / "card.md").read_text(encoding="utf-8"), (folder / "card.html").read_text(encoding="utf-8")


def cells(markdown: str, method: str) -> list[list[str]]:
    """The method's lines of all tables."""
    lines = [line for line in markdown.splitlines() if re.match(rf"\| (▸ )?{method} ", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ---- verdicts --------------------------------------------------------------------------------------------------


def test_card_equivalent_says_which_to_take_with_margin_and_rows(tmp_path: Path) -> None:
    markdown, html = cards(tmp_path, comparisons.comparison())
    sentence = "Use lora: it is as good as full within the margin and trains fewer weights."
    terms = (
        "Margin: differences below 1 point of accuracy do not matter. Confidence: 95% jointly for 3 methods. "
        "Measured on 3,080 test rows."
    )
    assert f"**EQUIVALENT: use lora.** {sentence}" in markdown
    page = Page(html)
    for text in ("EQUIVALENT: use lora", sentence, terms):
        assert text in page.text
        assert text in markdown
    assert "No unfair setting was found." in page.text
    assert [tag["class"] for tag in page.with_tag("div") if "verdict" in str(tag.get("class"))] == [
        "verdict equivalent"
    ]


# ---- the field -------------------------------------------------------------------------------------------------


def test_table_each_method_has_quality_and_cost(tmp_path: Path) -> None:
    markdown, _ = cards(tmp_path, comparisons.comparison())
    quality, cost, _ = cells(markdown, "lora")
    assert quality == [
        *("▸ lora", "973 k (4.3%)", "92.2% [91.3, 93.0]", "+0.34 [-0.27, +0.95]"),
        *("99.6%", "0.0489", "0.002", "3"),
    ]
    assert cost == [
        *("▸ lora", "3 min 53 s · 0.86×", "2.48 k", "21.1 T · 0.68×", "1.17 GiB · 0.81×", "565 MiB · 0.62×"),
        *("3.73 MiB · 0.043×", "1.24 ms"),
    ]
    assert cells(markdown, "base")[0][3:] == ["–", "0.0%", "–", "–", "–"]
    assert cells(markdown, "full")[0][3:5] == ["reference", "100.0%"]


def test_table_method_that_waited_and_rate_on_the_edge_are_marked(tmp_path: Path) -> None:
    markdown, _ = cards(tmp_path, comparisons.comparison())
    assert cells(markdown, "prompt")[0][-1] == "2"
    assert "- prompt: trained with fewer seeds, because full and the best other method come first" in markdown
    assert "- took: 45 min 12 s in total, 10.0× as long as one full run (4 min 31 s); cpu, 2 cores" in markdown
    assert cells(markdown, "head")[0][-2] == "0.0032*"
    assert cells(markdown, "head")[2][3] == "0.0032*"


# ---- marks -----------------------------------------------------------------------------------------------------


def test_marks_stand_beside_the_verdict_and_say_what_to_do(tmp_path: Path) -> None:
    found = (comparisons.finding(), comparisons.finding("worth knowing", "lora"))
    markdown, html = cards(tmp_path, comparisons.comparison(findings=found))
    assert "**1 unfair setting and 1 note: see Fairness.**" in markdown
    text = Page(html).text
    assert text.index("Unfair: full: the best rate") < text.index("Note: lora: the best rate")
    assert "To do: add higher rates to its `learning_rates`." in text


def test_marks_test_rows_opened_twice_is_visible(tmp_path: Path) -> None:
    markdown, html = cards(
        tmp_path, comparisons.comparison(findings=(comparisons.finding(),), openings=comparisons.openings(2))
    )
    assert "**These test rows were used for 2 verdicts, which together keep this confidence. 1 unfair" in markdown
    assert "test rows used for a verdict 2 times: 2026-11-24T16:12:03+01:00; " in Page(html).text


@pytest.mark.parametrize(
    ("value", "lead"),
    [
        (0.62, ""),
        (
            0.9155,
            "nearest centroid needs no training and reaches 91.5%; lora does not clearly beat it with 92.",
        ),
        (0.955, "nearest centroid needs no training and reaches 95.5%; lora does not beat it with"),
    ],
)
def test_headline_leads_with_what_trains_nothing_where_it_comes_near(tmp_path: Path, value: float, lead: str) -> None:
    made = comparisons.comparison()
    strong = made.baselines[1].model_copy(
        update={"metrics": {"accuracy": made.baselines[1].metrics["accuracy"].model_copy(update={"value": value})}}
    )
    markdown, _ = cards(tmp_path, made.model_copy(update={"baselines": (made.baselines[0], strong)}))
    verdict = markdown[markdown.index("**EQUIVALENT: use lora.**") :]
    assert verdict.startswith(f"**EQUIVALENT: use lora.** {lead or 'Use lora'}")


def test_card_of_a_budget_that_ended_says_how_to_go_on_and_blames_the_budget(tmp_path: Path) -> None:
    made = comparisons.undecided(time_was_up=True)
    expected = made.expectation.model_copy(update={"budget_seconds": 360.0, "num_seeds": 2})
    markdown, html = cards(tmp_path, made.model_copy(update={"expectation": expected}))
    for text in (markdown, Page(html).text):
        assert "What to do: rerun the same command with a larger --budget (the budget was 6 min); it resumes" in text


# ---- files -----------------------------------------------------------------------------------------------------


def test_write_comparison_from_its_json_alone_gives_the_same_card(tmp_path: Path) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    cards(first, comparisons.comparison())
    again.mkdir()
    (again / "proof.json").write_bytes((first / "proof.json").read_bytes())
    files = report.write_comparison_report(again)
    assert {path.name for path in files} >= {"card.md", "card.html", "proof.json"}
    for path in files:
        assert path.parent == again
        assert path.read_bytes() == (first / path.name).read_bytes()


def test_write_comparison_without_a_comparison_says_so(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="contains no finished comparison"):
        report.write_comparison_report(tmp_path)


@pytest.mark.parametrize("made", [comparisons.comparison, comparisons.language, comparisons.hostile])
def test_html_is_well_formed_loads_nothing_and_escapes(tmp_path: Path, made: type[Comparison]) -> None:
    _, html = cards(tmp_path, made())
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert not re.search("https?://|url\\(|@import|</script>", html)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.674, "0.67×"), (1.0, "1×"), (0.0065, "0.0065×"), (9.996, "10.0×"), (123.4, "123×"), (0, "0×")],
)
def test_ratio_keeps_what_matters(value: float, text: str) -> None:
    assert words.format_ratio(value) == text


def test_writer_has_no_minus_zero_and_no_needless_digits() -> None:
    assert MetricFormatter("accuracy", 0.01).difference(-0.00001) == "+0.00"
    assert MetricFormatter("accuracy", 0.001).difference(0.00123) == "+0.12"
    assert MetricFormatter("perplexity", 0.01).value(12.3456) == "12.35"
    assert MetricFormatter("loss", 0.01).value(float("nan")) == "not finite"
