"""`fulltune export`: in its own runtime, each format answers as the run's model does, and an export that does not is
found and stays apart.

Models are random and trained for a few steps: answers are compared, not judged. Exports to ONNX and GGUF take seconds
each, and are long tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fulltune import api, pipeline
from fulltune import export as exporting
from fulltune.compare import run as comparing
from fulltune.export import gguf as gguf_format
from fulltune.export import hf, onnx, sentence_transformers
from fulltune.recipe.tasks import FACTS
from tests import tiny
from tests.cases import others_long
from tests.contract.command import Result, fulltune
from tests.train import runs, small_comparisons

pytestmark = pytest.mark.slow

SHARP = {"initializer_range": 0.3}
"""With the usual 0.02 all tokens of a random model are about equally likely, and a wrong weight changes little."""
NEW_TOKEN = "<new-token>"


def words(number: int) -> str:
    """Between 3 and 7 words; the same number gives the same."""
    return " ".join(tiny.PLACES[number * step % 10] for step in range(1, 4 + number % 5))


def question(number: int) -> dict[str, Any]:
    """A question about a context that is longer than a window in one row of four."""
    context = f"{'the sun shines ' * (30 if number % 4 == 0 else 1)}{words(number)} number "
    answers = {"text": [str(number)], "answer_start": [len(context)]}
    return {"context": context + str(number), "question": "which number?", "answers": answers}


TOPICS = tiny.topic_rows(40)
TEXTS = [row["text"] for row in TOPICS]
NUMBERS = range(40)
CASES: dict[str, tuple[str, str, Sequence[Mapping[str, Any]], dict[str, Any]]] = {
    # case: kind of model, task, rows, blocks of the recipe
    "labels": ("bert", "text-classification", TOPICS, {}),
    "pairs": ("bert", "text-classification", [{**row, "text_pair": words(i)} for i, row in enumerate(TOPICS)], {}),
    "pairs apart": (
        *("bert", "text-classification"),
        *([{**row, "text_pair": words(i)} for i, row in enumerate(TOPICS)], {"model": {"pairs": "apart"}}),
    ),
    "several labels": (
        *("bert", "text-classification"),
        *([{"text": text, "label": [["a"], ["a", "b"], ["b"]][i % 3]} for i, text in enumerate(TEXTS)], {}),
    ),
    "numbers": ("bert", "text-classification", [{"text": text, "label": i / 7} for i, text in enumerate(TEXTS)], {}),
    "tags": (
        *("bert", "token-classification"),
        *([{"tokens": text.split(), "tags": ["O", "B-X", *["O"] * (len(text.split()) - 2)]} for text in TEXTS], {}),
    ),
    "spans": ("bert", "question-answering", [question(i) for i in NUMBERS], {"data": {"max_length": 48, "stride": 8}}),
    "choices": (
        *("bert", "multiple-choice"),
        *([{"question": words(i), "choices": [words(i + k) for k in (1, 2, 3)], "label": i % 3} for i in NUMBERS], {}),
    ),
    "lora": ("bert", "text-classification", TOPICS, {"method": {"kind": "lora", "learning_rate": 1e-2}}),
    "adapter": ("bert", "text-classification", TOPICS, {"method": {"kind": "adapter", "learning_rate": 1e-2}}),
    "prompt": ("bert", "text-classification", TOPICS, {"method": {"kind": "prompt", "learning_rate": 1e-2}}),
    "chats": ("llama", "causal-lm", tiny.chat_rows(40), {}),
    "opt": ("opt", "causal-lm", tiny.chat_rows(40), {}),
    "summaries": (
        *("t5", "seq2seq"),
        *([{"source": row["prompt"], "target": row["completion"].strip()} for row in tiny.pair_rows(40)], {}),
    ),
    "smollm2": ("smollm2", "causal-lm", tiny.chat_rows(40), {}),
    "new tokens": (
        *("smollm2 with new tokens", "causal-lm"),
        *([{**row, "prompt": f"{row['prompt']} {NEW_TOKEN}"} for row in tiny.pair_rows(40)], {}),
    ),
    "images": ("vit", "image-classification", [], {}),
}


def save_model(folder: Path, kind: str) -> Path:
    if kind == "vit":
        return tiny.save_image_model(folder)
    if not kind.startswith("smollm2"):
        return tiny.save_model(folder, kind, **({} if kind in ("opt", "t5") else SHARP))
    tokenizer = tiny.smollm2_tokenizer()
    if kind != "smollm2":
        tokenizer.add_tokens([NEW_TOKEN])
    changes = {"max_position_embeddings": 512, "tie_word_embeddings": True, **SHARP}
    return tiny.save_model(folder, "llama", tokenizer=tokenizer, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a case's finished run; do not write into it."""
    folder = tmp_path_factory.mktemp("runs")

    def run(case: str) -> Path:
        place = folder / case.replace(" ", "-")
        if not (place / "run").exists():
            kind, task, rows, blocks = CASES[case]
            model = folder / kind.replace(" ", "-")
            if not model.exists():
                save_model(model, kind)
            blocks = {"task": task, "train": {"num_train_epochs": 1}, **blocks}
            if rows:
                runs.run(place, model, rows, until="report", **blocks)
            else:
                recipe = tiny.write_recipe(
                    place / "recipe.yaml", model, tiny.write_images(place / "rows", 40), **blocks
                )
                with runs.in_this_process():
                    pipeline.run(api.job(recipe, run_folder=place / "run", listener=lambda event: None), "report")
        return place / "run"

    return run


