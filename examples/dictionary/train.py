"""Train the demo's five adapters with PEFT: different ranks, alphas and modules, one rsLoRA.

Two one-thread processes beat one two-thread process at this size, so every adapter is trained by a
process of its own, two at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from base import NAME, base_model, make_readable, say
from data import Example, examples
from torch import Tensor

ADAPTERS = Path(__file__).parent / "adapters"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
BATCH = 8
SEED = 20
PAD = 0  # <|endoftext|>; masked, so its value does not matter


@dataclass(frozen=True, slots=True)
class Plan:
    """How one adapter is trained. The scaling is alpha / r, or alpha / sqrt(r) with rslora."""

    r: int
    alpha: int
    modules: tuple[str, ...] = ATTENTION
    rslora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, int] = field(default_factory=dict)
    epochs: int = 1
    lr: float = 1.5e-3


# Unlike on purpose: a bank has to hold adapters that differ in every one of these.
PLANS = {
    "dictionary": Plan(r=8, alpha=16),
    "cynic": Plan(r=12, alpha=24, epochs=3, lr=2e-3),
    "hacker": Plan(r=6, alpha=5, rslora=True, modules=MLP, epochs=2, lr=2e-3),
    "scripture": Plan(
        r=8,
        alpha=16,
        modules=("q_proj", "v_proj", "o_proj", "down_proj"),
        ranks={"down_proj": 4},
        alphas={"down_proj": 12},
    ),
    "sentiment": Plan(r=4, alpha=8, modules=("q_proj", "v_proj")),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as tokens. The loss counts the answer alone, which starts at `start`."""

    tokens: list[int]
    start: int


def main() -> None:
    """Train the named adapters, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(PLANS)}")
    parser.add_argument("--jobs", type=int, default=2, help="adapters trained at a time (2)")
    parser.add_argument("--out", type=Path, default=ADAPTERS)
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the training ({SEED})")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(PLANS))
    if unknown:
        sys.exit(f"train.py: no adapter named {unknown[0]!r} (known: {', '.join(PLANS)})")
    base_model()  # made once, before the processes would each make it
    # The longest training first, so that the processes end together.
    names = sorted(options.names or PLANS, key=lambda name: -PLANS[name].epochs)
    if len(names) == 1:
        train(names[0], options.out, options.seed)
        return
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: train_apart(name, options.out, options.seed), names))
    say(f"{len(names)} adapters in {(time.monotonic() - began) / 60:.1f} minutes")


def train_apart(name: str, out: Path, seed: int) -> None:
    """Train one adapter in a process of one thread."""
    subprocess.run(
        [sys.executable, __file__, name, "--out", str(out), "--seed", str(seed)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


def train(
    name: str,
    out: Path,
    seed: int,
    plan: Plan | None = None,
    skills: Sequence[str] = (),
    begin: Callable[[Any], None] | None = None,
) -> None:
    """Train one adapter and write it to `out/name`; unless told, as PLANS has it, on its own rows.

    An epoch has every row of each of `skills`, as often as it is named. `begin` may change the PEFT
    model that was just made.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    plan, skills, began = plan or PLANS[name], skills or (name,), time.monotonic()
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    rows = {
        split: [encode(examples(skill, split), tokenizer) for skill in skills]
        for split in ("train", "validation")
    }
    # float32: many processors have no bfloat16 arithmetic and are three times slower in it.
    base = AutoModelForCausalLM.from_pretrained(base_model(), dtype=torch.float32)
    config = LoraConfig(
        r=plan.r,
        lora_alpha=plan.alpha,
        use_rslora=plan.rslora,
        target_modules=list(plan.modules),
        rank_pattern=plan.ranks,
        alpha_pattern=plan.alphas,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = NAME  # never a path of this machine
    if begin:
        begin(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=0.0)
    steps = plan.epochs * sum(math.ceil(len(part) / BATCH) for part in rows["train"])
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = random.Random(seed)
    for epoch in range(plan.epochs):
        losses = []
        for batch in batches(rows["train"], order):
            loss = answer_losses(model, batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) % 20 == 0:
                say(f"{name:<11} epoch {epoch + 1} step {len(losses)}: {mean(losses[-20:]):.3f}")
        held_out = validation_loss(model, list(chain.from_iterable(rows["validation"])))
        spent, busy = time.monotonic() - began, time.process_time()
        say(
            f"{name:<11} epoch {epoch + 1}/{plan.epochs}: train {mean(losses):.3f}, "
            f"validation {held_out:.3f} nats per token, {spent:.0f} s ({busy:.0f} CPU-s)"
        )
    save(model, out / name)
    say(f"{name:<11} written to {out / name}")


def encode(rows: Sequence[Example], tokenizer: Any) -> list[Row]:
    """Prompt and answer in the chat template, as the server will render the prompt."""
    encoded = []
    for row in rows:
        messages = [{"role": "user", "content": row.prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = [tokenizer.encode(text) for text in (prompt, row.answer + "<|im_end|>")]
        encoded.append(Row(tokens[0] + tokens[1], len(tokens[0])))
    return encoded


def batches(parts: Sequence[Sequence[Row]], order: random.Random) -> Iterator[list[Row]]:
    """Every row of every part once, in random order, but a batch is of one part and its rows of
    like length: little is padded, and one word as an answer counts as much as thirty.
    """
    made = []
    for rows in parts:
        shuffled = order.sample(list(rows), len(rows))
        pools = [shuffled[i : i + 8 * BATCH] for i in range(0, len(rows), 8 * BATCH)]
        for pool in pools:
            pool.sort(key=lambda row: len(row.tokens))
            made += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    yield from order.sample(made, len(made))


def answer_losses(model: Any, batch: Sequence[Row]) -> Tensor:
    """The loss of every answer token of the batch, in nats, row after row."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # All rows begin alike (system prompt, "Define:"): that part runs once, gradients included.
    shared = common_start([row.tokens[: row.start - 1] for row in batch])
    head = inner.model(input_ids=torch.tensor([batch[0].tokens[:shared]]), use_cache=True)
    head.past_key_values.batch_repeat_interleave(len(batch))
    width = max(len(row.tokens) for row in batch)
    ids = torch.tensor([row.tokens + [PAD] * (width - len(row.tokens)) for row in batch])
    place = torch.arange(width)
    lengths = torch.tensor([[len(row.tokens)] for row in batch])
    starts = torch.tensor([[row.start] for row in batch])
    hidden = inner.model(
        input_ids=ids[:, shared:],
        attention_mask=(place < lengths).long(),
        past_key_values=head.past_key_values,
    ).last_hidden_state
    answers = ((place >= starts) & (place < lengths))[:, shared + 1 :]
    # The vocabulary is a fifth of this model: logits only where there is an answer to predict.
    logits = inner.lm_head(hidden[:, :-1][answers]).float()
    targets = ids[:, shared + 1 :][answers]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def common_start(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences share."""
    columns = zip(*sequences, strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), len(sequences[0]))


@torch.no_grad()
def validation_loss(model: Any, rows: Sequence[Row]) -> float:
    """Mean answer loss per token."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    chunks = [by_length[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return float(torch.cat([answer_losses(model, chunk) for chunk in chunks]).mean())


def save(model: Any, folder: Path) -> None:
    """The adapter as a PEFT folder in bf16, without the model card nobody filled in."""
    model.to(torch.bfloat16).save_pretrained(folder)
    make_readable(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].sort()  # a set: its order differs from run to run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
