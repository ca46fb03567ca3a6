"""Train the generative suite's adapters another way: all skills in one, and each from OSRM's start.

Both are examples/dictionary/train.py's training. The joint adapter makes as many steps on every
skill as that skill's own adapter, in random order. OSRM's differ from the others in their start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial

import torch

from dynmerge.calibration import osrm
from study.apart import run_apart
from study.generative import OTHERS, SKILLS
from study.generative_starts import starts
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
    if any(kind == "osrm" for _, kind in wanted):
        for skill in SKILLS:
            starts(skill)  # found once, before the processes would each find them
    if min(options.jobs, len(wanted)) < 2:
        for seed, kind in wanted:
            torch.set_num_threads(1)
            TRAININGS[kind](seed)
        return
    calls = [["--seeds", str(seed), "--only", kind] for seed, kind in wanted]
    run_apart("study.generative_training", calls, options.jobs)


def missing(seed: int, kind: str) -> list[str]:
    """The names of those adapters that are not there."""
    folders = OTHERS[kind](seed)
    return [name for name in folders if not (folders[name] / "adapter_config.json").is_file()]


def train_joint(seed: int) -> None:
    """One seed's adapter of all skills."""
    for name, folder in OTHERS["joint"](seed).items():
        train(name, folder.parent, seed, JOINT, PASSES)


def train_osrm(seed: int) -> None:
    """One seed's adapters, one after the other."""
    folders = OTHERS["osrm"](seed)
    for skill in missing(seed, "osrm"):
        begin = partial(osrm.apply, A=starts(skill))
        train(skill, folders[skill].parent, seed, begin=begin)


TRAININGS: Mapping[str, Callable[[int], None]] = {"joint": train_joint, "osrm": train_osrm}


if __name__ == "__main__":
    main()
