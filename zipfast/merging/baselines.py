# SPDX-License-Identifier: Apache-2.0
"""What people compare ZipIt!'s matching with: other ways from similarities to groups, all returning :class:`Groups`.

identity · permute (assignment) · greedy permutation (exact where only a permutation is) · optimal pairing · k-means.
Stoica et al. 2024 compare them on CIFAR-10 (joint accuracy, two ResNet-20 with five classes each; table of matching
algorithms): k-means 29.1, identity 43.0, permute 58.4, greedy (:func:`zipfast.match`) 79.0, optimal pairing 79.6.

scipy, networkx and scikit-learn are imported by the function that needs one, when it is called.  No function writes to
its input, and each returns the same groups in every run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import zip_match as zip_match_op
from ..ops.zip_match import DEADLOCK, LIFTED, OK
from .match import Groups, _raise_for


def match_identity(models: int, size: int) -> Groups:
    """Feature k of every model forms group k: plain weight averaging."""
    return _baseline(torch.arange(size).repeat(models), models)


def match_permutation(correlation: Tensor, models: int = 2) -> Groups:
    """Permute each further model onto the first by the assignment of maximal total correlation.

    Args:
        correlation: [F, F]; only the blocks between model 0 and the others are read.
        models: M.

    Raises:
        ImportError: scipy, which solves the assignment, is not installed.

    Reference: Ainsworth et al. 2023 (Git Re-Basin), §3.1; Li et al. 2015; solver: scipy.optimize.linear_sum_assignment.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as e:
        raise ImportError(
            "match_permutation: scipy must be installed to solve the assignment; pip install 'zipfast[permute]'"
        ) from e
    if correlation.dim() != 2 or correlation.shape[0] != correlation.shape[1] or correlation.shape[0] % models:
        raise ValueError(
            f"match_permutation: 'correlation' must be square [M*D, M*D] with M = {models}, got {list(correlation.shape)}"
        )
    size = correlation.shape[0] // models
    read = correlation[:size, size:]
    if bool(read.isnan().any()):
        i, j = divmod(int(read.isnan().reshape(-1).to(torch.uint8).argmax()), read.shape[1])
        raise ValueError(f"match_permutation: 'correlation' must not hold NaN, got one at [{i}, {j + size}]")
    index = torch.arange(size).repeat(models)
    host = correlation.detach().double().cpu().numpy()
    for m in range(1, models):
        _, column = linear_sum_assignment(host[:size, m * size : (m + 1) * size], maximize=True)
        index[m * size + torch.as_tensor(column)] = torch.arange(size)
    return _baseline(index, models)


