"""Engine: what the runtime asks of whatever runs the base model. Values in, tokens out; no HTTP, no
files.

An engine knows merges by their digest and never how they were made. Key-value caches must be keyed
by `Merge.recipe.digest` (None is the base model), so that no request reads what another merge
computed.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from dynmerge.merging.merge import Merge

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the answer must match. `kind` says how `text` is read (a JSON schema, a regex, a Lark
    grammar).
    """

    kind: Literal["json", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn from the logits, and when to stop. Already validated; temperature 0 is
    greedy.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: and of the k most likely
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence to generate: the prompt's token ids, the merge to run under, the sampling."""

    prompt: tuple[int, ...]
    merge: Merge | None  # None: the base model
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `logprob` and `top` (most likely first) only where they were asked for.

    Log probabilities are of the model's distribution before temperature and truncation, as vLLM's
    `raw_logprobs`.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new since the last chunk. Exactly the last one has a `finish_reason`.

    `text` may lag behind `tokens` (an unfinished character, a possible stop string) and catches up
    at the end; joined over all chunks it is the answer. `stop_reason` is the stop string or stop
    token id that ended it, None for the end-of-sequence token.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine is busy with; for `/metrics` and admission."""

    running: int
    waiting: int
    cache_usage: float  # fraction of key-value blocks in use, 0 .. 1
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there


class Engine(Protocol):
    """Runs one base model, each sequence under its own merge, in one continuous batch."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """What merges must be cast to."""
        ...

    @property
    def device(self) -> torch.device: ...

    def check(self, generation: Generation) -> None:
        """Raise RequestError (or PromptTooLong) for what can never run, before it is queued."""
        ...

    def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Queue and stream one sequence. Closing the iterator cancels it and frees its blocks.

        Raises Overloaded when the queue is full and EngineDead when the engine cannot run; at any
        token, RequestError when what was asked for allows no next one.
        """
        ...

    def load(self) -> Load: ...

    def healthy(self) -> bool: ...

    def close(self) -> None:
        """Stop at once; what is running ends with finish_reason "abort". Safe to call twice."""
        ...
