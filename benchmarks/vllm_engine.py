"""One vLLM in a process of its own, which runs a timed batch whenever it is told to.

Knows vLLM, adapters' folders and a bank's; not what is compared with what.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from benchmarks.harness import settle
from dynmerge.engines.vllm.control import NAME as CONTROL
from dynmerge.engines.vllm.ticket import ticket
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe

MODEL_LENGTH = 512
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "dynmerge",
    "OMP_NUM_THREADS": "1",
}

T = TypeVar("T")
Clock = Literal["cpu", "wall"]


@dataclass(frozen=True, slots=True)
class Load:
    """`batch` requests of `prompt` tokens, each answered by `new` tokens."""

    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """What is counted: tokens generated, or tokens of prompts where one is generated."""
        return self.batch * (self.new if self.new > 1 else self.prompt)


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds that one load took, of the wall clock and of the processor."""

    wall: float
    cpu: float

    def of(self, clock: Clock) -> float:
        """Seconds by one of the two."""
        return self.cpu if clock == "cpu" else self.wall


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine is started: for LoRAs in folder `adapter`, with a `bank`, or with neither."""

    base: Path
    device: str
    dtype: str
    options: Mapping[str, object]
    adapter: Path | None = None
    bank: Path | None = None
    digest: str = ""
    skills: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


class Engine:
    """A vLLM, within its process."""

    def __init__(self, start: Start) -> None:
        from vllm import LLM

        self.start = start
        on_cpu = start.device == "cpu"
        # A small part of a GPU: several engines live on it at once.
        memory: dict[str, object] = (
            {} if on_cpu else {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
        )
        self.llm: Any = LLM(
            model=str(start.base),
            dtype=start.dtype,
            skip_tokenizer_init=True,
            enforce_eager=on_cpu,
            enable_prefix_caching=False,
            max_model_len=MODEL_LENGTH,
            disable_log_stats=True,
            **memory,
            **self._lora(),
            **start.options,
        )
        self._warm: set[tuple[Load, int, str]] = set()

    def run(self, load: Load, distinct: int, method: str = "linear") -> Speed:
        """The load under `distinct` merges or adapters, 0 for the base model; warm."""
        if (load, distinct, method) not in self._warm:
            self._warm.add((load, distinct, method))
            self.run(load, distinct, method)
        requests = self.requests(load.batch, distinct, method)
        settle(self.start.device)
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(
            prompts(load), self.sampling(load.new), lora_request=requests, use_tqdm=False
        )
        settle(self.start.device)
        speed = Speed(time.perf_counter() - wall, time.process_time() - cpu)
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert made == load.batch * load.new
        return speed

    def sampling(self, new: int) -> object:
        """Greedy, to the last token."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)

    def requests(self, batch: int, distinct: int, method: str) -> list[Any]:
        """What the requests of a batch are under, `distinct` of them different."""
        different = [self.request(index, method) for index in range(distinct)]
        return [different[index % distinct] if distinct else None for index in range(batch)]

    def request(self, index: int, method: str) -> Any:
        """The merge or adapter with a number; a merge is prepared first where that is needed."""
        from vllm.lora.request import LoRARequest

        if self.start.adapter is not None:
            # Numbers differ, so that each has a slot of its own, whatever is in it.
            return LoRARequest(f"adapter{index}", 1 + index, str(self.start.adapter))
        recipe = self.recipe(index, method)
        while not self.is_ready(recipe):
            time.sleep(0.05)
        # A number of its own for every method.
        number = 1 + index + 10_000 * (sum(map(ord, method)) % 10_000)
        return LoRARequest(recipe.digest, number, ticket(recipe))

    def recipe(self, index: int, method: str) -> Recipe:
        """The merge with a number: all skills, none alike."""
        skills = self.start.skills
        weights = {skill: 30 + (7 * place + 3 * index) % 64 for place, skill in enumerate(skills)}
        weights[skills[0]] += index
        return Recipe(Preference.of(weights), parse_method(method), self.start.digest)

    def is_ready(self, recipe: Recipe) -> bool:
        """Have the worker prepare a merge; whether it has."""
        (status,) = self.llm.collective_rpc("dynmerge_prepare", args=(ticket(recipe),))
        if status["state"] == "failed":
            raise RuntimeError(status["reason"])
        return bool(status["state"] == "ready")

    def _lora(self) -> dict[str, object]:
        start = self.start
        if start.bank is None:
            return {"enable_lora": True} if start.adapter else {}
        plugin = {"bank": str(start.bank), "trust_base": True, **start.settings}
        return {
            "enable_lora": True,
            "max_lora_rank": 8,
            "worker_extension_cls": CONTROL,
            "additional_config": {"dynmerge": plugin},
        }


def prompts(load: Load) -> list[dict[str, list[int]]]:
    """Different tokens for every request."""
    return [
        {"prompt_token_ids": [(131 * index + 7 * place) % 2000 for place in range(load.prompt)]}
        for index in range(load.batch)
    ]


class EngineProcess:
    """An Engine in another process, asked to do one thing after the other."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)
        try:
            self._process = context.Process(target=_serve, args=(theirs, start))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._answer()

    def ask(self, function: Callable[..., T], *args: object) -> T:
        """What `function(engine, *args)` returns over there; it is a module's function."""
        self._pipe.send((function, args))
        answer: T = self._answer()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"an engine ended with {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Any, start: Start) -> None:
    torch.set_num_threads(1)
    try:
        engine = Engine(start)
        pipe.send(None)
        while True:
            function, args = pipe.recv()
            pipe.send(function(engine, *args))
    except EOFError:
        pass
    except Exception as error:  # it is raised again by who waits
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        raise
    finally:
        os._exit(0)  # vLLM may keep threads and processes, which end with this one
