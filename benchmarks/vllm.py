"""Tokens per CPU-second inside vLLM: no LoRA, vLLM's own LoRAs, and ours.

A random Llama, 8 tasks of rank 16 on all its linear layers. Every engine has a process of its own,
with one thread, in which everything runs; they live side by side and take turns, and every ratio is
the median of ratios within a turn. Decoding counts the tokens generated, after prompts of a
few tokens; prefilling counts those of prompts. vLLM's own LoRAs are slow on a CPU: they and
`none` are measured once more with shorter requests. bfloat16, but float32 on a CPU that only
imitates it.

The allowance: none's time over itself and that of the products with the shared factors, each
timed alone, as `torch.mm`, at the model's shapes, in the same turn. `work_allowance` has no time in
it: the base model's weights over these and the shared factors, which are FLOPs and bytes alike.

`--device cuda` counts seconds of the clock, on a larger model, with vLLM's graphs; it is the
default where there is a GPU. `--stall` measures instead how long steps of running streams take
while slow merges are assembled beside them.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import finish, options, show
from benchmarks.vllm_engine import Clock, Engine, EngineProcess, Load, Speed, Start
from benchmarks.vllm_model import RANK, SIZES, STACKED, TASKS, Served, Size, make
from benchmarks.vllm_roofline import added_seconds
from benchmarks.vllm_stall import ALONE, measure_stall

MANY = 4096  # slots
MANY_16 = f"ours_16_of_{MANY}"
NONE = "none"
CORES = "tsv-m"  # a method whose merges are full cores


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a load: in which engine, and under how many different merges."""

    engine: str
    distinct: int = 0
    method: str = "linear"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    model: Size
    rounds: int
    loads: dict[str, Load]
    short: dict[str, Load]
    slots: int

    @property
    def most(self) -> int:
        """Tokens in a step."""
        return max(512, *(load.batch * load.prompt for load in self.loads.values()))


# Short ones: the sooner it is another's turn, the less comes between them.
FULL = {"decode_16": Load(16, 4, 16), "prefill_16": Load(16, 64, 1), "decode_64": Load(64, 4, 16)}
SHORT = {"decode_16": Load(16, 1, 4), "prefill_16": Load(16, 8, 1)}
QUICK = {"decode_16": Load(16, 4, 16), "prefill_16": Load(16, 64, 1)}

