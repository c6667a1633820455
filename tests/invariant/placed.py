"""Runs of tiny models in real processes, placed in several ways, and how far their curves are from each other.

What the command does as the parent of the processes is done in this process, which saves the seconds of its start; the
processes are those of the command. Tests and `bench/placements.py` use it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from fulltune import pipeline
from fulltune.errors import InterruptedRun
from fulltune.records.events import Event, Listener, Message
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.system.hardware import num_cores
from fulltune.train.parent import spawn
from tests import tiny
from tests.contract.command import fulltune
from tests.forked_ranks import by_torchrun
from tests.invariant.test_same_curve import NO_DROPOUT, answer_rows, label_rows
from tests.near import near
from tests.train import runs

WORKER = "fulltune.train.worker.main"
TRAIN: dict[str, Any] = {
    **{"max_steps": 50, "global_batch_size": 8, "micro_batch_size": 2, "logging_steps": 1, "warmup_steps": 0},
    **{"eval_strategy": "steps", "eval_steps": 10, "save_steps": 4, "hang_timeout": "3m"},
}


def run_example(name: str, folder: Path) -> None:
    """An example's settings, with a tiny model and few steps, from the command to the report in `folder/run`; its
    training processes are those of torchrun."""
    model = tiny.save_model(folder / "model", "bert")
    example = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    changes = {"model": model, "train.num_train_epochs": 1, "evaluate.bootstrap_samples": 100}
    words = [part for setting, value in changes.items() for part in ("--set", f"{setting}={value}")]
    with by_torchrun():
        done = fulltune("run", example, "--run-folder", folder / "run", *words)
    assert done.code == 0, done.err
    assert (folder / "run" / "report.md").exists()
    assert len(runs.events(folder, "train")) == 5


@dataclass(frozen=True)
class Place:
    """Where a run's state lies, as `fsdp2:2` or `zero3:2:all` say it: placement, processes, offload."""

    name: str

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def processes(self) -> int:
        return int([*self.name.split(":"), "1"][1])

    @property
    def settings(self) -> dict[str, Any]:
        """Of the recipe's `train`."""
        found = {"placement": self.kind, "num_processes": self.processes, "oversubscribe": self.processes > num_cores()}
        offload = self.name.split(":")[2:]
        return found | ({"offload": offload[0]} if offload else {})

    @property
    def lacks(self) -> str | None:
        """What it needs and is not here."""
        needed = self.kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None
        return "DeepSpeed is not installed" if needed else None


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A tiny random model, rows for it, and what the recipe says of them."""

    kind: str
    rows: Callable[[Path], Rows]
    """Makes them; files that they name go into the folder."""
    blocks: dict[str, Any] = field(default_factory=dict)
    without_dropout: dict[str, Any] = field(default_factory=dict)
    save: Callable[..., Path] = tiny.save_model

    def model(self, folder: Path, dropout: bool) -> Path:
        """Its folder; the same one when asked again."""
        if not (folder / "config.json").exists():
            self.save(folder, self.kind, **({} if dropout else self.without_dropout))
        return folder


def save_encoder(folder: Path, config_class: str, **changes: Any) -> Path:
    """An encoder that `tests/tiny.py` does not know."""
    tokenizer = tiny.encoder_tokenizer(token_types=False)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    values = {**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tiny.POSITIONS, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(getattr(transformers, config_class)(**values))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_images(folder: Path, _: str, **changes: Any) -> Path:
    return tiny.save_image_model(folder, **changes)


def written_rows(_: Path) -> Rows:
    """Sources and targets of several lengths."""
    return [
        {
            "document": f"{number} {tiny.PLACES[number % 7]} {tiny.FOOD[number % 8]}",
            "summary": f"now we cook {tiny.FOOD[number % 8]}" + " here" * (number % 5),
        }
        for number in range(34)
    ]


def query_rows() -> list[dict[str, Any]]:
    return [
        {"query": f"{row['text']} {number}", "positive": f"{number} {row['text'][::-1]}"}
        for number, row in enumerate(label_rows())
    ]


def image_rows(folder: Path) -> Rows:
    images = tiny.write_images(folder / "images", 34)
    return [{"image": str(path), "label": path.parent.name} for path in sorted(images.glob("*/*.png"))]


RATE = {"kind": "full", "learning_rate": 3e-3}
# As in `test_same_curve`: neither a head from a probe nor large values make rounding larger than what is compared.
CLASSES: dict[str, Any] = {"method": {**RATE, "head_init": "random"}}
ANSWERS: dict[str, Any] = {"method": RATE, "task": "causal-lm"}
WRITTEN: dict[str, Any] = {"method": RATE, "task": "seq2seq"}
VECTORS: dict[str, Any] = {"method": RATE, "task": "embedding", "data": {"hard_negatives": 2}}
IMAGES: dict[str, Any] = {**CLASSES, "task": "image-classification"}
FAMILIES = {
    "encoder": Family("bert", lambda _: label_rows(), CLASSES, NO_DROPOUT),
    "decoder": Family("llama", lambda _: answer_rows(), ANSWERS),
    "encoder-decoder": Family("t5", written_rows, WRITTEN, {"dropout_rate": 0.0}),
}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32, "share_att_key": True}
MODELS = {
    "deberta": Family("DebertaV2Config", lambda _: label_rows(), CLASSES, {**NO_DROPOUT, **_DEBERTA}, save_encoder),
    "experts": Family("qwen3_moe", lambda _: answer_rows(), ANSWERS),
    "vit": Family("vit", image_rows, IMAGES, {"initializer_range": 0.02}, save_images),
    "embedding": Family("bert", lambda _: query_rows(), VECTORS, NO_DROPOUT),
}
"""Others than those of `FAMILIES`, whose blocks have other names or whose tensors are tied in other ways."""


@dataclass(frozen=True)
class Curve:
    """What a run wrote down and left; a step that was done twice is there twice."""

    losses: tuple[tuple[int, float], ...]
    norms: tuple[tuple[int, float], ...]
    scores: tuple[tuple[int, dict[str, float]], ...]
    weights: dict[str, torch.Tensor]
    outcome: Outcome
    attempts: int

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.losses]


def read(folder: Path) -> Curve:
    """Of the finished run in `folder/run`."""
    trained, scored = runs.events(folder, "train"), runs.events(folder, "eval")
    attempts = sorted((folder / "run" / "attempts").iterdir())
    return Curve(
        losses=tuple((event["step"], event["loss"]) for event in trained),
        norms=tuple((event["step"], event["grad_norm"]) for event in trained),
        scores=tuple((event["step"], event["metrics"]) for event in scored),
        weights=runs.final_weights(folder),
        outcome=Outcome.load(attempts[-1] / "outcome.json"),
        attempts=len(attempts),
    )


@dataclass(frozen=True)
class Differences:
    """The largest ones between two runs, over all steps; the norm's is a share of the norm."""

    loss: float
    norm: float
    score: float
    weight: float

    @property
    def none(self) -> bool:
        """Not one bit."""
        return not (self.loss or self.norm or self.score or self.weight)


