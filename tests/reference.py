"""The oracle: slow, obvious, dense float64 twins of everything fast. dynmerge never imports it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from dynmerge.adapters.adapter import Adapter


def delta(adapter: Adapter, module: str) -> Tensor:
    """(d_out, d_in) float64: what this adapter adds to one base weight."""
    update = adapter.modules[module]
    return update.B.double() @ update.A.double()


def linear(deltas: Sequence[Tensor], weights: Sequence[float], scale: float = 1.0) -> Tensor:
    """sum_i scale * w_i * Delta_i, entry by entry."""
    total = torch.zeros_like(deltas[0])
    for update, weight in zip(deltas, weights, strict=True):
        total = total + scale * weight * update
    return total


def merged_deltas(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], scale: float = 1.0
) -> dict[str, Tensor]:
    """Module name -> dense linear merge (d_out, d_in) over the adapters that have the module."""
    modules = sorted({module for adapter in adapters.values() for module in adapter.modules})
    merged = {}
    for module in modules:
        having = [name for name in sorted(adapters) if module in adapters[name].modules]
        merged[module] = linear(
            [delta(adapters[name], module) for name in having],
            [weights.get(name, 0.0) for name in having],
            scale,
        )
    return merged


def written_out(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    """`model` with W + Delta written into its own weights: give it a copy that nobody else uses."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, update in deltas.items():
            weight = modules[name].weight
            weight.copy_((weight.double() + update).to(weight.dtype))
    return model


def overlap(first: Tensor, second: Tensor) -> float:
    """||Q_1^T Q_2||_F^2 / min(r_1, r_2) of two matrices (d, r_i) of full rank."""
    (Q_1, _), (Q_2, _) = torch.linalg.qr(first.double()), torch.linalg.qr(second.double())
    smaller = min(first.shape[1], second.shape[1])
    return sum(float(a @ b) ** 2 for a in Q_1.mT for b in Q_2.mT) / smaller


def effective_rank(dense: Tensor) -> float:
    """exp(-sum p log p) over the singular values of a dense matrix, as shares of their sum."""
    values = [float(value) for value in torch.linalg.svdvals(dense.double()) if value > 1e-12]
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


# Merge methods, as docs/merge-methods.md specifies them: one matrix and one task at a time.
# A task is one skill's (B, A) in one module, float64, with its weight's sign inside B.

Task = tuple[Tensor, Tensor]
Draws = Callable[[str, str, tuple[int, int]], Tensor]
Starts = Callable[[str, int, int], Sequence[int]]


