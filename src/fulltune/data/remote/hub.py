"""Data sets on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from posixpath import normpath

import yaml

from fulltune.data.readers.files import SUFFIXES, group_files_by_split, has_data_suffix
from fulltune.data.remote.listing import Listing, OnBytes, RemoteFile, may_hold_rows
from fulltune.errors import DataError
from fulltune.recipe.address import PACKED, hub_place, hub_settings
from fulltune.recipe.model import PlainSettings
from fulltune.records.data import SplitName
from fulltune.text import first_few, near_names

_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d{4}\.parquet")
_STREAM = re.compile(r"\.(gz|bz2|xz|zst)$", re.IGNORECASE)
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError)


def list_files(address: str, revision: str | None) -> Listing:
    (listings, usual), named = _list_splits(address, revision), hub_settings(address)
    config = _choose(address, "config", named.get("config"), usual, [config for config, _ in listings])
    splits = [split for other, split in listings if other == config]
    return listings[config, _choose(address, "split", named.get("split", "").partition("[")[0], "train", splits)]


def find_splits(address: str) -> tuple[dict[SplitName, str | Mapping[str, str]], tuple[str, ...]]:
    """Return what a recipe writes for the train, eval and test rows of a data set, and what it does not use."""
    (name, revision, pattern), named = hub_place(address), hub_settings(address)
    if pattern or named.keys() - {"config"}:
        return {"train": address}, ()
    listings, usual = _list_splits(address, None)
    configs = [*dict([*listings])]
    config = named.get("config") or (usual if usual in configs else configs[0])
    splits = [split for other, split in listings if other == _choose(address, "config", config, usual, configs)]
    by_word = group_files_by_split([*map(Path, splits)])
    by_word.setdefault("train", by_word.get(None, []))
    words = {word: min(map(str, paths), key=len) for word, paths in by_word.items() if word and paths}
    if "train" not in words:
        raise DataError(f"{address}: no split to train on; write a recipe with one of {', '.join(splits)}")
    place = {"hub": name, "revision": revision or "", "config": config if len(configs) > 1 else ""}
    place = {setting: text for setting, text in place.items() if text}
    others = [f"split {split}" for split in splits if split not in words.values()]
    others += [f"config {other}" for other in configs if other != config]
    return {word: place | {"split": split} for word, split in words.items()}, tuple(others)


def download(address: str, listing: Listing, file: RemoteFile, target: Path, report: OnBytes) -> None:
    from huggingface_hub import HfApi

    name, commit = hub_place(address)[0], listing.revision
    with _explained(name):
        copy = HfApi().hf_hub_download(name, file.name, repo_type="dataset", revision=commit)
    report(file.size or 0)
    target.unlink(missing_ok=True)
    target.symlink_to(copy)


def _list_splits(address: str, revision: str | None) -> tuple[dict[tuple[str, str], Listing], str]:
    """Return the files by configuration and split, and the usual configuration. Raises `DataError` for no files."""
    from huggingface_hub import HfApi

    name, own, pattern = hub_place(address)
    with _explained(name, revision or own):
        commit = HfApi().dataset_info(name, revision=revision or own, timeout=20).sha or ""
        files, card = _read_commit(name, commit)
        card = {"configs": [{"data_files": pattern}]} if pattern else card
        splits, infos = _find_splits(name, files, card), card.get("dataset_info") or []
        rows = {
            (str(info.get("config_name", "default")), str(split["name"])): split.get("num_examples")
            for info in ([infos] if isinstance(infos, dict) else infos)
            for split in info.get("splits", ())
        }
        usual = [str(one["config_name"]) for one in card.get("configs", ()) if one.get("default")]
    if not splits:
        problem = f"no data file matches '{pattern}'" if pattern else "no file can be read without a program"
        to_do = f"try the Hub's own conversion to parquet: hf://datasets/{name}@refs%2Fconvert%2Fparquet"
        raise DataError(f"{name}: {problem}; its files: {_nearest(pattern, files)}" + f"; {to_do}" * (not pattern))
    listings = {key: Listing(tuple(files[one] for one in splits[key]), commit, rows.get(key)) for key in splits}
    return listings, (*usual, "default")[0]


def _find_splits(name: str, files: Iterable[str], card: PlainSettings) -> dict[tuple[str, str], list[str]]:
    """Return each split's files, as the README says or else by split words in names, or {} for a program's files."""
    splits, readable = dict[tuple[str, str], list[str]](), _matching(".", files)
    for config in card.get("configs") or ():
        folder, patterns = config.get("data_dir") or ".", config.get("data_files")
        if isinstance(patterns, list) and isinstance(patterns[0], dict):
            patterns = {part["split"]: part["path"] for part in patterns}
        by_split = patterns if isinstance(patterns, dict) else {"train": patterns or ()}
        named = {split: _matching(pattern, files, folder) for split, pattern in by_split.items()}
        named = named if patterns else _split_by_names(_matching(folder, files))
        splits |= {(str(config.get("config_name", "default")), str(split)): names for split, names in named.items()}
    if not card.get("configs"):
        places = [match.groups() for match in map(_CONVERTED.fullmatch, readable) if match]
        for place, file in zip(places, readable, strict=False) if len(places) == len(readable) else ():
            splits.setdefault((place[0], place[1]), []).append(file)
        if not splits and f"{name.rpartition('/')[2]}.py" not in files:
            splits = {("default", split): names for split, names in _split_by_names(readable).items()}
    return {key: names for key, names in splits.items() if names}


def _matching(patterns: str | Iterable[str], files: Iterable[str], folder: str = ".") -> list[str]:
    """Return the data files that match patterns, or lie in folders that do."""
    wanted = [Path(normpath(f"{folder}/{one}")) for one in ([patterns] if isinstance(patterns, str) else patterns)]
    wanted += [one / "**" for one in wanted if not set("*?[") & set(one.name)]  # a folder, if it is one
    data = [file for file in map(Path, sorted(files)) if has_data_suffix(file) or file.suffix.lower() in PACKED]
    data = [file for file in data if may_hold_rows(str(file))]
    return [str(file) for file in data if any(_fits(file.parts, one.parts) for one in wanted)]


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path's folders and name match a pattern's."""
    if pattern[:1] == ("**",):
        return any(_fits(path[start:], pattern[1:]) for start in range(len(path) + 1))
    if not path or not pattern:
        return not path and not pattern
    return fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _split_by_names(files: Iterable[str]) -> dict[str, list[str]]:
    """Group the files of the most frequent type by split words in names of files and folders, as `datasets` does."""
    by_file = {Path(file): Path(_STREAM.sub("", file)).suffix.lower() for file in files}
    kinds = {file: kind for file, kind in by_file.items() if kind in (*SUFFIXES, ".zip")}
    most = max(kinds.values(), key=[*kinds.values()].count, default="")
    splits: dict[str, list[str]] = {}
    for split, paths in group_files_by_split([file for file, kind in kinds.items() if kind == most]).items():
        for path in paths:
            words = filter(None, (split, *group_files_by_split([Path(part) for part in path.parts[:-1]])))
            splits.setdefault(next(words, ""), []).append(str(path))
    rest = splits.pop("", [])
    return {"validation" if split == "eval" else split: names for split, names in splits.items()} or {"train": rest}


