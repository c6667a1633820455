from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fulltune.recipe.data import DataBlock
from fulltune.tasks.columns import USUAL_NAMES, parse_cell
from fulltune.tasks.labels import label_name


@dataclass(frozen=True)
class DerivedColumns:
    """Columns that are made of others while rows are read."""

    inner: tuple[str, ...] = ()
    """Parts of objects, such as `translation.en`."""
    label: str = ""
    flags: tuple[str, ...] = ()
    """Columns of 0 and 1, of which `label` lists those with 1."""
    tags: tuple[str, ...] = ()
    tag_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, block: DataBlock) -> DerivedColumns:
        named = (getattr(block, role) for role in USUAL_NAMES)
        inner = tuple(name for name in named if name and "." in name)
        tags = (block.tags,) if block.tags else USUAL_NAMES["tags"]
        return cls(inner, block.label or "", block.label_columns or (), tags, block.tag_names or ())

    def added_to(self, row: dict[str, Any]) -> dict[str, Any]:
        added = {name: value for name, value in inner_cells(row) if name in self.inner} if self.inner else {}
        values = {name: label_name(row.get(name)).lower() for name in self.flags}
        if values and {*values.values()} <= {"0", "1", "false", "true"}:  # -1 says that nobody knows
            added[self.label] = [name for name, value in values.items() if value in ("1", "true")]
        if self.tag_names:
            added |= {name: self._names_of_tags(row[name]) for name in self.tags if name in row}
        return {**row, **added} if added else row

    def _names_of_tags(self, cell: object) -> object:
        """Return a cell's tags by name. Numbers without a name are left, and refused later."""
        numbers = parse_cell(cell.split() if isinstance(cell, str) and "[" not in cell else cell)
        by_number = {str(number): name for number, name in enumerate(self.tag_names)}
        return [by_number.get(str(one), one) for one in numbers] if isinstance(numbers, (list, tuple)) else cell


def inner_cells(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a row's objects, named `column.key`."""
    for name, cell in row.items():
        value = parse_cell(cell)
        for key, part in value.items() if isinstance(value, Mapping) else ():
            if f"{name}.{key}" not in row:
                yield f"{name}.{key}", part
