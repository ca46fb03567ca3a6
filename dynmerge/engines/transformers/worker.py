"""Worker: what the engine asks of the thread that runs the model, however it batches."""

from typing import Protocol

from dynmerge.engines.engine import Load
from dynmerge.engines.transformers.request import Request


class Worker(Protocol):
    """Runs requests until they end or are cancelled, posting news of every token."""

    def start(self) -> None:
        """Start the thread; after a failure, start anew. Raises what makes that impossible."""
        ...

    def alive(self) -> bool:
        """Whether requests are being served."""
        ...

    def submit(self, request: Request) -> bool:
        """Queue a request; False when the worker is not alive."""
        ...

    def cancel(self, request: Request) -> None:
        """End a request without further news and free what it holds; harmless when it has ended."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def stop(self) -> None:
        """Stop at once; what is running is reported as aborted. Safe to call twice."""
        ...
