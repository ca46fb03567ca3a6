"""OSRM's start of a training: its three forms, against dense twins, and as PEFT carries it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from dynmerge.calibration import osrm
from dynmerge.calibration.moments import LayerMoments, Moments, collect
from dynmerge.errors import AdapterError, ConfigError
from tests import reference

D = 24
RANK = 3


def random_texts(sizes: Sequence[int], seed: int, shift: float = 0.5) -> list[Tensor]:
    """A task's texts as layer inputs (tokens, D): off centre, and not alike in every direction."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, D, dtype=torch.float64)
    draw = [torch.randn(size, D, generator=generator, dtype=torch.float64) for size in sizes]
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    return [shift + (text * scale) @ turn for text in draw]


def moments_of(task: Sequence[Tensor], name: str = "up") -> Moments:
    H = torch.cat(list(task))
    total = torch.stack([text.mean(0) for text in task]).sum(0)
    return Moments({name: LayerMoments(H.mT @ H, total, len(H), len(task))})


MANY = [random_texts(sizes, seed) for seed, sizes in enumerate([[30, 9], [8, 50, 7], [41]])]
FEW = [random_texts(sizes, seed) for seed, sizes in enumerate([[4, 5], [3, 4, 2]])]


def projector(A: Tensor) -> Tensor:
    return A.mT @ A


@pytest.mark.parametrize("form", osrm.FORMS)
def test_rows_are_orthonormal(form: str) -> None:
    A = osrm.initialise([moments_of(task) for task in MANY], RANK, form)["up"]
    assert A.shape == (RANK, D)
    assert_close(A @ A.mT, torch.eye(RANK, dtype=torch.float64))


def test_cov_is_the_dense_minimiser() -> None:
    A = osrm.initialise([moments_of(task) for task in MANY], RANK)["up"]
    assert_close(projector(A), projector(reference.osrm_cov(MANY, RANK)))


def test_cov_takes_the_smallest_eigenvalues_never_the_largest() -> None:
    A = osrm.initialise([moments_of(task) for task in MANY], RANK)["up"]
    S = reference.osrm_second_moment(MANY)
    trace = float((A @ S @ A.mT).trace())
    assert trace == pytest.approx(float(torch.linalg.eigvalsh(S)[:RANK].sum()), rel=1e-9)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other = torch.linalg.qr(torch.randn(D, RANK, generator=generator, dtype=S.dtype)).Q.mT
        assert trace < float((other @ S @ other.mT).trace())


def test_cov_leaves_the_others_nothing_where_their_tokens_leave_room() -> None:
    tokens = torch.cat([text for task in FEW for text in task])
    assert len(tokens) <= D - RANK
    A = osrm.initialise([moments_of(task) for task in FEW], RANK)["up"]
    # The gram squares the singular values: half of float64's digits are left.
    assert_close(A @ tokens.mT, torch.zeros(RANK, len(tokens), dtype=A.dtype), rtol=0, atol=1e-7)


def test_every_other_task_counts_the_same_however_long() -> None:
    once = [moments_of(task) for task in MANY]
    often = [moments_of(list(MANY[0]) * 5), *once[1:]]
    assert_close(
        projector(osrm.initialise(often, RANK)["up"]), projector(osrm.initialise(once, RANK)["up"])
    )


@pytest.mark.parametrize("form", ["mean", "null"])
def test_the_others_means_are_in_the_null_space_of_both_mean_forms(form: str) -> None:
    others = [moments_of(task) for task in MANY]
    A = osrm.initialise(others, RANK, form)["up"]
    for task in others:
        assert_close(A @ task.layers["up"].mean, torch.zeros(RANK, dtype=A.dtype))


def test_mean_is_the_released_codes_whose_n_minus_one_does_not_matter() -> None:
    # n / (n - 1) stretches each mean along itself: neither the null space of the means nor, with
    # one n for all, any singular vector is another.
    others = [random_texts([5, 9, 7], seed) for seed in range(3)]
    A = osrm.initialise([moments_of(task) for task in others], RANK, "mean")["up"]
    assert_close(projector(A), projector(reference.osrm_mean(others, RANK)))
    uneven = [random_texts(sizes, seed) for seed, sizes in enumerate([[5, 9], [4, 3, 3, 8]])]
    released = reference.osrm_mean(uneven, RANK)
    for task in uneven:
        mean = moments_of(task).layers["up"].mean
        assert_close(released @ mean, torch.zeros(RANK, dtype=mean.dtype))


