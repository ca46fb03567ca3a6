"""From request fields to `Sampling`: ranges and defaults, in vLLM's words, which clients match."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Sampling
from dynmerge.errors import RequestError
from dynmerge_server.config import SamplingDefaults
from dynmerge_server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from dynmerge_server.openai.structured import grammar

MAX_STOPS = 4
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 256
MAX_BAD_WORD = 256  # characters
MIN_REPETITION, MAX_REPETITION = 1e-6, 1e6  # logits times these stay finite in float32
TOKEN_ID = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")

# vLLM's, where neither the request, the configuration nor the model says anything.
FALLBACK = SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)


def sampling(
    request: GenerationRequest,
    max_tokens: int | None,
    logprobs: int | None,
    *,
    defaults: SamplingDefaults,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
) -> Sampling:
    """The sampling of one answer. Raises RequestError naming what is out of range.

    `max_tokens` of None is filled in by `Prompts.fit`, which knows the prompt's length. Not for the
    event loop: it tokenises the bad words and writes the grammar.
    """
    chosen = SamplingDefaults(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
    ).over(defaults.over(FALLBACK))
    _check_ranges(request, chosen)
    _check_min_tokens(request.min_tokens, max_tokens)
    _check_logprobs(logprobs)
    if request.cache_salt == "":
        raise RequestError("cache_salt must be a non-empty string if provided", "cache_salt")
    return Sampling(
        max_tokens=max_tokens or 0,
        min_tokens=request.min_tokens,
        temperature=chosen.temperature or 0.0,
        top_p=1.0 if chosen.top_p is None else chosen.top_p,
        top_k=max(chosen.top_k or 0, 0),
        min_p=chosen.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=chosen.repetition_penalty or 1.0,
        logit_bias=_logit_bias(request, vocabulary),
        allowed_token_ids=_allowed(request, vocabulary),
        bad_words=_bad_words(request, tokenizer),
        seed=request.seed,
        stop=_stops(request),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens is not False,
        logprobs=logprobs,
        grammar=grammar(request.response_format, request.structured_outputs),
    )


def check_n(n: int | None, most: int) -> int:
    """How many answers to one prompt. Raises RequestError."""
    count = 1 if n is None else n
    if count < 1:
        raise RequestError(f"n must be at least 1, got {count}.")
    if count > most:
        raise RequestError(f"n must be at most {most}, got {count}.")
    return count


def check_stream_options(request: GenerationRequest) -> None:
    """Raise RequestError for stream options without a stream."""
    if request.stream_options is not None and not request.stream:
        message = "Stream options can only be defined when `stream=True`."
        raise RequestError(message, "stream_options")


def chat_max_tokens(request: ChatRequest, context: int) -> int | None:
    """The newer name wins, as in vLLM; None is whatever room the prompt leaves."""
    newer = request.max_completion_tokens
    return _max_tokens(request.max_tokens if newer is None else newer, context)


def completion_max_tokens(request: CompletionRequest, context: int) -> int:
    """OpenAI's default of 16; with `echo`, 0 returns the prompt alone."""
    given = 16 if request.max_tokens is None else request.max_tokens
    if request.echo and given == 0:
        return 0
    return _max_tokens(given, context) or 0


def chat_logprobs(request: ChatRequest) -> int | None:
    """`logprobs` and `top_logprobs` as one number."""
    top = request.top_logprobs
    if top is not None and top < 0:
        raise RequestError(f"`top_logprobs` must be a positive value, got {top}.", "top_logprobs")
    if not request.logprobs:
        if top:
            message = "when using `top_logprobs`, `logprobs` must be set to true."
            raise RequestError(message, "top_logprobs")
        return None
    return top or 0


def completion_logprobs(request: CompletionRequest) -> int | None:
    """`logprobs`, which with `echo` would be those of the prompt."""
    if request.logprobs is not None and request.echo:
        raise RequestError(
            "logprobs with echo are those of the prompt, which the engine does not compute",
            "logprobs",
        )
    return request.logprobs


def _max_tokens(given: int | None, context: int) -> int | None:
    if given is not None and given < 1:
        raise _out_of_range("max_tokens", f"must be at least 1, got {given}.", given)
    if given is not None and given > context:
        message = f"max_tokens={given} cannot be greater than max_model_len={context}."
        raise RequestError(f"{message} (parameter=max_tokens, value={given})", "max_tokens")
    return given


