# SPDX-License-Identifier: Apache-2.0
"""Weighted Kendall tau: known values, its definition written out, intervals, errors; and the tables it is taken of."""

from __future__ import annotations

import builtins
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zipfast
from zipfast.ranking.agreement import Agreement, agreement, weighted_tau
from zipfast.ranking.rank import METRICS, rank

pytest.importorskip("scipy")
FIVE = {name: float(i) for i, name in enumerate("abcde")}


def test_known_values() -> None:
    assert weighted_tau([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]) == pytest.approx(0.671533, abs=5e-7)  # the best two swapped
    assert weighted_tau([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(0.901460, abs=5e-7)  # the worst two
    assert weighted_tau([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert weighted_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def definition(a: np.ndarray, b: np.ndarray) -> float:
    """Pairs weigh 1/(r + 1) + 1/(s + 1), ranks from 0 for the best, by each ranking in turn; without ties."""
    found = []
    for ranked in (a, b):
        rank = np.argsort(np.argsort(-ranked))
        up = down = 0.0
        for i in range(len(a)):
            for j in range(i):
                weight = 1 / (rank[i] + 1) + 1 / (rank[j] + 1)
                up += weight * np.sign((a[i] - a[j]) * (b[i] - b[j]))
                down += weight
        found.append(up / down)
    return sum(found) / 2


@pytest.mark.parametrize("seed", range(5))
def test_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=12), draw.normal(size=12)
    assert weighted_tau(a.tolist(), b.tolist()) == pytest.approx(definition(a, b), abs=1e-12)
    assert weighted_tau(a.tolist(), b.tolist()) == pytest.approx(weighted_tau(b.tolist(), a.tolist()), abs=1e-12)
    assert weighted_tau((3 * a + 7).tolist(), np.exp(b).tolist()) == pytest.approx(definition(a, b), abs=1e-12)


def test_interval_over_models() -> None:
    draw = np.random.default_rng(0)
    quality = draw.normal(size=30)
    truth = {f"m{i}": float(q) for i, q in enumerate(quality)}
    scores = {name: value + 0.3 * draw.normal() for name, value in truth.items()}
    found = agreement(scores, truth)
    assert found.models == 30 and -1 <= found.low < found.tau < found.high <= 1
    assert found == agreement(scores, truth) != agreement(scores, truth, seed=1)
    narrow = agreement(scores, truth, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high and narrow.tau == found.tau
    few = agreement({name: scores[name] for name in list(scores)[:6]}, truth)
    assert few.models == 6 and few.high - few.low > found.high - found.low
    assert str(Agreement(0.5, 0.25, 0.75, 5)) == "0.500 [0.25, 0.75]"


def test_a_perfect_ranking_is_sure_of_itself() -> None:
    found = agreement(FIVE, {name: 10 * value for name, value in FIVE.items()})
    assert (found.tau, found.low, found.high) == pytest.approx((1, 1, 1))


def test_only_models_with_both_count() -> None:
    scores = {**FIVE, "lost": math.nan, "extra": 9.0}
    found = agreement(scores, {**FIVE, "lost": 3.0, "other": 4.0})
    assert found.models == 5 and found.tau == pytest.approx(1)


def test_two_equal_models_say_nothing() -> None:
    found = agreement({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0})
    assert found.models == 2 and all(map(math.isnan, (found.tau, found.low, found.high)))


@pytest.mark.parametrize(
    "a, b, seen",
    [
        ([1], [1], r"two or more, got \[1\] and \[1\]"),
        ([], [], r"got \[0\] and \[0\]"),
        ([1, 2], [1, 2, 3], r"got \[2\] and \[3\]"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], r"got \[2, 2\] and \[2, 2\]"),
        ([1, math.nan], [1, 2], "be finite, got NaN or infinity"),
        ([1, 2], [1, math.inf], "be finite, got NaN or infinity"),
    ],
)
def test_errors_of_tau(a: Any, b: Any, seen: str) -> None:
    with pytest.raises(ValueError, match=f"weighted_tau: 'scores' and 'accuracies' must .*{seen}"):
        weighted_tau(a, b)


def test_errors_of_names() -> None:
    sentence = r"agreement: 'truth' must name two or more of the scored models \(a, b, c, d, e\), got {} of them"
    with pytest.raises(ValueError, match=sentence.format(0)):
        agreement(FIVE, {"A": 1.0, "B": 2.0})
    with pytest.raises(ValueError, match=sentence.format(1)):
        agreement(FIVE, {"a": 1.0, "B": 2.0})
    with pytest.raises(ValueError, match="must be finite"):
        agreement(FIVE, {"a": 1.0, "b": math.nan})


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"weighted_tau: SciPy must be installed; pip install 'zipfast\[rank\]'"):
        weighted_tau([1, 2], [1, 2])


# ------------------------------------------------------------------------------------------------- of a ranking


def ranking(**options: Any) -> zipfast.ranking.Ranking:
    """Three candidates, the more noise the worse, and one without scores."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    y = x.argmax(1)
    worse = {f"m{i}": (x + i * torch.randn(x.shape, generator=generator), y) for i in range(3)}
    return zipfast.rank({**worse, "lost": (x * math.nan, y)}, bootstrap=0, metrics=("logme", "hscore"), **options)


def test_a_ranking_against_accuracies() -> None:
    found = ranking().agreement({"m0": 90.0, "m1": 80.0, "m2": 70.0, "lost": 60.0, "never ranked": 50.0})
    assert found.keys() == {"logme", "hscore"}  # one width for all, and no parameters: no rankings by these
    assert all(a.tau == pytest.approx(1) and a.models == 3 for a in found.values())
    assert ranking().agreement({"m0": 1.0, "m1": 2.0, "m2": 3.0})["logme"].tau == pytest.approx(-1)
    with pytest.raises(ValueError, match="must name two or more of the scored models"):
        ranking().agreement({"lost": 60.0, "m1": 80.0})


def test_rankings_by_size_are_compared_too() -> None:
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    batches = [(x, (x[:, 0] > 0).long())]
    nets = {f"n{w}": zipfast.zoo.mlp(4, [w], 2) for w in (3, 5, 7)}
    found = zipfast.rank(nets, batches, bootstrap=0).agreement({"n3": 1.0, "n5": 2.0, "n7": 3.0})
    assert found["features D"].tau == found["parameters"].tau == pytest.approx(1)
    with_arrays = zipfast.rank({**nets, "saved": (x, batches[0][1])}, batches, bootstrap=0)
    found = with_arrays.agreement({"n3": 1.0, "n5": 2.0, "saved": 3.0})
    assert found.keys() == {"logme", "features D"}  # saved features have no parameters


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("metric", METRICS)
def test_the_first_metric_orders(metric: str) -> None:
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    nets = {}
    for seed in range(3):
        torch.manual_seed(seed)
        nets[f"n{seed}"] = zipfast.zoo.mlp(4, [5], 2)
    metrics = [metric, *({"logme", "lfc"} - {metric})]
    found = rank(nets, [(x, (x[:, 0] > 0).long())], metrics=metrics, bootstrap=0)
    column = [row.scores[metric] for row in found.rows]
    assert column == sorted(column, reverse=True) and found.metric == metric and found.metrics == metrics


def test_notes_stand_below_their_row() -> None:
    x = torch.randn(150, 3, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are notes
        found = rank({"a": (x, torch.arange(150) % 2 * 2)}, bootstrap=10)
    notes = found.rows[0].notes
    assert notes[0] == "skipped 1 empty output(s), 1: no sample has that class"
    assert notes[1].endswith(" of 3 outputs have no signal in these features")
    assert [line.strip() for line in str(found).splitlines()[2:]] == list(notes)
    perfect = rank({"a": (x, x[:, 0])}, task="regression").rows[0].notes
    assert any("1 of 1 outputs are fitted up to rounding" in note for note in perfect)


def test_a_ranking_as_json() -> None:
    found = json.loads(json.dumps(ranking().to_dict(), allow_nan=False))
    assert found["format"] == "zipfast.ranking/1" and found["metric"] == "logme"
    assert [row["name"] for row in found["rows"]] == ["m0", "m1", "m2", "lost"]
    assert found["rows"][3]["error"] and found["rows"][3]["scores"] == {} and "replicates" not in found["rows"][0]
    lines = str(ranking()).splitlines()
    assert [line.split()[0] for line in lines[1:] if not line.startswith("      ")] == ["1", "2", "3", "-"]


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from zipfast.ranking.plots import plot_ranking

    plot_ranking(ranking(), tmp_path / "one.png")
    plot_ranking(ranking(), tmp_path / "two.png", {"m0": 90.0, "m2": 70.0, "other": 1.0}, "top 1")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one[:4] == two[:4] == b"\x89PNG" and int.from_bytes(two[16:20], "big") == 2 * int.from_bytes(
        one[16:20], "big"
    )
    with pytest.raises(ValueError, match="rank: at least one candidate must have a score for a picture, got none"):
        plot_ranking(rank(["nowhere.npz"]), tmp_path / "none.png")
    with pytest.raises(OSError, match=r"cannot write .*a\.png"):
        plot_ranking(ranking(), tmp_path / "no" / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]
