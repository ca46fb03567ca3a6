"""The production engine: dynmerge inside unmodified vLLM, as its plug-in.

`register` is what vLLM calls in each of its processes. It replaces one name, the class of the LoRA
manager that a model runner makes, by one that makes ours where `--additional-config` says so.
"""


def register() -> None:
    """Take the LoRA manager's place. Raises ConfigError on a vLLM that dynmerge does not know."""
    from dynmerge.engines.vllm import seams

    seams.check_seams()
    seams.replace_manager()
