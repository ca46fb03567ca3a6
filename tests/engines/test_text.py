import pytest
from transformers import PreTrainedTokenizerFast

from dynmerge.engines.text import Detokenizer, StopStrings
from tests.conftest import tiny_tokenizer

TEXT = "one model — 混ぜる skills 🦙🦙 and a ﬂag 🇫🇷, naïve"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], **options: bool) -> list[str]:
    stream = Detokenizer(tokenizer, tokenizer.encode("a preference"), **options)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_streamed_text_joins_to_the_whole_and_never_shows_half_a_character(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)  # some characters take several tokens
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_bytes_that_never_become_a_character_are_shown_in_the_end_and_cost_no_memory(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (lead,) = tokenizer.encode("🦙")[:1]
    stream = Detokenizer(tokenizer, [])
    shown = "".join(stream.push(lead) for _ in range(100)) + stream.finish()
    assert set(shown) == {"\N{REPLACEMENT CHARACTER}"}
    assert len(shown) == 100
    assert len(stream._ids) < 40


def test_an_unfinished_character_is_shown_when_the_answer_ends(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer.encode("x🦙")[:-1]
    assert "".join(pieces(tokenizer, ids)) == "x\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_skipped_unless_wanted(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    assert "".join(pieces(tokenizer, ids)) == "ab"
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "a<|im_end|>b"


def test_ids_the_tokenizer_does_not_know_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, [len(tokenizer) + 5, *tokenizer.encode("b")])) == "b"


def test_a_stop_string_is_cut_wherever_chunks_break_it() -> None:
    text = "aXaXYb and more"
    for first in range(len(text)):
        for second in range(first, len(text)):
            stops = StopStrings(["XYb", "never"], include=False)
            shown, hit = "", None
            for part in (text[:first], text[first:second], text[second:]):
                if hit is None:
                    new, hit = stops.push(part)
                    shown += new
            assert (shown, hit) == ("aXa", "XYb")


def test_what_may_begin_a_stop_string_is_held_back_and_given_in_the_end() -> None:
    stops = StopStrings(["END"], include=False)
    assert stops.push("the E") == ("the ", None)
    assert stops.push("N") == ("", None)
    assert stops.push("O E") == ("ENO ", None)
    assert stops.finish() == "E"


def test_the_earliest_and_then_the_longest_stop_string_wins_and_may_be_included() -> None:
    assert StopStrings(["cd", "b", "bc"], include=True).push("abcd") == ("abc", "bc")
    assert StopStrings([], include=True).push("abcd") == ("abcd", None)
