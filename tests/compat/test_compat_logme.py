# SPDX-License-Identifier: Apache-2.0
"""compat.logme: LogME, LEEP and NCE with the public code's signatures; against their definitions in plain loops and, where
ZIPFAST_LOGME names a checkout of github.com/thuml/LogME (needs numba), the code itself.  Recorded answers are checked in
test_compat_golden.py; the class LogME has tests/ranking/test_logme.py.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from checkouts import imported

import zipfast
from zipfast.compat import logme


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logme.LogME, "_warned", True)


def draw(samples, source, target, seed=0, sharp=2.0):
    """Probabilities [N, C_s] and labels that have something to do with them."""
    g = np.random.default_rng(seed)
    logits = sharp * g.standard_normal((samples, source))
    theta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    y = np.where(g.random(samples) < 0.6, theta.argmax(1) % target, g.integers(0, target, samples))
    return theta, y


def leep_by_definition(theta, y):
    joint = [[sum(t[z] for t, c in zip(theta, y) if c == k) for z in range(theta.shape[1])] for k in range(max(y) + 1)]
    mass = [sum(row[z] for row in joint) for z in range(theta.shape[1])]
    return sum(
        math.log(sum(joint[c][z] / mass[z] * t[z] for z in range(theta.shape[1]) if mass[z] > 0))
        for t, c in zip(theta, y)
    ) / len(y)


def nce_by_definition(z, y):
    pairs, alone = Counter(zip(z.tolist(), y.tolist())), Counter(z.tolist())
    return sum(n * math.log(n / alone[a]) for (a, _), n in pairs.items()) / len(y)


@pytest.mark.parametrize("samples, source, target", [(1, 1, 1), (2, 3, 2), (31, 5, 3), (64, 33, 10), (200, 2, 7)])
def test_leep_and_nce_are_their_definitions(samples, source, target):
    theta, y = draw(samples, source, target)
    found = logme.LEEP(theta, y)
    assert type(found) is np.float64 and float(found) == pytest.approx(leep_by_definition(theta, y), abs=1e-12)
    found = logme.NCE(theta.argmax(1), y)
    assert type(found) is np.float64 and float(found) == pytest.approx(nce_by_definition(theta.argmax(1), y), abs=1e-12)


def test_by_hand():
    assert float(logme.LEEP(np.eye(2), np.array([0, 1]))) == 0
    assert float(logme.NCE(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))) == pytest.approx(-math.log(2) / 2)
    assert float(logme.NCE(np.array([5, 5]), np.array([0, 1]))) == pytest.approx(-math.log(2))


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        torch.as_tensor,
        lambda a: a.tolist(),
        lambda a: a.astype(np.float32),
        np.asfortranarray,
        lambda a: torch.as_tensor(a).float(),
    ],
)
def test_kinds_of_arrays(convert):
    theta, y = draw(40, 6, 3)
    assert float(logme.LEEP(convert(theta), y)) == pytest.approx(leep_by_definition(theta, y), abs=1e-6)
    for labels in (y, y[:, None], y.astype(np.uint8), y.astype(float), torch.as_tensor(y), y.tolist()):
        assert float(logme.LEEP(theta, labels)) == float(logme.LEEP(theta, y))
        assert float(logme.NCE(labels, labels)) == 0
    large = np.arange(40) % 256
    assert float(logme.NCE(large.astype(np.uint8), y)) == pytest.approx(nce_by_definition(large, y))


def test_source_classes_without_mass():
    """The public code divides 0 by 0: NaN."""
    theta, y = draw(30, 4, 3)
    padded = np.concatenate([theta, np.zeros((30, 2))], 1)
    assert float(logme.LEEP(padded, y)) == float(logme.LEEP(theta, y))
    assert float(logme.LEEP(theta, np.zeros(30, int))) == pytest.approx(0, abs=1e-12)


def test_inputs_are_unchanged():
    theta, y = draw(20, 4, 3)
    copies = theta.copy(), y.copy()
    logme.LEEP(theta, y)
    logme.NCE(theta.argmax(1), y)
    assert (theta == copies[0]).all() and (y == copies[1]).all()


def test_messages():
    theta, y = draw(10, 4, 3)
    for call, error, message in [
        (lambda: logme.LEEP(5 * theta, y), ValueError, "LEEP: 'pseudo_.*' must be rows that sum to 1, got 5 .*; apply soft"),
        (lambda: logme.LEEP(theta - 0.5, y), ValueError, "LEEP: 'pseudo_source_label' must be at least 0"),
        (lambda: logme.LEEP(np.where(theta == theta[3, 1], np.nan, theta), y), ValueError, "finite, .* row 3, column 1"),
        (lambda: logme.LEEP(theta[0], y), ValueError, r"LEEP: 'pseudo_source_label' must be \[N, D\], got shape \[4\]"),
        (lambda: logme.LEEP(theta, y[:9]), ValueError, r"LEEP: 'target_label' must have one entry .* \(10\), got 9"),
        (lambda: logme.LEEP(theta, y - 1), ValueError, r"LEEP: 'target_label' must be classes from 0, got -1 in row \d$"),
        (lambda: logme.LEEP(theta, y + 0.5), ValueError, "LEEP: 'target_label' must be whole numbers"),
        (lambda: logme.LEEP(theta, theta), ValueError, r"\[N\], got shape \[10, 4\]; .* pass labels\.argmax\(1\)$"),
        (lambda: logme.LEEP(theta, y.astype(str)), TypeError, "LEEP: 'target_label' must be real numbers"),
        (lambda: logme.LEEP(theta[:0], y[:0]), ValueError, r"must be \[N, D\] with N and D at least 1"),
        (lambda: logme.NCE(y, y[:9]), ValueError, r"NCE: 'target_label' must have one entry .* \(10\), got 9"),
        (lambda: logme.NCE(y - 1, y), ValueError, "NCE: 'source_label' must be classes from 0, got -1"),
        (lambda: logme.NCE(y + 0.5, y), ValueError, "NCE: 'source_label' must be whole numbers, got .* in row 0$"),
        (lambda: logme.NCE(y[:0], y[:0]), ValueError, "at least 1"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_the_class_is_the_drop_in_one():
    assert logme.LogME is zipfast.LogME
    g = np.random.default_rng(0)
    x, y = g.standard_normal((60, 5)), np.arange(60) % 3
    model = logme.LogME(regression=False)
    assert type(model.fit(x, y)) is np.float64 and model.fitted and model.num_dim == 3 and model.ms.shape == (3, 5)
    answer = model.predict(x)
    kept = model.ms
    model.reset()
    assert model.fitted and model.num_dim == 0 and model.alphas == model.betas == []
    with pytest.raises(RuntimeError, match="not fitted, please call fit first"):  # the public code: AttributeError
        model.predict(x)
    model.ms = kept  # as users who saved it do
    assert (model.predict(x) == answer).all()
    with pytest.warns(UserWarning, match="re-fitting for new data"):
        model.fit(x, y)


# ------------------------------------------------------------------------------------------ install

FILES = {
    "LogME": "from zipfast.compat import logme\nclass LogME(logme.LogME):\n    pass\n",
    "ranking": "from LogME import LogME\nfrom NCE import NCE\ndef rank(kind=LogME):\n    return kind\n",
    "NCE": """import numpy as np