def _choose(address: str, setting: str, value: str | None, usual: str, names: Sequence[str]) -> str:
    chosen = value or (names[0] if len({*names}) == 1 else usual)
    if chosen not in names:
        problem = f"no {setting} '{value}'" if value else f"several {setting}s"
        raise DataError(f"{address}: has {problem}; set {setting}: to one of {_nearest(chosen, names)}")
    return chosen


def _nearest(name: str, names: Iterable[str]) -> str:
    return first_few([*dict.fromkeys((*near_names(name, names), *names))], 20)


@cache
def _read_commit(name: str, commit: str) -> tuple[dict[str, RemoteFile], PlainSettings]:
    """Return a commit's files, and what its README says in YAML."""
    from huggingface_hub import HfApi, metadata_load
    from huggingface_hub.hf_api import RepoFile

    listed = HfApi().list_repo_tree(name, recursive=True, repo_type="dataset", revision=commit)
    files = {one.path: RemoteFile(one.path, one.size, one.blob_id) for one in listed if isinstance(one, RepoFile)}
    if "README.md" not in files:
        return files, {}
    return files, metadata_load(HfApi().hf_hub_download(name, "README.md", repo_type="dataset", revision=commit)) or {}


@contextmanager
def _explained(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn the Hub's errors into a `DataError` that says what to do."""
    from huggingface_hub import HfApi, constants, errors

    hub, log_in = constants.ENDPOINT, "log in with 'hf auth login'"
    http_error = errors.HTTPError  # type: ignore[attr-defined]  # that of httpx or of its successor, as the Hub uses
    try:
        yield
        return
    except errors.RevisionNotFoundError:
        with _explained(name):
            refs = HfApi().list_repo_refs(name, repo_type="dataset")
        near = _nearest(str(revision), [one.name for one in (*refs.branches, *refs.tags)])
        problem = f"has no revision '{revision}'; use a commit, or one of {near}"
    except (http_error, ConnectionError, errors.LocalEntryNotFoundError, *_MALFORMED) as raised:
        error = raised.__cause__ if isinstance(raised, errors.LocalEntryNotFoundError) else raised
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        problem = f"{hub} cannot be reached ({status or error}); check the network, or try again later"
        if isinstance(error, _MALFORMED):
            problem = f"its name or README.md is not valid ({error!r:.80}); name files: hf://datasets/{name}/FILE"
        elif isinstance(error, errors.OfflineModeIsEnabled):
            problem = "no copy is in the cache, and HF_HUB_OFFLINE forbids to ask the Hub; unset it"
        elif isinstance(error, errors.GatedRepoError):
            problem = f"is gated; accept its terms at {hub}/datasets/{name}, and {log_in}"
        elif status in (401, 403, 404):
            problem = f"does not exist at {hub}, or you may not read it; check OWNER/NAME, or {log_in}"
    raise DataError(f"{name}: {problem}")
