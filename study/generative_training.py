"""Train the generative suite's adapters another way: all skills in one, and each from OSRM's start.

Both are examples/dictionary/train.py's training. The joint adapter makes as many steps on every
skill as that skill's own adapter, in random order. OSRM's begin with A where the other skills'
calibration texts, read by the base model, are smallest, and differ in nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from dynmerge.calibration import osrm
from dynmerge.calibration.inputs import Moments, collect
from dynmerge.texts.batches import alike
from study.generative import CALIBRATION, OTHERS, SKILLS, asked, loaded_model, tokenizer
from study.suites import SUITES

from train import ATTENTION, MLP, PLANS, Plan, train  # isort: skip (study.generative finds it)

# All modules that any skill adapts, with the largest rank of any, the cynic's, and its scaling: no
# skill has less room than alone, and what is served has one skill's rank, not the sum of all.
JOINT = Plan(r=12, alpha=24, modules=(*ATTENTION, *MLP))
PASSES = tuple(skill for skill in SKILLS for _ in range(PLANS[skill].epochs))


def main() -> None:
    """Train the adapters that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SUITES["generative"].seeds[:1])
    parser.add_argument("--only", choices=tuple(OTHERS))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    kinds = [options.only] if options.only else OTHERS
    wanted = [(seed, kind) for seed in options.seeds for kind in kinds if missing(seed, kind)]
    if min(options.jobs, len(wanted)) < 2:
        for seed, kind in wanted:
            torch.set_num_threads(1)
            TRAININGS[kind](seed)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda pair: train_apart(*pair), wanted))


def missing(seed: int, kind: str) -> list[str]:
    """The names of those adapters that are not there."""
    folders = OTHERS[kind](seed)
    return [name for name in folders if not (folders[name] / "adapter_config.json").is_file()]


def train_apart(seed: int, kind: str) -> None:
    """One kind of one seed in a process of one thread."""
    command = [sys.executable, "-m", "study.generative_training", "--seeds", str(seed)]
    subprocess.run(
        [*command, "--only", kind], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )


def train_joint(seed: int) -> None:
    """One seed's adapter of all skills."""
    for name, folder in OTHERS["joint"](seed).items():
        train(name, folder.parent, seed, JOINT, PASSES)


def train_osrm(seed: int) -> None:
    """One seed's adapters, one after the other."""
    folders = OTHERS["osrm"](seed)
    for skill, A in starts(missing(seed, "osrm")).items():
        train(skill, folders[skill].parent, seed, begin=partial(osrm.apply, A=A))


TRAININGS: Mapping[str, Callable[[int], None]] = {"joint": train_joint, "osrm": train_osrm}


def starts(skills: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Skill -> layer -> OSRM's A, float32."""
    moments, found = texts_moments(), {}
    for skill in skills:
        others = [moments[other] for other in SKILLS if other != skill]
        A = osrm.initialise(others, ranks(PLANS[skill], others[0].layers))
        found[skill] = {layer: start.float() for layer, start in A.items()}
    return found


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
        found[skill] = collect(model, batches, JOINT.modules)
    return found


if __name__ == "__main__":
    main()
