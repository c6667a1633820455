"""Which rows and columns of a file are read."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from fulltune.errors import DataError
from fulltune.text import did_you_mean, first_few

_ALLOWED = "compare columns with texts or numbers (== != < <= > >=, in (...), is None), and join by and, or, not"
_SIGNS = {"Eq": operator.eq, "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge}
_NUMBER = (int, float, Decimal)
_TEXT_OR_NAME = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]+`""")
_SLICE = re.compile(r"\[(-?\d+%?)?:(-?\d+%?)?\]")

Cell = Any
Cells = dict[str, Cell]
Tree = tuple[Cell, ...]


@dataclass(frozen=True)
class Condition:
    """A condition on a row's columns, such as `lang == 'de' and year >= 2020`."""

    text: str
    columns: tuple[str, ...]
    tree: Tree = field(repr=False)
    """`(And, tree, ...)`, `(Or, tree, ...)`, `(Not, tree)` or `(sign, column, constant)`, with names of `ast`."""

    def holds(self, row: Cells) -> bool:
        """Return whether a row fulfils the condition. As in SQL, only `is None` holds for a missing value, which in csv
        is an empty text. Raises `DataError` if a date is compared with another text."""
        return _evaluate(self.tree, row, _compare_cell) is True

    def may_hold(self, bounds: Cells) -> bool:
        """Return False if no row with cells between these minima and maxima can fulfil the condition."""
        return _evaluate(self.tree, bounds, _compare_bounds) is not False


def parse_condition(text: str) -> Condition:
    """Parse a condition in Python's syntax. Raises `ValueError`, with the place in the text, for other syntax."""
    plain, columns = text.replace("\n", " ").strip(), dict[str, None]()
    # Python's parser counts bytes and has no names in backticks, so their characters become underscores.
    source = _TEXT_OR_NAME.sub(lambda part: part[0] if part[0][0] != "`" else "_" * len(part[0]), plain)

    def unfit(node: ast.expr) -> SyntaxError:
        return SyntaxError("", ("", 1, node.col_offset + 1, ""))

    def leaf(sign: str, column: str, node: ast.expr) -> Tree:
        try:
            value = ast.literal_eval(plain[node.col_offset : node.end_col_offset])
        except (ValueError, SyntaxError):
            raise unfit(node) from None
        if not (value is None if sign == "Is" else isinstance(value, (str, int, float))):
            raise unfit(node)
        return (sign, column, value) if (sign, value) != ("Eq", "") else ("Is", column, None)

    def tree_of(node: ast.expr) -> Tree:
        match node:
            case ast.BoolOp(op, parts):
                return (type(op).__name__, *map(tree_of, parts))
            case ast.UnaryOp(ast.Not(), part):
                return ("Not", tree_of(part))
            case ast.Compare(ast.Name() as left, [sign], [right]):
                name = type(sign).__name__
                cells = getattr(right, "elts", ()) if "In" in name else [right]
                columns[column := plain[left.col_offset : left.end_col_offset].strip("`")] = None
                leaves = [leaf(name.replace("Not", "").replace("In", "Eq"), column, cell) for cell in cells]
                if not leaves:
                    raise unfit(right)
                tree = ("Or", *leaves) if leaves[1:] else leaves[0]
                return ("Not", tree) if "Not" in name else tree
        raise unfit(node)

    try:
        tree = tree_of(ast.parse(re.sub(r"[^\x00-\x7f]", "_", source), mode="eval").body)
    except SyntaxError as error:
        at, why = error.offset or len(plain) + 1, f" ({error.msg})" if error.msg else ""
        raise ValueError(
            f"expected a condition, found {plain[at - 1 :][:40]!r} at character {at}{why}; {_ALLOWED}"
        ) from None
    return Condition(plain, tuple(columns), tree)


Where = Annotated[str, AfterValidator(lambda text: parse_condition(text).text)]


def _evaluate(tree: Tree, values: Cells, compare: Callable[..., bool | None]) -> bool | None:
    """Return True, False or, as in SQL, None for unknown."""
    kind, *parts = tree
    if kind not in ("And", "Or", "Not"):
        return compare(kind, values.get(parts[0]), parts[1])
    results = [_evaluate(part, values, compare) for part in parts]
    if kind == "Not":
        return None if results[0] is None else not results[0]
    return kind == "Or" if (kind == "Or") in results else None if None in results else kind == "And"


