"""Tokens per second of the embedded engine: base model only, one preference, 16 distinct ones.

A random Llama, a full batch of 16 requests, the three variants in turn in one process. The
allowance is what the update's extra work predicts if it ran as efficiently as the base model's own
layers: base work over base plus extra work, by FLOPs or by bytes read, whichever costs more.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.adapters import random_adapters
from benchmarks.harness import finish, options, show
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.engines.engine import Generation, Sampling
from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.engine import TransformersEngine
from dynmerge.engines.transformers.model import LoadedModel
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

BATCH = 16
TASKS = 4
RANK = 16
VOCABULARY = 32_000
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=896,
    intermediate_size=2432,
    num_hidden_layers=12,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_id=None,
    bos_token_id=None,
)


@dataclass(frozen=True, slots=True)
class Work:
    """What one decoding step of a full batch costs."""

    flops: float
    nbytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)

    def over(self, other: "Work") -> float:
        """This work's share of `other`, in whichever of the two it is smaller."""
        return min(self.flops / other.flops, self.nbytes / other.nbytes)


def random_bank(model: LlamaForCausalLM, seed: int) -> FactorBank:
    """TASKS adapters of rank RANK on every linear layer but the last."""
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    return build_bank(BaseIdentity("random", ""), random_adapters(shapes, TASKS, RANK, seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token: the benchmark times the model, not the text."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))


def base_work(model: LlamaForCausalLM) -> Work:
    """Every linear layer, the last among them, once for the whole batch."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    numbers = sum(weight.numel() for weight in weights)
    return Work(2.0 * BATCH * numbers, float(numbers * weights[0].element_size()))


def extra_work(bank: FactorBank, distinct: int, itemsize: int) -> Work:
    """V^T x, C and U for every module and request; U and V are read once, a core once per merge."""
    bases = sum(module.U.numel() + module.V.numel() for module in bank.modules)
    cores = bank.layout.size
    return Work(2.0 * BATCH * (bases + cores), float(itemsize * (bases + distinct * cores)))


def merges(bank: FactorBank, engine: TransformersEngine, distinct: int) -> list[Merge | None]:
    """BATCH merges, `distinct` of them different; all None for 0."""
    if not distinct:
        return [None] * BATCH

    def made(index: int) -> Merge:
        weights = {"task0": 40 + index, "task1": 60 - index, "task2": 30, "task3": 20 + index}
        recipe = Recipe(Preference.of(weights), default_method(), bank.digest)
        return merge(bank, recipe, engine.dtype)

    different = [made(index) for index in range(distinct)]
    return [different[index % distinct] for index in range(BATCH)]


async def generate(
    engine: TransformersEngine, batch: Sequence[Merge | None], prompt: int, new: int
) -> int:
    """Run the batch to its end; the number of tokens generated."""

    async def one(index: int, made: Merge | None) -> int:
        ids = tuple((index * 131 + position * 7) % VOCABULARY for position in range(prompt))
        sampling = Sampling(max_tokens=new, temperature=0.0, ignore_eos=True)
        chunks = [chunk async for chunk in engine.generate(Generation(ids, made, sampling))]
        return sum(len(chunk.tokens) for chunk in chunks)

    return sum(await asyncio.gather(*(one(index, made) for index, made in enumerate(batch))))


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of the wall clock and of the processor."""

    wall: float
    cpu: float


def measure(
    engine: TransformersEngine,
    variants: dict[str, list[Merge | None]],
    rounds: int,
    prompt: int,
    new: int,
) -> dict[str, list[Speed]]:
    """The speed of each variant, turn by turn after one warm-up."""
    speeds: dict[str, list[Speed]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        # Every other turn backwards, so that a drift of the machine favours nobody.
        for name in list(variants)[:: 1 if turn % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            count = asyncio.run(generate(engine, variants[name], prompt, new))
            if turn:
                elapsed = time.perf_counter() - wall, time.process_time() - cpu
                speeds[name].append(Speed(*(count / seconds for seconds in elapsed)))
    return speeds


def paired(over: list[Speed], under: list[Speed], clock: str) -> float:
    """The median of the ratios turn by turn."""
    pairs = zip(over, under, strict=True)
    return median(getattr(a, clock) / getattr(b, clock) for a, b in pairs)


def main() -> None:
    """Measure and print."""
    parser = options(__doc__ or "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--prompt", type=int, help="tokens in each prompt: 64, or 16 if --quick")
    arguments = parser.parse_args()
    prompt = arguments.prompt or (16 if arguments.quick else 64)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM(LLAMA).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    bank = random_bank(model, arguments.seed)
    config = EngineConfig(
        device=arguments.device, dtype=arguments.dtype, max_batch=BATCH, cache_tokens=8192
    )
    engine = TransformersEngine(LoadedModel(model, tokenizer()), bank, config)
    base = base_work(model)
    variants = {
        "base only": merges(bank, engine, 0),
        "one preference": merges(bank, engine, 1),
        f"{BATCH} distinct": merges(bank, engine, BATCH),
    }
    rounds, new = (2, 16) if arguments.quick else (9, 32)
    try:
        speeds = measure(engine, variants, rounds, prompt, new)
    finally:
        engine.close()
    base_only, one, distinct = speeds.values()
    show(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {arguments.dtype}, "
        f"batch {BATCH}, prompt {prompt}, {new} new, {TASKS} tasks of rank {RANK}",
        ("variant", "tokens/s", "tokens per CPU-second", "least", "most"),
        [
            (name, median(s.wall for s in values), median(cpu), min(cpu), max(cpu))
            for name, values in speeds.items()
            for cpu in [[speed.cpu for speed in values]]
        ],
    )
    # Other processes disturb the wall clock; on an accelerator the processor's says nothing.
    clock = "cpu" if arguments.device == "cpu" else "wall"
    itemsize = model.dtype.itemsize
    ratios = {
        "distinct16_over_1": paired(distinct, one, clock),
        "preference_over_base": paired(one, base_only, clock),
        "distinct16_over_base": paired(distinct, base_only, clock),
        "roofline_allowance": base.over(base + extra_work(bank, 1, itemsize)),
        "roofline_allowance_distinct16": base.over(base + extra_work(bank, BATCH, itemsize)),
    }
    finish(
        arguments,
        ratios,
        {"dtype": arguments.dtype, "clock": clock, "prompt": prompt, "new": new},
    )


if __name__ == "__main__":
    main()
