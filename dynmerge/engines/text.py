"""Token ids -> text as it appears, and where it stops. Knows no engine and no model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 6  # tokens to read new ones after: a leading space depends on what stands before
PATIENCE = 16  # tokens to wait for a character to be finished before it is called broken


class Detokenizer:
    """The text of a growing token sequence, handed out only when it can no longer change."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt[-CONTEXT:])  # [:_known] is context, the rest is new
        self._known = len(self._ids)
        self._before = self._decode(self._ids)
        self._given = ""  # already handed out of the text after `_before`

    def push(self, token: int) -> str:
        """Add one token; return the text it settles, often all of its own, sometimes none."""
        self._ids.append(token)
        text = self._decode(self._ids)[len(self._before) :]
        broken = len(self._ids) - self._known >= PATIENCE
        settled = text if broken else text.rstrip(REPLACEMENT)
        new = settled[len(self._given) :]
        self._given += new
        if broken or (text and settled == text):
            self._restart()
        return new

    def finish(self) -> str:
        """The rest, whatever it looks like."""
        rest = self._decode(self._ids)[len(self._before) + len(self._given) :]
        self._given += rest
        return rest

    def _restart(self) -> None:
        """Everything is handed out: keep only the last tokens, as the context of the next."""
        self._ids = self._ids[self._known :][-CONTEXT:]
        self._known = len(self._ids)
        self._before = self._decode(self._ids)
        self._given = ""

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip)
        return text if isinstance(text, str) else "".join(text)


class StopStrings:
    """Cuts text at the first of some strings, and holds back what may be the start of one."""

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        self._stop = tuple(stop)
        self._longest = max((len(string) for string in self._stop), default=0)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text; return what may be shown and the stop string that ended it, if one did."""
        self._held += text
        found = [(self._held.find(string), -len(string), string) for string in self._stop]
        hits = sorted(hit for hit in found if hit[0] >= 0)
        if hits:
            place, _, string = hits[0]
            return self._held[: place + (len(string) if self._include else 0)], string
        keep = len(self._held) - self._tail()
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown, None

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest

    def _tail(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(string.startswith(end) for string in self._stop):
                return length
        return 0
