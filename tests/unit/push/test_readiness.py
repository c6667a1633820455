"""Each planted fault of a model folder is found, and a sound folder has none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulltune import push
from fulltune.records.training import Check
from tests import tiny


def checks_of(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in push.check_readiness(folder, push.choose_files(folder))}


def problems(folder: Path) -> dict[str, str]:
    return {name: check.result for name, check in checks_of(folder).items() if not check.passed}


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.fixture
def folder(run: Path) -> Path:
    return run / "models" / "full"


def write_notes(folder: Path, task: str) -> None:
    notes = {"task": task, "problem_type": "any", "columns": {}, "labels": [], "joint": ""}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")


def save_model(tmp_path: Path, kind: str) -> Path:
    folder = tiny.save_model(tmp_path / "model", kind)
    write_notes(folder, "seq2seq" if kind in tiny.WRITERS else "causal-lm")
    return folder


def split(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def test_sound_folder_has_no_problem(folder: Path) -> None:
    found = checks_of(folder)
    assert problems(folder) == {}
    assert {name: check.result for name, check in found.items()} == {
        "files": "complete",
        "local paths": "none",
        "architecture": "LlamaForCausalLM",
        "dtype": "torch.float32",
        "tied head": "no",
        "chat template": "renders 3 chats",
        "end tokens": "<|im_end|>",
    }
    split(folder)
    assert problems(folder) == {}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "t5", "gpt_neox", "bart"])
def test_families_with_and_without_tied_heads_have_no_problem(tmp_path: Path, kind: str) -> None:
    folder = save_model(tmp_path, kind)
    assert problems(folder) == {}
    assert "end tokens" in checks_of(folder)


def plant_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def plant_truncated_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def plant_truncated_tokenizer(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 5000)


def plant_missing_part(folder: Path) -> None:
    split(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def plant_missing_index(folder: Path) -> None:
    split(folder)
    (folder / "model.safetensors.index.json").unlink()


def plant_link(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


@pytest.mark.parametrize(
    ("plant", "result"),
    [
        (plant_pickle, "model.safetensors is missing"),
        (plant_truncated_weights, "model.safetensors is truncated"),
        (plant_truncated_tokenizer, "tokenizer.json is truncated"),
        (plant_missing_part, "model-00002-of-"),
        (plant_missing_index, "model.safetensors is missing"),
        (plant_link, "model.safetensors is missing"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is truncated"),
    ],
)
def test_incomplete_folder_is_found(folder: Path, plant: Callable[[Path], object], result: str) -> None:
    plant(folder)
    found = problems(folder)
    assert list(found) == ["files"]
    assert result in found["files"]


@pytest.mark.parametrize(
    ("file", "values", "check", "result"),
    [
        ("config.json", {"architectures": ["LlamaModel"]}, "architecture", "LlamaModel: expected LlamaForCausalLM"),
        ("config.json", {"architectures": ["OwnModel"]}, "architecture", "OwnModel: expected LlamaForCausalLM"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "dtype", "quantization_config"),
        ("config.json", {"tie_word_embeddings": True}, "tied head", "no: config.json differs"),
        ("generation_config.json", {"eos_token_id": 0}, "end tokens", "<|endoftext|>: add <|im_end|>"),
        ("generation_config.json", {"eos_token_id": None}, "end tokens", "none: add <|im_end|>"),
    ],
)
def test_wrong_setting_is_found(folder: Path, file: str, values: dict[str, Any], check: str, result: str) -> None:
    change(folder / file, **values)
    found = problems(folder)
    assert list(found) == [check]
    assert result in found[check]


@pytest.mark.parametrize(
    ("template", "result"),
    [
        ("{{ raise_exception('no chats here') }}", "fails (no chats here)"),
        ("{% for m in messages %}{{ m.content.missing.name }}{% endfor %}", "fails ("),
        (None, "none: copy"),
    ],
)
def test_template_that_does_not_render_is_found(folder: Path, template: str | None, result: str) -> None:
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    assert problems(folder)["chat template"].startswith(result)


def test_end_of_a_turn_is_expected_rather_than_of_a_text(folder: Path) -> None:
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert problems(folder) == {}
    change(folder / "generation_config.json", eos_token_id=0)
    assert "add <|im_end|>" in problems(folder)["end tokens"]


def test_untied_head_that_was_not_stored_is_found(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "gpt2")
    assert checks_of(folder)["tied head"].result == "yes"
    change(folder / "config.json", tie_word_embeddings=False)
    assert list(problems(folder)) == ["tied head"]


def test_fused_experts_are_found(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(1)}, folder / "model.safetensors")
    assert problems(folder) == {}  # a Llama has no experts that transformers would split
    change(folder / "config.json", model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"])
    assert problems(folder)["experts"].startswith("model.layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("base", ["/models/llama", "base"])
def test_base_model_of_this_machine_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}), encoding="utf-8")
    (tmp_path / "base").mkdir()
    assert problems(folder)["base model"].startswith(f"{base}: only here")
    change(folder / "adapter_config.json", base_model_name_or_path="acme/base")
    assert problems(folder) == {}


def test_path_in_the_card_is_found_and_an_address_is_not(folder: Path, tmp_path: Path) -> None:
    card = folder / "README.md"
    card.write_text("See https://huggingface.co/tmp/x, and/or /v1/chat/completions, `</b></i>`.", encoding="utf-8")
    assert problems(folder) == {}
    card.write_text(f"Trained on {tmp_path}/rows.csv.", encoding="utf-8")
    assert problems(folder)["local paths"].startswith(f"{tmp_path}/rows.csv")


def test_gguf_needs_a_modelfile(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert problems(tmp_path) == {"Ollama": "Modelfile: missing; write 'FROM ./model.gguf' into it"}
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\n", encoding="utf-8")
    assert problems(tmp_path) == {}


def test_classifiers_and_image_models_need_less(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    text, image = tiny.save_model(tmp_path / "text", "bert"), tiny.save_image_model(tmp_path / "image")
    AutoModelForSequenceClassification.from_pretrained(text).save_pretrained(text)
    AutoModelForImageClassification.from_pretrained(image).save_pretrained(image)
    for folder, task in ((text, "text-classification"), (image, "image-classification")):
        write_notes(folder, task)
        assert list(checks_of(folder)) == ["files", "local paths", "architecture", "dtype"]
        assert problems(folder) == {}


def test_onnx_folder_is_judged_by_its_settings(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")
    assert problems(folder) == {}
    assert "tied head" not in checks_of(folder)


def test_export_that_answers_differently_is_found(folder: Path) -> None:
    check = {"name": "same greedy continuation", "result": "1 of 4 prompts", "expected": "all", "passed": True}
    (folder / "verify.json").write_text(json.dumps({"checks": [check]}), encoding="utf-8")
    assert checks_of(folder)["verification"].result == "passed"
    (folder / "verify.json").write_text(json.dumps({"checks": [{**check, "passed": False}]}), encoding="utf-8")
    assert problems(folder) == {"verification": "same greedy continuation: export the model again"}


def test_body_for_sentence_transformers_has_no_architecture_of_a_task(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "bert")
    write_notes(folder, "text-classification")
    assert problems(folder) == {"architecture": "BertModel: expected BertForSequenceClassification"}
    (folder / "modules.json").write_text("[]", encoding="utf-8")
    assert problems(folder) == {}
