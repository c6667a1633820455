from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.methods.folder import CONFIG, NOTES, WEIGHTS, read_notes
from fulltune.models.base import read_json_object
from fulltune.models.encoders import saved_as
from fulltune.recipe.tasks import FACTS
from fulltune.records.export import VERIFICATION
from fulltune.records.training import Check
from fulltune.text import first_few

CARD = "README.md"
_INDEX, _GENERATION, _IMAGES = "model.safetensors.index.json", "generation_config.json", "preprocessor_config.json"
_SENT = f"""*.safetensors {_INDEX} *.gguf *.onnx *.onnx.data config.json {_GENERATION} {_IMAGES} {CONFIG} tokenizer.json
tokenizer_config.json processor_config.json sentence_bert_config.json config_sentence_transformers.json modules.json
export.json *_tokens*.json vocab.* merges.txt *.model *.spm *.jinja additional_chat_templates/*.jinja Modelfile LICENSE*
{CARD} {NOTES} {VERIFICATION}"""
BLOCKING = ("files", "local paths", "base model", "verification")
"""Checks without which nothing is sent."""
_LOCAL_PATH = re.compile(r"(?<![\w:/.<~])(/\w[\w.-]*)(?:/[\w.-]+)+")
_CHAT = [{"role": "user", "content": "Is 2 < 3? 😊\n"}, {"role": "assistant", "content": "REPLY"}]


def choose_files(folder: Path) -> dict[str, int]:
    """Return the names and sizes in bytes of the files that belong to a model, without links to other folders."""
    paths = {path for pattern in _SENT.split() for path in (*folder.glob(pattern), *folder.glob(f"[0-9]_*/{pattern}"))}
    sent = (path for path in sorted(paths) if path.is_file() and path.resolve().is_relative_to(folder.resolve()))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sent}


