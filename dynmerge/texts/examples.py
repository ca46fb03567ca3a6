"""Examples: what a calibration or an evaluation asks a model about one skill.

Each example gives one prediction or several (a label; the tokens of an answer), each a distribution
over the same classes. How texts become predictions is whoever makes them's to know.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Examples(Protocol):
    """One skill's examples and the model that predicts them, under whatever merge it carries."""

    @property
    def digest(self) -> str:
        """SHA-256 over the examples' content: what a record says they were."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def lengths(self) -> Sequence[int]:
        """How long each is to the model: examples of like length make a batch without padding."""
        ...

    def counts(self, rows: Sequence[int]) -> list[int]:
        """Of each of these examples, how many predictions it gives."""
        ...

    def logits(self, rows: Sequence[int]) -> Tensor:
        """(n, classes) float32: the predictions for these examples, one example after the other.

        Runs the model. Differentiable.
        """
        ...

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        """(n,): the right class of each of those predictions; None where nobody knows it."""
        ...
