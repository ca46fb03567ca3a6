"""What the papers' algebra promises of Pico, KnOTS, Core Space, TSV-M, SVC and TARA-B."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank, FactorGroup, Task
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import with_calibration
from dynmerge.merging import pico
from dynmerge.merging.carried.granularity import GRANULARITIES, by_joint_direction, joint_directions
from dynmerge.merging.carried.maps import pairs
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import merge
from dynmerge.merging.outcome import Cores
from dynmerge.merging.support import Support
from dynmerge.merging.svc import balanced, repeats
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests import reference
from tests.bank_factory import BASE, SHAPES, random_adapter, random_bank
from tests.merging.dense import ADAPTERS, BANK, assert_same, merged, written_out

THREE: Mapping[str, float] = {"ada": 0.2, "bob": 0.5, "cyd": 0.3}


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """The same but for float64's rounding."""
    assert_close(actual, expected, rtol=0, atol=1e-10)


class Layer:
    """One layer in float64: the skills' (B, A), their bases, and a support that holds just them."""

    def __init__(self, ranks: Sequence[int], d_out: int = 12, d_in: int = 10) -> None:
        generator = torch.Generator().manual_seed(3)

        def factor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.B = [factor(d_out, rank) for rank in ranks]
        self.A = [factor(rank, d_in) for rank in ranks]
        self.ranks = tuple(ranks)

    @property
    def deltas(self) -> list[Tensor]:
        return [B @ A for B, A in zip(self.B, self.A, strict=True)]

    def bases(self) -> tuple[Tensor, Tensor]:
        U, _, _ = reference.real_svd(torch.cat(self.B, 1))
        _, _, V = reference.real_svd(torch.cat(self.A, 0))
        return U, V

    def support(self) -> Support:
        U, V = self.bases()
        left, right = U.mT @ torch.cat(self.B, 1), torch.cat(self.A, 0) @ V
        group = FactorGroup((0,), left[None], right[None], self.ranks)
        return Support(BANK, [group], [Task(str(place), "") for place in range(len(self.ranks))])


