"""Continuous batching: transformers' manager, told whose core each token needs, and the next.

Its thread calls, for every step, `BatchSampler.prepare_tensor_args` (the batch is known), the model
(whose hooks follow the plan), `BatchSampler.__call__` (the logits are known) and the `Router`.
"""

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.logits_process import LogitsProcessorList

from dynmerge.engines.engine import FinishReason, Load
from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.layers import Layers
from dynmerge.engines.transformers.prefix import PrefixCache
from dynmerge.engines.transformers.request import News, Request
from dynmerge.engines.transformers.sampling import sample
from dynmerge.errors import EngineDead

PAGE = 16  # tokens in one block of the cache
STOP_SECONDS = 30.0

# Newer versions would ask the hub for kernels, unless told not to.
_SWITCHES_TO_FLASH = "auto_switch_to_flash" in ContinuousBatchingConfig.__dataclass_fields__

# The manager warns of every start; what matters of it is raised or reported here.
manager_logger = logging.getLogger("ContinuousBatchingLogger")
manager_logger.setLevel(logging.ERROR)


class BatchSampler(ContinuousBatchingLogitsProcessorList):
    """Plans the cores before each forward pass and draws the tokens after it."""

    def __init__(self, layers: Layers, fail: Callable[[Request, Exception], None]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._layers = layers
        self._fail = fail
        self._drawing: list[Request] = []  # the requests whose rows of logits come next

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Nothing: a request's arguments are ours."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Plan the batch. The parameters' names are the caller's."""
        requests = [future.state.logit_processor_kwargs["request"] for future in requests_in_batch]
        for request in requests:
            request.started = True
        self._layers.prepare(
            [request.generation.merge for request in requests],
            [future.query_length for future in requests_in_batch],
        )
        self._batch = len(requests)
        self._drawing = [
            request
            for request, future in zip(requests, requests_in_batch, strict=True)
            if future.has_new_token
        ]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Draw a token for each request that is due; the caller's argmax then finds just these.

        Rows of requests whose prompt is not read to its end come last and mean nothing.
        """
        self._layers.clear()
        due = len(self._drawing)
        if len(scores) not in (due, self._batch):
            raise RuntimeError(f"{len(scores)} rows of logits for {due} of {self._batch} requests")
        outcomes = sample([request.draw for request in self._drawing], scores[:due])
        for row, (request, outcome) in enumerate(zip(self._drawing, outcomes, strict=True)):
            if isinstance(outcome, Exception):
                self._fail(request, outcome)
            else:
                request.pending.append(outcome)
                if not request.draw.plain:
                    scores[row, outcome.id] = torch.inf
        return scores


class Router(OutputRouter):
    """Carries each step's outcome to the mailboxes; what nobody waits for is dropped."""

    def __init__(
        self, cancel: Callable[[Request], None], fail: Callable[[Request, Exception], None]
    ) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self._cancel = cancel
        self._fail = fail

    def deliver(self, output: GenerationOutput) -> None:
        """Report one output."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Report one step's outputs."""
        letters = []
        for output in outputs:
            request = self.requests.get(output.request_id)
            if request is None:
                continue
            news = self._news(request, output)
            if news.reason is not None:
                self.requests.pop(request.id, None)
            letters.append((request, news))
        for request in Request.post(letters):
            self._cancel(request)

    def end_all(self, reason: FinishReason) -> None:
        """End every request."""
        requests, self.requests = self.requests, {}
        Request.post([(request, News((), reason)) for request in requests.values()])

    def _news(self, request: Request, output: GenerationOutput) -> News:
        tokens, request.pending = tuple(request.pending), []
        if request.failure is not None or output.error is not None:
            return request.failed()
        drawn, taken = [token.id for token in tokens], output.generated_tokens[-1:]
        if len(drawn) != 1 or drawn != taken:
            self._fail(request, RuntimeError(f"drew {drawn}, but the batch went on with {taken}"))
            return request.failed()
        return News(tokens, request.finish_reason(tokens[0]))


def _greedy() -> Any:
    """The sampler decides; no token ends a request by default."""
    make: Any = GenerationConfig
    return make(do_sample=False, eos_token_id=-1, pad_token_id=0)


def _unblock_when_empty(scheduler: Any) -> None:
    """Let the queue in when cancellations have emptied the batch.

    A full cache makes transformers admit nobody until a running request finishes. It does not count
    cancelled ones: once the last is cancelled, nothing would ever finish.
    """
    clear = scheduler.clear_cancelled_requests

    def clear_and_unblock() -> Any:
        cancelled = clear()
        if not scheduler.active_requests:
            scheduler.block_new_requests = False
        return cancelled

    # The worker's thread calls it before each step: nowhere else could the flag be reset safely.
    scheduler.clear_cancelled_requests = clear_and_unblock


class ContinuousWorker:
    """Many requests in one batch, each under its own merge."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Layers,
        config: EngineConfig,
        cache_tokens: int,
    ) -> None:
        self._model: Any = model
        self._layers = layers
        self._config = config
        self._blocks = -(-cache_tokens // PAGE) + 1
        self._router = Router(self.cancel, self._fail)
        self._manager: Any = None
        self._prefix: PrefixCache | None = None

    def start(self) -> None:
        """Make a manager with an empty cache and run it."""
        self.stop()
        manager = self._model.init_continuous_batching(
            generation_config=_greedy(),
            continuous_batching_config=self._batching(),
        )
        manager.logit_processor = BatchSampler(self._layers, self._fail)
        manager.output_router = self._router
        manager.warmup()  # makes the cache, here and not on the thread, so that failures are raised
        _unblock_when_empty(manager.batch_processor.scheduler)
        if self._config.prefix_cache:
            self._prefix = PrefixCache(manager.batch_processor.cache)
        self._manager = manager
        # The manager's thread inherits being a daemon: it must not keep a finished process alive.
        starter = threading.Thread(target=manager.start, daemon=True)
        starter.start()
        starter.join()

    def alive(self) -> bool:
        """Whether the manager's thread runs and has met no error."""
        manager = self._manager
        return (
            manager is not None
            and manager.is_running()
            and manager.background_thread_status.can_accept_new_requests() is None
        )

    def submit(self, request: Request) -> bool:
        """Queue a request; False when the manager does not take it."""
        if not self.alive():
            return False
        self._router.requests[request.id] = request
        taken = self._manager.add_request(
            list(request.generation.prompt),
            request_id=request.id,
            max_new_tokens=request.generation.sampling.max_tokens,
            eos_token_id=sorted(request.stop) or [-1],
            streaming=True,
            request=request,
        )
        if taken is not None and self.alive():
            return True
        # It died just now. A request that is still listed was never seen, so nobody will answer it.
        return self._router.requests.pop(request.id, None) is None

    def cancel(self, request: Request) -> None:
        """Free the request's blocks before the next step."""
        if self._router.requests.pop(request.id, None) is not None and self._manager is not None:
            self._manager.cancel_request(request.id)

    def load(self) -> Load:
        """Requests in and before the batch, and how full the cache is."""
        requests = list(self._router.requests.values())
        running = sum(request.started for request in requests)
        processor = getattr(self._manager, "batch_processor", None)
        usage = 0.0 if processor is None else 1.0 - processor.cache.compute_free_capacity()
        prefix = self._prefix
        return Load(
            running,
            len(requests) - running,
            usage,
            prefix_queries=prefix.queries if prefix else 0,
            prefix_hits=prefix.hits if prefix else 0,
        )

    def stop(self) -> None:
        """End what is running, stop the thread, free the cache."""
        self._router.end_all("abort")
        manager, self._manager = self._manager, None
        if manager is None:
            return
        manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)
        if manager.is_running():
            raise EngineDead("the engine's thread does not stop")
        self._layers.clear()
        del manager
        gc.collect()

    def _fail(self, request: Request, reason: Exception) -> None:
        """Take one request out of the batch for a fault of its own."""
        request.fail(reason)
        if self._manager is not None:
            self._manager.cancel_request(request.id)

    def _batching(self) -> ContinuousBatchingConfig:
        options: dict[str, Any] = {
            "page_size": PAGE,
            "num_blocks": self._blocks,
            "max_batch_tokens": self._config.max_batch_tokens,
            "max_requests_per_batch": self._config.max_batch,
            "max_blocks_per_request": 0,
            "allow_block_sharing": self._config.prefix_cache,
            "use_cuda_graph": False,  # a graph would freeze the hooks' plan
            "use_async_batching": False,
            "max_memory_percent": 0.95,
        }
        if _SWITCHES_TO_FLASH:
            options["auto_switch_to_flash"] = False
        return ContinuousBatchingConfig(**options)
