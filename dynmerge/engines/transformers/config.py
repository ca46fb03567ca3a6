"""EngineConfig: what an operator may say about the embedded engine. Validated once."""

from dataclasses import dataclass
from typing import Literal, get_args

from dynmerge.errors import ConfigError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
Batching = Literal["auto", "continuous", "single"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and places. The defaults suit a laptop.

    `dtype` auto is float32 on a CPU and the checkpoint's own on a GPU. `cache_tokens` is how many
    tokens of keys and values are kept for all requests together; None takes what a modest share of
    memory holds. `context_length` lowers the model's own. `batching` auto uses continuous batching
    where the model's architecture allows it and otherwise runs one request at a time.
    """

    dtype: DType = "auto"
    device: Device = "auto"
    max_batch: int = 16  # requests that run at once
    max_batch_tokens: int = 512  # tokens in one forward pass; longer prompts are taken in pieces
    cache_tokens: int | None = None
    max_queue: int = 256  # requests that wait
    context_length: int | None = None
    prefix_cache: bool = False  # reuse keys and values of equal prompts under the same merge
    batching: Batching = "auto"
    threads: int | None = None  # of torch, in this process

    def __post_init__(self) -> None:
        for name, kinds in (("dtype", DType), ("device", Device), ("batching", Batching)):
            if getattr(self, name) not in get_args(kinds):
                choices = ", ".join(get_args(kinds))
                raise ConfigError(f"{name} is one of {choices}; not {getattr(self, name)!r}")
        for name in ("max_batch", "max_batch_tokens", "max_queue"):
            self._check_count(name, optional=False)
        for name in ("cache_tokens", "context_length", "threads"):
            self._check_count(name, optional=True)
        if self.max_batch_tokens < self.max_batch:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) is below max_batch ({self.max_batch})"
            )
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache is true or false; not {self.prefix_cache!r}")

    def _check_count(self, name: str, *, optional: bool) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is a whole number of at least 1; not {value!r}")
