"""The request bodies of the two endpoints, as pydantic models: names, types and defaults.

Ranges are checked in `sampling.py`, whose messages are vLLM's; what is not here is in `fields.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from dynmerge.errors import RequestError
from dynmerge_server.preferences import Wish

INT64 = Field(ge=-(2**63), le=2**63 - 1)

Item = TypeVar("Item")
# A list of a million wrong items is one mistake, not a million to collect.
Listed = Annotated[list[Item], Field(fail_fast=True)]
MAX_MESSAGES = 10_000
XARGS = ("preference", "preset", "method")  # of `vllm_xargs`, those that are ours


def _not_a_string(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("`logprobs` must be an integer")
    return value


class Part(BaseModel):
    """One piece of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation. What else a client sends along is not shown to the model."""

    role: str
    content: str | Listed[str | Part] | None = None
    name: str | None = None
    tool_calls: Listed[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(BaseModel):
    """OpenAI's wrapping of a JSON schema. `strict` is always meant."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to constrain an answer."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's way to constrain an answer: exactly one of the first five."""

    model_config = ConfigDict(extra="forbid")

    json_schema: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class MergeFields(BaseModel):
    """What says which merge to use, on any endpoint, beside `vllm_xargs`."""

    preference: dict[str, Any] | str | None = None
    normalize: bool | None = None
    preset: str | None = None
    method: str | None = None
    lora: Listed[dict[str, Any]] | None = None
    experiment: str | None = None

    def asked(self, xargs: Mapping[str, Any] | None, user: str | None = None) -> Wish:
        """Which merge these fields and those extra arguments ask for, and for whom."""
        said = (self.preference, self.normalize, self.preset, self.method, self.lora)
        return Wish(*said, xargs, self.experiment, user)


class GenerationRequest(MergeFields):
    """What both endpoints take."""

    model: str | None = None
    n: int | None = 1
    seed: Annotated[int, INT64] | None = None
    stop: str | Listed[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: FiniteFloat | None = None
    top_p: FiniteFloat | None = None
    top_k: int | None = None
    min_p: FiniteFloat | None = None
    presence_penalty: FiniteFloat | None = None
    frequency_penalty: FiniteFloat | None = None
    repetition_penalty: FiniteFloat | None = None
    logit_bias: dict[str, Any] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Listed[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool | None = None
    bad_words: Listed[str] = []
    allowed_token_ids: Listed[int] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: str | None = None
    user: str | None = None
    cache_salt: str | None = None
    vllm_xargs: dict[str, Any] | None = None

    def wish(self) -> Wish:
        """Which merge the body asks for. Raises RequestError for an unknown extra argument."""
        extra = self.vllm_xargs
        for name in extra or {}:
            if name not in XARGS:
                param = f"vllm_xargs.{name[:80]}"
                raise RequestError(f"{param} is not known (known: {', '.join(XARGS)})", param)
        return self.asked(extra, self.user)


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[Listed[Message], Field(max_length=MAX_MESSAGES)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Listed[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    documents: Listed[dict[str, Any]] | None = None
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | Listed[str] | Listed[int] | Listed[Listed[int]] | None = None
    max_tokens: int | None = 16
    logprobs: Annotated[int | None, BeforeValidator(_not_a_string)] = None
    echo: bool | None = False
    add_special_tokens: bool = True
