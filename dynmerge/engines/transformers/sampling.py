"""Logits -> tokens: one Draw per sequence holds what its sampling needs to remember.

Follows vLLM: masks and bias, then penalties, then temperature, min_p, top_k and top_p. Log
probabilities are of the untouched logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dynmerge.engines.engine import Sampling, Token
from dynmerge.engines.transformers.grammar import Matcher
from dynmerge.errors import RequestError

GREEDY_BELOW = 1e-5
NUCLEUS = 1024  # most likely tokens to look for a nucleus among before all are sorted


class Draw:
    """Draws one sequence's tokens. `generated` grows by `accept`."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stop: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        self.generated: list[int] = []
        self.logprobs = sampling.logprobs
        self._sampling = sampling
        self._prompt = prompt
        self._stop = sorted(stop)
        self._matcher = matcher
        self._counts: Tensor | None = None  # (vocabulary,) how often each token was generated
        self._seen: Tensor | None = None  # (vocabulary,) whether it is in the prompt or the answer
        self._allowed: Tensor | None = None  # (vocabulary,)
        self._bias: Tensor | None = None  # (vocabulary,)
        self._generator: torch.Generator | None = None
        self._greedy = sampling.temperature < GREEDY_BELOW
        self._penalises = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._repeats = sampling.repetition_penalty != 1.0
        # Such a row is the argmax of its untouched logits, found for all rows at once.
        self.plain = self._greedy and not (
            self._penalises
            or self._repeats
            or sampling.logit_bias
            or sampling.allowed_token_ids is not None
            or sampling.bad_words
            or sampling.min_tokens
            or matcher is not None
        )

    def choose(self, logits: Tensor) -> int:
        """The next token, given logits (vocabulary,) float32 which this may write to.

        Raises RequestError when what the request asked for leaves no token to draw.
        """
        logits = self._penalised(self._masked(logits))
        best = float(logits.max())
        if best == -torch.inf:
            raise self._nothing_left()
        if not best < torch.inf:
            raise RequestError("the penalties are too large for this model's logits")
        return int(logits.argmax()) if self._greedy else self._sample(logits)

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        self.generated.append(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True
        if self._matcher is not None and token not in self._stop:
            self._matcher.accept(token)

    def _nothing_left(self) -> RequestError:
        sampling, count = self._sampling, len(self.generated)
        limits = {
            "structured_outputs": self._matcher is not None,
            "allowed_token_ids": sampling.allowed_token_ids is not None,
            "bad_words": bool(sampling.bad_words),
            "min_tokens": count < sampling.min_tokens,
        }
        named = [name for name, limiting in limits.items() if limiting]
        return RequestError(f"after {count} tokens, {' and '.join(named)} allow no other", named[0])

    def _masked(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if self._matcher is not None:
            logits.masked_fill_(~self._matcher.allowed().to(logits.device), -torch.inf)
        if sampling.allowed_token_ids is not None:
            if self._allowed is None:
                self._allowed = _mask(sampling.allowed_token_ids, logits)
            logits.masked_fill_(~self._allowed, -torch.inf)
        for *start, last in sampling.bad_words:
            if not start or self.generated[-len(start) :] == start:
                logits[last] = -torch.inf
        if len(self.generated) < sampling.min_tokens:
            logits[self._stop] = -torch.inf
        if sampling.logit_bias:
            if self._bias is None:
                self._bias = torch.zeros_like(logits)
                self._bias[list(sampling.logit_bias)] = logits.new_tensor(
                    list(sampling.logit_bias.values())
                )
            logits += self._bias
        return logits

    def _penalised(self, logits: Tensor) -> Tensor:
        sampling = self._sampling
        if self._repeats:
            if self._seen is None:
                self._seen = _mask([*self._prompt, *self.generated], logits)
            factor = torch.where(
                logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty
            )
            logits = torch.where(self._seen, logits * factor, logits)
        if self._penalises:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            logits = logits - sampling.frequency_penalty * self._counts
            logits = logits - sampling.presence_penalty * (self._counts > 0)
        return logits

    def _sample(self, logits: Tensor) -> int:
        sampling = self._sampling
        weights = torch.softmax(logits / sampling.temperature, dim=-1)
        if sampling.min_p > 0:
            weights = weights * (weights >= sampling.min_p * weights.max())
        ids: Tensor | None = None
        if sampling.top_k > 0 or sampling.top_p < 1:
            weights, ids = nucleus(weights, sampling.top_k, sampling.top_p)
        drawn = torch.multinomial(weights, 1, generator=self._random(logits.device))
        return int(drawn if ids is None else ids[drawn])

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self._sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._sampling.seed)
        return self._generator


def nucleus(weights: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The `top_k` heaviest (0: all), and of those the fewest that reach `top_p` of their weight.

    Returns weights, 0 outside the nucleus, heaviest first, and the tokens they belong to.
    """
    size = weights.shape[-1]
    heaviest, ids = weights.topk(min(top_k or NUCLEUS, size))
    total = heaviest.sum() if top_k else weights.sum()
    if not top_k and heaviest.sum() < top_p * total:
        heaviest, ids = weights.sort(descending=True)
    before = heaviest.cumsum(-1) - heaviest
    # Where top_p is below rounding the heaviest token alone is left, never nothing.
    inside = (before < top_p * total) | (before <= 0)
    return heaviest * inside, ids


def sample(draws: Sequence[Draw], scores: Tensor) -> list[Token | Exception]:
    """The next token of every sequence, given its raw logits in `scores` (len(draws), vocabulary).

    A row that fails comes back as its exception and harms no other.
    """
    best, ids = scores.max(dim=-1)
    outcomes: list[int | Exception] = []
    for row, (draw, token, logit) in enumerate(
        zip(draws, ids.tolist(), best.tolist(), strict=True)
    ):
        # NaN is the largest of all to max(), so the best logit shows whether a row has one.
        if not -torch.inf < logit < torch.inf:
            outcomes.append(RuntimeError("the model's logits are not finite"))
        elif draw.plain:
            draw.generated.append(token)
            outcomes.append(token)
        else:
            outcomes.append(_attempt(draw, scores[row].clone()))
    return _with_logprobs(draws, scores, outcomes)


def _attempt(draw: Draw, logits: Tensor) -> int | Exception:
    try:
        token = draw.choose(logits)
        draw.accept(token)
    except Exception as error:  # one bad request must not end the batch for all others
        return error
    return token


def _with_logprobs(
    draws: Sequence[Draw], scores: Tensor, outcomes: Sequence[int | Exception]
) -> list[Token | Exception]:
    tokens = [Token(out) if isinstance(out, int) else out for out in outcomes]
    wanted = [
        (row, draw.logprobs, out)
        for row, (draw, out) in enumerate(zip(draws, outcomes, strict=True))
        if draw.logprobs is not None and isinstance(out, int)
    ]
    if not wanted:
        return tokens
    logprobs = torch.log_softmax(scores[[row for row, _, _ in wanted]], dim=-1)
    chosen = logprobs.gather(1, logprobs.new_tensor([[out] for _, _, out in wanted]).long())
    values, ids = logprobs.topk(min(max(top for _, top, _ in wanted), scores.shape[-1]))
    for (row, top, out), logprob, some_ids, some_values in zip(
        wanted, chosen[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
    ):
        tokens[row] = Token(out, logprob, tuple(zip(some_ids, some_values, strict=True))[:top])
    return tokens


def _mask(ids: Sequence[int], like: Tensor) -> Tensor:
    """(vocabulary,) bool: the tokens named."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[torch.tensor(ids, device=like.device)] = True
    return mask
