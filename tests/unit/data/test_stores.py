"""Copies of files on the web and in object stores, and what goes wrong on the way."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPMessage
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.request import Request

import pytest

from fulltune.data.remote import buckets, fetch, unpack, web
from fulltune.errors import DataError, DoesNotFitError
from fulltune.recipe.address import address_problem, is_fetched
from fulltune.recipe.fields import Recipe
from fulltune.records.data import RemoteSource
from tests import tiny
from tests.s3 import serve_s3
from tests.unit.data import stage
from tests.web import Fault, Site, serve

ROWS = "".join(json.dumps(row) + "\n" for row in tiny.topic_rows(60)).encode()
PACKED = gzip.compress(ROWS, mtime=0)  # named in the ids of tests, which are the same in all processes
LONG = ROWS * 2000  # 10 MB
LISTING = Fault()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(web, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("NETRC", "/nonexistent")
    with serve() as made:
        made.files = {"/rows.jsonl": ROWS, "/long.jsonl": LONG}
        yield made


def copy(address: str, earlier: RemoteSource | None = None) -> RemoteSource:
    return fetch.fetch(address, lambda event: None, earlier)


def content(source: RemoteSource) -> bytes:
    return b"".join(Path(file).read_bytes() for file in source.files)


def leftovers() -> list[str]:
    """What is in the cache beside whole copies and locks."""
    return [path.name for path in fetch.cache_folder().iterdir() if path.suffix == ".part" and any(path.iterdir())]


def copied_bytes() -> int:
    with suppress(FileNotFoundError):  # of a folder that is renamed
        return sum(path.stat().st_size for path in fetch.cache_folder().rglob("*") if path.is_file())
    return 0


# ---- the web ---------------------------------------------------------------------------------------------------------


def test_file_on_the_web_is_copied_once(site: Site) -> None:
    first = copy(f"{site.address}/rows.jsonl")
    assert content(first) == ROWS
    assert copy(f"{site.address}/rows.jsonl") == first
    assert [wanted for _, wanted in site.requests] == ["bytes=0-0", "", "bytes=0-0"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"Accept-Ranges": "none"}, {"ETag": "", "Last-Modified": "Mon, 30 Nov 2026 10:00:00 GMT"}, {"ETag": ""}],
)
def test_cut_connections_and_errors_of_the_server_are_overcome(site: Site, headers: dict[str, str]) -> None:
    site.headers = headers
    site.faults = [Fault(500), LISTING, Fault(cut=3_000_000), Fault(503)]
    assert content(copy(f"{site.address}/long.jsonl")) == LONG
    has_version = headers.get("ETag") != "" or "Last-Modified" in headers
    assert site.requests[-1][1] == ("bytes=3000000-" if has_version else "")


def test_cut_answer_is_noticed_even_if_the_listing_had_no_length(site: Site) -> None:
    site.faults = [Fault(headers={"Accept-Ranges": "none", "Content-Length": ""}), Fault(cut=3_000_000)]
    site.headers = {"ETag": ""}
    assert content(copy(f"{site.address}/long.jsonl")) == LONG
    assert len(site.requests) == 3


def test_file_that_never_ends_whole_is_refused_and_goes_on_later(site: Site) -> None:
    site.faults = [LISTING, *(Fault(cut=1000) for _ in range(3))]
    with pytest.raises(
        DataError, match=r"ends after 3,000 of [\d,]+ bytes\); try again later: what has arrived is kept"
    ):
        copy(f"{site.address}/long.jsonl")
    assert len(leftovers()) == 1
    site.requests.clear()
    assert content(copy(f"{site.address}/long.jsonl")) == LONG
    assert [wanted for _, wanted in site.requests] == ["bytes=0-0", "bytes=3000-"]
    assert not leftovers()


def test_file_that_changes_half_way_is_refused_and_its_part_dropped(site: Site) -> None:
    other = LONG[::-1]
    site.faults = [LISTING, Fault(cut=1_000_000, then=lambda: site.files.update({"/long.jsonl": other}))]
    with pytest.raises(DataError, match=r"changes while it is copied; run again when it is no longer written"):
        copy(f"{site.address}/long.jsonl")
    assert not leftovers()
    assert content(copy(f"{site.address}/long.jsonl")) == other


def test_run_stays_with_its_version_and_refuses_another_without_a_copy(site: Site) -> None:
    address, heard = f"{site.address}/rows.jsonl", list[str]()
    first = copy(address)
    site.files["/rows.jsonl"] = ROWS[::-1]
    again = fetch.fetch(address, lambda event: heard.append(getattr(event, "text", "")), first)
    assert again == first
    assert f"this run goes on with {first.revision[:12]}" in heard[0]
    Path(first.files[0]).unlink()
    recorded = list[RemoteSource]()
    with pytest.raises(DataError, match=r"has changed since this run began, and the local copy is gone; .*--fresh"):
        fetch.fetch(address, lambda event: None, first, recorded.append)
    assert not recorded
    assert content(copy(address)) == ROWS[::-1]


def test_server_that_sends_more_than_announced_is_stopped(site: Site) -> None:
    site.faults = [LISTING, Fault(headers={"Content-Length": ""})]
    site.always = None
    size = len(ROWS)
    site.files["/rows.jsonl"] = ROWS
    site.headers = {"ETag": '"same"'}
    site.faults[1].then = lambda: None
    site.faults[0].then = lambda: site.files.update({"/rows.jsonl": ROWS * 9})
    with pytest.raises(DataError, match=f"sends more than the {size:,} bytes that it announced"):
        copy(f"{site.address}/rows.jsonl")


def test_server_that_asks_for_patience_gets_it_up_to_a_minute(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    site.faults = [Fault(429, {"Retry-After": "7"})]
    assert content(copy(f"{site.address}/rows.jsonl")) == ROWS
    assert slept == [7]
    site.faults = [Fault(429, {"Retry-After": "3600"})]
    with pytest.raises(DataError, match=r"answers 429 Too Many Requests; try again in 3600 s"):
        copy(f"{site.address}/rows.jsonl")


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("none.jsonl", None, "answers 404 Not Found; check the address"),
        ("rows.jsonl", Fault(403), r"answers 403 Forbidden; log in by 'machine 127.0.0.1 login .*' in ~/.netrc"),
        (
            "rows.jsonl",
            Fault(302, {"Location": "/rows.jsonl"}),
            "answers 302 The HTTP server returned a redirect error that would lead to an infinite loop; check",
        ),
        (
            "rows.jsonl",
            Fault(302, {"Location": "file:///etc/passwd"}),
            "Redirection to url 'file:///etc/passwd' is not allowed",
        ),
        ("page", Fault(headers={"Content-Type": "text/html"}), r"unknown type \(text/html\); expected .csv, "),
        ("rows.jsonl", Fault(302, {"Location": "http://[bad"}), r"leads to an address that is not valid \("),
        ("rows.jsonl", Fault(302, {"Location": f"http://{'x' * 64}.org/a.csv"}), r"that is not valid \(.*too long"),
        ("rows.jsonl", Fault(500), "answers 500 Internal Server Error; try again later"),
    ],
)
def test_refusal_says_what_to_do(site: Site, path: str, fault: Fault | None, message: str) -> None:
    site.files["/page"] = b"<html>"
    site.always = fault
    with pytest.raises(DataError, match=message):
        copy(f"{site.address}/{path}")


def test_unreachable_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as site:
        address = site.address
    monkeypatch.setattr(web, "WAITS", ())
    with pytest.raises(DataError, match="Connection refused"):
        copy(f"{address}/rows.jsonl")


def test_redirect_away_from_https_is_refused() -> None:
    request = Request("https://example.org/a.csv")
    with pytest.raises(DataError, match=r"^https://example.org/a.csv -> http://example.org/a.csv: .*away from https"):
        web._Redirects().redirect_request(
            request, BytesIO(), 302, "", HTTPMessage(), "http://example.org/a.csv?token=2"
        )


def test_login_of_netrc_is_sent_only_to_its_host(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    site.faults = [Fault(302, {"Location": f"{site.address.replace('127.0.0.1', 'localhost')}/rows.jsonl"})]
    copy(f"{site.address}/rows.jsonl")
    assert site.logins == ["Basic bWU6c2VjcmV0", None, "Basic bWU6c2VjcmV0"]
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me pasword secret\n")
    with pytest.raises(DataError, match=r"netrc: line \d: expected 'machine HOST") as refused:
        copy(f"{site.address}/rows.jsonl")
    assert "secret" not in str(refused.value)
    (tmp_path / "netrc").write_bytes(b"machine 127.0.0.1 login \xe4 password \xff\xfe\n" * 2)
    with pytest.raises(DataError, match=r"netrc: line \?: expected 'machine HOST"):
        copy(f"{site.address}/rows.jsonl")


@pytest.mark.parametrize(
    ("path", "headers", "name"),
    [
        ("get", {"Content-Disposition": 'attachment; filename="../../my rows.csv"'}, "my-rows.csv"),
        ("get", {"Content-Type": "text/csv; charset=utf-8"}, "data.csv"),
        ("a/..%2F..%2Frows.jsonl.gz", {}, "rows.jsonl.gz"),
    ],
)
def test_name_of_the_copy_has_no_folders(site: Site, path: str, headers: dict[str, str], name: str) -> None:
    site.files[f"/{path}"], site.headers = b"text\n", headers
    assert [file.name for file in web.list_files(f"{site.address}/{path}", None).files] == [name]


# ---- object stores ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    keys = (
        *("few/a-1.jsonl", "few/a 2.jsonl", "few/b.jsonl.gz", "few/_SUCCESS", "split/train.csv", "split/test.csv"),
        *("few/.a.jsonl", "few/._a-1.jsonl", "few/config.json", "few/dataset_info.json", "few/state.json"),
    )
    with serve_s3("rows") as client:
        for key in keys:
            client.put_object(Bucket="rows", Key=key, Body=gzip.compress(ROWS) if key.endswith("gz") else ROWS)
        yield client


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("s3://rows/few/a-1.jsonl", ["a-1.jsonl"]),
        ("s3://rows/few/a*.jsonl", ["a 2.jsonl", "a-1.jsonl"]),
        ("s3://rows/few/*.json*", ["a 2.jsonl", "a-1.jsonl", "b.jsonl"]),
        ("s3://rows/few", ["a 2.jsonl", "a-1.jsonl", "b.jsonl"]),
        ("S3://rows/few/?region=us-east-1", ["a 2.jsonl", "a-1.jsonl", "b.jsonl"]),
        ("s3://rows/split/train*", ["train.csv"]),
    ],
)
def test_files_of_a_bucket_are_copied(s3: Any, address: str, names: list[str]) -> None:
    source = copy(address)
    assert [Path(file).name for file in source.files] == names
    assert content(source) == ROWS * len(names)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://rows/few/a-3.jsonl", "no such data file, but a-1.jsonl, a 2.jsonl"),
        ("s3://rows/none/a.csv", "Path does not exist 'rows/none/'\\); check bucket, region"),
        ("s3://none/a.csv", r"cannot be copied \(NO_SUCH_BUCKET.*check bucket, region"),
        ("s3://rows/few?colour=red", "Unexpected query parameter in S3 URI: 'colour'"),
    ],
)
def test_wrong_address_in_a_bucket_says_what_is_there(s3: Any, address: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        copy(address)


def test_bucket_without_permission_says_how_to_log_in(site: Site) -> None:
    site.always = Fault(403)
    query = f"endpoint_override={site.address.removeprefix('http://')}&scheme=http&region=us-east-1"
    with pytest.raises(DataError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run 'aws configure'"):
        copy(f"s3://rows/few/a.jsonl?{query}")


def test_object_that_changes_half_way_is_refused_and_its_part_dropped(s3: Any, tmp_path: Path) -> None:
    s3.put_object(Bucket="rows", Key="moving.jsonl", Body=LONG)
    address = "s3://rows/moving.jsonl"
    listing, target = buckets.list_files(address, None), tmp_path / "moving.jsonl"
    with pytest.raises(DataError, match=r"moving.jsonl changes while it is copied"):
        buckets.download(
            address,
            listing,
            listing.files[0],
            target,
            lambda _: s3.put_object(Bucket="rows", Key="moving.jsonl", Body=ROWS),
        )
    assert not target.exists()


def test_object_that_is_overwritten_within_a_second_is_copied_again(s3: Any) -> None:
    for body in (b"1", b"2"):
        s3.put_object(Bucket="rows", Key="twice/a.txt", Body=body)
        assert content(copy("s3://rows/twice/a.txt")) == body


def test_store_without_a_network_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    system = mock.Mock(**{"from_uri.return_value": (None, "rows")})
    monkeypatch.setattr(buckets, "FileSystem", system)
    for address in ("gs://rows/a.csv", "gs://rows/a.csv?retry_limit_seconds=90", "s3://rows/a.csv"):
        buckets._open(address)
    assert [call.args[0] for call in system.from_uri.call_args_list] == [
        "gs://rows/?&retry_limit_seconds=20",
        "gs://rows/?retry_limit_seconds=90",
        "s3://rows/?",
    ]


# ---- packed files and the cache --------------------------------------------------------------------------------------


def zipped(**members: bytes) -> bytes:
    with zipfile.ZipFile(made := BytesIO(), "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]  # pyarrow has no types


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl.gz", PACKED + PACKED),
        ("rows.jsonl.bz2", bz2.compress(ROWS * 2)),
        ("rows.jsonl.xz", lzma.compress(ROWS * 2)),
        (
            "rows.zip",
            zipped(**{"b.csv/": b"", "a/1.jsonl": ROWS, "2.jsonl": ROWS, "__MACOSX/1.jsonl": b"x", "._1.jsonl": b"x"}),
        ),
        ("rows.jsonl.zst", zstd(ROWS * 2)),
    ],
)
def test_packed_files_are_unpacked(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert content(copy(str(tmp_path / name))) == ROWS * 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", zipped(**{"../out.csv": b"x"}), "'../out.csv' lies outside the archive"),
        ("a.zip", zipped(**{"//tmp/out.csv": b"x"}), "'//tmp/out.csv' lies outside the archive"),
        ("a.zip", zipped(LICENSE=b"x"), r"contains no data file \(LICENSE\)"),
        ("a.zip", zipped(**{"a.csv": b"x", "./a.csv": b"y"}), r"contains 'a.csv' more than once"),
        ("a.zip", b"no archive", "cannot be unpacked"),
        ("a.csv.gz", PACKED[:-20], "cannot be unpacked"),
        ("a.csv.zst", zstd(ROWS)[:40], "cannot be unpacked"),
        ("a.tar.gz", PACKED, "unpacks to 'a.tar'; expected one of .csv"),
    ],
)
def test_damaged_or_dangerous_archive_is_refused_and_copied_again(
    site: Site, name: str, data: bytes, message: str
) -> None:
    site.files[f"/{name}"] = data
    with pytest.raises(DataError, match=message):
        copy(f"{site.address}/{name}")
    files = [path for path in fetch.cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert all(".part" in str(path) for path in files)
    assert "cannot be unpacked" not in message or not any(path.name == name for path in files)


def test_full_disk_is_refused_with_the_number(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "disk_free_bytes", lambda path: 2**20)
    with pytest.raises(DoesNotFitError, match=r"needs [\d.]+ M.?B in .*, but only .* are free"):
        copy(f"{site.address}/long.jsonl")
    monkeypatch.setattr(fetch, "disk_free_bytes", lambda path: 2**40)
    monkeypatch.setattr(unpack, "disk_free_bytes", lambda path: 2**25)
    site.files["/a.zip"] = zipped(**{"a.csv": ROWS})
    with pytest.raises(
        DoesNotFitError, match=r"No space left on device: 'a.zip'\); make room on the disk, or set FULLTUNE_CACHE"
    ):
        copy(f"{site.address}/a.zip")
    assert not list(fetch.cache_folder().rglob("*.csv"))


def test_folder_may_be_named_as_an_archive(tmp_path: Path) -> None:
    (tmp_path / "x.zip").mkdir()
    assert not is_fetched(str(tmp_path / "x.zip"))
    (tmp_path / "y.zip").touch()
    assert is_fetched(str(tmp_path / "y.zip"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://[::1/x.csv", "the host of the https:// address is not valid; expected https://HOST/FILE"),
        ("s3+x://rows/a.csv", "unknown kind of address 's3\\+x://'"),
        ("mssql://host/db?odbc_connect=DRIVER=x;PWD=y&table=t", "'odbc_connect=', which would be written"),
        ("postgresql://host/db?table=t&pwd=y", "contains 'pwd='"),
        ("https://host/a.csv?auth=y", "contains 'auth='"),
        ("s3://rows/a.csv?access_key=y", "contains 'access_key='"),
    ],
)
def test_address_that_is_wrong_or_holds_a_secret_is_refused_in_the_recipe(address: str, message: str) -> None:
    assert re.search(message, address_problem(address) or "")


def test_cache_that_cannot_be_written_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"Not a directory.*; make room on the disk, or set FULLTUNE_CACHE"):
        copy(f"{site.address}/rows.jsonl")


def test_rows_without_a_version_are_read_again_until_the_run_is_planned(tmp_path: Path) -> None:
    packed, database, run, said = tmp_path / "rows.txt.gz", tmp_path / "rows.db", tmp_path / "run", list[str]()
    addresses = [f"sqlite:///{database}?query=SELECT text FROM rows ORDER BY text", str(packed)]
    recipe = Recipe.model_validate({"model": "x", "task": "causal-lm", "data": {"train": addresses}})

    def read_after_change(text: str) -> list[bool]:
        packed.write_bytes(gzip.compress(text.encode()))
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS rows (text)")
            connection.execute("INSERT INTO rows VALUES (?)", [text])
        sources = fetch.fetch_sources(recipe, run, lambda event: said.append(getattr(event, "text", "")))
        return [text.encode() in content(sources[address]) for address in addresses]

    assert read_after_change("first") == read_after_change("second") == [True, True]
    (run / "plan").mkdir()
    (run / "plan" / "full.json").touch()
    said.clear()
    assert read_after_change("third") == [False, False]
    assert "is not read again; this run goes on with" in said[0]
    assert "is now at" in said[1]


def test_damaged_copy_is_made_again(site: Site) -> None:
    first = copy(f"{site.address}/rows.jsonl")
    record = Path(first.files[0]).parent / fetch._COMPLETE
    for damage in (lambda: record.write_text("{"), lambda: os.truncate(first.files[0], 10), record.unlink):
        damage()
        assert copy(f"{site.address}/rows.jsonl") == first
        assert content(first) == ROWS


def test_name_that_leads_out_of_the_cache_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_name", lambda *_: "../../out.jsonl")
    with pytest.raises(DataError, match=r"'../../out.jsonl' would lie outside"):
        copy(f"{site.address}/rows.jsonl")


@pytest.mark.long
def test_killed_copies_end_with_the_same_files(site: Site, s3: Any, tmp_path: Path) -> None:
    """A process is killed six times while it copies three shards; then two at once end the work."""
    site.files |= {f"/{number}.jsonl.gz": gzip.compress(LONG + b"\n" * number, 0) for number in range(2)}
    s3.put_object(Bucket="rows", Key="shard.jsonl", Body=LONG)
    shards = [*(f"{site.address}/{number}.jsonl.gz" for number in range(2)), "s3://rows/shard.jsonl"]
    script = tmp_path / "copy_shards.py"
    script.write_text(
        "import time\nfrom fulltune.data.remote import fetch\n"
        "fetch._progress = lambda *_: lambda num_bytes: time.sleep(0.01)\n"
        f"for address in {shards}:\n    print(*fetch.fetch(address, lambda event: None).files, flush=True)\n"
    )
    draw, total = random.Random(0), 3 * len(LONG)
    for kill in (*range(6), None):
        command, numbers = [sys.executable, str(script)], range(2 if kill is None else 1)
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in numbers]
        enough = total * (draw.random() + kill) / 7 if kill is not None else 0
        while copied_bytes() < enough and started[0].poll() is None:
            time.sleep(0.005)
        if kill is not None:
            assert started[0].poll() is None
            started[0].send_signal(signal.SIGKILL)
        printed = [process.communicate()[0] for process in started]
    assert printed[0] == printed[1]
    assert [Path(file).read_bytes() for file in printed[0].split()] == [LONG, LONG + b"\n", LONG]
    assert not leftovers()


# ---- the data stage --------------------------------------------------------------------------------------------------


def texts(folder: Path) -> dict[str, list[str]]:
    return {name: [row["text"] for row in rows] for name, rows in stage.of_splits(folder).items()}


def test_rows_are_prepared_from_the_web_and_from_a_bucket(
    site: Site, s3: Any, tmp_path: Path, tiny_encoder: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    local = stage.prepare(tmp_path / "local", tiny.topic_rows(60), tokenizer)
    site.files["/rows.jsonl.gz"] = gzip.compress(ROWS)
    pq.write_table(pa.Table.from_pylist(tiny.topic_rows(60)), tmp_path / "rows.parquet")
    s3.upload_file(str(tmp_path / "rows.parquet"), "rows", "rows.parquet")
    for address in (f"{site.address}/rows.jsonl.gz", "s3://rows/rows.parquet"):
        folder = tmp_path / address.partition(":")[0]
        made = stage.prepare(folder, address, tokenizer)
        assert texts(folder) == texts(tmp_path / "local")
        assert made.splits == local.splits
        assert json.loads((folder / "sources.json").read_text())["sources"][0]["address"] == address
