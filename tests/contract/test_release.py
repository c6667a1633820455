"""What is released is whole: wheel and sdist, the version, and the Dockerfile, whose every name must mean something."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"fulltune-{PROJECT['version']}"


def sources() -> set[str]:
    files = (path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT / "src").as_posix() for path in files}


def build(root: Path, folder: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *kinds]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


def packaged(wheel: Path) -> set[str]:
    return set(ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


def test_wheel_has_the_source_its_licence_and_nothing_else(built: Path) -> None:
    about = f"{NAME}.dist-info"
    parts = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert packaged(built / f"{NAME}-py3-none-any.whl") == sources() | parts
    assert "fulltune/py.typed" in sources()


def test_sdist_has_what_the_wheel_is_built_from(built: Path) -> None:
    beside = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"}
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {Path(name).relative_to(NAME).as_posix() for name in archive.getnames()}
    assert names == {f"src/{name}" for name in sources()} | beside


def test_changelog_begins_with_the_version() -> None:
    newest = re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]


def instructions() -> Iterator[tuple[str, str]]:
    """Of the Dockerfile, each with its arguments on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, rest.strip()


def given(word: str) -> list[str]:
    return [rest for one, rest in instructions() if one == word]


def test_container_is_built_from_what_is_copied_into_it(built: Path, tmp_path: Path) -> None:
    """The wheel of the copied files alone is the wheel of the repository."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    root = Path("/usr/src/fulltune")
    for rest in given("COPY"):
        *names, target = rest.split()
        assert set(names) <= let_through
        inside = tmp_path / "source" / Path(target).relative_to(root)
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, inside, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                inside.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, inside)
    build(tmp_path / "source", tmp_path, "--target", "wheel")
    wheel = f"{NAME}-py3-none-any.whl"
    assert packaged(tmp_path / wheel) == packaged(built / wheel)
    assert any(f'"{root}[${{EXTRAS}}]"' in rest for rest in given("RUN"))
