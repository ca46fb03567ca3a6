"""Conversations as text: the model's own chat template, which Transformers runs in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dynmerge.errors import RequestError
from dynmerge_server.openai.requests import ChatRequest, Message, Part

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
# What `apply_chat_template` itself is told, which no request may tell it.
RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "tokenize",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
    }
)
# A template is code over what the client sent: any of these is about that.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given. Its texts are already plain strings."""

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_messages(
        cls,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> "Conversation":
        """A conversation, its contents flattened. Raises RequestError for what is not text."""
        if not messages:
            raise RequestError("messages must hold at least one message", "messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                "continue_final_message",
            )
        for name in RESERVED.intersection(variables or {}):
            param = "chat_template_kwargs"
            raise RequestError(f"{param} may not set {name}", param)
        return cls(
            [_plain(index, message) for index, message in enumerate(messages)],
            add_generation_prompt,
            continue_final_message,
            tools,
            documents,
            variables or {},
        )

    @classmethod
    def of(cls, request: ChatRequest) -> "Conversation":
        """The conversation of a chat request. Raises RequestError."""
        _check_tools(request)
        variables = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", request.reasoning_effort)
        return cls.of_messages(
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=request.tools,
            documents=request.documents,
            variables=variables,
        )

    @property
    def last_answer(self) -> str:
        """The last message's text if the assistant began it, for `echo`."""
        last = self.messages[-1]
        return str(last["content"]) if last["role"] == "assistant" else ""


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """The prompt's text. Raises RequestError without a template, or where it objects."""
    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat template; use /v1/completions with a prompt", "messages"
        )
    try:
        text = tokenizer.apply_chat_template(
            conversation.messages,
            tokenize=False,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            tools=conversation.tools,  # type: ignore[arg-type]  # it may hold functions; ours does not
            documents=conversation.documents,
            **conversation.variables,
        )
    except TEMPLATE_ERRORS as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RequestError(
            f"the model's chat template refuses this: {reason}", "messages"
        ) from None
    return str(text)


def _check_tools(request: ChatRequest) -> None:
    if request.tools is not None and not request.tools:
        raise RequestError("tools must not be an empty array; leave it out", "tools")
    if not request.tools:
        if request.tool_choice not in (None, "none"):
            raise RequestError("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return
    if request.tool_choice != "none":
        raise RequestError(
            'tool calls are not offered; with tool_choice "none" the tools are shown to the model',
            "tools",
        )


def _plain(index: int, message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude={"content"}, exclude_none=True)
    plain["content"] = _text(index, message)
    for call in plain.get("tool_calls", ()):
        _open_arguments(call)
    return plain


def _text(index: int, message: Message) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    return "\n".join(
        part if isinstance(part, str) else _part(part, f"messages.{index}.content.{place}")
        for place, part in enumerate(message.content)
    )


def _part(part: Part, where: str) -> str:
    if part.type not in TEXT_PARTS:
        raise RequestError(
            f"{where}: {part.type[:40]!r} is not offered; this server reads text", where
        )
    extra = part.model_extra or {}
    text = part.text if part.text is not None else extra.get(part.type)
    if not isinstance(text, str):
        raise RequestError(f"{where} has no text", where)
    return text


def _open_arguments(call: dict[str, Any]) -> None:
    """Templates expect the arguments of past tool calls as an object, OpenAI sends its JSON."""
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise RequestError("a tool call's arguments are not JSON", "messages") from None
