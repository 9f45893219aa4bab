# SPDX-License-Identifier: Apache-2.0
"""The orderings that hold on real data: medians over five pairs of ResNet-20 on scikit-learn's digits (0-4 and 5-9).

Single pairs vary by ten points and more, so only medians are compared, and only orderings known to be safe: average and
permutation < ZipIt! < ensemble; without re-estimated batch norm a merge is near chance (10 %).
"""

from __future__ import annotations

import statistics

import pytest

from zipfast import demo

PAIRS = 5


@pytest.mark.slow
def test_orderings_of_the_paper_hold_on_digits() -> None:
    digits = demo.load_digits()
    runs = [demo.compare(digits, seed, epochs=15)[0] for seed in range(PAIRS)]
    joint = {name: statistics.median(run[name].joint for run in runs) for name in runs[0]}
    print({name: round(value, 1) for name, value in joint.items()})
    assert joint["weight average"] < joint["ZipIt!"]
    assert joint["permutation"] < joint["ZipIt!"]
    assert joint["ZipIt!"] < joint["ensemble (2x cost)"]
    assert joint["ZipIt!, stale batch norm"] < joint["weight average"] + 10
    assert joint["ZipIt!, stale batch norm"] < 30
    for model in ("model A (0-4)", "model B (5-9)"):
        assert 40 < joint[model] < 55  # each knows its own half, and no more


def test_the_digits_are_split_once_and_for_all() -> None:
    digits = demo.load_digits()
    assert (len(digits.train), len(digits.test)) == (1300, 497)
    assert digits.train.shape[1:] == (1, demo.SIZE, demo.SIZE)
    assert sum(len(batch) for batch in digits.batches()) == 1300
    assert digits.test_labels[:5].tolist() == demo.load_digits().test_labels[:5].tolist()


def test_training_depends_on_the_seed_only() -> None:
    digits = demo.load_digits()
    a, b, c = (demo.train(digits, (0, 1), seed, epochs=1) for seed in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert any((x != y).any() for x, y in zip(a.state_dict().values(), c.state_dict().values()))