def _compare_cell(sign: str, cell: Cell, constant: Cell) -> bool | None:
    cell = None if cell == "" else cell
    if sign == "Is":
        return cell is None
    if isinstance(cell, date) and isinstance(constant, str):
        time = cell if isinstance(cell, datetime) else datetime.combine(cell, datetime.min.time())
        try:
            other = datetime.fromisoformat(constant)
            return bool(_SIGNS[sign](time, other if other.tzinfo else other.replace(tzinfo=time.tzinfo)))
        except (ValueError, TypeError):
            raise DataError(f"where: '{constant}' cannot be compared with {cell}; write it like {cell}") from None
    if isinstance(cell, Decimal) or isinstance(cell, str) != isinstance(constant, str):  # in csv, numbers are texts
        cell, constant = _as_number(cell), _as_number(constant)
    return bool(_SIGNS[sign](cell, constant)) if _are_alike(cell, constant) else None


def _compare_bounds(sign: str, bounds: tuple[Cell, Cell] | None, constant: Cell) -> bool | None:
    if bounds is None or not all(_are_alike(bound, constant) for bound in bounds):
        return None
    low, high = bounds
    fits = low <= constant <= high if sign == "Eq" else _SIGNS[sign](low if "L" in sign else high, constant)
    return None if fits else False


def _are_alike(cell: object, constant: object) -> bool:
    are_numbers = isinstance(cell, _NUMBER) and isinstance(constant, _NUMBER) and cell == cell  # not NaN
    return are_numbers or (isinstance(cell, str) and isinstance(constant, str))


def _as_number(value: object) -> object:
    """Return the number or truth value that a value says, without rounding; None for NaN and for others."""
    text = str(value).strip().lower()
    try:
        number = text == "true" if text in ("true", "false") else Decimal(text)
        return number if number == number else None
    except InvalidOperation:
        return None


@dataclass(frozen=True)
class Selection:
    """What is read of a file: of its `rows` those that fulfil the condition, and of these the `columns`."""

    condition: Condition = Condition("", (), ("And",))
    columns: tuple[str, ...] = ()
    rows: range | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.columns, *self.condition.columns)))

    def narrowed(self, where: str) -> Selection:
        old, new = self.condition, parse_condition(where)
        both = Condition(f"({old.text}) and ({new.text})", old.columns + new.columns, ("And", old.tree, new.tree))
        return replace(self, condition=both if old.text else new)

    def select(self, row: Cells) -> Cells | None:
        """Return the columns to read, or None if the row does not fulfil the condition."""
        if not self.condition.holds(row):
            return None
        return {name: row[name] for name in self.columns if name in row} if self.columns else row

    def refuse_missing(self, file: Path, present: Collection[str]) -> None:
        """Raise `DataError` for columns that are not `present` in the file."""
        if missing := [name for name in self.needed if name not in present]:
            names = f"columns in the file: {first_few([*present], 12)}"
            roles = [f"'{one}' ({'columns' if one in self.columns else 'where'})" for one in missing]
            hints = [did_you_mean(one, present) or names for one in missing]
            raise DataError([f"{file}: no column {one}; {hint}" for one, hint in zip(roles, hints, strict=True)])


def slice_of_files(files: Iterable[Path], text: str, num_rows: Callable[[Path], int]) -> dict[Path, range]:
    """Return which rows of each file belong to a slice of all files, such as `[:5%]` or `[-100:]`, rounded as by
    `datasets`. Raises `ValueError` for another form, or if no row is left."""
    if (match := _SLICE.fullmatch(text)) is None:
        raise ValueError(f"expected a slice such as [:5%], [100:200] or [-100:], found '{text}'")
    counts = {file: num_rows(file) for file in files}
    total, start, slices = sum(counts.values()), 0, dict[Path, range]()
    first, last = (
        None if not end else round(int(end[:-1]) * total / 100) if "%" in end else int(end) for end in match.groups()
    )
    if not (chosen := range(total)[first:last]):
        raise ValueError(f"{text} has none of the {total:,} rows; choose another slice")
    for file, count in counts.items():
        slices[file] = range(max(0, chosen.start - start), max(0, min(count, chosen.stop - start)))
        start += count
    return slices