def merged_by(
    method: str,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    parameters: Mapping[str, float | str],
    *,
    draws: Draws | None = None,
    starts: Starts | None = None,
    soups: Mapping[str, Mapping[str, float]] | None = None,
    learned: Mapping[str, Tensor] | None = None,
    form: str = "",
    bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Module name -> dense merge (d_out, d_in) by `[pico+]METHOD[+svc]`, zero where nothing is.

    `adapters` are all skills of the bank. `parameters` holds every parameter of every part.
    `draws(skill, module, shape)` are uniform numbers, `starts(module, units, clusters)` the units
    that k-means starts from, `soups` the learned weights, module -> skill -> weight. `learned` are
    a calibration's tensors by MODULE.LABEL, of this `form`. `bases` are module -> (U, V) to use
    instead of its own, for what depends on their arbitrary signs.
    """
    parts = method.split("+")
    pico, calibrated = parts[0] == "pico", parts[-1] == "svc"
    plain = "+".join(parts[1 if pico else 0 : -1 if calibrated else None]) or "linear"

    a = magnitudes(adapters, weights)
    originals = tasks_of(adapters, weights)
    if bases is None:
        bases = {module: core_bases(adapters, module) for module in originals}
    tasks = originals
    if pico:
        tasks = {module: pico_calibrated(originals[module], a, parameters) for module in originals}

    if plain in ELEMENTWISE:
        merged = merged_entries(plain, tasks, a, parameters=parameters, bases=bases, draws=draws)
    else:
        merged = {
            module: merged_layer(
                plain,
                module,
                tasks[module],
                a,
                parameters=parameters,
                bases=bases,
                starts=starts,
                soups=soups,
            )
            if plain not in CALIBRATED
            else calibrated_layer(
                plain,
                module,
                tasks[module],
                a,
                adapters=adapters,
                learned=learned or {},
                form=form,
                parameters=parameters,
                bases=bases[module],
            )
            for module in tasks
            if tasks[module]
        }

    result = {}
    for module in originals:
        if not originals[module]:
            result[module] = torch.zeros(shape_of(adapters, module), dtype=torch.float64)
            continue
        W = merged[module]
        if calibrated:
            directions = None
            if plain in ("iso-c", "iso-cts"):
                directions = isotropic_directions(
                    plain, module, tasks[module], a, parameters=parameters, bases=bases
                )
            W = svc(W, tasks[module], a, float(parameters["floor"]), directions)
        if pico and parameters["restore"] == "norm":
            W = gamma(W, originals[module], a) * W
        result[module] = float(parameters.get("scale", 1.0)) * W
    return result


def isotropic_dense_part(
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    parameters: Mapping[str, float | str],
) -> dict[str, Tensor]:
    """`iso-c-dense` on the real directions: mean of all min(d) singular values times P Q^T."""
    lambdas = kept_norm(magnitudes(adapters, weights), float(parameters["p"]))
    result = {}
    for module, tasks in tasks_of(adapters, weights).items():
        shape = shape_of(adapters, module)
        W = torch.zeros(shape, dtype=torch.float64)
        for skill, task in tasks.items():
            W = W + lambdas[skill] * update_of(task)
        P, sigma, Q = real_svd(W)
        result[module] = float(parameters["scale"]) * (sigma.sum() / min(shape)) * P @ Q.mT
    return result


# --- what all methods share


def magnitudes(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> dict[str, float]:
    """a_i = |w_i| of the support: the skills whose weight is not zero, in the order of names."""
    return {skill: abs(weights[skill]) for skill in sorted(adapters) if weights.get(skill, 0) != 0}


def tasks_of(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, dict[str, Task]]:
    """Module -> skill -> (B, A) with X_i = B A = sign(w_i) Delta_i, over the support."""
    tasks: dict[str, dict[str, Task]] = {}
    for module in sorted({module for adapter in adapters.values() for module in adapter.modules}):
        tasks[module] = {}
        for skill in magnitudes(adapters, weights):
            if module in adapters[skill].modules:
                update = adapters[skill].modules[module]
                sign = math.copysign(1.0, weights[skill])
                tasks[module][skill] = (sign * update.B.double(), update.A.double())
    return tasks


def shape_of(adapters: Mapping[str, Adapter], module: str) -> tuple[int, int]:
    """(d_out, d_in) of a module that some adapter has."""
    having = [adapter for adapter in adapters.values() if module in adapter.modules]
    update = having[0].modules[module]
    return update.B.shape[0], update.A.shape[1]


def update_of(task: Task) -> Tensor:
    """X = B A, (d_out, d_in)."""
    B, A = task
    return B @ A


def kept_norm(a: Mapping[str, float], p: float) -> dict[str, float]:
    """lambda_i = a_i * ||a||_1 / ||a||_p."""
    if math.isinf(p):
        norm = max(a.values(), default=1.0)
    else:
        norm = sum(value**p for value in a.values()) ** (1 / p)
    return {skill: value * sum(a.values()) / norm for skill, value in a.items()}


def rounding(matrix: Tensor) -> float:
    """The singular value below which a direction of `matrix` is float32 rounding."""
    largest = max(torch.linalg.svdvals(matrix).tolist(), default=0.0)
    return largest * max(matrix.shape) * torch.finfo(torch.float32).eps


def real_svd(matrix: Tensor, threshold: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """P (d_out, k), sigma (k,) descending, Q (d_in, k): the thin SVD without null directions."""
    P, sigma, Qt = torch.linalg.svd(matrix, full_matrices=False)
    real = sigma > (rounding(matrix) if threshold is None else threshold)
    return P[:, real], sigma[real], Qt[real].mT


def core_bases(adapters: Mapping[str, Adapter], module: str) -> tuple[Tensor, Tensor]:
    """U (d_out, p) of [B_1 .. B_N] and V (d_in, q) of [A_1; ..; A_N] over the whole bank.

    Core Space (Panariello et al. 2025), eqs. for U_B and V_A.
    """
    having = [name for name in sorted(adapters) if module in adapters[name].modules]
    U, _, _ = real_svd(torch.cat([adapters[name].modules[module].B.double() for name in having], 1))
    _, _, V = real_svd(torch.cat([adapters[name].modules[module].A.double() for name in having], 0))
    return U, V


def frame(space: str, tasks: Mapping[str, Task], core: tuple[Tensor, Tensor]) -> Task:
    """(L, R) with orthonormal columns: a method sees the entries of L^T X_i R and gives L M R^T.

    `core`: the bank's (U, V). `full`: no change. `knots`: Q of [X_1 .. X_T] = Q Sigma [P'_1 ..],
    whose Q^T X_i is Sigma P'_i (Stoica et al. 2025, arXiv:2410.19735).
    """
    if space == "core":
        return core
    side_by_side = torch.cat([update_of(task) for task in tasks.values()], dim=1)
    d_out, d_in = next(iter(tasks.values()))[0].shape[0], next(iter(tasks.values()))[1].shape[1]
    unchanged = torch.eye(d_in, dtype=torch.float64)
    if space == "knots":
        Q, _, _ = real_svd(side_by_side)
        return Q, unchanged
    assert space == "full", space
    return torch.eye(d_out, dtype=torch.float64), unchanged


def cut(dense: Tensor, rank: int) -> Tensor:
    """The nearest matrix of at most `rank` (Eckart and Young)."""
    P, sigma, Qt = torch.linalg.svd(dense, full_matrices=False)
    nearest: Tensor = P[:, :rank] @ torch.diag(sigma[:rank]) @ Qt[:rank]
    return nearest


# --- elementwise methods: TIES, DARE, DELLA, in any space

Entries = dict[str, dict[str, Tensor]]  # module -> skill -> the entries that the method sees
ELEMENTWISE = ("ties", "dare-linear", "dare-ties", "della", "knots-ties", "knots-dare-ties")


def merged_entries(
    method: str,
    tasks: Mapping[str, Mapping[str, Task]],
    a: Mapping[str, float],
    *,
    parameters: Mapping[str, float | str],
    bases: Mapping[str, tuple[Tensor, Tensor]],
    draws: Draws | None,
) -> dict[str, Tensor]:
    """Into the space, trim or drop, merge the entries, back to (d_out, d_in)."""
    space = "knots" if method.startswith("knots-") else str(parameters["space"])
    step = method.removeprefix("knots-")
    density = float(parameters["density"])

    frames, entries = {}, {}
    for module in tasks:
        if tasks[module]:
            left, right = frames[module] = frame(space, tasks[module], bases[module])
            entries[module] = {
                skill: left.mT @ update_of(task) @ right for skill, task in tasks[module].items()
            }

    if step == "ties":
        kept = trim(entries, density, str(parameters["scope"]))
    else:
        assert draws is not None
        kept = {}
        for module, seen in entries.items():
            kept[module] = {}
            for skill, X in seen.items():
                drawn = draws(skill, module, (X.shape[0], X.shape[1])).double()
                if step == "della":
                    epsilon, rescale = float(parameters["epsilon"]), str(parameters["rescale"])
                    kept[module][skill] = magprune(X, density, epsilon, rescale, drawn)
                else:
                    kept[module][skill] = drop(X, density, drawn)

    if step == "dare-linear":
        lambdas = kept_norm(a, float(parameters["p"]))
        merged = {module: weighted_sum(kept[module], lambdas) for module in kept}
    else:
        first = a if parameters["order"] == "mergekit" else dict.fromkeys(a, 1.0)
        elected = elect_sign(kept, first, str(parameters["sign"]), str(parameters["scope"]))
        merged = {
            module: disjoint_mean(kept[module], elected[module], a, str(parameters["aggregate"]))
            for module in kept
        }

    result = {}
    for module, M in merged.items():
        left, right = frames[module]
        result[module] = left @ M @ right.mT
        if space == "full":
            ranks = sum(A.shape[0] for _, A in tasks[module].values())
            result[module] = cut(result[module], int(parameters["rank"]) or ranks)
    return result


def scopes(modules: Iterable[str], scope: str) -> list[list[str]]:
    """The groups of modules that are looked at together: all, or each alone."""
    return [list(modules)] if scope == "global" else [[module] for module in modules]


def trim(entries: Entries, density: float, scope: str) -> Entries:
    """Each skill's ceil(density n) largest magnitudes stay (Yadav et al. 2023, algorithm 1)."""
    trimmed: Entries = {module: {} for module in entries}
    for skill in sorted({skill for tasks in entries.values() for skill in tasks}):
        having = [module for module in entries if skill in entries[module]]
        for group in scopes(having, scope):
            largest_first: list[float] = []
            for module in group:
                largest_first += entries[module][skill].abs().flatten().tolist()
            largest_first.sort(reverse=True)
            if not largest_first:  # a space without directions
                smallest_kept = 0.0
            else:
                wanted = math.ceil(Fraction(round(density * 1000), 1000) * len(largest_first))
                smallest_kept = largest_first[wanted - 1]
            for module in group:
                X = entries[module][skill]
                trimmed[module][skill] = torch.where(X.abs() >= smallest_kept, X, 0.0)
    return trimmed


