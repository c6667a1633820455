"""Other ways to train a model that is larger than memory, each in a process of its own, for `bench/stream_rivals.py`.

`python -m bench.stream_contestants NAME MODEL ROWS.json SCRATCH` trains all parameters in fp32 with AdamW, a clipped
global norm and activation checkpointing on the CPU, one row per pass and two per step, and prints JSON: the loss of
each step, and the seconds of the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROWS_PER_STEP = 2
RATE, NORM = 1e-4, 1.0
Rows = list[list[int]]
Answer = dict[str, Any]


def load(model: Path) -> Any:
    """The model in fp32 with activation checkpointing."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loaded.config.use_cache = False
    return loaded.train()


def steps_of(rows: Rows) -> Iterator[list[Any]]:
    import torch

    for begin in range(0, len(rows), ROWS_PER_STEP):
        yield [torch.tensor([row]) for row in rows[begin : begin + ROWS_PER_STEP]]


def loop(
    rows: Rows, loss_of: Callable[[Any], Any], backward: Callable[[Any], None], update: Callable[[], None]
) -> Answer:
    """Train with a bare loop."""
    losses, seconds = [], 0.0
    for batch in steps_of(rows):
        began, total = time.perf_counter(), 0.0
        for row in batch:
            loss = loss_of(row)
            backward(loss / len(batch))
            total += loss.item() / len(batch)
        update()
        losses.append(total)
        seconds = time.perf_counter() - began
    return {"losses": losses, "seconds": seconds}


def bare(model: Any, rows: Rows, optimizer: Any, set_to_none: bool = True) -> Answer:
    import torch

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)

    return loop(rows, lambda row: model(input_ids=row, labels=row).loss, lambda loss: loss.backward(), update)


def trainer(model: Path, rows: Rows, scratch: Path) -> Answer:
    """transformers' Trainer, everything resident."""
    import transformers

    class Clock(transformers.TrainerCallback):
        seconds = began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> None:
            """None: rows in their order, as the others have them."""

    arguments = transformers.TrainingArguments(
        output_dir=str(scratch),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_PER_STEP,
        max_steps=len(rows) // ROWS_PER_STEP,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=NORM,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    runner = InOrder(load(model), arguments, train_dataset=data)
    clock = Clock()
    runner.add_callback(clock)
    runner.train()
    losses = [line["loss"] for line in runner.state.log_history if "loss" in line]
    return {"losses": losses, "seconds": clock.seconds}


def fsdp2(model: Path, rows: Rows, scratch: Path) -> Answer:
    """FSDP2 with `CPUOffloadPolicy` over a mesh of one CPU process."""
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{scratch / 'rendezvous'}", rank=0, world_size=1)
    try:
        loaded = load(model)
        mesh = init_device_mesh("cpu", (1,))
        for block in (*loaded.model.layers, loaded):
            fully_shard(block, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
        return bare(loaded, rows, torch.optim.AdamW(loaded.parameters(), RATE))
    finally:
        distributed.destroy_process_group()


def mapped(model: Path, rows: Rows, scratch: Path) -> Answer:
    """Plain PyTorch; weights, gradients and moments are memory-mapped files, which the system writes when it likes."""
    import torch

    number = iter(range(10**6))

    def on_disk(like: Any) -> Any:
        file = str(scratch / f"{next(number)}.bin")
        return torch.from_file(file, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)

    loaded = load(model)
    for parameter in loaded.parameters():
        parameter.data = on_disk(parameter).copy_(parameter.data)
        parameter.grad = on_disk(parameter)
    optimizer = torch.optim.AdamW(loaded.parameters(), RATE, fused=True)
    for parameter in loaded.parameters():
        moments = {name: on_disk(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return bare(loaded, rows, optimizer, set_to_none=False)


def deepspeed_nvme(model: Path, rows: Rows, scratch: Path) -> Answer:
    """DeepSpeed's ZeRO-3 with parameters and optimizer state on a disk (ZeRO-Infinity)."""
    # Buffers hold the embedding, the largest tensor; the usual ones are half as large again.
    place = {"device": "nvme", "nvme_path": str(scratch)}
    return _deepspeed(model, rows, place | {"buffer_size": 70_000_000}, place, sub_group_size=70_000_000)


def deepspeed_cpu(model: Path, rows: Rows, scratch: Path) -> Answer:
    """DeepSpeed's ZeRO-3 with parameters and optimizer state in host memory."""
    return _deepspeed(model, rows, {"device": "cpu"}, {"device": "cpu"})


def _deepspeed(model: Path, rows: Rows, weights: dict[str, Any], moments: dict[str, Any], **more: Any) -> Answer:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ROWS_PER_STEP,
        "gradient_clipping": NORM,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE}},
        "zero_optimization": {"stage": 3, "offload_param": weights, "offload_optimizer": moments, **more},
    }
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    os.environ |= alone
    deepspeed.init_distributed("gloo")
    keeps = HfDeepSpeedConfig(settings)  # while it lives, transformers loads into partitions
    engine, *_ = deepspeed.initialize(model=load(model), config=settings)

    def backward(loss: Any) -> None:
        engine.backward(loss * ROWS_PER_STEP)  # which divides it by the accumulation itself
        engine.step()

    answer = loop(rows, lambda row: engine(input_ids=row, labels=row).loss, backward, lambda: None)
    del keeps
    return answer


CONTESTANTS: dict[str, Callable[[Path, Rows, Path], Answer]] = {
    "trainer": trainer,
    "fsdp2": fsdp2,
    "mapped": mapped,
    "deepspeed_nvme": deepspeed_nvme,
    "deepspeed_cpu": deepspeed_cpu,
}


def main(name: str, model: str, rows: str, scratch: str) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        answer = CONTESTANTS[name](Path(model), json.loads(Path(rows).read_text(encoding="utf-8")), Path(scratch))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
