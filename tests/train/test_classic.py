"""The classic script: names of transformers 3 and 4, guards, dry-run step, and the loss under gradient accumulation."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import fulltune
from fulltune.classic import FulltuneNotice, Trainer, TrainingArguments
from fulltune.classic.arguments import INSIDE, OLD_NAMES, RENAMED, SWITCHES
from fulltune.classic.dry_run import longest_rows
from fulltune.errors import GuardStop, SetupError
from tests import tiny

SIGNAL = ("good", "bad")
FILLER = [f"w{number}" for number in range(20)]
QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|endoftext|>", "<unk>", *SIGNAL, *FILLER]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token="<unk>")
    result.pad_token = result.eos_token
    return result


def tiny_config(tokenizer: Any, **changes: Any) -> GPT2Config:
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(**{"vocab_size": len(tokenizer), **size, **dropout, **ends, **changes})


def tiny_model(tokenizer: Any, kind: Any = GPT2ForSequenceClassification, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(tiny_config(tokenizer, **{"num_labels": 2, **changes}))


def rows(tokenizer: Any, count: int, seed: int = 0, **labels: Any) -> Dataset:
    """The one word of `SIGNAL` in a text decides its label; one third is bad."""
    draw = np.random.default_rng(seed)
    texts, classes = [], []
    for number in range(count):
        label = int(number % 3 == 0)
        words = list(draw.choice(FILLER, size=int(draw.integers(3, 12))))
        words.insert(int(draw.integers(len(words))), SIGNAL[label])
        texts.append(" ".join(words))
        classes.append(label)
    dataset = Dataset.from_dict({"text": texts, "label": classes})
    return dataset.map(lambda row: tokenizer(row["text"]), batched=True)


def accuracy(prediction: Any) -> dict[str, float]:
    logits, labels = prediction
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same_weights(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    for name, value in first.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance, rtol=0.0, msg=lambda text, n=name: f"{n}: {text}"
        )


def notices(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if issubclass(warning.category, FulltuneNotice)]


@pytest.fixture
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield recorded


# ---- the script -----------------------------------------------------------------------------------------------------


def test_classic_script_on_planted_signal_beats_majority_and_tells_each_change_once(
    tokenizer: Any, tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    model = tiny_model(tokenizer)
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        overwrite_output_dir=True,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        num_train_epochs=4,
        weight_decay=0.01,
        fp16=True,
        no_cuda=True,
        warmup_ratio=0.1,
        group_by_length=True,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        logging_dir=str(tmp_path / "logs"),
        save_total_limit=1,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(tokenizer, 192),
        eval_dataset=rows(tokenizer, 96, seed=1),
        tokenizer=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.95  # the majority has 2/3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = GPT2ForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.pad_token_id == tokenizer.pad_token_id
    assert trainer.moved is not None
    assert trainer.moved.share > 0.99
    assert not list((tmp_path / "out").glob("_fulltune*"))
    texts = notices(caught)
    old = ["overwrite_output_dir", "evaluation_strategy", "fp16", "no_cuda", "warmup_ratio", "group_by_length"]
    old += ["logging_dir", "Trainer(tokenizer"]
    for name in old:
        assert len([text for text in texts if text.startswith(name)]) == 1, (name, texts)
    assert len(texts) == len(old), texts


def unpadded_gpt2(tokenizer: Any, folder: Path, kind: Any = GPT2LMHeadModel) -> Path:
    """A folder as `gpt2` is: a language model that knows no padding token, nor does its tokenizer."""
    tiny_model(tokenizer, kind).save_pretrained(folder)
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=tokenizer.eos_token).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("padding", [False, "max_length"])
def test_script_with_the_import_changed_and_nothing_else_trains_as_with_a_tokenizer(
    padding: Any, tokenizer: Any, tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    folder = unpadded_gpt2(tokenizer, tmp_path / "gpt2")
    cut = {"truncation": True, "max_length": 16, "padding": padding}
    train, val = (
        rows(tokenizer, n, seed).map(lambda row: tokenizer(row["text"], **cut)) for n, seed in ((48, 0), (24, 1))
    )

    def script(**settings: Any) -> Any:
        torch.manual_seed(0)  # the head is new
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=2)
        for param in model.parameters():
            param.requires_grad = True
        args = TrainingArguments(
            output_dir=str(tmp_path / "results"),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            learning_rate=5e-3,
            weight_decay=0.01,
            warmup_steps=2,
            gradient_accumulation_steps=4,
            fp16=True,
            evaluation_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=val, **settings)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        return trainer

    left_out = script()
    words = {text.split(" ")[0] for text in notices(caught)}
    assert words == {"the", "fp16=True:", "evaluation_strategy='epoch'", *(() if padding else ("no",))}, notices(caught)
    assert "which classification needs; token 0 is used (the model's end token)" in "".join(notices(caught))
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").config
    assert config.pad_token_id == tokenizer.pad_token_id
    handed_over = script(processing_class=tokenizer)
    assert_same_weights(weights(left_out.model), weights(handed_over.model))


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (GPT2ForSequenceClassification, {}, 0),  # the end token
        (GPT2ForSequenceClassification, {"eos_token_id": 50256}, None),  # not in this model's vocabulary
        (GPT2LMHeadModel, {}, None),  # needs none
    ],
)
def test_missing_padding_token_is_the_model_s_end_token(
    kind: Any, config: dict[str, Any], expected: int | None, tokenizer: Any, tmp_path: Path
) -> None:
    model = kind.from_pretrained(unpadded_gpt2(tokenizer, tmp_path / "model", kind))
    for name, value in config.items():
        setattr(model.config, name, value)
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **QUIET))
    assert model.config.pad_token_id == expected
    own = transformers.DataCollatorWithPadding(tokenizer)
    with_own = Trainer(model=kind(tiny_config(tokenizer)), args=trainer.args, data_collator=own)
    assert with_own.data_collator is own
    assert with_own.model.config.pad_token_id == tokenizer.pad_token_id


def test_decoder_reads_the_last_token_of_a_row_whichever_token_the_script_padded_with(
    tokenizer: Any, tmp_path: Path
) -> None:
    """The model's end token is another one than the script's own padding token, of which the Trainer is not told."""
    folder = unpadded_gpt2(tokenizer, tmp_path / "model", GPT2ForSequenceClassification)
    model = GPT2ForSequenceClassification.from_pretrained(folder).eval()
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **QUIET))
    ids = tokenizer("good w1 w2")["input_ids"]
    batch = trainer.data_collator([dict(tokenizer("good w1 w2", padding="max_length", max_length=9))])
    torch.testing.assert_close(model(**batch).logits, model(input_ids=torch.tensor([ids])).logits)


def test_unequal_rows_of_a_language_model_are_filled_up_and_not_trained_there(tokenizer: Any, tmp_path: Path) -> None:
    folder = unpadded_gpt2(tokenizer, tmp_path / "model")
    model = GPT2LMHeadModel.from_pretrained(folder)
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), **QUIET))
    batch = trainer.data_collator([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[5, 6, 7], [8, -100, -100]],
    }
    tensors = [{"input_ids": torch.tensor([1] * n), "labels": torch.tensor(n)} for n in (2, 1)]
    batch = trainer.data_collator(tensors)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[1, 1], [1, 0]], [2, 1])


def test_prediction_with_grouped_lengths_keeps_order_of_rows(tokenizer: Any, tmp_path: Path) -> None:
    data = rows(tokenizer, 40)
    args = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, train_sampling_strategy="group_by_length", **QUIET
    )
    model = tiny_model(tokenizer)
    ours = Trainer(model=model, args=args, processing_class=tokenizer).predict(data)
    theirs = transformers.Trainer(model=model, args=args, processing_class=tokenizer).predict(data)
    assert ours.label_ids.tolist() == data["label"][:]
    # Upstream sorts them by length (5.24); when this fails, `Trainer.predict` can go.
    assert theirs.label_ids.tolist() != data["label"][:]


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ({"evaluation_strategy": "steps", "eval_steps": 5}, "eval_strategy", "steps"),
        ({"warmup_ratio": 0.25}, "warmup_steps", 0.25),
        ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
        ({"group_by_length": False}, "train_sampling_strategy", "random"),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"include_inputs_for_metrics": True}, "include_for_metrics", ["inputs"]),
        ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ({"push_to_hub_token": "secret"}, "hub_token", "secret"),
        ({"save_safetensors": False}, "logging_nan_inf_filter", False),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter", False),
        ({"fsdp_min_num_params": 0}, "fsdp_config", None),
    ],
)
def test_arguments_with_old_name_set_new_field(
    arguments: dict[str, Any], name: str, value: Any, tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    assert getattr(args, name) == value
    texts = notices(caught)
    quiet = arguments in ({"group_by_length": False}, {"logging_nan_inf_filter": True}, {"fsdp_min_num_params": 0})
    assert len(texts) == (0 if quiet else 1), texts
    assert "secret" not in "".join(texts)


def test_old_names_are_those_that_transformers_dropped() -> None:
    today = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert not today & set(OLD_NAMES)
    new = {*RENAMED.values(), *INSIDE.values(), *(name for name, _ in SWITCHES.values())}
    assert new <= today


def test_unknown_argument_names_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"unknown argument 'learning_rte'; did you mean 'learning_rate'\?"):
        TrainingArguments(str(tmp_path), learning_rte=1e-5)
    with pytest.raises(TypeError, match="did you mean 'evaluation_strategy'"):
        TrainingArguments(str(tmp_path), evaluation_stratgy="epoch")


def test_old_and_new_name_with_different_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="evaluation_strategy='epoch' and eval_strategy='no' contradict"):
        TrainingArguments(str(tmp_path), evaluation_strategy="epoch", eval_strategy="no")
    with pytest.raises(ValueError, match="warmup_ratio: 3 is not between 0 and 1"):
        TrainingArguments(str(tmp_path), warmup_ratio=3)


def test_arguments_copied_or_parsed_keep_values_without_notices(
    tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=3e-4)
    copy = dataclasses.replace(args, activation_checkpointing=True)
    assert isinstance(copy, TrainingArguments)
    assert (copy.activation_checkpointing, copy.learning_rate) == (True, 3e-4)
    assert args.to_dict()["logging_nan_inf_filter"] is False
    parser = transformers.HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]  # of this type
    words = ["--output_dir", str(tmp_path), "--learning_rate", "3e-4", "--use_cpu", "true"]
    (parsed,) = parser.parse_args_into_dataclasses(words)
    assert (parsed.learning_rate, parsed.logging_nan_inf_filter) == (3e-4, False)
    assert notices(caught) == []


# ---- other Trainers -------------------------------------------------------------------------------------------------


def test_seq2seq_script_trains_and_generates_as_with_transformers(
    tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    tiny.save_model(tmp_path / "model", "t5", dropout_rate=0.2)
    reads = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [row["text"] for row in tiny.topic_rows(8)]
    data = Dataset.from_list([{**reads(text), "labels": reads(text[:9])["input_ids"]} for text in texts])
    shape = {"predict_with_generate": True, "generation_max_length": 6, "per_device_train_batch_size": 4}
    results, generated = [], []
    for trainer_class, config_class, name in (
        (transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments, "eval_strategy"),
        (fulltune.Seq2SeqTrainer, fulltune.Seq2SeqTrainingArguments, "evaluation_strategy"),
    ):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
        trainer = trainer_class(
            model=model,
            args=config_class(str(tmp_path / "out"), num_train_epochs=1, **{name: "epoch"}, **shape, **QUIET),
            train_dataset=data,
            data_collator=transformers.DataCollatorForSeq2Seq(reads, model),
            eval_dataset=data,
            compute_metrics=lambda predicted: generated.append(predicted.predictions) or {},
        )
        trainer.train()
        results.append(trainer)
    assert_same_weights(*(weights(one.model) for one in results))
    assert generated[0].tolist() == generated[1].tolist()
    assert results[1].moved.share > 0.9
    assert [text.split("=")[0] for text in notices(caught)] == ["evaluation_strategy"]


@pytest.mark.slow
def test_sft_script_trains_as_with_trl_and_counts_no_dry_run(
    tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    trl = pytest.importorskip("trl", reason="needs trl; pip install 'fulltune[trl]'")
    tiny.save_model(tmp_path / "model", "llama")
    texts = [{"text": "the sun shines and the rain falls " * (1 + number % 3)} for number in range(16)]
    shape = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    results = []
    for trainer_class, config_class, options in (
        (trl.SFTTrainer, trl.SFTConfig, {"activation_checkpointing": False, "bf16": False, "max_length": 64}),
        (
            fulltune.SFTTrainer,
            fulltune.SFTConfig,
            {"gradient_checkpointing": False, "bf16": False, "max_seq_length": 64},
        ),
    ):
        args = config_class(
            str(tmp_path), **{**QUIET, "logging_strategy": "steps", "logging_steps": 1}, **shape, **options
        )
        trainer = trainer_class(model=str(tmp_path / "model"), args=args, train_dataset=Dataset.from_list(texts))
        trainer.train()
        results.append(trainer)
    theirs, ours = results
    assert_same_weights(weights(theirs.model), weights(ours.model))
    for name in ("loss", "num_tokens", "mean_token_accuracy"):
        logged = [[one[name] for one in each.state.log_history if name in one] for each in results]
        assert logged[0] == logged[1], name
    assert ours.moved.share > 0.9
    assert [text.split()[0] for text in notices(caught)] == ["max_seq_length"]


def test_trl_is_asked_for_by_its_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    monkeypatch.delitem(sys.modules, "fulltune.classic.sft", raising=False)
    with pytest.raises(SetupError, match=r"pip install 'fulltune\[trl\]'"):
        _ = fulltune.SFTTrainer


# ---- guards ---------------------------------------------------------------------------------------------------------


class _BreaksAtStep(Trainer):
    """Its loss is not a number from a given step on; the signature is the one of before 4.46."""

    step = 3

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]  # as before 4.46
        loss = model(**inputs).loss
        return loss * math.nan if self.state.global_step + 1 >= self.step else loss


class _Keeps(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.after: dict[int, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after[state.global_step] = weights(model)


def test_nan_loss_is_left_out_then_stops_and_leaves_finite_weights(tokenizer: Any, tmp_path: Path) -> None:
    keeps, model = _Keeps(), tiny_model(tokenizer)
    args = TrainingArguments(str(tmp_path), max_steps=6, per_device_train_batch_size=4, **QUIET)
    data = rows(tokenizer, 32)
    trainer = _BreaksAtStep(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[keeps])
    with (
        pytest.warns(FulltuneNotice, match="the update of step 3 is skipped: the loss is nan"),
        pytest.raises(GuardStop, match="step 5, before the update: the loss is nan, and the previous 2 steps"),
    ):
        trainer.train()
    assert sorted(keeps.after) == [1, 2, 3, 4]
    assert all(bool(value.isfinite().all()) for value in weights(model).values())
    for after in (weights(model), keeps.after[3], keeps.after[4]):
        assert_same_weights(after, keeps.after[2])
    assert not list(tmp_path.glob("_fulltune*"))


def test_nan_loss_in_dry_run_stops_before_training(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(tokenizer)
    before = weights(model)
    args = TrainingArguments(str(tmp_path), max_steps=2, **QUIET)
    trainer = _BreaksAtStep(model=model, args=args, train_dataset=rows(tokenizer, 16), processing_class=tokenizer)
    trainer.step = 0
    with pytest.raises(GuardStop, match=r"dry-run step: the loss is nan on the longest batch \(8 rows of 1\d tokens\)"):
        trainer.train()
    assert_same_weights(weights(model), before)


def test_training_at_rate_zero_is_refused_because_nothing_moved(tokenizer: Any, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.0, weight_decay=0.0, **QUIET)
    trainer = Trainer(
        model=tiny_model(tokenizer), args=args, train_dataset=rows(tokenizer, 16), processing_class=tokenizer
    )
    with pytest.raises(GuardStop, match="no parameter changed"):
        trainer.train()
    assert not list(tmp_path.glob("_fulltune*"))


@pytest.mark.parametrize("more_steps", [0, 1])
def test_finished_run_that_is_started_again_finishes_and_saves(
    more_steps: int, tokenizer: Any, tmp_path: Path, caught: list[warnings.WarningMessage]
) -> None:
    """Within an epoch transformers takes one more step, at the rate where the checkpoint's schedule had ended: 0."""
    saving = {**QUIET, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 4}
    for again, max_steps in ((False, 5), (True, 5 + more_steps)):
        args = TrainingArguments(str(tmp_path / "out"), max_steps=max_steps, **saving)
        model = tiny_model(tokenizer)
        trainer = Trainer(model=model, args=args, train_dataset=rows(tokenizer, 32), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=again)
        trainer.save_model(str(tmp_path / f"saved-{again}"))
    assert trainer.state.global_step == 6
    first, second = (load_file(tmp_path / f"saved-{again}" / "model.safetensors") for again in (False, True))
    assert_same_weights(first, second)
    assert notices(caught) == []


