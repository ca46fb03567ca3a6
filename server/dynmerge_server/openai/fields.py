"""Every request field of OpenAI's and vLLM's two endpoints, and what becomes of it here.

A field is offered (it is in `requests.py`), harmless (it cannot change the answer), or refused with
a reason. One in none of the three is unknown, and refused too: never silently ignored.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dynmerge.errors import RequestError

HARMLESS = frozenset(
    {
        # how it is billed or kept
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "session_id",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        # about images and sound, which are refused themselves
        "media_io_kwargs",
        "mm_processor_kwargs",
        "mm_payload",
        "return_mm_kwargs",
        # about tool calls, reasoning and beams, none of which is made
        "parallel_tool_calls",
        "include_reasoning",
        "length_penalty",
        # how a stream is cut into pieces
        "stream_interval",
        # a hint for speed
        "prediction",
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field is not offered, and the values of it that ask for nothing."""

    reason: str
    neutral: tuple[Any, ...] = (None,)


_OFF = (None, False)

REFUSED: Mapping[str, Refusal] = {
    "use_beam_search": Refusal("beam search is not offered", _OFF),
    "best_of": Refusal("only one answer is drawn for each one returned", (None, 1)),
    "suffix": Refusal("filling in before a suffix is not offered", (None, "")),
    "prompt_embeds": Refusal("prompts are text or token ids"),
    "prompt_logprobs": Refusal("the engine computes no log probabilities of the prompt"),
    "logprob_token_ids": Refusal("ask for top_logprobs instead"),
    "chat_template": Refusal("a chat template is code; the server uses the model's own"),
    "spaces_between_special_tokens": Refusal("spaces are always kept", (None, True)),
    "thinking_token_budget": Refusal("reasoning is not told apart from the answer"),
    "watermarking": Refusal("watermarks are not offered", _OFF),
    "repetition_detection": Refusal("repetition is not detected"),
    "return_weight_versions": Refusal("the merge's id says which weights ran", _OFF),
    "return_token_offsets": Refusal("token offsets are not offered", _OFF),
    "routed_experts_prompt_start": Refusal("routed experts are not returned", (None, 0)),
    "kv_transfer_params": Refusal("keys and values are not transferred"),
    "ec_transfer_params": Refusal("encoder outputs are not transferred"),
    "priority": Refusal("there is no priority scheduling; 0 is taken", (None, 0)),
    "functions": Refusal("tool calls are not offered", (None, [])),
    "function_call": Refusal("tool calls are not offered", (None, "none")),
    "modalities": Refusal("only text is offered", (None, ["text"])),
    "audio": Refusal("only text is offered"),
    "verbosity": Refusal("say it in the prompt"),
    "web_search_options": Refusal("the server searches nothing"),
    "moderation": Refusal("answers are not moderated"),
}


def check_fields(body: Mapping[str, Any], offered: Collection[str]) -> None:
    """Raise RequestError naming the first field that is refused or unknown."""
    for name, value in body.items():
        if name in offered or name in HARMLESS:
            continue
        refusal = REFUSED.get(name)
        if refusal is None:
            shown = name if len(name) <= 80 else name[:80] + "..."
            raise RequestError(f"there is no request field {shown!r}", shown)
        # `==` alone would take False for 0 and 1.0 for True.
        if not any(value == item and type(value) is type(item) for item in refusal.neutral):
            raise RequestError(f"{name} is not offered: {refusal.reason}", name)
