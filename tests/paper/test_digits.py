# SPDX-License-Identifier: Apache-2.0
"""The orderings that hold on real data: medians over five pairs of networks on scikit-learn's digits (0-4 and 5-9).

Single pairs vary by ten points and more, so only medians are compared, and only orderings known to be safe, which
docs/zipit-results.md lists with their margins. The pairs have the seeds of its tables, but not their weights, as tests run
on more threads; they are trained once for all tests here and kept in build/zipit_tables.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import pytest

from zipfast import demo

HERE = Path(__file__).resolve().parents[2] / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import zipit_page  # noqa: E402
import zipit_tables as tables  # noqa: E402

SAFE = [(table, claim) for table, claims in zipit_page.CLAIMS.items() for claim in claims if claim.asserted]
NAMES = [f"{table}: {claim.less} < {claim.more}, {claim.column}" for table, claim in SAFE]
Medians = dict[str, dict[str, dict[str, float]]]


@pytest.fixture(scope="session")
def medians() -> Medians:
    """By table, row and column; of the rows that the tests here need."""
    found: Medians = {}
    for table in dict.fromkeys(table for table, _ in SAFE):
        needed = {"model A", "model B", *(name for t, c in SAFE if t == table for name in (c.less, c.more))}
        rows = [row for row in tables.TABLES[table].rows if row.name in needed]
        measured = tables.measure(table, tables.PAIRS, tables.EPOCHS, rows)["rows"]
        found[table] = {row["row"]: {c: median(values) for c, values in row["values"].items()} for row in measured}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("table", "claim"), SAFE, ids=NAMES)
def test_safe_orderings_of_the_paper(medians: Medians, table: str, claim: zipit_page.Claim) -> None:
    assert medians[table][claim.less][claim.column] < medians[table][claim.more][claim.column]


@pytest.mark.slow
def test_without_new_batch_norm_statistics_a_merge_is_near_chance(medians: Medians) -> None:
    assert medians["two"][tables.STALE]["joint"] < 20  # chance is 10


@pytest.mark.slow
@pytest.mark.parametrize("table", ["two", "vgg"])
@pytest.mark.parametrize("model", ["model A", "model B"])
def test_each_model_knows_its_own_half_and_no_more(medians: Medians, table: str, model: str) -> None:
    assert 40 < medians[table][model]["joint"] < 55


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
