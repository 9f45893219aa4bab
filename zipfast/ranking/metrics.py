# SPDX-License-Identifier: Apache-2.0
"""Transferability metrics beside LogME: how well features, or a source model's outputs, fit the labels of a new task.

From one-pass statistics (:class:`Summary`): H-score, regularised H-score, LFC.  From all samples: TransRate, GBC, kNN,
N-LEEP (features), LEEP (probabilities), NCE (two labellings).  For all, higher is better, on one data set.

All arithmetic is float64 whatever the input and the precision flags of torch, on the device of the input; eigenproblems
and SVDs run on the host, as LAPACK is reliable on the rank-deficient matrices that are usual here.  Covariances of
features come from :class:`zipfast.Moments`.  Labels are int64, 0 to K-1; empty classes are ignored.  Nothing is random but
:func:`n_leep`, which is seeded; results are equal in every run on one machine with one number of threads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merging.moments import Moments

EPS = torch.finfo(torch.float64).eps
LARGEST = 1e36  # of a feature: float32, in which Moments keeps its shift, can hold it, and no sum of squares overflows
BLOCK = 2**23  # numbers that knn holds at a time


@dataclass(frozen=True)
class Summary:
    """What one pass over features [N, D] and labels [N] leaves: all that the H-scores and LFC need."""

    count: int  # N, the number of samples
    mean: Tensor  # [D] float64
    covariance: Tensor  # [D, D] float64, divided by N
    class_count: Tensor  # [K] float64, samples per class; 0 for an empty class
    class_mean: Tensor  # [K, D] float64; the rows of empty classes are 0 and carry no weight
    fourth: float  # sum over samples of ||x - mean||^4, for Ledoit-Wolf


def h_score(summary: Summary) -> float:
    r"""H-score: the variance between classes in units of the variance of the features; higher is better.

    .. math:: H = tr(cov(f)^+ \, cov(E[f|y])), \qquad cov(E[f|y]) = \sum_c (n_c / N) (m_c - m)(m_c - m)^T

    The pseudo-inverse drops eigenvalues of cov(f) of at most D·2⁻⁵² times the largest.  H lies in [0, min(D, K-1)] and is
    unchanged by invertible affine maps of the features.  With N <= D independent samples it is K-1 for any labels: take
    :func:`regularized_h_score` there.

    Args: summary, see :class:`Summary`.
    Returns: H; 0 for one class or features that do not vary.
    Raises: TypeError, ValueError: a field of another dtype or shape, not finite, or counts that do not sum to N.
    Cost: D³ + K·D².
    Example:
        >>> mean, count = torch.tensor([[1, 0.5], [-1, -0.5]]).double(), torch.tensor([2, 2]).double()
        >>> s = Summary(4, mean.mean(0), torch.tensor([[2, 0], [0, 0.5]]).double(), count, mean, 34.0)
        >>> round(h_score(s), 12)
        1.0

    Reference: Bao et al. 2019 (arXiv 2212.10082), definition of the H-score.
    """
    _check_summary("h_score", summary)
    return _ratio(*_spectrum(summary))


def ledoit_wolf_shrinkage(summary: Summary) -> float:
    r"""The weight a of the isotropic matrix that Ledoit and Wolf's estimate of the covariance takes.

    .. math:: a = \min(b, d) / d, \quad b = \frac{1}{N D} \Big(\frac{1}{N} \sum_i ||x_i - m||^4 - ||S||_F^2\Big), \quad
        d = \frac{1}{D} ||S - \mu I||_F^2, \quad \mu = tr(S) / D

    with the covariance S; the estimate is (1-a) S + a μ I.

    Args: summary, see :class:`Summary`; class counts and means are checked but not used.
    Returns: a in [0, 1]; 0 where S is a multiple of I already.
    Raises: TypeError, ValueError: as :func:`h_score`; ``fourth`` negative or not finite.
    Cost: D².
    Example:
        >>> mean, count = torch.tensor([[1, 0.5], [-1, -0.5]]).double(), torch.tensor([2, 2]).double()
        >>> s = Summary(4, mean.mean(0), torch.tensor([[2, 0], [0, 0.5]]).double(), count, mean, 34.0)
        >>> round(18 * ledoit_wolf_shrinkage(s), 12)
        17.0

    Reference: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    _check_summary("ledoit_wolf_shrinkage", summary, fourth=True)
    covariance, size = summary.covariance, summary.mean.shape[0]
    excess = covariance - covariance.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=covariance.device)
    distance = float(excess.square().sum()) / size
    noise = (summary.fourth / summary.count - float(covariance.square().sum())) / (summary.count * size)
    return min(max(noise, 0.0), distance) / distance if distance > 0 else 0.0


