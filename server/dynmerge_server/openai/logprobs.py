"""Log probabilities in OpenAI's two shapes. Token strings are slices of the answer, so they join to
it.

A token's string is what the answer gained by it: half a character gains nothing, a special token
that is left out gains nothing, and what a stop string cut off is cut off here too. `bytes` is the
token's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Token
from dynmerge.engines.text import Detokenizer

LOWEST = -9999.0  # what JSON is told for minus infinity, as vLLM does


class Pieces:
    """What each token of one vocabulary stands for, in bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _table(self) -> LLTokenizer | None:
        try:
            return from_tokenizer(self._tokenizer)  # type: ignore[arg-type]  # it checks
        except (TypeError, ValueError, NotImplementedError):  # a kind llguidance does not know
            return None

    def prepare(self) -> None:
        """Build the table of bytes, which takes a second for a large vocabulary; once."""
        _ = self._table

    def bytes(self, token: int) -> bytes:
        """The token's bytes; a special token's are its name."""
        if self._table is not None and token < self._table.vocab_size:
            return bytes(self._table.decode_bytes([token]))
        return str(self._tokenizer.decode([token])).encode()

    def text(self, token: int) -> str:
        """The token on its own; bytes that are no character become U+FFFD."""
        return self.bytes(token).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Entry:
    """One token whose text is known: where it starts in the answer, and what it added."""

    token: Token
    text: str
    offset: int


class Aligner:
    """Cuts one answer's text among its tokens; an entry may come later than its token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], skip: bool
    ) -> None:
        self._reader = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
        self._waiting: list[tuple[Token, int]] = []  # and how many characters it adds
        self._text = ""  # not yet handed out
        self._offset = 0

    def add(self, tokens: Sequence[Token], text: str, *, last: bool) -> list[Entry]:
        """The entries complete once these have come; at the end, all that are left."""
        self._waiting += [(token, len(self._reader.push(token.id))) for token in tokens]
        self._text += text
        entries = []
        while self._waiting and (last or self._waiting[0][1] <= len(self._text)):
            token, length = self._waiting.pop(0)
            ends = last and not self._waiting
            entries.append(self._take(token, len(self._text) if ends else length))
        return entries

    def _take(self, token: Token, length: int) -> Entry:
        entry = Entry(token, self._text[:length], self._offset)
        self._text = self._text[length:]
        self._offset += len(entry.text)
        return entry


def chat_shape(entries: Sequence[Entry], pieces: Pieces, *, as_ids: bool) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""

    def top(token: int, logprob: float) -> dict[str, Any]:
        name = _id(token) if as_ids else pieces.text(token)
        return _chat_token(name, logprob, pieces.bytes(token))

    content = []
    for entry in entries:
        token = entry.token
        name = _id(token.id) if as_ids else entry.text
        row = _chat_token(name, token.logprob, pieces.bytes(token.id))
        content.append({**row, "top_logprobs": [top(*pair) for pair in token.top]})
    return {"content": content}


def completion_shape(entries: Sequence[Entry], pieces: Pieces, *, as_ids: bool) -> dict[str, Any]:
    """`logprobs` of /v1/completions; the chosen token is always among `top_logprobs`."""

    def tops(entry: Entry) -> dict[str, float]:
        token = entry.token
        name = _id if as_ids else pieces.text
        others = [pair for pair in token.top if pair[0] != token.id]
        # Two tokens can read the same: the likelier one keeps the name, and the chosen one above
        # all.
        rows = {name(other): _finite(logprob) for other, logprob in reversed(others)}
        return {**rows, _name(entry, as_ids): _finite(token.logprob)}

    return {
        "text_offset": [entry.offset for entry in entries],
        "token_logprobs": [_finite(entry.token.logprob) for entry in entries],
        "tokens": [_name(entry, as_ids) for entry in entries],
        "top_logprobs": [tops(entry) for entry in entries],
    }


def _chat_token(name: str, logprob: float | None, content: bytes) -> dict[str, Any]:
    return {"token": name, "logprob": _finite(logprob), "bytes": list(content)}


def _name(entry: Entry, as_ids: bool) -> str:
    return _id(entry.token.id) if as_ids else entry.text


def _id(token: int) -> str:
    return f"token_id:{token}"


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None else min(0.0, max(logprob, LOWEST))
