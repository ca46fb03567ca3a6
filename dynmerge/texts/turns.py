"""Turns: prompts and answers as tokens, in the model's chat template as the server renders them.

A tokenizer without a template takes a prompt as it is, with the special tokens it always adds.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dynmerge.errors import ExamplesError

# Stands for what a speaker says; no template trims letters or digits.
USER, ASSISTANT = "8f0c2userb71", "8f0c2modelb71"


@dataclass(frozen=True)
class Turns:
    """How a conversation of one question is written with this tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def templated(self) -> bool:
        """Whether there is a chat template."""
        return self.tokenizer.chat_template is not None

    def prompt(self, text: str) -> list[int]:
        """A user's words up to where the answer begins."""
        if not self.templated:
            return self._ids(text, special=True)
        return self._ids(self._render(text))

    def answer(self, text: str, *, ended: bool = True) -> list[int]:
        """An answer's tokens, with the one that ends it unless it was cut off."""
        end = self.end if ended else None
        return self._ids(text) + ([] if end is None else [end])

    def text(self, text: str) -> list[int]:
        """A plain text, with the special tokens that the tokenizer adds to any."""
        return self._ids(text, special=True)

    @property
    def end(self) -> int | None:
        """What ends an answer: what the template puts after it if special, else the tokenizer's."""
        after = self._after_answer() if self.templated else []
        if after and after[0] in self.tokenizer.all_special_ids:
            return after[0]
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else None

    def opening(self) -> list[int]:
        """All that stands before a user's first word. Without a template, what starts a text.

        Raises ExamplesError where that is nothing: a model cannot speak from no token.
        """
        if self.templated:
            return self._ids(self._render(USER).partition(USER)[0])
        ids = self._ids("", special=True)
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        if not ids and not isinstance(start, int):
            raise ExamplesError("the tokenizer has no token to start a text with: give texts")
        return ids or [int(start)]

    def _after_answer(self) -> list[int]:
        said = [
            {"role": "user", "content": USER},
            {"role": "assistant", "content": ASSISTANT},
        ]
        whole = str(self.tokenizer.apply_chat_template(said, tokenize=False))
        return self._ids(whole.partition(ASSISTANT)[2])

    def _render(self, text: str) -> str:
        said = [{"role": "user", "content": text}]
        return str(
            self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        )

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return [int(id) for id in self.tokenizer.encode(text, add_special_tokens=special)]
