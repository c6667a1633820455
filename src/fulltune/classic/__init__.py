"""The classic script with one changed line: `from fulltune import Trainer, TrainingArguments`.

Scripts written for transformers 3 and 4 run on transformers 5: names that were dropped are understood, each with one
notice, and the guards of a fulltune run watch the training. The rest is Hugging Face's own.
"""

from fulltune.classic.arguments import FulltuneNotice, Seq2SeqTrainingArguments, TrainingArguments
from fulltune.classic.trainer import Seq2SeqTrainer, Trainer

__all__ = ["FulltuneNotice", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]
