"""Does mixup help a small image model that was trained before? Digits of scikit-learn, no other data.

    python bench/mixup.py [--seeds 20]

No pretrained image model comes with a package, so one is made: a ViT of 0.2 million parameters learns the digits 0 to
4, and is then fine-tuned wholly, with a new head, on some of the digits 5 to 9. Mixup (Zhang et al. 2018, arXiv
1710.09412) trains on `w * one + (1 - w) * other` with both labels, `w` from Beta(alpha, alpha). All contestants of a
seed have the same rows, start and order.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

ALPHAS = (0.0, 0.2, 1.0)
ROWS = (50, 200)
EPOCHS, BATCH = 30, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    found: dict[tuple[int, float], list[float]] = {(rows, alpha): [] for rows in ROWS for alpha in ALPHAS}
    for seed in range(seeds):
        pretrained = trained(new_model(seed), pixels[targets < 5], targets[targets < 5], 0.0, seed)
        pretrained.classifier = torch.nn.Linear(64, 5)
        kept = torch.tensor(np.random.default_rng(seed).permutation(np.flatnonzero(labels >= 5)))
        test = kept[-500:]
        for rows, alpha in found:
            train = kept[:rows]
            model = trained(copy.deepcopy(pretrained), pixels[train], targets[train] - 5, alpha, seed)
            with torch.no_grad():
                right = model.eval()(pixels[test]).logits.argmax(-1) == targets[test] - 5
            found[rows, alpha].append(100 * float(right.float().mean()))
    for rows in ROWS:
        plain = found[rows, 0.0]
        print(f"{rows} rows, {seeds} seeds: plain {statistics.mean(plain):.1f} %")
        for alpha in ALPHAS[1:]:
            gains = [one - other for one, other in zip(found[rows, alpha], plain, strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5
            print(f"  mixup {alpha}: {statistics.mean(gains):+.2f} ± {error:.2f} points")


def new_model(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=5, hidden_dropout_prob=0.1, **sizes)
    return ViTForImageClassification(config)


def trained(
    model: ViTForImageClassification, pixels: torch.Tensor, targets: torch.Tensor, alpha: float, seed: int
) -> ViTForImageClassification:
    """All parameters, AdamW, the rate falling linearly to 0."""
    order, drawn = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    steps = EPOCHS * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pixels), generator=order).split(BATCH):
            weight = float(drawn.beta(alpha, alpha)) if alpha else 1.0
            other = batch[torch.randperm(len(batch), generator=order)]
            logits = model(weight * pixels[batch] + (1 - weight) * pixels[other]).logits
            loss = weight * cross_entropy(logits, targets[batch])
            if alpha:
                loss = loss + (1 - weight) * cross_entropy(logits, targets[other])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


if __name__ == "__main__":
    main()
