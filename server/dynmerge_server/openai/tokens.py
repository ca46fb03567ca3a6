"""POST /tokenize and POST /detokenize."""

from typing import Annotated, Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dynmerge_server.json_body import read_object, validate
from dynmerge_server.openai.fields import check_fields
from dynmerge_server.openai.requests import MAX_MESSAGES, Listed, Message
from dynmerge_server.openai.templates import Conversation
from dynmerge_server.state import Serving, serving


class TokenizeText(BaseModel):
    """A text to tokenise."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChat(BaseModel):
    """A conversation to tokenise."""

    model: str | None = None
    messages: Annotated[Listed[Message], Field(max_length=MAX_MESSAGES)]
    tools: Listed[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_token_strs: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(BaseModel):
    """Tokens to write out."""

    model: str | None = None
    tokens: Listed[int]


async def tokenize(request: Request) -> Response:
    """The token ids of a text, or of a conversation in the model's chat template."""
    parts, body = serving(request), await read_object(request)
    ids = await _ids(parts, body)
    strings = await _strings(parts, ids) if body.get("return_token_strs") else None
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": parts.prompts.context,
            "tokens": ids,
            "token_strs": strings,
        }
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    parts, body = serving(request), await read_object(request)
    wanted = validate(Detokenize, body)
    check_fields(body, Detokenize.model_fields)
    parts.models.preference(wanted.model)
    text = await parts.prompts.off_loop(lambda: parts.prompts.decode(wanted.tokens))
    return JSONResponse({"prompt": text})


async def _strings(parts: Serving, ids: list[int]) -> list[str]:
    convert = parts.prompts.tokenizer.convert_ids_to_tokens
    return await parts.prompts.off_loop(lambda: list(convert(ids)))


async def _ids(parts: Serving, body: dict[str, Any]) -> list[int]:
    if "messages" not in body:
        text = validate(TokenizeText, body)
        check_fields(body, TokenizeText.model_fields)
        parts.models.preference(text.model)
        special = text.add_special_tokens
        return await parts.prompts.off_loop(lambda: parts.prompts.encode(text.prompt, special))
    chat = validate(TokenizeChat, body)
    check_fields(body, TokenizeChat.model_fields)
    parts.models.preference(chat.model)
    conversation = Conversation.of_messages(
        chat.messages,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        tools=chat.tools,
        variables=chat.chat_template_kwargs,
    )
    special = chat.add_special_tokens
    return await parts.prompts.off_loop(lambda: parts.prompts.render(conversation, special))
