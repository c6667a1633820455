"""Every method trains exactly what it says, on every kind of model, and what it saves can be loaded again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fulltune import methods, predict
from fulltune.errors import RecipeError, SetupError
from fulltune.inference.run import model_batch
from fulltune.methods import folder as folders
from fulltune.recipe.methods import LoraMethod
from fulltune.system.run_folder import RunResult
from fulltune.tasks import task_named
from fulltune.train.worker.weights import InitialWeights
from tests import tiny
from tests.cases import others_long
from tests.train import runs

STEPS = {"max_steps": 4, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}
HIDDEN, BETWEEN, LAYERS, LABELS = 32, 64, 2, 2
KINDS = ("head", "lora", "adapter", "prompt", "peft")
METHODS: dict[str, dict[str, Any]] = {kind: {"kind": kind, "learning_rate": 1e-2} for kind in KINDS} | {
    "peft": {"kind": "peft", "type": "LOHA", "learning_rate": 1e-2, "config": {"r": 4, "target_modules": "all-linear"}}
}


def tag_rows(count: int = 40) -> list[dict[str, Any]]:
    rows = []
    for row in tiny.topic_rows(count):
        words = row["text"].split()
        rows.append({"tokens": words, "tags": ["O", "B-X", *["O"] * (len(words) - 2)]})
    return rows


def written_rows(count: int = 40) -> list[dict[str, Any]]:
    return [{"source": row["prompt"], "target": row["completion"].strip()} for row in tiny.pair_rows(count)]


@dataclass(frozen=True)
class Case:
    model: str
    task: Any
    rows: Any


CASES = {
    "classifier": Case("bert", "text-classification", tiny.topic_rows()),
    "decoder": Case("llama", "causal-lm", tiny.pair_rows()),
    "writer": Case("t5", "seq2seq", written_rows()),
    "tagger": Case("bert", "token-classification", tag_rows()),
}
PAIRS = [
    *(("classifier", kind) for kind in KINDS),
    *(("decoder", kind) for kind in KINDS if kind != "head"),
    *(("writer", "lora"), ("writer", "prompt"), ("tagger", "head"), ("tagger", "adapter")),
]
SOME = others_long(PAIRS, *(pair for pair in PAIRS if pair[0] in ("classifier", "decoder")))


@dataclass(frozen=True)
class Done:
    """A run, and the model as it was in memory at its end."""

    folder: Path
    reached: RunResult
    model: Any
    before: Mapping[str, torch.Tensor]

    @property
    def model_folder(self) -> Path:
        assert self.reached.plan is not None
        return self.folder / "run" / self.reached.plan.model_folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Done]:
    """Trains a pair once."""
    made: dict[tuple[str, str], Done] = {}

    def get(name: str, kind: str) -> Done:
        if (name, kind) not in made:
            made[name, kind] = _trained(tmp_path_factory.mktemp(f"{name}-{kind}"), CASES[name], METHODS[kind])
        return made[name, kind]

    return get


def _trained(folder: Path, case: Case, method: Mapping[str, Any]) -> Done:
    model = tiny.save_model(folder / "model", case.model)
    seen: dict[str, Any] = {}
    kept = InitialWeights.__init__

    def remember(self: InitialWeights, model: Any, path: Path | None, together: bool = False) -> None:
        kept(self, model, path, together)
        state = {name: one.detach().clone() for name, one in model.named_parameters()}
        seen.update(model=model, before=state, kept=set(load_file(path)) if path else set())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialWeights, "__init__", remember)
        reached = runs.run(folder, model, case.rows, task=case.task, method=method, train=STEPS, until="evaluate")
    assert seen["kept"] == set(methods.trainable_parameters(seen["model"]))
    return Done(folder, reached, seen["model"].eval(), seen["before"])


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_method_after_four_steps_moved_equals_requires_grad(done: Any, name: str, kind: str) -> None:
    found = done(name, kind)
    now = dict(found.model.named_parameters())
    moved = {key for key, one in now.items() if not torch.equal(one.detach(), found.before[key])}
    assert moved == set(methods.trainable_parameters(found.model))
    counted = found.reached.outcome.parameter_changes
    assert counted.num_tensors_changed == counted.num_tensors_with_gradient == len(moved)
    original = load_file(found.folder / "model" / "model.safetensors")
    # Of a module that is trained whole PEFT keeps another copy, as it was before the first step: with the head's start.
    frozen = {
        plain_name(key): one.detach() for key, one in now.items() if key not in moved and ".original_module." not in key
    }
    shared = frozen.keys() & original.keys()
    assert len(shared) > 10
    assert all(torch.equal(frozen[key], original[key]) for key in shared)


def plain_name(name: str) -> str:
    """As in the pretrained model's file: without PEFT's wrappers, and without the body's name."""
    return name.replace(".base_layer", "").removeprefix("bert.")


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_saved_folder_holds_what_is_trained_and_nothing_else(done: Any, name: str, kind: str) -> None:
    found = done(name, kind)
    tensors = load_file(found.model_folder / "adapter_model.safetensors")
    values = sum(one.numel() for one in tensors.values())
    assert values == found.reached.plan.num_trainable_parameters
    assert len(tensors) == len(methods.trainable_parameters(found.model))
    assert not (found.model_folder / "model.safetensors").exists()
    assert len({file.stat().st_mode for file in found.model_folder.iterdir()}) == 1


