"""Which of a model's modules FSDP2 puts together and frees one by one."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)
from transformers import initialization as init

from fulltune.errors import SetupError
from fulltune.models import sharding

_TWO = {"num_hidden_layers": 2}
_PAIR = {"encoder_layers": 2, "decoder_layers": 2}
CLASSES, WRITES, ANSWERS = AutoModelForSequenceClassification, AutoModelForCausalLM, AutoModelForSeq2SeqLM
FAMILIES: list[tuple[Any, str, dict[str, Any], list[str]]] = [
    (CLASSES, "BertConfig", _TWO, ["bert.encoder.layer.*"]),
    (CLASSES, "RobertaConfig", _TWO, ["roberta.encoder.layer.*"]),
    (CLASSES, "DebertaV2Config", _TWO, ["deberta.encoder.layer.*"]),
    (CLASSES, "DistilBertConfig", {"n_layers": 2}, ["distilbert.transformer.layer.*"]),
    (CLASSES, "AlbertConfig", _TWO, ["albert.encoder.albert_layer_groups.*"]),
    (CLASSES, "ModernBertConfig", _TWO, ["model.layers.*"]),
    (WRITES, "GPT2Config", {"n_layer": 2}, ["transformer.h.*"]),
    (WRITES, "OPTConfig", _TWO, ["model.decoder.layers.*"]),
    (WRITES, "LlamaConfig", _TWO, ["model.layers.*"]),
    (ANSWERS, "T5Config", {"num_layers": 2}, ["encoder.block.*", "decoder.block.*"]),
    (ANSWERS, "BartConfig", _PAIR, ["model.encoder.layers.*", "model.decoder.layers.*"]),
    (AutoModelForSpeechSeq2Seq, "WhisperConfig", _PAIR, ["model.encoder.layers.*", "model.decoder.layers.*"]),
    (AutoModelForImageClassification, "ViTConfig", _TWO, ["vit.layers.*"]),
    (AutoModelForImageClassification, "ConvNextConfig", {}, ["convnext.encoder.stages.*"]),
]


@pytest.mark.parametrize(("auto_class", "name", "size", "expected"), FAMILIES, ids=[name for _, name, *_ in FAMILIES])
def test_blocks_of_each_family_are_found_and_shared_out(
    auto_class: Any, name: str, size: dict[str, Any], expected: list[str]
) -> None:
    """Those that the model's own plan names stay its own; all others are given."""
    config = getattr(transformers, name)(**size)
    with torch.device("meta"):
        model = auto_class.from_config(config)

    assert list(sharding.block_sharding_plan(model)) == expected
    _, given = sharding.sharded_model_class(auto_class, config, 2)

    assert given.fsdp_size == 2
    _, _, plan = model._resolve_parallel_plans(given)
    names = {path.removesuffix(".*") for path in expected}
    blocks = {path for path, _ in model.named_modules() if path.rpartition(".")[0] in names}
    assert len(blocks) >= (1 if name == "AlbertConfig" else 2)
    assert {path for path in blocks if plan.get(path) != "free_full_weight"} == set()
    assert given.fsdp_plan is None or set(given.fsdp_plan) <= set(expected)
    assert name != "LlamaConfig" or given.fsdp_plan is None