def _check_ranges(request: GenerationRequest, chosen: SamplingDefaults) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(request, name)
        if value is not None and not -2 <= value <= 2:
            raise RequestError(f"{name} must be in [-2, 2], got {value}.")
    repetition = chosen.repetition_penalty
    if repetition is not None and repetition <= 0:
        raise RequestError(f"repetition_penalty must be greater than zero, got {repetition}.")
    if repetition is not None and not MIN_REPETITION <= repetition <= MAX_REPETITION:
        raise RequestError(
            f"repetition_penalty must be in [{MIN_REPETITION:g}, {MAX_REPETITION:g}], "
            f"got {repetition}.",
            "repetition_penalty",
        )
    temperature = chosen.temperature
    if temperature is not None and temperature < 0:
        reason = f"must be non-negative, got {temperature}."
        raise _out_of_range("temperature", reason, temperature)
    if temperature is not None and temperature > 2:
        raise _out_of_range("temperature", f"must be in [0, 2], got {temperature}.", temperature)
    if chosen.top_p is not None and not 0 < chosen.top_p <= 1:
        raise _out_of_range("top_p", f"must be in (0, 1], got {chosen.top_p}.", chosen.top_p)
    if chosen.top_k is not None and chosen.top_k < -1:
        raise RequestError(f"top_k must be 0 (disable), or at least 1, got {chosen.top_k}.")
    if chosen.min_p is not None and not 0 <= chosen.min_p <= 1:
        raise RequestError(f"min_p must be in [0, 1], got {chosen.min_p}.")


def _out_of_range(name: str, reason: str, value: float) -> RequestError:
    return RequestError(f"{name} {reason} (parameter={name}, value={value})", name)


def _check_min_tokens(min_tokens: int, max_tokens: int | None) -> None:
    if min_tokens < 0:
        raise RequestError(f"min_tokens must be greater than or equal to 0, got {min_tokens}.")
    if max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."
        )


def _check_logprobs(logprobs: int | None) -> None:
    if logprobs is not None and logprobs < 0:
        raise _out_of_range("logprobs", f"must be non-negative, got {logprobs}.", logprobs)
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise RequestError(
            f"Requested sample logprobs of {logprobs}, which is greater than max allowed: "
            f"{MAX_LOGPROBS} (parameter=logprobs, value={logprobs})",
            "logprobs",
        )


def _stops(request: GenerationRequest) -> tuple[str, ...]:
    stop = request.stop
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not text for text in stops):
        raise RequestError("stop cannot contain an empty string.")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}.", "stop")
    return stops


def _logit_bias(request: GenerationRequest, vocabulary: int) -> dict[int, float]:
    given = request.logit_bias or {}
    wrong = [key for key in given if not TOKEN_ID.fullmatch(key)]
    if wrong:
        raise RequestError(
            f"logit_bias has keys that are not token ids: {_few(wrong)}", "logit_bias"
        )
    outside = [key for key in given if not 0 <= int(key) < vocabulary]
    if outside:
        raise RequestError(
            f"token_id(s) {_few(outside)} in logit_bias contain out-of-vocab token ids. "
            f"Vocabulary size: {vocabulary}",
            "logit_bias",
        )
    for key, bias in given.items():
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise RequestError(f"the logit_bias of token {key} is not a number", "logit_bias")
    return {int(key): float(min(100, max(-100, bias))) for key, bias in given.items()}


def _allowed(request: GenerationRequest, vocabulary: int) -> tuple[int, ...] | None:
    allowed = request.allowed_token_ids
    if allowed is None:
        return None
    if not allowed:
        raise RequestError("allowed_token_ids is not None and empty!", "allowed_token_ids")
    outside = [str(token) for token in allowed if not 0 <= token < vocabulary]
    if outside:
        raise RequestError(
            f"allowed_token_ids contains out-of-vocab token id(s) {_few(outside)}!",
            "allowed_token_ids",
        )
    return tuple(allowed)


def _bad_words(
    request: GenerationRequest, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the start of a text, and after a space where that differs."""
    if len(request.bad_words) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words takes at most {MAX_BAD_WORDS} words", "bad_words")
    banned: list[tuple[int, ...]] = []
    for word in request.bad_words:
        if not word.strip():
            raise RequestError("bad_words cannot contain an empty string.", "bad_words")
        if len(word) > MAX_BAD_WORD:
            raise RequestError(
                f"bad_words takes words of at most {MAX_BAD_WORD} characters", "bad_words"
            )
        plain, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
            for prefix in ("", " ")
        )
        banned.append(plain)
        # As vLLM: the spaced form counts only where it is one other first token, not a space more.
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            banned.append(spaced)
    return tuple(banned)


def _few(items: Sequence[str]) -> str:
    shown = ", ".join(item[:40] for item in items[:10])
    return f"{shown}, ..." if len(items) > 10 else shown
