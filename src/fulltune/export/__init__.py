"""Write a finished model in another format, and verify that the export gives the same answers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

from fulltune.errors import DoesNotFitError, GuardStop, InterruptedRun, SetupError
from fulltune.export import gguf, hf, onnx, sentence_transformers
from fulltune.export.source import ExportRequest, Source, open_source
from fulltune.export.verify import ComparedAnswers, compare_answers
from fulltune.files import write_json
from fulltune.methods import folder as folders
from fulltune.records.events import Listener, Message, PhaseBegan
from fulltune.records.export import VERIFICATION, ExportCheck, Verification
from fulltune.report import write_exported_card
from fulltune.system.hardware import disk_free_bytes
from fulltune.system.memory import explain_out_of_memory, is_out_of_memory
from fulltune.system.run_folder import explain_os_errors
from fulltune.text import format_bytes, parse_bytes

FORMATS = {"hf": hf, "onnx": onnx, "gguf": gguf, "sentence-transformers": sentence_transformers}
"""Modules with the constants `PACKAGES`, `QUANTIZATIONS`, `DTYPES`, and the functions `why_impossible`, `write`, `load`
(with the format's own runtime; None if the export has no logits), `check` (what only this format needs), `usage`."""


class NotVerified(GuardStop):
    """The exported model does not give the same answers as its source."""


def export_model(request: ExportRequest, listener: Listener = lambda event: None) -> Verification:
    """Export a run's model, verify the export, and move it to the output folder if every check passes.

    Raises:
        SetupError: An option, the run or the installation is wrong, or the format cannot store the model.
        DoesNotFitError: The memory or the disk is too small.
        NotVerified: A check failed. The export stays in `OUTPUT.not-verified`.
    """
    form = FORMATS[request.to]
    _check_request(form, request)
    listener(PhaseBegan(name="loading the model"))
    too_large = explain_out_of_memory("export", "free memory, or export on a larger machine")
    with explain_os_errors(request.output), too_large, open_source(request) as source:
        if why := form.why_impossible(source):
            raise SetupError(f"--to {request.to}: {why}")
        _check_disk(source)
        if (temperature := source.notes.get("temperature", 1.0)) != 1.0:
            text = f"the export's logits are not calibrated: divide them by the temperature {temperature:.4g}"
            listener(Message(text=text, level="warning"))
        part = Path(tempfile.mkdtemp(prefix=f".{request.output.name}.", dir=request.output.parent))
        try:
            listener(PhaseBegan(name=f"writing {request.to}"))
            _write(form, source, part)
            listener(PhaseBegan(name="verifying the export"))
            verification = _verify(form, source, part)
            write_json(part / VERIFICATION, verification.model_dump(mode="json"))
            write_json(part / folders.NOTES, source.notes)
            write_exported_card(request.model_folder, part, verification, form.usage(source, request.output.name))
            _share_as(part, (part / VERIFICATION).stat().st_mode & 0o777)
            return _move_if_verified(part, request.output, verification)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _check_request(form: ModuleType, request: ExportRequest) -> None:
    """Raise `SetupError` for what can be checked before the model is loaded."""
    problems = []
    if request.output.exists() and (not request.output.is_dir() or any(request.output.iterdir())):
        problems.append(f"{request.output}: already exists; choose another folder with --output")
    options = (("--quantize", request.quantize, form.QUANTIZATIONS), ("--dtype", request.dtype, form.DTYPES))
    problems += [
        f"{option} {value}: not available with --to {request.to}, which has: {', '.join(known) or 'none'}"
        for option, value, known in options
        if value is not None and value not in known
    ]
    if request.quantize is not None and request.dtype is not None:
        problems.append("--quantize and --dtype cannot be combined; choose one")
    if request.max_shard_size is not None and request.to != "hf":
        problems.append("--max-shard-size: only for --to hf")
    if request.llama_cpp is not None and request.to != "gguf":
        problems.append("--llama-cpp: only for --to gguf")
    try:
        parse_bytes(request.max_shard_size or "50GB")
    except ValueError as error:
        problems.append(f"--max-shard-size: {error}")
    if missing := [name for name in form.PACKAGES if _version(name) is None]:
        problems.append(f"--to {request.to}: {', '.join(missing)} missing; run: pip install 'fulltune[{request.to}]'")
    if problems:
        raise SetupError(problems)


def _check_disk(source: Source) -> None:
    request = source.request
    is_float32 = request.quantize or request.to not in ("hf", "gguf") or source.dtype == "float32"
    # A quantized file is made from one in float32.
    needed = source.model.num_parameters() * (4 if is_float32 else 2) * (2 if request.quantize else 1)
    if (free := disk_free_bytes(request.output)) < needed:
        raise DoesNotFitError(
            f"{request.output}: the export needs {format_bytes(needed)}, but the disk has {format_bytes(free)} free"
        )


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _write(form: ModuleType, source: Source, folder: Path) -> None:
    try:
        form.write(source, folder)
    except (SetupError, InterruptedRun, OSError):
        raise
    except Exception as error:  # each exporter has its own errors for a model that it does not know
        if is_out_of_memory(error):
            raise
        name, reason = type(source.model).__name__, " ".join(str(error).split())[:300]
        raise SetupError(
            f"--to {source.request.to}: the exporter cannot write {name} ({type(error).__name__}: {reason}); update "
            f"{', '.join(form.PACKAGES)}, or choose another format"
        ) from error


def _verify(form: ModuleType, source: Source, folder: Path) -> Verification:
    request, compared = source.request, ComparedAnswers()
    try:
        if (exported := form.load(source, folder)) is not None:
            compared = compare_answers(source, exported)
        checks = form.check(source, folder, exported)
    except Exception as error:  # each runtime has its own errors for a file that it cannot run
        if isinstance(error, InterruptedRun | DoesNotFitError) or is_out_of_memory(error):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace(str(folder), request.output.name)
        checks = [ExportCheck(name="loads and runs", result=text, expected="yes", passed=False)]
    return Verification(
        format=request.to,
        stored_as=request.quantize or request.dtype,
        rows=compared.rows,
        checks=(*checks, *compared.checks),
        metrics=compared.metrics,
        packages={name: _version(name) or "" for name in ("transformers", *form.PACKAGES)},
    )


def _share_as(folder: Path, mode: int) -> None:
    """Give a folder's files the permissions `mode`, because only the owner can read new folders and safetensors."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


def _move_if_verified(part: Path, output: Path, verification: Verification) -> Verification:
    refused = output.with_name(f"{output.name}.not-verified")
    shutil.rmtree(refused, ignore_errors=True)
    if failed := verification.failed:
        part.rename(refused)
        lines = [f"{check.name}: {check.result}, expected {check.expected}" for check in failed]
        raise NotVerified([*lines, f"{refused}: the export is here, because it does not answer like the model"])
    try:
        part.replace(output)
    except OSError:
        raise SetupError(f"{output}: another command wrote it meanwhile; choose another folder with --output") from None
    return verification
