# SPDX-License-Identifier: Apache-2.0
"""The public code's other matchings: identity, permutation, optimal pairing, k-means; same signatures and matrices.

All take what :func:`match_tensors_zipit` takes and return (merge [keep, F], unmerge [F, keep]); further keywords are
ignored, as ``ModelMerge.transform`` passes its own to every matching.  scipy, networkx and scikit-learn are imported by the
function that needs one.  No input is written to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...merging.baselines import match_permutation
from ._common import matrices, models_of, refuse_nan, similarity, stacked_features, two_models


def match_tensors_identity(
    metric: Mapping[str, Tensor], r: float = 0.5, add_bias: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Feature k of every model forms group k: weight averaging.  Of the metric only the size is read.

    Raises: ValueError: no usable metric; features that do not divide among 1/(1 - r) models.

    Example:
        >>> import torch
        >>> match_tensors_identity({"covariance": torch.eye(4)})[1].tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    features, device = stacked_features("match_tensors_identity", metric)
    models = models_of("match_tensors_identity", features, r)
    return matrices(torch.eye(features // models, device=device).repeat(models, 1), models, add_bias)


def match_tensors_permute(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Each further model permuted onto the first by the assignment of maximal total similarity.

    Args:
        metric: as for :func:`match_tensors_zipit`; only the rows of the first model are read.
        r: 1/(1 - r) is the number of models.
        get_merge_value: also return the mean similarity of the assigned pairs, of all models (the public code: of the last
            one only), as a NumPy scalar.
        add_bias: a row and column more in each model's block of the unmerge matrix, which pass a bias through.

    Raises:
        ImportError: no scipy.  ValueError: NaN (where the public code opens a debugger); no usable metric; features that do
        not divide among the models.

    Cost: O((N - 1)·D³), on the host, in float64.

    Reference: scipy.optimize.linear_sum_assignment; Ainsworth et al. 2023 (Git Re-Basin), §3.1.
    """
    name = "match_tensors_permute"
    sims = similarity(name, metric)
    features = sims.shape[0]
    models = models_of(name, features, r)
    size = features // models
    off_block = sims[:size].clone()
    off_block[:, :size] = 0  # never read
    refuse_nan(name, off_block)
    index = match_permutation(sims, models).index  # group of each feature
    unmerge = torch.nn.functional.one_hot(index, size).to(sims.device, torch.float32)
    result = matrices(unmerge, models, add_bias)
    if not get_merge_value:
        return result
    partner = index.reshape(models, size).argsort(1)  # [N, D]: which feature of each model is in group g
    host = sims.detach().cpu().numpy()
    rows = np.arange(size)
    pairs = [host[rows, m * size + partner[m].numpy()] for m in range(1, models)]
    return (*result, np.mean(pairs) if pairs else np.float32("nan"))


def match_tensors_optimal(
    metric: Mapping[str, Tensor], r: float = 0.5, add_bias: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The pairing of the 2·D features with the largest sum of similarities, in-model pairs allowed; two models.

    The groups stand in the order in which networkx returns the pairs, as the public code leaves them.

    Raises:
        ImportError: no networkx.  ValueError: NaN or infinity; another number of models; no usable metric.

    Cost: O(n³) in n = 2·D, in pure Python.  The similarities are given to the search as whole numbers, exactly, so that it
    ends at the optimum; the public code searches in float32.

    Reference: networkx.max_weight_matching (Edmonds' blossom algorithm).
    """
    name = "match_tensors_optimal"
    try:
        import networkx
    except ImportError as e:
        message = f"{name}: networkx must be installed to find the pairing; pip install 'zipfast[optimal]'"
        raise ImportError(message) from e
    sims = similarity(name, metric)
    features = sims.shape[0]
    size = two_models(name, features, r, "match_tensors_zipit")
    host = sims.detach().cpu().numpy()
    refuse_nan(name, sims)
    infinite = np.isinf(host)
    np.fill_diagonal(infinite, False)
    if infinite.any():
        i, j = (int(k[0]) for k in np.nonzero(infinite))
        raise ValueError(f"{name}: 'metric' must give finite similarities, got {host[i, j]} at [{i}, {j}]")
    # As the public code weighs them, in the dtype of the similarities; every weight is a multiple of 2^-52 then.
    usable = np.where(np.eye(features, dtype=bool) & ~np.isfinite(host), np.inf, host)
    weight = host - (usable.min(initial=np.inf) - 1)
    graph = networkx.Graph()
    graph.add_nodes_from(range(features))
    for i in range(features):
        for j in range(i):
            graph.add_edge(i, j, weight=int(float(weight[i, j]) * 2**52))
    unmerge = torch.zeros(features, size, device=sims.device)
    for group, pair in enumerate(networkx.max_weight_matching(graph)):
        unmerge[list(pair), group] = 1
    return matrices(unmerge, 2, add_bias)


def match_tensors_kmeans(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    add_bias: bool = False,
    random_state: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """k-means on the rows of the negated similarities, diagonal 10, into F·(1 - r) clusters.

    Args:
        random_state: of scikit-learn's initialisation; None draws from NumPy's global generator, as the public code does,
            so that ``numpy.random.seed`` gives the same groups for both.

    A cluster that scikit-learn leaves empty (features with equal rows) is a group without members, as in the public code;
    :func:`zipfast.merging.match_kmeans` fills it.

    Raises:
        ImportError: no scikit-learn.  ValueError: NaN or infinity; no usable metric.

    Reference: sklearn.cluster.KMeans; Stoica et al. 2024 (arXiv 2305.03053), table of matching algorithms.
    """
    name = "match_tensors_kmeans"
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        message = f"{name}: scikit-learn must be installed to cluster; pip install 'zipfast[kmeans]'"
        raise ImportError(message) from e
    sims = similarity(name, metric).clone()
    features = sims.shape[0]
    models = models_of(name, features, r)
    refuse_nan(name, sims)
    sims.fill_diagonal_(-10)
    if bool(sims.isinf().any()):
        i, j = divmod(int(sims.isinf().reshape(-1).to(torch.uint8).argmax()), features)
        raise ValueError(f"{name}: 'metric' must give finite similarities, got {float(sims[i, j])} at [{i}, {j}]")
    keep = int(features * (1 - r) + 1e-4)
    label = KMeans(n_clusters=keep, random_state=random_state).fit(-sims.cpu().numpy()).labels_
    unmerge = torch.zeros(features, keep, device=sims.device)
    unmerge[torch.arange(features), torch.as_tensor(label, dtype=torch.int64)] = 1
    return matrices(unmerge, models, add_bias)
