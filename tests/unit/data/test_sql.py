"""Rows of databases: real SQLite files by Python's library, and the same files by SQLAlchemy as any other database."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from fulltune.data.remote import sql
from fulltune.data.remote.fetch import fetch
from fulltune.errors import DataError, FulltuneError, SetupError
from fulltune.records.data import RemoteSource

OWN, ANY = "sqlite:///", "sqlite+pysqlite:///"
TABLES = """
CREATE TABLE tickets (id INTEGER PRIMARY KEY, body TEXT, "group" TEXT);
INSERT INTO tickets VALUES (3, 'c', 'x'), (1, 'b', NULL), (2, 'ä%a', 'x');
CREATE TABLE notes (body TEXT); INSERT INTO notes VALUES ('z'), ('a');
CREATE TABLE files (name TEXT PRIMARY KEY, content BLOB); INSERT INTO files VALUES ('a', x'00');
CREATE VIEW bodies AS SELECT body FROM tickets;
CREATE TABLE `a``b` (body TEXT); INSERT INTO `a``b` VALUES ('x;y');
CREATE TABLE pairs (body TEXT, `a``b` INTEGER, PRIMARY KEY (body, `a``b`)) WITHOUT ROWID;
INSERT INTO pairs VALUES ('z', 1), ('a', 2);
CREATE TABLE sums (day DATE, total PRICE_TEXT); INSERT INTO sums VALUES ('2020-02-29', '1.50');
"""


@pytest.fixture
def by_sqlalchemy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sql, "SQLITE", "read by SQLAlchemy as any other database")
    return ANY


@pytest.fixture(params=[OWN, ANY])
def kind(request: pytest.FixtureRequest) -> str:
    return OWN if request.param == OWN else str(request.getfixturevalue("by_sqlalchemy"))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "my data.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLES)
    return path


def _read(address: str) -> tuple[list[dict[str, Any]], RemoteSource]:
    source = fetch(address, lambda event: None)
    (file,) = source.files
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()], source


def test_rows_come_in_the_order_of_the_column_the_key_or_the_query(database: Path, kind: str) -> None:
    rows, source = _read(f"{kind}{database}?table=tickets")
    assert rows[:2] == [{"id": 1, "body": "b", "group": None}, {"id": 2, "body": "ä%a", "group": "x"}]
    by_group = _read(f"{kind}{database}?table=tickets&order_by=group")
    assert [row["id"] for row in by_group[0]] == [1, 2, 3]
    asked, _ = _read(f"{kind}{database}?query=SELECT id AS n FROM tickets WHERE body LIKE '%a' OR id > 2 ORDER BY -id")
    assert asked == [{"n": 3}, {"n": 2}]
    assert _read(f"{kind}{database}?query=SELECT%20id%20FROM%20tickets%20ORDER%20BY%20id")[0][0] == {"id": 1}
    pairs, keyed = _read(f"{kind}{database}?table=pairs")
    assert [row["body"] for row in pairs] == ["a", "z"]
    assert source.notes == by_group[1].notes == keyed.notes == ()
    for statement in ("table=a`b", "query=/* ; */ SELECT * FROM `a``b` WHERE body = 'x;y' -- ;\n;"):
        assert _read(f"{kind}{database}?{statement}")[0] == [{"body": "x;y"}]


def test_revision_is_the_content(database: Path) -> None:
    address = f"{OWN}{database}?table=notes"
    rows, first = _read(address)
    assert [row["body"] for row in rows] == ["z", "a"]
    assert _read(address)[1] == first
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE notes SET body = 'y' WHERE body = 'z'")
    with pytest.raises(DataError, match="has changed since this run began"):
        fetch(address, lambda event: None, first.model_copy(update={"files": ()}))
    assert _read(address)[1].revision != first.revision


@pytest.mark.parametrize("asked", ["table=bodies", "query=SELECT body FROM tickets"])
def test_rows_without_total_order_are_told(database: Path, asked: str) -> None:
    (note,) = _read(f"{OWN}{database}?{asked}")[1].notes
    assert "no total order" in note


def test_dates_are_written_in_iso_format_and_decimals_with_all_digits(database: Path, by_sqlalchemy: str) -> None:
    sqlite3.register_converter("PRICE_TEXT", lambda digits: Decimal(digits.decode()))
    rows, _ = _read(f"{by_sqlalchemy}{database}?detect_types=1&table=sums")
    assert rows == [{"day": "2020-02-29", "total": "1.50"}]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("table=ticket", "no table 'ticket'; did you mean 'tickets'"),
        ("table=tickets&order_by=nope", "no such column: nope"),
        ("table=files", "column 'content' holds bytes"),
        ("query=SELECT id, id FROM tickets", "several columns have one name"),
        ("query=SELECT FROM tickets", "syntax error"),
        ("query=DELETE FROM tickets", "one SELECT"),
        ("query=-- SELECT\nDELETE FROM tickets", "one SELECT"),
        ("query=SELECT 1; DROP TABLE tickets", "one SELECT"),
        ("table=tickets&query=SELECT 1", "one SELECT"),
        ("", "one SELECT"),
    ],
)
def test_what_cannot_be_read_is_refused_and_nothing_is_changed(
    database: Path, kind: str, asked: str, problem: str
) -> None:
    before = database.read_bytes()
    with pytest.raises(DataError, match=problem):
        _read(f"{kind}{database}?{asked}")
    assert database.read_bytes() == before


def test_what_is_no_database_or_cannot_be_reached_is_told(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.db").write_text("no database" * 100, encoding="utf-8")
    for address, problem in (
        (f"{OWN}{tmp_path}/text.db?table=t", "not a database"),
        (f"{ANY}{tmp_path}/text.db?table=t", "not a database"),
        (f"{OWN}{tmp_path}/none.db?table=t", "no such file"),
        (f"{ANY}{tmp_path}/none.db?table=t", "no such file"),
        ("postgresql://host:port/db?table=t", "db.table=t: invalid literal"),
        ("oracle://host/db?table=t", "needs the package"),
    ):
        with pytest.raises(FulltuneError, match=problem):
            _read(address)
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(SetupError, match=r"pip install 'fulltune\[sql\]'"):
        _read("postgresql://host/db?table=tickets")
