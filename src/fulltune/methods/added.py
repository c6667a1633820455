from __future__ import annotations

import inspect
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fulltune.errors import RecipeError
from fulltune.models.sharding import full_tensor, gathered_to_modify
from fulltune.recipe.methods import PROMPT_MODULE, AdapterMethod, LoraMethod, PeftMethod, PromptMethod
from fulltune.recipe.tasks import FACTS, TaskName
from fulltune.system.memory import is_out_of_memory
from fulltune.text import did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROJECTIONS = (
    *("attention.output.dense", "output.dense", "attention.dense", "ffn_output"),  # BERT, RoBERTa, ELECTRA, ALBERT
    *("attention.out_lin", "ffn.lin2", "out_lin", "lin2"),  # DistilBERT, XLM
    *("attn.o", "attention.o_proj", "mlp.fc2"),  # MPNet, ViT
    *("attn.Wo", "mlp.Wo"),  # ModernBERT
    *("attn.c_proj", "mlp.c_proj"),  # GPT-2
    *("self_attn.o_proj", "mlp.down_proj"),  # Llama and most of today's decoders
    *("self_attn.out_proj", "encoder_attn.out_proj", "fc2", "self_attn.dense"),  # OPT, BART, Marian, Phi
    *("self_attention.dense", "mlp.dense_4h_to_h", "attention.dense"),  # Bloom, Falcon, GPT-NeoX
    *("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),  # T5
)
"""Name suffixes of projections to the hidden size; an adapter is added after each."""
_IN_LAYER = re.compile(r"\.\d+\.")
STANDARD_DEVIATION = 1e-2
"""Standard deviation of an adapter's initial weights, truncated at two deviations (section 3.6 of the paper)."""


class Bottleneck(nn.Module):
    """Bottleneck adapter with a residual connection (Houlsby et al. 2019, arXiv 1902.00751), which PEFT lacks."""

    def __init__(self, hidden_size: int, bottleneck_size: int, non_linearity: str) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)
        self.non_linearity = nn.ReLU() if non_linearity == "relu" else nn.GELU()
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(
                linear.weight, std=STANDARD_DEVIATION, a=-2 * STANDARD_DEVIATION, b=2 * STANDARD_DEVIATION
            )
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # In fp32 even if the frozen weights are bf16, which would lose small updates.
        added = self.up(self.non_linearity(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def add_adapters(model: PreTrainedModel, method: AdapterMethod, head_paths: tuple[str, ...]) -> None:
    """Add an adapter after each projection in the layers, and make adapters and layer norms trainable."""
    projections = [(name, module) for name, module in model.named_modules() if _is_projection(name, module, head_paths)]
    if not projections:
        raise RecipeError(
            f"method {method.label}: the projections of {type(model).__name__}'s layers are unknown; use lora or full"
        )
    for _, module in projections:
        weight = module.weight
        size = module.out_features if isinstance(module, nn.Linear) else module.nf  # GPT-2's Conv1D
        added = Bottleneck(size, max(1, size // method.reduction_factor), method.non_linearity)
        module.add_module("adapter", added.to(weight.device))
        module.register_forward_hook(lambda module, _, hidden: module.adapter(hidden))
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm) and not _is_inside(name, head_paths):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def _is_projection(name: str, module: nn.Module, head_paths: tuple[str, ...]) -> bool:
    """Return True for a projection inside a numbered layer that is not in a head."""
    from transformers.pytorch_utils import Conv1D

    ends = any(name.endswith(f".{end}") for end in PROJECTIONS)
    in_layer = _IN_LAYER.search(name) is not None and not _is_inside(name, head_paths)
    return isinstance(module, (nn.Linear, Conv1D)) and ends and in_layer


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


UNUSABLE = {
    *("ADAMSS", "BOFT", "FROD", "UNILORA"),  # derive trained parameters from weights, which no plan reads
    "ADALORA",  # needs a call after each step
    "ADAPTION_PROMPT",  # replaces the attention of a few kinds of models
    "OSF",  # decomposes matrices, and trains most of them
    "POLY",  # needs a task's number with each row
    "SHADOW",  # runs a second model next to the first
    "SUPERTUNING",  # needs more than the model
    "XLORA",  # mixes adapters that are trained already
}
_FIELDS_FROM_RECIPE = {
    "peft_type",
    "task_type",
    "inference_mode",
    "modules_to_save",
    "base_model_name_or_path",
    "revision",
}


def peft_problems(method: PeftMethod) -> list[str]:
    """List error messages about a PEFT type or config fields that cannot be used."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configs = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = method.type.upper()
    in_layers = {kind for kind, config in configs.items() if not issubclass(config, PromptLearningConfig)}
    usable = sorted(in_layers - UNUSABLE)
    if name not in usable:
        here = f"supported types: {', '.join(usable)}"
        if name not in configs:
            return [f"type: PEFT has no '{method.type}'; {did_you_mean(name, usable) or here}"]
        return [f"type: {name} does more than add modules to layers (for virtual tokens use 'kind: prompt'); {here}"]
    fields = sorted(set(configs[name].__dataclass_fields__) - _FIELDS_FROM_RECIPE)
    return [
        f"config.{field}: {name} has no field of this name that can be set; "
        + (did_you_mean(field, fields) or f"it has {', '.join(fields)}")
        for field in method.config
        if field not in fields
    ]


def add_peft_modules(
    model: PreTrainedModel, method: LoraMethod | PeftMethod, task: TaskName, head_paths: tuple[str, ...]
) -> PeftModel:
    """Add PEFT's modules to the model, or raise `RecipeError` if PEFT does not support the model."""
    from peft import LoraConfig, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    # PEFT takes every module whose path ends with one of these names.
    shared: dict[str, Any] = {
        "task_type": FACTS[task].peft,
        "modules_to_save": [name.rpartition(".")[2] for name in head_paths] or None,
    }
    try:
        if method.kind == "lora":
            targets = method.target_modules
            config: Any = LoraConfig(
                r=method.rank,
                # PEFT says `int`, and only divides it by the rank.
                lora_alpha=2 * method.rank if method.alpha is None else method.alpha,  # type: ignore[arg-type]  # LoraConfig takes fractions
                lora_dropout=method.dropout,
                use_rslora=method.rslora,
                target_modules=targets if isinstance(targets, str) else list(targets),
                **shared,
            )
        else:
            kinds = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kinds[method.type.upper()]](**shared, **method.config)
        with warnings.catch_warnings(action="ignore"):  # about transposed matrices and others, which it corrects itself
            return get_peft_model(model, config)
    # PEFT raises any of these for configs and models that it does not support.
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):  # a RuntimeError, but not the recipe's fault
            raise
        text = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"method {method.label}: PEFT cannot apply the method to {type(model).__name__}: {text}"
        ) from error


