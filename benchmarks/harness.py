"""What every benchmark shares: options, paired timing, and the report."""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table


def options(description: str) -> argparse.ArgumentParser:
    """The options every benchmark takes; the caller adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on one line")
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    after: Mapping[str, Callable[[], object]] | None = None,
    warmup: int = 1,
) -> dict[str, float]:
    """Median wall seconds of each variant, run in turn `rounds` times after `warmup` more.

    The machine's noise falls on all variants alike, so that their ratios hold. `after[name]` cleans
    up behind a run, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-warmup, rounds):
        for name, run in variants.items():
            gc.collect()
            settle(device)
            started = time.perf_counter()
            run()
            settle(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
            if after and name in after:
                after[name]()
    return {name: statistics.median(times) for name, times in seconds.items()}


def settle(device: str) -> None:
    """Wait for work still under way on an accelerator."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, object]:
    """Where the figures come from."""
    accelerator = torch.cuda.get_device_name() if device.startswith("cuda") else "none"
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "torch": torch.__version__,
    }


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column is left aligned, the others right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row))
    Console(width=140).print(table)


def finish(
    arguments: argparse.Namespace, ratios: Mapping[str, float], details: Mapping[str, object]
) -> None:
    """Print the ratios, and the JSON line where it is wanted."""
    show("ratios", ("ratio", "value"), [(name, value) for name, value in ratios.items()])
    if arguments.json:
        report = {"machine": machine(arguments.device), "seed": arguments.seed, **details}
        print(json.dumps({**report, "ratios": dict(ratios)}))
