"""The prefix cache, kept apart per merge: keys and values serve only the merge that made them.

Transformers finds reusable blocks by a hash of their tokens. Here the tokens are first mixed with
words drawn from the merge's digest, so that a prompt under another merge is another prompt.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dynmerge.errors import ConfigError


class PrefixCache:
    """Salts a paged cache's search and registration of blocks, and counts what it finds.

    Request ids end in `:DIGEST`. Raises ConfigError when transformers' cache has no such steps.
    """

    def __init__(self, cache: Any) -> None:
        self.queries = 0  # tokens looked up
        self.hits = 0  # tokens found
        try:
            self._search = cache.search_prefix_match
            registrations = [
                (allocator, allocator.mark_complete_blocks)
                for allocator in cache.cache_allocators.values()
            ]
        except AttributeError as missing:
            raise ConfigError(
                f"prefix_cache cannot be kept apart per merge with this transformers: {missing}"
            ) from missing
        if not cache.use_prefix_sharing:
            raise ConfigError("prefix_cache does not work with this model's kinds of attention")
        cache.search_prefix_match = self._search_salted
        for allocator, register in registrations:
            allocator.mark_complete_blocks = _salted(register)

    def _search_salted(self, request_id: str, prompt_ids: Sequence[int]) -> int:
        found = int(self._search(request_id, mix(request_id, prompt_ids)))
        self.queries += len(prompt_ids)
        self.hits += found
        return found


def mix(request_id: str, tokens: Sequence[int]) -> list[int]:
    """The tokens, mixed with the request's merge; unchanged for the base model."""
    digest = request_id.rpartition(":")[2]
    if not digest:
        return list(tokens)
    words = np.resize(_words(digest), len(tokens))
    mixed: list[int] = (np.asarray(tokens, dtype=np.int64) ^ words).tolist()
    return mixed


@lru_cache(maxsize=1024)
def _words(digest: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Eight words of 31 bits; a block of 16 tokens, hashed as 32-bit numbers, holds them twice."""
    raw = np.frombuffer(hashlib.sha256(digest.encode()).digest(), dtype=np.uint32)
    return raw.astype(np.int64) & 0x7FFFFFFF


def _salted(register: Any) -> Any:
    def register_salted(request_id: str, token_ids: Sequence[int], new_blocks: int) -> None:
        register(request_id, mix(request_id, token_ids), new_blocks)

    return register_salted