_TOKEN_TASKS = ("token-classification", "question-answering", "causal-lm")


class Prompt(nn.Module):
    """Virtual tokens (Lester et al. 2021, arXiv 2104.08691), float32 `weight[tokens, size]`, and hooks that put them
    before a model's input.

    PEFT's version fails with token heads, finds the wrong last token in decoders that classify, and ignores position
    ids.
    """

    def __init__(self, weight: torch.Tensor, filler_id: int) -> None:
        """Store the initial virtual tokens; `filler_id` is their placeholder id in `input_ids`."""
        super().__init__()
        self.size = len(weight)
        self.weight = nn.Parameter(weight)
        self.filler = filler_id
        self.waiting = False
        """True if the next call of the embeddings will insert the virtual tokens."""
        self.in_front = False
        """True if the current pass starts with virtual tokens instead of a cache."""

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Replace the first positions of `embeddings[rows, tokens, size]` with virtual tokens. ZeRO gathers the weight
        because this is a module call."""
        ahead = self.weight.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        return torch.cat((ahead, embeddings[:, self.size :]), dim=1)

    def _prepend(self, tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((tensor.new_full((*tensor.shape[:-1], self.size), value), tensor), dim=-1)

    def before_body(
        self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Prepend virtual tokens to the body's inputs, or only to mask and positions if the cache contains them."""
        inputs = {**inspect.signature(body.forward).bind_partial(*args).arguments, **kwargs}
        cache = inputs.get("past_key_values")
        self.in_front = self.waiting = cache is None or not cache.get_seq_length()
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = self._prepend(inputs["attention_mask"], 1)
        for name in {"position_ids", "cache_position"} & inputs.keys():
            if (places := inputs[name]) is not None:
                moved = [places + self.size]
                if self.in_front:
                    first = torch.arange(self.size, device=places.device, dtype=places.dtype)
                    moved.insert(0, first.expand(*places.shape[:-1], -1))
                inputs[name] = torch.cat(moved, dim=-1)
        if self.in_front:
            inputs["input_ids"] = self._prepend(inputs["input_ids"], self.filler)
            if inputs.get("token_type_ids") is not None:
                inputs["token_type_ids"] = self._prepend(inputs["token_type_ids"], 0)
        return (), inputs

    def after_embeddings(self, _: object, __: object, embeddings: torch.Tensor) -> torch.Tensor:
        is_first, self.waiting = self.waiting, False
        return self(embeddings) if is_first else embeddings

    def before_decoder(self, _: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hook that extends the decoder's mask of encoder tokens over the virtual tokens."""
        mask = kwargs.get("encoder_attention_mask")
        return args, kwargs if mask is None else {**kwargs, "encoder_attention_mask": self._prepend(mask, 1)}

    def after_body(self, _: object, __: object, outputs: Any) -> Any:
        """Remove the virtual tokens' hidden states from the body's output."""
        if self.in_front and isinstance(outputs, tuple):
            return (outputs[0][:, self.size :], *outputs[1:])
        if self.in_front:
            outputs.last_hidden_state = outputs.last_hidden_state[:, self.size :]
        return outputs


def add_virtual_tokens(model: PreTrainedModel, method: PromptMethod, task: TaskName) -> None:
    """Add virtual tokens before the model's input; raise `RecipeError` if the model has no separate body or token
    embeddings."""
    from fulltune.models.encoders import is_decoder

    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    embeddings = _token_embeddings(body)
    if embeddings is None or body is model:
        lacks = "no token embeddings" if embeddings is None else "no separate body"
        raise RecipeError(f"method {method.label}: {type(model).__name__} has {lacks}; use lora or adapter")
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    # RoBERTa counts positions of tokens that are not padding.
    prompt = Prompt(_initial_vectors(embeddings, method), filler_id=1 if pad == 0 else 0)
    model.add_module(PROMPT_MODULE, prompt)
    body.register_forward_pre_hook(prompt.before_body, with_kwargs=True)
    embeddings.register_forward_hook(prompt.after_embeddings)
    if model.config.is_encoder_decoder:
        model.get_decoder().register_forward_pre_hook(prompt.before_decoder, with_kwargs=True)
    elif task in _TOKEN_TASKS or FACTS[task].reads_texts_apart or is_decoder(model.config):
        body.register_forward_hook(prompt.after_body)


def _token_embeddings(module: Any) -> nn.Embedding | None:
    """Return the layer that embeds token ids, or None if the model has none."""
    try:
        embeddings = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # raised by models that read no tokens
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def _initial_vectors(embeddings: nn.Embedding, method: PromptMethod) -> torch.Tensor:
    """Return initial virtual tokens, float32 [tokens, size]: vectors from the vocabulary, or noise with the same
    standard deviation."""
    with gathered_to_modify([embeddings.weight]):
        weight, size = full_tensor(embeddings.weight.detach()), method.num_virtual_tokens
        if method.init == "vocabulary":
            return weight[torch.randint(0, len(weight), (size,), device=weight.device)].float()
        spread = weight.float().std()
        return torch.randn(size, weight.shape[1], device=weight.device) * spread