def upload(folder: Path, files: Collection[str], name: str, public: bool, branch: str | None, as_pr: bool) -> str:
    """Send files to the repository `name` in one commit, and return the address of the commit or pull request."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api, advice = HfApi(), "check the network, the name and the token, which needs write access ('hf auth login')"
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        info = api.model_info(name)
        if info.private == public:
            raise SetupError(f"{name}: is {'private, so omit' if public else 'public, so confirm with'} --public")
        others = {file.rfilename for file in info.siblings or ()} - {".gitattributes", CARD}
        if not (branch or as_pr or not others or (others <= set(files) and NOTES in others)):
            raise SetupError(f"{name}: has {first_few(sorted(others))}; use --branch NAME, --pr or another repository")
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        card = (folder / CARD).read_text("utf-8").replace(f'"{folder.name}"', f'"{name}"') if CARD in files else ""
        contents = {CARD: card.encode()} if card else {}
        additions = [CommitOperationAdd(file, contents.get(file, folder / file)) for file in files]
        commit = api.create_commit(name, additions, commit_message="Upload a model", revision=branch, create_pr=as_pr)
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:  # type: ignore[attr-defined]  # from httpx
        reason = " ".join((getattr(error, "server_message", None) or str(error.__cause__ or error)).split())[:200]
        raise SetupError(f"{name}: the upload failed, which is one commit of all files: {reason}; {advice}") from error
    return commit.pr_url or commit.commit_url


def check_readiness(folder: Path, names: Iterable[str]) -> Iterator[Check]:
    """Check whether other programs can load the named files of a folder. Only the headers of weights are read."""
    from safetensors import SafetensorError, safe_open

    names, tensors = set(names), set[str]()
    needed = {"config.json", *([_IMAGES] if _IMAGES in names else ["tokenizer.json", "tokenizer_config.json"])}
    if _INDEX in names:
        needed |= set(read_json_object(folder / _INDEX)["weight_map"].values())
    elif not any(name.endswith(".onnx") for name in names):
        needed.add(WEIGHTS if CONFIG in names else "model.safetensors")
    is_gguf = any(name.endswith(".gguf") for name in names)
    problems = [f"{name} is missing" for name in sorted(needed - names) if not is_gguf]
    for name in sorted(names):
        try:
            if name.endswith(".json") and name != "modules.json":
                read_json_object(folder / name)
            elif name.endswith(".safetensors"):
                with safe_open(folder / name, framework="np") as file:
                    tensors |= set(file.keys())
        except (SafetensorError, OSError, SetupError):
            problems.append(f"{name} is truncated or damaged")
    yield _check("files", not problems, "; ".join(problems) or "complete", "copy the trained model's files again")
    read = [name for name in sorted(names) if name.endswith((".md", ".json", ".jinja")) and name != "tokenizer.json"]
    texts = [(folder / name).read_text("utf-8", "replace") for name in read]
    paths = [path[0] for text in texts for path in _LOCAL_PATH.finditer(text) if Path(path[1]).is_dir()]
    yield _check("local paths", not paths, first_few(paths) or "none", f"remove them from {CARD} or the settings")
    if CONFIG in names:
        base = Path(str(read_json_object(folder / CONFIG).get("base_model_name_or_path")))
        is_local = base.is_absolute() or base.exists()
        yield _check("base model", not is_local, str(base), "only here; push what 'export --to hf' writes instead")
    if VERIFICATION in names:
        failed = [one["name"] for one in read_json_object(folder / VERIFICATION)["checks"] if not one["passed"]]
        yield _check("verification", not failed, first_few(failed) or "passed", "export the model again")
    if is_gguf:
        yield _check("Ollama", "Modelfile" in names, "Modelfile", "missing; write 'FROM ./model.gguf' into it")
    elif not problems:
        yield from _check_model(folder, names, tensors)


def _check(name: str, passed: bool, result: str, advice: str) -> Check:
    return Check(name=name, passed=passed, result=result if passed else f"{result}: {advice}")


def _check_model(folder: Path, names: set[str], tensors: set[str]) -> Iterator[Check]:
    import transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        yield _check("architecture", False, " ".join(str(error).split())[:80], "transformers cannot load config.json")
        return
    notes = read_notes(folder)
    model_class = getattr(transformers, name := (config.architectures or ["none"])[0], None)
    if not {CONFIG, "modules.json", "export.json"} & names:
        auto_class = getattr(transformers, saved_as(FACTS[notes["task"]].auto_class))
        right = auto_class._model_mapping.get(type(config), type).__name__
        yield _check("architecture", name == right, name, f"expected {right}")
        yield _check("dtype", not hasattr(config, "quantization_config"), str(config.dtype), "has quantization_config")
    fused = next((name for name in tensors if name.endswith("experts.gate_up_proj")), "")
    if fused and get_checkpoint_conversion_mapping(config.model_type):
        yield _check("experts", False, fused, "save with save_original_format=True")
    if model_class is None or not model_class.can_generate():
        return
    heads = {head for head in model_class._tied_weights_keys or () if "embed" not in head}
    if tensors and heads and CONFIG not in names:
        is_tied = (heads | {"embed_out.weight"}).isdisjoint(tensors)  # the head of GPT-NeoX in its files
        yield _check("tied head", config.tie_word_embeddings == is_tied, ("no", "yes")[is_tied], "config.json differs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    result, passed, end = "none", "messages" not in notes["columns"], tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.chat_template is not None:
        try:
            for turns in range(3):
                tokenizer.apply_chat_template(_CHAT * turns + _CHAT[:1], tokenize=False, add_generation_prompt=True)
            after = str(tokenizer.apply_chat_template(_CHAT, tokenize=False)).rpartition("REPLY")[2]
            end = next(filter(after.startswith, map(str, tokenizer.added_tokens_decoder.values())), end)
            result, passed = "renders 3 chats", True
        except Exception as error:  # templates raise errors of many types
            result, passed = " ".join(f"fails ({error})".split())[:80], False
    yield _check("chat template", passed, result, "copy the trained model's chat_template.jinja again")
    stops = read_json_object(folder / _GENERATION).get("eos_token_id") if _GENERATION in names else None
    ends = tokenizer.convert_ids_to_tokens([stops] if isinstance(stops, int) else stops or [])
    yield _check("end tokens", end in ends, ", ".join(ends) or "none", f"add {end} to eos_token_id in {_GENERATION}")
