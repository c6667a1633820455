from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fulltune.cli import options, stages
from fulltune.cli.stages import out
from fulltune.errors import SetupError
from fulltune.system import signals


def export(
    run_folder: options.ModelFolder,
    to: Annotated[
        str, typer.Option("--to", help="hf, onnx, gguf or sentence-transformers.", metavar="FORMAT", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new folder. Default: RUN/exports/MODEL-FORMAT.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="onnx: int8; gguf: q8_0 or q4_k_m.", metavar="TYPE")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="hf, gguf: float32, bfloat16 or float16. Default: as in the model's files.", metavar="DTYPE"),
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="hf: largest weights file.", metavar="SIZE")] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="gguf: your llama.cpp checkout, instead of the packaged converter.")
    ] = None,
    method: options.MethodName = None,
    as_json: options.Json = False,
) -> None:
    """Write a model, with LoRA merged, in another format, and verify on test rows that it gives the same answers."""
    from fulltune.export import FORMATS, export_model
    from fulltune.export.source import ExportRequest
    from fulltune.report.format import pages
    from fulltune.report.run.model_card import build_verification_tables

    if to not in FORMATS:
        raise SetupError(f"--to {to}: expected one of {', '.join(FORMATS)}")
    model_folder = stages.choose_model_folder(run_folder, method)
    name = "-".join(filter(None, (model_folder.name, to, quantize or dtype)))
    output = output or model_folder.resolve().parents[1] / "exports" / name
    request = ExportRequest(model_folder, to, output.resolve(), quantize, dtype, max_shard_size, llama_cpp)
    # SIGTERM must also delete what is half written.
    stopping = signals.temporary_handlers(signal.default_int_handler)
    with stopping, stages.progress_display(details=False) as display:
        verification = export_model(request, display)
    if as_json:
        stages.print_json({"output": str(output), **verification.model_dump(mode="json")})
        return
    pages.print_parts(out, build_verification_tables(verification))
    out.print(f"export: {escape(str(output))}", soft_wrap=True)
