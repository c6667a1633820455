"""The guides are true: their recipes are accepted, their commands known and run, their scripts run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pyarrow as pa
import pytest
import typer
import yaml
from pyarrow import parquet

import fulltune
from fulltune.cli.app import app
from fulltune.errors import RecipeError
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import check_recipe, load_recipe
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS
from tests import tiny
from tests.contract import command
from tests.hub import serve_hub
from tests.train.runs import in_this_process, without_tracing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "how-do-i.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in [*GUIDES, INDEX])
OTHERS = ("tensorboard", "docker", "pip", "curl", "llama-cli", "ollama")
"""Programs that are not fulltune's."""
RUN_HERE = ("init", "data", "plan", "report", "predict", "evaluate", "push")
"""Commands that a tiny model answers in a moment."""
LONG = ("--trainings", "--measure", "examples/")
"""What takes longer, in other tests."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", PROSE)]
LINES = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = list(dict.fromkeys(line for line in [*LINES, *INLINE] if re.match(r"([A-Z_]+=\S+ )*fulltune ", line)))
SCRIPTS = blocks("python")


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """The command and its arguments, as the command line reads them."""
    words = shlex.split(line, comments=True)
    _, name, *arguments = words[next(place for place, word in enumerate(words) if "=" not in word) :]
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a click group
    assert name in known, f"no command '{name}'"
    # A page shows a command by its name alone, too.
    return name, known[name].make_context(name, arguments, resilient_parsing=not arguments).params


def accepted(given: Mapping[str, Any]) -> Recipe:
    """The part of a recipe in a whole one, of the first task that takes it, in a single run or a comparison.

    Raises:
        RecipeError: None does.
    """
    problem = RecipeError("no task")
    for task, methods in itertools.product(FACTS, ({}, {"methods": ["full", "lora"]})):
        values: dict[str, Any] = {"model": "MODEL", "task": task, **methods, **given}
        values["data"] = {"train": "train.csv", **values.get("data", {})}
        try:
            return check_recipe(values, INDEX)
        except RecipeError as error:
            problem = error
    raise problem


def script(word: str) -> str:
    """The one script of the guides that has this in it."""
    [found] = [one for one in SCRIPTS if word in one]
    return found


def test_index_leads_to_every_guide() -> None:
    links = re.findall(r"^- \[(.+?)\]\(([^)]+)\)", INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE)
    questions = [question for question, _ in links]
    assert len(questions) == len(set(questions)) >= 40
    assert {target.partition("#")[0] for _, target in links} >= {f"guides/{page.name}" for page in GUIDES}


def test_blocks_of_code_are_found() -> None:
    assert "```" not in PROSE
    assert PROSE.count("`") % 2 == 0


def test_commands_are_those_of_known_programs() -> None:
    assert {shlex.split(line)[0] for line in LINES} == {*OTHERS, "fulltune"}


@pytest.mark.parametrize("text", blocks("yaml"))
def test_parts_of_recipes_are_accepted(text: str) -> None:
    accepted(yaml.safe_load(text))


@pytest.mark.parametrize("text", [one for one in INLINE if re.match(r"[a-z_.]+: ", one)])
def test_settings_in_the_text_are_accepted(text: str) -> None:
    [(name, value)] = yaml.safe_load(text).items()
    block, _, inner = name.partition(".")
    named = {"name": "MODEL"} if block == "model" else {}
    accepted({block: {**named, inner: value} if inner else value})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known_with_their_options_and_settings(line: str, tmp_path: Path) -> None:
    _, arguments = parsed(line)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "MODEL", "train.csv")
    load_recipe(recipe, arguments.get("set_") or [])


def test_names_that_are_refused_are_answered() -> None:
    for name in ("epochs", "bf16", "lora_r"):
        assert f"`{name}`" in TEXT
        with pytest.raises(RecipeError, match=rf"{name}: unknown setting; write "):
            accepted({"train": {name: 1}})


# ---- one tiny run ----------------------------------------------------------------------------------------------


def _rows() -> list[dict[str, str]]:
    """As many as `fulltune data --prove` needs."""
    names = {"weather": "ham", "food": "spam"}
    return [{"text": row["text"], "label": names[row["label"]]} for row in tiny.topic_rows(600)]


@pytest.fixture(scope="module")
def place(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the guides name, and `RUN`, which its script with a metric of one's own has made."""
    folder = tmp_path_factory.mktemp("place")
    rows = _rows()
    without_header = "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    (folder / "train.tsv").write_text(without_header, encoding="utf-8")
    (folder / "new.tsv").write_text("the sun\nthe soup\n", encoding="utf-8")
    tiny.write_csv(folder / "train.csv", rows)
    tiny.write_csv(folder / "new.csv", [{"text": row["text"]} for row in rows[:4]])
    tiny.write_csv(folder / "e2e.csv", [{"mr": row["text"], "ref": row["label"]} for row in rows])
    later = [{"text": f"later, {row['text']}", "label": row["label"]} for row in rows[:12]]
    tiny.write_jsonl(folder / "later.jsonl", later)
    tiny.write_csv(folder / "test.csv", [{"text": f"{row['text']}, too", "label": row["label"]} for row in rows[:12]])
    tiny.write_jsonl(folder / "rows.jsonl", [{"prompt": row["text"], "completion": row["label"]} for row in rows[:4]])
    table = pa.table({"text": [row["text"] for row in rows], "label": [number % 2 for number in range(len(rows))]})
    parquet.write_table(table, folder / "train.parquet")
    reviews = (folder / "train.parquet").read_bytes()
    data, steps = {"columns": ["text", "label"]}, {"max_steps": 2}
    [own] = [yaml.safe_load(one) for one in blocks("yaml") if "f1_spam" in one]
    tiny.write_recipe(folder / "recipe.yaml", tiny_encoder, "train.tsv", data=data, train=steps, **own)
    (folder / "my_metrics.py").write_text(script("f1_spam"), encoding="utf-8")
    with (
        pytest.MonkeyPatch.context() as patch,
        in_this_process(),
        without_tracing(),
        serve_hub(tmp_path_factory.mktemp("hub")) as hub,
    ):
        hub.push(
            "stanfordnlp/imdb", {f"plain_text/{split}-00000-of-00001.parquet": reviews for split in ("train", "test")}
        )
        patch.chdir(folder)
        (folder / "RUN").symlink_to(fulltune.run("recipe.yaml").folder)
        yield folder