def match_greedy_permutation(
    similarity: Tensor | Sequence[Tensor], models: int = 2, *, names: Sequence[str] | None = None
) -> Groups | list[Groups]:
    r"""Match greedily across models only, so that every group has exactly one feature of each model.

    Two models: ``match(similarity, beta=0.0)``, pair by pair the most similar one.  More: model after model; the D groups
    formed so far are matched with the D features of the next model in the same way, with

    .. math:: sim(g, k) = \min_{f \in g} sim(f, k)

    (complete linkage).  ``match(beta=0.0)`` gives no such guarantee for more than two models: it joins pairs of any two
    models, may run out of allowed ones, and then lifts its budget.

    Args:
        similarity: symmetric [F, F] or a list of them (all spaces of a network in one call), float32 or float64,
            F = M·D; the diagonal is ignored, -inf forbids a pair.
        models: M, any number.
        names: of the spaces, for messages.

    Returns:
        Groups, or a list of them if a list was given: always a permutation, group g holding feature g of model 0.
        ``pair`` and ``value`` list the D accepted pairs of model 1, then those of model 2 and so on, each in the order of
        acceptance: (group, stacked feature) and its similarity as above.

    Raises:
        TypeError, ValueError: dtype; not square, not symmetric, NaN, F not divisible by M; a feature for which -inf
            leaves no partner.

    Cost and determinism: one :func:`zipfast.ops.zip_match` on all spaces, and one host synchronisation, per added model;
    O(F²) for checks and linkage.  Ties, dead features (zeros) included: smallest group, then smallest feature.

    Example:
        >>> import torch
        >>> sim = torch.eye(6)
        >>> for i, j, v in [(0, 3, 0.9), (1, 2, 0.1), (0, 5, 0.8), (3, 5, 0.2), (1, 5, 0.6), (2, 5, 0.7)]:
        ...     sim[i, j] = sim[j, i] = v
        >>> groups = match_greedy_permutation(sim, 3)
        >>> groups.index.tolist(), groups.pair.tolist()
        ([0, 1, 1, 0, 0, 1], [[0, 3], [1, 2], [1, 5], [0, 4]])

    Reference: Li et al. 2015 (greedy matching across networks); Stoica et al. 2024 (arXiv 2305.03053), §4.3, β = 0.
    """
    op = "match_greedy_permutation"
    given = [similarity] if isinstance(similarity, Tensor) else list(similarity)
    labels = [f"#{s}" for s in range(len(given))] if names is None else list(names)
    if len(labels) != len(given):
        raise ValueError(f"{op}: 'names' must have one entry per space ({len(given)}), got {len(labels)}")
    sims = [_checked(op, sim, models, label) for sim, label in zip(given, labels)]
    if not sims:
        return []
    sizes = [sim.shape[0] // models for sim in sims]

    linkage = [sim[:size] for sim, size in zip(sims, sizes)]  # [D, F]: each group to each feature
    index = [[torch.arange(size)] for size in sizes]
    pairs = [[torch.empty(0, 2, dtype=torch.int64)] for _ in sims]
    values = [[sim.new_empty(0, device="cpu")] for sim in sims]
    for m in range(1, models):
        blocks = [link[:, m * size : (m + 1) * size] for link, size in zip(linkage, sizes)]
        # The groups stand for model 0 and the next model for model 1, with no budget for merges inside either.
        group, pair, value, status = zip_match_op([_across(b) for b in blocks], 2, sizes, [0] * len(sizes), 1.0, False)
        parts = zip(group.split([2 * size for size in sizes]), pair.cpu().split(sizes), value.cpu().split(sizes))
        for s, ((group_s, pair_s, value_s), row) in enumerate(zip(parts, status.tolist())):
            size = sizes[s]
            if row[DEADLOCK] >= 0 or row[LIFTED]:
                merges = (m - 1) * size + max(row[DEADLOCK], 0)
                raise ValueError(
                    f"{op}: no pair of space {labels[s]} is left after {merges} merges: all remaining similarities "
                    f"to features of model {m} are -inf"
                )
            of_next = group_s[size:]
            linkage[s] = torch.minimum(linkage[s], sims[s][m * size : (m + 1) * size][of_next.argsort()])
            index[s].append(of_next.cpu())
            pairs[s].append(pair_s + torch.tensor([0, (m - 1) * size]))
            values[s].append(value_s)
    found = [
        Groups(torch.cat(i), models, size, torch.cat(p), torch.cat(v))
        for i, size, p, v in zip(index, sizes, pairs, values)
    ]
    assert all(groups.is_permutation for groups in found)
    return found[0] if isinstance(similarity, Tensor) else found


def match_optimal(similarity: Tensor, models: int = 2) -> Groups:
    """Pair the 2·D stacked features so that the similarities of the pairs have the largest possible sum.

    In-model pairs are allowed: the best that any pairing can do, greedy :func:`zipfast.match` included (which may also
    form larger groups than pairs).

    Args:
        similarity: symmetric, finite [2·D, 2·D], float32 or float64; the diagonal is ignored.
        models: 2.

    Returns:
        Groups: D pairs, numbered by their lowest member; ``pair`` and ``value`` are empty.

    Raises:
        ImportError: networkx, which finds the pairing, is not installed.
        TypeError, ValueError: dtype; more or fewer than two models; not square, not symmetric, NaN or infinite.

    Cost and determinism: O(n³) in n = 2·D and pure Python: roughly 0.1 s for n = 64, 0.7 s for 128, 6 s for 256.
    Similarities are rounded to integers, 2⁻⁵² of the largest one apart, so that the search is exact.  Among several
    best pairings the choice is fixed, but not by lowest index.

    Example:
        >>> import torch
        >>> s = torch.eye(4)
        >>> for i, j, v in [(0, 2, 0.9), (0, 3, 0.8), (1, 2, 0.8)]:
        ...     s[i, j] = s[j, i] = v
        >>> match_optimal(s).index.tolist()  # 0.8 + 0.8, where the greedy choice of 0.9 leaves 0
        [0, 1, 1, 0]

    Reference: Stoica et al. 2024 (arXiv 2305.03053), table of matching algorithms; solver: Edmonds' blossom algorithm in
    networkx.max_weight_matching.
    """
    try:
        import networkx
    except ImportError as e:
        message = "match_optimal: networkx must be installed to find the pairing; pip install 'zipfast[optimal]'"
        raise ImportError(message) from e
    if models != 2:
        raise ValueError(f"match_optimal: 'models' must be 2, got {models}; use match or match_greedy_permutation")
    sim = _finite("match_optimal", _checked("match_optimal", similarity, models)).fill_diagonal_(0)
    largest = float(sim.abs().max()) or 1.0
    weight = (sim / largest * 2.0**52).round().long().tolist()
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, weight[i][j]) for j in range(len(weight)) for i in range(j))
    index = torch.empty(len(weight), dtype=torch.int64)
    for number, (i, j) in enumerate(sorted(map(sorted, networkx.max_weight_matching(graph, maxcardinality=True)))):
        index[i] = index[j] = number
    return _baseline(index, models)