def regularized_h_score(summary: Summary) -> float:
    r"""H-score with a shrunk covariance, which keeps its meaning for few samples; higher is better.

    .. math:: H_a = tr\big(((1-a) S + a \mu I)^{-1} (1-a) \, cov(E[f|y])\big), \qquad \mu = tr(S) / D

    with the covariance S and a of :func:`ledoit_wolf_shrinkage`.  Unchanged by rotation, translation and one scale for all
    features.  For a = 0 the inverse is that of :func:`h_score`.

    Args: summary, see :class:`Summary`.
    Returns: H_a, at least 0; 0 for one class or features that do not vary.
    Raises: TypeError, ValueError: as :func:`ledoit_wolf_shrinkage`.
    Cost: D³ + K·D².
    Example:
        >>> mean, count = torch.tensor([[1, 0.5], [-1, -0.5]]).double(), torch.tensor([2, 2]).double()
        >>> s = Summary(4, mean.mean(0), torch.tensor([[2, 0], [0, 0.5]]).double(), count, mean, 34.0)
        >>> round(regularized_h_score(s), 6)
        0.054505

    Reference: Ibrahim et al. 2021 (arXiv 2110.06893), shrinkage-based H-score.
    """
    _check_summary("regularized_h_score", summary, fourth=True)
    alpha = ledoit_wolf_shrinkage(summary)
    variance, between = _spectrum(summary)
    return (1 - alpha) * _ratio((1 - alpha) * variance + alpha * variance.mean(), between)


def lfc(summary: Summary) -> float:
    r"""Label-feature correlation as linear CKA between features and one-hot labels; higher is better.

    .. math:: LFC = \frac{||F_c^T Y_c||_F^2}{||F_c^T F_c||_F \, ||Y_c^T Y_c||_F}

    with columns centred: the cosine between the kernels F Fᵀ and Y Yᵀ, centred by rows and columns, in [0, 1].  The paper's
    label kernel is +1 within a class, else -1; centred that is 2 Y Yᵀ, so it makes no difference.  Public implementations
    of LFC subtract the one mean of all entries of a kernel instead, and so give other values than linear CKA.

    Args: summary, see :class:`Summary`.
    Returns: LFC; 0 for one class or features that do not vary.
    Raises: TypeError, ValueError: as :func:`h_score`.
    Cost: D² + K·D; no matrix of N rows.
    Example:
        >>> mean, count = torch.tensor([[1, 0.5], [-1, -0.5]]).double(), torch.tensor([2, 2]).double()
        >>> s = Summary(4, mean.mean(0), torch.tensor([[2, 0], [0, 0.5]]).double(), count, mean, 34.0)
        >>> round(lfc(s), 6)
        0.606339

    Reference: Deshpande et al. 2021 (arXiv 2102.00084), LFC; Kornblith et al. 2019 (arXiv 1905.00414), linear CKA.
    """
    _check_summary("lfc", summary)
    total, counts = summary.count, [int(n) for n in summary.class_count.tolist()]
    second, third = sum(n**2 for n in counts), sum(n**3 for n in counts)
    # ||diag(n) - n nᵀ / N||_F; its square in integers, as the terms cancel where one class has nearly all samples
    of_labels = math.sqrt(total**2 * second - 2 * total * third + second**2) / total
    norms = of_labels * total * float(torch.linalg.matrix_norm(summary.covariance))
    deviation = (summary.class_mean - summary.mean) * summary.class_count[:, None]  # [K, D], (F_cᵀ Y_c)ᵀ
    return float(deviation.square().sum()) / norms if norms > 0 else 0.0


