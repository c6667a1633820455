"""Mixtures of experts: names of their weights, the router loss, and the tokens of each expert."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Llama4TextConfig

from fulltune.errors import FulltuneError, RecipeError, SetupError
from fulltune.lightning import prepare
from fulltune.models import save
from fulltune.models.base import Base
from fulltune.models.experts import recording, watch
from fulltune.models.load import load_model
from fulltune.models.shapes import check_model
from fulltune.predict import load_predictor
from fulltune.recipe.fields import Recipe
from fulltune.recipe.model import ModelBlock
from fulltune.records.training import Outcome
from fulltune.report.run.about_training import training_facts
from fulltune.train.loop.parts import ExpertLoad
from tests import tiny
from tests.cases import others_long
from tests.contract.command import fulltune
from tests.train import runs

MIXTURE = "qwen3_moe"
TRAIN: dict[str, Any] = {"max_steps": 6, "micro_batch_size": 2, "logging_steps": 1, "save_steps": 2}


def trained(folder: Path, kind: str, **options: Any) -> Any:
    model = tiny.save_model(folder / "model", kind) if not (folder / "model").exists() else folder / "model"
    with runs.without_tracing():
        return runs.run(folder, model, tiny.chat_rows(), task="causal-lm", train=TRAIN, options=options)


@pytest.mark.parametrize("kind", others_long(tiny.MIXTURES, MIXTURE))
def test_checkpoint_has_the_trained_names_and_the_model_the_original_ones(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = list[dict[str, torch.Tensor]]()
    monkeypatch.setattr(
        "fulltune.train.worker.attempt.load_best_weights", _noting(checkpoints, tmp_path / "run" / "checkpoints")
    )
    outcome = trained(tmp_path, kind).outcome
    folder = tmp_path / "run" / "models" / "full"
    final = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(final.named_parameters())
    assert checkpoints[-1].keys() == weights.keys()
    assert [name for name, one in weights.items() if not torch.equal(one, checkpoints[-1][name])] == []
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "model/model.safetensors").keys()
    assert outcome.parameter_changes.num_tensors_changed == len(weights)
    save.save_in_parts(final, tmp_path / "parts", lambda name: weights[name])
    whole, parts = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "parts"))
    assert whole.keys() == parts.keys()
    assert [name for name, one in whole.items() if not torch.equal(one, parts[name])] == []


def _noting(checkpoints: list[dict[str, torch.Tensor]], folder: Path) -> Any:
    """`load_best_weights`, after it noted the newest checkpoint's tensors."""
    from fulltune.train.worker.best import load_best_weights

    def noted(*arguments: Any) -> Any:
        newest = max(folder.rglob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        checkpoints.append(load_file(newest / "model.safetensors"))
        return load_best_weights(*arguments)

    return noted


def test_broken_run_goes_on_to_the_same_weights_router_losses_and_counts(tmp_path: Path) -> None:
    unbroken = trained(tmp_path / "unbroken", MIXTURE).outcome
    with pytest.raises(FulltuneError):
        trained(tmp_path / "broken", MIXTURE, listener=runs.at_step(5, runs.fail))
    resumed = trained(tmp_path / "broken", MIXTURE).outcome
    one, other = (runs.final_weights(tmp_path / name) for name in ("unbroken", "broken"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert resumed.expert_tokens == unbroken.expert_tokens
    curves = [
        {line["step"]: (line["loss"], line["router_loss"]) for line in runs.events(tmp_path / name, "train")}
        for name in ("unbroken", "broken")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6


class Case:
    """A mixture of experts, a padded batch, and the part of a Trainer that balances its experts."""

    def __init__(self, folder: Path, kind: str = MIXTURE) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(tiny.save_model(folder, kind)).train()
        watch(self.model)
        self.warnings = list[str]()
        trainer: Any = SimpleNamespace(
            args=SimpleNamespace(device=torch.device("cpu")),
            is_in_train=True,
            accelerator=SimpleNamespace(num_processes=1, reduce=lambda sums, reduction: sums),
        )
        journal: Any = SimpleNamespace(warn=self.warnings.append)
        self.trainer = trainer
        self.load = ExpertLoad(journal, trainer, self.model)
        tokens = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        self.batch["attention_mask"][1, 8:] = 0

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: one.grad.clone() for name, one in self.model.named_parameters() if one.grad is not None}
        self.model.zero_grad()
        return found

    def router_gradient(self, share: float = 1.0) -> torch.Tensor:
        with recording() as routing:
            self.logits = self.model(**self.batch, use_cache=False).logits
        added = self.load.after_pass(routing, self.batch["attention_mask"], share)
        assert isinstance(added, torch.Tensor)
        return added

    def end_epoch(self, epoch: float) -> None:
        given: Any = (SimpleNamespace(world_size=1), SimpleNamespace(epoch=epoch), None)
        self.load.on_step_end(*given)
        self.load.on_epoch_end(*given)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", others_long(tiny.MIXTURES, "gpt_oss"))
def test_gradient_of_the_router_loss_is_that_of_transformers(tmp_path: Path, kind: str, recomputed: bool) -> None:
    case = Case(tmp_path / "model", kind)
    labels = case.batch["input_ids"].masked_fill(case.batch["attention_mask"] == 0, -100)
    theirs = case.model(**case.batch, labels=labels, output_router_logits=True, use_cache=False)
    theirs.loss.backward()
    expected = case.gradients()
    if recomputed:
        case.model.activation_checkpointing_enable()
    added = case.router_gradient()
    assert added.item() == 0
    (case.model.loss_function(case.logits, labels, case.model.config.vocab_size) + added).backward()
    for name, gradient in case.gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)
    coefficient = case.model.config.router_aux_loss_coef
    assert case.load.logged()["router_loss"] == pytest.approx(coefficient * theirs.aux_loss.item())
    case.end_epoch(0.5)
    # Recomputed blocks count no token twice, and padding counts nowhere.
    assert case.load.tokens.sum(dim=1).tolist() == [20 * 2] * 2


def test_micro_batches_weigh_by_their_share_of_the_step(tmp_path: Path) -> None:
    case = Case(tmp_path / "model")
    case.router_gradient().backward()
    whole = case.gradients()["model.layers.0.mlp.gate.weight"]
    alone = case.load.logged()["router_loss"]
    for share in (0.25, 0.75):
        case.router_gradient(share).backward()
    torch.testing.assert_close(case.gradients()["model.layers.0.mlp.gate.weight"], whole)
    assert case.load.logged()["router_loss"] == pytest.approx(alone)
    assert case.load.logged() == {}


def test_experts_without_a_token_in_an_epoch_are_named_and_counted(tmp_path: Path) -> None:
    case = Case(tmp_path / "model")
    with torch.no_grad():
        for layer in case.model.model.layers:  # no token prefers experts 0 and 1
            layer.mlp.gate.weight[:2], layer.mlp.gate.weight[2:] = 0, 0
            layer.mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[1], out[2] % 2 + 2))
    case.router_gradient()
    case.end_epoch(0.5)  # ends within an epoch
    assert case.warnings == []
    case.router_gradient()
    case.end_epoch(1.0)
    assert len(case.warnings) == 1
    assert "epoch 1: 4 of 8 experts (0 of layer 0, 1 of layer 0, 0 of layer 1 and 1 more)" in case.warnings[0]
    tokens = case.load.tokens.tolist()
    outcome = Outcome(status="done", reason="", trial="full", attempt=1, expert_tokens=tokens)
    run: Any = SimpleNamespace(plan=None, num_choosing_answers=0)
    facts = dict(training_facts(run, outcome))
    assert "4 of 8 experts" in facts["tokens of each expert"]
    assert "an even share is 25.0%" in facts["tokens of each expert"]
    state = case.load.state()
    other = Case(tmp_path / "model").load
    other.resume(state)
    assert torch.equal(other.tokens, case.load.tokens)


