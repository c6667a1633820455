"""Models without weights: everything but the weights is as when loaded, and the files are read unit by unit."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fulltune.errors import SetupError
from fulltune.models.base import Base
from fulltune.models.load import HeadOrigin, load_model
from fulltune.recipe.model import ModelBlock
from fulltune.stream.files import ReadAhead, files_digest
from fulltune.stream.skeleton import Skeleton, skeleton
from fulltune.stream.units import find_units
from tests import tiny
from tests.cases import others_long


def labels(*names: str) -> dict[str, Any]:
    rows = dict(enumerate(names))
    return {"id2label": rows, "label2id": {name: row for row, name in rows.items()}, "num_labels": len(rows)}


def base_of(folder: Path, task: Any = "causal-lm", **settings: Any) -> Base:
    return Base.from_block(ModelBlock(name=str(folder), **settings), task)


def make(folder: Path, kind: str) -> tuple[Base, dict[str, Any]]:
    """A tiny model and the changes of its config that its task makes."""
    if kind == "vit":
        return base_of(tiny.save_image_model(folder), "image-classification"), labels("a", "b")
    tied = {"tie_word_embeddings": True} if kind == "tied llama" else {}
    tiny.save_model(folder, kind.removeprefix("tied "), **tied)
    if kind in tiny.ENCODERS:
        return base_of(folder, "text-classification", weights_dtype="bf16"), labels("a", "b", "c")
    return base_of(folder, "seq2seq" if kind in tiny.WRITERS else "causal-lm"), {}


def both(base: Base, changes: Mapping[str, Any], head_is_new: bool) -> tuple[Any, Skeleton]:
    """Load a model in both ways, and check that neither its head's origin nor torch's random state differs."""
    results, heads = list[Any](), list[HeadOrigin]()
    states = []
    for load in (load_model, skeleton):
        torch.manual_seed(3)
        results.append(load(base, changes, head_is_new=head_is_new, on_head=heads.append))  # type: ignore[operator]  # a case
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert [head.missing for head in heads[:1]] == [head.missing for head in heads[1:]]
    return results[0], results[1]


def assert_same(loaded: Any, empty: Skeleton) -> None:
    """The same model, with the same values in the files."""
    model = empty.model
    expected, buffers = dict(loaded.named_parameters()), dict(loaded.named_buffers())
    assert all(one.isnan().all() and one.untyped_storage().nbytes() <= 4 for one in model.parameters())
    values = empty.read(name for name, _ in model.named_parameters())
    assert list(values) == list(expected)
    for name, value in values.items():
        assert value.dtype == expected[name].dtype == model.get_parameter(name).dtype
        assert torch.equal(value, expected[name]), name
    assert [name for name, _ in model.named_buffers()] == list(buffers)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name
    assert model.config.to_dict() == loaded.config.to_dict()
    assert type(model) is type(loaded)
    assert not model.training
    if model.can_generate():
        assert model.generation_config.to_dict() == loaded.generation_config.to_dict()


KINDS = ("llama", "tied llama", "bert", "t5", "vit", "marian", "gpt2", "qwen2", "opt", "bloom", "bart", "distilbert")


@pytest.mark.parametrize("kind", others_long(KINDS, "tied llama", "bert", "t5", "vit", "marian"))
def test_skeleton_differs_from_the_loaded_model_only_in_memory(tmp_path: Path, kind: str) -> None:
    base, changes = make(tmp_path / "model", kind)
    loaded, empty = both(base, changes, bool(changes))
    assert_same(loaded, empty)
    units = find_units(empty.model)
    written = {name: one for unit in units for name, one in empty.read(unit.names).items()}
    assert list(written) == [name for name, _ in loaded.named_parameters()]


@pytest.mark.parametrize("names", [("c", "a", "b"), ("c", "a", "x", "b"), ("x", "y", "z"), ("a", "b", "c")])
def test_rows_of_a_trained_head_follow_the_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    base, changes = make(tmp_path / "body", "bert")
    load_model(base, changes, head_is_new=True).save_pretrained(tmp_path / "trained")
    base.processor.save_pretrained(tmp_path / "trained")
    assert_same(*both(base_of(tmp_path / "trained", "text-classification"), labels(*names), True))


def test_weights_in_several_files_and_names_without_prefix(tmp_path: Path) -> None:
    base, _ = make(tmp_path / "model", "tied llama")
    loaded, whole = both(base, {}, False)
    loaded.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    base.processor.save_pretrained(tmp_path / "parts")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    assert_same(*both(base_of(tmp_path / "parts"), {}, False))
    digest, tensors = files_digest(whole.stored), load_file(tmp_path / "model" / "model.safetensors")
    body = {name.removeprefix("model."): tensor.half() for name, tensor in tensors.items()}
    save_file(body, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert_same(*both(base, {}, False))
    assert files_digest(skeleton(base, {}, head_is_new=False).stored) != digest


@pytest.mark.parametrize("equal", [True, False])
def test_weights_stored_twice_are_tied_if_equal(tmp_path: Path, equal: bool) -> None:
    base, _ = make(tmp_path / "model", "tied llama")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    loaded, empty = both(base, {}, False)
    assert_same(loaded, empty)
    assert (empty.model.lm_head.weight is empty.model.model.embed_tokens.weight) == equal


def test_digest_changes_with_one_tensor(tmp_path: Path) -> None:
    base, _ = make(tmp_path / "model", "llama")
    digest = files_digest(skeleton(base, {}, head_is_new=False).stored)
    assert digest == files_digest(skeleton(base, {}, head_is_new=False).stored)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert digest != files_digest(skeleton(base, {}, head_is_new=False).stored)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    make(tmp_path / "model", "llama")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"

    def refusal(**settings: Any) -> str:
        with pytest.raises(SetupError) as caught:
            skeleton(base_of(tmp_path / "model", **settings), {}, head_is_new=False)
        return str(caught.value)

    tensors = load_file(file)
    save_file({name: one for name, one in tensors.items() if ".1.mlp.up" not in name}, file, metadata={"format": "pt"})
    assert "1 tensors are missing, for example model.layers.1.mlp.up_proj.weight" in refusal()
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, file)
    assert "model.norm.weight in model.safetensors has type F8_E4M3; use the model's plain weights" in refusal()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    file.unlink()
    assert "pickled" in refusal()
    assert "there is no model.safetensors; load the model once" in refusal(allow_pickled_weights=True)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "there is no model-00001-of-00002.safetensors" in refusal(allow_pickled_weights=True)
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    assert "quantized weights and GGUF files cannot be read in parts" in refusal()


def test_experts_are_read_from_either_format(tmp_path: Path) -> None:
    experts = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(experts)
    model.save_pretrained(tmp_path / "model")
    assert_same(*both(base_of(tmp_path / "model"), {}, False))
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert_same(*both(base_of(tmp_path / "fused"), {}, False))


def test_random_weights_depend_on_the_seed_and_the_unit_only(tmp_path: Path) -> None:
    make(tmp_path / "model", "tied llama")
    (tmp_path / "model" / "model.safetensors").unlink()  # nothing is read
    empty = skeleton(base_of(tmp_path / "model", random_weights=True), {}, head_is_new=False)
    units, state = find_units(empty.model), torch.get_rng_state()
    in_order = {name: one for unit in units for name, one in empty.read(unit.names).items()}
    torch.manual_seed(9)
    backwards = {name: one for unit in reversed(units) for name, one in empty.read(unit.names).items()}
    torch.set_rng_state(state)
    assert all(torch.equal(in_order[name], backwards[name]) for name in in_order)
    assert all(one.isnan().all() for one in empty.model.parameters())
    blocks = [unit.names for unit in units if unit.path.startswith("model.layers.")]
    first, second = ([in_order[name] for name in names if "proj" in name] for names in blocks)
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    drawn = transformers.AutoModelForCausalLM.from_config(empty.model.config)
    for name, parameter in drawn.named_parameters():  # the same distribution
        assert in_order[name].std() == pytest.approx(float(parameter.detach().std()), rel=0.2, abs=1e-6), name
        assert in_order[name].mean() == pytest.approx(float(parameter.detach().mean()), abs=0.01)


def test_two_units_are_read_at_most() -> None:
    alive, most, lock = set[int](), [0], threading.Lock()

    class Values(dict[str, torch.Tensor]):
        def __init__(self, unit: int) -> None:
            super().__init__(weights=torch.tensor(unit))
            self.unit = unit
            with lock:
                alive.add(unit)
                most[0] = max(most[0], len(alive))

        def __del__(self) -> None:
            alive.discard(self.unit)

    source = ReadAhead(Values)
    for unit, following in ((0, 1), (1, 2), (2, 5), (3, 4), (4, 4), (4, 0)):  # 5 is read in vain
        assert source.weights(unit)["weights"] == unit
        source.prefetch(following)
        source.prefetch(following + 1)
        source._pool.submit(int).result()  # what was begun is read
        source.release(unit)
    assert most == [2]


def test_failure_in_the_background_is_raised() -> None:
    def read(unit: int) -> dict[str, torch.Tensor]:
        raise SetupError(f"unit {unit} is gone")

    source = ReadAhead(read)
    source.prefetch(1)
    with pytest.raises(SetupError, match="unit 1 is gone"):
        source.weights(1)