def transrate(features: Tensor, labels: Tensor, *, eps: float = 1e-4) -> float:
    r"""TransRate: the coding rate of all features less that within classes; higher is better.

    .. math:: R(F) - \sum_c (n_c / N) R(F_c), \qquad R(X) = \tfrac12 \ln\det(I + X^T X / (eps \cdot n))

    in nats, n the rows of X, features centred by the mean of all.  The widely used public implementation (tllib) weights
    classes by 1/K, not n_c/N: equal for classes of one size.  Rotation and translation change nothing; scale does.

    Args: features [N, D], any floating-point dtype; labels [N] int64; eps, the distortion allowed, above 0.
    Returns: the difference, at least 0 up to rounding, as ln det is concave; 0 for one class.
    Raises: TypeError, ValueError: dtype or shape; features that are not finite; labels below 0; eps.
    Cost: per class min(n_c, D)³ + n_c·D·min(n_c, D): the smaller of XᵀX and XXᵀ is taken.
    Example:
        >>> features = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # R(F) = ln 1.5, R(F_c) = ln 2 / 2
        >>> round(transrate(features, torch.tensor([0, 0, 1, 1]), eps=1.0), 6)
        0.058892

    Reference: Huang et al. 2022 (arXiv 2106.09362), coding rate and TransRate.
    """
    feat_nd, labels = _check_features("transrate", features, labels)
    _need("transrate", "eps", 0 < eps < math.inf, "finite and above 0", eps)
    feat_nd = feat_nd - feat_nd.mean(0)
    within = [len(rows) / len(feat_nd) * _rate(feat_nd[rows], eps) for rows in _classes(labels)]
    return _rate(feat_nd, eps) - math.fsum(within)


def gbc(features: Tensor, labels: Tensor, *, components: int | None = 64, floor: float = 1e-4) -> float:
    r"""GBC: how little the classes overlap, each seen as a Gaussian with diagonal covariance; higher is better.

    .. math:: -\sum_{i \ne j} e^{-B_{ij}}, \quad B_{ij} = \tfrac18 \sum_d (\mu_{id} - \mu_{jd})^2 / v_d
        + \tfrac12 \sum_d \ln\big(v_d / \sqrt{v_{id} v_{jd}}\big), \quad v_d = (v_{id} + v_{jd}) / 2

    over ordered pairs: each pair of classes counts twice.  Both sums run over all d.  Variances divide by n_c and are at
    least ``floor``, in squared units of the features.

    Args: features [N, D], any floating-point dtype; labels [N] int64; components, the principal ones to keep at most
        (features are rotated onto them also where D is smaller; None: taken as they are); floor, above 0.
    Returns: a number in [-K(K-1), 0]; 0 for one class.
    Raises: TypeError, ValueError: dtype or shape; features that are not finite; labels below 0; components; floor.
    Cost: N·D·min(N, D) + min(N, D)³ for the components, then K²·components.
    Example:
        >>> features = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])  # variances 1, means 4 apart: B = 16 / 8
        >>> round(gbc(features, torch.tensor([0, 0, 1, 1])), 12) == round(-2 * math.exp(-2), 12)
        True

    Reference: Pándy et al. 2022 (arXiv 2111.12780), Gaussian Bhattacharyya coefficient.
    """
    feat_nd, labels = _check_features("gbc", features, labels)
    _need("gbc", "components", components is None or components >= 1, "None or at least 1", components)
    _need("gbc", "floor", 0 < floor < math.inf, "finite and above 0", floor)
    if components is not None:
        centred, _, direction = _principal(feat_nd)
        feat_nd = centred @ direction[:, :components]
    moments = [torch.var_mean(feat_nd[rows], 0, correction=0) for rows in _classes(labels)]
    variance, mean = (torch.stack(part) for part in zip(*moments))  # [K, D] each
    variance = variance.clamp(min=floor)
    half_log = variance.log().sum(1) / 2
    total = feat_nd.new_zeros(())
    for i in range(len(moments) - 1):
        pooled = (variance[i] + variance[i + 1 :]) / 2
        distance = ((mean[i] - mean[i + 1 :]).square() / pooled).sum(1) / 8
        distance += (pooled.log().sum(1) - half_log[i] - half_log[i + 1 :]) / 2
        total += 2 * torch.exp(-distance).sum()
    return 0.0 - float(total)