def s_by_svd(Bs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """S = I + U diag(alpha - 1) U^T, the shares s and the gains alpha: the paper's own steps."""
    U, sigma, _ = torch.linalg.svd(torch.cat(list(Bs), 1), full_matrices=False)
    s = sigma**2 / (sigma**2).sum()
    alpha = 1 / (1 + (len(Bs) - 1) * s)
    S: Tensor = torch.eye(len(U), dtype=U.dtype) + U @ torch.diag(alpha - 1) @ U.mT
    return S, s, alpha


def calibrated(layer: Layer, weights: Sequence[float], **values: str) -> list[Tensor]:
    """The (d_out, r) factors S B_i that dynmerge computes, in float64."""
    given = {"pool": "preference", "gauge": "raw", **values}
    support = layer.support()
    made = pico.calibrated(support, torch.tensor(weights, dtype=torch.float64), given)
    U, _ = layer.bases()
    return [U @ made.groups[0].of(place)[0][0] for place in range(len(layer.ranks))]


# Ranks that fit into the layer, and so many that their directions fill it.
LAYERS = [Layer([2, 3]), Layer([1, 4, 2]), Layer([4, 5, 3, 2])]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_picos_s_is_its_svd_form_its_inverse_form_and_its_woodbury_form(layer: Layer) -> None:
    T, B_all = len(layer.B), torch.cat(layer.B, 1)
    S, _, _ = s_by_svd(layer.B)
    strength = (T - 1) / B_all.square().sum()
    inverse = torch.linalg.inv(torch.eye(12, dtype=torch.float64) + strength * B_all @ B_all.mT)
    identity = torch.eye(B_all.shape[1], dtype=torch.float64)
    K = torch.linalg.inv(identity / strength + B_all.mT @ B_all)
    assert_exact(S, inverse)
    for own, B in zip(calibrated(layer, [1 / T] * T), layer.B, strict=True):
        assert_exact(own, S @ B)
        assert_exact(own, B - B_all @ K @ (B_all.mT @ B))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_static_pooling_is_the_papers_s_whatever_the_weights(layer: Layer) -> None:
    S, _, _ = s_by_svd(layer.B)
    weights = [0.7 / place for place in range(1, len(layer.B) + 1)]
    for own, B in zip(calibrated(layer, weights, pool="static"), layer.B, strict=True):
        assert_exact(own, S @ B)
    pooled = calibrated(layer, weights)
    assert (pooled[0] - S @ layer.B[0]).norm() > 1e-3


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_in_canonical_gauge_picos_s_is_that_of_the_updates(layer: Layer) -> None:
    S, _, _ = s_by_svd(layer.deltas)
    weights = [1 / len(layer.B)] * len(layer.B)
    for own, B in zip(calibrated(layer, weights, gauge="canonical"), layer.B, strict=True):
        assert_exact(own, S @ B)


@pytest.mark.parametrize("gauge", pico.GAUGES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_eigenvalues_of_picos_s_lie_between_one_over_t_and_one(layer: Layer, gauge: str) -> None:
    for weights in ([1.0] * len(layer.B), [0.9 / 2**place for place in range(len(layer.B))]):
        a = torch.tensor(weights, dtype=torch.float64)
        S = pico.shrink(layer.support().groups[0], a, pico.GAUGES[gauge])
        values = torch.linalg.eigvalsh(S[0])
        effective = float(a.sum() ** 2 / a.square().sum())
        assert values.min() >= 1 / effective - 1e-12
        assert values.max() <= 1 + 1e-12
        assert values.min() < 1 - 1e-3


def test_pico_leaves_a_single_skill_alone() -> None:
    layer = Layer([4])
    assert torch.equal(
        calibrated(layer, [0.3])[0], layer.bases()[0] @ layer.support().groups[0].left[0]
    )


@pytest.mark.parametrize("tasks", [2, 5])
def test_copies_of_one_rank_one_adapter_merge_to_it_under_pico(tasks: int) -> None:
    _, s, alpha = s_by_svd([LAYERS[0].B[0][:, :1]] * tasks)
    assert_exact(s[0], torch.tensor(1.0, dtype=torch.float64))
    assert_exact(alpha[0], torch.tensor(1 / tasks, dtype=torch.float64))
    adapter = random_adapter({"layers.0.q": 1, "layers.1.up": 1}, 4)
    bank = random_bank({f"copy{place}": adapter for place in range(tasks)})
    weights = {f"copy{place}": 1 / tasks for place in range(tasks)}
    for method in ("pico", "pico;gauge=canonical"):
        found = merged(weights, method, bank)
        expected = {name: reference.delta(adapter, name) for name in adapter.modules}
        assert_same(found, expected)
        unrestored = merged(weights, f"{method};restore=none", bank)
        assert_same(unrestored, {name: delta / tasks for name, delta in expected.items()})


@pytest.mark.parametrize("factor", ["p=2", "p=inf"])
@pytest.mark.parametrize("merger", ["linear", "tsv-m", "iso-c", "iso-cts", "dare-linear"])
def test_pico_cancels_any_overall_factor_of_the_merger(merger: str, factor: str) -> None:
    expected = merged(THREE, f"pico+{merger};p=1")
    assert_same(merged(THREE, f"pico+{merger};{factor}"), expected)
    changed = merged(THREE, f"pico+{merger};restore=none;{factor}")["layers.1.q"]
    assert (
        changed.norm() > 1.1 * merged(THREE, f"pico+{merger};restore=none;p=1")["layers.1.q"].norm()
    )


@pytest.mark.parametrize(
    "method",
    [
        "pico",
        "pico+ties",
        "pico+tsv-m",
        "pico+iso-c",
        "pico+knots-ties;density=0.9",
        "pico+ties;space=full;rank=99;density=0.9",
    ],
)
def test_a_merge_under_pico_has_the_skills_mean_norm(method: str) -> None:
    for module, update in merged(THREE, method).items():
        norms = [
            weight * reference.delta(ADAPTERS[skill], module).norm()
            for skill, weight in THREE.items()
            if module in ADAPTERS[skill].modules
        ]
        assert_close(update.norm(), torch.stack(norms).sum(), rtol=1e-4, atol=0)


def with_scale_in_a(adapter: Adapter, factor: float) -> Adapter:
    """The same updates from factors of other sizes."""
    modules = {
        name: LowRank(A=update.A * factor, B=update.B / factor)
        for name, update in adapter.modules.items()
    }
    return Adapter(modules, BASE.name)


def test_pico_sees_the_factors_sizes_only_where_they_differ_and_only_in_the_raw_gauge() -> None:
    together = random_bank({name: with_scale_in_a(own, 2.0) for name, own in ADAPTERS.items()})
    factors = {"ada": 0.5, "bob": 2.0, "cyd": 8.0}
    apart = random_bank({name: with_scale_in_a(ADAPTERS[name], factors[name]) for name in ADAPTERS})
    raw, canonical = merged(THREE, "pico"), merged(THREE, "pico;gauge=canonical")
    assert_same(merged(THREE, "pico", together), raw)
    assert_same(merged(THREE, "pico;gauge=canonical", apart), canonical)
    assert (merged(THREE, "pico", apart)["layers.1.q"] - raw["layers.1.q"]).norm() > 1e-2


# Four skills, so that the uniform preference lies on the grid; each has all modules.
FOUR = {
    f"skill{place}": random_adapter(dict.fromkeys(SHAPES, rank), 40 + place)
    for place, rank in enumerate((1, 2, 3, 4))
}


def tara_b(deltas: Sequence[Tensor]) -> Tensor:
    """sum_ik phi_ik sigma_k u_k v_ki^T at phi_ik = gamma alpha_k / T (TARA's variant B).

    u_k, sigma_k, v_k of [Delta_1 .. Delta_T], v_ki the part of v_k that stands under Delta_i.
    """
    T, d_in = len(deltas), deltas[0].shape[1]
    U, sigma, Vt = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    alpha = [1 / (1 + (T - 1) * float(value**2 / sigma.square().sum())) for value in sigma]

    def point(factor: float) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for k, value in enumerate(sigma):
            for i in range(T):
                v_ki = Vt[k, i * d_in : (i + 1) * d_in]
                total = total + factor * alpha[k] / T * value * torch.outer(U[:, k], v_ki)
        return total

    norms = [float(delta.norm()) for delta in deltas]
    return point(sum(norms) / T / float(point(1.0).norm()))


def test_canonical_pico_with_the_mean_is_a_point_of_tara_b() -> None:
    found = merged(dict.fromkeys(FOUR, 0.25), "pico;gauge=canonical", random_bank(FOUR))
    for module, update in found.items():
        expected = tara_b([reference.delta(own, module) for own in FOUR.values()])
        assert_close(update, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_canonical_pico_with_the_mean_is_a_point_of_tara_b_in_float64(layer: Layer) -> None:
    weights = torch.full((len(layer.B),), 1 / len(layer.B), dtype=torch.float64)
    values = {"pool": "preference", "gauge": "canonical", "restore": "norm"}
    support, (U, V) = layer.support(), layer.bases()
    seen = pico.calibrated(support, weights, values)
    mean = Cores([group.weighted(weights) for group in seen.groups])
    restored = pico.restored(mean, support, weights, values)
    assert isinstance(restored, Cores)
    assert_exact(U @ restored.groups[0][0] @ V.mT, tara_b(layer.deltas))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_that_point_is_one_that_our_tara_b_reaches(layer: Layer) -> None:
    (group,), (U, V), T = layer.support().groups, layer.bases(), len(layer.B)
    S, _, alpha = s_by_svd(layer.deltas)
    Q = joint_directions(group)
    # Its directions are S's eigenvectors, strongest first: alpha, largest last, in their order.
    along = (Q[0].mT @ (U.mT @ S @ U) @ Q[0]).diagonal()
    assert_exact(along, alpha[: len(along)])
    mean = by_joint_direction(group, (along / T).repeat(T)[None], Q)
    gamma = sum(delta.norm() for delta in layer.deltas) / T / mean.norm()
    assert_exact(U @ (gamma * mean[0]) @ V.mT, tara_b(layer.deltas))


def fixed_everywhere(bank: FactorBank, method: str, value: float) -> FactorBank:
    """The bank with coefficients that are all the same, for the uniform preference."""
    tasks = len(bank.tasks)
    tensors = {".at": torch.full((tasks,), 1 / tasks)}
    for group in bank.groups:
        width = len(GRANULARITIES[method].owners(group))
        for member in group.members:
            tensors[f"{bank.modules[member].name}.fixed"] = torch.full((width,), value)
    return with_calibration(bank, Calibration(method, "fixed", bank.coordinates_digest, tensors))


@pytest.mark.parametrize("method", ["adamerging", "tara-a", "tara-b"])
@pytest.mark.parametrize("value", [0.4, -1.3])
def test_equal_coefficients_everywhere_are_task_arithmetic(method: str, value: float) -> None:
    for adapters in (ADAPTERS, FOUR):
        bank = fixed_everywhere(random_bank(adapters), method, value)
        uniform = dict.fromkeys(adapters, 1 / len(adapters))
        preference = Preference.of(uniform)
        recipe = Recipe(preference, parse_method(method), bank.digest)
        expected = reference.merged_deltas(adapters, dict.fromkeys(adapters, value))
        assert_same(written_out(bank, merge(bank, recipe)), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_equal_coefficients_everywhere_are_task_arithmetic_in_float64(layer: Layer) -> None:
    (group,), (U, V) = layer.support().groups, layer.bases()
    expected = 0.4 * torch.stack(layer.deltas).sum(0)
    for method in ("adamerging", "tara-a", "tara-b", "core"):
        phi = torch.full((1, len(GRANULARITIES[method].owners(group))), 0.4, dtype=torch.float64)
        rho = torch.full((len(layer.B),), 1 / len(layer.B), dtype=torch.float64)
        free = torch.zeros(1, len(pairs(rho)), U.shape[1], V.shape[1], dtype=torch.float64)
        own = {"joint": joint_directions(group), "tables": free}
        core = GRANULARITIES[method].cores(group, phi, own, rho)[0]
        assert_exact(U @ core @ V.mT, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_an_update_is_the_sum_of_its_parts_along_the_joint_directions(layer: Layer) -> None:
    # Delta_i = sum_k sigma_k u_k v_ki^T: the coefficients of one skill at 1, all others at 0.
    (group,), (U, V) = layer.support().groups, layer.bases()
    Q = joint_directions(group)
    dense_u, sigma, Vt = torch.linalg.svd(torch.cat(layer.deltas, 1), full_matrices=False)
    for i, delta in enumerate(layer.deltas):
        phi = torch.zeros(len(layer.deltas), Q.shape[-1], dtype=torch.float64)
        phi[i] = 1
        assert_exact(U @ by_joint_direction(group, phi.reshape(1, -1), Q)[0] @ V.mT, delta)
        for k in range(Q.shape[-1]):
            phi[i] = 0
            phi[i, k] = 1
            v_ki = Vt[k, 10 * i : 10 * (i + 1)]
            part = sigma[k] * torch.outer(dense_u[:, k], v_ki)
            assert_exact(U @ by_joint_direction(group, phi.reshape(1, -1), Q)[0] @ V.mT, part)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer.ranks))
def test_joint_directions_are_the_dense_left_singular_vectors(layer: Layer) -> None:
    (group,), (U, _) = layer.support().groups, layer.bases()
    Q = U @ joint_directions(group)[0]
    dense, _, _ = torch.linalg.svd(torch.cat(layer.deltas, 1), full_matrices=False)
    dense = dense[:, : Q.shape[1]]
    assert Q.shape[1] == min(sum(layer.ranks), 12)
    assert_exact(Q * (Q * dense).sum(0).sign(), dense)


def test_a_task_of_more_ranks_than_inputs_has_joint_directions_too() -> None:
    layer = Layer([9, 2], d_out=10, d_in=3)
    (group,) = layer.support().groups
    Q = joint_directions(group)[0]
    assert Q.shape == (10, 10)
    assert_exact(Q.mT @ Q, torch.eye(10, dtype=torch.float64))
    everywhere = torch.ones(1, 20, dtype=torch.float64)
    assert_exact(by_joint_direction(group, everywhere, Q[None])[0], group.cores()[0].sum(0))


@pytest.mark.parametrize("space", ["core", "knots", "full"])
@pytest.mark.parametrize("weights", [THREE, {"ada": 1.5, "bob": -0.5}], ids=str)
def test_the_weighted_sum_is_the_same_in_every_space(
    space: str, weights: Mapping[str, float]
) -> None:
    expected = reference.merged_deltas(ADAPTERS, weights)
    assert_same(merged(weights, f"dare-linear;density=1;space={space}"), expected)
    assert_same(merged(weights, "linear"), expected)


def orthogonal_adapters() -> dict[str, Adapter]:
    """Three adapters of ranks 1, 2 and 4 whose rows and columns are all orthogonal."""
    generator = torch.Generator().manual_seed(5)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q

    ranks, made = {"ada": 1, "bob": 2, "cyd": 4}, {}
    frames = {module: (rotation(d_out), rotation(d_in)) for module, (d_out, d_in) in SHAPES.items()}
    start = 0
    for name, rank in ranks.items():
        updates = {}
        for module in ("layers.0.q", "layers.1.up"):
            left, right = frames[module]
            columns = slice(start, start + rank)
            mix = torch.randn(rank, rank, generator=generator)
            updates[module] = LowRank(A=mix @ right[:, columns].mT, B=3 * left[:, columns])
        made[name] = Adapter(updates, BASE.name)
        start += rank
    return made


def test_tsv_m_of_orthogonal_adapters_is_their_plain_sum() -> None:
    adapters = orthogonal_adapters()
    weights = dict.fromkeys(adapters, 0.5)
    expected = {
        module: sum((reference.delta(own, module) for own in adapters.values()), torch.zeros(()))
        for module in adapters["ada"].modules
    }
    found = merged(weights, "tsv-m", random_bank(adapters))
    # p=inf gives each skill the sum of all weights, 1.5.
    assert_same(found, {name: 1.5 * update for name, update in expected.items()})


@pytest.mark.parametrize("tasks", [2, 4])
def test_svc_brings_the_sum_of_copies_back_to_one_and_leaves_their_mean(tasks: int) -> None:
    adapter = ADAPTERS["bob"]
    names = [f"copy{place}" for place in range(tasks)]
    bank, weights = random_bank(dict.fromkeys(names, adapter)), dict.fromkeys(names, 1 / tasks)
    expected = {name: reference.delta(adapter, name) for name in adapter.modules}
    assert_same(
        merged(weights, "linear;p=inf", bank),
        {name: tasks * delta for name, delta in expected.items()},
    )
    assert_same(merged(weights, "linear+svc;p=inf", bank), expected)
    assert_same(merged(weights, "linear+svc", bank), expected)
    assert_same(merged(weights, "linear", bank), expected)


@pytest.mark.parametrize("tasks", [2, 3])
def test_svc_counts_copies_in_every_direction(tasks: int) -> None:
    layer = Layer([3])
    core = layer.support().groups[0].cores()[:, 0]
    P, S, Qh = torch.linalg.svd(tasks * core, full_matrices=False)
    weights = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
    cores = core[:, None].expand(-1, tasks, -1, -1)
    eta = repeats((P, S, Qh.mT), cores, weights, weights.sum(), 1 / tasks)
    assert_exact(eta, torch.full_like(eta, tasks))


@pytest.mark.parametrize("factor", [0.6, 1.7])
def test_svc_forgets_the_merges_overall_factor_where_no_floor_holds(factor: float) -> None:
    layer = Layer([3])
    support = layer.support()
    weights = torch.ones(1, dtype=torch.float64)
    cores = [group.weighted(weights) for group in support.groups]
    scaled = Cores([factor * core for core in cores])
    found = balanced(scaled, support, weights, {"floor": 0.001})
    assert isinstance(found, Cores)
    assert_exact(found.groups[0], cores[0])


def test_svc_at_a_floor_of_one_only_shrinks() -> None:
    for method in ("linear", "tsv-m", "ties"):
        for module, update in merged(THREE, f"{method}+svc;floor=1").items():
            before = torch.linalg.svdvals(merged(THREE, method)[module])
            assert bool((torch.linalg.svdvals(update) <= before * (1 + 1e-5) + 1e-6).all())


def test_gamma_is_the_number_that_restores_the_mean_norm() -> None:
    layer = Layer([2, 3])
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    support = layer.support()
    merge = Cores([support.groups[0].weighted(weights) * 0.01])
    restored = pico.restored(merge, support, weights, {"restore": "norm"})
    expected = sum(
        float(weight) * float(delta.norm())
        for weight, delta in zip(weights, layer.deltas, strict=True)
    )
    assert isinstance(restored, Cores)
    assert math.isclose(float(restored.groups[0].norm()), expected, rel_tol=1e-12)
