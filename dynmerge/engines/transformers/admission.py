"""Admission: what can never run, found before anything is queued. Touches no model."""

from collections.abc import Iterable
from itertools import chain

from dynmerge.engines.engine import Generation, Sampling
from dynmerge.errors import PromptTooLong, RequestError


def check_fits(generation: Generation, context_length: int) -> None:
    """Raise PromptTooLong, in the sentence that clients of vLLM look for."""
    prompt, asked = len(generation.prompt), generation.sampling.max_tokens
    if prompt + asked <= context_length:
        return
    limit = f"This model's maximum context length is {context_length} tokens. However, "
    if prompt >= context_length:
        raise PromptTooLong(
            f"{limit}your prompt contains {prompt} input tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
        )
    raise PromptTooLong(
        f"{limit}you requested {asked} output tokens and your prompt contains {prompt} input "
        f"tokens, for a total of {prompt + asked} tokens. Please reduce the length of the input "
        "prompt or the number of requested output tokens.",
        "max_tokens",
    )


def check_tokens(generation: Generation, vocabulary: int) -> None:
    """Raise RequestError for a token id the model does not have, or none where one is needed."""
    if not generation.prompt:
        raise RequestError("the prompt is empty: it must hold at least one token", "prompt")
    if generation.sampling.max_tokens < 1:
        raise RequestError("max_tokens must be at least 1", "max_tokens")
    sampling = generation.sampling
    named: list[tuple[str, Iterable[int]]] = [
        ("prompt", generation.prompt),
        ("logit_bias", sampling.logit_bias),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("bad_words", chain.from_iterable(sampling.bad_words)),
        ("stop_token_ids", sampling.stop_token_ids),
    ]
    for param, ids in named:
        for token in ids:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"{param}: token id {token} is out of vocabulary (0 to {vocabulary - 1})", param
                )
    if not all(sampling.bad_words):
        raise RequestError("bad_words: a bad word holds at least one token", "bad_words")
    if sampling.allowed_token_ids is not None and not sampling.allowed_token_ids:
        raise RequestError("allowed_token_ids allows no token", "allowed_token_ids")


def check_choice(sampling: Sampling, stop: frozenset[int]) -> None:
    """Raise RequestError where none of the allowed token ids may be the first."""
    if sampling.allowed_token_ids is None:
        return
    banned = {word[0] for word in sampling.bad_words if len(word) == 1}
    left = set(sampling.allowed_token_ids) - banned
    if not left:
        raise RequestError("bad_words bans every one of allowed_token_ids", "allowed_token_ids")
    if sampling.min_tokens and left <= stop:
        raise RequestError(
            f"min_tokens of {sampling.min_tokens} needs a token in allowed_token_ids that does not "
            "end the answer",
            "allowed_token_ids",
        )
