"""Train the encoder suite's adapters with PEFT: one for each task, and one on all tasks together.

Every adapter is trained by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynmerge.calibration import osrm
from dynmerge.evaluation.scores import score
from examples.dictionary.data import say
from study.apart import run_apart
from study.encoder import NAME, EncoderExamples, adapter_folder, examples, model
from study.encoder_tasks import TASKS

JOINT = "joint"
MODULES = ("query", "value", "attention.output.dense")
RANK, ALPHA = 8, 16
EPOCHS, BATCH, RATE = 3, 16, 3e-3

Batch = tuple[str, list[int]]  # a task, and rows of its examples


def train(
    tasks: Sequence[str],
    seed: int,
    folder: Path,
    A: Mapping[str, Tensor] | None = None,
) -> None:
    """Train one adapter on the `train` rows of `tasks` and write it to `folder` as PEFT does.

    `A` gives every lora_A (r, d_in) its start by the base model's name of the layer
    (`encoder.layer.0.attention.self.query`). With several tasks, every batch is of one task, in
    random order.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES))
    peft: Any = get_peft_model(model(), config)
    peft.peft_config["default"].base_model_name_or_path = NAME  # never a path of this machine
    if A is not None:
        osrm.apply(peft, A)
    asked = {task: examples(task, "train", peft) for task in tasks}
    order = random.Random(seed)
    steps = [batch for _ in range(EPOCHS) for batch in batches(asked, order)]
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 20, len(steps))
    peft.eval()  # no dropout: these trainings are short
    for task, chosen in steps:
        loss = torch.nn.functional.cross_entropy(
            asked[task].logits(chosen), asked[task].targets(chosen)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save(peft, folder)


def batches(asked: Mapping[str, EncoderExamples], order: random.Random) -> list[Batch]:
    """Every row of every task once, shuffled; rows of like length together, so little is padded."""
    made: list[Batch] = []
    for task, those in asked.items():
        shuffled = order.sample(range(len(those)), len(those))
        for start in range(0, len(shuffled), 4 * BATCH):
            pool = sorted(shuffled[start : start + 4 * BATCH], key=lambda r: len(those.tokens[r]))
            made += [(task, pool[at : at + BATCH]) for at in range(0, len(pool), BATCH)]
    return order.sample(made, len(made))


def save(peft: Any, folder: Path) -> None:
    """The adapter as a PEFT folder, all of it or nothing; one that is there is replaced."""
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    peft.save_pretrained(unfinished, save_embedding_layers=False)  # "auto" asks the hub
    (unfinished / "README.md").unlink(missing_ok=True)
    path = unfinished / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # a set: its order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def held_out(tasks: Sequence[str], folder: Path) -> dict[str, float]:
    """The trained adapter's accuracy on the validation rows, by task."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model(), folder).eval()
    return {task: score(examples(task, "validation", peft)).accuracy for task in tasks}


def main() -> None:
    """Train the adapters that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(TASKS)}, {JOINT}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="adapters trained at a time (2)")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - {*TASKS, JOINT})
    if unknown:
        parser.error(f"no task {unknown[0]!r} (known: {', '.join(TASKS)}, {JOINT})")
    names = options.names or [*TASKS, JOINT]
    wanted = [
        (seed, name)
        for seed in options.seeds
        for name in names
        if options.again or not (adapter_folder(seed, name) / "adapter_config.json").is_file()
    ]
    if len(wanted) < 2:
        for seed, name in wanted:
            train_here(seed, name)
        return
    for task in TASKS:
        examples(task, "train", torch.nn.Identity())  # prepared once, before the processes would
    calls = [[name, "--seeds", str(seed), "--again"] for seed, name in wanted]
    run_apart("study.encoder_training", calls, options.jobs)


def train_here(seed: int, name: str) -> None:
    """Train one adapter and say what it reached."""
    torch.set_num_threads(1)
    tasks = list(TASKS) if name == JOINT else [name]
    folder = adapter_folder(seed, name)
    train(tasks, seed, folder)
    busy = time.process_time()
    reached = ", ".join(f"{task} {share:.3f}" for task, share in held_out(tasks, folder).items())
    say(f"seed {seed} {name}: validation accuracy {reached} ({busy:.0f} CPU-s)")


if __name__ == "__main__":
    main()
