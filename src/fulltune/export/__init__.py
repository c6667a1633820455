"""Write a finished model in another format, and verify that the export gives the same answers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from fulltune.errors import DoesNotFitError, GuardStop, InterruptedRun, SetupError
from fulltune.export.source import ExportRequest, Source, open_source
from fulltune.export.verify import ComparedAnswers, Exported, compare_answers
from fulltune.files import write_json
from fulltune.methods import folder as folders
from fulltune.records.events import Listener, Message, PhaseBegan
from fulltune.records.export import VERIFICATION, ExportCheck, Verification
from fulltune.report import write_exported_card
from fulltune.system.hardware import disk_free_bytes
from fulltune.system.run_folder import explain_os_errors
from fulltune.text import format_bytes, parse_bytes


class NotVerified(GuardStop):
    """The exported model does not give the same answers as its source."""


class FormatModule(Protocol):
    """Constants and functions of a format's module."""

    PACKAGES: Sequence[str]
    """Packages that write and run the format; `fulltune[FORMAT]` installs them."""
    QUANTIZATIONS: Sequence[str]
    DTYPES: Sequence[str]

    def why_impossible(self, source: Source) -> str | None:
        """Return why the format cannot store this model, or None."""

    def write(self, source: Source, folder: Path) -> None:
        """Write the exported model into a new folder."""

    def load(self, source: Source, folder: Path) -> Exported | None:
        """Load the exported model with the format's own runtime, or return None if it has no logits."""

    def check(self, source: Source, folder: Path, exported: Any) -> list[ExportCheck]:
        """Run the checks that only this format needs, such as those of its tokenizer."""

    def usage(self, source: Source, folder: str) -> str:
        """Return code that runs the export."""


def export_model(request: ExportRequest, listener: Listener = lambda event: None) -> Verification:
    """Export a run's model, verify the export, and move it to the output folder if every check passes.

    Raises:
        SetupError: An option, the run or the installation is wrong, or the format cannot store the model.
        DoesNotFitError: The disk has too little space.
        NotVerified: A check failed. The export stays in `OUTPUT.not-verified`.
    """
    form = cast(FormatModule, import_module(f"fulltune.export.{request.to.replace('-', '_')}"))
    _check_request(form, request)
    listener(PhaseBegan(name="loading the model"))
    with explain_os_errors(request.output), open_source(request) as source:
        if why := form.why_impossible(source):
            raise SetupError(f"--to {request.to}: {why}")
        if (temperature := source.notes.get("temperature", 1.0)) != 1.0:
            text = f"the export's logits are not calibrated: divide them by the temperature {temperature:.4g}"
            listener(Message(text=text, level="warning"))
        request.output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{request.output.name}.", dir=request.output.parent))
        try:
            listener(PhaseBegan(name=f"writing {request.to}"))
            form.write(source, part)
            listener(PhaseBegan(name="verifying the export"))
            verification = _verify(form, source, part)
            write_json(part / VERIFICATION, verification.model_dump(mode="json"))
            write_json(part / folders.NOTES, source.notes)
            write_exported_card(request.model_folder, part, verification, form.usage(source, request.output.name))
            part.chmod(0o755)  # `mkdtemp` makes a private folder
            return _move_if_verified(part, request.output, verification)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _check_request(form: FormatModule, request: ExportRequest) -> None:
    """Raise `SetupError` or `DoesNotFitError` for what can be checked before the model is loaded."""
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
    try:
        parse_bytes(request.max_shard_size)
    except ValueError as error:
        problems.append(f"--max-shard-size: {error}")
    if missing := [name for name in form.PACKAGES if _version(name) is None]:
        problems.append(f"--to {request.to}: {', '.join(missing)} missing; run: pip install 'fulltune[{request.to}]'")
    if problems:
        raise SetupError(problems)
    # Twice, because GGUF quantizes from a float32 file, and ONNX's exporter writes before it optimises.
    needed = 2 * sum(file.stat().st_size for file in request.model_folder.glob("*.safetensors"))
    if (free := disk_free_bytes(request.output)) < needed:
        raise DoesNotFitError(
            f"{request.output}: the export needs {format_bytes(needed)}, but the disk has {format_bytes(free)} free"
        )


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _verify(form: FormatModule, source: Source, folder: Path) -> Verification:
    request, compared = source.request, ComparedAnswers()
    try:
        if (exported := form.load(source, folder)) is not None:
            compared = compare_answers(source, exported)
        checks = form.check(source, folder, exported)
    except InterruptedRun:
        raise
    except Exception as error:  # each runtime has its own errors for a file that it cannot run
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


def _move_if_verified(part: Path, output: Path, verification: Verification) -> Verification:
    refused = output.with_name(f"{output.name}.not-verified")
    shutil.rmtree(refused, ignore_errors=True)
    if failed := verification.failed:
        part.rename(refused)
        lines = [f"{check.name}: {check.result}, expected {check.expected}" for check in failed]
        raise NotVerified([*lines, f"{refused}: the export is here, because its answers differ from the model's"])
    if output.exists():
        output.rmdir()
    part.rename(output)
    return verification
