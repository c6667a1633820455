"""The documentation is true: generated pages are fresh, links lead somewhere, names in the text exist."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import typer
import yaml

import fulltune
from fulltune import errors
from fulltune.cli.app import app
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import check_recipe
from fulltune.recipe.model import Block

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCKS = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Block)
}
METHODS = get_args(Recipe.model_fields["method"].annotation)
FIELDS = {name: set(block.model_fields) for name, block in BLOCKS.items()}
FIELDS["method"] = {name for kind in METHODS for name in kind.model_fields}

OPTIONS = {
    verb: {"--help", *(option for parameter in command.params for option in parameter.opts + parameter.secondary_opts)}
    for verb, command in typer.main.get_group(app).commands.items()
}
"""Of each verb, from the app itself."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def is_history(page: Path) -> bool:
    """The changelog uses the names that were valid at the time."""
    return page.name == "CHANGELOG.md"


def fenced(text: str, language: str) -> list[str]:
    """Code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def script(path: str) -> ModuleType:
    """A script of the project, which is in no package."""
    name = f"script_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return script("docs/generate.py")


def test_recipe_page_equals_the_generated_one(generate: ModuleType) -> None:
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run `make docs`"


def test_recipe_page_names_and_explains_every_setting(generate: ModuleType) -> None:
    text = generate.page()
    for name, block in BLOCKS.items():
        for inner, field in block.model_fields.items():
            assert f"- `{name}.{inner}`:" in text
            assert field.description, f"{name}.{inner} has no docstring"
    for kind in METHODS:
        assert f"### `kind: {get_args(kind.model_fields['kind'].annotation)[0]}`" in text
        for inner, field in kind.model_fields.items():
            assert inner == "kind" or f"- `method.{inner}`:" in text
            assert field.description, f"method.{inner} has no docstring"


def test_pages_that_any_file_names_exist() -> None:
    inside = [path for top in ("src", "tests", "bench", "docs", "examples") for path in (ROOT / top).rglob("*")]
    files = [path for path in (*ROOT.iterdir(), *inside) if path.suffix in (".py", ".md", ".toml", ".yaml", ".j2", "")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.is_file() and not is_history(path)}
    named = {(path, page) for path, text in texts.items() for page in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert not [f"{path}: {page}" for path, page in named if not (ROOT / page).exists()]


@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [(page.parent / file if file else page, anchor) for file, anchor in links if "://" not in file]
    missing = [
        f"{file.name}#{anchor}" for file, anchor in inside if file.suffix == ".md" and anchor not in anchors(file)
    ]
    assert is_history(page) or not missing


@each_page
def test_settings_in_backquotes_exist(page: Path) -> None:
    if is_history(page):
        return
    names = re.findall(rf"`({'|'.join(FIELDS)})\.([a-z_]+)[`:=]", page.read_text(encoding="utf-8"))
    # `train.csv` and the like are files.
    files = {"csv", "jsonl", "json", "yaml", "py", "safetensors", "html", "md"}
    unknown = [f"{block}.{name}" for block, name in names if name not in {*FIELDS[block], *files}]
    assert not unknown


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    used = re.findall(r"(?:`|\.venv/bin/)fulltune ([a-z]+)([^`\n]*)", text)
    for block in fenced(text, "sh"):
        whole = block.replace("\\\n", " ")
        used += re.findall(r"^fulltune ([a-z]+)([^#\n]*)", whole, re.MULTILINE)
    assert {verb for verb, _ in used} <= set(OPTIONS)
    unknown = [
        f"{verb} {option}"
        for verb, rest in used
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest)
        if option not in OPTIONS[verb]
    ]
    assert is_history(page) or not unknown
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE)) <= set(targets)


def test_options_of_every_verb_are_known() -> None:
    """What the test above rests on."""
    assert {"--set", "--run-folder", "--fresh"} <= OPTIONS["run"]
    assert all("--help" in options for options in OPTIONS.values())


@each_page
def test_modules_in_backquotes_exist(page: Path) -> None:
    if is_history(page):
        return
    text = page.read_text(encoding="utf-8")
    files = {
        f"/{path.relative_to(ROOT).as_posix()}"
        for top in ("src", "bench", "tests", "docs", "examples")
        for path in (ROOT / top).rglob("*.py")
    }
    named = re.findall(r"`([a-z_0-9/]+\.py)\b", text)
    named += [f"bench/{part}.py" for part in re.findall(r"python -m bench\.([a-z_0-9]+)", text)]
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


@each_page
def test_whole_recipes_are_accepted(page: Path) -> None:
    for text in fenced(page.read_text(encoding="utf-8"), "yaml"):
        recipe = yaml.safe_load(text)
        # Guides show parts of recipes, too: tests/contract/test_guides.py.
        if page.parent.name != "guides" or {"model", "task", "data"} <= set(recipe):
            check_recipe(recipe, page)


@each_page
def test_python_examples_use_names_that_exist(page: Path) -> None:
    for text in fenced(page.read_text(encoding="utf-8"), "python"):
        compile(text, str(page), "exec")
        used = re.findall(r"\bfulltune\.([A-Za-z_]+)", text) + re.findall(r"^from fulltune import (.+)$", text, re.M)
        for name in (name for names in used for name in names.split(", ")):
            # A package of it that needs an extra is found without being imported.
            assert hasattr(fulltune, name) or importlib.util.find_spec(f"fulltune.{name}") is not None


def test_every_exit_code_is_listed() -> None:
    text = (ROOT / "docs" / "reference" / "run-folder.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert kinds
    for kind in kinds:
        assert f"| {kind.exit_code} |" in text, kind.__name__
