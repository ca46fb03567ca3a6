"""`dynmerge evaluate`: every skill's accuracy under methods and preferences, with intervals."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.outline import Outline
from dynmerge.bank.plot import save_figure
from dynmerge.bank.storage import load_bank
from dynmerge.cli.console import line, progress_bar, table
from dynmerge.cli.student import examples_for, open_student
from dynmerge.cli.tasks import Task, read_tasks
from dynmerge.errors import ConfigError
from dynmerge.evaluation.curves import draw_curves, draw_front
from dynmerge.evaluation.results import Results
from dynmerge.evaluation.scores import check_samples, evaluate
from dynmerge.evaluation.simplex import corners, even_grid, uniform
from dynmerge.merging.choice import parse_method
from dynmerge.merging.demands import default_for
from dynmerge.offer import Offer
from dynmerge.preference import Preference
from dynmerge.recipe import MethodChoice, Recipe
from dynmerge.texts.rows import Row, check_answered, check_labels, check_rows, read_texts

METHODS, PREFERENCES = "--methods", "--preferences"
WORD = re.compile(r"uniform|corners|grid:(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to evaluate, as it was asked for. No methods: the one that serves where nobody chose."""

    methods: Sequence[str]
    preferences: Sequence[str]
    samples: int
    seed: int
    batch: int


def run(
    bank_folder: Path, tasks_file: Path, output: Path, base: str | None, wanted: Wanted
) -> None:
    """Evaluate, print the tables and write them, the numbers and the figures into `output`."""
    tasks = read_tasks(tasks_file)
    bank = load_bank(bank_folder)
    _check_skills(bank, tasks, tasks_file)
    recipes = recipes_of(bank, list(tasks), wanted)
    check_samples(wanted.samples, len(recipes), len(tasks))
    rows = {skill: _rows(task, f"{tasks_file}: {skill}") for skill, task in tasks.items()}
    _check_output(output)
    student, loaded = open_student(bank_folder, bank, base)
    examples = {
        skill: examples_for(loaded, skill, rows[skill], task.labels)
        for skill, task in tasks.items()
    }
    _make(output)
    with progress_bar() as start:
        evaluation = evaluate(student, examples, recipes, wanted.batch, start("evaluating"))
    student.close()
    results = Results.of(
        evaluation, examples, bank.base.name, bank.digest, wanted.samples, wanted.seed
    )
    _write(results, output)
    table(*results.merge_table())
    line()
    table(*results.method_table())
    line()
    line(str(output))


def recipes_of(bank: FactorBank, skills: Sequence[str], wanted: Wanted) -> list[Recipe]:
    """Every method at every preference. Raises MethodError, PreferenceError or ConfigError."""
    offer = Offer(Outline.of_bank(bank))
    chosen = [method for text in wanted.methods for method in _methods(text)]
    preferences = [
        preference for text in wanted.preferences for preference in _preferences(text, skills)
    ]
    recipes = [
        offer.recipe(preference, method, PREFERENCES, METHODS)
        for method in chosen or [default_for(bank)]
        for preference in preferences
    ]
    return list(dict.fromkeys(recipes))


def _methods(text: str) -> list[MethodChoice]:
    """`linear, ties; density=0.3`: separated by spaces or commas, but for spaces after a `;`."""
    items = [item for item in re.split(r"[,\s]+", re.sub(r";\s+", ";", text)) if item]
    if not items:
        raise ConfigError(f"{METHODS}: {text!r} names none; leave it out for what the bank serves")
    return [parse_method(item, METHODS) for item in items]


def _preferences(text: str, skills: Sequence[str]) -> list[Preference]:
    """Words for several, separated by spaces or commas, or one preference."""
    words = [WORD.fullmatch(item) for item in re.split(r"[,\s]+", text.strip())]
    if not all(words):
        return [Preference.parse(text, allow_negative=True, source=PREFERENCES)]
    return [found for word in words if word for found in _of_word(word, skills)]


def _of_word(word: re.Match[str], skills: Sequence[str]) -> list[Preference]:
    if word[1] is not None:
        return even_grid(skills, int(word[1]))
    return corners(skills) if word[0] == "corners" else [uniform(skills)]


def _check_skills(bank: FactorBank, tasks: Mapping[str, Task], file: Path) -> None:
    for skill in tasks:
        if skill not in bank.names:
            known = ", ".join(bank.names)
            raise ConfigError(f"{file}: no skill named {skill!r} (known: {known})")


def _check_output(output: Path) -> None:
    """Before the model is loaded, and without making it: what is refused leaves nothing."""
    there = next(place for place in _upwards(output) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"{output} cannot be a folder: {there} is none")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"cannot write into {output}: {there} is not writable")


def _upwards(place: Path) -> Sequence[Path]:
    return (place.absolute(), *place.absolute().parents)


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be a folder: {error.strerror}") from error


def _rows(task: Task, source: str) -> Sequence[Row]:
    """Of a task's file, what is evaluated."""
    if task.labels is not None:
        check_labels(task.labels, source)
    rows = read_texts(task.file)[: task.limit]
    check_rows(rows, task.labels)
    check_answered(rows)
    return rows


def _write(results: Results, output: Path) -> None:
    try:
        (output / "results.json").write_text(results.to_json() + "\n", encoding="utf-8")
        (output / "results.md").write_text(results.to_markdown(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write into {output}: {error.strerror}") from error
    save_figure(draw_curves(results), output / "curves.png")
    save_figure(draw_front(results), output / "front.png")
