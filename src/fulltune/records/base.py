from __future__ import annotations

import reprlib
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from fulltune.errors import SetupError
from fulltune.files import write_text

_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxother = _SHORT_REPR.maxstring = 60


class Record(BaseModel):
    """A frozen object that is saved as JSON. Unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # a metric that is NaN must come back as NaN, not as null
    )

    if_damaged: ClassVar[str] = "delete it and run the command again"

    def save(self, path: Path) -> None:
        """Write the record as JSON that only its owner may read, replacing the file atomically."""
        write_text(path, self.model_dump_json(indent=2) + "\n", private=True)

    def __repr__(self) -> str:
        """Return the fields that differ from their defaults, with long values shortened."""
        fields = type(self).model_fields
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
        changes = [f"{name}={_SHORT_REPR.repr(value)}" for name, value in self if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changes)})"

    __str__ = __repr__

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load a saved record. Raise `SetupError` if the file is damaged, unreadable or from another version."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except PermissionError:
            raise SetupError(
                f"{path}: permission denied, because only its owner may read it; run the command as the owner, or make "
                "the file readable (chmod)"
            ) from None
        except ValueError:
            raise SetupError(
                f"{path}: the file is damaged or from another version of fulltune; {cls.if_damaged}"
            ) from None
