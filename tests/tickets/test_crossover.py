# SPDX-License-Identifier: Apache-2.0
"""Crossovers: where measured lines meet, what is remembered where, reasons in words."""

from __future__ import annotations

import json

import pytest
import torch

import zipfast
from zipfast.tickets import crossover, mlp_crossover
from zipfast.tickets.crossover import Crossover, measure_crossover, prefer_sparse
from zipfast.tickets.networks import lenet_300_100


@pytest.fixture
def cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(crossover, "_known", {})
    return tmp_path / "zipfast" / "crossover.json"


def test_measured_crossover() -> None:
    found = measure_crossover(64, 100, 4, densities=(0.1, 0.5), budget_s=0.002)
    assert 0 <= found.density <= 1 and found.dense_ms > 0 and set(found.sparse_ms) == {"0.1", "0.5"}
    with pytest.raises(ValueError, match=r"'densities' must ascend in \(0, 1\], got \[0.5, 0.1\]"):
        measure_crossover(4, 4, 1, densities=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"must be at least 1, got \[4, 0, 1\]"):
        measure_crossover(4, 0, 1)


@pytest.mark.parametrize(
    ("times", "want"),
    [([1.0, 2.0, 6.0], 0.2 + 0.2 * 0.5), ([5.0, 6.0, 7.0], 0.0), ([1.0, 2.0, 3.0], 1.0)],
)
def test_where_lines_meet(monkeypatch: pytest.MonkeyPatch, times: list, want: float) -> None:
    given = iter([4.0, *times])  # the dense pass first
    monkeypatch.setattr(crossover, "_time", lambda *_: next(given))
    assert measure_crossover(8, 8, 1, densities=(0.1, 0.2, 0.4)).density == pytest.approx(want)


def test_preference_is_measured_once(cpu_backend: str, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(*args: object, **options: object) -> Crossover:
        calls.append(args)
        return Crossover(0.3, 1.0, {"0.1": 0.5})

    monkeypatch.setattr(crossover, "measure_crossover", measure)
    decision, reason = prefer_sparse(300, 784, 0.1, 5)
    assert decision
    assert reason.startswith("sparse: density 0.1 is below 0.3, measured for 512x1024, batch 8, float32, ")
    assert prefer_sparse(512, 1000, 0.3, 7)[0] is False and len(calls) == 1
    monkeypatch.setattr(crossover, "_known", {})
    assert prefer_sparse(300, 784, 0.1, 5)[0] and len(calls) == 1  # from the file
    assert len(json.loads(cache.read_text())) == 1 and len(list(cache.parent.iterdir())) == 1
    prefer_sparse(300, 784, 0.1, 5, torch.float64)
    assert len(calls) == 2 and len(json.loads(cache.read_text())) == 2
    monkeypatch.setattr(crossover, "_known", {})
    cache.write_text("{ not json")
    assert prefer_sparse(300, 784, 0.1, 5)[0] and len(calls) == 3


def test_preference_where_nothing_can_be_written(cpu_backend: str, cache) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert isinstance(prefer_sparse(8, 8, 0.5, 1)[0], bool)


def test_reasons_without_measuring(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prefer_sparse(8, 8, 0.5, 1, torch.int32) == (
        False,
        "dense: sparse layers are float32, float64, float16 or bfloat16, not int32",
    )
    assert "no kernels for it" in prefer_sparse(8, 8, 0.5, 1, device="meta")[1]
    if not zipfast.available("cuda"):
        decision, reason = prefer_sparse(8, 8, 0.5, 1, device="cuda")
        assert not decision and "need compiled kernels, and there are none for cuda" in reason
    with pytest.raises(ValueError, match=r"'density' must be in \[0, 1\], got 1.5"):
        prefer_sparse(8, 8, 1.5, 1)
    with pytest.raises(ValueError, match=r"must be at least 1, got \[0, 8, 1\]"):
        prefer_sparse(0, 8, 0.5, 1)
    assert not cache.exists()


def test_the_crossover_of_a_perceptron(cpu_backend: str, cache) -> None:
    found = mlp_crossover(lenet_300_100(image_size=4))
    assert 0 <= found <= 1 and mlp_crossover(lenet_300_100(image_size=4)) == found
    assert [key[:12] for key in json.loads(cache.read_text())] == ["mlp 128x512 "]
    assert mlp_crossover(torch.nn.Conv2d(1, 1, 1)) == 0.0
