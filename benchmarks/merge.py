"""How long a merge takes, cold and from the cache, beside PEFT's add_weighted_adapter on the same
factors.

Random factors at real models' shapes. PEFT runs on a model whose base weights are a broadcast zero,
so that an 8B model's adapters fit where its weights would not; its merge never reads the base
weights. PEFT's SVD is timed on one layer and multiplied by the layers (it loops over modules); at
8B on its smallest module only, multiplied by the number of modules, which makes the figure a lower
bound. A second table has a row for every method: in core space at the largest size, in other spaces
at a few layers of the smallest, which a CPU can write out in bearable time.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from benchmarks.adapters import random_adapters
from benchmarks.harness import alternate, finish, options, show
from benchmarks.methods import CORE, DENSE, Cost, costs, preferences
from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.merging.cache import MergeCache
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import Merger, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

RANK = 16
TASKS = 8

Costs = dict[str, Cost]


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's shapes."""

    name: str
    hidden: int
    key_value: int
    feed_forward: int
    layers: int

    def shapes(self, layers: int | None = None) -> dict[str, tuple[int, int]]:
        """Module name -> (d_out, d_in), seven modules a layer."""
        h, kv, ff = self.hidden, self.key_value, self.feed_forward
        kinds = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
        kinds |= {"gate": (ff, h), "up": (ff, h), "down": (h, ff)}
        count = self.layers if layers is None else layers
        return {f"layers_{n}_{kind}": kinds[kind] for n in range(count) for kind in kinds}


SIZES = (
    Size("135M", 576, 192, 1536, 30),
    Size("1B", 2048, 512, 8192, 16),
    Size("8B", 4096, 1024, 14336, 32),
)


class Shapes(nn.Module):
    """Linear layers of the given shapes whose weights take no memory."""

    def __init__(self, shapes: dict[str, tuple[int, int]], device: str) -> None:
        super().__init__()
        zero = torch.zeros(1, 1, device=device)
        for name, (d_out, d_in) in shapes.items():
            linear = nn.Linear(d_in, d_out, bias=False, device="meta")
            linear.weight = nn.Parameter(zero.expand(d_out, d_in), requires_grad=False)
            self.add_module(name, linear)


def peft_model(
    shapes: dict[str, tuple[int, int]], adapters: dict[str, Adapter], device: str
) -> PeftModel:
    """The same factors as PEFT holds them, scaling 1."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(shapes))
    model: PeftModel | None = None
    for task, adapter in adapters.items():
        if model is None:
            model = get_peft_model(Shapes(shapes, device), config, adapter_name=task)
        else:
            model.add_adapter(task, config)
        for name in shapes:
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A[task].weight.data = adapter.modules[name].A.to(device)
            layer.lora_B[task].weight.data = adapter.modules[name].B.to(device)
    assert model is not None
    return model


def peft_merge(model: PeftModel, combination: str) -> Callable[[], None]:
    """One merge of all tasks at equal weights, as the adapter `merged`."""

    def run() -> None:
        extra = {"svd_full_matrices": False} if combination.endswith("svd") else {}
        if combination.startswith(("ties", "dare")):
            extra["density"] = 0.2
        model.add_weighted_adapter(
            list(model.peft_config),
            [1 / TASKS] * TASKS,
            "merged",
            combination,
            svd_rank=RANK,
            **extra,
        )

    return run


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Store the block's wall seconds."""
    started = time.perf_counter()
    yield
    into[name] = time.perf_counter() - started


def svd_seconds(
    size: Size, adapters: dict[str, Adapter], device: str, quick: bool, combination: str = "svd"
) -> float:
    """Seconds of PEFT's `svd` (the cheaper, thin one), or another of its combinations that ends in
    an SVD, for the whole model; see the module's docstring.
    """
    shapes = size.shapes(layers=1)
    count = size.layers
    if size.name != SIZES[0].name:
        shapes = {name: shape for name, shape in shapes.items() if name.endswith("_k")}
        count = len(size.shapes())
    model = peft_model(shapes, adapters, device)
    put_away = partial(model.delete_adapter, "merged")
    timed_svd = {"svd": peft_merge(model, combination)}
    rounds, warmup = (1, 0) if quick else (3, 1)
    return count * alternate(timed_svd, rounds, device, {"svd": put_away}, warmup)["svd"]


def hit_seconds(bank: FactorBank, rounds: int) -> float:
    """Median seconds from a preference to holding its merge, when the merge is in the cache."""
    cache = MergeCache(Merger(bank).merge, capacity=1 << 34)
    preference = Preference.of({f"task{index}": 1.0 + index for index in range(TASKS)})

    def hit() -> None:
        for _ in range(1000):
            with cache.hold(Recipe(preference, default_method(), bank.digest)):
                pass

    return alternate({"hit": hit}, rounds)["hit"] / 1000


