"""`fulltune serve`: answers as `Predictor` gives them, limits, malformed bodies, real processes; and `fulltune chat`.

The models are random and never trained.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fulltune.predict import PredictedRow, Predictor, load_predictor
from fulltune.recipe.file import load_recipe
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.contract.test_predict import ASKED, KINDS, alike, made

NO_EXTRA = "the extra serve is not installed"
uvicorn = pytest.importorskip("uvicorn", reason=NO_EXTRA)
pytest.importorskip("fastapi", reason=NO_EXTRA)
# Not skipped: a fault in the module itself must fail.
endpoint: Any = import_module("fulltune.serve.endpoint")
pytestmark = pytest.mark.slow
ENDPOINT_KINDS = [kind for kind in KINDS if KINDS[kind][1] != "causal-lm"]


class Client:
    """A client of a server in a thread of this process."""

    def __init__(self, served: endpoint.Endpoint, port: int) -> None:
        self.served, self.port = served, port

    def send(self, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any, http.client.HTTPResponse]:
        """Post a body: bytes as they are, an iterator of bytes in chunks, all else as JSON."""
        data = body if isinstance(body, (bytes, Iterator)) else json.dumps(body).encode()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("POST", "/predict", data, headers or {}, encode_chunked=isinstance(body, Iterator))
            response = connection.getresponse()
            content = response.read()
        return response.status, json.loads(content) if content[:1] == b"{" else content.decode(), response

    def answers(self, body: Any) -> list[dict[str, Any]]:
        status, answer, _ = self.send(body)
        assert status == 200, answer
        return answer["answers"]  # type: ignore[no-any-return]  # JSON

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
            return json.loads(response.read())  # type: ignore[no-any-return]  # JSON


@contextlib.contextmanager
def serving(predictor: Predictor) -> Iterator[Client]:
    served = endpoint.Endpoint(predictor, "a-run")
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(served.app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Client(served, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("classifier"), "single_label")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    with serving(load_predictor(folder)) as made_client:
        yield made_client


def same(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of numbers: another batch may add up in another order."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return alike(one, other)


# ---- answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENDPOINT_KINDS)
def test_answers_are_the_predictors(kind: str, tmp_path: Path) -> None:
    predictor = load_predictor(made(tmp_path / "model", kind))
    rows = [ASKED[kind][0], {name: value * 3 for name, value in ASKED[kind][0].items()}, ASKED[kind][0]]
    if kind == "choice":
        rows[1] = {"question": "what is it?", "choices": ["snow", "hail and storm"]}
    expected = predictor.predict(rows)
    with serving(predictor) as client:
        answers = client.answers({"rows": [{**row, "id": 7, "label": None} for row in rows]})
        assert set(client.health()["columns"]) == set(ASKED[kind][0])
    assert same(answers, json.loads(json.dumps(expected)))


def test_rows_of_many_clients_get_their_own_answers(client: Client) -> None:
    texts = [[f"the {word} number {number}" for number in range(1 + len(word))] for word in tiny.WEATHER + tiny.FOOD]
    expected = [client.served.predictor.predict([{"text": text} for text in some]) for some in texts]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda some: client.answers({"texts": some}), texts))
    assert same(answers, expected)


def test_row_without_answer_has_the_reason_in_its_place_and_a_long_row_is_marked(client: Client) -> None:
    answers = client.answers({"texts": ["sun", " ", "sun " * 500]})
    assert "error" not in answers[0]
    assert answers[1] == {"error": "column 'text' is empty"}
    assert [answer.get("truncated") for answer in answers] == [None, None, True]


def test_health_describes_the_model(client: Client) -> None:
    health = client.health()
    assert (health["status"], health["model"], health["task"]) == ("ok", "a-run", "text-classification")
    assert health["labels"] == KINDS["single_label"][3]


# ---- what is refused -------------------------------------------------------------------------------------------

GOOD = json.dumps({"rows": [{"text": "the sun 😀"}], "texts": 0}).replace(', "texts": 0', "").encode()
VALUES = ["null", "true", "0", "-1.5", "1e999", "NaN", "-Infinity", "{}", "[]", "[[]]", '{"a": 1}', "9" * 5000]
PLACES = ["%s", '{"rows": %s}', '{"rows": [%s]}', '{"rows": [{"text": %s}]}', '{"texts": %s}', '{"texts": [%s]}']
PLACES += ['{"rows": [{"text": "a"}, %s]}', '{"texts": ["a", %s]}', '{"texts": ["a"], "rows": %s}']
PLACES += ['{"rows": [{"txt": %s}]}', '{"texts": ["a"], "more": %s}']
ODD = ["", " ", "[" * 100_000, '{"rows":' * 50_000, '{"rows": [{"text": "\\ud800"}]}', '{"texts": ["\\uDE00 b"]}', "'"]
ODD += ['{"rows": [{"text": "a"}]} x', '{rows: [{"text": "a"}]}', "{'texts': ['a']}", '{"texts": ["a",]}', "text=a"]
ODD += ['{"texts": ["a\nb"]}', '{"texts": ["\\x41"]}', "\ufeff" * 2 + '{"texts": ["a"]}']
MALFORMED = [place % value for place in PLACES for value in VALUES] + ODD
BYTES = [text.encode() for text in MALFORMED] + [GOOD[:end] for end in range(len(GOOD))]
BYTES += [GOOD[:place] + b"\xff" + GOOD[place:] for place in range(len(GOOD))]
BYTES += ['{"texts": ["é"]}'.encode(code) for code in ("latin-1", "utf-16", "utf-32")]
BYTES += [gzip.compress(GOOD)]


def test_two_hundred_kinds_of_malformed_bodies_are_refused_with_the_place(client: Client) -> None:
    assert len(set(BYTES)) >= 200
    accepted = []
    for body in BYTES:
        status, answer, _ = client.send(body)
        if status != 422 or not re.match(r"(body|rows|texts|more|a)[\w.]*: ", answer["detail"]):
            accepted.append((body[:60], status, answer))
    assert accepted == []
    assert client.answers(GOOD)[0]["label"]


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        ("tags", {"tokens": "a sentence"}, "rows.0.tokens: Input should be a valid array"),
        ("tags", {"tokens": ["a", 1]}, "rows.0.tokens.1: Input should be a valid string"),
        ("choice", {"question": "a", "choices": [["b"], "c"]}, "rows.0.choices.0: Input should be a valid string"),
        ("span", {"question": "a"}, "rows.0.context: Field required"),
    ],
)
def test_wrong_cell_is_named(kind: str, row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with serving(load_predictor(made(tmp_path / "model", kind))) as client:
        assert client.send({"rows": [row]})[:2] == (422, {"detail": problem})


def test_limits_of_rows_characters_and_bytes(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(client.answers({"texts": ["sun"] * endpoint.ROWS})) == endpoint.ROWS
    status, answer, _ = client.send({"texts": ["sun"] * (endpoint.ROWS + 1)})
    assert (status, "256" in answer["detail"]) == (422, True)
    status, answer, _ = client.send({"texts": ["sun", "a" * (endpoint.CHARACTERS + 1)]})
    assert (status, answer["detail"]) == (422, "texts.1: String should have at most 100000 characters")
    monkeypatch.setattr(endpoint, "BODY_BYTES", 1000)
    assert client.answers(b" " * (1000 - len(GOOD)) + GOOD)
    assert client.send(b" " * (1001 - len(GOOD)) + GOOD)[0] == 413
    assert client.send(iter([b" " * 400] * 3 + [GOOD]))[0] == 413


def test_body_in_chunks_without_a_length_is_read(client: Client) -> None:
    assert client.send(iter([GOOD[:5], GOOD[5:]]))[0] == 200


def test_other_paths_and_methods_are_refused(client: Client) -> None:
    for path, status in (("/predict", 405), ("/docs", 404), ("/openapi.json", 404), ("/../etc/passwd", 404)):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{client.port}{path}", timeout=5)
        assert refusal.value.code == status


# ---- load ------------------------------------------------------------------------------------------------------


class Held:
    """Makes the predictor wait until `go` is set, and notes the rows that it got."""

    def __init__(self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.began, self.texts = threading.Event(), threading.Event(), list[str]()
        answer_each = predictor.answer_each

        def wait(rows: Sequence[dict[str, Any]], *options: Any) -> Iterator[PredictedRow]:
            self.began.set()
            assert self.go.wait(20)
            self.texts += [row["text"] for row in rows]
            if any(row["text"] == "bomb" for row in rows):
                raise RuntimeError("boom")
            return answer_each(rows, *options)

        monkeypatch.setattr(predictor, "answer_each", wait)


@pytest.fixture
def held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Client, Held]]:
    predictor = load_predictor(folder)
    holding = Held(predictor, monkeypatch)
    with serving(predictor) as client:
        yield client, holding
        holding.go.set()


def test_full_queue_is_refused_and_health_answers_meanwhile(
    held: tuple[Client, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, holding = held
    monkeypatch.setattr(endpoint, "REQUESTS", 2)
    with ThreadPoolExecutor(2) as clients:
        waiting = [clients.submit(client.send, {"texts": ["sun"]}) for _ in range(2)]
        wait_until(lambda: client.served.num_requests == 2)
        status, answer, response = client.send({"texts": ["rain"]})
        assert (status, response.getheader("Retry-After")) == (503, "1")
        assert answer == {"detail": "2 requests are waiting"}
        assert client.health()["status"] == "ok"
        holding.go.set()
        assert [future.result()[0] for future in waiting] == [200, 200]
    assert client.send({"texts": ["rain"]})[0] == 200


def test_late_answer_is_504_and_rows_nobody_waits_for_are_not_computed(
    held: tuple[Client, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, holding = held
    monkeypatch.setattr(endpoint, "SECONDS", 0.3)
    assert client.send({"texts": ["first"]})[0] == 504
    assert client.send({"texts": ["second"]})[:2] == (
        504,
        {"detail": "no answer within 0.3 s; send fewer rows at once"},
    )
    monkeypatch.setattr(endpoint, "SECONDS", 30)
    holding.go.set()
    assert client.send({"texts": ["third"]})[0] == 200
    assert holding.texts == ["first", "third"]


def test_row_on_which_the_model_fails_takes_no_other_with_it(held: tuple[Client, Held]) -> None:
    client, holding = held
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(client.send, {"texts": ["sun"]})
        assert holding.began.wait(20)
        others = [clients.submit(client.send, {"texts": [text]}) for text in ("bomb", "rain")]
        wait_until(lambda: client.served.num_requests == 3)
        holding.go.set()
        assert [future.result()[0] for future in (first, *others)] == [200, 500, 200]


def test_client_that_leaves_or_is_slow_frees_its_place(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n" + GOOD[:9]
    with socket.create_connection(("127.0.0.1", client.port)) as leaving:
        leaving.sendall(head)
        wait_until(lambda: client.served.num_requests == 1)
    wait_until(lambda: client.served.num_requests == 0)
    monkeypatch.setattr(endpoint, "SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", client.port)) as slow:
        slow.sendall(head)
        assert slow.recv(100).startswith(b"HTTP/1.1 504 ")
    assert client.served.num_requests == 0


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- images ----------------------------------------------------------------------------------------------------


def test_image_is_sent_as_base64_and_a_path_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="the extra images is not installed")
    from transformers import AutoModelForImageClassification

    model = tiny.save_image_model(tmp_path / "model")
    AutoModelForImageClassification.from_pretrained(model, num_labels=2).save_pretrained(model)
    notes = {"task": "image-classification", "problem_type": "single_label", "labels": ["different", "same"]}
    notes |= {"columns": {"image": "photo", "label": "label"}, "joint": "", "max_length": 4}
    (model / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    image = next(tiny.write_images(tmp_path / "images", 1).rglob("*.png"))
    content = base64.b64encode(image.read_bytes()).decode()
    monkeypatch.chdir(tmp_path)
    shutil.copy(image, "photoimg")  # a name of the alphabet of base64
    predictor = load_predictor(model)
    with serving(predictor) as client:
        [answer, unread] = client.answers({"rows": [{"photo": content}, {"photo": "photoimg"}]})
        assert same(answer, predictor.predict([{"photo": image.read_bytes()}])[0])
        assert unread == {"error": "6 bytes: cannot be decoded: unknown image format"}
        for value in (
            str(image),
            {"path": str(image)},
            {"bytes": content},
            f"data:image/png;base64,{content}",
            1,
            None,
        ):
            status, problem, _ = client.send({"rows": [{"photo": value}]})
            assert (status, problem["detail"].startswith("rows.0.photo: ")) == (422, True)
        assert client.send({"texts": [str(image)]})[0] == 422


# ---- the command -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_served_run_answers_until_a_signal(number: signal.Signals, folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "fulltune.cli.app", "serve", str(folder), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"curl http://127.0.0.1:{port}/predict" in line
        body = re.findall("-d '(.*)'", line)[0].encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", body, timeout=60) as response:
            assert json.loads(response.read())["answers"][0]["label"] in KINDS["single_label"][3]
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def write_notes(folder: Path, task: str) -> None:
    notes = {"task": task, "problem_type": "any", "columns": {}, "labels": [], "joint": ""}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")


def test_port_in_use_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    write_notes(tmp_path, "text-classification")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        result = fulltune("serve", tmp_path, "--port", port)
    words = f"serve: cannot listen on 127.0.0.1, port {port}: Address already in use; change --port or --host"
    assert (result.code, result.problems) == (2, [words])
    assert fulltune("serve", tmp_path, "--host", "no.such.host.invalid").code == 2
    assert fulltune("serve", tmp_path, "--port", 70000).code == 2


@pytest.mark.parametrize(("task", "package"), [("text-classification", "uvicorn"), ("causal-lm", "openai")])
def test_missing_package_is_named_with_its_command(
    task: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notes(tmp_path, task)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    result = fulltune("serve", tmp_path)
    assert result.problems == [f"serve: the package '{package}' is missing; pip install 'fulltune[serve]'"]
    assert result.code == 2


@pytest.mark.parametrize("kind", ENDPOINT_KINDS)
def test_example_is_a_request_that_is_accepted(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.Endpoint, "run", lambda *_: None)
    model = made(tmp_path / "model", kind)
    body = re.findall("-d '(.*)'", fulltune("serve", model, "--port", free_port()).err)[0]
    notes = json.loads((model / "fulltune.json").read_text(encoding="utf-8"))
    assert endpoint.parse_rows(endpoint.make_request_model(notes), body.encode(), notes)


def handed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, list[str]]:
    """What `fulltune serve` writes, and the command that it becomes."""
    commands: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    monkeypatch.setattr(endpoint.Endpoint, "run", lambda *_: None)  # execv returns only here
    result = fulltune("serve", folder, "--port", free_port())
    return result, commands[0] if commands else []


def test_language_model_is_handed_over_to_transformers_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(tmp_path / "model", "chat")
    result, command = handed_over(model, monkeypatch)
    assert command[1:6] == ["-P", "-m", "transformers.cli.transformers", "serve", str(model)]
    assert command[6:8] == ["--host", "127.0.0.1"]
    assert f"vllm serve {model}" in result.err
    assert f'/v1/chat/completions -H \'Content-Type: application/json\' -d \'{{"model": "{model}"' in result.err
    (model / "chat_template.jinja").unlink()
    assert "/v1/completions" in handed_over(model, monkeypatch)[0].err


def test_language_model_without_the_pretrained_weights_is_to_be_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(tmp_path / "model", "chat")
    (model / "adapter_config.json").write_text("{}")
    result, command = handed_over(model, monkeypatch)
    assert (result.code, command) == (2, [])
    assert f"fulltune export {model} --to hf -o NEW" in result.err


@pytest.mark.long
def test_transformers_serve_answers_as_the_model_does(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason=NO_EXTRA)
    model, port = made(tmp_path / "model", "chat"), free_port()
    command = [sys.executable, "-m", "fulltune.cli.app", "serve", str(model), "--port", str(port)]
    messages = [{"role": "user", "content": "what is in the town?"}]
    body = {"model": str(model), "messages": messages, "max_tokens": 8, "temperature": 0}
    with subprocess.Popen(command) as process:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        end = time.monotonic() + 120
        while True:
            try:
                answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
                break
            except urllib.error.URLError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    [expected] = load_predictor(model).predict([{"messages": messages}], max_new_tokens=8)
    assert answer["choices"][0]["message"]["content"].strip() == expected["answer"]


# ---- chat ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a chat model; its pretrained model has other weights."""
    run = tmp_path_factory.mktemp("chat") / "run"
    made(run / "models" / "full", "chat")
    base = tiny.save_model(run.parent / "base", "llama", seed=5, initializer_range=0.5)
    recipe = load_recipe(tiny.write_recipe(run.parent / "recipe.yaml", base, "x.csv", task="causal-lm"))
    (run / "recipe.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}), encoding="utf-8")
    return run


def answer_to(predictor: Predictor, *contents: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return str(predictor.predict([{"messages": messages}], 6)[0]["answer"])


def test_chat_answers_each_line_with_what_came_before(chat_run: Path) -> None:
    predictor = load_predictor(chat_run)
    first = answer_to(predictor, "what?")
    then, alone = answer_to(predictor, "what?", first, "and?"), answer_to(predictor, "and?")
    assert len({first, then, alone}) == 3
    result = fulltune("chat", chat_run, "--max-new-tokens", 6, stdin="what?\n\nand?\n/new\nand?\n/exit\nwhat?\n")
    assert result.code == 0
    assert [line.strip() for line in result.out.split("\n") if line] == [first, then, alone]


def test_chat_beside_base_shows_before_and_after(chat_run: Path) -> None:
    result = fulltune("chat", chat_run, "--max-new-tokens", 6, "--beside", "base", stdin="what?\n")
    before, after, _ = result.out.split("\n")
    assert after.startswith("fine-tuned: ")
    assert after.partition(": ")[2].strip() == answer_to(load_predictor(chat_run), "what?")
    assert before.startswith("pretrained: ")
    assert before.partition(": ")[2] != after.partition(": ")[2]
    beside = fulltune("chat", chat_run, "--max-new-tokens", 6, "--beside", chat_run.parent / "base", stdin="what?\n")
    assert beside.out.split("\n")[0].partition(": ")[2] == before.partition(": ")[2]


@pytest.mark.parametrize("kind", ["prompt_completion", "source_target"])
def test_chat_with_a_model_of_pairs_takes_each_line_alone(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", kind)
    [expected] = load_predictor(model).predict([{next(iter(ASKED[kind][0])): "the sun"}], 6)
    result = fulltune("chat", model, "--max-new-tokens", 6, stdin="the sun\nthe sun\n")
    assert [line.strip() for line in result.out.split("\n")[:-1]] == [expected["answer"]] * 2


def test_chat_with_a_classifier_is_refused(folder: Path) -> None:
    result = fulltune("chat", folder, stdin="what?\n")
    assert result.code == 2
    assert result.problems == [f"{folder}: is a model for text-classification; use 'fulltune predict'"]
