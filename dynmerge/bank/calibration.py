"""Calibration: what somebody learned, offline, for one merge method and exactly one bank's factors.

Tensors by name and how to read them; knows no bank, no method and no preference.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from dynmerge.errors import BankError

NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")  # of a method, of a form
TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{0,512}\.[a-z][a-z0-9_]{0,63}")
AT = "at"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Float32 tensors for the row `method` of METHODS, made for exactly one bank's factors.

    `factors` is that bank's `coordinates_digest`.

    A name is MODULE.LABEL, or .LABEL for what all modules share. `form` says how coefficients
    follow from a preference; one that serves a single preference holds it, (tasks,), as `.at`.
    `record` (data, seed, settings, losses) is for people and decides nothing. Raises BankError.
    """

    method: str
    form: str
    factors: str
    tensors: Mapping[str, Tensor]
    record: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.method) or not NAME.fullmatch(self.form):
            raise BankError(f"a calibration for {self.method!r} of form {self.form!r}: not names")
        if not self.tensors:
            raise BankError(f"the calibration for {self.method} holds no tensors")
        for name, tensor in self.tensors.items():
            if not TENSOR_NAME.fullmatch(name):
                raise BankError(self._of(name, "is not named MODULE.LABEL"))
            if tensor.dtype != torch.float32:
                raise BankError(self._of(name, f"is {tensor.dtype}, not float32"))
            if not torch.isfinite(tensor).all():
                raise BankError(self._of(name, "holds NaN or infinity"))
        if self.at is not None and not (min(self.at) >= 0 and abs(sum(self.at) - 1) <= 1e-3):
            raise BankError(self._of(f".{AT}", f"is no preference: {self.at}"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that decides: the tensors, and what they are for."""
        named = sorted(self.tensors.items())
        shapes = [[name, list(tensor.shape)] for name, tensor in named]
        header = json.dumps([self.method, self.form, self.factors, shapes])
        hashed = hashlib.sha256(header.encode())
        for _, tensor in named:
            hashed.update(tensor.detach().cpu().flatten().numpy().data)
        return hashed.hexdigest()

    @property
    def at(self) -> tuple[float, ...] | None:
        """The only preference that it serves, by task, on no grid; None where it serves all."""
        tensor = self.tensors.get(f".{AT}")
        return None if tensor is None else tuple(tensor.flatten().tolist())

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Of what each module has of its own, sorted."""
        return tuple(sorted({label for module, label in self._parts() if module}))

    @cached_property
    def shared(self) -> Mapping[str, Tensor]:
        """What all modules share, by label."""
        return {label: self.tensors[f".{label}"] for module, label in self._parts() if not module}

    def of(self, module: str) -> dict[str, Tensor]:
        """One module's tensors by label."""
        return {label: self.tensors[f"{module}.{label}"] for label in self.labels}

    def check(self, modules: Sequence[str], alike: Sequence[Sequence[int]]) -> None:
        """Raise BankError unless it has every label for every module, and no other module.

        `alike` are the places of modules whose tensors are stacked: they have equal shapes.
        """
        for module, label in self._parts():
            if module and module not in modules:
                raise BankError(self._of(f"{module}.{label}", "is of a module the bank has not"))
        for label in self.labels:
            for module in modules:
                if f"{module}.{label}" not in self.tensors:
                    raise BankError(self._of(f"{module}.{label}", "is missing"))
            for members in alike:
                shapes = {tuple(self.tensors[f"{modules[m]}.{label}"].shape) for m in members}
                if len(shapes) > 1:
                    first = modules[members[0]]
                    wrong = f"differs in shape from modules like it: {sorted(shapes)}"
                    raise BankError(self._of(f"{first}.{label}", wrong))

    def stacked(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """Label -> (members, ...) over modules alike; label -> the tensor itself where shared."""
        own = {
            label: torch.stack([self.tensors[f"{module}.{label}"] for module in modules])
            for label in self.labels
        }
        return {**self.shared, **own}

    def to(self, device: torch.device | str) -> "Calibration":
        """The same calibration on `device`."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def _parts(self) -> Iterator[tuple[str, str]]:
        """The module, empty where shared, and the label of every tensor."""
        for name in self.tensors:
            module, _, label = name.rpartition(".")
            yield module, label

    def _of(self, name: str, wrong: str) -> str:
        return f"the calibration for {self.method}: {name[:200]!r} {wrong}"
