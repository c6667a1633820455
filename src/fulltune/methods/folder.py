"""The finished model's folder of a method that trains few parameters: only those, as far as possible in PEFT's form."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fulltune import files
from fulltune.errors import SetupError
from fulltune.methods import BY_HOOKS, Applied, apply, trained
from fulltune.models.base import Base, json_object
from fulltune.models.load import load as load_model
from fulltune.models.sharding import like
from fulltune.recipe.methods import PROMPT_MODULE, Method
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.tasks import Target, task_named

NOTES = "fulltune.json"
"""What a model folder says besides what transformers and PEFT keep: task, columns, method, pretrained model."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model."
_PROMPT = f"{PROMPT_MODULE}.weight"


def save(applied: Applied, folder: Path, task: TaskName, base: str) -> None:
    """Write what was trained, with the model's own config; `base` is the pretrained model's folder or Hub id."""
    folder.mkdir(parents=True, exist_ok=True)
    model = applied.model
    if applied.outer is not None:
        applied.outer.peft_config["default"].base_model_name_or_path = base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not look for the vocabulary's size on the Hub
            # Frozen weights that are shared out stay so: PEFT would ask all processes for them.
            state = {
                name: one.detach()
                for name, one in applied.outer.state_dict(keep_vars=True).items()
                if not hasattr(one, "placements") and not hasattr(one, "ds_id")
            }
            applied.outer.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form; ours is written with the report
    else:
        from safetensors.torch import save_file

        tensors = {name: one.detach().cpu().contiguous() for name, one in trained(model).items()}
        if applied.method.kind == "prompt":
            config = _prompt_config(applied, task, base, list(tensors))
            tensors = {_in_peft(name): one for name, one in tensors.items()}
        else:
            config = {"fulltune_method": applied.method.kind, "base_model_name_or_path": base}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        files.write_json(folder / CONFIG, config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def share(folder: Path) -> None:
    """Give each file the rights of `config.json`, which follow the umask: safetensors writes for its owner alone."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(mode)


def _in_peft(name: str) -> str:
    return "prompt_embeddings" if name == _PROMPT else f"{_PEFT_PREFIX}{name}"


def _prompt_config(applied: Applied, task: TaskName, base: str, names: list[str]) -> dict[str, Any]:
    """Fields of `peft.PromptTuningConfig`."""
    text = applied.model.config.get_text_config()
    size = trained(applied.model)[_PROMPT].shape
    heads = {name.rpartition(".")[0] for name in names if name != _PROMPT}
    modules = sorted({path.removeprefix(f"{applied.model.base_model_prefix}.").split(".")[0] for path in heads})
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": FACTS[task].peft,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": size[0],
        "token_dim": size[1],
        "num_transformer_submodules": 1,  # an encoder-decoder has them before its encoder only
        "num_attention_heads": getattr(text, "num_attention_heads", None),
        "num_layers": getattr(text, "num_hidden_layers", None),
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": modules or None,
    }


def is_partial(folder: Path) -> bool:
    """Whether a model folder holds only what was trained."""
    return (folder / CONFIG).exists()


def can_be_merged(folder: Path) -> bool:
    """Whether what was trained can go into the pretrained model's own weights, as far as its kind tells."""
    return is_partial(folder) and notes_of(folder)["method"]["kind"] not in BY_HOOKS


def notes_of(folder: Path) -> dict[str, Any]:
    """What fulltune wrote about the model in this folder; `SetupError` when the file is damaged."""
    return json_object(folder / NOTES)


def processor_of(folder: Path) -> Any:
    """The tokenizer, or image processor, in a model's folder."""
    return Base.of(ModelBlock(name=str(folder.resolve())), notes_of(folder)["task"]).processor


def load(folder: Path, processor: Any, base: Base | None = None) -> Applied:
    """The pretrained model (default: the one in the notes) with what `save` wrote, on the CPU."""
    import torch

    notes = notes_of(folder)
    method: Method = TypeAdapter(Method).validate_python(notes["method"])
    task, target = task_named(notes["task"]), Target.from_notes(notes)
    changes = task.config_changes(target, processor)
    with torch.random.fork_rng():
        pretrained = base or Base.of(ModelBlock(**notes["base_model"]), notes["task"])
        model = load_model(pretrained, changes, head_is_new=task.FACTS.head_is_new)
        applied = apply(model, method, notes["task"])
    _put_back(applied, folder)
    if model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    return applied


def _put_back(applied: Applied, folder: Path) -> None:
    """Strictly: a tensor too many or too few is another model's."""
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    if applied.outer is not None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        expected = set(get_peft_model_state_dict(applied.outer, save_embedding_layers=False))
        _refuse_others(expected, set(tensors), folder / WEIGHTS)
        set_peft_model_state_dict(applied.outer, tensors)
        return
    names = trained(applied.model)
    if applied.method.kind == "prompt":
        tensors = {name: tensors[_in_peft(name)] for name in names if _in_peft(name) in tensors}
    load_trained(applied.model, tensors, folder / WEIGHTS)


def load_trained(model: Any, tensors: Mapping[str, Any], where: Path) -> None:
    """Copy values into the parameters that are trained, whose names must be exactly these."""
    import torch

    parameters = trained(model)
    _refuse_others(set(parameters), set(tensors), where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise SetupError(
                    f"{where}: {name} has the shape {list(tensors[name].shape)}, expected {list(parameter.shape)}"
                )
            parameter.copy_(like(tensors[name], parameter))


def _refuse_others(expected: set[str], found: set[str], where: Path) -> None:
    wrong = sorted(expected ^ found)
    if wrong:
        raise SetupError(f"{where}: does not hold what was trained: {wrong[0]} ({len(wrong)} such tensors)")


def merge(folder: Path, output: Path) -> None:
    """Write the model with what was trained put into its own weights, which needs neither fulltune nor PEFT, as a plain
    Hugging Face folder with its tokenizer and notes."""
    if output.exists() and any(output.iterdir()):
        raise SetupError(f"{output}: is not empty; name a new folder")
    if not can_be_merged(folder):
        raise SetupError(f"{folder}: adds to what the model computes, or is a whole model; it cannot be merged")
    notes, processor = notes_of(folder), processor_of(folder)
    applied = load(folder, processor)
    try:
        model = applied.model if applied.outer is None else applied.outer.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:  # what PEFT's kinds say that cannot merge
        raise SetupError(f"{folder}: PEFT cannot merge it: {' '.join(str(error).split())[:200]}") from error
    model.save_pretrained(output)
    processor.save_pretrained(output)
    files.write_json(output / NOTES, {name: notes[name] for name in notes if name not in ("method", "base_model")})
    share(output)
