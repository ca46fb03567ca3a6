from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dynmerge.engines.engine import Sampling, Token
from dynmerge.engines.transformers.sampling import Draw, nucleus, sample
from dynmerge.errors import RequestError

VOCABULARY = 40
GREEDY = Sampling(max_tokens=9, temperature=0.0)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3


def draw(
    sampling: Sampling, generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2)
) -> Draw:
    made = Draw(sampling, prompt, frozenset({0}))
    for token in generated:
        made.accept(token)
    return made


def order(logits: Tensor) -> list[int]:
    return logits.argsort(descending=True).tolist()


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone(logits: Tensor) -> None:
    before = logits.clone()
    (token,) = sample([draw(GREEDY)], logits[None])
    assert token == Token(order(before)[0])
    assert torch.equal(logits, before)


def test_masks_and_bias_decide_what_is_left(logits: Tensor) -> None:
    best = order(logits)
    allowed = replace(GREEDY, allowed_token_ids=(best[5], best[9]))
    assert draw(allowed).choose(logits.clone()) == best[5]
    bias = replace(GREEDY, logit_bias={best[0]: -100.0, best[7]: 100.0})
    assert draw(bias).choose(logits.clone()) == best[7]
    bad = replace(GREEDY, bad_words=((best[0],), (best[3], best[1])))
    assert draw(bad).choose(logits.clone()) == best[1]
    assert draw(bad, generated=(best[3],)).choose(logits.clone()) == best[2]


def test_min_tokens_keeps_the_end_away(logits: Tensor) -> None:
    logits[0] = 99.0
    longer = replace(GREEDY, min_tokens=2)
    assert draw(longer, generated=(5,)).choose(logits.clone()) == order(logits)[1]
    assert draw(longer, generated=(5, 6)).choose(logits.clone()) == 0


@pytest.mark.parametrize("seed", range(3))
def test_penalties_are_those_of_vllm(seed: int) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    prompt, generated = (1, 2, 3), (3, 4, 4, 5)
    sampling = replace(GREEDY, repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=-0.3)
    expected = logits.clone()
    for token in {*prompt, *generated}:
        expected[token] *= 1 / 1.7 if expected[token] > 0 else 1.7
    for token, count in Counter(generated).items():
        expected[token] -= 0.4 * count - 0.3
    made = draw(sampling, prompt=prompt)
    for token in generated:
        made.choose(logits.clone())
        made.accept(token)
    torch.testing.assert_close(made._penalised(made._masked(logits.clone())), expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (7, 0.5), (0, 1e-9), (99, 0.99)])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_k: int, top_p: float) -> None:
    weights = torch.softmax(
        torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)), dim=0
    )
    kept, ids = nucleus(weights, top_k, top_p)
    ranked = sorted(range(VOCABULARY), key=lambda token: -weights[token])[: top_k or None]
    total, expected = sum(weights[token] for token in ranked), []
    for token in ranked:
        if sum(weights[kept] for kept in expected) < top_p * total:
            expected.append(token)
    assert [int(token) for token, weight in zip(ids, kept, strict=True) if weight > 0] == expected


def test_a_nucleus_wider_than_the_first_look_is_still_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynmerge.engines.transformers.sampling.NUCLEUS", 3)
    kept, _ = nucleus(torch.full((VOCABULARY,), 1 / VOCABULARY), 0, 0.5)
    assert int((kept > 0).sum()) == VOCABULARY // 2


def test_samples_follow_the_distribution_that_is_left(logits: Tensor) -> None:
    sampling = Sampling(max_tokens=1, temperature=0.7, top_k=4, min_p=0.05, seed=11)
    made = draw(sampling)
    counts = Counter(made.choose(logits.clone()) for _ in range(4000))
    weights = torch.softmax(logits / 0.7, dim=0)
    weights[weights < 0.05 * weights.max()] = 0
    weights[order(weights)[4:]] = 0
    weights /= weights.sum()
    assert set(counts) == set(weights.nonzero()[:, 0].tolist())
    for token, count in counts.items():
        assert abs(count / 4000 - weights[token]) < 0.03


def test_a_seed_repeats_and_no_seed_does_not(logits: Tensor) -> None:
    def twelve(seed: int | None) -> list[int]:
        made = draw(Sampling(max_tokens=12, temperature=2.0, seed=seed))
        return [made.choose(logits.clone()) for _ in range(12)]

    assert twelve(4) == twelve(4) != twelve(5)
    assert twelve(None) != twelve(None)


def test_logprobs_are_of_the_untouched_logits(logits: Tensor) -> None:
    best = order(logits)
    sampling = replace(GREEDY, logprobs=3, logit_bias={best[4]: 100.0})
    plain, biased = sample(
        [draw(replace(GREEDY, logprobs=0)), draw(sampling)], torch.stack([logits, logits])
    )
    expected = torch.log_softmax(logits, dim=0)
    assert isinstance(plain, Token)
    assert isinstance(biased, Token)
    assert (plain.id, plain.top) == (best[0], ())
    assert plain.logprob == pytest.approx(float(expected[best[0]]))
    assert biased.id == best[4]
    assert biased.logprob == pytest.approx(float(expected[best[4]]))
    assert [token for token, _ in biased.top] == best[:3]


def test_a_row_that_fails_harms_no_other(logits: Tensor) -> None:
    rows = torch.stack([logits, logits, logits])
    rows[0, 3] = torch.nan
    none_left = replace(GREEDY, allowed_token_ids=(5,), bad_words=((5,),))
    broken, stuck, fine = sample([draw(GREEDY), draw(none_left), draw(GREEDY)], rows)
    assert isinstance(broken, RuntimeError)
    assert isinstance(stuck, RequestError)
    assert "allowed_token_ids and bad_words" in str(stuck)
    assert fine == Token(order(logits)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_overflows_is_an_error_and_never_a_token(logits: Tensor, temperature: float) -> None:
    wild = replace(GREEDY, repetition_penalty=1e-38, temperature=temperature)
    seen = tuple(range(VOCABULARY))
    (failed,) = sample([draw(wild, prompt=seen)], logits[None])
    assert isinstance(failed, RequestError)
