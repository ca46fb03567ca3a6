"""Starts: where OSRM begins the generative suite's adapters. No seed matters; kept in the cache.

A is where the other skills' calibration texts, read by the base model, are smallest, in the
covariance form. A process of its own finds it: its moments take 8 GB, which no training may hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynmerge.calibration import osrm
from dynmerge.calibration.moments import Moments, collect
from dynmerge.texts.batches import alike
from study.apart import run_apart
from study.generative import CALIBRATION, SKILLS, asked, loaded_model, tokenizer
from study.sources import cache_folder

from train import ATTENTION, MLP, PLANS, Plan  # isort: skip (study.generative finds it)


def starts(skill: str) -> dict[str, Tensor]:
    """Layer -> A (r, d_in) float32, of the skill's ranks."""
    if not starts_file(skill).is_file():
        run_apart("study.generative_starts", [[]], jobs=1)
    return load_file(starts_file(skill))


def starts_file(skill: str) -> Path:
    """Where they are kept."""
    return cache_folder() / "generative" / "osrm" / f"{skill}.safetensors"


def main() -> None:
    """Find every skill's."""
    torch.set_num_threads(1)
    moments = texts_moments()
    for skill in SKILLS:
        save_starts(skill, [moments[other] for other in SKILLS if other != skill])


def save_starts(skill: str, others: list[Moments]) -> None:
    """Find one skill's, from the other skills' moments."""
    found = osrm.initialise(others, ranks(PLANS[skill], others[0].layers))
    path = starts_file(skill)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({layer: A.float() for layer, A in found.items()}, unfinished)
    unfinished.rename(path)


def ranks(plan: Plan, layers: Iterable[str]) -> dict[str, int]:
    """Layer -> the rank that the plan gives it; layers that it does not adapt are left out."""
    modules = {layer: layer.rpartition(".")[2] for layer in layers}
    return {
        layer: plan.ranks.get(module, plan.r)
        for layer, module in modules.items()
        if module in plan.modules
    }


def texts_moments() -> Mapping[str, Moments]:
    """Every skill's layer inputs on its calibration texts, under the base model."""
    model, found = loaded_model(), {}
    for skill in SKILLS:
        read = [list(each.tokens) for each in asked(model, skill, "train").passages[:CALIBRATION]]
        texts = [[read[row] for row in rows] for rows in alike(list(map(len, read)), 8)]
        batches = (tokenizer().pad({"input_ids": some}, return_tensors="pt") for some in texts)
        found[skill] = collect(model, batches, (*ATTENTION, *MLP))
    return found


if __name__ == "__main__":
    main()
