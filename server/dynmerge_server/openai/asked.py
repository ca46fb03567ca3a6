"""Asked: one request, validated, with everything needed to answer it. Nothing is queued yet."""

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from starlette.datastructures import Headers

from dynmerge.engines.engine import Engine, Generation, Sampling
from dynmerge.errors import RequestError
from dynmerge.merging.merge import Merge
from dynmerge.recipe import Recipe
from dynmerge_server.experiments.entry import Resolved, resolve
from dynmerge_server.openai.prompts import Prompt
from dynmerge_server.openai.requests import GenerationRequest
from dynmerge_server.openai.sampling import check_n, check_stream_options, sampling
from dynmerge_server.state import Serving

REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's prompts, one sampling for each, and how to answer.

    Sequence `index` is answer `index % n` to prompt `index // n`. `prefix` is what `echo` puts
    before the answers to each prompt.
    """

    id: str
    model: str
    created: int
    arrived: float  # time.perf_counter()
    resolved: Resolved
    prompts: tuple[Prompt, ...]
    samplings: tuple[Sampling, ...]
    n: int
    prefix: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    as_ids: bool = False
    prompt_text: bool = False

    @property
    def recipe(self) -> Recipe:
        """The merge."""
        return self.resolved.recipe

    @property
    def request_id(self) -> str:
        """Its id without the word for the kind of endpoint."""
        return self.id.partition("-")[2]

    @property
    def count(self) -> int:
        """How many sequences it takes."""
        return len(self.prompts) * self.n

    def prompt(self, index: int) -> Prompt:
        """The prompt of a sequence."""
        return self.prompts[index // self.n]

    def echoed(self, index: int) -> str:
        """What stands before a sequence's own text."""
        return self.prefix[index // self.n] if self.prefix else ""

    def generation(self, index: int, merge: Merge | None) -> Generation:
        """A sequence for the engine. Answer i to a prompt is drawn with the seed plus i."""
        place = index // self.n
        chosen = self.samplings[place]
        if chosen.seed is not None:
            chosen = replace(chosen, seed=(chosen.seed + index % self.n) % 2**63)
        return Generation(self.prompts[place].ids, merge, chosen)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the endpoints differ in: how ids begin, limits, where prompts come from, and what is
    repeated of them.
    """

    kind: str
    max_tokens: int | None
    logprobs: int | None
    prompts: Callable[[], Awaitable[Sequence[Prompt]]]
    echo: Callable[[Sequence[Prompt]], Sequence[str]] | None = None
    prompt_text: bool = False


async def ask(
    serving: Serving, headers: Headers, request: GenerationRequest, terms: Terms, arrived: float
) -> Asked:
    """Check all that can be wrong, what is cheap first. Raises RequestError or PromptTooLong."""
    resolved = await resolve(
        serving.experiments, serving.preferences, headers, request.wish(), request.model
    )
    name = f"{terms.kind}-{request_id(headers, request.request_id)}"
    n = check_n(request.n, serving.config.limits.n)
    check_stream_options(request)
    common = await serving.prompts.off_loop(
        lambda: sampling(
            request,
            terms.max_tokens,
            terms.logprobs,
            defaults=serving.config.sampling,
            tokenizer=serving.prompts.tokenizer,
            vocabulary=serving.runtime.engine.vocabulary_size,
        )
    )
    prompts = await terms.prompts()
    fitted = [serving.prompts.fit(prompt, common, terms.max_tokens) for prompt in prompts]
    options = request.stream_options
    asked = Asked(
        id=name,
        model=request.model or serving.models.base,
        created=int(time.time()),
        arrived=arrived,
        resolved=resolved,
        prompts=tuple(prompts),
        samplings=tuple(fitted),
        n=n,
        prefix=tuple(terms.echo(prompts)) if terms.echo else (),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(request.return_token_ids),
        as_ids=bool(request.return_tokens_as_token_ids),
        prompt_text=terms.prompt_text,
    )
    await serving.prompts.off_loop(lambda: _check(serving.runtime.engine, asked))
    if terms.logprobs is not None:
        await serving.prompts.off_loop(serving.pieces.prepare)
    return asked


def _check(engine: Engine, asked: Asked) -> None:
    """Let the engine refuse each prompt. The grammar, slow to compile, is the same for all."""
    for index in range(0, asked.count, asked.n):
        generation = asked.generation(index, None)
        chosen = generation.sampling
        if chosen.max_tokens == 0:  # nothing to run
            continue
        if index:
            generation = replace(generation, sampling=replace(chosen, grammar=None))
        engine.check(generation)


def request_id(headers: Headers, in_body: str | None) -> str:
    """What the client calls its request, or a name for it. Raises RequestError."""
    given = headers.get(REQUEST_ID_HEADER, in_body)
    if given is None:
        return uuid.uuid4().hex
    if not REQUEST_ID.fullmatch(given):
        param = REQUEST_ID_HEADER if REQUEST_ID_HEADER in headers else "request_id"
        raise RequestError(f"{param} takes up to 128 of A-Z a-z 0-9 _ . : -", param)
    return given
