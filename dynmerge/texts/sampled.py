"""Sampled rows: text from the skills' own adapters, where there is no text at hand.

Temperature 1, nothing cut from the distribution, from a generator of its own: the same seed gives
the same text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dynmerge.errors import ExamplesError
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.language import room_of
from dynmerge.texts.passages import PAD
from dynmerge.texts.rows import Row
from dynmerge.texts.turns import Turns

BATCH = 16
MAX_ANSWER, MAX_PROMPT = 64, 64  # tokens
PATIENCE = 10  # times as many turns are sampled as are asked for before it is given up

Progress = Callable[[int, int], None]


def sample_answers(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Row],
    seed: int = 0,
    max_tokens: int = MAX_ANSWER,
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """The same rows; prompts that have no answer get one from the skill `task`.

    One that does not fit behind its prompt is cut off. Raises ExamplesError for a row without a
    prompt, or with one that leaves no room.
    """
    turns, model = Turns(tokenizer), _language_model(student)
    room = room_of(model)
    generator = torch.Generator(model.device).manual_seed(seed)
    open_places = [place for place, row in enumerate(rows) if row.answer is None]
    # Prompts of like length together: little padding.
    prompts = {place: _prompt(turns, rows[place], room) for place in open_places}
    order = sorted(open_places, key=lambda place: len(prompts[place]))
    answered = list(rows)
    with _alone(student, task):
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = [prompts[place] for place in chosen]
            found = sample(model, task, batch, _stops(turns), max_tokens, generator)
            for place, (tokens, ended) in zip(chosen, found, strict=True):
                text = _text(turns, tokens)
                left = room - len(prompts[place])
                # Of what is nothing but spaces at least the end can be predicted.
                whole = (ended or not text) and len(turns.answer(text)) <= left
                answered[place] = replace(rows[place], answer=text, ended=whole)
            progress(min(start + BATCH, len(order)), len(order))
    return answered


def sample_texts(
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    count: int,
    seed: int = 0,
    max_tokens: int = MAX_PROMPT + MAX_ANSWER,
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """`count` rows that the skill `task` makes up, both turns of them; no text is needed.

    With a chat template the model speaks the user's turn, then answers it. Without one, it speaks
    from what starts a text. `max_tokens` are of both turns together. Raises ExamplesError where
    what it says is empty again and again.
    """
    turns, model = Turns(tokenizer), _language_model(student)
    generator = torch.Generator(model.device).manual_seed(seed)
    asked = max_tokens // 2 if turns.templated else max_tokens
    opening, rows, tries = turns.opening(), list[Row](), 0
    with _alone(student, task):
        while len(rows) < count:
            if tries >= PATIENCE * max(count, BATCH):
                raise ExamplesError(f"the skill {task!r} says nothing by itself: give texts")
            batch = [opening] * min(BATCH, count - len(rows))
            tries += len(batch)
            spoken = sample(model, task, batch, _stops(turns), asked, generator)
            texts = [_text(turns, tokens) for tokens, _ in spoken]
            rows += [_row(turns, text) for text in texts if _says_something(turns, text)]
            progress(len(rows), count)
    if not turns.templated:
        return rows
    return sample_answers(student, tokenizer, task, rows, seed + 1, max_tokens - asked)


def sample(
    model: PreTrainedModel,
    task: str,
    prompts: Sequence[Sequence[int]],
    stops: frozenset[int],
    max_tokens: int,
    generator: torch.Generator,
) -> list[tuple[list[int], bool]]:
    """For each prompt, what follows it and whether it ended within `max_tokens`.

    The model carries the skill `task`. Raises ExamplesError where its predictions are no numbers.
    """
    width = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in prompts], device=device)
    lengths = torch.tensor([[len(row)] for row in prompts], device=device)
    positions = torch.arange(width, device=device) - (width - lengths)
    mask = (positions >= 0).long()
    cache = DynamicCache(config=model.config)
    said: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with torch.no_grad():
        while len(said) < max_tokens and not ended.all():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chances = logits.float().softmax(-1)
            if not chances.isfinite().all():
                raise ExamplesError(f"the skill {task!r} predicts NaN: its adapter is too large")
            ids = torch.multinomial(chances, 1, generator=generator)
            said.append(ids[:, 0])
            ended |= torch.isin(ids[:, 0], torch.tensor(sorted(stops), device=device))
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return [_until(row, stops) for row in torch.stack(said, dim=1).tolist()]


def _until(tokens: list[int], stops: frozenset[int]) -> tuple[list[int], bool]:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return (tokens, False) if end is None else (tokens[:end], True)


@contextmanager
def _alone(student: Student, task: str) -> Iterator[None]:
    """The student under one skill's own adapter. Raises PreferenceError for one not known."""
    preference = Preference.of({task: 1.0})
    preference.require(student.bank.names, "task")
    recipe = Recipe(preference, default_method(), student.bank.digest)
    with student.carrying(merge(student.bank, recipe)):
        yield


def _language_model(student: Student) -> PreTrainedModel:
    if not isinstance(student.model, PreTrainedModel):
        raise ExamplesError(f"a {type(student.model).__name__} does not speak")
    return student.model


def _stops(turns: Turns) -> frozenset[int]:
    ends = (turns.end, turns.tokenizer.eos_token_id)
    return frozenset(end for end in ends if isinstance(end, int))


def _text(turns: Turns, tokens: list[int]) -> str:
    return str(turns.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _prompt(turns: Turns, row: Row, room: int) -> list[int]:
    if row.prompt is None:
        raise ExamplesError(f"{row.place} has no prompt to answer")
    prompt = turns.prompt(row.prompt)
    if len(prompt) >= room:
        raise ExamplesError(
            f"{row.place} is {len(prompt)} tokens; at most {room} are taken, with an answer"
        )
    return prompt


def _says_something(turns: Turns, text: str) -> bool:
    """Whether there is something to answer, or without turns something to predict."""
    return bool(text) and (turns.templated or len(turns.text(text)) > 1)


def _row(turns: Turns, text: str) -> Row:
    return Row(prompt=text) if turns.templated else Row(text=text)
