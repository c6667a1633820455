"""The report as one HTML file without network, and code that loads a model: templates lie beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from fulltune.report.format.blocks import Report

_LOADING = "loading.py.j2"
# Text from data, models and recipes goes through autoescape; only the SVG of `plots`, which escapes its own
# texts, is marked safe in the template.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: name != _LOADING,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(report: Report, template: str = "report.html.j2") -> str:
    """Print the whole report as HTML."""
    return _TEMPLATES.get_template(template).render(report=report)


def loading_code(**facts: Any) -> str:
    """Print Python that loads a model."""
    return _TEMPLATES.get_template(_LOADING).render(**facts)
