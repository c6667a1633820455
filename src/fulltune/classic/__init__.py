from fulltune.classic.arguments import FulltuneNotice, Seq2SeqTrainingArguments, TrainingArguments
from fulltune.classic.trainer import Seq2SeqTrainer, Trainer

__all__ = ["FulltuneNotice", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]