def test_null_differs_by_seed_and_layer_and_by_nothing_else() -> None:
    others = [Moments({**moments_of(t, "up").layers, **moments_of(t, "q").layers}) for t in MANY]
    one = osrm.initialise(others, RANK, "null", seed=1)
    again = osrm.initialise(others[::-1], {"q": RANK, "up": RANK}, "null", seed=1)
    two = osrm.initialise(others, RANK, "null", seed=2)
    assert_close(again["up"], one["up"])
    assert osrm.overlap(one["up"], two["up"]) < 0.5
    assert osrm.overlap(one["up"], one["q"]) < 0.5


def test_null_holds_where_means_depend_on_each_other() -> None:
    twins = [moments_of(MANY[0]), moments_of(MANY[0]), moments_of(MANY[1])]
    room = D - 2  # two different means among three tasks
    A = osrm.initialise(twins, room, "null")["up"]
    assert_close(A @ A.mT, torch.eye(room, dtype=A.dtype))
    with pytest.raises(ConfigError, match=f"up: rank {room + 1} is not within 1 to {room}"):
        osrm.initialise(twins, room + 1, "null")


def test_initialise_names_what_is_wrong() -> None:
    others = [moments_of(task) for task in MANY]
    with pytest.raises(ConfigError, match=r"'largest' \(known: cov, mean, null\)"):
        osrm.initialise(others, RANK, "largest")
    with pytest.raises(ConfigError, match="at least one other task"):
        osrm.initialise([], RANK)
    with pytest.raises(ConfigError, match=r"'down' \(known: up\)"):
        osrm.initialise(others, {"down": 2})
    for rank in (0, D + 1):
        with pytest.raises(ConfigError, match=f"up: rank {rank} is not within 1 to {D}"):
            osrm.initialise(others, rank)
    narrow = [moments_of([text[:, :5] for text in MANY[0]]), others[0]]
    with pytest.raises(ConfigError, match=rf"up reads \[5, {D}\]"):
        osrm.initialise(narrow, RANK)
    for wrong in (float("nan"), float("inf")):
        spoilt = [*others, moments_of([MANY[0][0] * wrong])]
        for form in osrm.FORMS:
            with pytest.raises(ConfigError, match="up: a task's moments hold NaN or infinity"):
                osrm.initialise(spoilt, RANK, form)


def test_cross_activation_is_the_mean_square_over_tokens() -> None:
    A = torch.randn(RANK, D, generator=torch.Generator().manual_seed(0))
    squares = [float((A.double() @ h).square().sum()) for text in MANY[1] for h in text]
    measured = osrm.cross_activation(A, moments_of(MANY[1]).layers["up"])
    assert measured == pytest.approx(sum(squares) / len(squares))


def test_overlap_is_one_for_the_same_rows_and_zero_for_orthogonal_ones() -> None:
    axes = torch.eye(D)
    assert osrm.overlap(axes[:3], 2 * axes[:3].flip(0)) == pytest.approx(1)
    assert osrm.overlap(axes[:3], axes[3:5]) == pytest.approx(0)
    assert osrm.overlap(axes[:4], axes[2:6]) == pytest.approx(0.5)


# --- in a PEFT model

TEXTS = {
    "ada": [[5, 9, 200, 31, 7], [40, 41, 42]],
    "bob": [[300, 12, 13, 14, 15, 16, 17], [77, 3], [8, 8, 9]],
    "cyd": [[101, 102, 103, 104]],
}
CONFIG = LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "down_proj"],
    rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 5},
)


