"""Logs: what dynmerge has to say, said where vLLM says it."""

import logging

OURS, THEIRS = "dynmerge", "vllm"


def speak_as_vllm() -> None:
    """Write dynmerge's log where vLLM writes its own, from the same level on."""
    ours, theirs = logging.getLogger(OURS), logging.getLogger(THEIRS)
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    ours.setLevel(theirs.getEffectiveLevel())
    ours.propagate = not ours.handlers
    # A server's own set-up of logging may have silenced what was there before.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == OURS and isinstance(logger, logging.Logger):
            logger.disabled = False
