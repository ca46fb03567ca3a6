"""StateFolder: where a training that is stopped keeps its state, beside the bank until it ends.

Knows nothing of what a state holds.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.storage import edited_place
from dynmerge.calibration.plan import Plan
from dynmerge.errors import BankError, StateError
from dynmerge.texts.examples import Examples

STATE = "state.pt"
DIGEST_BYTES = 32  # of SHA-256, before what torch.save wrote


@dataclass(frozen=True, slots=True)
class StateFolder:
    """A hidden folder whose name says all that the training depends on."""

    folder: Path

    @classmethod
    def of(
        cls,
        bank_folder: Path,
        bank: FactorBank,
        plan: Plan,
        texts: Mapping[str, Examples],
        held_out: Mapping[str, Examples],
    ) -> "StateFolder":
        """The folder of this training, whether it is there or not."""
        digests = [
            [name, *(given[name].digest for given in (texts, held_out) if name in given)]
            for name in bank.names
        ]
        content = json.dumps([bank.coordinates_digest, asdict(plan), digests], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:12]
        bank_folder = edited_place(bank_folder)
        return cls(bank_folder.with_name(f".{bank_folder.name}.{plan.method}-{key}.training"))

    @property
    def file(self) -> Path:
        """The state itself."""
        return self.folder / STATE

    def read(self) -> Mapping[str, Any] | None:
        """The state that is there, if any. Raises StateError unless it is as it was written."""
        try:
            if not os.path.lexists(self.folder):
                return None
            if not self.folder.is_dir() or (self.file.exists() and not self.file.is_file()):
                raise StateError("something else is in its place")
            if not self.file.exists():
                return None
            kept = self.file.read_bytes()
        except OSError as error:
            raise StateError(f"cannot be read ({error.strerror})") from error
        content = kept[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != kept[:DIGEST_BYTES]:
            raise StateError("it is not as it was written")
        state: Mapping[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the state; what is killed half-way leaves the old one. Raises BankError."""
        content = io.BytesIO()  # torch.save hides what a disk says
        torch.save(dict(state), content)
        # Of two that learn the same at once, each has its own.
        partial = self.folder / f"{STATE}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(content.getbuffer()).digest())
                file.write(content.getbuffer())
            partial.replace(self.file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise BankError(f"cannot keep the training's state: {error}") from error

    def clear(self) -> None:
        """Forget it, and whatever else is in its place."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.unlink(missing_ok=True)