@pytest.mark.parametrize(
    ("auto_class", "name", "size", "left_out"),
    [
        (WRITES, "GPT2Config", {"n_layer": 2}, set()),
        (WRITES, "OPTConfig", _TWO, set()),
        (WRITES, "LlamaConfig", _TWO, set()),
        (WRITES, "LlamaConfig", {**_TWO, "tie_word_embeddings": True}, {"model.embed_tokens"}),
        (ANSWERS, "T5Config", {"num_layers": 2}, {"encoder.embed_tokens", "decoder.embed_tokens"}),
        (ANSWERS, "BartConfig", _PAIR, {"model.encoder.embed_tokens", "model.decoder.embed_tokens"}),
    ],
)
def test_tensor_with_several_names_is_shared_out_as_one(
    auto_class: Any, name: str, size: dict[str, Any], left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its rows do not go evenly into the processes: `tests/invariant/test_placements.py` trains such."""
    config = getattr(transformers, name)(**size)
    with torch.device("meta"), init.no_tie_weights():  # as `from_pretrained` makes it
        model = auto_class.from_config(config)
    shared, given = sharding.sharded_model_class(auto_class, config, 2)
    _, _, plan = model._resolve_parallel_plans(given)
    seen: list[dict[str, str]] = []

    def share_out(model: Any, given: Any, mesh: Any) -> Any:
        seen.append(model._resolve_parallel_plans(given)[2])
        return model

    monkeypatch.setattr(type(model), "maybe_distribute_model", staticmethod(share_out))

    assert shared.maybe_distribute_model(model, given, "a mesh") is model

    assert (shared.__name__, shared.__bases__) == (type(model).__name__, (type(model),))
    assert set(plan) - set(seen[0]) == left_out
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == config.tie_word_embeddings


def test_outermost_lists_are_taken_and_those_without_weights_are_not() -> None:
    def block() -> torch.nn.Module:
        return torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    model = torch.nn.Module()
    model.towers = torch.nn.ModuleList([block(), block()])
    model.towers_of_more = block()
    model.silent = torch.nn.ModuleList([torch.nn.Dropout()])
    assert list(sharding.block_sharding_plan(model)) == ["towers.*", "towers_of_more.*"]


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(SetupError, match=r"train.placement: fsdp2: Linear has no repeated blocks .* use ddp or zero3"):
        sharding.block_sharding_plan(torch.nn.Linear(2, 2))


def test_running_statistics_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(transformers.ResNetConfig())
    with pytest.raises(SetupError, match=r"ResNetForImageClassification has running statistics .* use ddp"):
        sharding.block_sharding_plan(model)


def test_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "OLDEST_TRANSFORMERS", (99, 1))
    with pytest.raises(SetupError, match=r"fsdp2 needs transformers 99\.1 or newer, found 5\."):
        sharding.sharded_model_class(CLASSES, transformers.BertConfig(**_TWO), 2)


def test_model_that_is_not_shared_out_is_left_alone() -> None:
    model = torch.nn.Linear(3, 2)
    sharding.free_gathered_weights(model)
    values = torch.ones(2, 3)
    assert not sharding.is_fsdp2_sharded(model)
    assert sharding.full_tensor(model.weight) is sharding.local_tensor(model.weight) is model.weight
    assert sharding.shard_like(values, model.weight) is values


_TOKENS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")


class _Gathered:
    """DeepSpeed's `GatheredParameters`, as far as it knows who is whole."""

    whole: ClassVar[set[int]] = set()
    most: ClassVar[int] = 0

    def __init__(self, parameters: list[Any]) -> None:
        self._ids = {id(one) for one in parameters}

    def __enter__(self) -> None:
        assert not self.whole & self._ids  # DeepSpeed refuses that
        self.whole.update(self._ids)
        _Gathered.most = max(self.most, len(self.whole))

    def __exit__(self, *_: Any) -> None:
        self.whole.difference_update(self._ids)


@pytest.mark.parametrize("name", ["BertConfig", "DebertaV2Config", "AlbertConfig", "ModernBertConfig"])
def test_what_deepspeed_shares_out_is_read_block_by_block(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    small |= {"vocab_size": 64, **dict.fromkeys(_TOKENS, 0), "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    model = CLASSES.from_config(getattr(transformers, name)(**small)).eval()
    [list_of_blocks] = sharding.block_list_paths(model)
    blocks = list(model.get_submodule(list_of_blocks))
    own = [len(list(block.parameters())) for block in blocks]
    everything = list(model.parameters())
    monkeypatch.setattr(_Gathered, "most", 0)
    fake: Any = ModuleType("deepspeed")
    fake.zero = SimpleNamespace(GatheredParameters=_Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    assert not sharding.needs_all_ranks(model)
    for parameter in everything:
        parameter.ds_id = id(parameter)
    assert sharding.needs_all_ranks(model)

    def seen_whole(module: Any, _: Any) -> None:
        missing = [name for name, one in module.named_parameters(recurse=False) if id(one) not in _Gathered.whole]
        assert not missing, (type(module), missing)

    with torch.no_grad(), sharding.callable_before_engine(model):
        hooks = [module.register_forward_pre_hook(seen_whole) for module in model.modules()]
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert _Gathered.most == len(everything) - sum(own) + max(own)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
    for hook in hooks:
        hook.remove()
    assert not _Gathered.whole
    model(input_ids=torch.tensor([[1, 2, 3]]))  # no hook is left
    assert not _Gathered.whole