def test_bf16_weights_at_small_rate_give_notice_that_few_moved(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model(tokenizer, initializer_range=1.0).to(torch.bfloat16)
    args = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-5, **QUIET)
    trainer = Trainer(model=model, args=args, train_dataset=rows(tokenizer, 16), processing_class=tokenizer)
    with pytest.warns(FulltuneNotice, match=r"changed \(bfloat16 weights\)"):
        trainer.train()


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_result_is_bit_identical_to_transformers_trainer_with_and_without_dry_run(
    optim: str, tokenizer: Any, tmp_path: Path
) -> None:
    results = []
    for kind, dry_run in ((Trainer, True), (Trainer, False), (transformers.Trainer, False)):
        # Dropout and shuffling show every random number that would be drawn once too often.
        model = tiny_model(tokenizer, embd_pdrop=0.2, resid_pdrop=0.2)
        args = TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=4, optim=optim, **QUIET
        )
        trainer: Any = kind(model=model, args=args, train_dataset=rows(tokenizer, 32), processing_class=tokenizer)
        trainer.dry_run = dry_run
        trainer.train()
        results.append(weights(model))
    assert_same_weights(results[0], results[1])
    assert_same_weights(results[0], results[2])


class _Rises(torch.nn.Module):
    """Its loss is larger by a factor from step 3 on; the dry run is the first call."""

    def __init__(self, model: Any, factor: float) -> None:
        super().__init__()
        self.model, self.factor, self.calls = model, factor, 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        outputs = self.model(**inputs)
        return {"loss": outputs.loss * (self.factor if self.calls > 3 else 1.0), "logits": outputs.logits}


