from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import ClientDisconnect

from fulltune.predict import Predictor, columns_read, row_from_text
from fulltune.system import signals
from fulltune.tasks import Row

REQUESTS, ROWS, CHARACTERS, BODY_BYTES, SECONDS = 64, 256, 100_000, 8 * 2**20, 60.0
"""Most requests at once, rows of a request, characters of a text (or items of a list), bytes of a body, and time."""


def make_request_model(notes: Mapping[str, Any]) -> type[BaseModel]:
    """Return the pydantic model of a request with the columns that the model reads."""
    text: Any = Annotated[str, Field(max_length=CHARACTERS)]
    texts: Any = Annotated[list[text], Field(max_length=CHARACTERS)]
    # Never a path: it would read the server's files.
    image: Any = Annotated[str, AfterValidator(lambda content: base64.b64decode(content, validate=True))]
    types = {"tokens": texts, "choices": texts, "image": image}
    read = columns_read(notes).items()
    cells: Any = {f"cell{i}": (types.get(role, text), Field(alias=column)) for i, (role, column) in enumerate(read)}
    row: Any = create_model("RequestRow", **cells)
    rows: Any = (Annotated[list[row], Field(min_length=1, max_length=ROWS)], None)
    fields: Any = {"rows": rows, "texts": (Annotated[list[text], Field(min_length=1, max_length=ROWS)], None)}
    if len(read) > 1 or "image" in notes["columns"]:
        del fields["texts"]
    return create_model("PredictRequest", __config__=ConfigDict(extra="forbid"), **fields)


def parse_rows(request_model: type[BaseModel], body: bytes, notes: Mapping[str, Any]) -> list[Row]:
    """Return a request's rows, or raise `HTTPException` with the places of its errors."""
    try:
        request = request_model.model_validate_json(body).model_dump(by_alias=True, exclude_unset=True, warnings=False)
    except ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()[:5]]
        raise HTTPException(422, "; ".join(f"{place or 'body'}: {words}" for place, words in problems)) from None
    if len(request) != 1:
        raise HTTPException(422, f"body: expected one of {', '.join(request_model.model_fields)}")
    return request["rows"] if "rows" in request else [row_from_text(text, notes) for text in request["texts"]]


def answer_rows(predictor: Predictor, rows: Sequence[Row]) -> list[dict[str, Any] | Exception]:
    """Return each row's answer or why there is none, or the exception that the model raised."""
    try:
        return [
            (row.answer or {"error": row.refused and row.refused.reason}) | ({"truncated": True} if row.is_cut else {})
            for row in predictor.answer_each(rows)
        ]
    except Exception as error:
        if len(rows) > 1:  # rows of other requests must not fail with it
            return [result for row in rows for result in answer_rows(predictor, [row])]
        return [error]


class Endpoint:
    """Answers the rows of all waiting requests in batches, in one thread."""

    def __init__(self, predictor: Predictor, name: str) -> None:
        self.predictor, self.name = predictor, name
        self.request_model = make_request_model(predictor.notes)
        self.waiting: asyncio.Queue[tuple[Row, asyncio.Future[Any]]] = asyncio.Queue()
        self.num_requests, self.tasks = 0, set[asyncio.Task[None]]()
        self.app = FastAPI(openapi_url=None)  # its page of docs would load from a CDN
        self.app.add_api_route("/health", self.health)
        self.app.add_api_route("/predict", self.predict, methods=["POST"])

    def run(self, listening: socket.socket) -> None:
        """Serve until Ctrl-C or SIGTERM, and finish the requests that have begun."""
        config = uvicorn.Config(self.app, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
        # uvicorn raises the signal again once it is down.
        with contextlib.suppress(KeyboardInterrupt), signals.temporary_handlers(signal.default_int_handler):
            uvicorn.Server(config).run(sockets=[listening])

    async def health(self) -> JSONResponse:
        if any(task.done() for task in self.tasks):
            raise HTTPException(503, "the thread that answers has ended; start the server again")
        notes = self.predictor.notes
        facts = {"task": notes["task"], "columns": [*columns_read(notes).values()], "labels": notes["labels"]}
        return JSONResponse({"status": "ok", "model": self.name, **facts, "fulltune": metadata.version("fulltune")})

    async def predict(self, request: Request) -> JSONResponse:
        if self.num_requests >= REQUESTS:
            raise HTTPException(503, f"{REQUESTS} requests are waiting", {"Retry-After": "1"})
        self.num_requests += 1
        self.tasks = self.tasks or {asyncio.create_task(self._answer_waiting())}
        try:
            async with asyncio.timeout(SECONDS):
                body = bytearray()
                async for part in request.stream():
                    body += part
                    if len(body) > BODY_BYTES:
                        raise HTTPException(413, f"the body has more than {BODY_BYTES:,} bytes")
                rows = parse_rows(self.request_model, bytes(body), self.predictor.notes)
                futures = [asyncio.get_running_loop().create_future() for _ in rows]
                for row_and_future in zip(rows, futures, strict=True):
                    self.waiting.put_nowait(row_and_future)
                return JSONResponse({"answers": await asyncio.gather(*futures)})
        except TimeoutError:
            raise HTTPException(504, f"no answer within {SECONDS:g} s; send fewer rows at once") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body is incomplete") from None
        finally:
            self.num_requests -= 1

    async def _answer_waiting(self) -> None:
        window = self.predictor.batch_size
        if self.predictor.model.device.type == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core for HTTP
            self.predictor.batch_size = min(window, 8)  # less padding
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < window and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            batch = [(row, future) for row, future in batch if not future.done()]  # done: too late
            results = await asyncio.to_thread(answer_rows, self.predictor, [row for row, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if isinstance(result, Exception) and not future.done():
                    future.set_exception(result)
                elif not future.done():
                    future.set_result(result)