def elect_sign(
    trimmed: Entries, weights: Mapping[str, float], sign: str, scope: str
) -> dict[str, Tensor]:
    """+1 or -1 per entry: of the larger total mass or count (Yadav et al. 2023, algorithm 1).

    A tied count is decided by mass. Entries still undecided follow the sum of the elected signs in
    their scope, + if that is zero.
    """
    elected = {}
    for group in scopes(trimmed, scope):
        for module in group:
            votes = [weights[skill] * X for skill, X in trimmed[module].items()]
            mass, count = torch.zeros_like(votes[0]), torch.zeros_like(votes[0])
            for vote in votes:
                mass, count = mass + vote, count + vote.sign()
            elected[module] = mass.sign()
            if sign == "count":
                elected[module] = torch.where(count == 0, mass, count).sign()
        majority = 1.0 if sum(float(elected[module].sum()) for module in group) >= 0 else -1.0
        for module in group:
            elected[module] = torch.where(elected[module] == 0, majority, elected[module])
    return elected


def disjoint_mean(
    trimmed: Mapping[str, Tensor], elected: Tensor, a: Mapping[str, float], aggregate: str
) -> Tensor:
    """(sum_i a_i) times the weighted mean of the entries that agree (Yadav et al. 2023), or sum."""
    total, weight = torch.zeros_like(elected), torch.zeros_like(elected)
    for skill, X in trimmed.items():
        agrees = X.sign() == elected
        total = total + torch.where(agrees, a[skill] * X, 0.0)
        weight = weight + torch.where(agrees, a[skill], 0.0)
    if aggregate == "sum":
        return total
    return torch.where(weight > 0, sum(a.values()) * total / weight, 0.0)


