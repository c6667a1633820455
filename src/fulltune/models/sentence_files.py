from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fulltune.files import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
_TYPE = "sentence_transformers.models"


def write_sentence_files(folder: Path, config: PretrainedConfig, max_length: int) -> None:
    """Write the files with which sentence-transformers (all versions) reads a saved encoder as one that pools as
    `config.pooling` says."""
    modules = (("", "Transformer"), ("1_Pooling", "Pooling"))
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_TYPE}.{name}"}
        for number, (path, name) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {f"pooling_mode_{name}": mode == config.pooling for mode, name in _MODES.items()}
    size = config.get_text_config().hidden_size
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **pooling})