def leep(probabilities: Tensor, labels: Tensor) -> float:
    r"""LEEP: mean log-likelihood of the labels under the source model's outputs, translated; higher is better.

    .. math:: \frac1N \sum_i \ln \sum_z P(y_i|z) \, \theta_{iz}, \qquad
        P(y|z) = \sum_{i: y_i = y} \theta_{iz} \Big/ \sum_i \theta_{iz}

    Source classes without mass are skipped, so that the result is never NaN.

    Args: probabilities θ [N, Cs], any floating-point dtype, rows of sum 1 within 0.01 (half precision); labels [N] int64.
    Returns: a number of at most 0, up to the rounding of the rows; 0 for one class.
    Raises: TypeError, ValueError: dtype or shape; values that are not finite; rows that are no distribution; labels below 0.
    Cost: 2·N·Cs, memory N·Cs + K·Cs.
    Example:
        >>> probabilities = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])  # P(0|0) = 2/3, P(1|0) = 1/3, P(1|1) = 1
        >>> round(leep(probabilities, torch.tensor([0, 1])), 12) == round(math.log(2 / 3), 12)
        True

    Reference: Nguyen et al. 2020 (arXiv 2002.12462), §3.
    """
    theta, labels = _check_features("leep", probabilities, labels, "probabilities")
    _need("leep", "probabilities", float(theta.min()) >= 0, "at least 0", f"{float(theta.min()):g}")
    off, worst = (theta.sum(1) - 1).abs().max(0)
    seen = f"{float(theta[worst].sum()):g} in row {int(worst)}; apply softmax to logits"
    _need("leep", "probabilities", float(off) <= 0.01, "rows that sum to 1", seen)
    mass = theta.sum(0).clamp(min=torch.finfo(torch.float64).tiny)  # 0 / tiny = 0 for a source class without mass
    parts = [theta[rows] for rows in _classes(labels)]
    likelihood = [(part @ (part.sum(0) / mass)).log().sum() for part in parts]
    return float(torch.stack(likelihood).sum()) / len(theta)