def test_mixtures_that_cannot_be_trained_are_refused(tmp_path: Path) -> None:
    def check(folder: Path, **train: Any) -> None:
        values = {"model": str(folder), "task": "causal-lm", "data": {"train": "a.jsonl"}, "train": train}
        recipe = Recipe.model_validate(values)
        check_model(recipe, Base.from_block(recipe.model, "causal-lm"))

    fused = tiny.save_model(tmp_path / "fused", MIXTURE)
    check(fused)
    with pytest.raises(SetupError, match=r"DeepSpeed has not been tried with mixtures of experts; set train.placement"):
        check(fused, placement="zero3", num_processes=2)
    with pytest.raises(SetupError, match=r"train.placement: zero2: DeepSpeed has not .* set train.placement: stream"):
        check(fused, placement="zero2", offload="optimizer")  # FSDP2 needs several processes
    apart = Llama4TextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_local_experts=4)
    apart.save_pretrained(tmp_path / "apart")
    with pytest.raises(SetupError, match="Llama4ForCausalLM has no tensors that hold all experts of a layer"):
        check(tmp_path / "apart")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", others_long(tiny.MIXTURES, MIXTURE))
def test_file_is_not_mapped_beside_the_experts_made_of_it(tmp_path: Path, kind: str) -> None:
    folder = tiny.save_model(tmp_path / "model", kind)
    model = load_model(Base.from_block(ModelBlock(name=str(folder)), "causal-lm"), {}, head_is_new=False)
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert [name for name, one in model.state_dict().items() if not torch.equal(one, expected[name])] == []


