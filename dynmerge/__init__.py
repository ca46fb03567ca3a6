"""dynmerge: serve many LoRA skills of one base model as one model whose mix each request chooses.

Preferences, recipes and errors are here, light to import; what holds tensors is in its own module
(`dynmerge.bank`, `dynmerge.merging`, `dynmerge.runtime`).
"""

from importlib.metadata import version

from dynmerge.errors import (
    AdapterError,
    BankError,
    BaseModelError,
    ConfigError,
    DynmergeError,
    EngineDead,
    ExamplesError,
    MethodError,
    Overloaded,
    PreferenceError,
    PromptTooLong,
    RequestError,
    UnknownModel,
)
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe

__version__ = version("dynmerge")

__all__ = [
    "AdapterError",
    "BankError",
    "BaseModelError",
    "ConfigError",
    "DynmergeError",
    "EngineDead",
    "ExamplesError",
    "MethodChoice",
    "MethodError",
    "Overloaded",
    "Preference",
    "PreferenceError",
    "PromptTooLong",
    "Recipe",
    "RequestError",
    "UnknownModel",
    "__version__",
]
