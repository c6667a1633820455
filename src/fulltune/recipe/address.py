"""Addresses of data: on the Hub, in object stores, on the web and in databases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from pydantic import Field

from fulltune.recipe.model import Block
from fulltune.recipe.selection import Where

HUB = "hf"
WEB = ("https", "http")
BUCKETS = ("s3", "gs", "abfs", "abfss")
SQLITE = "sqlite"
DATABASES = (SQLITE, "postgresql", "mysql", "mariadb", "oracle", "mssql", "duckdb")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of files that are unpacked."""
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"
_SETTINGS = ("config", "split", "columns", "where")
_SECRET = re.compile(r"token|signature|secret|passw|pwd|credential|(api|access).?key|^sig$|^key$|^auth$", re.IGNORECASE)
_READABLE = "[]()<>:,=!/'\"` "
"""Characters that need no escape in an address's settings."""
_SCHEMES = "hf, s3, gs, abfs, https, sqlite, postgresql, mysql"


class HubDataset(Block):
    """A data set on the Hub."""

    hub: str = Field(pattern=rf"^{HUB_NAME}$")
    """OWNER/NAME on the Hub, such as `mteb/banking77`."""
    config: str | None = Field(default=None, min_length=1)
    """Configuration (subset). Default: the only one, or `default`."""
    split: str | None = Field(default=None, min_length=1)
    """Split, or a part of it, such as `train[:5%]`. Default: `train`, or the only split."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit. Its commit is recorded, and a resumed run reads the same commit."""
    columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Columns to read. Default: all."""
    where: Where | None = None
    """Condition on the rows to read, as in `data.where`."""
    weight: float | None = Field(default=None, gt=0, lt=1)
    """Share of each epoch's rows (only in `data.train`), as for a file that is mixed in."""

    @property
    def address(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        settings = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name)}
        settings |= (
            {"columns": ",".join(name.replace("%", "%25").replace(",", "%2C") for name in self.columns)}
            if self.columns
            else {}
        )
        query = urlencode(settings, safe=_READABLE, quote_via=quote)
        return f"{HUB}://datasets/{self.hub}{at}" + (f"?{query}" if query else "")


def expand_short_form(value: Any) -> Any:
    """Return the address of a `{hub: ...}` mapping, the path of a `{path: ...}` mapping, or both with a weight as
    `{path: ..., weight: ...}`; leave other values unchanged. Raises `ValidationError`."""
    if isinstance(value, Mapping) and "hub" in value:
        named = HubDataset.model_validate(value)
        value = {"path": named.address} | ({} if named.weight is None else {"weight": named.weight})
    return value["path"] if isinstance(value, Mapping) and value.keys() == {"path"} else value


# ---- addresses -------------------------------------------------------------------------------------------------------


def scheme_of(path: str) -> str:
    """Return an address's scheme in lower case, without a driver (`postgresql+psycopg`), or "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", path)
    return match[1].lower().partition("+")[0] if match else ""


def is_address(path: str) -> bool:
    return bool(scheme_of(path))


def is_fetched(path: str) -> bool:
    """Return whether the rows are read from a local copy: of an address, or of a packed file's contents."""
    return is_address(path) or (path.lower().endswith(PACKED) and not Path(path).is_dir())


def hub_settings(address: str) -> dict[str, str]:
    """Return `config`, `split`, `columns` and `where` of a Hub address, and {} of any other."""
    return dict(parse_qsl(urlsplit(address).query)) if scheme_of(address) == HUB else {}


def hub_place(address: str) -> tuple[str, str | None, str]:
    """Return repository, revision (or None) and file pattern (or "") of `hf://datasets/OWNER/NAME@REVISION/PATTERN`."""
    parts = urlsplit(address).path.strip("/").split("/")
    # Data sets of the Hub's early days have no owner: then the first part names the revision, or is the only one.
    size = 1 if len(parts) == 1 or "@" in parts[0] else 2
    name, _, revision = "/".join(parts[:size]).partition("@")
    return name, unquote(revision) or None, unquote("/".join(parts[size:]))


def address_problem(address: str) -> str | None:
    """Return why data cannot be read from an address, without its secrets, or None."""
    scheme, kind = scheme_of(address), address.partition("://")[0].lower()
    if kind not in (HUB, *WEB, *BUCKETS) and scheme not in DATABASES:
        return f"unknown kind of address '{kind}://'; expected one of {_SCHEMES}, or a path"
    try:
        url = urlsplit(address)
    except ValueError:
        return f"the host of the {kind}:// address is not valid; expected {kind}://HOST/FILE: correct it"
    secrets = [f"'{name}='" for name, text in parse_qsl(url.query) if _SECRET.search(text if "odbc" in name else name)]
    if "@" in url.netloc and scheme not in BUCKETS[2:] and (":" in url.netloc.partition("@")[0] or scheme in WEB):
        secrets.append("a user name or password")
    if secrets:
        return (
            f"the address at {url.hostname or scheme} contains {secrets[0]}, which would be written into records; "
            "remove it, and log in where the store expects it (~/.netrc, AWS_ACCESS_KEY_ID, ~/.pgpass, ~/.my.cnf ...), "
            "or download the file"
        )
    if scheme != HUB:
        return None
    if url.netloc != "datasets" or not re.fullmatch(HUB_NAME, hub_place(address)[0]):
        return f"expected hf://datasets/OWNER/NAME@REVISION/FILE, found '{address}'"
    unknown = [name for name in hub_settings(address) if name not in _SETTINGS]
    return f"unknown setting '{unknown[0]}=' in '{address}'; expected {', '.join(_SETTINGS)}" if unknown else None