def features(found: Done) -> list[dict[str, Any]]:
    from fulltune.inference.store import Rows

    rows = Rows(found.folder / "run" / "data" / "eval")
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    return [dict(rows[order[0]]), dict(rows[order[-1]])]


def logits(model: Any, found: Done, rows: list[dict[str, Any]]) -> torch.Tensor:
    task = task_named(found.reached.summary.task)
    batch = model_batch(found.model, task, rows, 0)
    batch.pop("labels")
    with torch.no_grad():
        given: torch.Tensor = model(**batch).logits
    return given


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_saved_folder_loaded_gives_the_same_logits(done: Any, name: str, kind: str) -> None:
    found = done(name, kind)
    expected = logits(found.model, found, features(found))
    loaded = predict.load_predictor(found.folder / "run")
    assert torch.equal(logits(loaded.model, found, features(found)), expected)
    assert loaded.notes["method"]["kind"] == kind
    assert found.reached.scores[-1].kind == "trained"


@pytest.mark.parametrize(("name", "kind"), [pair for pair in SOME if pair.values[1] in ("lora", "prompt", "peft")])
def test_saved_folder_loaded_by_plain_peft_gives_the_same_logits(done: Any, name: str, kind: str) -> None:
    found = done(name, kind)
    config = transformers.AutoConfig.from_pretrained(found.model_folder)
    loader = getattr(transformers, task_named(CASES[name].task).FACTS.auto_class)
    base = loader.from_pretrained(found.folder / "model", config=config)
    plain = peft.PeftModel.from_pretrained(base, found.model_folder).eval()
    given = logits(plain, found, features(found)[:1])
    expected = logits(found.model, found, features(found)[:1])
    cut = 20 if kind == "prompt" and name in ("decoder", "tagger") else 0  # PEFT keeps the virtual positions
    torch.testing.assert_close(given[:, cut:] if cut else given, expected, atol=1e-5, rtol=1e-4)
    assert plain.peft_config["default"].base_model_name_or_path == str(found.folder / "model")


@pytest.mark.parametrize(("name", "kind"), [("classifier", "lora"), ("decoder", "lora"), ("tagger", "head")])
def test_merged_model_is_plain_and_gives_the_same_logits(done: Any, name: str, kind: str, tmp_path: Path) -> None:
    found = done(name, kind)
    folders.merge_into_pretrained(found.model_folder, tmp_path / "merged")
    loader = getattr(transformers, task_named(CASES[name].task).FACTS.auto_class)
    plain = loader.from_pretrained(tmp_path / "merged").eval()
    expected = logits(found.model, found, features(found))
    torch.testing.assert_close(logits(plain, found, features(found)), expected, atol=1e-5, rtol=1e-4)
    row = predict.load_predictor(tmp_path / "merged")
    assert row.notes["task"] == CASES[name].task
    assert "method" not in row.notes


def test_tensors_of_another_method_are_refused(done: Any, tmp_path: Path) -> None:
    shutil.copytree(done("tagger", "adapter").model_folder, tmp_path / "model")
    other = done("tagger", "head").model_folder / "adapter_model.safetensors"
    shutil.copy(other, tmp_path / "model" / "adapter_model.safetensors")
    with pytest.raises(SetupError, match="tensors are missing or unexpected"):
        predict.load_predictor(tmp_path / "model")