class _OwnLoss(Trainer):
    def compute_loss(self, *positional: Any, **keywords: Any) -> Any:
        return super().compute_loss(*positional, **keywords)


@pytest.mark.parametrize(
    ("kind", "factor", "logging", "start"),
    [
        (Trainer, 50.0, "steps", "the loss diverged: before any update it was at most 0"),
        (Trainer, 2.7, "no", "the loss ended higher than it began: it was 0"),
        (Trainer, 1.0, "steps", ""),
        (_OwnLoss, 50.0, "steps", ""),
    ],
)
def test_loss_that_leaves_its_beginning_is_said_once_unless_it_is_the_script_s(
    kind: Any, factor: float, logging: str, start: str, tokenizer: Any, tmp_path: Path, caught: list[Any]
) -> None:
    options = {**QUIET, "logging_strategy": logging, "logging_steps": 1, "remove_unused_columns": False}
    args = TrainingArguments(str(tmp_path), max_steps=24, per_device_train_batch_size=8, **options)
    data = rows(tokenizer, 64).remove_columns("text").rename_column("label", "labels")
    model = _Rises(tiny_model(tokenizer, pad_token_id=tokenizer.pad_token_id), factor)
    trainer = kind(
        model=model, args=args, train_dataset=data, data_collator=transformers.DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    texts = notices(caught)
    assert trainer.state.global_step == 24  # a model of a script may compute a loss that rises for good reasons
    assert len(texts) == bool(start), texts
    assert all(text.startswith(start) for text in texts)
    assert all(text.endswith("that is too high (here 5e-05); try a tenth of it") for text in texts)


class _Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]  # of this type
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter({"input_ids": row["input_ids"], "labels": row["label"]} for row in self.data)


