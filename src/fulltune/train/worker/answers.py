from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from transformers import TrainerControl, TrainerState, TrainingArguments

from fulltune.audit.texts import masked_cells
from fulltune.errors import SetupError
from fulltune.inference.answers import draw_rows, tokenised_prompts
from fulltune.inference.own_metrics import own_metric_names, own_scores
from fulltune.inference.run import Batching, GeneratedAnswer, decode_answer, generate_tokens
from fulltune.inference.store import read_original_rows
from fulltune.models import sharding
from fulltune.models.shapes import position_limit
from fulltune.recipe.tasks import compares_answers
from fulltune.records.events import Answered
from fulltune.records.plan import AnswersPlan
from fulltune.records.scores import Answer
from fulltune.stats.bootstrap import ResamplableMetric, find_metric
from fulltune.stats.choice import choose_evaluation
from fulltune.tasks import Target
from fulltune.tasks.padding import object_array
from fulltune.text import counted, format_metric
from fulltune.train.loop.inputs import AttemptInputs
from fulltune.train.loop.parts import TrainingPart
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import distributed, weights

SHOWN = 5
TEXT, UNFINISHED = "text", "unfinished"


class AnswerScorer(TrainingPart):
    """Generates answers to the same eval prompts at each evaluation, and scores them. If the run's metric compares
    answers, it also chooses the checkpoint to keep."""

    def __init__(self, inputs: AttemptInputs, trainer: FullTrainer, target: Target, sample: AnswersPlan) -> None:
        """Draw the eval rows and tokenise their prompts."""
        self.inputs, self.trainer, self.target, self.sample = inputs, trainer, target, sample
        tokenizer: Any = trainer.processing_class
        self.tokenizer = tokenizer
        task, seed = inputs.task, inputs.recipe.data.split_seed
        drawn = draw_rows(read_original_rows(inputs.data / "eval"), task, target, sample.rows, seed)
        prompts = tokenised_prompts(drawn, trainer.eval_rows, task, target, tokenizer)
        if not prompts:
            raise SetupError("evaluate.choose_rows: no eval row has a prompt to answer; remove the metric of answers")
        # Batches of prompts of similar lengths, the same at each evaluation.
        pairs = sorted(zip(drawn.values(), prompts, strict=True), key=lambda pair: len(pair[1]))
        self.rows, self.prompts = [row for row, _ in pairs], [ids for _, ids in pairs]
        config: Any = cast("Any", trainer.model).config
        limit = None if config.is_encoder_decoder else position_limit(config)
        cut = sum(len(ids) + sample.max_new_tokens > limit for ids in prompts) if limit else 0
        if cut and inputs.is_main:
            inputs.warn(
                f"evaluate.choose_rows: the beginning of {counted(cut, 'prompt')} of {len(prompts)} is cut, because "
                f"prompt and answer would exceed the model's {limit} positions; see evaluate.max_new_tokens"
            )
        self.expected = [task.answer_text(row, target) for row in self.rows]
        metric = inputs.plan.metric
        self.measure: ResamplableMetric | None = None
        """The run's metric if it compares answers, else None."""
        if compares_answers(metric):
            self.measure = find_metric(inputs.recipe.task, target, metric, inputs.plan.greater_is_better)
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.terms: np.ndarray | None = None
        """The metric's terms at each evaluation after step 0: float64 [evaluations, rows, k]."""
        self._now: np.ndarray | None = None

    def scores(self) -> Mapping[str, float]:
        """Generate and score answers on all ranks; return their metrics."""
        began = time.monotonic()
        answers, unfinished = self._generate()
        scores = dict(self.inputs.task.score_answers(answers, self.expected, self.inputs.plan.metric))
        if names := own_metric_names(self.inputs.recipe):
            own = own_scores(names, answers, self.expected, self.rows) if self.inputs.is_main else {}
            scores |= distributed.all_gather(own)[0]  # an own function may not give all ranks the same
        self._now = None if self.measure is None or self.measure.row_terms is None else self.measure.row_terms(scores)
        self.inputs.recorder.write(
            Answered(
                step=self.trainer.state.global_step,
                answers=self._shown(answers),
                rows=len(answers),
                unfinished=int(unfinished.sum()),
                took=round(time.monotonic() - began, 3),
            )
        )
        return {**self.inputs.task.metrics(scores, self.target), **{name: float(scores[name].mean()) for name in names}}

    def _generate(self) -> tuple[list[str], np.ndarray]:
        """Return the answers of all ranks in order, and whether each reached the limit of tokens."""
        arguments, size, order = self.trainer.args, self.sample.batch_size, range(len(self.prompts))
        positions, count = distributed.rows_of_rank(order, size, arguments.process_index, arguments.world_size)
        prompts = [self.prompts[position] for position in positions]
        generated = self._generate_tokens(prompts, self.sample.max_new_tokens)
        texts = [decode_answer(self.tokenizer, answer.tokens) for answer in generated]
        outputs = {TEXT: object_array(texts), UNFINISHED: np.array([not answer.has_ended for answer in generated])}
        outputs = distributed.gather_scores(outputs, positions[:count])
        return [str(text) for text in outputs[TEXT]], outputs[UNFINISHED]

    def _generate_tokens(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[GeneratedAnswer]:
        model: Any = self.trainer.model
        size, precision = self.sample.batch_size, self.inputs.plan.precision
        batching = Batching(size, precision, on_progress=self.trainer.write_heartbeat)
        with self.inputs.journal.phase_within("evaluation"):
            together = sharding.needs_all_ranks(model)
            if together and self.sample.gather_once:
                model, together = weights.copy_gathered(model), False
            return generate_tokens(model, self.tokenizer, prompts, max_new_tokens, batching, together=together)

    def answer_batch(self, max_new_tokens: int) -> tuple[int, float]:
        """Generate answers to a batch of usual prompts, repeated until they are as long as with half of an answer.

        Return the tokens of the longest answer, and the prompts' share of the tokens that were read.
        """
        first = max(0, len(self.prompts) - self.sample.batch_size) // 2
        prompts = self.prompts[first : first + self.sample.batch_size]
        more = 0 if cast("Any", self.trainer.model).config.is_encoder_decoder else self.sample.max_new_tokens // 2
        longer = [(ids * (2 + more // len(ids)))[: len(ids) + more] for ids in prompts]
        generated = self._generate_tokens(longer, max_new_tokens)
        share = sum(map(len, prompts)) / max(1, sum(map(len, longer)))
        return max((len(answer.tokens) for answer in generated), default=0), share

    def _shown(self, answers: Sequence[str]) -> tuple[Answer, ...]:
        """Return sample answers to prompts of different lengths, without secrets and personal data."""
        places = sorted({round(place) for place in np.linspace(0, len(answers) - 1, SHOWN)}) if answers else []
        prompt = self.inputs.task.prompt_text
        texts = [(prompt(self.rows[place], self.target), self.expected[place], answers[place]) for place in places]
        return tuple(Answer(text=text, expected=right, predicted=said) for text, right, said in masked_cells(texts))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Remember the scores of a step that has a checkpoint."""
        if state.global_step and self._now is not None:
            self.steps.append(state.global_step)
            self.losses.append(float(event["metrics"]["eval_loss"]))
            now = self._now[None]
            self.terms = now if self.terms is None else np.concatenate([self.terms, now])

    def chosen_step(self) -> tuple[int, float] | None:
        if self.measure is None or self.terms is None:
            return None
        chosen, _ = choose_evaluation(self.measure, list(self.terms), self.losses)
        return self.steps[chosen], self._value(chosen)

    def _value(self, evaluation: int) -> float:
        assert self.measure is not None
        assert self.measure.from_sums is not None
        assert self.terms is not None
        return float(self.measure.from_sums(self.terms[evaluation].sum(axis=0)))

    def reason_for(self, step: int | None) -> str | None:
        """Explain why the weights of `step` were kept instead of those with the best metric; None if they are the same
        or this part did not choose."""
        if self.measure is None or self.terms is None:
            return None
        chosen, best = choose_evaluation(self.measure, list(self.terms), self.losses)
        if chosen == best or self.steps[chosen] != step:
            return None
        name = self.measure.name
        highest, own = (format_metric(name, self._value(one)) for one in (best, chosen))
        return (
            f"the best {name} was {highest} at step {self.steps[best]:,}; at step {step:,} it was {own}, which differs "
            f"by less than two standard errors ({counted(len(self.rows), 'answer')}), and the loss was lower "
            f"({self.losses[chosen]:.4g} instead of {self.losses[best]:.4g})"
        )

    def state(self) -> Mapping[str, Any]:
        return {"answer_steps": self.steps, "answer_losses": self.losses, "answer_terms": self.terms}

    def resume(self, state: Mapping[str, Any]) -> None:
        self.steps, self.losses = list(state["answer_steps"]), list(state["answer_losses"])
        self.terms = state["answer_terms"]
