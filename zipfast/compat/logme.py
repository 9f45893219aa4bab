# SPDX-License-Identifier: Apache-2.0
"""Drop-in for the public LogME code (github.com/thuml/LogME at 56551ca): LogME, LEEP and NCE, their signatures and results.

NumPy arrays, as there, and torch tensors or lists.  What the public code answers with NaN, a wrong number or an error from
deep inside is refused in one sentence, or computed right; docs/compat/logme.md lists both.  :func:`install` puts these
into imported modules of that code.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..ranking.logme import LogME
from ..ranking.metrics import leep, nce
from ..ranking.targets import Array, as_classes, as_features
from . import _patch

__all__ = ["LEEP", "NCE", "LogME", "check", "install"]


def LEEP(pseudo_source_label: Array, target_label: Array) -> np.float64:
    """LEEP of a source model's probabilities for the labels of the new task; higher is better.

    Args:
        pseudo_source_label: [N, C_s], rows that sum to 1 (within 0.01).
        target_label: [N] or [N, 1], classes from 0.

    A source class that no sample has any probability for counts nothing; the public code returns NaN then.

    Raises:
        TypeError, ValueError: rows that are no distribution (logits: apply softmax), NaN, negative or broken labels.

    Cost: 2·N·C_s, in float64.

    Example:
        >>> import numpy as np
        >>> round(float(LEEP(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]))), 6)
        -0.405465

    Reference: Nguyen et al. 2020 (arXiv 2002.12462), §3.
    """
    with _named("LEEP", "pseudo_source_label"):
        probabilities = as_features("LEEP", pseudo_source_label)
    with _named("LEEP", "target_label"):
        labels = as_classes("LEEP", target_label, probabilities.shape[0])
    with _named("LEEP", "pseudo_source_label"):
        result: np.float64 = np.float64(leep(probabilities, labels))
        return result


def NCE(source_label: Array, target_label: Array) -> np.float64:
    """NCE, the negative entropy of the labels given the source model's predicted classes; higher is better.

    Args:
        source_label: [N] or [N, 1], the source class with the largest probability, from 0.
        target_label: [N] or [N, 1], classes from 0.

    Pairs that do not occur add exactly 0 (the public code adds 1e-20 inside the logarithm: less than rounding).

    Raises:
        TypeError, ValueError: no whole numbers, negative ones, no samples, different lengths (the public code takes the
            shorter one and the wrong N).

    Cost: N log N, whatever the number of classes.

    Example:
        >>> import numpy as np
        >>> round(float(NCE(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))), 6)
        -0.346574

    Reference: Tran et al. 2019 (arXiv 1908.08142).
    """
    with _named("NCE", "source_label"):
        source = as_classes("NCE", source_label)
    with _named("NCE", "target_label"):
        target = as_classes("NCE", target_label, source.shape[0])
    with _named("NCE", "source_label"):
        result: np.float64 = np.float64(nce(source, target))
        return result


def install(
    checkout: ModuleType | None = None,
    *,
    names: Sequence[str] | None = None,
    also: Sequence[ModuleType] = (),
) -> _patch.Installed:
    """Make imported modules LogME, LEEP and NCE of a checkout of github.com/thuml/LogME compute with zipfast.

    As :func:`zipfast.compat.zipit.install`: what is replaced is first compared on small problems, the handle that is
    returned lists it and takes it back.

    Raises:
        ImportError: none of the modules has been imported.
        ValueError: an unknown name; several checkouts; served by zipfast already; another result on the small problems.
    """
    return _patch.install(TOOL, checkout, names, also)


def check(checkout: ModuleType | None = None, *, names: Sequence[str] | None = None) -> dict[str, float]:
    """Compare with imported modules on small problems, and replace nothing: name -> largest difference.

    Raises: as :func:`install`.
    """
    return _patch.check(TOOL, checkout, names)


@contextlib.contextmanager
def _named(op: str, argument: str) -> Iterator[None]:
    """Errors of the functions below name the argument as the caller knows it."""
    try:
        yield
    except (TypeError, ValueError) as e:
        told = str(e).partition(": ")[2]
        for inside in ("features", "probabilities", "source_labels", "labels"):
            told = told.replace(f"'{inside}'", f"'{argument}'")
        for option in ("; rows to leave out are named by", "; for values use", ", for several labels a sample"):
            told = told.partition(option)[0]  # what follows is about options that these functions have not
        raise type(e)(f"{op}: {told}") from None


def _problem(samples: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and three classes, without any random generator: the caller's must not move."""
    n, d = np.arange(samples)[:, None], np.arange(size)[None, :]
    features = np.sin(1.0 + 12.9898 * n + 78.233 * d + n * d) + 0.3 * np.cos((n % 3) * (d + 1.0))
    return features, np.arange(samples) % 3


def _of_logme(theirs: Any, ours: Any) -> float:
    worst = 0.0
    before = LogME._warned
    try:
        for samples, size, regression in ((60, 7, False), (12, 20, False), (60, 7, True)):
            features, labels = _problem(samples, size)
            targets = np.stack([features[:, 0] ** 2, labels], 1).astype(np.float64) if regression else labels
            both = []
            for kind in (theirs, ours):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = kind(regression=regression)
                    both.append((float(model.fit(features, targets)), np.asarray(model.predict(features[:5]), float)))
            (score, answer), (other, ours_answer) = both
            worst = max(worst, abs(score - other), float(np.abs(answer - ours_answer).max()))
    finally:
        LogME._warned = before  # the small problems must not use up the one warning of a process
    return worst


def _of_leep(theirs: Callable[..., float], ours: Callable[..., float]) -> float:
    features, labels = _problem(40, 6)
    probabilities = np.exp(features) / np.exp(features).sum(1, keepdims=True)
    return abs(float(theirs(probabilities, labels)) - float(ours(probabilities, labels)))


def _of_nce(theirs: Callable[..., float], ours: Callable[..., float]) -> float:
    features, labels = _problem(40, 6)
    source = features.argmax(1)
    return abs(float(theirs(source, labels)) - float(ours(source, labels)))


TOOL = _patch.Tool(
    op="logme.install",
    source="github.com/thuml/LogME at 56551ca",
    example="LogME, LEEP or NCE",
    names=[
        _patch.Name("LogME", "LogME", LogME, _of_logme, 1e-9),
        _patch.Name("LEEP", "LEEP", LEEP, _of_leep, 1e-12),
        _patch.Name("NCE", "NCE", NCE, _of_nce, 1e-12),
    ],
)
