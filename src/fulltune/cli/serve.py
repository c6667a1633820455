from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import socket
import sys
from typing import Any

import typer

from fulltune.cli import options, stages
from fulltune.cli.stages import note
from fulltune.errors import SetupError


def serve(
    run_folder: options.ModelFolder,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    method: options.MethodName = None,
) -> None:
    """Answer over HTTP: causal-lm with OpenAI's API (transformers serve), other tasks at POST /predict."""
    from fulltune import predict
    from fulltune.methods import folder as folders

    folder = stages.choose_model_folder(run_folder, method)
    notes = folders.read_notes(folder)
    is_handed_over = notes["task"] == "causal-lm"  # transformers serve does not know encoder-decoders
    for package in ("fastapi", "uvicorn", *["openai"] * is_handed_over):
        if importlib.util.find_spec(package) is None:
            raise SetupError(f"serve: the package '{package}' is missing; pip install 'fulltune[serve]'")
    if is_handed_over and folders.has_only_trained_parameters(folder):
        raise SetupError(
            f"{folder}: is not a whole model; write one: fulltune export {folder} --to hf -o NEW, and serve NEW"
        )
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]
        raise SetupError(f"serve: cannot listen on {host}, port {port}: {why}; change --port or --host") from None
    row = {
        column: ["..."] if role in ("tokens", "choices") else "BASE64" * (role == "image") or "..."
        for role, column in predict.columns_read(notes).items()
    }
    path, body = "/predict", dict[str, Any](rows=[row])
    if is_handed_over:
        path, body = "/v1/completions", {"model": str(folder), "prompt": "..."}
        if (folder / "chat_template.jinja").exists():
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": body.pop("prompt")}]
    request = f"{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    ready = f"serving {folder} until Ctrl-C; try: curl http://{host}:{port}{request}"
    if not host.startswith(("127.", "localhost")):
        note(f"--host {host}: everybody who reaches this address can use the model, because there is no password")
    if is_handed_over:
        note(ready)
        listening.close()
        note(f"starting transformers serve; for many users at once: vllm serve {folder}")
        os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"  # on PyPI
        command = [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", str(folder)]
        os.execv(sys.executable, [*command, "--host", host, "--port", str(port)])
    from fulltune.serve.endpoint import Endpoint

    endpoint = Endpoint(predict.load_predictor(folder), run_folder.resolve().name)
    note(ready)
    endpoint.run(listening)


def chat(
    run_folder: options.ModelFolder,
    beside: options.Beside = None,
    max_new_tokens: options.MaxNewTokens = 128,
    method: options.MethodName = None,
) -> None:
    """Talk to a trained language model. /new starts over; /exit or Ctrl-D ends."""
    from fulltune.serve.chat import open_conversations

    conversations = open_conversations(stages.choose_model_folder(run_folder, method), beside)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (line := input("> " * sys.stdin.isatty()).strip()) != "/exit":
            for conversation in conversations if line else ():
                if line == "/new":
                    conversation.messages.clear()
                    continue
                if len(conversations) > 1:
                    typer.echo(f"{conversation.name}: ", nl=False)
                if reason := conversation.ask(line, max_new_tokens):
                    note(f"no answer: {reason}")
