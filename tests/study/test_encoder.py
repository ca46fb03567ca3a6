"""The encoder suite without its downloads: splits, pooling, predictions, training's starts."""

import random
from collections import Counter

import torch
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from dynmerge.texts.examples import Examples
from study.encoder import EncoderExamples, embed, pooled
from study.encoder_tasks import Row, interleaved, split_rows
from study.encoder_training import batches

TOKENS = [[2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 10, 11, 3]]
SIZES = {"train": 30, "calibration": 10, "validation": 10, "test": 40}


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return BertModel(config).eval()


def tiny_examples(
    encoder: torch.nn.Module,
    labels: tuple[int, ...] = (0, 1, 1),
    classes: tuple[str, ...] = ("no", "yes"),
) -> EncoderExamples:
    chosen = [Row(str(label), f"text {n}", label) for n, label in enumerate(labels)]
    head = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    return EncoderExamples(encoder, head, classes, chosen, TOKENS)


def many_rows(classes: int, count: int) -> list[Row]:
    return [Row(f"key {n % (count - 5)}", f"text {n}", n % classes) for n in range(count)]


def test_no_key_is_in_two_splits_whatever_the_order_of_the_rows() -> None:
    rows = many_rows(3, 200)
    splits = split_rows(rows, SIZES)
    keys = [row.key for chosen in splits.values() for row in chosen]
    assert len(keys) == len(set(keys)) == sum(SIZES.values())
    assert split_rows(rows[::-1], SIZES) == splits


def test_splits_are_balanced_where_rows_suffice() -> None:
    for chosen in split_rows(many_rows(2, 400), SIZES).values():
        counts = Counter(row.label for row in chosen)
        assert abs(counts[0] - counts[1]) <= 1


def test_the_last_split_gets_what_is_left_with_all_classes_in_it() -> None:
    rows = [Row(str(n), str(n), int(n % 4 == 0)) for n in range(80)]
    test = split_rows(rows, SIZES)["test"]  # 20 of the rare class and 45 of the other: 65 - 50
    assert len(test) == 15
    assert 4 <= sum(row.label for row in test) <= 6


def test_of_one_key_the_same_row_is_kept_in_any_order() -> None:
    rows = [Row("page", f"text {n}", n % 2) for n in range(6)]
    assert len(interleaved(rows, 6)) == 1
    assert interleaved(rows, 6) == interleaved(rows[::-1], 6)


def test_pooling_is_the_mean_of_the_tokens_that_are_not_padding() -> None:
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert_close(pooled(states, mask), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    encoder = tiny_bert()
    with torch.no_grad():
        together = embed(encoder, TOKENS)
        alone = torch.cat([embed(encoder, [tokens]) for tokens in TOKENS])
    assert_close(together, alone)
    assert_close(together.norm(dim=-1), torch.ones(3))


def test_each_text_gives_one_prediction_in_the_order_asked() -> None:
    asked: Examples = tiny_examples(tiny_bert())
    targets = asked.targets([2, 0])
    assert (len(asked), asked.counts([2, 0])) == (3, [1, 1])
    assert targets is not None
    assert targets.tolist() == [1, 0]
    with torch.no_grad():
        assert_close(asked.logits([2, 0]), asked.logits([0, 1, 2])[[2, 0]])


def test_the_digest_names_the_texts_their_classes_and_the_classes_words() -> None:
    encoder = tiny_bert()
    assert tiny_examples(encoder).digest == tiny_examples(encoder).digest
    assert tiny_examples(encoder).digest != tiny_examples(encoder, (0, 1, 0)).digest
    assert tiny_examples(encoder).digest != tiny_examples(encoder, classes=("bad", "good")).digest


def test_an_epoch_asks_every_row_once() -> None:
    asked = tiny_examples(tiny_bert())
    made = batches({"a": asked, "b": asked}, random.Random(0))
    assert sorted(task for task, _ in made) == ["a", "b"]
    assert all(sorted(rows) == [0, 1, 2] for _, rows in made)