def padded(texts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def collected(model: PreTrainedModel) -> dict[str, Moments]:
    return {
        task: collect(model, [padded(texts)], ["q_proj", "down_proj"])
        for task, texts in TEXTS.items()
    }


@pytest.mark.parametrize("form", osrm.FORMS)
def test_a_training_starts_at_the_base_model_bit_for_bit(
    base_model: PreTrainedModel, form: str
) -> None:
    batch = padded([[1, 2, 3, 4], [60, 61]])
    before = base_model(**batch).logits
    moments = collected(base_model)
    peft_model: Any = get_peft_model(base_model, CONFIG)
    A = osrm.initialise([moments["bob"], moments["cyd"]], osrm.ranks(peft_model), form)
    osrm.apply(peft_model, A)
    assert torch.equal(peft_model(**batch).logits, before)
    layer = peft_model.base_model.model.model.layers[1].self_attn.q_proj
    assert_close(layer.lora_A["default"].weight, A["model.layers.1.self_attn.q_proj"].float())
    assert not layer.lora_B["default"].weight.any()


def test_ranks_follow_the_rank_pattern(base_model: PreTrainedModel) -> None:
    moments = collected(base_model)
    ranks = osrm.ranks(get_peft_model(base_model, CONFIG))
    assert ranks == {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.down_proj": 5,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.mlp.down_proj": 5,
    }
    A = osrm.initialise([moments["ada"]], ranks)
    assert {name: len(rows) for name, rows in A.items()} == ranks


def test_the_others_texts_do_not_reach_the_first_steps_update(base_model: PreTrainedModel) -> None:
    """Nine other tokens leave room: A h = 0, so that whatever B learns first is silent on them."""
    name = "model.layers.1.mlp.down_proj"
    moments = collected(base_model)
    A = osrm.initialise([moments["ada"], moments["cyd"]], {name: 5})[name]
    for task in ("ada", "cyd"):
        H = torch.cat(reference.layer_inputs(base_model, name, TEXTS[task]))
        size = float(H.square().sum(1).mean())
        assert osrm.cross_activation(A, moments[task].layers[name]) < 1e-9 * size
        assert float((H @ A.mT).square().max()) < 1e-9 * size


def test_apply_writes_all_or_nothing(base_model: PreTrainedModel) -> None:
    moments = collected(base_model)
    peft_model: Any = get_peft_model(base_model, CONFIG)
    before = {name: weight.clone() for name, weight in peft_model.state_dict().items()}
    A = osrm.initialise([moments["ada"]], osrm.ranks(peft_model))
    name = "model.layers.1.mlp.down_proj"
    with pytest.raises(AdapterError, match=f"A has no {name} "):
        osrm.apply(peft_model, {key: rows for key, rows in A.items() if key != name})
    with pytest.raises(AdapterError, match="adapter 'default' has no wrong_head"):
        osrm.apply(peft_model, {**A, "wrong_head": A[name]})
    with pytest.raises(AdapterError, match=rf"{name}: lora_A is \(5, \d+\), but A is \(4, \d+\)"):
        osrm.apply(peft_model, {**A, name: A[name][:4]})
    with pytest.raises(AdapterError, match=f"{name}: A holds NaN or infinity"):
        osrm.apply(peft_model, {**A, name: A[name] * float("nan")})
    with pytest.raises(AdapterError, match=r"no adapter named 'ada' \(known: default\)"):
        osrm.apply(peft_model, A, "ada")
    assert all(torch.equal(before[key], value) for key, value in peft_model.state_dict().items())
    layer = peft_model.get_base_model().get_submodule(name)
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    with pytest.raises(AdapterError, match=f"{name}: lora_B is not zero"):
        osrm.apply(peft_model, A)


def test_one_adapter_of_two_is_written(base_model: PreTrainedModel) -> None:
    moments = collected(base_model)
    peft_model: Any = get_peft_model(base_model, CONFIG)
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: weight.clone() for name, weight in peft_model.state_dict().items()}
    osrm.apply(
        peft_model, osrm.initialise([moments["ada"]], osrm.ranks(peft_model, "second")), "second"
    )
    changed = {k for k, v in peft_model.state_dict().items() if not torch.equal(before[k], v)}
    assert len(changed) == 2
    assert all(key.endswith("q_proj.lora_A.second.weight") for key in changed)


def test_freeze_leaves_b_alone_to_train(base_model: PreTrainedModel) -> None:
    peft_model: Any = get_peft_model(base_model, CONFIG)
    osrm.freeze(peft_model)
    trained = [name for name, weight in peft_model.named_parameters() if weight.requires_grad]
    assert len(trained) == 4
    assert all("lora_B" in name for name in trained)


def test_an_adapter_of_embeddings_is_refused(base_model: PreTrainedModel) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(AdapterError, match="embed_tokens is an embedding"):
        osrm.ranks(get_peft_model(base_model, config))


def test_a_saved_start_is_the_applied_one(base_model: PreTrainedModel, tmp_path: Path) -> None:
    moments = collected(base_model)
    for task, of_task in moments.items():
        of_task.save(tmp_path / f"{task}.safetensors")
    loaded = [Moments.load(tmp_path / f"{task}.safetensors") for task in ("ada", "bob")]
    for form in osrm.FORMS:
        made = osrm.initialise(loaded, 2, form)
        assert made.keys() == moments["cyd"].layers.keys()
        for name, A in osrm.initialise([moments["ada"], moments["bob"]], 2, form).items():
            assert torch.equal(made[name], A)
