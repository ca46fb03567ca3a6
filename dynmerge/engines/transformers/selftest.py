"""Which worker can run this model: found by trying at start, not by a list of architectures.

A few prompts run together, each under another skill, and must get the log probabilities that the
plain model gives them one at a time. This also finds a transformers whose internals moved.
"""

import asyncio
import logging
import threading

import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.engines.engine import Generation, Sampling, Token
from dynmerge.engines.transformers.attention import use_ragged_attention
from dynmerge.engines.transformers.batching import PAGE, ContinuousWorker, manager_logger
from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.layers import Layers
from dynmerge.engines.transformers.model import LoadedModel, cache_tokens
from dynmerge.engines.transformers.request import Request
from dynmerge.engines.transformers.sampling import Draw
from dynmerge.engines.transformers.single import SingleWorker
from dynmerge.engines.transformers.worker import Worker
from dynmerge.errors import BaseModelError, ConfigError
from dynmerge.merging.merge import Merge
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe

logger = logging.getLogger(__name__)

CONTEXT = 4096  # for a model that names no limit and is run one request at a time
SECONDS = 600.0
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}  # of log probabilities


def start_worker(
    base: LoadedModel, bank: FactorBank, layers: Layers, config: EngineConfig
) -> tuple[Worker, int]:
    """Start the best worker that answers rightly; return it with the context length it can hold.

    In order: continuous batching with the model's attention, then with `eager`, then one at a time.
    """
    layers.check()
    limits = [limit for limit in (config.context_length, base.context) if limit is not None]
    alone = SingleWorker(base.model, layers)
    if config.batching == "single":
        alone.start()
        return alone, min(limits, default=CONTEXT)
    room = cache_tokens(base, config)
    trial = _generations(base, bank, layers, min([*limits, room]))
    expected = _answers(alone, trial)
    alone.stop()
    original = base.model.config._attn_implementation
    for attention in dict.fromkeys((original, "eager")):
        base.model.set_attn_implementation(attention)
        if attention == "sdpa" and layers.device.type == "cpu":
            use_ragged_attention()
        worker = ContinuousWorker(base.model, layers, config, room)
        problem = _problem(worker, trial, expected, layers.dtype)
        if problem is None:
            return worker, min([*limits, room])
        worker.stop()
        logger.warning("continuous batching with %s attention: %s", attention, problem)
    base.model.set_attn_implementation(original)
    if config.batching == "continuous" or config.prefix_cache:
        raise BaseModelError(f"continuous batching cannot run this model: {problem}")
    alone.start()
    return alone, min(limits, default=CONTEXT)


def _problem(
    worker: Worker, trial: list[Generation], expected: list[list[Token]], dtype: torch.dtype
) -> str | None:
    """What is wrong with this worker, or None."""
    manager_logger.setLevel(logging.CRITICAL)  # a failure here is an answer
    try:
        worker.start()
        answers = _answers(worker, trial)
    except ConfigError:
        raise
    except MemoryError as error:
        raise ConfigError(f"cache_tokens, or max_batch_tokens, asks too much: {error}") from error
    except Exception as error:  # an architecture can fail in any way; it then runs one at a time
        return f"{type(error).__name__}: {error}"
    finally:
        manager_logger.setLevel(logging.ERROR)
    for found, wanted in zip(answers, expected, strict=True):
        for token, other in zip(found, wanted, strict=True):
            assert token.logprob is not None
            assert other.logprob is not None
            if not abs(token.logprob - other.logprob) <= TOLERANCE[dtype]:
                return (
                    f"log probability {token.logprob:.4f} where the model gives {other.logprob:.4f}"
                )
            if token.id != other.id:
                break  # a tie: what follows may differ
    return None


def _generations(
    base: LoadedModel, bank: FactorBank, layers: Layers, context: int
) -> list[Generation]:
    """The base model and the first two skills.

    The first two share a prompt that fills blocks of the cache: no block may serve both. The other
    is shorter, so that the batch is ragged.
    """
    sampling = Sampling(max_tokens=2, temperature=0.0, logprobs=0, ignore_eos=True)
    merges: list[Merge | None] = [None]
    for task, name in enumerate(bank.names[:2]):
        recipe = Recipe(Preference.of({name: 1.0}), MethodChoice("self-test", "0"), bank.digest)
        core = torch.cat([module.core(task).flatten() for module in bank.modules])
        merges.append(Merge(recipe, core.to(layers.device, layers.dtype)))
    spread = [place * base.vocabulary // 64 for place in range(1, 2 * PAGE + 2)]
    shared = tuple(spread[: max(context - sampling.max_tokens, 1)])
    prompts = [shared, shared, shared[:7]]
    return [Generation(p, merge, sampling) for p, merge in zip(prompts, merges, strict=False)]


def _answers(worker: Worker, trial: list[Generation]) -> list[list[Token]]:
    """The tokens of every generation, all submitted at once. Raises RuntimeError when one fails."""
    results: list[list[list[Token]] | BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(asyncio.wait_for(_gather(worker, trial), SECONDS)))
        except BaseException as error:
            results.append(error)

    # On a thread of its own: the caller may be inside an event loop.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


async def _gather(worker: Worker, trial: list[Generation]) -> list[list[Token]]:
    if not worker.alive():
        worker.start()
    requests = [
        Request(generation, frozenset(), Draw(generation.sampling, generation.prompt, frozenset()))
        for generation in trial
    ]
    for request in requests:
        if not worker.submit(request):
            raise RuntimeError("the engine's thread ended")
    return [await _tokens(request) for request in requests]


async def _tokens(request: Request) -> list[Token]:
    tokens: list[Token] = []
    while True:
        news = await request.news()
        tokens.extend(news.tokens)
        if news.reason == "error":
            raise BaseModelError("the model failed on a short prompt; the log says how")
        if news.reason is not None:
            return tokens
