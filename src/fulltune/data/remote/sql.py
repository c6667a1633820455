"""Tables and queries of databases: SQLite by Python's library, others by SQLAlchemy."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile
from fulltune.errors import DataError, SetupError
from fulltune.recipe.address import SQLITE, scheme_of
from fulltune.text import did_you_mean, first_few

_LIBRARIES = ("sqlite3", "sqlalchemy")
_LITERAL_OR_COMMENT = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/""", re.DOTALL)
_KEYS = """
SELECT name, CASE WHEN type = 'table' AND upper(sql) NOT LIKE '%WITHOUT ROWID%' THEN 'rowid' ELSE (
    SELECT group_concat('`' || replace(name, '`', '``') || '`') FROM pragma_table_info(tables.name) WHERE pk) END
FROM sqlite_master AS tables WHERE type IN ('table', 'view')"""


def list_files(address: str, revision: str | None) -> Listing:
    """Return the file that will hold the rows. Its content is known only once they are read."""
    with _select(address) as (_, statement, name):
        is_ordered = re.search(r"\border\s+by\b", statement, re.IGNORECASE)
    how = "ORDER BY" if name == "query" else "&order_by=COLUMN"
    note = f"{name}: the rows have no total order, so the split depends on the order of this reading; add {how}"
    return Listing((RemoteFile(f"{name}.jsonl", None, ""),), "", notes=() if is_ordered else (note,))


def download(address: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    """Write the rows as JSON lines, with dates (ISO) and decimal numbers (all digits) as text."""
    with _select(address) as (execute, statement, _), target.open("w", encoding="utf-8") as stream:
        rows = execute(statement)
        names = list(rows.keys() if hasattr(rows, "keys") else (column[0] for column in rows.description))
        if len(set(names)) < len(names):
            raise DataError(f"{address}: several columns have one name ({', '.join(names)}); rename them with AS")
        for row in rows:
            cells = dict(zip(names, row, strict=True))
            if wrong := [name for name, cell in cells.items() if isinstance(cell, (bytes, memoryview))]:
                raise DataError(f"{address}: column '{wrong[0]}' holds bytes, expected text; select other columns")
            report(stream.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n"))


@contextmanager
def _select(address: str) -> Iterator[tuple[Any, str, str]]:
    """Connect, and yield a function that executes a statement, the address's statement, and the table's name."""
    url, _, rest = address.partition("?")
    rest, _, query = rest.partition("query=")  # always last, because it may contain any character
    settings, query = dict(parse_qsl(rest)), query if " " in query else unquote(query)
    table, order = settings.pop("table", ""), [*filter(None, settings.pop("order_by", "").split(","))]
    plain = _LITERAL_OR_COMMENT.sub(" ", query).strip("; \n")
    is_select = re.match(r"(select|with)\b", plain, re.IGNORECASE) and ";" not in plain
    if bool(table) == bool(query) or (query and (order or not is_select)):
        raise DataError(f"{address}: expected ?table=NAME, ?table=NAME&order_by=COLUMN, or ?query= and one SELECT")
    try:
        with _connect(f"{url}?{urlencode(settings)}" if settings else url) as (execute, quoted, keys):
            if table and table not in keys:
                near = did_you_mean(table, keys) or f"expected one of {first_few([*keys], 9)}"
                raise DataError(f"{address}: no table '{table}'; {near}")
            if table:
                by = ", ".join([*map(quoted, order), *keys[table]])
                query = f"SELECT * FROM {quoted(table)}" + (f" ORDER BY {by}" if by else "")
            yield execute, query, re.sub(r"\W", "-", table) or "query"
    except ModuleNotFoundError as error:
        raise SetupError(
            f"{address}: needs the package '{error.name}'; pip install 'fulltune[sql]', and the database's driver"
        ) from None
    except Exception as error:
        if not isinstance(error, ValueError) and type(error).__module__.partition(".")[0] not in _LIBRARIES:
            raise
        problem = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise DataError(f"{address}: {problem}") from None


@contextmanager
def _connect(url: str) -> Iterator[tuple[Any, Any, dict[str, list[str]]]]:
    """Yield functions that execute a statement and quote a name, and the key that orders each table."""
    if scheme_of(url) == SQLITE:
        if not Path(file := url.partition(":///")[2]).is_file():
            raise DataError(f"{file}: no such file, expected an SQLite database")
        with closing(sqlite3.connect(f"file:{quote(file)}?mode=ro", uri=True)) as database:
            by_name = {name: [key] if key else [] for name, key in database.execute(_KEYS)}
            # In double quotes, an unknown column would be a text.
            yield database.execute, lambda name: "`{}`".format(name.replace("`", "``")), by_name
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(url)
    quoted = engine.dialect.identifier_preparer.quote
    # Without it, PostgreSQL would only roll back what `WITH d AS (DELETE ...)` writes.
    with engine.connect().execution_options(postgresql_readonly=True) as connection:
        keys = sqlalchemy.inspect(connection).get_multi_pk_constraint(kind=sqlalchemy.engine.ObjectKind.ANY)
        by_table = {str(name): [*map(quoted, key["constrained_columns"])] for (_, name), key in keys.items()}
        connection.execution_options(stream_results=True, no_parameters=True)
        yield connection.exec_driver_sql, quoted, by_table
