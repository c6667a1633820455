"""Checkpoints of processes that share out a model, written and read by one process: whole, or as its only share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fulltune.errors import SetupError
from fulltune.models import save, sharding
from fulltune.train.optim import fsdp2
from tests import tiny


@contextlib.contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def made(kind: str = "gpt2", seed: int = 0, **changes: Any) -> Any:
    """A tiny model whose output layer is tied to its embeddings."""
    auto_class = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    torch.manual_seed(seed)
    return auto_class.from_config(tiny.config(kind, tiny.usual_tokenizer(kind), tie_word_embeddings=True, **changes))


def share_out(model: Any) -> Any:
    """As transformers does, over one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_distributed_loading_by_transformers = True
    assert sharding.is_fsdp2_sharded(model)
    return model


def trained(model: Any) -> torch.optim.AdamW:
    """Three steps; its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(12).reshape(2, 6)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": sharding.full_tensor(value).clone()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: sharding.full_tensor(one.detach()).clone() for name, one in model.named_parameters()}


def names_in(folder: Path) -> list[str]:
    """Of the tensors in a folder's files."""
    return sorted(name for path in folder.glob("*.safetensors") for name in load_file(path))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_restored(checkpoint: Path, model: Any, expected: tuple[dict[str, torch.Tensor], ...]) -> None:
    """Into another model, and into an optimizer whose groups have another order."""
    optimizer = torch.optim.AdamW(
        [{"params": [one]} for one in reversed(list(model.parameters()))], lr=5.0, weight_decay=0.0
    )
    fsdp2.load_weights(model, checkpoint)
    fsdp2.load_optimizer(model, optimizer, checkpoint)
    assert_equal(weights_of(model), expected[0])
    assert_equal(moments(model, optimizer), expected[1])
    assert {group["lr"] for group in optimizer.param_groups} == {5.0}  # the schedule's, not the checkpoint's


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_was_saved_is_read_whole_and_shared_out(is_shared: bool, tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = share_out(made()) if is_shared else made()
        optimizer = trained(model)
        expected = weights_of(model), moments(model, optimizer)
        fsdp2.save_sharded_checkpoint(model, fsdp2.sharded_optimizer_state(model, optimizer), tmp_path)
        assert_restored(tmp_path, share_out(made(seed=1)), expected)
    assert fsdp2.is_sharded_checkpoint(tmp_path)
    # One process alone needs no group.
    assert_restored(tmp_path, made(seed=2), expected)


def test_what_is_not_trained_can_be_left_out(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = share_out(made())
        model.requires_grad_(False)
        model.transformer.ln_f.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.transformer.ln_f.parameters(), lr=1e-3)
        tokens = torch.arange(12).reshape(2, 6)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        fsdp2.save_sharded_checkpoint(
            model, fsdp2.sharded_optimizer_state(model, optimizer), tmp_path, trained_only=True
        )
        expected = weights_of(model)
    other = made()
    other.requires_grad_(False)
    other.transformer.ln_f.requires_grad_(True)
    fsdp2.load_weights(other, tmp_path, trained_only=True)
    assert_equal(weights_of(other), expected)
    names = [name for name in fsdp2.tensor_types(tmp_path) if name.startswith("weights.")]
    assert sorted(names) == ["weights.transformer.ln_f.bias", "weights.transformer.ln_f.weight"]


def test_state_of_whole_tensors_is_read_into_shared_ones(tmp_path: Path) -> None:
    """`optimizer.pt` numbers its parameters in the order of the groups."""
    with process_group(tmp_path):
        model = made()
        optimizer = trained(model)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        other = share_out(made(seed=1))
        again = torch.optim.AdamW(other.parameters())
        fsdp2.load_optimizer(other, again, tmp_path)
        assert_equal(moments(other, again), moments(model, optimizer))


def test_other_models_tensors_are_refused(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = made()
        fsdp2.save_sharded_checkpoint(model, fsdp2.sharded_optimizer_state(model, trained(model)), tmp_path)
    with pytest.raises(
        SetupError, match=r"its tensors differ from the model's, for example transformer\.h\.1.* \(12 in all\)"
    ):
        fsdp2.load_weights(made(n_layer=1), tmp_path)
    with pytest.raises(
        SetupError, match=r"its tensors differ from the model's, for example transformer\.wpe\.weight \(1 in"
    ):
        fsdp2.load_weights(made(n_positions=64), tmp_path)


def write_gathered(model: Any, folder: Path) -> None:
    parameters = dict(model.named_parameters())
    save.save_in_parts(model, folder, lambda name: sharding.full_tensor(parameters[name]))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_put_together_model_has_tied_tensors_once(kind: str, tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = made(kind)
        write_gathered(share_out(model) if kind == "gpt2" else model, tmp_path / "model")
    made(kind).save_pretrained(tmp_path / "plain")
    assert names_in(tmp_path / "model") == names_in(tmp_path / "plain")
    assert_equal(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "plain")))


@pytest.mark.parametrize("most_bytes", [2**30, 40_000])
def test_shared_out_model_is_written_file_by_file(
    most_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied tensor once, and transformers reads the folder."""
    with process_group(tmp_path):
        model = share_out(made())
        expected = weights_of(model)
        monkeypatch.setattr(save, "FILE_BYTES", most_bytes)
        write_gathered(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (tmp_path / "model.safetensors.index.json").exists() == (most_bytes == 40_000)
    assert names_in(tmp_path) == sorted(expected)
    assert_equal(weights_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
