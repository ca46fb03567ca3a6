"""Train the encoder suite's adapters once more, each begun where OSRM says: A where the other
tasks' texts are smallest, in the covariance form.

The other tasks' texts are their unlabelled calibration texts, read by the base model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch

from dynmerge.calibration import osrm
from dynmerge.calibration.moments import Moments, collect
from dynmerge.texts.batches import alike
from study.apart import run_apart
from study.encoder import adapter_folder, examples, model, padded
from study.encoder_tasks import TASKS
from study.encoder_training import MODULES, RANK, train

VARIANT = "osrm"


def main() -> None:
    """Train the adapters that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wanted = [seed for seed in options.seeds if missing(seed)]
    if len(wanted) == 1:
        train_seed(wanted[0])
        return
    run_apart("study.osrm_training", [["--seeds", str(seed)] for seed in wanted], options.jobs)


def missing(seed: int) -> list[str]:
    """The tasks whose adapter is not there."""
    return [
        task
        for task in TASKS
        if not (adapter_folder(seed, task, VARIANT) / "adapter_config.json").is_file()
    ]


def train_seed(seed: int) -> None:
    """One seed's adapters, one after the other."""
    torch.set_num_threads(1)
    moments = texts_moments()
    for task in missing(seed):
        others = [moments[other] for other in TASKS if other != task]
        folder = adapter_folder(seed, task, VARIANT)
        folder.parent.mkdir(parents=True, exist_ok=True)
        A = {name: start.float() for name, start in osrm.initialise(others, RANK).items()}
        train([task], seed, folder, A=A)
        print(f"seed {seed} {task}: begun at OSRM's A", file=sys.stderr, flush=True)


def texts_moments() -> Mapping[str, Moments]:
    """Every task's layer inputs on its own unlabelled texts, under the base model."""
    encoder = model()
    found = {}
    for task in TASKS:
        asked = examples(task, "calibration", encoder)
        texts = [[asked.tokens[row] for row in rows] for rows in alike(asked.lengths(), 32)]
        found[task] = collect(encoder, map(padded, texts), MODULES)
    return found


if __name__ == "__main__":
    main()
