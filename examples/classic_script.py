"""A classic fine-tuning script, as written for transformers 3 and 4. Only the import of `Trainer` is fulltune's.

Runs offline in seconds: the model is a tiny GPT-2 with random weights, and one word of each text decides its label.
"""

import random

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from fulltune import Trainer, TrainingArguments

WORDS = ["the", "film", "story", "music", "plot", "was", "felt", "seemed", "rather", "very", "truly", "often"]
MOODS = {"great": 1, "lovely": 1, "dull": 0, "awful": 0}


class Reviews(torch.utils.data.Dataset):
    def __init__(self, tokenizer, count, seed):
        draw = random.Random(seed)
        moods = [draw.choice(list(MOODS)) for _ in range(count)]
        texts = [" ".join([*draw.choices(WORDS, k=draw.randint(3, 12)), mood, draw.choice(WORDS)]) for mood in moods]
        self.encodings = tokenizer(texts, truncation=True)
        self.labels = [MOODS[mood] for mood in moods]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {**{key: values[index] for key, values in self.encodings.items()}, "labels": self.labels[index]}


def compute_metrics(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *WORDS, *MOODS])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", model_max_length=32)
tokenizer.pad_token = tokenizer.eos_token
torch.manual_seed(0)
config = GPT2Config(vocab_size=len(vocabulary), n_positions=32, n_embd=32, n_layer=2, n_head=2, num_labels=2)
model = GPT2ForSequenceClassification(config)

args = TrainingArguments(
    output_dir="classic-output",
    evaluation_strategy="epoch",
    save_strategy="epoch",
    learning_rate=3e-3,
    per_device_train_batch_size=16,
    num_train_epochs=3,
    weight_decay=0.01,
    warmup_ratio=0.1,
    group_by_length=True,
    fp16=torch.cuda.is_available(),
    load_best_model_at_end=True,
    save_total_limit=1,
)
train, test = Reviews(tokenizer, 320, seed=1), Reviews(tokenizer, 100, seed=2)
trainer = Trainer(
    model, args, train_dataset=train, eval_dataset=test, tokenizer=tokenizer, compute_metrics=compute_metrics
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
