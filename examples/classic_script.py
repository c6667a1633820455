"""The classic fine-tuning script, as written for transformers 3 and 4. Only the import of `Trainer` is fulltune's.

Runs offline in seconds: `tiny_gpt2` stands in for "gpt2", a tiny GPT-2 with random weights, and one word of each text
decides its label. Like many scripts, this one hands the Trainer neither its tokenizer nor a collator.
"""

import random

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from fulltune import Trainer, TrainingArguments  # was: from transformers import Trainer, TrainingArguments

WORDS = ["the", "film", "story", "music", "plot", "was", "felt", "seemed", "rather", "very", "truly", "often"]
MOODS = {"great": 1, "lovely": 1, "dull": 0, "awful": 0}


def tiny_gpt2(folder):
    """A model and its tokenizer, which like GPT-2's has no padding token."""
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *WORDS, *MOODS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def reviews(count, seed):
    draw = random.Random(seed)
    moods = [draw.choice(list(MOODS)) for _ in range(count)]
    texts = [" ".join([*draw.choices(WORDS, k=draw.randint(3, 12)), mood, draw.choice(WORDS)]) for mood in moods]
    return Dataset.from_dict({"text": texts, "label": [MOODS[mood] for mood in moods]})


name = tiny_gpt2("classic-output/gpt2")
model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.eos_token


def tokenize(batch):
    return tokenizer(batch["text"], truncation=True, max_length=32)


train = reviews(320, seed=1).map(tokenize, batched=True)
val = reviews(100, seed=2).map(tokenize, batched=True)

for param in model.parameters():
    param.requires_grad = True

args = TrainingArguments(
    output_dir="classic-output/results",
    num_train_epochs=3,
    per_device_train_batch_size=8,
    per_device_eval_batch_size=8,
    learning_rate=3e-3,  # of random weights; 2e-5 for GPT-2 itself
    weight_decay=0.01,
    warmup_steps=5,
    gradient_accumulation_steps=2,
    fp16=True,
    evaluation_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    logging_steps=10,
)
trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=val)
trainer.train()
print(trainer.evaluate())
trainer.save_model("classic-output/model")
