"""The generative suite: the demo's five skills, three seeds of their training, answers to predict.

What is counted is how many tokens of the held-out answers are the likeliest ones under the merge
(teacher-forced), and for the labelled skill which label is likelier. What learns reads prompts and
answers that the adapters were trained on: there are no others of some voices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.calibration.plan import Plan
from dynmerge.student import Student
from dynmerge.texts.language import examples_of
from dynmerge.texts.passages import Passages
from dynmerge.texts.rows import Row
from study.bench import Bench, Part

TRAINED = Path(__file__).parent / "adapters" / "generative"
DEMO = Path(__file__).parents[1] / "examples" / "dictionary"
sys.path.insert(0, str(DEMO))  # the demo's scripts find each other so

from base import base_model  # noqa: E402
from data import examples  # noqa: E402

SKILLS = ("cynic", "dictionary", "hacker", "scripture", "sentiment")
LABELS = {"sentiment": ("positive", "negative")}
SHIPPED = 20  # the seed of the demo's own adapters
# Of each skill: unlabelled text to learn from, rows to tune on, rows that guard a calibration,
# rows to test on.
CALIBRATION, VALIDATION, GUARD, TEST = 64, 12, 6, 40
# A labelled row is one prediction, where an answer is some thirty: three times as many of those.
LABELLED = 3


# --- adapters


def adapters(seed: int) -> dict[str, Path]:
    """Where the adapters of one seed lie; all are made by examples/dictionary/train.py."""
    folder = DEMO / "adapters" if seed == SHIPPED else TRAINED / str(seed)
    return {skill: folder / skill for skill in SKILLS}


def joint_adapter(seed: int) -> dict[str, Path]:
    """Where the one adapter of all skills lies."""
    return {"joint": TRAINED / str(seed) / "joint"}


def osrm_adapters(seed: int) -> dict[str, Path]:
    """Where the adapters that began at OSRM's start lie."""
    return {skill: TRAINED / f"{seed}-osrm" / skill for skill in SKILLS}


# Trained another way, by study.generative_training.
OTHERS: Mapping[str, Callable[[int], dict[str, Path]]] = {
    "osrm": osrm_adapters,
    "joint": joint_adapter,
}


@cache
def base() -> BaseModel:
    """The base model on disk."""
    return BaseModel.open(base_model())


def bank_of(folders: Mapping[str, Path]) -> FactorBank:
    """The bank of some adapters."""
    found = {name: load_adapter(folder, base()) for name, folder in folders.items()}
    return build_bank(BaseIdentity(base().name, base().fingerprint), found)


# --- what the study measures


def loaded_model() -> Any:
    """A fresh float32 copy of the base model."""
    return AutoModelForCausalLM.from_pretrained(base_model(), dtype=torch.float32)


@cache
def tokenizer() -> Any:
    """The base model's own."""
    return AutoTokenizer.from_pretrained(base_model())


def asked(model: Any, skill: str, split: str) -> Passages:
    """The examples of one skill and split, predicted by `model`."""
    rows = [Row(prompt=one.prompt, answer=one.answer) for one in examples(skill, split)]
    return examples_of(model, tokenizer(), rows, LABELS.get(skill))


def bench(seed: int) -> Bench:
    """One seed, ready to measure."""
    model = loaded_model()
    student = Student(model, bank_of(adapters(seed)))
    train, validation, test = (
        {skill: asked(model, skill, split) for skill in SKILLS}
        for split in ("train", "validation", "test")
    )
    splits = {
        "calibration": {skill: Part(train[skill], CALIBRATION) for skill in SKILLS},
        "validation": {skill: Part(validation[skill], size(skill, VALIDATION)) for skill in SKILLS},
        "guard": {skill: Part(validation[skill], size(skill, GUARD)) for skill in SKILLS},
        "test": {skill: Part(test[skill], size(skill, TEST)) for skill in SKILLS},
    }
    others = {kind: partial(bank_of, folders(seed)) for kind, folders in OTHERS.items()}
    return Bench("generative", seed, student, splits, others, shorter)


def size(skill: str, of_answers: int) -> int:
    """How many rows of a skill count where skills that answer have `of_answers`."""
    return of_answers * (LABELLED if skill in LABELS else 1)


def shorter(plan: Plan) -> Plan:
    """A plan with a quarter of the rows a step, at most 60 steps: a row here costs fifty there."""
    steps = min(plan.steps, 60)
    return replace(plan, batch=2, steps=steps, check=steps // 2)
