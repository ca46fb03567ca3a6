"""The generative suite: the demo's five skills, three seeds of their training, answers to predict.

What is counted is how many tokens of the held-out answers are the likeliest ones under the merge
(teacher-forced), and for the labelled skill which label is likelier. What learns reads prompts and
answers that the adapters were trained on: there are no others of some voices.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
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


def adapters(seed: int) -> Path:
    """Where the adapters of one seed lie; all are made by examples/dictionary/train.py."""
    return DEMO / "adapters" if seed == SHIPPED else Path(__file__).parent / "adapters" / str(seed)


@cache
def base() -> BaseModel:
    """The base model on disk."""
    return BaseModel.open(base_model())


def bank_of(seed: int) -> FactorBank:
    """The bank of one seed's adapters."""
    found = {name: load_adapter(adapters(seed) / name, base()) for name in SKILLS}
    return build_bank(BaseIdentity(base().name, base().fingerprint), found)


def bench(seed: int) -> Bench:
    """One seed, ready to measure."""
    tokenizer = AutoTokenizer.from_pretrained(base_model())
    model: Any = AutoModelForCausalLM.from_pretrained(base_model(), dtype=torch.float32)
    student = Student(model, bank_of(seed))

    def asked(skill: str, split: str) -> Passages:
        rows = [Row(prompt=one.prompt, answer=one.answer) for one in examples(skill, split)]
        return examples_of(model, tokenizer, rows, LABELS.get(skill))

    validation = {skill: asked(skill, "validation") for skill in SKILLS}
    splits = {
        "calibration": {skill: Part(asked(skill, "train"), CALIBRATION) for skill in SKILLS},
        "validation": {skill: Part(validation[skill], size(skill, VALIDATION)) for skill in SKILLS},
        "guard": {skill: Part(validation[skill], size(skill, GUARD)) for skill in SKILLS},
        "test": {skill: Part(asked(skill, "test"), size(skill, TEST)) for skill in SKILLS},
    }
    return Bench("generative", seed, student, splits, {}, shorter)


def size(skill: str, of_answers: int) -> int:
    """How many rows of a skill count where skills that answer have `of_answers`."""
    return of_answers * (LABELLED if skill in LABELS else 1)


def shorter(plan: Plan) -> Plan:
    """A plan with a quarter of the rows a step, at most 60 steps: a row here costs fifty there."""
    steps = min(plan.steps, 60)
    return replace(plan, batch=2, steps=steps, check=steps // 2)
