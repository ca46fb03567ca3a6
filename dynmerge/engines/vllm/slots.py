"""Rows: which merge is in which row of a table. Knows numbers and names, no tensors."""

from collections import OrderedDict
from collections.abc import Container

from dynmerge.errors import DynmergeError


class Rows:
    """`count` rows, each of one merge; the least recently used is given up for the next.

    A merge is known by the number vLLM has for it, which may come to stand for another one: the
    name decides.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(reversed(range(count)))
        self._held: OrderedDict[int, tuple[str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def find(self, number: int, name: str) -> int | None:
        """The row that holds the merge, which is now the one used last; None if none does."""
        held = self._held.get(number)
        if held is None or held[0] != name:
            return None
        self._held.move_to_end(number)
        return held[1]

    def take(self, number: int, name: str, busy: Container[int]) -> tuple[int, int | None]:
        """A row for the merge to be written to, and the number that had to leave it, if any.

        Never one of the `busy` numbers' rows: raises DynmergeError when those are all there are,
        which whoever admits requests must prevent.
        """
        evicted = None
        held = self._held.pop(number, None)
        if held is not None:
            row = held[1]
        elif self._free:
            row = self._free.pop()
        else:
            evicted = next((each for each in self._held if each not in busy), None)
            if evicted is None:
                raise DynmergeError(f"a step needs more than the {self.count} slots there are")
            row = self._held.pop(evicted)[1]
        self._held[number] = (name, row)
        return row, evicted

    def drop(self, number: int) -> bool:
        """Forget a merge; whether it was there."""
        held = self._held.pop(number, None)
        if held is not None:
            self._free.append(held[1])
        return held is not None

    def release(self, name: str) -> None:
        """Let a merge be the next to leave, if it is here: nobody will ask for it again."""
        for number, (held, _) in self._held.items():
            if held == name:
                self._held.move_to_end(number, last=False)
                return

    def clear(self) -> None:
        """Forget all of them."""
        for number in list(self._held):
            self.drop(number)

    def row_of(self, name: str) -> int | None:
        """The row that holds a merge by name, whatever its number."""
        return next((row for held, row in self._held.values() if held == name), None)
