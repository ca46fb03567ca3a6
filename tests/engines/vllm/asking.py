"""vLLM in a process of its own, asked for greedy answers under merges; and what they should be."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.conftest import tiny_model
from tests.engines.conftest import prompt
from tests.engines.vllm.conftest import HEAD_DIM
from tests.reference import merged_deltas, written_out

TOKENS = 12
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
    "VLLM_PLUGINS": "dynmerge",
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@dataclass(frozen=True)
class Ask:
    """A prompt under the multipliers of a merge; none is the base model."""

    prompt: tuple[int, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    method: str = "linear"

    def recipe(self, bank: FactorBank) -> Recipe | None:
        if not self.weights:
            return None
        preference = Preference.of(self.weights, normalize=False, allow_negative=True)
        return Recipe(preference, parse_method(self.method), bank.digest)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


def mixed(method: str = "linear") -> list[Ask]:
    """Eight merges and the base model, whose prompts differ in length."""
    weights: list[tuple[int, dict[str, float]]] = [
        (5, {"ada": 1.0}),
        (61, {"bob": 1.0}),
        (9, {"cyd": 1.0}),
        (17, {"dee": 1.0}),
        (33, {"ada": 0.2, "cyd": 0.3, "dee": 0.5}),
        (1, {"bob": 0.9, "cyd": 0.1}),
        (26, {"ada": -0.4, "cyd": 0.8}),
        (12, {"ada": 1.5, "dee": -1.0}),
        (40, {}),
    ]
    return [Ask(tuple(prompt(length, length)), each, method) for length, each in weights]


def alone(
    function: Callable[..., Any], *args: Any, environment: Mapping[str, str] = ONE_PROCESS
) -> Any:
    """What `function` of a test module returns in a fresh process, in which vLLM may be imported.

    One vLLM engine leaves too much behind for another in the same process.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    before = dict(os.environ)
    os.environ.update({**ENVIRONMENT, **environment})
    try:
        process = context.Process(target=_tell, args=(writer, function, args))
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    writer.close()
    try:
        result = reader.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with {process.exitcode}, saying nothing") from None
    process.join(60)
    if process.is_alive():
        process.kill()
    if isinstance(result, BaseException):
        raise result
    return result


def _tell(writer: Any, function: Callable[..., Any], args: Sequence[Any]) -> None:
    try:
        result = function(*args)
    except Exception as error:  # it is raised again by who waits
        result = AssertionError(f"{type(error).__name__}: {error}")
    writer.send(result)
    writer.close()
    os._exit(0)  # engines with processes of their own end with this one


def engine(base: Path, bank: Path, settings: Mapping[str, object], **options: Any) -> Any:
    """An LLM with dynmerge's plug-in in it."""
    from vllm import LLM

    given = {
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_loras": 8,
        "enforce_eager": True,
        **options,
    }
    given.setdefault("max_cpu_loras", given["max_loras"])
    return LLM(
        model=str(base),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=8,
        worker_extension_cls="dynmerge.engines.vllm.control.Control",
        additional_config={"dynmerge": {"bank": str(bank), **settings}},
        **given,
    )


def answers(llm: Any, bank: FactorBank, asks: Sequence[Ask], first: int = 1) -> list[Answer]:
    """All asked at once, numbered from `first`; merges are prepared where that is needed."""
    from vllm import SamplingParams

    requests = [request(each.recipe(bank), first + i) for i, each in enumerate(asks)]
    for each in requests:
        if each is not None:
            until_ready(llm, "dynmerge_prepare", each.lora_path)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": list(each.prompt)} for each in asks]
    outputs = llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def request(recipe: Recipe | None, number: int) -> Any:
    """How vLLM is told of a merge."""
    from vllm.lora.request import LoRARequest

    from dynmerge.engines.vllm.ticket import ticket

    return None if recipe is None else LoRARequest(recipe.digest, number, ticket(recipe))


def until_ready(llm: Any, question: str, *args: object) -> None:
    """Ask every worker until it is ready."""
    for _ in range(600):
        states = llm.collective_rpc(question, args=args)
        assert all(state["state"] != "failed" for state in states), states
        if all(state["state"] == "ready" for state in states):
            return
        time.sleep(0.05)
    raise AssertionError(f"{question}: never ready")


def _answer(output: Any) -> Answer:
    pairs = zip(output.token_ids, output.logprobs, strict=True)
    return Answer(tuple(output.token_ids), tuple(top[token].logprob for token, top in pairs))


def expected(
    adapters: Mapping[str, Adapter], bank: FactorBank, ask: Ask, ids: Sequence[int]
) -> Answer:
    """The model with W + Delta written out, in float64: its greedy token at each step after `ids`'
    own prefix, and the log probability of `ids`' token there.
    """
    model = written_out(tiny_model(head_dim=HEAD_DIM), deltas(adapters, bank, ask)).double()
    sequence = torch.tensor([[*ask.prompt, *ids]])
    with torch.no_grad():
        rows = torch.log_softmax(model(sequence).logits[0, len(ask.prompt) - 1 : -1], dim=-1)
    picked = rows.gather(1, torch.tensor(ids)[:, None])[:, 0]
    return Answer(tuple(rows.argmax(1).tolist()), tuple(picked.tolist()))


def deltas(
    adapters: Mapping[str, Adapter], bank: FactorBank, ask: Ask
) -> Mapping[str, torch.Tensor]:
    """Every module's dense update; merge methods have oracles of their own (tests/merging)."""
    recipe = ask.recipe(bank)
    if recipe is None:
        return {}
    if ask.method == "linear":
        return merged_deltas(adapters, ask.weights)
    made = merge(bank, recipe)
    if made.own is not None:
        return {name: update.B.double() @ update.A.double() for name, update in made.own.items()}
    assert made.core is not None
    cores = bank.layout.split(made.core.double())
    return {
        module.name: module.U.double() @ core @ module.V.double().mT
        for module, core in zip(bank.modules, cores, strict=True)
    }


def assert_right(
    found: Sequence[Answer],
    adapters: Mapping[str, Adapter],
    bank: FactorBank,
    asks: Sequence[Ask],
    tolerance: float,
) -> None:
    """Every token is the greedy one, its log probability within `tolerance`."""
    worst = 0.0
    for answer, ask in zip(found, asks, strict=True):
        right = expected(adapters, bank, ask, answer.ids)
        assert answer.ids == right.ids, ask
        gaps = [abs(a - b) for a, b in zip(answer.logprobs, right.logprobs, strict=True)]
        print(f"max |dlogprob| {max(gaps):.2g} under {ask.weights} {ask.method}")
        worst = max(worst, *gaps)
    assert worst <= tolerance
