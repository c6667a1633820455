from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from fulltune import files
from fulltune.errors import SetupError
from fulltune.methods import BY_HOOKS, AppliedMethod, apply_method, trainable_parameters
from fulltune.models.base import Base, read_json_object
from fulltune.models.load import load_model as load_model
from fulltune.models.sentence_files import write_sentence_files
from fulltune.models.sharding import shard_like
from fulltune.recipe.methods import PROMPT_MODULE, Method
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.tasks import Target, task_named

if TYPE_CHECKING:
    import torch
    from torch import nn

NOTES = "fulltune.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model."
_PROMPT = f"{PROMPT_MODULE}.weight"


def save_method_folder(applied: AppliedMethod, folder: Path, task: TaskName, base_name: str | None) -> None:
    """Write the trained parameters and the config; `base_name` is the pretrained model's folder or Hub id."""
    folder.mkdir(parents=True, exist_ok=True)
    model = applied.model
    if applied.peft_model is not None:
        applied.peft_model.peft_config["default"].base_model_name_or_path = base_name
        with warnings.catch_warnings(action="ignore"):  # that it did not check the vocabulary on the Hub
            # Without sharded frozen weights, which PEFT would gather from all ranks.
            state = {
                name: tensor.detach()
                for name, tensor in applied.peft_model.state_dict(keep_vars=True).items()
                if not hasattr(tensor, "placements") and not hasattr(tensor, "ds_id")
            }
            applied.peft_model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # an empty template; ours is written with the report
    else:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trainable_parameters(model).items()}
        if applied.method.kind == "prompt":
            config = _peft_prompt_config(applied, task, base_name, list(tensors))
            tensors = {_peft_name(name): tensor for name, tensor in tensors.items()}
        else:
            config = {"fulltune_method": applied.method.kind, "base_model_name_or_path": base_name}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        files.write_json(folder / CONFIG, config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def copy_permissions_from_config(folder: Path) -> None:
    """Give all files the permissions of `config.json`, because only the owner can read new safetensors files."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def _peft_name(name: str) -> str:
    return "prompt_embeddings" if name == _PROMPT else f"{_PEFT_PREFIX}{name}"


def _peft_prompt_config(
    applied: AppliedMethod, task: TaskName, base_name: str | None, tensor_names: list[str]
) -> dict[str, Any]:
    """Return the content of `adapter_config.json` with which PEFT loads the virtual tokens."""
    text = applied.model.config.get_text_config()
    size = trainable_parameters(applied.model)[_PROMPT].shape
    heads = {name.rpartition(".")[0] for name in tensor_names if name != _PROMPT}
    modules = sorted({path.removeprefix(f"{applied.model.base_model_prefix}.").split(".")[0] for path in heads})
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": FACTS[task].peft,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_virtual_tokens": size[0],
        "token_dim": size[1],
        "num_transformer_submodules": 1,  # encoder-decoders have virtual tokens only in the encoder
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": modules or None,
    }


def has_only_trained_parameters(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def read_notes(folder: Path) -> dict[str, Any]:
    """Read a model folder's `fulltune.json`; raise `SetupError` if it is damaged or its labels are not the model's."""
    notes, config = read_json_object(path := folder / NOTES), folder / "config.json"
    if missing := [name for name in ("task", "problem_type", "columns", "labels", "joint") if name not in notes]:
        raise SetupError(f"{path}: lacks {', '.join(missing)}; copy it again from where you trained")
    by_id = read_json_object(config).get("id2label", {}) if notes["labels"] and config.exists() else {}
    if by_id and [by_id[number] for number in sorted(by_id, key=int)] != notes["labels"]:
        raise SetupError(f"{path}: its labels are not those of config.json (id2label); write the same in both")
    return notes


def notes_without_method(folder: Path) -> dict[str, Any]:
    """Return a model folder's notes as they are stored beside a whole model."""
    return {name: value for name, value in read_notes(folder).items() if name not in ("method", "base_model")}


def load_processor(folder: Path) -> Any:
    return Base.from_block(ModelBlock(name=str(folder.resolve())), read_notes(folder)["task"]).processor


def load_method_folder(folder: Path, processor: Any, base: Base | None = None) -> AppliedMethod:
    """Load the pretrained model (default: the one in the folder's notes) with the folder's parameters, on the CPU."""
    import torch

    notes = read_notes(folder)
    method: Method = TypeAdapter(Method).validate_python(notes["method"])
    task, target = task_named(notes["task"]), Target.from_notes(notes)
    changes = task.config_changes(target, processor)
    with torch.random.fork_rng():
        pretrained = base or Base.from_block(ModelBlock(**notes["base_model"]), notes["task"])
        model = load_model(pretrained, changes, head_is_new=task.FACTS.head_is_new)
        applied = apply_method(model, method, notes["task"])
    _load_saved_parameters(applied, folder)
    if model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return applied


def _load_saved_parameters(applied: AppliedMethod, folder: Path) -> None:
    """Copy the folder's parameters into the model, or raise `SetupError` if their names differ."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    if applied.peft_model is not None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        expected = set(get_peft_model_state_dict(applied.peft_model, save_embedding_layers=False))
        _check_tensor_names(expected, set(tensors), folder / WEIGHTS)
        set_peft_model_state_dict(applied.peft_model, tensors)
        return
    names = trainable_parameters(applied.model)
    if applied.method.kind == "prompt":
        tensors = {name: tensors[_peft_name(name)] for name in names if _peft_name(name) in tensors}
    copy_into_trained(applied.model, tensors, folder / WEIGHTS)


def copy_into_trained(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy tensors into the trainable parameters; raise `SetupError` naming `source` if names or shapes differ."""
    import torch

    parameters = trainable_parameters(model)
    _check_tensor_names(set(parameters), set(tensors), source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise SetupError(
                    f"{source}: found shape {list(tensors[name].shape)} for {name}, expected {list(parameter.shape)}"
                )
            parameter.copy_(shard_like(tensors[name], parameter))


def _check_tensor_names(expected: set[str], actual: set[str], source: Path) -> None:
    wrong = sorted(expected ^ actual)
    if wrong:
        raise SetupError(f"{source}: {len(wrong)} tensors are missing or unexpected, for example {wrong[0]}")


def merge_into_pretrained(folder: Path, output: Path) -> None:
    """Merge a folder's parameters into the pretrained weights, and write a whole model to the new folder `output`."""
    if (kind := read_notes(folder)["method"]["kind"]) in BY_HOOKS:
        raise SetupError(f"{folder}: a method of kind {kind} adds modules to the model and cannot be merged")
    processor = load_processor(folder)
    applied = load_method_folder(folder, processor)
    try:
        model = applied.model if applied.peft_model is None else applied.peft_model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:  # raised by PEFT's methods that cannot merge
        raise SetupError(f"{folder}: PEFT cannot merge the method: {' '.join(str(error).split())[:200]}") from error
    model.save_pretrained(output)
    processor.save_pretrained(output)
    notes = notes_without_method(folder)
    if FACTS[notes["task"]].reads_texts_apart:
        write_sentence_files(output, model.config, notes["max_length"])
    files.write_json(output / NOTES, notes)
    copy_permissions_from_config(output)