def test_metric_of_ones_own_is_scored_and_reported(place: Path) -> None:
    assert "my_metrics:f1_spam" in (place / "RUN" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in COMMANDS
        if len(line.split()) > 2 and line.split()[1] in RUN_HERE and not any(word in line for word in LONG)
    ],
)
def test_commands_run(line: str, place: Path) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    if name == "init":
        arguments += ["--output", "written.yaml", "--force"]
    if name == "predict":
        arguments += ["--force"]
    if "--for" in arguments:
        arguments += ["--set", "train.device=auto"]
    said = command.fulltune(name, *arguments)
    assert said.code == 0, said.err


def test_file_without_header_is_answered_by_the_names_of_the_recipe(place: Path) -> None:
    said = command.fulltune("predict", "RUN", "--file", "new.tsv", "--json")
    assert said.code == 0, said.err
    assert "new.tsv: has no header line, so the columns of the train file are used: text" in said.err
    assert len(said.out.splitlines()) == 2


def test_finished_run_is_a_predictor_and_a_folder_of_transformers(place: Path) -> None:
    exec(script("load_predictor"), {})
    exec(script("import pipeline"), {})


def test_model_is_asked_in_onnx_runtime(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.fulltune(*_line("fulltune export RUN --to onnx")).code == 0
    exec(script("onnxruntime"), {})
    assert len(re.findall(r"-?\d\.\d+", capsys.readouterr().out)) == 2  # a logit for each label


def test_model_is_asked_over_http(place: Path) -> None:
    [line] = [line for line in LINES if line.startswith("curl ")]
    _, url, option, body = shlex.split(line)
    assert option == "-d"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = [sys.executable, "-m", "fulltune.cli.app", *_line("fulltune serve RUN"), "--port", str(port)]
    with subprocess.Popen(server, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}) as process:
        try:
            request = Request(url.replace(":8000", f":{port}"), body.encode())  # curl's Content-Type is that of a form
            [answer] = json.load(_answered(request))["answers"]
        finally:
            process.terminate()
    assert answer["label"] in ("ham", "spam")
    assert process.returncode == 0


def _answered(request: Request) -> Any:
    """The response of a server that may still be starting."""
    for _ in range(600):
        try:
            return urlopen(request)
        except URLError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def _line(start: str) -> list[str]:
    """The arguments of the guides' one command that is or begins with this."""
    [line] = {line for line in COMMANDS if line == start or line.startswith(f"{start} ")}
    return shlex.split(line)[1:]


@pytest.mark.long
def test_language_model_is_asked_in_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.save_model(tmp_path / "MODEL", "llama", tokenizer=tiny.smollm2_tokenizer())
    turns = [({"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}."}) for n in range(40)]
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"messages": turn} for turn in turns])
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, "train.jsonl", task="causal-lm", train={"max_steps": 1})
    with in_this_process():
        (tmp_path / "RUN").symlink_to(fulltune.run(recipe).folder)
    assert command.fulltune(*_line("fulltune export RUN --to gguf --quantize q8_0")).code == 0
    exec(script("llama_cpp_py_sync"), {})
    assert "assistant" in capsys.readouterr().out


def test_metric_of_ones_own_stops_early_in_a_script(tiny_encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    rows = [{"input_ids": [5, 6, 7], "labels": number % 2} for number in range(4)]
    names = {
        "model": AutoModelForSequenceClassification.from_pretrained(tiny_encoder),
        "train_rows": rows,
        "eval_rows": rows,
        "compute_metrics": lambda found: {"my_metric": 0.5},
    }
    for parameter in names["model"].base_model.parameters():
        parameter.requires_grad = False  # as the page has it of frozen layers
    code = script("EarlyStoppingCallback").replace(
        '"out"', f"{str(tmp_path / 'out')!r}, num_train_epochs=9, use_cpu=True"
    )
    exec(code, names)
    names["trainer"].train()
    assert names["trainer"].state.epoch == 3  # the first is the best, two more are waited for


def test_tokens_are_added_to_the_model(tiny_decoder: Path) -> None:
    [text] = [text for text in map(str, blocks("yaml")) if "new_tokens" in text]
    block = ModelBlock(**{**yaml.safe_load(text)["model"], "name": str(tiny_decoder)})
    base = Base.from_block(block, "causal-lm")
    assert load_model(base, {}, head_is_new=False).config.vocab_size == base.config.vocab_size + 2
