# SPDX-License-Identifier: Apache-2.0
"""Cases of ops in which packages other than torch take part, each where it gives the same result.

``zip_match`` with alpha = 1 and no budget is complete linkage: a group is as similar as its least similar members, so that
scipy, fastcluster and scikit-learn must find the same groups. With alpha = 0 it pairs features greedily, which networkx
does optimally: the greedy sum is at least half of the optimum (Avis 1983), and that is what is agreed on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch
from harness import Job, Peer
from torch import Tensor

import zipfast

SPARSE = {"quick": (512, 512, 90, 8), "full": (4096, 4096, 95, 64)}  # out, columns, per cent sparse, batch


def of_op(op: str, device: str, quick: bool, use: Collection[str]) -> list[Any]:
    """The cases of an op that have a peer in ``use``; these packages compute on the CPU."""
    if torch.device(device).type != "cpu" or op not in BUILDERS:
        return []
    return list(BUILDERS[op](quick, use))


def planned(case: str, need: float, make: Callable[[], Job]) -> Any:
    from plan import Planned

    return Planned(case, need, make)


# ------------------------------------------------------------------------------------------------------------ zip_match


def cut(tree: np.ndarray, features: int, keep: int) -> np.ndarray:
    """The group of each feature after the first ``features - keep`` merges of a linkage matrix."""
    owner = list(range(2 * features - keep))

    def root(i: int) -> int:
        while owner[i] != i:
            i = owner[i]
        return i

    for step, (a, b) in enumerate(tree[: features - keep, :2].astype(int)):
        owner[root(a)] = owner[root(b)] = features + step
    return np.array([root(i) for i in range(features)])


def same_partition(ours: Tensor, theirs: np.ndarray) -> None:
    pairs = set(zip(ours.tolist(), theirs.tolist()))
    if not len(pairs) == len(set(ours.tolist())) == len(set(theirs.tolist())):
        raise AssertionError("the groups are others")


def linkage_job(n: int, use: Collection[str]) -> Job:
    import bench_zip_match as bench

    sim = bench.similarity(n)
    keep = n // 4
    distance = (1 - sim.double()).numpy()
    condensed = distance[np.triu_indices(n, 1)]
    found: dict[str, Peer] = {}
    if "scipy" in use:
        from scipy.cluster import hierarchy

        found["scipy linkage, complete"] = Peer(
            lambda: cut(hierarchy.linkage(condensed, "complete"), n, keep), package="scipy"
        )
    if "fastcluster" in use:
        import fastcluster

        found["fastcluster linkage, complete"] = Peer(
            lambda: cut(fastcluster.linkage(condensed, "complete"), n, keep), package="fastcluster"
        )
    if "scikit-learn" in use:
        from sklearn.cluster import AgglomerativeClustering

        found["AgglomerativeClustering"] = Peer(
            lambda: AgglomerativeClustering(keep, metric="precomputed", linkage="complete").fit(distance).labels_,
            package="scikit-learn",
        )

    def ours() -> Tensor:
        return zipfast.ops.zip_match([sim], bench.MODELS, [keep], [n], 1.0, False)[0]

    def agree(a: Tensor, b: np.ndarray, name: str) -> None:
        same_partition(a, b)

    return Job(bench.OP, f"n={n}, complete linkage", Peer(ours), found, agree, {"bytes": 8.0 * n**2})


def pairing_job(n: int) -> Job:
    """Similarities are moved into [0, 1], so that every pair is worth something."""
    import bench_zip_match as bench
    import networkx

    sim = (bench.similarity(n) + 1) / 2
    weight = sim.double().tolist()
    graph = networkx.Graph()
    graph.add_weighted_edges_from((i, j, weight[i][j]) for i in range(n) for j in range(i))

    def ours() -> Tensor:
        return zipfast.ops.zip_match([sim], bench.MODELS, [n // 2], [n], 0.0, False)[2]

    def best() -> float:
        return sum(weight[i][j] for i, j in networkx.max_weight_matching(graph, maxcardinality=True))

    def agree(value: Tensor, most: float, name: str) -> None:
        found = float(value.double().sum())
        assert 0.5 * most <= found <= most * (1 + 1e-6), f"greedy pairs sum to {found:.6g}, the best to {most:.6g}"

    peers = {"max_weight_matching": Peer(best, package="networkx")}
    return Job(bench.OP, f"n={n}, pairs (the peer's are the best)", Peer(ours), peers, agree, {"bytes": 8.0 * n**2})


def zip_match(quick: bool, use: Collection[str]) -> Iterator[Any]:
    if {"scipy", "fastcluster", "scikit-learn"} & set(use):
        for n in (128,) if quick else (512, 2048):
            yield planned(f"n={n}, complete linkage", 90.0 * n**2, functools.partial(linkage_job, n, use))
    if "networkx" in use:
        n = 32 if quick else 128
        yield planned(f"n={n}, pairs", 400.0 * n**2, functools.partial(pairing_job, n))


# --------------------------------------------------------------------------------------------------------- other ops


def moments_job(channels: int, side: int, batch: int) -> Job:
    import bench_moments as bench
    import peers

    case = bench.Case(channels, side, batch)
    features = bench.activations(case, "cpu")
    state = bench.State(features, [channels], "cpu")

    def cov() -> Tensor:
        return torch.from_numpy(np.cov(np.concatenate([peers.as_rows(x, 1).numpy() for x in features])))

    def agree(ours: Any, theirs: Tensor, name: str) -> None:
        peers.close(peers.cov_of(ours.comoment[0], ours.total[0], case.samples), theirs, 1e-4)

    found = {"numpy.cov": Peer(cov, package="numpy")}
    options = {"bytes": case.bytes, "flops": case.flops, "rate": "fp32"}
    return Job(bench.OP, f"{case.name}, as numpy arrays", Peer(bench.State.update, state.reset), found, agree, options)


def moments(quick: bool, use: Collection[str]) -> Iterator[Any]:
    if "numpy" in use:
        shape = (64, 8, 8) if quick else (256, 14, 64)
        need = 2 * 8 * 8.0 * shape[0] * shape[1] ** 2 * shape[2]
        yield planned(f"{shape[0]}@{shape[1]}², as numpy arrays", need, functools.partial(moments_job, *shape))


def correlate_job(n: int) -> Job:
    import bench_correlate as bench

    given = bench.sums(bench.Case(f"F={n}", (n,)), "cpu")
    comoment, total, count = given[0][0].numpy(), given[1][0].numpy(), given[3][0]

    def by_numpy() -> list[Tensor]:
        mean = total / count
        covariance = comoment / count - np.outer(mean, mean)
        deviation = np.sqrt(covariance.diagonal())
        result = covariance / np.outer(deviation, deviation)
        return [torch.from_numpy(result.clip(-1, 1).astype(np.float32))]

    found = {"numpy": Peer(by_numpy, package="numpy")}
    options = {"bytes": 8.0 * n * (n + 1)}
    return Job(
        bench.OP,
        f"F={n}, as numpy arrays",
        Peer(lambda: zipfast.ops.correlate(*given, False, False)[0]),
        found,
        bench.agree,
        options,
    )


def correlate(quick: bool, use: Collection[str]) -> Iterator[Any]:
    if "numpy" in use:
        n = 256 if quick else 2048
        yield planned(f"F={n}, as numpy arrays", 80.0 * n**2, functools.partial(correlate_job, n))


def sparse_job(out: int, columns: int, sparsity: int, batch: int, use: Collection[str]) -> Job:
    """Forward, where scipy and SparseLab keep [features, batch]; their copies into that shape are theirs to pay for."""
    import bench_sparse_linear as bench

    case = bench.Case(out, columns, sparsity, batch)
    start, column, value = bench.layout(case, "cpu")
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1))
    found: dict[str, Peer] = {}
    if "scipy" in use:
        from scipy import sparse

        matrix = sparse.csr_matrix((value.numpy(), column.int().numpy(), start.numpy()), (out, columns))
        found["scipy CSR"] = Peer(lambda: torch.from_numpy((matrix @ x.numpy().T).T), package="scipy")
    if "SparseLab" in use:
        import sparselab

        weight = bench.unpack_weight(start, column, value, columns)
        padded = sparselab.PaddedCSR.from_dense(weight)
        found["SparseLab spmm"] = Peer(lambda: sparselab.spmm(padded, x.T.contiguous()).T, package="SparseLab")

    def agree(ours: Tensor, theirs: Tensor, name: str) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))

    options = {"bytes": 6.0 * len(value), "flops": 2.0 * len(value) * batch, "rate": "fp32"}
    ours = Peer(lambda: zipfast.ops.sparse_linear(start, column, value, x, None))
    return Job(bench.OP, f"{case.name}, other packages", ours, found, agree, options)


def sparse_linear(quick: bool, use: Collection[str]) -> Iterator[Any]:
    if {"scipy", "SparseLab"} & set(use):
        shape = SPARSE["quick" if quick else "full"]
        need = 40.0 * shape[0] * shape[1]
        yield planned(f"{shape[0]} x {shape[1]}, other packages", need, functools.partial(sparse_job, *shape, use))


def gram_job(width: int, models: int) -> Job:
    import bench_blend
    import bench_gram as bench

    x = bench_blend.models(width, models + 1, torch.float32, "cpu")
    count = len(x) // (models + 1)
    base, x = x[:count], x[count:]

    def stacked() -> Tensor:
        found = []
        for j in range(count):
            rows = np.stack([(t.numpy() - base[j].numpy()).ravel().astype(np.float64) for t in x[j::count]])
            found.append(rows @ rows.T)
        return torch.from_numpy(np.stack(found))

    size = float(sum(t.numel() for t in base))
    options = {"bytes": 4 * size * (models + 1), "flops": size * models * (models + 1), "rate": "fp64"}
    found = {"numpy float64 @ T": Peer(stacked, package="numpy")}
    ours = Peer(lambda: zipfast.ops.gram(x, models, base, "auto"))
    return Job(bench.OP, f"{models} models, width {width}, as numpy arrays", ours, found, bench.agree, options)


def gram(quick: bool, use: Collection[str]) -> Iterator[Any]:
    if "numpy" in use:
        width, models = (64, 4) if quick else (256, 8)
        need = 12.0 * (models + 2) * 160 * width**2 + 3e8
        yield planned(f"{models} models, as numpy arrays", need, functools.partial(gram_job, width, models))


BUILDERS: dict[str, Callable[[bool, Collection[str]], Iterator[Any]]] = {
    "zip_match": zip_match,
    "moments": moments,
    "correlate": correlate,
    "sparse_linear": sparse_linear,
    "gram": gram,
}
