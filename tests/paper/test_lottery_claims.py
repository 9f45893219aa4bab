# SPDX-License-Identifier: Apache-2.0
"""docs/lottery-results.md is what its JSON says, and the claims that it marks as asserted hold on other seeds.

Frankle & Carbin 2019 (arXiv 1803.03635), Frankle et al. 2020 (arXiv 1912.05671), on scikit-learn's digits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent.parent.parent / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import lottery_figure  # noqa: E402
import lottery_page  # noqa: E402
import lottery_tables  # noqa: E402
from harness import threads  # noqa: E402

FRESH = (11, 12, 13, 14, 15, 16)
ASSERTED = [claim for claim in lottery_page.CLAIMS if claim.margin is not None]


def measured() -> dict[str, Any]:
    return json.loads((HERE / "results" / lottery_tables.RESULTS).read_text())


def test_the_page_is_what_the_results_say():
    assert lottery_page.PAGE.read_text() == lottery_page.text(measured()), "python benches/lottery_tables.py --report"


def test_the_results_are_whole():
    document = measured()
    seeds = len(document["seeds"])
    assert seeds >= 6 and set(document["seeds"]).isdisjoint(FRESH)
    assert set(document["levels"]) == {"ticket", *lottery_tables.CONTROLS}
    for kind, levels in [*document["levels"].items(), ("rewound", document["rewound"])]:
        first = int(kind in lottery_tables.CONTROLS)
        assert list(map(int, levels)) == list(range(first, lottery_tables.LEVELS + 1))
        assert all(len(numbers) == seeds for level in levels.values() for numbers in level.values())
    for levels in document["normalised"].values():
        assert all(len(numbers) == seeds for level in levels.values() for numbers in level.values())
    for rows in document["connectivity"].values():
        assert all(len(numbers) == seeds for row in rows.values() for numbers in row.values())


def test_densities_are_those_of_the_ladder():
    """Each round is cut to whole weights of three layers: a weight at most per layer and round."""
    for level, density in measured()["density"].items():
        assert density == pytest.approx(lottery_tables.percent_left(int(level)), abs=0.05)


@pytest.mark.parametrize("claim", ASSERTED, ids=str)
def test_what_is_asserted_was_measured(claim):
    assert claim.worst(measured()) >= claim.margin


def test_pruning_at_once_or_anywhere_is_far_below_at_one_per_cent(tmp_path):
    """One seed and a short training: the gaps are of tens of points, far beyond what a seed changes."""
    pytest.importorskip("sklearn")
    task, last = lottery_tables.task_of(700), lottery_tables.LEVELS
    with threads(1):
        found = lottery_tables.experiment(
            tmp_path / "out", [3], task, every=700, controls=("random", "oneshot"), control_levels=[last]
        )
    ends = {(t.kind, t.level): t.end_test for t in found.trainings}
    assert ends["ticket", 0] > 90
    assert ends["ticket", last] - ends["oneshot", last] > 5
    assert ends["ticket", last] - ends["random", last] > 20


def test_the_figure_is_drawn_and_not_trained_again(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    with threads(1):
        first = lottery_figure.draw(tmp_path / "out", 1, 2, iterations=60)
        again = lottery_figure.draw(tmp_path / "out", 1, 2, iterations=60)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "experiment", "layers.png", "levels.png", "lines.png", "overlap.png"
    }  # fmt: skip
    assert first.trainings == again.trainings and len(first.trainings) == 3 + 3 * 2


@pytest.fixture(scope="module")
def fresh():
    pytest.importorskip("sklearn")
    with threads(1):
        found = lottery_tables.measure(FRESH, control_levels=lottery_page.SHOWN, rewound_levels=0)
        tickets = {"levels": lottery_page.DOWN_TO_FOUR, "controls": (), "control_levels": None}
        return {**found, "normalised": lottery_tables.normalise(FRESH, **tickets)}


@pytest.mark.slow
@pytest.mark.parametrize("claim", ASSERTED, ids=str)
def test_asserted_claims_on_fresh_seeds(fresh, claim):
    assert claim.worst(fresh) >= claim.margin, claim.gaps(fresh)
