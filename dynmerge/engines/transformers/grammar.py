"""Grammars: which tokens may come next, by llguidance. Knows no batches and no sampling."""

from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Grammar
from dynmerge.errors import RequestError

PARAM = "structured_outputs"
MAX_LINES, MAX_LINE = 6, 200  # of a reason that is told
# llguidance bounds its work but for intersections: it does not come back from a hundred of them.
MAX_INTERSECTIONS = 16
KEPT = 16  # compiled grammars: each answer of a request is matched by a copy of one


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU: the tokens that may come next; at its end, only eos.

        Raises RequestError where the grammar has become too complex to follow.
        """
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():  # the mask then is that of the end
            raise RequestError(f"the grammar stopped: {_reason(self._matcher.get_error())}", PARAM)
        bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Move on by one allowed token. Raises RequestError as `allowed` does."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"the grammar stopped: {_reason(self._matcher.get_error())}", PARAM)

    def copy(self) -> "Matcher":
        """Another one, standing at the same place."""
        return Matcher(self._matcher.deep_copy(), self._vocabulary)


class Grammars:
    """Makes matchers for one tokenizer, whose token table is built on the first use."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._vocabulary = vocabulary
        self._eos = eos
        self._table: LLTokenizer | None = None
        self._compiled = lru_cache(KEPT)(self._compile)

    def check(self, grammar: Grammar) -> None:
        """Raise RequestError for a grammar that does not compile, or is too complex to begin."""
        self._compiled(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of `grammar`. Raises RequestError where `check` would."""
        return self._compiled(grammar).copy()

    def _compile(self, grammar: Grammar) -> Matcher:
        if grammar.kind == "lark" and sum(map(grammar.text.count, "&~")) > MAX_INTERSECTIONS:
            reason = f"it has more than {MAX_INTERSECTIONS} of & and ~"
            raise RequestError(f"this lark grammar is not usable: {reason}", PARAM)
        # Not a word on stderr, which would have the grammar in it.
        compiled = LLMatcher(self._tokens(), _source(grammar), log_level=0)
        if not compiled.is_error():
            compiled.compute_bitmask()  # the first reaches limits that compiling does not
        if compiled.is_error():
            reason = _reason(compiled.get_error())
            raise RequestError(f"this {grammar.kind} grammar is not usable: {reason}", PARAM)
        return Matcher(compiled, self._vocabulary)

    def _tokens(self) -> Any:
        if self._table is None:
            if not self._eos:
                raise RequestError("this model has no end-of-sequence token to end with", PARAM)
            try:
                self._table = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary, eos_token=sorted(self._eos)
                )
            except (TypeError, ValueError, NotImplementedError) as reason:
                raise RequestError(
                    f"this model's tokenizer cannot be constrained: {reason}", PARAM
                ) from reason
        return self._table


def _reason(problem: str) -> str:
    """What the caller can use of llguidance's report: no dump of its state, no endless line."""
    lines = takewhile(lambda line: not line.lstrip().startswith("<"), problem.splitlines())
    return "\n".join(line[:MAX_LINE] for line in list(lines)[:MAX_LINES])


def _source(grammar: Grammar) -> str:
    readers: dict[str, Any] = {
        "json": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    return str(readers[grammar.kind](grammar.text))