def differences(reference: Curve, other: Curve, after: int = 0) -> Differences:
    """Between runs of the same steps, of which those up to `after` do not count."""
    assert set(other.steps) == set(reference.steps), f"steps {sorted(set(reference.steps) ^ set(other.steps))} differ"
    assert other.weights.keys() == reference.weights.keys()
    losses, norms, scores = dict(reference.losses), dict(reference.norms), dict(reference.scores)
    assert {step for step, _ in other.scores} == set(scores)
    return Differences(
        loss=max(abs(loss - losses[step]) for step, loss in other.losses if step > after),
        norm=max(abs(norm - norms[step]) / max(norms[step], 1e-6) for step, norm in other.norms if step > after),
        score=max(
            abs(value - scores[step][name])
            for step, metrics in other.scores
            if step > after
            for name, value in metrics.items()
        ),
        weight=max(
            float((one - reference.weights[name]).abs().max()) if one.numel() else 0.0
            for name, one in other.weights.items()
        ),
    )


def train(
    folder: Path,
    family: Family,
    place: Place,
    *,
    listener: Listener | None = None,
    until: pipeline.Until = "train",
    **changes: Any,
) -> None:
    """Begin a run in `folder/run`, or go on with it, in processes of its own.

    Raises:
        InterruptedRun: After SIGTERM; called again, it goes on.
    """
    dropout = changes.pop("dropout", False)
    model = family.model(folder.parent / f"{family.kind}-{'with' if dropout else 'without'}-dropout", dropout)
    blocks = {**family.blocks, "train": {**TRAIN, **place.settings, **changes}}
    options = {} if listener is None else {"listener": listener}
    with runs.without_tracing():
        pipeline.run(runs.job(folder, model, family.rows(folder.parent), options=options, **blocks), until)


