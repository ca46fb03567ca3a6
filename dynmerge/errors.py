"""Every error dynmerge raises on purpose. Knows nothing of HTTP: the server has the statuses.

DynmergeError
├── RequestError        what the caller sent cannot be served; `param` names the field
│   ├── PreferenceError a preference malformed, out of range, or of an unknown skill
│   ├── MethodError     an unknown merge method, or parameters it does not take
│   ├── UnknownModel    neither the base model, a skill, a preset, nor BASE@preference
│   ├── PromptTooLong   prompt, or prompt and tokens asked for, do not fit the context
│   ├── UnknownRequest  feedback on a request that was not logged
│   ├── OutcomeConflict feedback under an id that is known with other content
│   └── ExperimentError an experiment that cannot be declared, changed or joined so
│       └── UnknownExperiment   no experiment has that name
├── AdapterError        an adapter the gate refuses, with the reason
├── BaseModelError      a base model missing, unreadable or of an unsupported kind
├── BankError           a bank missing, truncated, edited or for another base model
├── ExamplesError       examples missing, unreadable or unfit for what is asked of them
├── CalibrationError    nothing to learn, or nothing learned that is better than the start
│   └── StateError      what was kept of a training is damaged, or does not fit it
├── ConfigError         an unknown key in a configuration, or a value out of range
├── LogError            the log of experiments cannot be read or written now
├── Unavailable         what this server was not set up for
├── Overloaded          the queue or the merge cache is full; worth trying again
│   └── Abandoned       a merge that nobody waited for any more
└── EngineDead          the engine stopped and could not be restarted
"""


class DynmergeError(Exception):
    """The root: catch this to catch everything dynmerge raises on purpose."""


class RequestError(DynmergeError):
    """What the caller sent cannot be served; `param` names the offending field or header."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PreferenceError(RequestError):
    """A preference that is malformed, out of range, or names an unknown skill."""


class MethodError(RequestError):
    """An unknown merge method, or parameters it does not take."""


class UnknownModel(RequestError):
    """A model name that is not served."""


class PromptTooLong(RequestError):
    """The prompt, or the prompt and the tokens asked for, do not fit the context."""


class UnknownRequest(RequestError):
    """Feedback on a request that is not in the log of experiments."""


class OutcomeConflict(RequestError):
    """Feedback under an id that is known with other content; what came first counts."""


class ExperimentError(RequestError):
    """An experiment that cannot be declared, changed or joined as somebody wants to."""


class UnknownExperiment(ExperimentError):
    """A name that no experiment has."""


class AdapterError(DynmergeError):
    """An adapter the gate refuses, with the reason."""


class BaseModelError(DynmergeError):
    """A base model that is missing, unreadable, or of a kind dynmerge cannot serve."""


class BankError(DynmergeError):
    """A bank that is missing, truncated, edited, or made for another base model."""


class ExamplesError(DynmergeError):
    """Examples of a skill that are missing, unreadable, or unfit for what is asked of them."""


class CalibrationError(DynmergeError):
    """A calibration of what learns nothing, or one that is no better than what it began with."""


class StateError(CalibrationError):
    """What was kept of a training that was stopped is damaged, or is not of this training."""


class ConfigError(DynmergeError):
    """A configuration with an unknown key or a value out of range."""


class LogError(DynmergeError):
    """The log of experiments cannot be read or written now, or has no room for a record."""


class Unavailable(DynmergeError):
    """Something that this server lacks the settings or the libraries for."""


class Overloaded(DynmergeError):
    """No room now, in the queue or in the merge cache; the same request may succeed later."""


class Abandoned(Overloaded):
    """A merge that was given up because nobody waited for it; one who just came may ask again."""


class EngineDead(DynmergeError):
    """The engine stopped and could not be restarted."""