def match_kmeans(similarity: Tensor, models: int = 2, seed: int = 0) -> Groups:
    """Cluster the stacked features into D groups: k-means on the rows of the similarity matrix, its diagonal set to 1.

    The public reference takes rows of the negated matrix, diagonal 10, and n - int(n(1-r)) clusters: right for M = 2 only.

    Args:
        similarity: symmetric, finite [F, F], float32 or float64, F = M·D; the diagonal is ignored.
        models: M, any number.
        seed: of the ten initialisations, in [0, 2³²).

    Returns:
        Groups: exactly D, none empty, of any sizes, numbered by their lowest member; ``pair`` and ``value`` are empty.
        Features with equal rows (perfect copies) leave k-means clusters short; then the largest cluster (ties: the one
        with the lowest member) is cut into its lower and its upper half by index, until there are D.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: dtype; seed out of range; not square, not symmetric, NaN or infinite, F not divisible by M.

    Cost and determinism: ten runs of O(F²·D) per iteration, roughly 1 s for F = 512; float64.  On one thread, since with
    several scikit-learn adds in varying order.  Versions of scikit-learn may differ.

    Example:
        >>> import torch
        >>> match_kmeans(torch.tensor([[1, 0.1, 0.9, 0], [0.1, 1, 0, 0.9], [0.9, 0, 1, 0.1], [0, 0.9, 0.1, 1]])).index
        tensor([0, 1, 0, 1])

    Reference: Stoica et al. 2024 (arXiv 2305.03053), table of matching algorithms; solver: sklearn.cluster.KMeans.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as e:
        message = "match_kmeans: scikit-learn must be installed to cluster; pip install 'zipfast[kmeans]'"
        raise ImportError(message) from e
    if not 0 <= seed < 2**32:
        raise ValueError(f"match_kmeans: 'seed' must be in [0, 2**32), got {seed}")
    rows = _finite("match_kmeans", _checked("match_kmeans", similarity, models)).fill_diagonal_(1)
    size = rows.shape[0] // models
    with threadpool_limits(1), warnings.catch_warnings():
        # The one warning to expect says that clusters fell together, which the loop below mends.
        warnings.simplefilter("ignore", ConvergenceWarning)
        label = KMeans(size, n_init=10, random_state=seed).fit(rows.numpy()).labels_.tolist()
    clusters = [[f for f, c in enumerate(label) if c == number] for number in sorted(set(label), key=label.index)]
    while len(clusters) < size:
        clusters.sort()  # by lowest member, of which max takes the first
        largest = max(clusters, key=len)
        half = (len(largest) + 1) // 2
        clusters.append(largest[half:])
        del largest[half:]
    index = torch.empty(len(label), dtype=torch.int64)
    for number, cluster in enumerate(sorted(clusters)):
        index[cluster] = number
    return _baseline(index, models)


def _baseline(index: Tensor, models: int) -> Groups:
    return Groups(index, models, index.shape[0] // models, torch.empty(0, 2, dtype=torch.int64), torch.empty(0))


def _across(block: Tensor) -> Tensor:
    """Symmetric [2·D, 2·D] with ``block`` [D, D] between two models; -inf inside each leaves no other pair at all."""
    size = block.shape[0]
    square = block.new_full((2 * size, 2 * size), -torch.inf)
    square[:size, size:], square[size:, :size] = block, block.T
    return square


def _checked(op: str, similarity: Tensor, models: int, label: str = "#0") -> Tensor:
    """The matrix, detached; refused where :func:`zipfast.match` would refuse it."""
    if not isinstance(similarity, Tensor) or similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1]:
        got = list(similarity.shape) if isinstance(similarity, Tensor) else type(similarity).__name__
        raise ValueError(f"{op}: 'similarity' of space {label} must be square [F, F], got {got}")
    sim, size = similarity.detach(), similarity.shape[0]
    if models < 1 or size == 0 or size % models:
        raise ValueError(
            f"{op}: 'similarity' of space {label} must stack {models} models of equal size, got {size} features"
        )
    if sim.dtype not in (torch.float32, torch.float64):
        dtype = str(sim.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: 'similarity' of space {label} must be float32 or float64, got {dtype}")
    status = [0, OK, _first(sim.isnan()), _first((sim != sim.T).triu())]  # as zip_match notes it
    try:
        _raise_for(label, size, status, False)
    except ValueError as e:
        raise ValueError(op + str(e).removeprefix("match")) from None
    return sim


def _finite(op: str, sim: Tensor) -> Tensor:
    """A float64 copy on the CPU, to be written to; refused with the place of the first infinity off the diagonal."""
    at = _first(sim.isinf())
    if at >= 0:
        i, j = divmod(at, sim.shape[0])
        raise ValueError(f"{op}: 'similarity' must be finite, got {float(sim[i, j])} at [{i}, {j}]")
    return sim.to("cpu", torch.float64, copy=True)


def _first(wrong: Tensor) -> int:
    """Flat index of the first True off the diagonal of a mask [F, F], which is written to, or -1."""
    flat = wrong.fill_diagonal_(False).reshape(-1)
    return int(flat.to(torch.uint8).argmax()) if bool(flat.any()) else -1