@pytest.fixture
def copied(finished: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same, with a copy of the run that may be changed."""
    return lambda case: shutil.copytree(finished(case), tmp_path / "copy" / "run")


def weights_of(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(run.glob("models/*/*")) if file.is_file()}


def export(run: Path, output: Path, to: str, *options: object) -> dict[str, Any]:
    """Export, check what every export must have, and return its verification."""
    before = weights_of(run)
    result = fulltune("export", run, "--to", to, "-o", output, *options)
    assert result.code == 0, result.err
    assert weights_of(run) == before
    assert not [file for file in output.parent.iterdir() if file.name.startswith(f".{output.name}")]
    verification: dict[str, Any] = json.loads((output / "verify.json").read_text(encoding="utf-8"))
    assert verification["format"] == to
    assert all(check["passed"] for check in verification["checks"])
    assert {"fulltune.json", "README.md", "config.json"} - {file.name for file in output.iterdir()} <= {"config.json"}
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "\n## Verification\n" in card
    assert card.count("\n## How to load\n") == 1
    assert all(f"| {check['name']} " in card for check in verification["checks"])
    assert str(run.parent) not in card
    return verification


def results(verification: Mapping[str, Any]) -> dict[str, str]:
    return {check["name"]: check["result"] for check in verification["checks"]}


@pytest.fixture(scope="module")
def exported(finished: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that gives the folder of a case's export in a format; do not write into it."""
    folder = tmp_path_factory.mktemp("exports")

    def output(case: str, to: str) -> Path:
        place = folder / f"{case}-{to}"
        if not place.exists():
            export(finished(case), place, to)
        return place

    return output


# ---- formats -------------------------------------------------------------------------------------------------------

ASKED = ["the soup", "rain and snow fall over the cold town in the morning", "café 😊 fog"]
"""Another number and other lengths than those of the rows that the exporter sees."""


def inputs_for(case: str, model_folder: Path) -> dict[str, torch.Tensor]:
    if case == "images":
        return {"pixel_values": torch.rand(3, 3, 16, 16)}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if case == "choices":
        texts = ([text for text in ASKED for _ in range(3)], ASKED * 3)
        batch = tokenizer(*texts, padding=True, return_tensors="pt")
        return {name: values.view(3, 3, -1) for name, values in batch.items()}
    texts = (ASKED, ASKED[::-1]) if case in ("pairs", "spans") else (ASKED,)
    return dict(tokenizer(*texts, padding=True, return_tensors="pt"))


@pytest.mark.long
@pytest.mark.parametrize(
    "case", ["labels", "pairs", "several labels", "numbers", "tags", "spans", "choices", "images", "lora"]
)
def test_onnx_graph_answers_as_the_model_for_another_batch_size_and_length(
    case: str, finished: Callable[[str], Path], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    import onnxruntime

    run, output = finished(case), exported(case, "onnx")
    verification = json.loads((output / "verify.json").read_text(encoding="utf-8"))
    assert float(results(verification)["largest relative difference of logits"]) < 1e-4
    assert verification["rows"] > 0
    for pair in verification["metrics"].values():
        assert pair["export"] == pytest.approx(pair["source"], abs=1e-3)

    folder = tmp_path / "hf"
    export(run, folder, "hf") if case == "lora" else shutil.copytree(run / "models" / "full", folder)
    model = getattr(transformers, FACTS[CASES[case][1]].auto_class).from_pretrained(folder).eval()
    inputs = inputs_for(case, folder)
    with torch.no_grad():
        expected = model(**inputs).to_tuple()
    session = onnxruntime.InferenceSession(output / "model.onnx")
    names = [one.name for one in session.get_inputs()]
    for actual, values in zip(session.run(None, {name: inputs[name].numpy() for name in names}), expected, strict=True):
        np.testing.assert_allclose(actual, values.numpy(), atol=1e-4)


@pytest.mark.parametrize("to", others_long(["hf", "onnx"], "hf"))
def test_pairs_read_apart_are_exported_and_verified(to: str, exported: Callable[[str, str], Path]) -> None:
    folder = exported("pairs apart", to)
    verification = json.loads((folder / "verify.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in verification["checks"])
    assert verification["rows"] > 0
    if to == "onnx":
        card = (folder / "README.md").read_text(encoding="utf-8").partition("## How to load\n")[2]
        code = card.partition("```python\n")[2].partition("```")[0].replace(f'"{folder.name}', f'"{folder}')
        values: dict[str, Any] = {}
        exec(code, values)  # the card's own code, for one row of two texts
        assert len(values["outputs"][0]) == 1


@pytest.mark.long
def test_int8_graph_is_judged_by_the_metric(finished: Callable[[str], Path], tmp_path: Path) -> None:
    verification = export(finished("labels"), tmp_path / "out", "onnx", "--quantize", "int8")
    assert verification["stored_as"] == "int8"
    assert "largest relative difference of logits" not in results(verification)
    assert "accuracy of the source, of the export" in results(verification)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["labels", "chats", "summaries"])
def test_hf_folder_in_another_dtype_and_in_shards_loads_in_transformers(
    case: str, dtype: str, finished: Callable[[str], Path], tmp_path: Path
) -> None:
    run = finished(case)
    export(run, tmp_path / "out", "hf", "--dtype", dtype, "--max-shard-size", "20KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in shards}
    auto = getattr(transformers, FACTS[CASES[case][1]].auto_class)
    stored = getattr(torch, dtype)
    model, trained = auto.from_pretrained(tmp_path / "out"), auto.from_pretrained(run / "models" / "full")
    assert model.dtype == stored
    for (name, weight), (other, expected) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(weight, expected.to(stored)), name
    ours, theirs = (AutoTokenizer.from_pretrained(one) for one in (tmp_path / "out", run / "models" / "full"))
    assert ours(ASKED) == theirs(ASKED)


def test_lora_is_merged_before_an_export(finished: Callable[[str], Path], tmp_path: Path) -> None:
    from fulltune import predict

    run = finished("lora")
    export(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    rows = [{"text": text} for text in ASKED]
    ours, merged = (predict.load_predictor(folder).predict(rows) for folder in (run, tmp_path / "out"))
    for mine, other in zip(ours, merged, strict=True):
        assert other["probabilities"] == pytest.approx(mine["probabilities"], abs=1e-5)


@pytest.mark.long
def test_model_of_a_comparison_is_chosen_by_its_method(tmp_path: Path) -> None:
    methods = ["base", {"kind": "full", "learning_rate": 3e-3}, {"kind": "lora", "learning_rate": 1e-2}]
    with runs.in_this_process():
        blocks: dict[str, Any] = {"compare": {"seeds": 1}, "train": {"num_train_epochs": 1}}
        comparing.run_comparison(small_comparisons.job(tmp_path / "runs", methods, **blocks), "fulltune compare", None)
    for method in ("full", "lora"):
        verification = export(tmp_path / "runs" / "run", tmp_path / "out", "hf", "--method", method)
        assert verification["rows"] > 0
        shutil.rmtree(tmp_path / "out")


def test_sentence_transformers_folder_averages_the_last_hidden_states(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    run = finished("labels")
    export(run, tmp_path / "out", "sentence-transformers")
    embeddings = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(ASKED)
    body, tokenizer = (one.from_pretrained(run / "models" / "full") for one in (AutoModel, AutoTokenizer))
    for text, embedding in zip(ASKED, embeddings, strict=True):
        with torch.no_grad():
            hidden = body.eval()(**tokenizer([text], return_tensors="pt")).last_hidden_state
        np.testing.assert_allclose(embedding, hidden[0].mean(0).numpy(), atol=1e-4)


@pytest.mark.long
def test_gguf_file_is_stored_as_chosen(
    finished: Callable[[str], Path], exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    sizes = [(exported("smollm2", "gguf") / "model.gguf").stat().st_size]
    for option, stored in (("--dtype", "bfloat16"), ("--quantize", "q8_0"), ("--quantize", "q4_k_m")):
        output = tmp_path / stored
        assert export(finished("smollm2"), output, "gguf", option, stored)["stored_as"] == stored
        assert [path.suffix for path in output.iterdir()].count(".gguf") == 1
        sizes.append((output / "model.gguf").stat().st_size)
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.long
@pytest.mark.parametrize("case", ["smollm2", "new tokens"])
def test_gguf_file_continues_texts_as_the_model_does(
    case: str, finished: Callable[[str], Path], exported: Callable[[str, str], Path]
) -> None:
    import llama_cpp_py_sync

    output, folder = exported(case, "gguf"), finished(case) / "models" / "full"
    assert sorted(path.name for path in output.iterdir()) == [
        *("Modelfile", "README.md", "fulltune.json", "model.gguf", "verify.json")
    ]
    model, tokenizer = (one.from_pretrained(folder) for one in (AutoModelForCausalLM, AutoTokenizer))
    with llama_cpp_py_sync.Llama(str(output / "model.gguf"), n_ctx=64) as llama:
        for text in (*ASKED, f"a {NEW_TOKEN} b"):
            inputs = tokenizer([text], return_tensors="pt")
            ids = inputs["input_ids"][0].tolist()
            assert llama.tokenize(text, add_special=True, parse_special=True) == ids
            written = llama.generate(text, max_tokens=8, temperature=0.0, repeat_penalty=1.0)
            with torch.no_grad():
                generated = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
            assert written == tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)


# ---- refused -------------------------------------------------------------------------------------------------------


def refused(run: Path, output: Path, *options: object, code: int = 2) -> str:
    """Return the message of an export that is refused; it leaves nothing."""
    before = sorted(output.parent.iterdir())
    result = fulltune("export", run, "-o", output, *options)
    assert (result.code, "Traceback" in result.err) == (code, False), result.err
    assert sorted(output.parent.iterdir()) == before
    assert not result.out
    return result.err


TOO_MUCH = "--quantize and --dtype cannot be combined; choose one"


@pytest.mark.parametrize(
    ("case", "options", "messages"),
    [
        ("labels", "--to tflite", ["--to tflite: expected one of hf, onnx, gguf, sentence-transformers"]),
        ("labels", "--to hf --quantize int8", ["--quantize int8: not available with --to hf, which has: none"]),
        ("labels", "--to onnx --quantize int4", ["--quantize int4: not available with --to onnx, which has: int8"]),
        ("labels", "--to onnx --dtype float16", ["--dtype float16: not available with --to onnx, which has: none"]),
        ("labels", "--to hf --max-shard-size 5XB", ["--max-shard-size: expected a size above 0"]),
        (
            "labels",
            "--to hf --dtype float8",
            ["--dtype float8: not available with --to hf, which has: float32, bfloat16, float16"],
        ),
        ("chats", "--to gguf --dtype bfloat16 --quantize q8_0", [TOO_MUCH]),
        ("labels", "--to onnx --dtype bfloat16 --quantize q8_0", ["--quantize q8_0", "--dtype bfloat16", TOO_MUCH]),
        ("chats", "--to onnx", ["--to onnx: an ONNX graph does not generate text; choose --to gguf"]),
        ("summaries", "--to gguf", ["needs a decoder-only language model, but the model is for seq2seq; see --to hf"]),
        ("tags", "--to gguf", ["but the model is for token-classification; see --to onnx"]),
        ("chats", "--to sentence-transformers", ["needs a text encoder, but the model is for causal-lm"]),
        ("images", "--to sentence-transformers", ["needs a text encoder, but the model is for image-classification"]),
        ("adapter", "--to hf", ["models/adapter: a method of kind adapter adds modules to the model and cannot be"]),
        ("prompt", "--to onnx", ["models/prompt: a method of kind prompt adds modules to the model and cannot be"]),
    ],
)
def test_what_a_format_or_a_model_does_not_have_is_refused(
    case: str, options: str, messages: Sequence[str], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    message = refused(finished(case), tmp_path / "out", *options.split())
    assert all(one in message for one in messages), message


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "messages"),
    [
        ("opt", ["converter failed for OPTForCausalLM: ", "not supported"]),
        ("chats", ["converter failed for LlamaForCausalLM: ", "pre-tokenizer"]),
    ],
)
def test_what_the_converter_does_not_know_is_named(
    case: str, messages: Sequence[str], finished: Callable[[str], Path], tmp_path: Path
) -> None:
    message = refused(finished(case), tmp_path / "out", "--to", "gguf")
    assert all(one in message for one in messages), message


def test_folder_without_the_converter_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    wrong = tmp_path / "llama.cpp"
    wrong.mkdir()
    message = refused(finished("chats"), tmp_path / "out", "--to", "gguf", "--llama-cpp", wrong)
    assert f"--llama-cpp {wrong}: contains no convert_hf_to_gguf.py" in message


@pytest.mark.parametrize("to", ["onnx", "gguf", "sentence-transformers"])
def test_missing_packages_have_one_command(
    to: str, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("onnxscript", "llama-cpp-py-sync", "sentence-transformers"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = refused(finished("labels"), tmp_path / "out", "--to", to)
    assert message.count("pip install") == 1
    assert f"missing; run: pip install 'fulltune[{to}]'" in message


def test_output_that_exists_is_refused_and_an_empty_folder_is_taken(
    finished: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name in ("file", "full"):
        message = refused(finished("labels"), tmp_path / name, "--to", "hf")
        assert f"{tmp_path / name}: already exists; choose another folder with --output" in message
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    export(finished("labels"), tmp_path / "inner" / "empty", "hf")


def test_full_disk_has_exit_code_3(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "disk_free_bytes", lambda path: 1000)
    message = refused(finished("labels"), tmp_path / "out", "--to", "hf", code=3)
    assert f"{tmp_path / 'out'}: the export needs" in message


def test_runs_that_cannot_be_verified_are_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    run = copied("labels")
    for missing in (run / "data" / "test", run / "plan" / "full.json"):
        missing.rename(tmp_path / "away")
        assert f"missing: {missing}" in refused(run, tmp_path / "out", "--to", "hf")
        (tmp_path / "away").rename(missing)
    config = run / "models" / "full" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}))
    assert "needs Python code from its repository" in refused(run, tmp_path / "out", "--to", "hf")
    shutil.rmtree(run / "models")
    assert f"{run}: no finished model here" in refused(run, tmp_path / "out", "--to", "hf")


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 75), (OSError(28, "No space left on device"), 3)])
def test_export_that_is_broken_off_leaves_nothing(
    error: BaseException,
    code: int,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_writing(monkeypatch, hf, lambda folder: raise_error(error))
    refused(finished("labels"), tmp_path / "out", "--to", "hf", code=code)


def raise_error(error: BaseException) -> None:
    raise error


# ---- planted faults ------------------------------------------------------------------------------------------------

Fault = Callable[[Path], None]
"""Corrupts the files of an export."""


def after_writing(monkeypatch: pytest.MonkeyPatch, form: Any, fault: Fault) -> None:
    """Corrupt what a format's module writes, before it is verified."""
    write = form.write

    def write_and_corrupt(source: Any, folder: Path) -> None:
        write(source, folder)
        fault(folder)

    monkeypatch.setattr(form, "write", write_and_corrupt)


def instead_of_writing(monkeypatch: pytest.MonkeyPatch, form: Any, good: Path, fault: Fault) -> None:
    """Corrupt a copy of a good export, because writing takes seconds."""

    def copy(source: Any, folder: Path) -> None:
        shutil.copytree(good, folder, dirs_exist_ok=True)
        fault(folder)

    monkeypatch.setattr(form, "write", copy)


def not_verified(run: Path, output: Path, *options: object) -> tuple[list[str], Result]:
    """Return the names of the checks that failed; the export is apart, with its verification."""
    result = fulltune("export", run, "-o", output, *options)
    assert (result.code, "Traceback" in result.err) == (5, False), result.err
    apart = output.with_name(f"{output.name}.not-verified")
    assert list(output.parent.iterdir()) == [apart]
    assert str(apart) in result.err.replace("\n", "")
    checks = json.loads((apart / "verify.json").read_text(encoding="utf-8"))["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    assert all(name in result.err for name in failed)
    return failed, result


def changed_json(name: str, **changes: Any) -> Fault:
    def corrupt(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")

    return corrupt


def changed_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Fault:
    def corrupt(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return corrupt


def swapped_rows(weights: dict[str, torch.Tensor]) -> None:
    name = next(
        name for name in weights if name.endswith(("layers.1.mlp.up_proj.weight", "layer.1.output.dense.weight"))
    )
    weights[name] = weights[name][[1, 0, *range(2, len(weights[name]))]].contiguous()


def noise(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name] = torch.randn_like(weights[name])


def one_in_bf16(weights: dict[str, torch.Tensor]) -> None:
    name = next(name for name in weights if name.endswith("layernorm.weight") or name.endswith("LayerNorm.weight"))
    weights[name] = weights[name].bfloat16()


def untied_head(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = torch.roll(weights["lm_head.weight"], 1, 0)


def with_new_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([NEW_TOKEN])
    tokenizer.save_pretrained(folder)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(tiny.DEFAULT_SYSTEM, encoding="utf-8")


def truncated(name: str) -> Fault:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


KL = "mean KL divergence, in nats"
LOGITS = "largest relative difference of logits"


@pytest.mark.parametrize(
    ("case", "fault", "check"),
    [
        pytest.param("labels", changed_weights(swapped_rows), LOGITS, id="swapped rows"),
        pytest.param("chats", changed_weights(untied_head), LOGITS, id="untied head"),
        pytest.param("labels", changed_weights(one_in_bf16), "dtype of the weights", id="a tensor in bf16"),
        pytest.param(
            "labels",
            changed_json("config.json", id2label={0: "weather", 1: "food"}, label2id={"weather": 0, "food": 1}),
            "same labels",
            id="label order",
        ),
        pytest.param("chats", other_template, "same rendered chats", id="another template"),
        pytest.param(
            "chats", changed_json("generation_config.json", eos_token_id=0), "same end tokens", id="end token"
        ),
        pytest.param("labels", with_new_tokens, "loads and runs", id="new tokens"),
    ],
)
def test_planted_fault_of_a_folder_is_found(
    case: str,
    fault: Fault,
    check: str,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_writing(monkeypatch, hf, fault)
    failed, _ = not_verified(finished(case), tmp_path / "out", "--to", "hf")
    assert check in failed


@pytest.mark.parametrize(
    ("case", "fault", "check"),
    [
        ("labels", changed_weights(noise), KL),
        ("images", changed_json("preprocessor_config.json", image_mean=[9, 9, 9]), "same processor settings"),
    ],
)
def test_planted_fault_is_found_where_rounding_is_tolerated(
    case: str,
    fault: Fault,
    check: str,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_writing(monkeypatch, hf, fault)
    failed, _ = not_verified(finished(case), tmp_path / "out", "--to", "hf", "--dtype", "bfloat16")
    assert check in failed


def test_trained_weights_that_merging_loses_are_missed(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    monkeypatch.setattr(BaseTuner, "merge_and_unload", lambda tuner: tuner.unload())
    failed, _ = not_verified(finished("lora"), tmp_path / "out", "--to", "hf")
    assert failed == [LOGITS]


def test_export_of_an_export_is_refused(exported: Callable[[str, str], Path], tmp_path: Path) -> None:
    message = refused(exported("labels", "hf"), tmp_path / "out", "--to", "hf")
    assert "is not a model of a run" in message


@pytest.mark.parametrize(
    ("case", "form", "name"),
    [
        ("labels", hf, "model.safetensors"),
        ("labels", sentence_transformers, "model.safetensors"),
        pytest.param("labels", onnx, "model.onnx", marks=pytest.mark.long),
        pytest.param("labels", onnx, "model.onnx.data", marks=pytest.mark.long),
        pytest.param("smollm2", gguf_format, "model.gguf", marks=pytest.mark.long),
    ],
)
def test_truncated_file_is_no_traceback(
    case: str,
    form: Any,
    name: str,
    finished: Callable[[str], Path],
    exported: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to = form.__name__.rpartition(".")[2].replace("_", "-")
    instead_of_writing(monkeypatch, form, exported(case, to), truncated(name))
    failed, _ = not_verified(finished(case), tmp_path / "out", "--to", to)
    assert failed == ["loads and runs"]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        pytest.param(
            changed_json("1_Pooling/config.json", pooling_mode="cls"), "largest relative difference", id="wrong pooling"
        ),
        pytest.param(with_new_tokens, "same processor settings", id="new tokens"),
    ],
)
def test_planted_fault_of_an_embedding_model_is_found(
    fault: Fault, check: str, finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_writing(monkeypatch, sentence_transformers, fault)
    failed, _ = not_verified(finished("labels"), tmp_path / "out", "--to", "sentence-transformers")
    assert any(name.startswith(check) for name in failed)


Fields = Mapping[str, Callable[[Any], Any]]
Tensors = Mapping[str, Callable[[np.ndarray], np.ndarray]]


@pytest.fixture(scope="module")
def good_file(exported: Callable[[str, str], Path]) -> Any:
    import gguf

    return gguf.GGUFReader(exported("smollm2", "gguf") / "model.gguf")


def write_changed(reader: Any, file: Path, fields: Fields, tensors: Tensors) -> None:
    """Write a GGUF file again with changed fields and tensors; a tensor that is not there starts as the embeddings."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = fields.get(field.name, lambda value: value)(field.contents())
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    data = {tensor.name: tensor.data for tensor in reader.tensors}
    for name in dict.fromkeys([*data, *tensors]):
        values = tensors.get(name, lambda values: values)(np.array(data.get(name, data["token_embd.weight"])))
        stored = gguf.GGMLQuantizationType.BF16 if values.dtype == np.uint8 else None
        writer.add_tensor(name, values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_bf16(values: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quantize(values, gguf.GGMLQuantizationType.BF16)


def first_swapped(values: np.ndarray) -> np.ndarray:
    return values[[1, 0, *range(2, len(values))]]


def normal_start(types: list[int]) -> list[int]:
    """llama.cpp repairs the end token's type by itself."""
    return [types[0], 1, *types[2:]]


ADDED_TOKEN: Fields = {
    "tokenizer.ggml.tokens": lambda tokens: [*tokens[:-1], "what is"],
    "tokenizer.ggml.token_type": lambda types: [*types[:-1], 4],  # user-defined
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("fields", "tensors", "check"),
    [
        pytest.param(
            {"tokenizer.ggml.token_type": normal_start}, {}, "special tokens that are split", id="normal token"
        ),
        pytest.param(
            {"tokenizer.chat_template": lambda text: tiny.CHATML}, {}, "same chat template", id="another template"
        ),
        pytest.param({"tokenizer.ggml.add_bos_token": lambda value: True}, {}, "same token ids", id="a second BOS"),
        pytest.param({"tokenizer.ggml.pre": lambda name: "qwen2"}, {}, "same token ids", id="another pre-tokenizer"),
        pytest.param(ADDED_TOKEN, {}, "same token ids", id="a new token"),
        pytest.param({}, {"blk.1.ffn_up.weight": first_swapped}, KL, id="swapped rows"),
        pytest.param({}, {"output.weight": lambda values: np.roll(values, 1, 0)}, KL, id="untied head"),
        pytest.param({}, {"blk.1.ffn_up.weight": in_bf16}, "other types of weights", id="a tensor in bf16"),
    ],
)
def test_planted_fault_of_a_gguf_file_is_found(
    fields: Fields,
    tensors: Tensors,
    check: str,
    good_file: Any,
    finished: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(source: Any, folder: Path) -> None:
        write_changed(good_file, folder / "model.gguf", fields, tensors)

    monkeypatch.setattr(gguf_format, "write", write)
    failed, _ = not_verified(finished("smollm2"), tmp_path / "out", "--to", "gguf")
    assert check in failed


@pytest.mark.long
def test_end_token_that_llama_cpp_does_not_know_is_found(
    exported: Callable[[str, str], Path],
    copied: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instead_of_writing(monkeypatch, gguf_format, exported("smollm2", "gguf"), lambda folder: None)
    run = copied("smollm2")
    settings = run / "models" / "full" / "generation_config.json"
    other = {**json.loads(settings.read_text(encoding="utf-8")), "eos_token_id": [2, 16]}
    settings.write_text(json.dumps(other), encoding="utf-8")
    (tmp_path / "exports").mkdir()
    failed, result = not_verified(run, tmp_path / "exports" / "out", "--to", "gguf")
    assert failed == ["end tokens at which llama.cpp goes on"]
    assert AutoTokenizer.from_pretrained(run / "models" / "full").convert_ids_to_tokens(16) in result.err
