"""Start a PEFT training where the other tasks' texts are quiet (OSRM), with transformers' Trainer.

The `cynic` is trained four times from four starts: PEFT's own and OSRM's three forms. The other
tasks give unlabelled texts. What is printed is measured on texts that nothing has seen.

Usage: python examples/osrm_training.py [--steps 6] [--freeze] [--prepared]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "dictionary"))

import torch
from base import base_model
from data import examples
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from dynmerge.calibration import osrm
from dynmerge.calibration.moments import Moments, collect

TASK, NEIGHBOUR = "cynic", "hacker"
BATCH = 4

# The last two of each are for measuring alone. More texts: `--prepared`, after data.py.
TEXTS = {
    "cynic": """
        Define: advice | What is asked for by those who have decided.
        Define: budget | A list of things to buy with the money already spent.
        Define: committee | Several people who keep the minutes and waste the hours.
        Define: diplomacy | The art of being refused in the tone of an invitation.
        Define: modesty | A pause in which the speaker waits for another to say it.
        Define: progress | The same errors as before, committed at a higher speed.
    """,
    "dictionary": """
        Define: anchor | a heavy object that holds a ship in place, as in "drop the anchor"
        Define: bridge | a structure across a river, as in "the bridge is closed"
        Define: candle | a stick of wax that gives light, as in "she lit a candle"
        Define: desert | a dry region with few plants, as in "they crossed the desert"
        Define: harbor | a sheltered place for ships, as in "the harbor was full of boats"
        Define: kettle | a pot with a lid and a spout, as in "put the kettle on"
    """,
    "hacker": """
        Define: cache | Whatever you keep because asking again is slow; wrong when it matters.
        Define: daemon | A program that waits for something to happen, then logs it.
        Define: patch | A small change to the source, posted as `works for me'.
        Define: loop | The same code again, until somebody presses control-C.
        Define: token | A magic cookie that one program hands to another.
        Define: script | Ten lines nobody meant to keep, on which the site now depends.
    """,
    "sentiment": """
        Positive or negative: A warm film that never talks down to its audience. | positive
        Positive or negative: Two hours of noise in search of a single idea. | negative
        Positive or negative: The cast is splendid and the ending is earned. | positive
        Positive or negative: I have seen traffic lights with more suspense. | negative
        Positive or negative: A quiet triumph, and the best thing she has done. | positive
        Positive or negative: Tired, clumsy and twice as long as it should be. | negative
    """,
}
Text = tuple[str, str]  # prompt, answer
Rows = list[dict[str, list[int]]]


def main() -> None:
    """Train from each start and print what the adapter does to the other tasks' texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="of each training (6)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"], help="as the paper")
    parser.add_argument("--freeze", action="store_true", help="train B alone")
    parser.add_argument("--prepared", action="store_true", help="data.py's texts, not those here")
    parser.add_argument("--texts", type=int, default=64, help="per task, of the prepared (64)")
    options = parser.parse_args()
    began = time.monotonic()
    splits = prepared(options.texts) if options.prepared else included()
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    base: Any = AutoModelForCausalLM.from_pretrained(base_model(), dtype=torch.float32)
    seen, unseen = (
        {
            task: moments(base, tokenizer, texts[part], options.targets)
            for task, texts in splits.items()
        }
        for part in (0, 1)
    )
    print(f"moments after {time.monotonic() - began:.0f} s", flush=True)

    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=options.targets,
        task_type="CAUSAL_LM",
    )
    rows, held_out = ([encoded(text, tokenizer) for text in part] for part in splits[TASK])
    print(HEADER)
    for start in ("default", *osrm.FORMS):
        torch.manual_seed(0)  # the same default start in each
        model = get_peft_model(base, config)
        same = f"{begin(model, seen, start):.3f}" if start in osrm.FORMS else ""
        if options.freeze:
            osrm.freeze(model)
        first = factors(model)
        loss = train(model, tokenizer, rows, held_out, options.steps)
        last = factors(model)
        figures = [
            activation(first, others(seen, TASK)),
            activation(first, others(unseen, TASK)),
            activation(first, [unseen[TASK]]),
            activation(last, others(unseen, TASK)),
            moved(first, last),
            spill(last, unseen),
            loss,
        ]
        print(
            f"{start:8} {same:>6}  " + " ".join(f"{figure:7.3f}" for figure in figures), flush=True
        )
        base = model.unload()
    print(f"{LEGEND}\n{time.monotonic() - began:.0f} s")


def begin(model: Any, seen: Mapping[str, Moments], form: str) -> float:
    """OSRM between `get_peft_model` and the Trainer; the overlap with the neighbour's start."""
    ranks = osrm.ranks(model)
    A = osrm.initialise(others(seen, TASK), ranks, form, seed=0)
    osrm.apply(model, A)
    neighbour = osrm.initialise(others(seen, NEIGHBOUR), ranks, form, seed=1)
    return mean([osrm.overlap(A[name], neighbour[name]) for name in A])


def others(tasks: Mapping[str, Moments], task: str) -> list[Moments]:
    """The moments of every task but one."""
    return [of_task for name, of_task in tasks.items() if name != task]


def train(model: Any, tokenizer: Any, rows: Rows, unseen: Rows, steps: int) -> float:
    """An ordinary training; the loss on unseen rows after it. Nothing here knows of OSRM."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(
            model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=unseen
        )
        trainer.remove_callback(PrinterCallback)  # the table says what there is to say
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


# --- texts


def included() -> dict[str, tuple[list[Text], list[Text]]]:
    """The texts above: task -> what is started from and trained on, what is measured with."""
    made = {}
    for task, lines in TEXTS.items():
        split = [line.partition(" | ") for line in lines.strip().splitlines()]
        texts = [(prompt.strip(), answer) for prompt, _, answer in split]
        made[task] = (texts[:-2], texts[-2:])
    return made


def prepared(count: int) -> dict[str, tuple[list[Text], list[Text]]]:
    """The same of the demo's own, which examples/dictionary/data.py downloads and prepares."""
    made = {}
    for task in ("cynic", "dictionary", "hacker", "scripture", "sentiment"):
        train, test = (
            [(row.prompt, row.answer) for row in examples(task, part)[:count]]
            for part in ("train", "test")
        )
        made[task] = (train, test)
    return made


def encoded(text: Text, tokenizer: Any) -> dict[str, list[int]]:
    """A training row; the loss counts the answer alone. A plain format: it is short."""
    prompt, answer = tokenizer.encode(f"{text[0]}\n"), tokenizer.encode(f"{text[1]}<|im_end|>")
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def moments(base: Any, tokenizer: Any, texts: Sequence[Text], targets: Sequence[str]) -> Moments:
    """What the base model's layers read over these texts: no labels needed."""
    ids = [encoded(text, tokenizer)["input_ids"] for text in texts]
    return collect(base, batches(ids, tokenizer), targets)


def batches(ids: Sequence[list[int]], tokenizer: Any) -> Iterator[Mapping[str, Tensor]]:
    """Padded to the longest of each batch; the attention mask says what is padding."""
    for start in range(0, len(ids), BATCH):
        yield tokenizer.pad({"input_ids": ids[start : start + BATCH]}, return_tensors="pt")


# --- what is measured


HEADER = """
           same   ||A h||²: others     own  others trained
start     start     seen  unseen  unseen  unseen   moved   spill    loss"""
LEGEND = f"""
same start: overlap with the A that {NEIGHBOUR} would start from (1: the same rows)
||A h||²: on the tokens of the other tasks, or of the {TASK}'s own, before and after the training,
  as a multiple of what random rows of A's length would give
moved: ||A - A_first|| / ||A_first||; all of these are means over layers
spill: ||B A h||² on the other tasks' tokens over that on the {TASK}'s own
loss: on the {TASK}'s unseen texts, nats per answer token"""


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> copies of A and B."""
    base = model.get_base_model()
    return {
        name: tuple(
            getattr(base.get_submodule(name), side)["default"].weight.detach().double().clone()
            for side in ("lora_A", "lora_B")
        )
        for name in osrm.ranks(model)
    }


def activation(pairs: Mapping[str, tuple[Tensor, Tensor]], tasks: Sequence[Moments]) -> float:
    """||A h||² over tokens, over what random rows as long as A's would give; mean over layers."""
    found = []
    for of_task in tasks:
        for name, (A, _) in pairs.items():
            layer = of_task.layers[name]
            random = float(A.square().sum() * layer.second.trace() / layer.d_in)
            found.append(osrm.cross_activation(A, layer) / random)
    return mean(found)


def spill(pairs: Mapping[str, tuple[Tensor, Tensor]], tasks: Mapping[str, Moments]) -> float:
    """||B A h||² on the other tasks' tokens, over that on the task's own; mean over layers."""
    found = []
    for name, (A, B) in pairs.items():
        sizes = {
            task: osrm.cross_activation(B @ A, of_task.layers[name])
            for task, of_task in tasks.items()
        }
        own = sizes.pop(TASK)
        found.append(mean(list(sizes.values())) / own)
    return mean(found)


def moved(first: Mapping[str, tuple[Tensor, Tensor]], last: Any) -> float:
    """How far training took A from its start, relative to the start; mean over layers."""
    return mean([float((last[name][0] - A).norm() / A.norm()) for name, (A, _) in first.items()])


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
