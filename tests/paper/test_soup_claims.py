# SPDX-License-Identifier: Apache-2.0
"""docs/soup-results.md is what its JSON says, and the orderings that it marks as asserted hold on other seeds.

Wortsman et al. 2022 (arXiv 2203.05482), Frankle et al. 2020 (arXiv 1912.05671), on data small enough for a test.
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

import soup_page  # noqa: E402
import soup_tables  # noqa: E402
from harness import threads  # noqa: E402

FRESH = (11, 12)
ASSERTED = [claim for claim in soup_page.CLAIMS if claim.margin is not None]


def measured() -> dict[str, Any]:
    return json.loads((HERE / "results" / soup_tables.RESULTS).read_text())


def test_the_page_is_what_the_results_say():
    assert soup_page.PAGE.read_text() == soup_page.text(measured()), "python benches/soup_tables.py --report"


def test_the_results_are_whole():
    document = measured()
    assert len(document["seeds"]) >= 4 and set(document["seeds"]).isdisjoint(FRESH)
    for part in soup_tables.PARTS:
        for row in document["parts"][part]["rows"].values():
            assert all(len(values) == len(document["seeds"]) for values in row.values())


@pytest.mark.parametrize("claim", ASSERTED, ids=str)
def test_what_is_asserted_was_measured(claim):
    assert min(claim.gaps(measured())) >= claim.margin


def test_sentences_are_those_of_the_grammar():
    """The class follows from the words: the noun's topic, the adjective's polarity, turned by a *not* just before it."""
    t = soup_tables
    x, y = t.sentences(300, 1)
    for words, label in zip(x.tolist(), y.tolist()):
        nouns = [w for w in words if t.FIRST <= w < t.ADJECTIVES]
        places = [i for i, w in enumerate(words) if t.ADJECTIVES <= w < t.FILLER]
        assert len(nouns) == len(places) == 1
        topic = (nouns[0] - t.FIRST) // t.NOUNS
        polarity = (words[places[0]] - t.ADJECTIVES) // t.WORDS
        assert label == 2 * topic + (polarity ^ (words[places[0] - 1] == t.NOT))
    again, _ = t.sentences(300, 1)
    assert again.equal(x) and y.bincount().tolist() == pytest.approx([75] * 4, abs=25)


def test_other_words_share_no_noun_and_no_adjective_with_those_of_fine_tuning():
    t = soup_tables
    first, second = (
        set(t.sentences(300, seed, part=part)[0].unique().tolist()) for seed, part in ((1, (0, 0.5)), (2, (0.5, 1)))
    )
    assert not {w for w in first & second if t.FIRST <= w < t.FILLER}
    assert max(first | second) < t.UNKNOWN
    assert t.sentences(300, 3, unknown=0.5)[0].max() >= t.UNKNOWN


@pytest.fixture(scope="module")
def fresh():
    pytest.importorskip("sklearn")
    with threads(1):
        return soup_tables.measure(FRESH)


@pytest.mark.slow
@pytest.mark.parametrize("claim", ASSERTED, ids=str)
def test_asserted_orderings_on_fresh_seeds(fresh, claim):
    assert min(claim.gaps(fresh)) >= claim.margin, claim.gaps(fresh)
