"""Scripts written for transformers 3 and 4 run on transformers 5, with the guards of a fulltune run."""

from fulltune.classic.arguments import FulltuneNotice, Seq2SeqTrainingArguments, TrainingArguments
from fulltune.classic.trainer import Seq2SeqTrainer, Trainer

__all__ = ["FulltuneNotice", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]
