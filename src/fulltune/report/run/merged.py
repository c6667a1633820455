"""The card of a merged model: that of what was trained, with how a whole model is loaded."""

from __future__ import annotations

import re

from fulltune.report.format.markdown import fenced
from fulltune.report.run.content import HOW_TO_LOAD, loading_code

_LOADING = re.compile(r"^## How to load\n.*?(?=^## |\Z)", re.M | re.S)
_BARE = "---\nlibrary_name: transformers\ntags:\n- fulltune\n---\n\n# A merged model\n\n## How to load\n"


def merged_card(text: str, name: str, task: str) -> str:
    """Write the merged model's card.

    Args:
        text: The card of what was trained; empty where there is none.
        name: Of the merged model's folder.
        task: What the model does.

    Returns:
        Markdown with YAML front matter.
    """
    what = "What was trained is merged into the pretrained model's own weights. " + HOW_TO_LOAD["full"]
    section = f"## How to load\n\n{what}\n\n{fenced(loading_code(name, task, None), 'python')}\n\n"
    return _LOADING.sub(lambda _: section, text or _BARE).rstrip() + "\n"