def drop(X: Tensor, density: float, drawn: Tensor) -> Tensor:
    """Each entry stays with probability `density`, divided by it (DARE, Yu et al. 2024)."""
    return torch.where(drawn < density, X / density, 0.0)


def magprune(X: Tensor, density: float, epsilon: float, rescale: str, drawn: Tensor) -> Tensor:
    """Row by row, larger entries stay more probably (DELLA, Deep et al. 2024, section 3)."""
    rows, n = X.shape
    probability = torch.full_like(X, density)
    for row in range(rows):
        smallest_first = sorted(range(n), key=X[row].abs().tolist().__getitem__)
        for k, column in enumerate(smallest_first):
            if n > 1:
                probability[row, column] = density - epsilon + 2 * epsilon * k / (n - 1)
    if rescale == "entry":
        return torch.where(drawn < probability, X / probability, 0.0)
    kept = torch.where(drawn < probability, X, 0.0)
    left = float(kept.abs().sum())
    return kept * (float(X.abs().sum()) / left) if left > 0 else kept


def weighted_sum(matrices: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_i lambda_i X_i (Task Arithmetic, Ilharco et al. 2023)."""
    return linear(list(matrices.values()), [weights[skill] for skill in matrices])


# --- methods of whole updates, one module at a time


def merged_layer(
    method: str,
    module: str,
    tasks: Mapping[str, Task],
    a: Mapping[str, float],
    *,
    parameters: Mapping[str, float | str],
    bases: Mapping[str, tuple[Tensor, Tensor]],
    starts: Starts | None,
    soups: Mapping[str, Mapping[str, float]] | None,
) -> Tensor:
    """The merge (d_out, d_in) of one module's tasks, before calibration and scale."""
    X = {skill: update_of(task) for skill, task in tasks.items()}
    ranks = {skill: A.shape[0] for skill, (_, A) in tasks.items()}
    if method == "lora-soups":
        assert soups is not None
        return weighted_sum(X, soup_weights(list(X), a, soups[module]))
    if method == "lego":
        assert starts is not None
        return lego(module, tasks, a, parameters, starts)
    lambdas = kept_norm(a, float(parameters["p"]))
    if method == "linear":
        return weighted_sum(X, lambdas)
    if method == "tsv-m":
        return tsv_m(X, ranks, lambdas)
    P, sigma, Q = isotropic_directions(method, module, tasks, a, parameters=parameters, bases=bases)
    return P @ torch.diag(sigma) @ Q.mT


def isotropic_directions(
    method: str,
    module: str,
    tasks: Mapping[str, Task],
    a: Mapping[str, float],
    *,
    parameters: Mapping[str, float | str],
    bases: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """P, sigma, Q of Iso-C or Iso-CTS: the directions it makes equally strong, and how strong."""
    X = {skill: update_of(task) for skill, task in tasks.items()}
    ranks = {skill: A.shape[0] for skill, (_, A) in tasks.items()}
    lambdas = kept_norm(a, float(parameters["p"]))
    if method == "iso-c":
        return iso_c(weighted_sum(X, lambdas))
    assert method == "iso-cts", method
    U, V = bases[module]
    R = min(U.shape[1], V.shape[1], sum(ranks.values()))
    return iso_cts(X, ranks, lambdas, R, float(parameters["common"]))


def polar(stacked: Tensor) -> Tensor:
    """P Q^T of the SVD: the nearest (partial) isometry (Gargiulo et al. 2025, section 3.3)."""
    P, _, Q = real_svd(stacked)
    return P @ Q.mT


def tsv_m(
    X: Mapping[str, Tensor], ranks: Mapping[str, int], lambdas: Mapping[str, float]
) -> Tensor:
    """P_perp diag(lambda_i Sigma_i) Q_perp^T (Gargiulo et al. 2025, algorithm 1), k the rank."""
    left, values, right = [], [], []
    for skill, update in X.items():
        P, sigma, Q = real_svd(update)
        k = ranks[skill]
        left.append(P[:, :k])
        values.append(lambdas[skill] * sigma[:k])
        right.append(Q[:, :k])
    return polar(torch.cat(left, 1)) @ torch.diag(torch.cat(values)) @ polar(torch.cat(right, 1)).mT


def iso_c(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every real singular value becomes their mean (Marczak et al. 2025, algorithm 1)."""
    P, sigma, Q = real_svd(W)
    return P, torch.full_like(sigma, float(sigma.sum()) / max(len(sigma), 1)), Q


def iso_cts(
    X: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    lambdas: Mapping[str, float],
    R: int,
    common: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Common, then task-specific directions, one value (Marczak et al. 2025, algorithm 2)."""
    k = math.floor(Fraction(round(common * 1000), 1000) * R)
    each = math.floor((R - k) / len(X))
    P, sigma, Q = real_svd(weighted_sum(X, lambdas))
    P_k = P[:, :k]
    left, values, right = [P_k], [sigma[:k]], [Q[:, :k]]
    for skill, update in X.items():
        weighted = lambdas[skill] * update
        specific = weighted - P_k @ P_k.mT @ weighted
        P, sigma, Q = real_svd(specific, threshold=rounding(weighted))
        top = min(each, ranks[skill])
        left.append(P[:, :top])
        values.append(sigma[:top])
        right.append(Q[:, :top])
    stacked = torch.cat(values)
    mean = float(stacked.sum()) / max(len(stacked), 1)
    flat = torch.full_like(stacked, mean)
    return polar(torch.cat(left, 1)), flat, polar(torch.cat(right, 1))


def soup_weights(
    having: Sequence[str], a: Mapping[str, float], c: Mapping[str, float]
) -> dict[str, float]:
    """lambda_i = a_i c_i / (sum_j a_j c_j) * sum of all c and all a (Prabhakar et al. 2024)."""
    shared = sum(a[j] * c[j] for j in having)
    total = sum(c.values()) * sum(a.values())
    return {i: a[i] * c[i] / shared * total for i in having}


def lego(
    module: str,
    tasks: Mapping[str, Task],
    a: Mapping[str, float],
    parameters: Mapping[str, float | str],
    starts: Starts,
) -> Tensor:
    """Minimal semantic units, clustered and averaged (LoRA-LEGO, Zhao et al. 2025)."""
    units: list[tuple[float, Tensor, Tensor]] = []  # (a_i, row of A, column of B)
    for skill in sorted(tasks):
        B, A = tasks[skill]
        for j in range(A.shape[0]):
            row, column = A[j], B[:, j]
            if parameters["signs"] == "aligned" and row[row.abs().argmax()] < 0:
                row, column = -row, -column
            units.append((a[skill], row, column))

    largest_rank = max(A.shape[0] for _, A in tasks.values())
    clusters = min(int(parameters["clusters"]) or largest_rank, len(units))
    features = [torch.cat([direction(row), direction(column)]) for _, row, column in units]
    chosen = starts(module, len(units), clusters)
    labels = k_means(features, [features[int(i)] for i in chosen], int(parameters["iterations"]))

    merged = torch.zeros(units[0][2].shape[0], units[0][1].shape[0], dtype=torch.float64)
    for cluster in range(clusters):
        members = [unit for unit, label in zip(units, labels, strict=True) if label == cluster]
        if members:
            merged = merged + lego_piece(members) * math.sqrt(largest_rank / clusters)
    return sum(a.values()) * merged


def lego_piece(members: Sequence[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Outer product of the mean pair, at the members' mean size (Zhao et al. 2025)."""
    total = sum(weight for weight, _, _ in members)
    row, column = torch.zeros_like(members[0][1]), torch.zeros_like(members[0][2])
    size = 0.0
    for weight, one_row, one_column in members:
        row = row + weight / total * one_row
        column = column + weight / total * one_column
        size += weight / total * float(torch.cat([one_row, one_column]).abs().max())
    mean_size = float(torch.cat([row, column]).abs().max())
    return torch.outer(column, row) * (size / mean_size if mean_size > 0 else 0.0)


def direction(vector: Tensor) -> Tensor:
    """x / ||x||, zero for zero."""
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def k_means(points: Sequence[Tensor], centres: Sequence[Tensor], iterations: int) -> list[int]:
    """Each point's cluster after so many of Lloyd's steps: nearest centre, then mean of members.

    The first of equally near centres wins; a cluster without members keeps its centre.
    """
    centres = list(centres)
    labels: list[int] = []
    for _ in range(iterations):
        labels = []
        for point in points:
            distances = [float((point - centre).norm()) for centre in centres]
            labels.append(distances.index(min(distances)))
        for cluster in range(len(centres)):
            members = [p for p, label in zip(points, labels, strict=True) if label == cluster]
            if members:
                centres[cluster] = torch.stack(members).mean(dim=0)
    return labels


# --- before and after a merge


def pico_calibrated(
    tasks: Mapping[str, Task], a: Mapping[str, float], parameters: Mapping[str, float | str]
) -> dict[str, Task]:
    """(S B_i, A_i) (Tang & Yang 2026, arXiv:2604.16826, section 3, steps 1 to 3)."""
    if not tasks:
        return {}
    total = sum(a[skill] for skill in tasks)
    rho = {skill: a[skill] / total for skill in tasks}
    if parameters["pool"] == "static":
        rho = dict.fromkeys(tasks, 1 / len(tasks))
    Bs = {}
    for skill, (B, A) in tasks.items():
        if parameters["gauge"] == "canonical":
            _, triangle = torch.linalg.qr(A.mT)  # A^T = Q R, so B A = (B R^T) Q^T
            Bs[skill] = B @ triangle.mT
        else:
            Bs[skill] = B
    S = pico_s(Bs, rho)
    return {skill: (S @ B, A) for skill, (B, A) in tasks.items()}


def pico_s(Bs: Mapping[str, Tensor], rho: Mapping[str, float]) -> Tensor:
    """S = I + U diag(alpha - 1) U^T, alpha_j = 1 / (1 + (T - 1) s_j), s_j the share of energy.

    U and sigma are of [sqrt(rho_1) B_1 .. sqrt(rho_T) B_T] and T = 1 / sum_i rho_i^2; at uniform
    rho these are the paper's own.
    """
    T_eff = 1 / sum(share**2 for share in rho.values())
    B_all = torch.cat([math.sqrt(rho[skill]) * B for skill, B in Bs.items()], dim=1)
    U, sigma, _ = torch.linalg.svd(B_all, full_matrices=False)
    s = sigma**2 / max(float((sigma**2).sum()), 1e-300)
    alpha = 1 / (1 + (T_eff - 1) * s)
    S: Tensor = torch.eye(U.shape[0], dtype=torch.float64) + U @ torch.diag(alpha - 1) @ U.mT
    return S


def gamma(D: Tensor, originals: Mapping[str, Task], a: Mapping[str, float]) -> float:
    """sum_i a_i ||X_i|| / ||D||, with the norms before calibration (Tang & Yang 2026, step 5)."""
    wanted = sum(a[skill] * float(update_of(task).norm()) for skill, task in originals.items())
    return wanted / float(D.norm()) if D.norm() > 0 else 0.0


def svc(
    W: Tensor,
    tasks: Mapping[str, Task],
    a: Mapping[str, float],
    floor: float,
    directions: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """sigma_r <- sigma_r / eta_r (Li et al. 2026, arXiv:2602.05536); a floor of 0 means 1 / T.

    Of W per unit of all weights. `directions` of W where its spectrum is flat, and any would do.
    """
    floor = floor or 1 / len(a)
    total, everyone = sum(a[skill] for skill in tasks), sum(a.values())
    P, sigma, Q = real_svd(W) if directions is None else directions
    calibrated = torch.zeros_like(W)
    for r in range(len(sigma)):
        u = P[:, r]
        projected = sigma[r] * Q[:, r] / everyone
        eta = 0.0
        for skill, task in tasks.items():
            own = u @ update_of(task)
            s = float(projected @ own) / max(float(own @ own), 1e-12)
            eta += a[skill] * max(floor, s) / total
        calibrated = calibrated + sigma[r] / eta * torch.outer(u, Q[:, r])
    return calibrated


# --- examples


def last_predictions(model: nn.Module, tokens: Sequence[int], count: int) -> Tensor:
    """(count, vocabulary): the plain model on one row: no padding, no cache, nothing shared."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits[len(tokens) - count :]


def layer_inputs(model: nn.Module, name: str, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """What one layer reads, (tokens, d_in) float64 per text: each text alone, nothing padded."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0][0].double()))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([list(text)]))
    hook.remove()
    return seen


def osrm_second_moment(others: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sum over the other tasks of their average of h h^T over tokens; a task is a list of texts."""
    S = torch.zeros(others[0][0].shape[1], others[0][0].shape[1], dtype=torch.float64)
    for task in others:
        tokens = [h for text in task for h in text]
        for h in tokens:
            S = S + torch.outer(h, h) / len(tokens)
    return S


def osrm_cov(others: Sequence[Sequence[Tensor]], rank: int) -> Tensor:
    """argmin of trace(A S A^T), A A^T = I (Zhang & Zhou 2025), by SVD of the tokens themselves."""
    stacked = torch.cat([torch.cat(list(task)) / math.sqrt(sum(map(len, task))) for task in others])
    return torch.linalg.svd(stacked, full_matrices=True)[2][-rank:]


def osrm_mean(others: Sequence[Sequence[Tensor]], rank: int) -> Tensor:
    """The released code: texts' averages added up, over n - 1; the last right singular vectors."""
    means = []
    for task in others:
        total = sum((text.mean(0) for text in task), torch.zeros_like(task[0][0]))
        means.append(total / (len(task) - 1))
    return torch.linalg.svd(torch.stack(means), full_matrices=True)[2][-rank:]


# --- diagnostics (Pico's and TARA's)


def spectrum(matrix: Tensor) -> dict[str, float]:
    """norm, omax, effective rank, stable rank and condition number of a dense matrix."""
    sigma = [float(value) for value in torch.linalg.svdvals(matrix.double()) if value > 1e-6]
    energy = sum(value**2 for value in sigma)
    return {
        "norm": math.sqrt(energy),
        "omax": max(sigma) ** 2 / energy,
        "effective_rank": effective_rank(matrix),
        "stable_rank": energy / max(sigma) ** 2,
        "condition": max(sigma) / min(sigma),
    }


def stacked_effective_rank(matrices: Sequence[Tensor]) -> float:
    """The effective rank of matrices written as the rows of one."""
    return effective_rank(torch.stack([matrix.flatten() for matrix in matrices]))


def rank_one_directions(B: Tensor, A: Tensor) -> list[Tensor]:
    """b_k a_k^T for every k."""
    return [torch.outer(B[:, k], A[k]).double() for k in range(B.shape[1])]


def finite_jacobian(
    objectives: Sequence[Callable[[Tensor], float]],
    phi: Tensor,
    directions: Sequence[int],
    step: float,
) -> Tensor:
    """d f_i / d phi_k by central differences, (objectives, directions)."""
    J = torch.zeros(len(objectives), len(directions), dtype=torch.float64)
    for place, k in enumerate(directions):
        more, less = phi.clone(), phi.clone()
        more[k], less[k] = phi[k] + step, phi[k] - step
        for i, f in enumerate(objectives):
            J[i, place] = (f(more) - f(less)) / (2 * step)
    return J


def sensitivity_misalignment(J: Tensor, rho: Sequence[float], other: Sequence[float]) -> float:
    """1 - |cos(h, h')|, h = sum_i rho_i grad f_i."""
    h = sum(share * row for share, row in zip(rho, J, strict=True))
    g = sum(share * row for share, row in zip(other, J, strict=True))
    return 1 - abs(float(h @ g) / (float(h.norm()) * float(g.norm())))


def accuracy_and_nats(
    model: nn.Module, passages: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> tuple[float, float]:
    """Share of right tokens and mean -log p, of passages (tokens read, tokens that follow)."""
    right, nats, count = 0, 0.0, 0
    for tokens, targets in passages:
        for logits, target in zip(
            last_predictions(model, tokens, len(targets)), targets, strict=True
        ):
            p = torch.exp(logits.double()) / torch.exp(logits.double()).sum()
            right += int(logits.argmax()) == target
            nats -= math.log(float(p[target]))
            count += 1
    return right / count, nats / count


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume of the union of the boxes from `reference` to each point, inclusion-exclusion."""
    volume = 0.0
    for chosen in range(1, 2 ** len(points)):
        corners = [point for n, point in enumerate(points) if chosen >> n & 1]
        sides = [
            max(0.0, min(corner[i] for corner in corners) - reference[i])
            for i in range(len(reference))
        ]
        volume += (-1) ** (len(corners) + 1) * math.prod(sides)
    return volume


# --- methods of what a bank carries, one module, one skill and one coefficient at a time

CALIBRATED = ("tuned", "adamerging", "tara-a", "tara-b", "core", "regmean")
FORMS = ("ratio", "bubbles", "fixed")  # those of one coefficient at a time


def calibrated_layer(
    method: str,
    module: str,
    tasks: Mapping[str, Task],
    a: Mapping[str, float],
    *,
    adapters: Mapping[str, Adapter],
    learned: Mapping[str, Tensor],
    form: str,
    parameters: Mapping[str, float | str],
    bases: tuple[Tensor, Tensor],
) -> Tensor:
    """The merge (d_out, d_in) of one module's tasks under a calibration, before scale.

    At rho = a / sum a over all `adapters`, times sum a; `learned` are tensors by MODULE.LABEL.
    """
    everyone, (U, V) = sorted(adapters), bases
    rho = [a.get(skill, 0.0) / sum(a.values()) for skill in everyone]
    own = {
        name.removeprefix(f"{module}."): tensor.double()
        for name, tensor in learned.items()
        if name.startswith(f"{module}.")
    }
    X = {skill: update_of(task) for skill, task in tasks.items()}
    if method == "tuned":
        return weighted_sum(X, kept_norm(a, float(learned[".p"])))
    W = torch.zeros(len(U), len(V), dtype=torch.float64)
    if method == "tara-a":
        k = 0
        for i, skill in enumerate(everyone):
            update = adapters[skill].modules.get(module)
            for j in range(0 if update is None else update.rank):
                if skill in tasks:
                    B, A = tasks[skill]
                    W = W + coefficient(form, own, k, i, rho) * torch.outer(B[:, j], A[j])
                k += 1
    elif method == "tara-b":
        u, R = joint_left_vectors(adapters, module), U.shape[1]
        for skill, update in X.items():
            i = everyone.index(skill)
            for k in range(u.shape[1]):
                phi = coefficient(form, own, i * R + k, i, rho)
                W = W + phi * torch.outer(u[:, k], u[:, k] @ update)
    elif method == "regmean":
        W = regmean_layer(X, dict(zip(everyone, rho, strict=True)), own["moments"], V, parameters)
    else:
        assert method in ("adamerging", "core"), method
        for skill, update in X.items():
            i = everyone.index(skill)
            W = W + coefficient(form, own, i, i, rho) * update
        for f, (j, k) in enumerate(pairs_of(rho) if method == "core" else ()):
            W = W + math.sqrt(rho[j] * rho[k]) * U @ own["tables"][f] @ V.mT
    return sum(a.values()) * W


def pairs_of(tasks: Sequence[object]) -> list[tuple[int, int]]:
    """(0, 1), (0, 2), .., (1, 2), ..: every pair of tasks once."""
    return [(j, k) for j in range(len(tasks)) for k in range(j + 1, len(tasks))]


def coefficient(
    form: str, tables: Mapping[str, Tensor], place: int, owner: int, rho: Sequence[float]
) -> float:
    """The coefficient at `place`, of the task `owner`, at a preference: dynmerge's own forms."""
    if rho[owner] == 0:
        return 0.0
    if form == "fixed":
        return 1.0 if rho[owner] == 1 else float(tables["fixed"][place])
    if form == "ratio":
        minded, gained = rho[owner], 1.0
        for task, share in enumerate(rho):
            if task != owner:
                minded += share * math.exp(float(tables["ratio"][task, place]))
                gained += share * float(tables["gain"][task, place])
        return rho[owner] * gained / minded
    assert form == "bubbles", form
    norm = sum(math.sqrt(share) ** 4 for share in rho) ** (1 / 4)
    phi = math.sqrt(rho[owner]) / norm
    for f, (j, k) in enumerate(pairs_of(rho)):
        phi += math.sqrt(rho[j] * rho[k]) * float(tables["bubbles"][f, place])
    return phi


def joint_left_vectors(adapters: Mapping[str, Adapter], module: str) -> Tensor:
    """(d_out, k): left singular vectors of the dense [Delta_1 .. Delta_N] (TARA's variant B)."""
    having = [name for name in sorted(adapters) if module in adapters[name].modules]
    u, _, _ = real_svd(torch.cat([delta(adapters[name], module) for name in having], dim=1))
    return u


def regmean_layer(
    X: Mapping[str, Tensor],
    rho: Mapping[str, float],
    moments: Tensor,
    V: Tensor,
    parameters: Mapping[str, float | str],
) -> Tensor:
    """argmin_W sum_i rho_i E ||(W - X_i) x_i||^2, E x x^T = V (S_i + eps_i I) V^T.

    eps_i is `ridge` times S_i's mean eigenvalue. A skill without an update here has X_i = 0. Jin et
    al. 2023, arXiv:2212.09849, over what the shared basis V sees.
    """
    q = V.shape[1]
    wanted = torch.zeros(next(iter(X.values())).shape[0], len(V), dtype=torch.float64)
    pooled = torch.zeros(len(V), len(V), dtype=torch.float64)
    for S, (skill, share) in zip(moments, rho.items(), strict=True):
        eps = float(parameters["ridge"]) * float(S.trace()) / q
        H = V @ (S + eps * torch.eye(q, dtype=torch.float64)) @ V.mT
        pooled = pooled + share * H
        if skill in X:
            wanted = wanted + share * X[skill] @ H
    return wanted @ torch.linalg.pinv(pooled, rtol=1e-12)


# --- calibration: maps, objectives and what is measured, one number at a time


def gauss_newton(information: Tensor, owners: Sequence[int], rho: Sequence[float]) -> Tensor:
    """(W,): argmin over phi of sum_j rho_j (phi - c_j)^T H_j (phi - c_j), 0 for absent skills."""
    H = information.double()
    present = [k for k, owner in enumerate(owners) if rho[owner] > 0]
    pooled = torch.zeros(len(present), len(present), dtype=torch.float64)
    wanted = torch.zeros(len(present), dtype=torch.float64)
    for j, share in enumerate(rho):
        for a, k in enumerate(present):
            for b, other in enumerate(present):
                pooled[a, b] += share * H[j, k, other]
                wanted[a] += share * H[j, k, other] * (owners[other] == j)
    phi = torch.zeros(len(owners), dtype=torch.float64)
    phi[present] = torch.linalg.pinv(pooled) @ wanted
    return phi


def softmax(logits: Tensor) -> list[float]:
    """One prediction, (classes,), as probabilities."""
    powers = [math.exp(float(x) - float(logits.max())) for x in logits]
    return [power / sum(powers) for power in powers]


def entropy(logits: Tensor) -> float:
    """-sum_c p_c log p_c of one prediction."""
    return -sum(p * math.log(p) for p in softmax(logits) if p > 0)


def divergence(teacher: Tensor, logits: Tensor) -> float:
    """sum_c q_c log(q_c / p_c), q the teacher's."""
    both = zip(softmax(teacher), softmax(logits), strict=True)
    return sum(q * math.log(q / p) for q, p in both if q > 0)


def cross_entropy(target: int, logits: Tensor) -> float:
    """-log p of the right class."""
    return -math.log(softmax(logits)[target])


def second_moment(inputs: Sequence[Tensor], V: Tensor) -> Tensor:
    """(q, q): the mean over the tokens of texts (tokens, d_in) of z z^T, z = V^T x."""
    total, count = torch.zeros(V.shape[1], V.shape[1], dtype=torch.float64), 0
    for text in inputs:
        for x in text:
            z = V.double().mT @ x.double()
            total, count = total + torch.outer(z, z), count + 1
    return total / count


def fisher(log_p: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
    """(W, W): the mean over predictions of sum_c p_c g_c g_c^T, g_c = d log p_c / d phi."""
    gradients = torch.autograd.functional.jacobian(log_p, phi)  # (predictions, classes, W)
    p = log_p(phi).exp()
    found = torch.zeros(len(phi), len(phi), dtype=phi.dtype)
    for n in range(len(p)):
        for c in range(p.shape[1]):
            found = found + p[n, c] * torch.outer(gradients[n, c], gradients[n, c]) / len(p)
    return found
