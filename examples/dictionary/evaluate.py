"""Measure every adapter, alone, on every task's held-out test rows, against the base model.

The loss is the mean over the answer's tokens, in nats. For the labelled task the accuracy is how
often the right label is the likelier of the two.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from base import NAME, base_model, say
from data import Example, examples
from torch import Tensor
from train import ADAPTERS, BATCH, PLANS, answer_losses, encode, mean

LABELS = {"sentiment": ("positive", "negative")}
RESULTS = Path(__file__).parent / "results.json"
BASE = "base model"


def main() -> None:
    """Evaluate, write the results and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, default=ADAPTERS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    missing = [name for name in PLANS if not (options.adapters / name).is_dir()]
    if missing:
        sys.exit(f"evaluate.py: no adapter {missing[0]!r} in {options.adapters}: run train.py")
    results = evaluate(options.adapters)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["loss"], results["accuracy"]))


@torch.no_grad()
def evaluate(adapters: Path) -> dict[str, Any]:
    """The losses and accuracies of the base model and of every adapter at weight 1."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model())
    base = AutoModelForCausalLM.from_pretrained(base_model(), dtype=torch.float32)
    tasks = {task: examples(task, "test") for task in PLANS}
    loss = {BASE: losses(base.eval(), tasks, tokenizer)}
    accuracy = {BASE: accuracies(base, tasks, tokenizer)}
    say(f"{BASE:<11} {loss[BASE]} {accuracy[BASE]}")
    first, *others = PLANS
    model: Any = PeftModel.from_pretrained(base, adapters / first, adapter_name=first)
    for name in others:
        model.load_adapter(adapters / name, adapter_name=name)
    for name in PLANS:
        model.set_adapter(name)
        loss[name] = losses(model.eval(), tasks, tokenizer)
        accuracy[name] = accuracies(model, tasks, tokenizer)
        say(f"{name:<11} {loss[name]} {accuracy[name]}")
    return {
        "base_model": NAME,
        "split": "test",
        "rows": {task: len(rows) for task, rows in tasks.items()},
        "measure": "mean answer loss in nats per token; accuracy of the likelier label",
        "dtype": "float32",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "loss": loss,
        "accuracy": accuracy,
    }


def losses(model: Any, tasks: Mapping[str, list[Example]], tokenizer: Any) -> dict[str, float]:
    """Mean loss per answer token for every task."""
    return {
        task: round(float(torch.cat(by_row(model, rows, tokenizer)).mean()), 4)
        for task, rows in tasks.items()
    }


def accuracies(model: Any, tasks: Mapping[str, list[Example]], tokenizer: Any) -> dict[str, float]:
    """How often the right label is likelier than the others, for the labelled tasks."""
    return {
        task: round(accuracy(model, tasks[task], labels, tokenizer), 4)
        for task, labels in LABELS.items()
    }


def accuracy(model: Any, rows: Sequence[Example], labels: Sequence[str], tokenizer: Any) -> float:
    """How often the right label is the likeliest, as a share of the rows."""
    scores = []
    for label in labels:
        answered = [Example(row.key, row.prompt, label) for row in rows]
        scores.append([float(loss.sum()) for loss in by_row(model, answered, tokenizer)])
    chosen = [labels[costs.index(min(costs))] for costs in zip(*scores, strict=True)]
    return mean([float(row.answer == label) for row, label in zip(rows, chosen, strict=True)])


def by_row(model: Any, rows: Sequence[Example], tokenizer: Any) -> list[Tensor]:
    """The losses of each row's answer tokens, in the order of the rows."""
    encoded = encode(rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i].tokens))  # little padding
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 2 * BATCH):
        chosen = order[start : start + 2 * BATCH]
        batch = [encoded[i] for i in chosen]
        lengths = [len(row.tokens) - row.start for row in batch]
        found |= dict(zip(chosen, answer_losses(model, batch).split(lengths), strict=True))
    return [found[i] for i in range(len(rows))]


def table(loss: Mapping[str, Mapping[str, float]], accuracy: Mapping[str, Any]) -> str:
    """The results as a Markdown table, one row per adapter."""
    tasks = list(PLANS)
    heads = ["adapter", *tasks, *(f"{task} accuracy" for task in LABELS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in loss.items():
        best = {task: min(other[task] for other in loss.values()) for task in tasks}
        cells = [f"**{row[t]:.2f}**" if row[t] == best[t] else f"{row[t]:.2f}" for t in tasks]
        cells += [f"{accuracy[name][task]:.1%}" for task in LABELS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