# ---- resuming ----------------------------------------------------------------------------------------------------

TEN = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1}


@pytest.mark.parametrize("kind", others_long(("lora", "prompt"), "lora"))
def test_run_interrupted_and_continued_equals_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    blocks: dict[str, Any] = {"method": METHODS[kind], "train": TEN}
    whole = runs.run(tmp_path / "whole", model, tiny.topic_rows(), **blocks)
    with pytest.raises(Exception, match="a fault"):
        runs.run(
            tmp_path / "broken",
            model,
            tiny.topic_rows(),
            options={"listener": runs.at_step(5, runs.fail)},
            **blocks,
        )
    checkpoint = next((tmp_path / "broken" / "run" / "checkpoints").glob("*/checkpoint-3"))
    assert whole.plan is not None
    held = load_file(checkpoint / "model.safetensors")
    assert sum(one.numel() for one in held.values()) == whole.plan.num_trainable_parameters
    runs.run(tmp_path / "broken", model, tiny.topic_rows(), **blocks)
    one, other = (
        load_file(tmp_path / side / "run" / whole.plan.model_folder / "adapter_model.safetensors")
        for side in ("whole", "broken")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---- levers ------------------------------------------------------------------------------------------------------


def test_prompt_generation_padded_on_the_left_equals_one_by_one(done: Any) -> None:
    loaded = predict.load_predictor(done("decoder", "prompt").folder / "run")
    rows = [{"prompt": "a town 3:"}, {"prompt": "the garden and the house by the lake 17:"}]
    together = loaded.predict(rows, max_new_tokens=6)
    assert together == [*loaded.predict(rows[:1], max_new_tokens=6), *loaded.predict(rows[1:], max_new_tokens=6)]


# ---- names and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("decoder", {"kind": "head"}, "method head: causal-lm has no new head to train; use lora, adapter or full"),
        (
            "classifier",
            {"kind": "peft", "type": "prefix_tuning"},
            "method peft-prefix_tuning: type: PREFIX_TUNING does more than add modules to layers (for "
            "virtual tokens use 'kind: prompt'); supported types: ",
        ),
        (
            "classifier",
            {"kind": "peft", "type": "IA3", "config": {"target_module": ["x"]}},
            "method peft-ia3: config.target_module: IA3 has no field of this name that can be set; did you mean "
            "'target_modules'?",
        ),
    ],
)
def test_method_that_cannot_do_it_is_refused_before_the_data_are_read(
    name: str, method: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = tiny.save_model(tmp_path / "model", case.model)
    with pytest.raises(RecipeError) as caught:
        runs.run(tmp_path, model, case.rows, task=case.task, method=method)
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    assert not (tmp_path / "run" / "data").exists()


def test_matrices_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", "bert")
    with pytest.raises(
        RecipeError, match="method lora-q_proj: PEFT cannot apply the method to BertForSequenceClassification"
    ):
        runs.run(tmp_path, model, tiny.topic_rows(), method={"kind": "lora", "target_modules": ["q_proj"]}, train=STEPS)
    assert not (tmp_path / "run" / "attempts").exists()


def test_lora_without_float32_copies_gives_the_same_numbers_under_autocast(tiny_encoder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_encoder)
    applied = methods.apply_method(model, LoraMethod(kind="lora", rank=4), "text-classification")
    model.eval()
    with torch.no_grad():
        for name, parameter in methods.trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(24).reshape(2, 12) % 20 + 5
    found = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), methods.without_lora_input_casts(applied, autocast):
            logits = model(input_ids=ids).logits
        logits.float().sum().backward()
        gradients = [
            parameter.grad.clone()
            for parameter in methods.trainable_parameters(model).values()
            if parameter.grad is not None
        ]
        found.append((logits, gradients))
    (one, with_copies), (two, without) = found
    assert torch.equal(one, two)
    assert len(without) > 10
    assert all(torch.equal(a, b) for a, b in zip(with_copies, without, strict=True))
    assert all(module.cast_input_dtype_enabled for module in model.modules() if hasattr(module, "lora_A"))