def test_lightning_would_leave_the_router_loss_out(tmp_path: Path) -> None:
    model, rows = tiny.save_model(tmp_path / "model", MIXTURE), tiny.write_jsonl(tmp_path / "r.jsonl", tiny.chat_rows())
    recipe = tiny.write_recipe(tmp_path / "r.yaml", model, rows, task="causal-lm", output=str(tmp_path))
    with runs.without_tracing(), pytest.raises(RecipeError, match="only 'fulltune run' trains a mixture of experts"):
        prepare(recipe)


@pytest.mark.long
def test_lora_trains_and_finds_the_experts_again(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", MIXTURE)
    with runs.without_tracing():
        method = {"kind": "lora", "rank": 2, "learning_rate": 1e-2}
        rows = tiny.chat_rows()
        reached = runs.run(tmp_path, model, rows, until="evaluate", task="causal-lm", method=method, train=TRAIN)
    [folder] = (tmp_path / "run" / "models").iterdir()
    saved = {name: one for name, one in load_file(folder / "adapter_model.safetensors").items() if "experts" in name}
    assert any(bool(one.any()) for name, one in saved.items() if "lora_B" in name)
    loaded = [one for name, one in load_predictor(folder).model.named_parameters() if "experts" in name]
    assert [name for name, one in saved.items() if not any(torch.equal(one, other) for other in loaded)] == []
    assert reached.scores[-1].metrics


def test_plan_for_gpus_shares_experts_out_without_deepspeed(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 1024}
    tokenizer = tiny.usual_tokenizer(MIXTURE)
    tiny.config(MIXTURE, tokenizer, **shape, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = tiny.write_recipe(tmp_path / "r.yaml", tmp_path / "model", "rows.jsonl", task="causal-lm", train={})
    words = ("plan", recipe, "--rows", "1000", "--tokens", "64", "--for", "2x A100-80GB", "--json")
    with runs.without_tracing():
        result = fulltune(*words, "--set", "train.device=auto", "--set", "train.precision=auto")
    assert result.code == 0, result.err
    names = {option["name"] for option in json.loads(result.out)["survey"]["placements"]}
    assert "FSDP2" in names
    assert not any("ZeRO" in name for name in names)
