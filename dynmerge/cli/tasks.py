"""Tasks: the YAML file that says which examples each skill is evaluated on."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dynmerge.errors import ConfigError

# What is asked for under each key of a task.
WANTED = {
    "file": "it is a path, in quotes if need be",
    "labels": "it is a list of words, in quotes if need be",
    "limit": "it is a whole number from 1",
}


class Task(BaseModel):
    """A skill's examples: `file`, beside the tasks' own; `labels` if answers are labels; at most
    `limit` rows, the first ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    labels: list[str] | None = None
    limit: int | None = Field(default=None, ge=1, strict=True)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset; a key that stands there twice is an error, not the last of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader."""
        words = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for word in words:
            if words.count(word) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{word} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_tasks(path: Path) -> dict[str, Task]:
    """Skill -> its task. Raises ConfigError naming the file and the key."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    # The last two of dates that are none, and of what is nested without end.
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {reason}") from None
    try:
        tasks = TypeAdapter(dict[str, Task]).validate_python(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explained(error)}") from None
    if not tasks:
        raise ConfigError(f"{path} names no skill")
    try:
        return {skill: _placed(task, path.parent) for skill, task in tasks.items()}
    except RuntimeError as error:  # ~USER, where there is no such user
        raise ConfigError(f"{path}: {error}") from None


def _placed(task: Task, folder: Path) -> Task:
    return task.model_copy(update={"file": folder / task.file.expanduser()})


def _explained(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=True)[0]
    skill, *rest = first["loc"] or ("the file",)
    where, given = ".".join(map(str, (skill, *rest))), first["input"]
    if rest == ["[key]"]:
        return f"the skill {skill} is no text to YAML; put it in quotes"
    if first["type"] == "extra_forbidden":
        return f"{where}: no such key (known: {', '.join(Task.model_fields)})"
    if rest and first["type"] != "missing":
        return f"{where}: YAML reads {given!r} there; {WANTED[str(rest[0])]}"
    return f"{where}: write SKILL: {{file: FILE}}"