OURS_16 = {
    NONE: Variant(NONE),
    "ours_1": Variant("ours", 1),
    "ours_16": Variant("ours", 16),
    MANY_16: Variant("many", 16),
    "core_1": Variant("ours", 1, CORES),
    "core_16": Variant("ours", 16, CORES),
}
OURS_64 = {NONE: Variant(NONE), "ours_1": Variant("ours", 1), "ours_64": Variant("ours", 64)}
STOCK_16 = {
    NONE: Variant(NONE),
    "stock_1": Variant("stock", 1),
    "stock_16": Variant("stock", 16),
    "merged_slots_1": Variant("merged", 1),
    "merged_slots_16": Variant("merged", 16),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Speeds by load and variant, and the seconds of a step's added products; a turn each."""

    speeds: dict[str, dict[str, list[Speed]]] = field(default_factory=dict)
    added: dict[str, list[float]] = field(default_factory=dict)

    def add(self, load: str, turn: dict[str, Speed]) -> None:
        """One more turn of a load."""
        for variant, speed in turn.items():
            self.speeds.setdefault(load, {}).setdefault(variant, []).append(speed)

    def ratio(self, load: str, over: str, under: str, clock: Clock) -> float:
        """The median, turn by turn, of the ratio of tokens per second."""
        variants = self.speeds[load]
        pairs = zip(variants[over], variants[under], strict=True)
        return median(b.of(clock) / a.of(clock) for a, b in pairs)

    def allowance(self, load: str, steps: int, clock: Clock) -> float:
        """The median share of `none`'s seconds in these and what is added to every step."""
        none = [each.of(clock) for each in self.speeds[load][NONE]]
        pairs = zip(none, self.added[load], strict=True)
        return median(a / (a + steps * b) for a, b in pairs)


class Engines:
    """The engines that are up, and what was measured in them by turns."""

    def __init__(self, served: Served, arguments: argparse.Namespace) -> None:
        self.served = served
        self.device: str = arguments.device
        self.dtype: str = arguments.dtype
        self.up: dict[str, EngineProcess] = {}

    @contextmanager
    def started(self, names: Sequence[str], slots: int, tokens: int) -> Iterator[None]:
        """Have engines up, one started after the other; `tokens` are the most in a step."""
        with ExitStack() as stack:
            for name in names:
                self.up[name] = EngineProcess(self._start(name, slots, tokens))
                stack.callback(self._end, name)
            yield

    def turn(self, load: Load, variants: dict[str, Variant], turn: int) -> dict[str, Speed]:
        """The load by every variant once."""
        # Every other turn backwards, so that a drift of the machine favours nobody.
        names = list(variants)[:: -1 if turn % 2 else 1]
        return {name: self._run(load, variants[name]) for name in names}

    def _run(self, load: Load, variant: Variant) -> Speed:
        return self.up[variant.engine].ask(Engine.run, load, variant.distinct, variant.method)

    def _end(self, name: str) -> None:
        self.up.pop(name).close()

    def _start(self, name: str, slots: int, tokens: int) -> Start:
        served = self.served
        shared = {"max_num_seqs": slots, "max_num_batched_tokens": tokens}
        if name == NONE:
            return Start(served.base, self.device, self.dtype, shared)
        if name in {"stock", "merged"}:
            rank = 16 if name == "stock" else STACKED
            folder = served.adapter if name == "stock" else served.merged
            lora = {"max_lora_rank": rank, "max_loras": 16, "max_cpu_loras": 16}
            return Start(served.base, self.device, self.dtype, shared | lora, adapter=folder)
        return ours(served, self.device, self.dtype, shared, MANY if name == "many" else slots)


def ours(served: Served, device: str, dtype: str, shared: dict[str, int], slots: int) -> Start:
    """vLLM with the plug-in."""
    return Start(
        served.base,
        device,
        dtype,
        shared | {"max_loras": slots, "max_cpu_loras": slots},
        bank=served.bank,
        digest=served.digest,
        skills=[f"task{index}" for index in range(TASKS)],
        settings={"core_slots": 16, "own_slots": 2},
    )


def throughput(sizes: Sizes, engines: Engines) -> tuple[Measured, Measured]:
    """The speeds of what is compared with `none` at full length, and at short."""
    full, short = Measured(), Measured()
    with engines.started([NONE], sizes.slots, sizes.most):
        with engines.started(["ours", "many"], sizes.slots, sizes.most):
            for turn in range(sizes.rounds):
                for name, load in sizes.loads.items():
                    variants = OURS_64 if name == "decode_64" else OURS_16
                    full.add(name, engines.turn(load, variants, turn))
                    full.added.setdefault(name, []).append(
                        engines.up[NONE].ask(added_seconds, sizes.model, load, sizes.slots, 3)
                    )
        if not sizes.short:
            return full, short
        with engines.started(["stock", "merged"], 16, 512):
            for turn in range(min(3, sizes.rounds)):
                for name, load in sizes.short.items():
                    short.add(name, engines.turn(load, STOCK_16, turn))
    return full, short


def ratios_of(sizes: Sizes, full: Measured, short: Measured, clock: Clock) -> dict[str, float]:
    """What the issue asks for first, then every variant over `none`."""
    found = {
        "decode_16_over_none": full.ratio("decode_16", "ours_16", NONE, clock),
        "prefill_16_over_none": full.ratio("prefill_16", "ours_16", NONE, clock),
        "roofline_allowance": full.allowance("decode_16", sizes.loads["decode_16"].new, clock),
        "roofline_allowance_prefill": full.allowance("prefill_16", 1, clock),
        "work_allowance": sizes.model.work_allowance(),
        "decode_4096slots_over_16": full.ratio("decode_16", MANY_16, "ours_16", clock),
        "decode_16_over_1": full.ratio("decode_16", "ours_16", "ours_1", clock),
        "core_16_over_none": full.ratio("decode_16", "core_16", NONE, clock),
    }
    if "decode_64" in full.speeds:
        found["decode_64_over_1"] = full.ratio("decode_64", "ours_64", "ours_1", clock)
        found["decode_64_over_none"] = full.ratio("decode_64", "ours_64", NONE, clock)
    for load, speeds in short.speeds.items():
        for variant in speeds:
            if variant != NONE:
                name = f"{variant}_over_none_{load.removesuffix('_16')}"
                found[name] = short.ratio(load, variant, NONE, clock)
    return found


def rows_of(sizes: Sizes, full: Measured, short: Measured, clock: Clock) -> list[tuple[str, ...]]:
    """The table: every variant's tokens per second by load, and the ratio to `none`."""
    return [
        (f"{label}{name}", variant, *_figures(loads[name], measured, name, variant, clock))
        for label, measured, loads in (("", full, sizes.loads), ("short ", short, sizes.short))
        for name, speeds in measured.speeds.items()
        for variant in speeds
    ]


def _figures(load: Load, measured: Measured, name: str, variant: str, clock: Clock) -> list[str]:
    rates = [load.tokens / each.of(clock) for each in measured.speeds[name][variant]]
    ratio = measured.ratio(name, variant, NONE, clock)
    return [f"{median(rates):.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}", f"{ratio:.3f}"]


def stall(sizes: Sizes, served: Served, arguments: argparse.Namespace) -> None:
    """How long steps take alone and beside merges that are being assembled."""
    shared = {"max_num_seqs": 16, "max_num_batched_tokens": 512}
    process = EngineProcess(ours(served, arguments.device, arguments.dtype, shared, 16))
    try:
        found = process.ask(measure_stall, 40 if arguments.quick else 200)
    finally:
        process.close()
    alone = found[ALONE]
    show(
        "milliseconds of a step: 16 requests decode while a merge is assembled",
        ("beside", "steps", "p50", "p99", "longest", "seconds to be ready"),
        [
            (name, str(len(each.ms)), *map(each.quantile, (0.5, 0.99, 1.0)), each.told())
            for name, each in found.items()
        ],
    )
    ratios = {
        f"{name}_p{round(100 * q)}_over_alone": each.quantile(q) / alone.quantile(q)
        for name, each in found.items()
        if name != ALONE
        for q in (0.5, 0.99)
    }
    details = {name: {"ms": each.ms, "seconds": each.seconds} for name, each in found.items()}
    finish(arguments, ratios, {"dtype": arguments.dtype, "steps": details})


def best_dtype(device: str) -> str:
    """What the processor multiplies by itself."""
    slow = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return "float32" if slow else "bfloat16"


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """How much to measure."""
    if arguments.quick:
        return Sizes(SIZES["quick"], 2, QUICK, {}, 16)
    return Sizes(SIZES[arguments.device], 9, FULL, SHORT, 64)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__ or "")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, help="turns: 9, or 2 if --quick")
    parser.add_argument("--stall", action="store_true", help="steps beside merges being assembled")
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or best_dtype(arguments.device)
    torch.set_num_threads(1)
    sizes = sizes_of(arguments)
    if arguments.rounds:
        sizes = replace(sizes, rounds=arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="dynmerge-bench-") as folder:
        served = make(Path(folder), sizes.model, arguments.seed)
        if arguments.stall:
            stall(sizes, served, arguments)
            return
        full, short = throughput(sizes, Engines(served, arguments))
    # Other processes disturb the wall clock; on an accelerator the processor's says nothing.
    clock: Clock = "cpu" if arguments.device == "cpu" else "wall"
    ratios = ratios_of(sizes, full, short, clock)
    rows = rows_of(sizes, full, short, clock)
    unit = "CPU-second" if clock == "cpu" else "second"
    columns = ("load", "variant", f"tokens per {unit}", "least", "most", "over none")
    show(f"hidden {sizes.model.hidden} x {sizes.model.layers}, {arguments.dtype}", columns, rows)
    roofline = {
        "decode": ratios["roofline_allowance"],
        "prefill": ratios["roofline_allowance_prefill"],
    }
    details = {
        "dtype": arguments.dtype,
        "clock": clock,
        "rounds": sizes.rounds,
        "model": asdict(sizes.model),
        "tasks": TASKS,
        "rank": RANK,
        "roofline": roofline,
        "loads": {name: asdict(load) for name, load in sizes.loads.items()},
        "short_loads": {name: asdict(load) for name, load in sizes.short.items()},
        "speeds": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    finish(arguments, ratios, details)


if __name__ == "__main__":
    main()
