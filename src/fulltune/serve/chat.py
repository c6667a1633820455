from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from fulltune.errors import SetupError
from fulltune.models.base import Base
from fulltune.predict import Predictor, load_predictor
from fulltune.recipe.model import ModelBlock
from fulltune.stream.skeleton import load_within
from fulltune.system.run_folder import hide_progress_bars, load_run_recipe


@dataclass
class Conversation:
    """A model and, if it was trained on chats, the messages so far."""

    name: str
    predictor: Predictor
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, line: str, max_new_tokens: int) -> str:
        """Print the answer token by token. Return why there is none, else ""."""
        from transformers import TextStreamer

        self.predictor.streamer = TextStreamer(self.predictor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        columns = self.predictor.target.columns
        role = next(role for role in ("messages", "prompt", "source", "text") if role in columns)
        messages = [*self.messages, {"role": "user", "content": line}]
        row = {columns[role]: messages if role == "messages" else line}
        [predicted] = self.predictor.answer_each([row], max_new_tokens)
        if predicted.answer is not None:
            self.messages = [*messages, {"role": "assistant", "content": predicted.answer["answer"]}]
        return predicted.refused.reason if predicted.refused else ""


def open_conversations(folder: Path, beside: str | None) -> list[Conversation]:
    """Load a model that writes text and, before it, the one named `beside` ("base": the pretrained model)."""
    hide_progress_bars()
    tuned = load_predictor(folder)
    if not tuned.task.FACTS.writes:
        raise SetupError(f"{folder}: is a model for {tuned.notes['task']}; use 'fulltune predict'")
    if beside is None:
        return [Conversation("fine-tuned", tuned)]
    is_pretrained = beside == "base"
    block = load_run_recipe(folder.resolve().parents[1]).model if is_pretrained else ModelBlock(name=beside)
    base = Base.from_block(block, tuned.notes["task"])
    model = load_within(base, {}, head_is_new=False, device=tuned.model.device.type).eval()
    other = replace(tuned, model=model, tokenizer=tuned.tokenizer if is_pretrained else base.processor)
    return [Conversation("pretrained" if is_pretrained else beside, other), Conversation("fine-tuned", tuned)]
