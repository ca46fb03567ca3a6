"""EchoEngine: the Engine protocol without a model. What it says follows from the prompt, the merge
and the seed.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import torch
from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Chunk, Generation, Load, Token
from dynmerge.errors import EngineDead, Overloaded, RequestError

CONTEXT = 512


class EchoEngine:
    """Answers with tokens drawn from a hash. `gate` holds it back, `room` is how many it takes at
    once.
    """

    context_length = CONTEXT
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int = 10_000) -> None:
        self.tokenizer = tokenizer
        self.vocabulary_size = len(tokenizer)
        self.room = room
        self.running = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.dead = False
        self.fail_after: int | None = None
        self.pause_after: int | None = None
        self.chatter = 0
        self.seen: list[Generation] = []

    def check(self, generation: Generation) -> None:
        if generation.sampling.grammar and generation.sampling.grammar.text == "bad":
            raise RequestError("this grammar is not usable", "structured_outputs")

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        if self.dead:
            raise EngineDead("the engine stopped")
        if self.running >= self.room:
            raise Overloaded("the queue is full")
        self.seen.append(generation)
        self.running += 1
        try:
            ids: list[int] = []
            told = ""
            for place, token in enumerate(self.answer(generation), start=1):
                await self.gate.wait()
                await asyncio.sleep(0)
                if self.fail_after is not None and place > self.fail_after:
                    raise RuntimeError("/home/secret: the engine broke at 0x7f00")
                if self.pause_after is not None and place > self.pause_after:
                    await asyncio.sleep(60)
                ids.append(token)
                last = place == generation.sampling.max_tokens
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                new = text[len(told) :] if last or not text.endswith("�") else ""
                told += new
                new += " " * self.chatter
                yield Chunk(new, (self.scored(token, generation),), "length" if last else None)
        finally:
            self.running -= 1

    def answer(self, generation: Generation) -> list[int]:
        """One byte-level token per byte of a hash chain; never a special one."""
        merge = generation.merge.recipe.digest if generation.merge else "base"
        state = f"{generation.prompt} {merge} {generation.sampling.seed}".encode()
        ids = []
        for _ in range(generation.sampling.max_tokens):
            state = hashlib.sha256(state).digest()
            ids.append(3 + int.from_bytes(state[:4], "big") % (self.vocabulary_size - 3))
        return ids

    def scored(self, token: int, generation: Generation) -> Token:
        wanted = generation.sampling.logprobs
        if wanted is None:
            return Token(token)
        return Token(token, -0.5, tuple((other, -0.5 - other) for other in range(3, 3 + wanted)))

    def load(self) -> Load:
        return Load(running=self.running, waiting=0, cache_usage=0.0)

    def healthy(self) -> bool:
        return not self.dead

    def close(self) -> None:
        self.dead = True
