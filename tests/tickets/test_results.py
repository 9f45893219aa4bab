# SPDX-License-Identifier: Apache-2.0
"""Results: reading an experiment's folder, medians and spread, pairs by seed, tables, JSON; damaged files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from zipfast import checkpoint
from zipfast.tickets import Lottery, Masks, Row, Training

NAN = float("nan")
CURVE = [{"iteration": 10, "loss": 0.5, "accuracy": 90.0, "test": NAN}]


def write(folder: Path, kind: str = "ticket", seed: int = 0, level: int = 0, **other: Any) -> Path:
    """A training's folder as `lottery` leaves it, written by hand."""
    density = 0.8**level
    result = {
        "kind": kind, "seed": seed, "level": level, "density": density, "densities": {"w": density},
        "early": 100 + 10 * seed, "early_loss": 0.1, "early_validation": 95.0, "early_test": 94.0 + seed, "end": 500,
        "end_loss": 0.2, "end_validation": 96.0, "end_test": 95.0 + seed - level, "seconds": 2.0 + seed,
        "trainer": "torch", "curve": CURVE,
    } | other  # fmt: skip
    place = folder / f"seed-{seed}" / kind / f"level-{level:02d}"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(result))
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds, three levels, a control at one; and what a killed run leaves behind."""
    (tmp_path / "settings.json").write_text(json.dumps({"rewind": 0, "levels": 2, "seeds": [0, 1]}))
    for seed in (1, 0):
        for level in (2, 0, 1):
            write(tmp_path, "ticket", seed, level)
        write(tmp_path, "random", seed, 2, end_test=80.0 + 4 * seed, early=300)
    write(tmp_path, "reinit", 0, 1, end_test=90.0)
    (tmp_path / "seed-0" / "ticket" / ".level-03.abc.tmp").mkdir()
    (tmp_path / "seed-0" / "ticket" / ".level-03.abc.tmp" / "result.json").write_text("{")
    (tmp_path / "seed-0" / "ticket" / "level-04").mkdir()
    return tmp_path


def test_load_reads_what_is_finished(folder: Path) -> None:
    found = Lottery.load(str(folder))
    assert found.folder == folder and found.settings["levels"] == 2
    order = [(t.kind, t.seed, t.level) for t in found.trainings]
    tickets = [("ticket", seed, level) for seed in (0, 1) for level in (0, 1, 2)]
    assert order == [*tickets, ("reinit", 0, 1), ("random", 0, 2), ("random", 1, 2)]
    one = found.trainings[4]
    assert isinstance(one, Training) and one.densities == {"w": 0.8} and one.early == 110 and one.end_test == 95.0
    with pytest.raises(AttributeError):
        one.level = 3  # type: ignore[misc]


def test_levels_are_sorted_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    for level in (100, 9, 11, 2):
        write(tmp_path, level=level)
    assert [t.level for t in Lottery.load(tmp_path).trainings] == [2, 9, 11, 100]
    assert Lottery.load(tmp_path).place(100).name == "level-100"


def test_an_experiment_without_results(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"rewind": 3}')
    found = Lottery.load(tmp_path)
    assert found.trainings == () and found.rows() == [] and found.paired(1, "random") == {}
    assert found.table().splitlines()[0].startswith("| level")
    assert found.to_dict() == {"settings": {"rewind": 3}, "rows": [], "trainings": []}


def test_rows_are_medians_over_seeds(folder: Path) -> None:
    rows = {(r.kind, r.level): r for r in Lottery.load(folder).rows()}
    assert list(rows) == [("ticket", 0), ("ticket", 1), ("ticket", 2), ("reinit", 1), ("random", 2)]
    assert rows["ticket", 1] == Row("ticket", 1, 0.8, 2, 105.0, 94.5, 94.5, pytest.approx(0.5), 2.5)
    assert rows["random", 2].error == pytest.approx(2.0), "of the mean: 4 / sqrt(2) / sqrt(2)"
    assert rows["reinit", 1].seeds == 1 and math.isnan(rows["reinit", 1].error)


def test_medians_of_three(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    for seed, (early, test) in enumerate([(100, 97.0), (900, 50.0), (120, 96.0)]):
        write(tmp_path, "ticket", seed, 1, early=early, end_test=test, early_test=test - 1, density=0.8 + 0.03 * seed)
    (row,) = Lottery.load(tmp_path).rows()
    assert (row.early, row.end_test, row.early_test, row.seconds) == (120, 96.0, 95.0, 3.0)
    assert row.density == pytest.approx(0.83), "the mean"


def test_pairs_by_seed(folder: Path) -> None:
    found = Lottery.load(folder)
    assert found.paired(2, "random") == {0: 93.0 - 80, 1: 94.0 - 84}
    assert found.paired(1, "reinit") == {0: 4.0}, "seeds that have both"
    assert found.paired(1, "oneshot") == {} == found.paired(9, "random")
    assert found.paired(2, "random", lambda t: t.early) == {0: -200, 1: -190}
    assert found.paired(2, "ticket", other_level=0) == {0: -2.0, 1: -2.0}
    assert found.paired(0, "random", other_level=2) == {0: 15.0, 1: 12.0}


def test_table(folder: Path) -> None:
    assert Lottery.load(folder).table().splitlines() == [
        "| level | P_m % | ticket % | early stop | reinit % | early stop | random % | early stop | s |",
        "|---|---|---|---|---|---|---|---|---|",
        "| 0 | 100.00 | 95.50 ± 0.50 | 105 |  |  |  |  | 2.5 |",
        "| 1 | 80.00 | 94.50 ± 0.50 | 105 | 90.00 | 100 |  |  | 2.5 |",
        "| 2 | 64.00 | 93.50 ± 0.50 | 105 |  |  | 82.00 ± 2.00 | 300 | 2.5 |",
    ]


def test_to_dict_is_json(folder: Path) -> None:
    write(folder, "oneshot", 1, 2, early_test=NAN, early_loss=math.inf)
    plain = Lottery.load(folder).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain, "numbers and null alone"
    assert plain["settings"]["seeds"] == [0, 1] and len(plain["rows"]) == 6 and len(plain["trainings"]) == 10
    last = plain["trainings"][-1]
    assert last["kind"] == "oneshot" and last["early_test"] is None and last["early_loss"] is None
    assert plain["rows"][3]["error"] is None and plain["trainings"][0]["densities"] == {"w": 1.0}


def test_files_of_a_training(folder: Path) -> None:
    found = Lottery.load(folder)
    place = found.place(1, seed=1)
    assert place == folder / "seed-1" / "ticket" / "level-01"
    masks = Masks.from_dense({"w": torch.tensor([True, False, True])})
    masks.save(place / "masks.safetensors")
    checkpoint.save(place / "model.safetensors", {"w": torch.tensor([1.0, 0.0, 2.0])})
    checkpoint.save(folder / "seed-1" / "start.safetensors", {"w": torch.zeros(3)})
    checkpoint.save(folder / "seed-1" / "rewind.safetensors", {"w": torch.ones(3)})
    assert found.masks(1, seed=1) == masks
    assert found.state(1, seed=1)["w"].tolist() == [1.0, 0.0, 2.0]
    assert found.start(seed=1)["w"].sum() == 0
    assert Lottery(folder, {"rewind": 5}, ()).start(seed=1)["w"].sum() == 3
    (point,) = found.curve(2, seed=1, kind="random")
    assert point["iteration"] == 10 and math.isnan(point["test"])


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no experiment at .*nowhere; it must hold settings\.json"):
        Lottery.load(tmp_path / "nowhere")
    found = Lottery.load(folder)
    with pytest.raises(FileNotFoundError, match=r"Lottery: no level 1 of random, seed 1, in "):
        found.place(1, seed=1, kind="random")
    for what in (found.masks, found.state, found.curve):
        with pytest.raises(FileNotFoundError, match="no level 7 of ticket, seed 0"):
            what(7)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "3",
        lambda text: text.replace('"end_test"', '"end"'),
        lambda text: text.replace('"ticket"', '"tickets"'),
        lambda text: text.replace('"level": 1', '"level": "one"'),
        lambda text: text.replace('"end_test": 94.0', '"end_test": null'),
    ],
    ids=["cut", "empty", "list", "number", "field", "kind", "level", "null"],
)
def test_damaged_results_are_named(folder: Path, damage: Any) -> None:
    path = folder / "seed-0" / "ticket" / "level-01" / "result.json"
    before = path.read_text()
    path.write_text(damage(before))
    assert path.read_text() != before
    wanted = rf"Lottery\.load: {re.escape(str(path))} must be the result of a training, got a damaged file"
    with pytest.raises(ValueError, match=wanted):
        Lottery.load(folder)


def test_damaged_bytes_and_settings(folder: Path) -> None:
    path = folder / "seed-0" / "ticket" / "level-01" / "result.json"
    good = path.read_bytes()
    path.write_bytes(b"\xff\xfe" + good)
    with pytest.raises(ValueError, match="got a damaged file"):
        Lottery.load(folder)
    path.write_bytes(good)
    for text in ('{"rewind": ', "[]"):
        (folder / "settings.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"settings\.json must be the settings of an experiment, got a damaged file"
        ):
            Lottery.load(folder)
