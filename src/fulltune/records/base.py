"""A frozen record that writes itself to disk, one JSON file each, and reads itself back."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from fulltune.errors import SetupError
from fulltune.files import write_text

_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 60


class Record(BaseModel):
    """A frozen record that knows how to write itself to disk and read itself back."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # a metric that is NaN must come back as NaN, not as null
    )

    def save(self, path: Path) -> None:
        """Write the record as JSON for its owner alone; a reader sees the old file or the new one, never a part."""
        write_text(path, self.model_dump_json(indent=2) + "\n", private=True)

    def __repr__(self) -> str:
        """One line: what is not as usual, and of long values the beginning; `model_dump()` gives everything."""
        fields = type(self).model_fields
        usual = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        said = [f"{name}={_SHORT.repr(value)}" for name, value in self if value != usual[name]]
        return f"{type(self).__name__}({', '.join(said)})"

    __str__ = __repr__

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record that `save` wrote.

        Raises:
            SetupError: When the file is damaged, of another version of fulltune, or another user's.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except PermissionError:
            raise SetupError(
                f"{path}: may not be read (permission denied): its owner alone may read it; run the command as that "
                "user, or have it made readable (chmod)"
            ) from None
        except ValueError:
            raise SetupError(
                f"{path}: damaged, or written by another version of fulltune; delete it and run the command again"
            ) from None
