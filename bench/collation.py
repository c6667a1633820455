"""What it costs to fetch and collate a micro batch: milliseconds of one core, against the training step that uses it.

    OMP_NUM_THREADS=1 python bench/collation.py

Rows lie in a mapped file, as the data stage leaves them. The step's time on a GPU is arithmetic, of a model that is
fast for its rows: 6 x parameters x tokens at half of an A100's rate (`plan/time.py`), or what launching its kernels
takes.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import ViTImageProcessor

from fulltune.inference.store import Rows, record_batch, write_rows
from fulltune.models.pixels import CONTENT, PATH, ImageReader, ImageRows
from fulltune.plan.gpus import find
from fulltune.plan.time import LAUNCH_SECONDS
from fulltune.tasks import causal_lm, image_classification, text_classification

BATCHES = 30
CASES: tuple[tuple[str, Any, int, int, float, int], ...] = (
    # task, its module, rows, tokens of a row, parameters and layers of a model that is fast for it
    ("classification, MiniLM-L6", text_classification, 32, 64, 22e6, 6),
    ("classification, MiniLM-L6", text_classification, 256, 64, 22e6, 6),
    ("classification, BERT-base", text_classification, 32, 512, 110e6, 12),
    ("answers, SmolLM2-135M", causal_lm, 16, 1024, 135e6, 30),
    ("answers, SmolLM2-135M", causal_lm, 4, 8192, 135e6, 30),
    ("images, ViT-base", image_classification, 32, 197, 86e6, 12),
)


def rows_of(folder: Path, module: Any, count: int, tokens: int) -> Any:
    """Prepared rows: token ids, or JPEG files of 500 x 375 pixels as ImageNet has them."""
    draw = np.random.default_rng(0)
    if module is image_classification:
        made = io.BytesIO()
        low = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8))
        low.resize((500, 375), Image.Resampling.BICUBIC).save(made, "JPEG", quality=90)
        rows = [{PATH: "", CONTENT: made.getvalue(), "labels": 1, "length": tokens} for _ in range(count)]
    else:
        ids = draw.integers(0, 30_000, (count, tokens), np.int32)
        per_token = module is causal_lm
        rows = [{"input_ids": row, "labels": row if per_token else 1, "length": tokens} for row in ids]
    write_rows(folder, [record_batch(rows, [""] * count)])
    found = Rows(folder)
    return ImageRows(found, ImageReader(ViTImageProcessor(), tokens)) if module is image_classification else found


def main() -> None:
    a100 = find("A100-80GB").tflops * 1e12 / 2
    print("ms a micro batch: collated on this core, step of an A100 by arithmetic, share")
    for name, module, count, tokens, parameters, layers in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(Path(folder), module, count, tokens)
            seconds = []
            for _ in range(3 if module is image_classification else BATCHES):
                began = time.process_time()
                module.collate([rows[number] for number in range(count)], 0)
                seconds.append(time.process_time() - began)
        step = max(6 * parameters * count * tokens / a100, LAUNCH_SECONDS * layers)
        spent = float(np.median(seconds))
        print(f"{name}, {count} x {tokens}: {1e3 * spent:.2f} of {1e3 * step:.0f}, {100 * spent / step:.1f} %")


if __name__ == "__main__":
    main()
