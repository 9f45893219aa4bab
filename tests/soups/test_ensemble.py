# SPDX-License-Identifier: Apache-2.0
"""Ensembles of logits and calibration: hand-made tables, the definition replayed, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zipfast.soups import accuracy_of, ece, greedy_ensemble, logit_ensemble

LABELS = torch.tensor([0, 1, 0, 1])
# Two classes, one number per sample: the margin of class 0.  Alone: 75, 50, 50 and 0 per cent.
MARGINS = [[2.0, -2.0, 2.0, 1.0], [1.0, 1.0, -1.0, -3.0], [-1.0, 1.0, 1.0, -1.0], [-9.0, 9.0, -9.0, 9.0]]


def logits_of(margins: list[list[float]]) -> Tensor:
    first = torch.tensor(margins)
    return torch.stack([first, torch.zeros_like(first)], -1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_accuracy_table() -> None:
    assert [accuracy_of(one, LABELS) for one in logits_of(MARGINS)] == [75.0, 50.0, 50.0, 0.0]


def test_accuracy_of_a_tie_is_that_of_the_lowest_class() -> None:
    assert accuracy_of(torch.zeros(2, 3), torch.tensor([0, 1])) == 50.0


def test_logit_ensemble_table() -> None:
    got = logit_ensemble(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]], [[-1.0, 4.0]]]))
    assert got.dtype == torch.float64 and got.tolist() == [[1.0, 2.0]]
    one = noise(1, 4, 3)
    assert torch.equal(logit_ensemble(one), one[0].double())


def test_greedy_table() -> None:
    found = greedy_ensemble(logits_of(MARGINS), LABELS)  # 0 and 1: margins 3, -1, 1, -2, all right
    assert found.members == (0, 1) and found.accuracy == 100.0
    assert found.logits[:, 0].tolist() == [1.5, -0.5, 0.5, -1.0]
    assert greedy_ensemble(logits_of(MARGINS[::-1]), LABELS).members == (3, 2)  # with 1 it does not rise


@pytest.mark.parametrize(("accept", "members"), [("gt", (1,)), ("ge", (1, 2))])
def test_greedy_of_duplicates(accept: str, members: tuple[int, ...]) -> None:
    found = greedy_ensemble(logits_of([MARGINS[3], MARGINS[0], MARGINS[0]]), LABELS, accept=accept)
    assert found.members == members and found.accuracy == 75.0
    assert torch.equal(found.logits, logits_of(MARGINS)[0].double())


@pytest.mark.parametrize("accept", ["gt", "ge"])
def test_greedy_replayed(accept: str) -> None:
    logits, labels = noise(7, 60, 4), torch.arange(60) % 4
    logits += 0.7 * torch.eye(4)[labels]
    found = greedy_ensemble(logits, labels, accept=accept)
    alone = [accuracy_of(one, labels) for one in logits]
    order = sorted(range(7), key=lambda i: -alone[i])
    members, best = order[:1], alone[order[0]]
    for i in order[1:]:
        score = accuracy_of(logit_ensemble(logits[[*members, i]]), labels)
        if score > best or (score == best and accept == "ge"):
            members, best = [*members, i], score
    assert found.members == tuple(members) and found.accuracy == best >= max(alone) and len(members) > 1
    torch.testing.assert_close(found.logits, logit_ensemble(logits[members]), rtol=0, atol=1e-14)


def slow_ece(logits: Tensor, labels: Tensor, bins: int) -> float:
    """Sample by sample, least confident first; the first N mod B bins have one sample more."""
    rows = sorted((float(p.max()), int(p.argmax()) == int(y)) for p, y in zip(logits.double().softmax(1), labels))
    total, start = 0.0, 0
    for b in range(bins):
        size = len(rows) // bins + (b < len(rows) % bins)
        part = rows[start : start + size]
        start += size
        total += abs(sum(hit for _, hit in part) - sum(confidence for confidence, _ in part))
    assert start == len(rows)
    return total / len(rows)


@pytest.mark.parametrize(("samples", "bins"), [(1, 1), (30, 15), (31, 15), (44, 15), (50, 7), (9, 9), (100, 1)])
def test_ece_definition(samples: int, bins: int) -> None:
    logits, labels = 2 * noise(samples, 3, seed=samples), torch.arange(samples) % 3
    assert ece(logits, labels, bins=bins) == pytest.approx(slow_ece(logits, labels, bins), abs=1e-14)


def test_ece_table() -> None:
    chance = torch.tensor([0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    logits = torch.stack([chance, 1 - chance], 1).log()
    labels = torch.tensor([0, 1, 0, 0])
    assert ece(logits, labels, bins=2) == pytest.approx((abs(0.5 - 0.65) + abs(1 - 0.85)) / 2)
    assert ece(logits, labels, bins=1) == pytest.approx(0.0)  # 3 of 4 right, sure to 0.75
    assert ece(logits, labels, bins=4) == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_ece_of_calibrated_predictions_goes_to_zero() -> None:
    draw, errors = torch.Generator().manual_seed(0), []
    for samples in (300, 3000, 300000):
        logits = 2 * torch.randn(samples, 4, generator=draw)
        labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
        errors.append(ece(logits, labels))
        assert ece(3 * logits, labels) > 0.1  # too sure
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.005


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "no models": (lambda: logit_ensemble(torch.ones(0, 2, 2)), r"logit_ensemble: 'logits' must be \[k, N, C\].*\[0, 2"),
    "axes": (lambda: logit_ensemble(torch.ones(2, 2)), r"logit_ensemble: 'logits' must be"),
    "accuracy axes": (lambda: accuracy_of(torch.ones(1, 4, 2), LABELS), r"accuracy_of: 'logits' must be \[N, C\]"),
    "empty": (lambda: ece(torch.ones(0, 2), LABELS[:0]), "ece: 'logits' must be .* not empty"),
    "count": (lambda: accuracy_of(torch.ones(3, 2), LABELS), r"'labels' must be whole numbers \[3\], got \[4\]"),
    "floats": (lambda: accuracy_of(torch.ones(4, 2), LABELS.float()), r"whole numbers \[4\], got .* torch.float32"),
    "nan": (lambda: ece(torch.full((4, 2), float("nan")), LABELS), "'logits' must be finite"),
    "greedy axes": (lambda: greedy_ensemble(torch.ones(4, 2), LABELS), r"greedy_ensemble: .*\[k, N, C\]"),
    "accept": (lambda: greedy_ensemble(logits_of(MARGINS), LABELS, accept="lt"), "'accept' must be gt or ge, got 'lt'"),
    "no bins": (lambda: ece(torch.ones(4, 2), LABELS, bins=0), r"'bins' must be in \[1, 4\], got 0"),
    "many bins": (lambda: ece(torch.ones(4, 2), LABELS), r"'bins' must be in \[1, 4\], got 15"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
