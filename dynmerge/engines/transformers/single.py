"""One request at a time: the plain loop over `model()`, for what continuous batching refuses."""

import queue
import threading
from typing import Any

import torch
from transformers import PreTrainedModel

from dynmerge.engines.engine import FinishReason, Load
from dynmerge.engines.transformers.layers import Layers
from dynmerge.engines.transformers.request import News, Request
from dynmerge.engines.transformers.sampling import sample
from dynmerge.errors import EngineDead

STOP_SECONDS = 30.0


class SingleWorker:
    """Answers requests in the order they came, with transformers' ordinary cache."""

    def __init__(self, model: PreTrainedModel, layers: Layers) -> None:
        self._model = model
        self._layers = layers
        self._requests: dict[str, Request] = {}
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        keeps = getattr(model, "_supports_logits_to_keep", None)
        self._extra = {"logits_to_keep": 1} if keeps is not None and keeps() else {}

    def start(self) -> None:
        """Start the thread."""
        self.stop()
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(self._queue,), name="dynmerge-engine", daemon=True
        )
        self._thread.start()

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, request: Request) -> bool:
        """Queue a request; False when the thread does not run."""
        if not self.alive():
            return False
        self._requests[request.id] = request
        self._queue.put(request)
        return True

    def cancel(self, request: Request) -> None:
        """Stop before the next token."""
        request.cancelled = True
        self._requests.pop(request.id, None)

    def load(self) -> Load:
        """One running request at most; its cache grows with it and has no fixed size."""
        requests = list(self._requests.values())
        running = sum(request.started for request in requests)
        return Load(running, len(requests) - running, 0.0)

    def stop(self) -> None:
        """End what is running and stop the thread."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.cancelled = True
        Request.post([(request, News((), "abort")) for request in requests.values()])
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(STOP_SECONDS)
            if thread.is_alive():
                raise EngineDead("the engine's thread does not stop")

    def _run(self, waiting: "queue.SimpleQueue[Request | None]") -> None:
        while (request := waiting.get()) is not None:
            request.started = True
            try:
                self._answer(request)
            except Exception as error:  # one bad request must not end the thread for all others
                self._report(request, request.fail(error))
            finally:
                self._layers.clear()

    @torch.no_grad()
    def _answer(self, request: Request) -> None:
        tokens, past = list(request.generation.prompt), None
        reason: FinishReason | None = None
        while reason is None and not request.cancelled:
            scores, past = self._forward(request, tokens, past)
            (outcome,) = sample([request.draw], scores)
            if isinstance(outcome, Exception):
                raise outcome
            reason = request.finish_reason(outcome)
            self._report(request, News((outcome,), reason))
            tokens = [outcome.id]

    def _forward(self, request: Request, tokens: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        """(1, vocabulary) raw logits after `tokens`, and the cache that now holds them."""
        self._layers.prepare([request.generation.merge], [len(tokens)])
        ids = torch.tensor([tokens], device=self._layers.device)
        output = self._model(input_ids=ids, past_key_values=past, use_cache=True, **self._extra)
        return output.logits[:, -1].float(), output.past_key_values

    def _report(self, request: Request, news: News) -> None:
        if request.cancelled:
            return
        if news.reason is not None:
            self._requests.pop(request.id, None)
        if Request.post([(request, news)]):
            self.cancel(request)