def measure(size: Size, seed: int, device: str, quick: bool) -> tuple[dict[str, float], FactorBank]:
    """All figures for one size, in seconds and bytes, and the bank they are of."""
    figures: dict[str, float] = {}
    adapters = random_adapters(size.shapes(), TASKS, RANK, seed)
    with timed(figures, "build"):
        bank = build_bank(BaseIdentity(size.name, ""), adapters).to(device)
        assert bank.groups  # stacked on first use: part of the preparation
    figures["merge_bytes"] = 4 * bank.layout.size
    figures["adapter_bytes"] = 4 * TASKS * RANK * sum(sum(s) for s in size.shapes().values())
    fresh = preferences(TASKS)
    method = default_method()

    def cold() -> None:
        merge(bank, Recipe(next(fresh), method, bank.digest))

    model = peft_model(size.shapes(), adapters, device)
    put_away = partial(model.delete_adapter, "merged")
    others = ("cat", "linear") if quick else ("cat", "linear", "ties", "dare_ties")
    variants = {"linear": cold, **{f"peft_{c}": peft_merge(model, c) for c in others}}
    after = {f"peft_{c}": put_away for c in others}
    figures |= alternate(variants, 1 if quick else 5, device, after)
    figures["peft_svd"] = svd_seconds(size, adapters, device, quick)
    if not quick:
        figures["peft_ties_svd"] = svd_seconds(size, adapters, device, quick, "ties_svd")
    figures["hit"] = hit_seconds(bank, 5)
    return figures, bank


def small_bank(size: Size, arguments: argparse.Namespace, layers: int | None) -> FactorBank:
    """A bank at a size's shapes, of so many of its layers."""
    adapters = random_adapters(size.shapes(layers), TASKS, RANK, arguments.seed)
    return build_bank(BaseIdentity(size.name, ""), adapters).to(arguments.device)


def show_methods(title: str, found: Costs) -> None:
    """A row for each method."""
    columns = ("method", "first, s", "cold, s", "over linear")
    rows = [[text, cost.first, cost.cold, cost.over_linear] for text, cost in found.items()]
    show(title, columns, rows)


def main() -> None:
    """Measure every size and print."""
    parser = options(__doc__ or "")
    arguments = parser.parse_args()
    sizes = SIZES[:1] if arguments.quick else SIZES
    figures = {}
    for size in sizes:
        figures[size.name], bank = measure(size, arguments.seed, arguments.device, arguments.quick)
    columns = ["build", "linear", "hit", "peft_linear", "peft_cat", "peft_svd"]
    if not arguments.quick:
        columns += ["peft_ties", "peft_dare_ties", "peft_ties_svd"]
    rows = [
        [
            name,
            f"{len(size.shapes())}",
            *(figures[name][column] for column in columns),
            *(figures[name][column] / 2**20 for column in ("merge_bytes", "adapter_bytes")),
        ]
        for name, size in zip(figures, sizes, strict=True)
    ]
    show(
        f"{TASKS} tasks of rank {RANK}, float32; seconds, medians",
        ("size", "modules", *columns, "MiB a merge", "MiB as an adapter"),
        rows,
    )
    rounds, device = 1 if arguments.quick else 5, arguments.device
    if arguments.quick:
        bank = small_bank(sizes[0], arguments, layers=3)
    in_core = costs(bank, CORE, rounds, device)
    show_methods(f"methods in core space, {len(bank.modules)} modules of the largest size", in_core)
    small = small_bank(sizes[0], arguments, layers=1 if arguments.quick else 4)
    elsewhere = costs(small, DENSE, 1 if arguments.quick else 3, device)
    title = f"methods in the background, {len(small.modules)} modules of the smallest size"
    show_methods(title, elsewhere)
    largest = figures[sizes[-1].name]
    ratios = {
        "peft_svd_over_linear": largest["peft_svd"] / largest["linear"],
        "peft_linear_over_linear": largest["peft_linear"] / largest["linear"],
        "hit_us": largest["hit"] * 1e6,
        **{f"{text}_over_linear": cost.over_linear for text, cost in in_core.items()},
    }
    methods = {text: asdict(cost) for text, cost in (in_core | elsewhere).items()}
    details = {"largest": sizes[-1].name, "sizes": figures, "methods": methods}
    finish(arguments, ratios, {"dtype": "float32", **details})


if __name__ == "__main__":
    main()
