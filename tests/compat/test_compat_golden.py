# SPDX-License-Identifier: Apache-2.0
"""The drop-ins against what the public codes answered (tests/golden/*.json, recorded by record_public.py there).

Where ZIPFAST_ZIPIT or ZIPFAST_LOGME names a checkout, it is recorded again and must say the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkouts import imported

from zipfast.compat import logme, zipit

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

import record_public as record  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:LogME. the public formula")  # once per process, wherever it comes first

ZIPIT = json.loads((GOLDEN / "zipit.json").read_text(encoding="utf-8"))
LOGME = json.loads((GOLDEN / "logme.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(ZIPIT["signatures"]))
def test_signatures_of_zipit(name):
    """The public parameters come first, in the same order with the same defaults; ours may follow."""
    check_signature(getattr(zipit, name), ZIPIT["signatures"][name])


@pytest.mark.parametrize("name", list(LOGME["signatures"]))
def test_signatures_of_logme(name):
    check_signature(getattr(logme, name, None) or getattr(logme.LogME, name), LOGME["signatures"][name])


def check_signature(call, theirs):
    ours = record.signature(call)
    positional = [p for p in theirs if p[1] == "POSITIONAL_OR_KEYWORD"]
    assert ours[: len(positional)] == positional
    assert {p[1] for p in theirs} <= {p[1] for p in ours}
    assert all(p[2] for p in ours[len(positional) :] if p[1] != "VAR_KEYWORD")  # what ours have more has a default


def test_zipit():
    refused = 0
    for (kind, models, size, seed, a, b), want in zip(record.matching_cases(), ZIPIT["zipit"], strict=True):
        given, r = record.metric(kind, models, size, seed), 1 - 1 / models
        if want is None:  # the public code gives features to no group
            refused += 1
            with pytest.raises(ValueError, match="no pair is left"):
                zipit.match_tensors_zipit(given, r, a, b)
        else:
            assert record.groups(zipit.match_tensors_zipit(given, r, a, b)[1]) == want, (kind, models, size, a, b)
    assert 1 <= refused <= 10


def test_permute():
    pytest.importorskip("scipy")
    answers = iter(ZIPIT["permute"])
    for seed, (models, size) in enumerate(record.SIZES):
        for kind in ("plain", "related", "dead"):
            given, r = {"covariance": record.covariance(kind, models, size, seed)}, 1 - 1 / models
            _, unmerge, value = zipit.match_tensors_permute(given, r, get_merge_value=True)
            groups, theirs = next(answers)
            assert record.groups(unmerge) == groups, (kind, models, size)
            if models == 2:  # of more, the public code gives the value of the last pair
                assert float(value) == pytest.approx(theirs, abs=1e-6)
    assert next(answers, None) is None


def test_optimal():
    pytest.importorskip("networkx")
    for seed, (size, want) in enumerate(zip((1, 3, 6), ZIPIT["optimal"], strict=True)):
        given = {"covariance": record.covariance("related", 2, size, seed)}
        found = record.groups(zipit.match_tensors_optimal(given)[1])
        # The order of the groups is that of networkx, which may differ between its versions: first appearance counts.
        assert found is not None and [found.index(g) for g in found] == [want.index(g) for g in want]


@pytest.mark.parametrize("name", ["CovarianceMetric", "MeanMetric", "CorrelationMetric", "CossimMetric"])
def test_metrics(name):
    shares = name in ("CorrelationMetric", "CossimMetric")
    found = record.through(getattr(zipit, name), shares, record.batches("plain", 3, 77))
    want = torch.tensor(ZIPIT[name], dtype=torch.float64)
    assert found.dtype == torch.float32
    assert float((found.double() - want).abs().max()) <= 2e-6 * float(want.abs().max())


def test_the_whole_way():
    """Features -> covariance -> groups: at least 99 % equal, ReLU features and means of 8 deviations included."""
    equal = total = 0
    for seed, kind in enumerate(("plain", "relu", "large mean")):
        found = record.through(zipit.CovarianceMetric, False, record.batches(kind, 24, 100 * seed))
        groups = record.groups(zipit.match_tensors_zipit({"covariance": found}, 0.5, 0.5, 0.5)[1])
        want = ZIPIT["whole way"][seed]
        assert groups is not None and groups != list(range(24)) * 2
        equal += sum(a == b for a, b in zip(groups, want, strict=True))
        total += len(want)
    assert total == 144 and equal >= 0.99 * total


def test_logme():
    for case, (score, alphas, answer) in zip(record.LOGME, LOGME["logme"], strict=True):
        x, y = record.features(*case)
        model = logme.LogME()
        assert float(model.fit(x, y)) == pytest.approx(score, rel=1e-10), case
        np.testing.assert_allclose(model.alphas, alphas, rtol=1e-8)
        assert model.predict(x[:9]).tolist() == answer


def test_logme_of_values():
    for case, (score, answer) in zip(record.LOGME, LOGME["regression"], strict=True):
        x, y = record.features(*case)
        model = logme.LogME(regression=True)
        assert float(model.fit(x, np.stack([x[:, 0] + y, x[:, 1] * y], 1))) == pytest.approx(score, rel=1e-9), case
        np.testing.assert_allclose(model.predict(x[:3]), answer, rtol=1e-6, atol=1e-8)


def test_leep():
    for (samples, source, target, seed), want in zip(record.LEEP, LOGME["leep"], strict=True):
        y = record.label_pairs(samples, source, target, seed)[1]
        assert float(logme.LEEP(record.probabilities(samples, source, seed), y)) == pytest.approx(want, rel=1e-12)


def test_nce():
    for case, want in zip(record.NCE, LOGME["nce"], strict=True):
        assert float(logme.NCE(*record.label_pairs(*case))) == pytest.approx(want, rel=1e-12)


def close(a, b):
    """Equal but for the last digits that another LAPACK or BLAS may give."""
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, rel=1e-6, abs=1e-9)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return a == b


def test_zipit_is_what_was_recorded():
    with imported("ZIPFAST_ZIPIT", ["matching_functions", "metric_calculators"]) as m:
        assert close(record.record_zipit(m["matching_functions"], m["metric_calculators"]), ZIPIT)


@pytest.mark.filterwarnings("ignore")
def test_logme_is_what_was_recorded():
    pytest.importorskip("numba")
    with imported("ZIPFAST_LOGME", ["LogME", "LEEP", "NCE"]) as m:
        assert close(record.record_logme(m["LogME"].LogME, m["LEEP"].LEEP, m["NCE"].NCE), LOGME)
