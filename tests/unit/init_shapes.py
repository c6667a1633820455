"""Shapes of well-known public data sets: their column names with small rows of the same kind, and what `init` infers.

A cell is a list (repeated), or a function of the row's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import tiny

Cell = list[Any] | Callable[[int], Any]
_WORDS = [
    *("the", "a", "small", "old", "river", "house", "market", "train", "doctor", "song", "garden", "winter", "letter"),
    *("window", "child", "paper", "quietly", "often", "never", "walks", "sings", "opens", "finds", "breaks", "carries"),
    *("remembers", "green", "heavy", "strange", "bright", "under", "after", "before", "between", "street", "bridge"),
    *("morning", "city", "people", "answer", "question", "music", "bread", "stone", "light", "water", "table"),
]
ROWS = 60


def text(low: int, high: int, seed: int, same: int = 1, end: str = ".") -> Cell:
    """Sentences of some words, a new one after every `same` rows."""

    def sentence(number: int) -> str:
        random = Random(seed * 1000 + number // same)
        return " ".join(random.choices(_WORDS, k=random.randint(low, high))).capitalize() + end

    return sentence


def number(low: float, high: float, digits: int = 0, seed: int = 9) -> Cell:
    def drawn(row: int) -> float:
        value = round(Random(seed * 1000 + row).uniform(low, high), digits)
        return value if digits else int(value)

    return drawn


def every(step: int) -> Cell:
    return lambda row: int(row % step == 0)


def within(cell: Cell, words: int) -> Cell:
    """The last words of a text."""
    return lambda row: " ".join(at(cell, row).rstrip(".").split()[-words:])


def at(cell: Cell, row: int) -> Any:
    return cell[row % len(cell)] if isinstance(cell, list) else cell(row)


SHORT, TITLE, LONG = text(7, 14, 1), text(4, 7, 2, end=""), text(40, 80, 3)
OTHER, THIRD, QUESTION, PASSAGE = text(7, 14, 4), text(7, 14, 5), text(6, 10, 6, end="?"), text(60, 90, 7)
ID: Cell = lambda row: row  # noqa: E731
CODE: Cell = lambda row: f"dev-{row:05d}"  # noqa: E731
BINARY: Cell = lambda row: (row * 7 // 3) % 2  # noqa: E731
DATE: Cell = lambda row: f"2015-02-{row % 28 + 1:02d} 11:35:52 -0800"  # noqa: E731
NAME: Cell = lambda row: f"{['Ada', 'Kim', 'Lee', 'Mia', 'Tom'][row % 5]}{_WORDS[row % 40]}"  # noqa: E731
TOKENS: Cell = lambda row: at(SHORT, row).rstrip(".").split()  # noqa: E731
NUMBERED: Cell = lambda row: [0, 0, 0, 1, 2, *[(row + place) % 9 for place in range(len(TOKENS(row)) - 5)]]  # noqa: E731
ENTITIES: Cell = lambda row: ["B-PER", "I-PER", *["O"] * (len(TOKENS(row)) - 2)]  # noqa: E731
FOUR: Cell = lambda row: [at(text(2, 6, 20 + place, end=""), row) for place in range(4)]  # noqa: E731
CHAT: Cell = lambda row: [  # noqa: E731
    {"role": "user", "content": at(QUESTION, row)},
    {"role": "assistant", "content": at(SHORT, row)},
]


@dataclass(frozen=True)
class Shape:
    name: str
    cells: Mapping[str, Cell]
    task: str
    """The task, `ask`, or `refuse`."""
    roles: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    suffix: str = ".jsonl"
    encoding: str = "utf-8"
    first: str = ""
    """Of what is asked: the task of the first suggestion."""

    def rows(self) -> list[dict[str, Any]]:
        return [{name: at(cell, row) for name, cell in self.cells.items()} for row in range(ROWS)]

    def write(self, folder: Path) -> Path:
        path = folder / f"train{self.suffix}"
        if self.suffix == ".jsonl":
            return tiny.write_jsonl(path, self.rows())
        tiny.write_csv(path, self.rows())
        content = path.read_text(encoding="utf-8")
        path.write_text(content.replace("\t", " "), encoding=self.encoding)
        return path


def _one(label: str, text: str, **more: str) -> dict[str, str | tuple[str, ...]]:
    return {"text": text, **more, "label": label}


def _pair(text: str, text_pair: str, label: str) -> dict[str, str | tuple[str, ...]]:
    return {"text": text, "text_pair": text_pair, "label": label}


CLASS, LM = "text-classification", "causal-lm"
TOXIC = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
SHAPES = (
    Shape("SST-2", {"sentence": SHORT, "label": BINARY, "idx": ID}, CLASS, _one("label", "sentence")),
    Shape("IMDB", {"review": LONG, "sentiment": ["positive", "negative"]}, CLASS, _one("sentiment", "review"), ".csv"),
    Shape(
        "AG News",
        {"Class Index": [3, 4, 1, 2], "Title": TITLE, "Description": LONG},
        CLASS,
        _pair("Description", "Title", "Class Index"),
        ".csv",
    ),
    Shape("AG News on the Hub", {"text": LONG, "label": [0, 1, 2, 3]}, CLASS, _one("label", "text")),
    Shape("Yelp", {"label": [0, 1, 2, 3, 4], "text": LONG}, CLASS, _one("label", "text")),
    Shape(
        "Yelp's own",
        {
            "review_id": lambda row: f"KU_O5udG6zpxOg-VcAEod{row}",
            "user_id": lambda row: f"mh_-eMZ6K5RLWhZyISBh{row % 50}A",
            "stars": [5, 4, 1, 3, 2],
            "useful": number(0, 5),
            "funny": number(0, 3, seed=8),
            "text": LONG,
            "date": DATE,
        },
        CLASS,
        _one("stars", "text"),
    ),
    Shape(
        "Amazon reviews",
        {
            "Id": ID,
            "ProductId": lambda row: f"B00{row // 3}E4KFG0",
            "UserId": lambda row: f"A3SGXH7AUHU8G{row}",
            "ProfileName": NAME,
            "HelpfulnessNumerator": number(0, 6),
            "Score": [5, 1, 4, 2, 3],
            "Time": lambda row: 1303862400 + row * 86400,
            "Summary": TITLE,
            "Text": LONG,
        },
        CLASS,
        _pair("Text", "Summary", "Score"),
        ".csv",
    ),
    Shape(
        "Amazon polarity",
        {"label": BINARY, "title": TITLE, "content": LONG},
        CLASS,
        _pair("content", "title", "label"),
    ),
    Shape(
        "STS-B",
        {
            "genre": ["main-captions", "main-forums", "main-news"],
            "filename": ["MSRvid", "images", "headlines"],
            "year": ["2012test", "2013", "2014"],
            "index": lambda row: f"{row:04d}",
            "score": number(0, 5, 3),
            "sentence1": SHORT,
            "sentence2": OTHER,
        },
        CLASS,
        {**_pair("sentence1", "sentence2", "score"), "problem_type": "regression"},
        ".csv",
    ),
    Shape(
        "two texts and a number, by any names",
        {"left": SHORT, "right": OTHER, "how_close": number(0, 100)},
        CLASS,
        {**_pair("left", "right", "how_close"), "problem_type": "regression"},
    ),
    Shape(
        "two texts and 0/1, by any names",
        {"alpha": SHORT, "beta": OTHER, "ok": BINARY},
        CLASS,
        _pair("alpha", "beta", "ok"),
    ),
    Shape(
        "MRPC",
        {"sentence1": SHORT, "sentence2": OTHER, "label": BINARY, "idx": ID},
        CLASS,
        _pair("sentence1", "sentence2", "label"),
    ),
    Shape(
        "MRPC as published",
        {
            "Quality": BINARY,
            "#1 ID": number(100000, 900000),
            "#2 ID": number(100000, 900000, seed=5),
            "#1 String": SHORT,
            "#2 String": OTHER,
        },
        CLASS,
        _pair("#1 String", "#2 String", "Quality"),
        ".csv",
    ),
    Shape(
        "QQP",
        {
            "id": ID,
            "qid1": number(1, 90000),
            "qid2": number(1, 90000, seed=3),
            "question1": QUESTION,
            "question2": text(6, 10, 8, end="?"),
            "is_duplicate": BINARY,
        },
        CLASS,
        _pair("question1", "question2", "is_duplicate"),
        ".csv",
    ),
    Shape(
        "MNLI",
        {"premise": text(7, 14, 1, same=3), "hypothesis": OTHER, "label": [0, 1, 2], "idx": ID},
        CLASS,
        _pair("premise", "hypothesis", "label"),
    ),
    Shape(
        "RTE",
        {"sentence1": LONG, "sentence2": OTHER, "label": ["entailment", "not_entailment"], "idx": ID},
        CLASS,
        _pair("sentence1", "sentence2", "label"),
    ),
    Shape(
        "QNLI",
        {"question": QUESTION, "sentence": LONG, "label": BINARY, "idx": ID},
        CLASS,
        _pair("question", "sentence", "label"),
    ),
    Shape(
        "BoolQ",
        {"question": QUESTION, "passage": PASSAGE, "answer": [True, False, True]},
        CLASS,
        _pair("question", "passage", "answer"),
    ),
    Shape(
        "yes or no",
        {"question": QUESTION, "passage": PASSAGE, "answer": ["yes", "no", "yes"]},
        CLASS,
        _pair("question", "passage", "answer"),
    ),
    Shape(
        "WikiQA",
        {
            "question_id": lambda row: f"Q{row // 5}",
            "question": text(6, 10, 6, same=5, end="?"),
            "document_title": lambda row: f"{_WORDS[row // 5].capitalize()} {_WORDS[row // 5 + 9]}",
            "answer": SHORT,
            "label": [0, 0, 1, 0, 0],
        },
        "reranking",
        {"query": "question", "text": "answer", "label": "label"},
    ),
    Shape(
        "lists of candidates",
        {"query": QUESTION, "passages": FOUR, "is_selected": [[0, 1, 0, 0], [0, 0, 0, 1]]},
        "reranking",
        {"query": "query", "text": "passages", "label": "is_selected"},
    ),
    Shape(
        "SQuAD",
        {
            "id": lambda row: f"5733be284776f4190066{row:04d}",
            "title": lambda row: f"{_WORDS[row // 20].capitalize()}_of_{_WORDS[row // 20 + 7]}",
            "context": text(60, 90, 7, same=4),
            "question": QUESTION,
            "answers": lambda row: {
                "text": [at(within(text(60, 90, 7, same=4), 2), row)],
                "answer_start": [at(text(60, 90, 7, same=4), row).rindex(at(within(text(60, 90, 7, same=4), 2), row))],
            },
        },
        "question-answering",
        {"question": "question", "context": "context", "answers": "answers"},
    ),
    Shape(
        "answers in a passage",
        {"passage": PASSAGE, "query": QUESTION, "short": within(PASSAGE, 2)},
        "question-answering",
        {"question": "query", "context": "passage", "answers": "short"},
        ".csv",
    ),
    Shape(
        "CoNLL with numbers",
        {"id": lambda row: str(row), "tokens": TOKENS, "pos_tags": NUMBERED, "ner_tags": NUMBERED},
        "ask",
        {"tokens": "tokens", "tags": "ner_tags"},
        first="token-classification",
    ),
    Shape(
        "WNUT",
        {"id": lambda row: str(row), "tokens": TOKENS, "ner_tags": ENTITIES},
        "token-classification",
        {"tokens": "tokens", "tags": "ner_tags"},
    ),
    Shape(
        "sentences with tags",
        {"sentence": lambda row: " ".join(TOKENS(row)), "word_labels": lambda row: " ".join(ENTITIES(row))},
        "token-classification",
        {"tokens": "sentence", "tags": "word_labels"},
        ".csv",
    ),
    Shape(
        "Jigsaw",
        {
            "id": lambda row: f"0000997932d777b{row}f",
            "comment_text": LONG,
            **{name: every(place + 2) for place, name in enumerate(TOXIC)},
        },
        CLASS,
        {"text": "comment_text", "label": TOXIC},
        ".csv",
    ),
    Shape(
        "GoEmotions",
        {"text": SHORT, "labels": [[27], [2, 3], [27], [14], [3]], "id": lambda row: f"eebbqe{row}"},
        CLASS,
        _one("labels", "text"),
    ),
    Shape(
        "GoEmotions as published",
        {
            "text": SHORT,
            "id": lambda row: f"ed00q6{row}",
            "author": NAME,
            "subreddit": ["nfl", "unpopularopinion", "confessions"],
            "created_utc": lambda row: 1548381039.0 + row,
            "rater_id": number(0, 81),
            "admiration": BINARY,
            "anger": [0, 0, 1],
            "joy": [0],
            "neutral": [0, 1, 0, 0],
        },
        CLASS,
        {"text": "text", "label": ("admiration", "anger", "joy", "neutral")},
        ".csv",
    ),
    Shape(
        "E2E",
        {
            "meaning_representation": lambda row: f"name[{_WORDS[row // 4]}], type[pub], near[{_WORDS[row // 4 + 9]}]",
            "human_reference": SHORT,
        },
        LM,
        {"prompt": "meaning_representation", "completion": "human_reference"},
    ),
    Shape(
        "E2E with short names",
        {"mr": lambda row: f"name[{_WORDS[row // 4]}], food[{_WORDS[row // 4 + 5]}], area[city centre]", "ref": SHORT},
        LM,
        {"prompt": "mr", "completion": "ref"},
        ".csv",
    ),
    Shape(
        "WMT",
        {"translation": lambda row: {"en": at(SHORT, row), "fr": at(OTHER, row)}},
        "ask",
        {"prompt": "translation.en", "completion": "translation.fr"},
        first=LM,
    ),
    Shape(
        "Dolly",
        {
            "instruction": QUESTION,
            "context": lambda row: at(PASSAGE, row) if row % 3 == 0 else "",
            "response": LONG,
            "category": ["closed_qa", "open_qa", "brainstorming"],
        },
        LM,
        {"prompt": "instruction", "input": "context", "completion": "response"},
    ),
    Shape(
        "Alpaca",
        {"instruction": QUESTION, "input": lambda row: at(SHORT, row) if row % 2 else "", "output": LONG},
        LM,
        {"prompt": "instruction", "input": "input", "completion": "output"},
    ),
    Shape("OpenAssistant", {"messages": CHAT, "source": ["oasst"]}, LM, {"messages": "messages"}),
    Shape(
        "UltraChat",
        {"prompt": QUESTION, "prompt_id": lambda row: f"f0e37e9f7800261167{row}", "messages": CHAT},
        LM,
        {"messages": "messages"},
    ),
    Shape(
        "ShareGPT",
        {
            "id": CODE,
            "conversations": lambda row: [
                {"from": "human", "value": at(QUESTION, row)},
                {"from": "gpt", "value": at(SHORT, row)},
            ],
        },
        LM,
        {"messages": "conversations"},
    ),
    Shape("GSM8K", {"question": LONG, "answer": THIRD}, LM, {"prompt": "question", "completion": "answer"}),
    Shape(
        "XSum",
        {"document": PASSAGE, "summary": SHORT, "id": ID},
        "seq2seq",
        {"source": "document", "target": "summary"},
    ),
    Shape(
        "CNN/DailyMail",
        {"article": PASSAGE, "highlights": SHORT, "id": lambda row: f"42c027e4ff9730fbb3de84c1af0d2c506e41c3e{row}"},
        "seq2seq",
        {"source": "article", "target": "highlights"},
    ),
    Shape(
        "MS MARCO",
        {"query": QUESTION, "positive": LONG, "negative": PASSAGE},
        "embedding",
        {"query": "query", "positive": "positive", "negative": "negative"},
    ),
    Shape(
        "NLI triplets",
        {"anchor": SHORT, "positive": OTHER, "negative": THIRD},
        "embedding",
        {"query": "anchor", "positive": "positive", "negative": "negative"},
    ),
    Shape(
        "HellaSwag",
        {
            "ind": ID,
            "activity_label": lambda row: f"{_WORDS[row % 40].capitalize()} {_WORDS[row % 30]}",
            "ctx_a": SHORT,
            "ctx_b": lambda row: f"{_WORDS[row % 40]} then",
            "ctx": lambda row: f"{at(SHORT, row)} {_WORDS[row % 40]} then",
            "endings": FOUR,
            "split": ["train"],
            "label": ["3", "0", "1", "2"],
        },
        "multiple-choice",
        {"context": "ctx", "choices": "endings", "label": "label"},
    ),
    Shape(
        "ARC",
        {
            "id": lambda row: f"Mercury_SC_{row}",
            "question": QUESTION,
            "choices": lambda row: {"text": FOUR(row), "label": ["A", "B", "C", "D"]},
            "answerKey": ["C", "A", "B", "D"],
        },
        "multiple-choice",
        {"question": "question", "choices": "choices", "label": "answerKey"},
    ),
    Shape(
        "CommonsenseQA",
        {
            "id": lambda row: f"075e483d21c29a511267ef62bedc{row:04d}",
            "question": QUESTION,
            "question_concept": lambda row: _WORDS[row % 40],
            "choices": lambda row: {"label": ["A", "B", "C", "D"], "text": FOUR(row)},
            "answerKey": ["A", "B", "D"],
        },
        "multiple-choice",
        {"question": "question", "choices": "choices", "label": "answerKey"},
    ),
    Shape(
        "PIQA",
        {"goal": QUESTION, "sol1": SHORT, "sol2": OTHER, "label": BINARY},
        "multiple-choice",
        {"question": "goal", "label": "label"},
    ),
    Shape(
        "Tweets of airlines",
        {
            "tweet_id": lambda row: 570306133677760513 + row * 977,
            "airline_sentiment": ["neutral", "positive", "negative"],
            "airline_sentiment_confidence": number(0.3, 1, 4),
            "negativereason": lambda row: ["Late Flight", "Lost Luggage", "Can't Tell"][row % 3] if row % 4 else "",
            "airline": ["Virgin America", "United", "Delta", "US Airways"],
            "airline_sentiment_gold": [""],
            "name": NAME,
            "retweet_count": number(0, 2),
            "text": SHORT,
            "tweet_created": DATE,
            "tweet_location": lambda row: ["San Francisco", "Boston", "", "London"][row % 4],
            "user_timezone": ["Eastern Time (US & Canada)", "Pacific Time", "Quito"],
        },
        CLASS,
        _one("airline_sentiment", "text"),
        ".csv",
    ),
    Shape(
        "Financial PhraseBank",
        {"sentence": lambda row: f"Oy Näköala {at(SHORT, row)}", "label": ["neutral", "positive", "negative"]},
        CLASS,
        _one("label", "sentence"),
        ".csv",
        "cp1252",
    ),
    Shape(
        "UTF-16",
        {"Text": lambda row: f"Größe {at(SHORT, row)}", "Label": ["gut", "schlecht"]},
        CLASS,
        _one("Label", "Text"),
        ".csv",
        "utf-16",
    ),
    Shape("clickbait", {"headline": TITLE, "clickbait": BINARY}, CLASS, _one("clickbait", "headline"), ".csv"),
    Shape(
        "SMS Spam",
        {"v1": ["ham", "ham", "spam"], "v2": lambda row: f"£{row} {at(SHORT, row)}", "": [""]},
        CLASS,
        _one("v1", "v2"),
        ".csv",
        "cp1252",
    ),
    Shape(
        "hate speech",
        {
            "id": ID,
            "count": [3, 3, 6],
            "hate_speech": number(0, 3, seed=1),
            "offensive_language": number(0, 4, seed=2),
            "neither": number(0, 3, seed=3),
            "class": [2, 1, 1, 0],
            "tweet": SHORT,
        },
        CLASS,
        _one("class", "tweet"),
        ".csv",
    ),
    Shape("poem sentiment", {"id": ID, "verse_text": SHORT, "label": [1, 2, 0, 3]}, CLASS, _one("label", "verse_text")),
    Shape(
        "UltraFeedback",
        {"prompt": QUESTION, "chosen": CHAT, "rejected": CHAT, "score_chosen": number(1, 9, 1)},
        "refuse",
    ),
    Shape(
        "movies",
        {
            "title": lambda row: f"The {_WORDS[row % 40].capitalize()} {_WORDS[row % 30].capitalize()}",
            "overview": LONG,
            "genres": [["Drama"], ["Comedy", "Drama"], ["Action"]],
        },
        CLASS,
        _pair("overview", "title", "genres"),
    ),
    Shape(
        "wine reviews",
        {
            "id": ID,
            "country": ["Italy", "Portugal", "US"],
            "description": LONG,
            "designation": NAME,
            "points": number(80, 100),
            "price": number(8, 90, seed=4),
            "province": ["Douro", "Oregon", "Sicily"],
            "taster_name": ["Kerin O'Keefe", "Roger Voss"],
            "title": TITLE,
            "variety": ["Pinot Noir", "White Blend", "Riesling"],
        },
        CLASS,
        {**_pair("description", "title", "points"), "problem_type": "regression"},
        ".csv",
    ),
    Shape(
        "Banking77", {"text": SHORT, "label": lambda row: row % 25, "label_text": NAME}, CLASS, _one("label", "text")
    ),
    Shape(
        "few rows of each intent",
        {"utterance": SHORT, "intent_id": lambda row: row % 40},
        CLASS,
        _one("intent_id", "utterance"),
    ),
    Shape(
        "disaster tweets",
        {
            "id": ID,
            "keyword": ["ablaze", "body%20bag", "crush"],
            "location": ["Birmingham", "Est. September 2012", "", "AFRICA"],
            "text": SHORT,
            "target": BINARY,
        },
        CLASS,
        _one("target", "text"),
        ".csv",
    ),
    Shape(
        "SNLI as published",
        {
            "annotator_labels": [["neutral", "entailment"], ["contradiction", "neutral"]],
            "gold_label": ["neutral", "entailment", "contradiction"],
            "pairID": lambda row: f"3416050480.jpg#{row}r1n",
            "sentence1": SHORT,
            "sentence1_parse": lambda row: f"(ROOT {' (NN '.join(at(SHORT, row).split())})",
            "sentence2": OTHER,
        },
        "ask",
        _pair("sentence1", "sentence2", "gold_label"),
        first=CLASS,
    ),
    Shape(
        "OpenAssistant's messages",
        {
            "message_id": lambda row: f"6ab24d72-0181-4594-a9cd-deaf170242{row}",
            "created_date": lambda row: f"2023-02-05T14:23:{row:02d}",
            "text": LONG,
            "role": ["prompter", "assistant"],
            "lang": ["en", "es"],
            "review_count": [3, 2, 4],
        },
        "ask",
        first=CLASS,
    ),
    Shape("text only", {"text": LONG}, LM, {"text": "text"}),
    Shape(
        "texts of a corpus",
        {"id": CODE, "url": lambda row: f"https://example.org/{row}", "text": LONG, "lang": ["en", "de"]},
        LM,
        {"text": "text"},
    ),
    Shape(
        "two texts, any names", {"one": SHORT, "two": OTHER}, "ask", {"prompt": "one", "completion": "two"}, first=LM
    ),
    Shape(
        "three texts and a label",
        {"claim": SHORT, "evidence": OTHER, "source_text": LONG, "label": [0, 1, 2]},
        "ask",
        {"label": "label"},
        first=CLASS,
    ),
    Shape(
        "several numbers",
        {
            "comment": LONG,
            "severity": number(0, 1, 3),
            "threatening": number(0, 1, 3, 2),
            "insulting": number(0, 1, 3, 3),
        },
        "ask",
        {"text": "comment"},
        first=CLASS,
    ),
)
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