def test_dry_run_of_plain_rows_is_one_batch_however_many_rows_are_measured() -> None:
    lengths = [3] * 4990 + [9] * 10
    plain = [{"input_ids": [1] * length} for length in lengths]
    assert len(longest_rows(plain, 4, "input_ids")) == 4


@pytest.mark.parametrize(("threads", "hints"), [(2, 1), (1, 0)])
def test_script_on_a_busy_machine_hears_of_threads_that_contend(
    threads: int, hints: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    args = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=4, **QUIET)
    trainer = Trainer(
        model=tiny_model(tokenizer), args=args, train_dataset=rows(tokenizer, 16), processing_class=tokenizer
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("try OMP_NUM_THREADS=1" in text for text in notices(caught)) == hints


def test_dry_run_on_stream_is_skipped_with_notice(tokenizer: Any, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **QUIET)
    data = _Stream(rows(tokenizer, 16))
    trainer = Trainer(model=tiny_model(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)
    with pytest.warns(FulltuneNotice, match="no dry-run step before training: the length"):
        trainer.train()


# ---- gradient accumulation ------------------------------------------------------------------------------------------


class _OldSignature(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]  # as before 4.46
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


class _PassesOn(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **keywords: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs, **keywords)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one label": (GPT2ForSequenceClassification, {}),
    "next token": (GPT2LMHeadModel, {}),
}


def _accumulation_data(case: str, tokenizer: Any) -> Dataset:
    data = rows(tokenizer, 24).remove_columns("text")
    if case == "next token":
        # All of one length: the mean over micro batches and over the batch then agree for every correct scaling.
        data = data.map(lambda row: {"input_ids": (row["input_ids"] * 4)[:12], "attention_mask": [1] * 12})
        return data.map(lambda row: {"labels": row["input_ids"]}).remove_columns("label")
    return data


def _train(case: str, kind: Any, tokenizer: Any, folder: Path, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    model_class, changes = CASES[case]
    model = tiny_model(tokenizer, model_class, **changes)
    # SGD without clipping: Adam and clipping would hide a wrong scale.
    args = TrainingArguments(
        str(folder),
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        **QUIET,
    )
    kind(model=model, args=args, train_dataset=_accumulation_data(case, tokenizer), processing_class=tokenizer).train()
    return weights(model)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, Trainer) for case in CASES),
        ("one label", _OldSignature),
        ("next token", _PassesOn),
    ],
)
def test_accumulated_micro_batches_equal_whole_batch(case: str, kind: Any, tokenizer: Any, tmp_path: Path) -> None:
    whole = _train(case, kind, tokenizer, tmp_path, 8, 1)
    parts = _train(case, kind, tokenizer, tmp_path, 2, 4)
    assert_same_weights(whole, parts, tolerance=1e-5)


def test_upstream_trainer_with_accumulation_still_scales_the_loss_wrongly(tokenizer: Any, tmp_path: Path) -> None:
    """When this fails, transformers has repaired it and `_detect_mean_loss` can go."""
    start = weights(tiny_model(tokenizer))["score.weight"]
    whole = _train("one label", transformers.Trainer, tokenizer, tmp_path, 8, 1)["score.weight"] - start
    parts = _train("one label", transformers.Trainer, tokenizer, tmp_path, 2, 4)["score.weight"] - start
    assert float(parts.norm() / whole.norm()) > 1.5