def nce(source_labels: Tensor, labels: Tensor) -> float:
    r"""NCE: the negative entropy of the labels given the source model's predictions; higher is better.

    .. math:: -H(Y|Z) = \sum_{z,y} (n_{zy} / N) \ln (n_{zy} / n_z)

    Pairs that do not occur add exactly 0 (the public implementation of tllib adds 1e-20 inside the logarithm).

    Args: source_labels z [N] int64, the source classes with the highest probability; labels y [N] int64.
    Returns: a number of at most 0; 0 where the source label determines the label.
    Raises: TypeError, ValueError: dtype or shape; no sample; labels below 0.
    Cost: N log N; no matrix of classes by classes.
    Example:
        >>> round(nce(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])), 12) == round(-math.log(2) / 2, 12)
        True

    Reference: Tran et al. 2019 (arXiv 1908.08142), negative conditional entropy.
    """
    source = _check_labels("nce", "source_labels", source_labels)
    target = _check_labels("nce", "labels", labels, source.shape[0]).to(source.device)
    _, z = source.unique(return_inverse=True)
    kinds, y = target.unique(return_inverse=True)
    pair, joint = (z * len(kinds) + y).unique(return_counts=True)
    alone = z.bincount()[pair // len(kinds)]
    return float((joint * (joint.double() / alone).log()).sum()) / len(z)


def knn(features: Tensor, labels: Tensor, *, k: int = 5, metric: str = "cosine") -> float:
    r"""Leave-one-out accuracy of the vote of the k nearest other samples; higher is better.

    .. math:: \frac1N \sum_i [\, y_i = vote(\{y_j : j \in kNN(i)\}) \,]

    Ties: among samples at one distance the lower index is nearer; of the classes with the most votes that of the nearest
    neighbour wins.  Copies of a sample are at one distance, to the bit.  For cosine a sample of zeros is at right angles to
    every other, and equal to its like.

    Args: features [N, D], any floating-point dtype; labels [N] int64; k, 1 to N-1; metric, "cosine" or "euclidean".
    Returns: the accuracy in [0, 1].
    Raises: TypeError, ValueError: dtype or shape; features that are not finite; labels below 0; k; metric.
    Cost: N²·D, memory O(block·N), some 2²³ numbers at a time.
    Example:
        >>> features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.3]])
        >>> knn(features, torch.tensor([0, 0, 1, 1, 1]), k=1)
        0.8

    Reference: Sorkhei et al. 2025 (arXiv 2503.18528), kNN as an estimator of transferability.
    """
    feat_nd, labels = _check_features("knn", features, labels)
    samples = feat_nd.shape[0]
    _need("knn", "metric", metric in ("cosine", "euclidean"), "'cosine' or 'euclidean'", repr(metric))
    _need("knn", "k", 1 <= k < samples, f"at least 1 and less than the number of samples, {samples}", k)
    if metric == "cosine":  # between unit vectors the squared distance is twice the cosine distance
        norm = torch.linalg.vector_norm(feat_nd, dim=1, keepdim=True)
        feat_nd = torch.cat([feat_nd / torch.where(norm > 0, norm, 1.0), (norm == 0).double()], 1)
    correct = 0
    block = max(1, BLOCK // max(samples, k * k))
    for start in range(0, samples, block):
        near = labels[_nearest(feat_nd, start, min(start + block, samples), k)]  # [block, k], by distance
        votes = (near[:, :, None] == near[:, None, :]).sum(2)
        winner = near.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # argmax: the first, so the nearest
        correct += int((winner == labels[start : start + block]).sum())
    return correct / samples


def n_leep(
    features: Tensor, labels: Tensor, *, share: float = 0.8, clusters: int | None = None, seed: int = 0
) -> float:
    r"""N-LEEP: :func:`leep` of the responsibilities of a Gaussian mixture on principal components; higher is better.

    The fewest components with more than ``share`` of the variance are kept; a mixture of Gaussians with full covariances
    is fitted to them, and its posterior p(z|x) takes the place of the source model's probabilities.

    Args: features [N, D], any floating-point dtype, N at least 2; labels [N] int64; share in (0, 1); clusters, the
        Gaussians (None: 5·K with the K classes that occur, at most N); seed of the initialisation, in [0, 2³²).
    Returns: as :func:`leep`; for features that do not vary minus the entropy of the labels.
    Raises: ImportError: no scikit-learn.  TypeError, ValueError: dtype, shape; not finite; labels below 0; an option.
    Cost: EM, on the host and one thread, so that runs are equal; versions of scikit-learn may differ.
    Example:
        >>> features = torch.tensor([[-3.0], [-3.1], [3.0], [3.1]])
        >>> abs(round(n_leep(features, torch.tensor([0, 0, 1, 1]), clusters=2), 6))
        0.0

    Reference: Li et al. 2021 (arXiv 2011.11200), N-LEEP; solver: sklearn.mixture.GaussianMixture.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits
    except ImportError as e:
        message = "n_leep: scikit-learn must be installed to fit the mixture; pip install 'zipfast[kmeans]'"
        raise ImportError(message) from e
    feat_nd, labels = _check_features("n_leep", features, labels)
    samples = feat_nd.shape[0]
    right = clusters is None or 1 <= clusters <= samples
    _need("n_leep", "features", samples >= 2, "of at least 2 samples", samples)
    _need("n_leep", "share", 0 < share < 1, "above 0 and below 1", share)
    _need("n_leep", "clusters", right, f"None or from 1 to the number of samples, {samples}", clusters)
    _need("n_leep", "seed", 0 <= seed < 2**32, "in [0, 2**32)", seed)
    centred, spread, direction = _principal(feat_nd)
    part = spread.cumsum(0)
    if float(part[-1]) <= feat_nd.shape[1] * (4 * EPS * float(feat_nd.abs().max())) ** 2:  # rounding of the mean
        return leep(feat_nd.new_ones(samples, 1), labels)
    kept = int((part <= share * part[-1]).sum()) + 1
    points = (centred @ direction[:, :kept]).cpu().numpy()
    floor = max(1e-6, 2.0**-40 * float(spread[0]))  # scikit-learn's own up to a variance of 10⁶, then above rounding
    size = clusters or min(5 * len(labels.unique()), samples)
    mixture = GaussianMixture(size, reg_covar=floor, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates leave clusters empty, which does no harm
        posterior = mixture.fit(points).predict_proba(points)
    return leep(torch.from_numpy(posterior), labels.cpu())


OfFeatures = Callable[[Tensor, Tensor], float]  # of features or probabilities, and labels
FROM_SUMMARY: dict[str, Callable[[Summary], float]] = {"hscore": h_score, "reg_hscore": regularized_h_score, "lfc": lfc}
FROM_FEATURES: dict[str, OfFeatures] = {"transrate": transrate, "gbc": gbc, "knn": knn, "nleep": n_leep}
FROM_PROBABILITIES: dict[str, OfFeatures] = {"leep": leep}


def _spectrum(summary: Summary) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariance, ascending, and the variance between classes along each eigenvector: [D] each, host."""
    variance, direction = torch.linalg.eigh(summary.covariance.cpu())
    deviation = (summary.class_mean - summary.mean).cpu() @ direction
    return variance.clamp(min=0), (summary.class_count.cpu() / summary.count) @ deviation.square()


def _ratio(variance: Tensor, between: Tensor) -> float:
    """Sum of between / variance, less the directions in which the variance is rounding."""
    alive = variance > len(variance) * EPS * variance.max()
    return float((between[alive] / variance[alive]).sum())


def _rate(feat_nd: Tensor, eps: float) -> float:
    """½ ln det(I + XᵀX / (eps·n)); eigenvalues rather than Cholesky, as XᵀX / eps may be singular beside I by rounding."""
    samples, size = feat_nd.shape
    if samples < size:
        gram = feat_nd @ feat_nd.T  # between samples: the streaming op gives products of features
    else:
        moments = Moments(1).update(feat_nd, axis=1)
        gram = (moments.covariance() + torch.outer(moments.mean(), moments.mean())) * samples
    value = torch.linalg.eigvalsh(gram.cpu()).clamp(min=0)
    return 0.5 * float(torch.log1p(value / (eps * samples)).sum())


def _principal(feat_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred features [N, D], variances [min(N, D)] in falling order, and their directions [D, min(N, D)]."""
    samples, size = feat_nd.shape
    centred = feat_nd - feat_nd.mean(0)
    if samples < size:
        _, value, direction = torch.linalg.svd(centred.cpu(), full_matrices=False)
        return centred, value.square() / samples, direction.T.to(feat_nd.device)
    variance, direction = torch.linalg.eigh(Moments(1).update(feat_nd, axis=1).covariance().cpu())
    return centred, variance.clamp(min=0).flip(0), direction.flip(1).to(feat_nd.device)


def _nearest(feat_nd: Tensor, start: int, stop: int, k: int) -> Tensor:
    """The k nearest others of samples start to stop, by distance, then index: [stop - start, k]."""
    centred = feat_nd - feat_nd.mean(0)
    norm = centred.square().sum(1)
    rough = norm[start:stop, None] + norm - 2 * (centred[start:stop] @ centred.T)
    rows = torch.arange(stop - start, device=feat_nd.device)
    rough[rows, rows + start] = torch.inf
    slack = 4 * (feat_nd.shape[1] + 4) * EPS * (norm[start:stop] + norm.max())
    # All that may be among the k nearest, given the rounding of the product; only these are measured directly.
    limit = rough.topk(k, largest=False).values.amax(1) + 2 * slack
    width = int((rough <= limit[:, None]).sum(1).max())
    candidate = rough.topk(width, largest=False).indices.sort(1).values
    chunk = max(1, BLOCK // (width * feat_nd.shape[1]))
    result = []
    for some in rows.split(chunk):
        index = candidate[some]
        exact = (feat_nd[some + start, None] - feat_nd[index]).square().sum(2)
        result.append(index.gather(1, exact.sort(dim=1, stable=True).indices[:, :k]))
    return torch.cat(result)


def _classes(labels: Tensor) -> list[Tensor]:
    """The samples of each class that occurs, by class, then index: sums by class without atomics, so always alike."""
    order = labels.argsort(stable=True)
    _, count = labels[order].unique_consecutive(return_counts=True)
    return list(order.split(count.tolist()))


def _check_features(op: str, features: Tensor, labels: Tensor, name: str = "features") -> tuple[Tensor, Tensor]:
    """Features in float64 and labels on their device."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{op}: '{name}' must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"{op}: '{name}' must be floating-point, got {features.dtype}")
    shape = list(features.shape)
    _need(op, name, len(shape) == 2 and 0 not in shape, "[N, D] with N and D at least 1", shape)
    feat_nd = features.detach().double()
    bad = ~(feat_nd.abs() <= LARGEST).reshape(-1)
    row, column = divmod(int(bad.to(torch.uint8).argmax()), feat_nd.shape[1])
    seen = f"{float(feat_nd[row, column]):g} at [{row}, {column}]"
    _need(op, name, not bool(bad.any()), f"finite and at most {LARGEST:g} in size", seen)
    return feat_nd, _check_labels(op, "labels", labels, feat_nd.shape[0]).to(feat_nd.device)


def _check_labels(op: str, name: str, labels: Tensor, samples: int | None = None) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{op}: '{name}' must be an int64 tensor, got {got}")
    right = labels.dim() == 1 and labels.shape[0] == (samples or max(1, labels.numel()))
    _need(op, name, right, f"[N] with N = {samples or 'at least 1'}", list(labels.shape))
    _need(op, name, int(labels.min()) >= 0, "at least 0", int(labels.min()))
    return labels


def _check_summary(op: str, summary: Summary, *, fourth: bool = False) -> None:
    if not isinstance(summary, Summary):
        raise TypeError(f"{op}: 'summary' must be a Summary, got {type(summary).__name__}")
    size, classes = summary.mean.numel(), summary.class_count.numel()
    shapes = {"mean": [size], "covariance": [size, size], "class_count": [classes], "class_mean": [classes, size]}
    for name, shape in shapes.items():
        value = getattr(summary, name)
        if value.dtype != torch.float64:
            raise TypeError(f"{op}: 'summary.{name}' must be float64, got {value.dtype}")
        right = list(value.shape) == shape and value.numel() > 0
        _need(op, f"summary.{name}", right, f"{shape} and not empty", list(value.shape))
        wrong = int((~value.isfinite()).sum())
        _need(op, f"summary.{name}", wrong == 0, "finite", f"{wrong} values that are not")
    count, total = summary.class_count, float(summary.class_count.sum())
    right = bool((count == count.round()).all()) and float(count.min()) >= 0 and total == summary.count > 0
    wanted = f"whole numbers from 0 that sum to 'summary.count', {summary.count}, above 0"
    _need(op, "summary.class_count", right, wanted, f"{count.tolist()[:4]}, ... with the sum {total:g}")
    right = not fourth or 0 <= summary.fourth < math.inf
    _need(op, "summary.fourth", right, "finite and at least 0", summary.fourth)


def _need(op: str, name: str, right: bool, wanted: str, seen: object) -> None:
    if not right:
        raise ValueError(f"{op}: '{name}' must be {wanted}, got {seen}")
