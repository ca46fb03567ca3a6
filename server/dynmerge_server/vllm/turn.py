"""Turn: the merge of the request being answered, as vLLM's handlers come to ask for it.

vLLM looks an adapter up by the request's `model` and writes its name into the reply. Here both
depend on the request, so both are asked of a context variable, and nothing is registered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from dynmerge.engines.vllm.ticket import ticket
from dynmerge.errors import ConfigError
from dynmerge_server.vllm.residents import Resident


@dataclass(slots=True)
class Turn:
    """What the client called the model, and the merge it gets; None is the base model.

    `served` is whether vLLM asked for that merge: from then on it runs.
    """

    model: str
    resident: Resident | None = None
    served: bool = False

    def __post_init__(self) -> None:
        self.served = self.resident is None


TURN: ContextVar[Turn | None] = ContextVar("dynmerge_turn", default=None)


class MergeRequests(Mapping[str, Any]):
    """In place of vLLM's adapters by name: the merge of this turn, by its digest, and no other.

    It lists nothing. vLLM goes through the list on every request to the base model.
    """

    def __init__(self, lora_request: Callable[..., Any]) -> None:
        """`lora_request` is vLLM's class."""
        self._lora_request = lora_request

    def __contains__(self, name: object) -> bool:
        """Whether it is this turn's merge. To ask is not to use it."""
        return _merge_of(TURN.get(), name) is not None

    def __getitem__(self, name: str) -> Any:
        """The LoRARequest of this turn's merge. Raises KeyError for any other name."""
        turn = TURN.get()
        resident = _merge_of(turn, name)
        if turn is None or resident is None:
            raise KeyError(name)
        turn.served = True
        return self._lora_request(
            lora_name=name, lora_int_id=resident.id, lora_path=ticket(resident.recipe)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _merge_of(turn: Turn | None, name: object) -> Resident | None:
    resident = turn.resident if turn else None
    return resident if resident and name == resident.recipe.digest else None


def take_turns(models: Any, lora_request: Callable[..., Any]) -> None:
    """Let vLLM's OpenAIServingModels find merges, and call them what their clients called them.

    Raises ConfigError on a vLLM where these are not looked up as dynmerge knows it.
    """
    for name in ("model_name", "lora_requests"):
        if not hasattr(models, name):
            raise ConfigError(f"vLLM's {type(models).__name__} has no {name}, which merges need")
    named = models.model_name

    def model_name(lora_request: Any = None) -> str:
        turn = TURN.get()
        return turn.model if turn else str(named(lora_request))

    models.lora_requests = MergeRequests(lora_request)
    models.model_name = model_name
