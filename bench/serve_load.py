"""`fulltune serve` under load: errors and memory over many requests of 32 clients, and its speed against `pipeline()`.

Each request holds one text of 3 to 25 words for a classifier on MiniLM-L6. The other server is FastAPI with a plain
`def` that calls `pipeline()`, as most tutorials write it. Both run at once, and get rounds of requests in turn from
another process, over connections that stay open. Memory is the resident set of the server's process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.predict_rows import LABELS, TEXT, write_model
from bench.public_data import MINILM
from bench.results import Figure
from bench.runs import SMOKE, environment, fresh, fulltune, script

CLIENTS, REQUESTS, REQUESTS_OF_PIPELINE = (4, 8, 4) if SMOKE else (32, 500, 125)
"""Clients, and the requests of a round to each server."""
PIPELINE = """
import sys
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
classify = pipeline("text-classification", model=sys.argv[1], top_k=None)

class Body(BaseModel):
    text: str

@app.post("/predict")
def predict(body: Body):
    return classify(body.text)

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once it answers."""
    with subprocess.Popen([*command, str(port)], env=environment(OMP_NUM_THREADS=str(os.cpu_count()))) as process:
        try:
            while True:
                with contextlib.suppress(OSError), contextlib.closing(connection(port)) as client:
                    client.request("GET", "/health")
                    client.getresponse()
                    break
                if process.poll() is not None:
                    sys.exit(f"{command[:4]} ended with {process.returncode}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def connection(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=120)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def ask(port: int, bodies: list[bytes]) -> int:
    """Send requests over one connection; return how many failed."""
    failed = 0
    with contextlib.closing(connection(port)) as client:
        for body in bodies:
            client.request("POST", "/predict", body, {"Content-Type": "application/json"})
            response = client.getresponse()
            answer = response.read()
            failed += response.status != 200 or not all(label.encode() in answer for label in LABELS)
    return failed


def speed_and_failures(port: int, key: str, count: int, seed: int) -> tuple[float, int]:
    """Send a round of requests from all clients at once; return requests/s and how many failed."""
    draw, words = random.Random(seed), TEXT.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 25))) for _ in range(count)]
    bodies = [json.dumps({"text": text} if key == "text" else {key: [text]}).encode() for text in texts]
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        failed = sum(clients.map(lambda first: ask(port, bodies[first::CLIENTS]), range(CLIENTS)))
    return count / (time.monotonic() - began), failed


def resident_bytes(process: subprocess.Popen[bytes]) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    model = str(write_model(fresh(folder / "model"), MINILM))
    ports = free_port(), free_port()
    commands = fulltune("serve", model, "--port"), [sys.executable, "-c", PIPELINE, model]
    rounds = 2 if SMOKE else 4 if quick else 20
    ratios, memory, failures = [], [], 0
    with server(commands[0], ports[0]) as ours, server(commands[1], ports[1]):
        for number in range(rounds):
            speed, failed = speed_and_failures(ports[0], "texts", REQUESTS, number)
            pipelines, _ = speed_and_failures(ports[1], "text", REQUESTS_OF_PIPELINE, number)
            ratios.append(speed / pipelines)
            failures += failed
            memory.append(resident_bytes(ours))
            mebibytes = f"{memory[-1] / 2**20:.0f} MiB"
            print(f"  round {number + 1}: {speed:.0f} and {pipelines:.0f} requests/s, {mebibytes}", flush=True)
    requests = f"{rounds * REQUESTS:,} requests of {CLIENTS} clients"
    yield Figure(f"failed of {requests} to serve", failures, "requests", at_most=0)
    yield Figure("memory of serve at the end over that after 1,000 requests", memory[-1] / memory[1], "x", at_most=1.05)
    yield Figure("requests/s of serve over FastAPI with pipeline()", statistics.median(ratios), "x", at_least=1.0)


if __name__ == "__main__":
    script(measure, __doc__)
