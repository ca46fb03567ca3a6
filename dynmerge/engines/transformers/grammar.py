"""Grammars: which tokens may come next, by llguidance. Knows no batches and no sampling."""

from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Grammar
from dynmerge.errors import RequestError

PARAM = "structured_outputs"


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU: the tokens that may come next; at its end, only eos."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Move on by one token. Raises RuntimeError when the grammar does not take it."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar stopped: {self._matcher.get_error()}")


class Grammars:
    """Makes matchers for one tokenizer, whose token table is built on the first use."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._vocabulary = vocabulary
        self._eos = eos
        self._table: LLTokenizer | None = None

    def check(self, grammar: Grammar) -> None:
        """Raise RequestError for a grammar that does not compile."""
        problem = LLMatcher.validate_grammar(_source(grammar), self._tokens())
        if problem:
            raise RequestError(f"this {grammar.kind} grammar is not usable: {problem}", PARAM)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of `grammar`. Raises RequestError where `check` would."""
        matcher = LLMatcher(self._tokens(), _source(grammar))
        if matcher.is_error():
            raise RequestError(
                f"this {grammar.kind} grammar is not usable: {matcher.get_error()}", PARAM
            )
        return Matcher(matcher, self._vocabulary)

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


def _source(grammar: Grammar) -> str:
    readers: dict[str, Any] = {
        "json": LLMatcher.grammar_from_json_schema,
        "regex": LLMatcher.grammar_from_regex,
        "lark": LLMatcher.grammar_from_lark,
    }
    return str(readers[grammar.kind](grammar.text))
