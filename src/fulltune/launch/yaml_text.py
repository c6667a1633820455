"""YAML that people read: keys in their order, shell as blocks of lines."""

from __future__ import annotations

from typing import Any

import yaml


class _BlockDumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and what stands in two places written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_BlockDumper.add_representer(str, _text)


def as_yaml(*values: Any) -> str:
    """The values, a document each; whatever stands in their texts stays in them."""
    return yaml.dump_all(values, Dumper=_BlockDumper, sort_keys=False, allow_unicode=True, width=120)
