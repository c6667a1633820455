from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from fulltune.evaluate.scoring import WORST, Scored, Scoring
from fulltune.records.scores import Answer
from fulltune.tasks import PLACE, Row, Tokenizer, question_answering
from fulltune.tasks.question_answering import context_of, question_of

_NONE = "(no answer)"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def baseline_scorers(scoring: Scoring) -> dict[str, Callable[[], Scored]]:
    """Map names of score files to functions that score the sentence nearest to the question and, if some questions have
    no answer, an empty answer."""
    scorers = {
        "baseline-sentence": lambda: _score_baseline(scoring, "sentence nearest to the question", nearest_sentence)
    }
    if any(not accepted for accepted in _accepted_answers(scoring, _rows_by_question(scoring))):
        scorers["baseline-none"] = lambda: _score_baseline(
            scoring, "no answer to any question", lambda question, context: ""
        )
    return scorers


def score_model(scoring: Scoring, model: PreTrainedModel, tokenizer: Tokenizer) -> Scored:
    """Score a model, with one answer for all windows of a long context."""
    target, windows, texts = scoring.target, scoring.rows("test"), scoring.texts
    predictions = scoring.predict_split(model, tokenizer)
    locations = [row[PLACE] for row in texts]
    contexts = [context_of(row, target) for row in texts]
    answers = question_answering.best_answers(predictions, windows, locations, contexts)
    questions = _rows_by_question(scoring)
    predicted = [answers[place]["answer"] for place in questions]
    accepted = _accepted_answers(scoring, questions)
    numbers = {place: number for number, place in enumerate(questions)}
    question_of_window = np.array([numbers[place] for place in locations])
    # Average over windows, so that a question with a long context does not count more.
    scores = squad_scores(predicted, accepted) | {
        "loss": np.bincount(question_of_window, predictions["loss"]) / np.bincount(question_of_window)
    }
    rows, first = list(questions.values()), _first_windows(texts)
    # The questions with the highest loss among those with a wrong answer.
    wrong = [row for row in np.argsort(-scores["loss"], kind="stable") if scores["exact_match"][row] < 1]
    worst = [
        Answer(
            text=question_of(rows[row], target),
            expected=" / ".join(dict.fromkeys(accepted[row])) or _NONE,
            predicted=predicted[row] or _NONE,
            loss=float(scores["loss"][row]),
        )
        for row in wrong[:WORST]
    ]
    return scoring.make_scores(
        scoring.plan.trial,
        "trained",
        len(questions),
        metrics=scoring.estimate_metrics(scores, first) | scoring.estimate_user_metrics(predicted, accepted, first),
        worst=tuple(worst),
    )


def _score_baseline(scoring: Scoring, name: str, answer: Callable[[str, str], str]) -> Scored:
    """Score a baseline; `answer` maps a question and a context to an answer."""
    questions = _rows_by_question(scoring)
    predicted = [
        answer(question_of(row, scoring.target), context_of(row, scoring.target)) for row in questions.values()
    ]
    scores = squad_scores(predicted, _accepted_answers(scoring, questions))
    metrics = scoring.estimate_metrics(scores, _first_windows(scoring.texts))
    return scoring.make_scores(name, "baseline", len(questions), metrics=metrics)


def _rows_by_question(scoring: Scoring) -> dict[str, Row]:
    return {row[PLACE]: row for row in scoring.texts}


def _accepted_answers(scoring: Scoring, questions: Mapping[str, Row]) -> list[list[str]]:
    """Return each question's accepted answers; a question without an answer gets an empty list."""
    return [
        [text for text, _ in question_answering.accepted_answers(row, scoring.target)] for row in questions.values()
    ]


def _first_windows(texts: Sequence[Row]) -> list[int]:
    return sorted(np.unique([row[PLACE] for row in texts], return_index=True)[1].tolist())


def nearest_sentence(question: str, context: str) -> str:
    """Return the context's first sentence that shares the most words with the question."""
    wanted = set(plain_words(question))
    sentences = [sentence for sentence in _SENTENCE_END.split(context) if sentence.strip()]
    return max(sentences, key=lambda sentence: len(wanted & set(plain_words(sentence))), default="").strip()


def plain_words(text: str) -> list[str]:
    """Return the words that SQuAD's metrics compare: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def squad_scores(predicted: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Return SQuAD's exact match and F1 (0 to 1) of each answer, compared with its best accepted answer."""
    pairs = [
        [(plain_words(answer), plain_words(text)) for text in texts or [""]]
        for answer, texts in zip(predicted, accepted, strict=True)
    ]
    return {
        "f1": np.array([max(_word_f1(one, two) for one, two in row) for row in pairs]),
        "exact_match": np.array([max(float(one == two) for one, two in row) for row in pairs]),
    }


def _word_f1(answer: Sequence[str], accepted: Sequence[str]) -> float:
    if not answer or not accepted:
        return float(answer == accepted)
    return 2 * sum((Counter(answer) & Counter(accepted)).values()) / (len(answer) + len(accepted))
