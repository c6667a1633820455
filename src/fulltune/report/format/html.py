"""The report as one HTML file without network: fill the template that lies beside this file."""

from __future__ import annotations

from pathlib import Path

import jinja2

from fulltune.report.format.blocks import Report

# Text from data, models and recipes goes through autoescape; only the SVG of `plots`, which escapes its own
# texts, is marked safe in the template.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(report: Report, template: str = "report.html.j2") -> str:
    """Print the whole report as HTML."""
    return _TEMPLATES.get_template(template).render(report=report)