def stop_at(folder: Path, family: Family, place: Place, step: int, **changes: Any) -> int:
    """Begin a run and stop it by SIGTERM at about this step; returns the step that was saved."""

    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)

    try:
        train(folder, family, place, listener=runs.at_step(step, stop), **changes)
    except InterruptedRun:
        return max(event["step"] for event in runs.events(folder, "train"))
    raise AssertionError(f"the run was over before it was stopped at step {step}")


def continued_from(folder: Path, family: Family, place: Place, **changes: Any) -> int:
    """Go on with a run to its end; returns the step from which it went on."""
    steps: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Message) and event.text.startswith("continuing from"):
            steps.append(int(event.text.rpartition(" ")[2]))

    train(folder, family, place, listener=listen, **changes)
    assert steps, "the run began anew"
    return steps[0]


@dataclass(frozen=True)
class Killed:
    """Which of the processes was killed, and after which step that it wrote down."""

    rank: int
    step: int


def kill_one(
    folder: Path, family: Family, place: Place, draw: random.Random, *steps: int, **changes: Any
) -> list[Killed]:
    """A run to its end, one of whose training processes is killed shortly after each of these steps."""
    struck: list[Killed] = []

    def kill() -> None:
        time.sleep(0.3 * draw.random())
        workers = workers_of(psutil.Process())
        if workers:
            rank = draw.randrange(len(workers))
            workers[rank].kill()
            struck.append(Killed(rank, max(event["step"] for event in runs.events(folder, "train"))))

    listeners = [runs.at_step(step, kill) for step in steps]
    train(folder, family, place, listener=lambda event: [one(event) for one in listeners], **changes)
    assert len(struck) == len(steps), "no process was there to be killed"
    return struck


def workers_of(parent: psutil.Process) -> Sequence[psutil.Process]:
    """The training processes, the first one first; torchrun is none of them."""
    found = [one for one in parent.children(recursive=True) if _is_worker(one)]
    return sorted(found, key=lambda one: int(one.environ().get("RANK", "0")))


def _is_worker(process: psutil.Process) -> bool:
    line = process.cmdline()
    return WORKER in line and spawn.LAUNCHER not in line


# ---- answers -----------------------------------------------------------------------------------------------------

CHOOSING: dict[str, Any] = {"metric": "exact_match", "choose_rows": 9, "max_new_tokens": 6, "generate_rows": 4}
NINE = replace(FAMILIES["decoder"], blocks={**ANSWERS, "evaluate": CHOOSING, "data": {"eval_fraction": 0.4}})


def assert_same_answers(folder: Path, place: str, gather_once: bool = False) -> None:
    """Generate answers in batches of two in one process, once in a folder, and in a placement, and compare them and
    the choice."""
    few: dict[str, Any] = {"max_steps": 12, "eval_steps": 4, "dropout": False}
    chosen, written = [], []
    for name, at_once in (("single", False), (place, gather_once)):
        where = folder / f"{name}-{at_once}"
        if not where.exists():
            with runs.in_this_process() if name == "single" else contextlib.nullcontext():
                train(where, NINE, Place(name), until="plan", **few)
                path = where / "run" / "plan" / "full.json"
                plan = Plan.load(path)
                assert plan.answers is not None
                answers = plan.answers.model_copy(update={"batch_size": 2, "gather_once": at_once})
                plan.model_copy(update={"answers": answers}).save(path)
                train(where, NINE, Place(name), **few)
        found = read(where)
        chosen.append((found.outcome.best_step, found.outcome.weights_reason, found.outcome.best_metric))
        written.append(
            [(event["step"], event["answers"], event["unfinished"]) for event in runs.events(where, "answers")]
        )
    assert len(written[0]) == 4
    assert written[0] == written[1]
    assert chosen[0] == near(chosen[1])