def NCE(source_label, target_label):
    joint = np.zeros((target_label.max() + 1, source_label.max() + 1))
    for z, y in zip(source_label, target_label):
        joint[y, z] += 1 / len(target_label)
    given = joint / joint.sum(0)
    return (joint * np.log(np.where(given > 0, given, 1))).sum()
""",
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    files = {name: text for name, text in FILES.items() if name != "LEEP"}
    for name, text in files.items():
        assert name not in sys.modules
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("ranking")
    for name in files:
        sys.modules.pop(name, None)


def test_install(checkout):
    theirs = checkout.LogME, checkout.NCE
    with logme.install() as handle:
        assert checkout.LogME is checkout.rank() is logme.LogME and checkout.NCE is logme.NCE
        assert set(handle.replaced) == {
            "LogME.LogME", "NCE.NCE", "ranking.LogME", "ranking.NCE", "ranking.rank (defaults)"
        }  # fmt: skip
        assert handle.difference["LogME"] == 0 and handle.difference["NCE"] <= 1e-12
        with pytest.raises(ValueError, match="must hold its own LogME, got zipfast's"):
            logme.install()
    assert (checkout.LogME, checkout.NCE) == theirs and checkout.rank() is theirs[0]
    assert set(logme.check()) == {"LogME", "NCE"}


def test_install_refuses_a_changed_fork(checkout, monkeypatch):
    theirs = sys.modules["NCE"].NCE
    monkeypatch.setattr(
        sys.modules["NCE"], "NCE", lambda source_label, target_label: theirs(source_label, target_label) + 1e-6
    )
    with pytest.raises(ValueError, match=r"NCE.NCE in .* must compute what .*, got a difference of 1.0e-06 on a small"):
        logme.install()
    assert checkout.LogME is not logme.LogME
    with logme.install(names=["LogME"]):
        assert checkout.LogME is logme.LogME and checkout.NCE is theirs


def test_install_without_a_checkout():
    with pytest.raises(
        ImportError, match=r"logme.install: .* got none of LEEP, LogME, NCE in sys.modules; put its folder"
    ):
        logme.install()
    with pytest.raises(ValueError, match=r"logme.install: 'names' must be of LogME, LEEP, NCE, got 'leep'"):
        logme.install(names=["leep"])


def test_install_keeps_the_one_warning(checkout, monkeypatch):
    monkeypatch.setattr(logme.LogME, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logme.check()
    assert logme.LogME._warned is False


# ------------------------------------------------------------------------------------------ the public code itself


@pytest.fixture(scope="module")
def public():
    pytest.importorskip("numba")
    with warnings.catch_warnings(), imported("ZIPFAST_LOGME", ["LogME", "LEEP", "NCE"]) as modules:
        yield modules


@pytest.mark.filterwarnings("ignore:invalid value")
def test_leep_and_nce_equal_the_public_code(public):
    worst = 0.0
    for seed in range(60):
        g = np.random.default_rng(seed)
        theta, y = draw(
            int(g.integers(2, 300)), int(g.integers(1, 40)), int(g.integers(1, 20)), seed, 10.0 ** g.integers(-1, 2)
        )
        theirs = public["LEEP"].LEEP(theta, y), public["NCE"].NCE(theta.argmax(1), y)
        ours = logme.LEEP(theta, y), logme.NCE(theta.argmax(1), y)
        assert [type(v) for v in ours] == [type(v) for v in theirs]
        worst = max(worst, *(abs(float(a) - float(b)) for a, b in zip(theirs, ours)))
    print(f"the largest difference is {worst:.1e}")
    assert worst <= 1e-12


@pytest.mark.filterwarnings("ignore:invalid value")
def test_where_the_public_code_is_wrong(public):
    """What docs/compat/logme.md says of it."""
    theta, y = draw(30, 4, 3)
    assert math.isnan(public["LEEP"].LEEP(np.concatenate([theta, np.zeros((30, 1))], 1), y))
    z = theta.argmax(1)
    assert public["NCE"].NCE(z, y[:20]) != pytest.approx(float(logme.NCE(z[:20], y[:20])))  # other lengths, no error
    public["LEEP"].LEEP(5 * theta, y)  # no distribution, no error


def test_install_into_the_public_code(public):
    difference = logme.check(public["LogME"])
    assert set(difference) == {"LogME", "LEEP", "NCE"} and max(difference.values()) <= 1e-12
    with logme.install():
        assert public["LogME"].LogME is logme.LogME and public["LEEP"].LEEP is logme.LEEP
    assert public["LogME"].LogME is not logme.LogME
