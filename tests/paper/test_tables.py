# SPDX-License-Identifier: Apache-2.0
"""The machinery behind docs/zipit-results.md: scores by hand, cuts counted, cache, page; the science is in test_digits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

HERE = Path(__file__).resolve().parents[2] / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import glyphs  # noqa: E402
import harness  # noqa: E402
import zipit_page  # noqa: E402
import zipit_tables as tables  # noqa: E402

import zipfast  # noqa: E402
from zipfast import demo  # noqa: E402
from zipfast.demo import Digits  # noqa: E402


class Says(nn.Module):
    """Gives the same logits [N, 4] for any input; a list of them as a network with several heads."""

    def __init__(self, *logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = [torch.tensor(head) for head in logits]

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return self.logits if len(self.logits) > 1 else self.logits[0]


def test_scores_by_hand() -> None:
    """Four images of the classes 0 to 3 (their labels); tasks {0, 1} and {2, 3}."""
    labels = torch.arange(4)
    data = Digits(torch.empty(0), torch.empty(0), torch.zeros(4, 1, 2, 2), labels)
    one = [[1.0, 0, 9, 0], [0, 1, 0, 0], [9, 0, 1, 0], [0, 0, 1, 0]]
    assert tables.score(Says(one), data, [(0, 1), (2, 3)]) == {
        "joint": 25.0,  # image 1 only
        "joint by head": 25.0,
        "task A": 100.0,
        "task B": 50.0,
        "per task": 75.0,
    }
    # Head A is right about its own classes but takes image 2 for a 0; head B shouts about classes that are not its own.
    head_a = [[5.0, 0, 0, 0], [0, 5, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]]
    head_b = [[0.0, 9, 1, 0], [9, 0, 1, 0], [0, 0, 4, 0], [0, 0, 0, 4]]
    assert tables.score(Says(head_a, head_b), data, [(0, 1), (2, 3)]) == {
        "joint": 50.0,
        "joint by head": 100.0,
        "task A": 100.0,
        "task B": 100.0,
        "per task": 100.0,
    }


@pytest.fixture(scope="module")
def merges() -> dict[str, nn.Module]:
    """Two untrained ResNet-20 and their merges: whole, at two cuts, and with heads of 10 and 12 outputs."""
    torch.manual_seed(0)
    models = [tables.resnet20(outputs).eval() for outputs in (10, 10, 12)]
    data = [torch.rand(8, 1, demo.SIZE, demo.SIZE, generator=torch.Generator().manual_seed(0))]
    found = {stop: tables.Row("part", {"stop": stop}).build(models[:2], data) for stop in ("stages.2", "stages.1")}
    found["whole"] = tables.Row("whole", {}).build(models[:2], data)
    found["unequal"] = tables.Row("unequal", {}).build(models[1:], data)
    return {"one": models[0], "both": tables.Ensemble(models[:2]), **found}


def test_side_by_side_shares_no_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: every group is of one model, half of them of each."""
    torch.manual_seed(0)
    models = [tables.vgg(10).eval() for _ in range(2)]
    seen = []
    apply = zipfast.merging.apply_groups
    monkeypatch.setattr(
        zipfast.merging, "apply_groups", lambda plan, groups, states: seen.append(groups) or apply(plan, groups, states)
    )
    tables.side_by_side(models, [torch.rand(8, 1, demo.SIZE, demo.SIZE)])
    for groups in seen[0].values():
        a, b = (set(groups.of_model(m).tolist()) for m in range(2))
        assert not a & b and len(a) == len(b) == groups.size // 2


@pytest.mark.parametrize("stop", ["stages.2", "stages.1", None])
def test_merged_layers_and_flops(merges: dict[str, nn.Module], stop: str | None) -> None:
    """Layers are 3x3 convolutions and the linear one; what lies behind a cut costs twice."""
    module = merges[stop or "whole"]
    trunk = module.trunk if stop else module
    layers = [p for p in trunk.parameters() if p.dim() == 2 or (p.dim() == 4 and p.shape[-1] == 3)]
    assert len(layers) == tables.Row("", {"stop": stop}).layers(20)
    one = tables.flops(merges["one"])
    assert tables.flops(merges["both"]) == 2 * one
    behind = {"stages.2": 0, "stages.1": 1 / 3, None: 0}[stop]  # each stage does a third of the work
    assert tables.flops(module) / one == pytest.approx(1 + behind, abs=0.02)
    if stop:
        said = module.report(torch.zeros(1, 1, demo.SIZE, demo.SIZE))
        assert (said["flops"], said["ensemble_flops"]) == (tables.flops(module), 2 * one)


def test_the_mean_of_two_linear_heads_is_the_whole_merge(merges: dict[str, nn.Module]) -> None:
    """So that the joint accuracies of 19 and of 20 merged layers are the same, as the page says."""
    x = torch.rand(4, 1, demo.SIZE, demo.SIZE)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(merges["stages.2"](x)).mean(0), merges["whole"](x))


def test_heads_of_different_size_cut_themselves(merges: dict[str, nn.Module]) -> None:
    """`merge` merges the 19 layers by itself that the rows of `cross` name."""
    module = merges["unequal"]
    assert [tuple(y.shape) for y in module(torch.rand(4, 1, demo.SIZE, demo.SIZE))] == [(4, 10), (4, 12)]
    names = {name for name, _ in module.trunk.named_parameters()}
    assert names == {name for name, _ in merges["stages.2"].trunk.named_parameters()}


def test_glyphs() -> None:
    found, again = glyphs.load_glyphs(), glyphs.load_glyphs()
    assert found.train.shape == (glyphs.TRAIN, 1, demo.SIZE, demo.SIZE) and found.train.dtype == torch.float32
    assert len(found.test) == len(found.test_labels) == glyphs.TEST
    assert torch.equal(found.train, again.train) and torch.equal(found.test_labels, again.test_labels)
    assert float(found.train.min()) >= 0 and float(found.train.max()) <= 1
    assert (found.train_labels.bincount() > 50).all() and len(found.train_labels.unique()) == len(glyphs.LETTERS)


def test_the_networks_are_those_of_the_demo() -> None:
    digits = demo.load_digits()
    ours = tables.Recipe("resnet20", "digits", (0, 1), 10, 3, 1).train()
    for a, b in zip(ours.state_dict().values(), demo.train(digits, (0, 1), 3, epochs=1).state_dict().values()):
        assert torch.equal(a, b)


def test_a_network_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tables.Recipe("vgg", "digits", (0, 1), 10, 0, 1)
    first = recipe.get(tmp_path)
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("trained again"))
    second = recipe.get(tmp_path)
    assert zipfast.checkpoint.state_hash(first.state_dict()) == zipfast.checkpoint.state_hash(second.state_dict())
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    other = tables.Recipe("vgg", "digits", (0, 1), 10, 1, 1)
    assert other.path(tmp_path) != recipe.path(tmp_path)


def test_a_small_run_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CACHE", tmp_path / "cache")
    few = [row for row in tables.VGG if row.name in ("model A", "model B", tables.ZIP, tables.ENSEMBLE)]
    monkeypatch.setitem(tables.TABLES, "vgg", tables.Table(few, tables.two, 6))
    monkeypatch.setattr(tables, "ALPHAS", (0.3, 1.0))
    monkeypatch.setattr(tables, "BETAS", (0.125, 1.0))
    networks = tables.networks  # small ones for the sweep too
    monkeypatch.setattr(tables, "networks", lambda kind, seed, epochs: networks("vgg", seed, epochs))
    monkeypatch.setenv("ZIPFAST_COMMIT", "0123456789abcdef")
    results = tmp_path / "results.json"
    assert tables.main(["vgg", "sweep", "--pairs", "1", "--epochs", "1", "--results", str(results)]) == 0
    document = json.loads(results.read_text())
    assert document["tables"].keys() == {"vgg", "sweep"}
    rows = {row["row"]: row for row in document["tables"]["vgg"]["rows"]}
    assert rows[tables.ENSEMBLE]["relative"] == 2 and rows[tables.ZIP]["relative"] == 1
    assert torch.tensor(document["tables"]["sweep"]["values"]).shape == (1, 2, 2)
    zipit_page.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "python benches/zipit_tables.py vgg --pairs 1 --epochs 1" in text
    assert "| α = 0.3 |" in text and "commit 0123456789ab" in text


def test_orderings_are_about_rows_that_are_measured() -> None:
    for name, claims in zipit_page.CLAIMS.items():
        rows = {row.name for row in tables.TABLES[name].rows}
        for claim in claims:
            assert {claim.less, claim.more} <= rows, claim
            assert claim.column in zipit_page.COLUMNS[name]


@pytest.mark.parametrize(
    ("less", "more", "said"),
    [
        ([1.0, 2, 3, 4, 9], [5.0, 5, 5, 5, 5], "yes | 4 of 5"),
        ([1.0, 2, 3, 8, 9], [5.0, 5, 5, 5, 5], "**open** | 3 of 5"),
        ([5.0, 5, 5, 5, 5], [5.0, 5, 5, 5, 5], "**open** | 0 of 5"),
        ([5.0, 5, 5, 5, 5], [1.0, 2, 3, 4, 9], "**no** | 1 of 5"),
    ],
)
def test_an_ordering_holds_by_medians_and_pairs(less: list[float], more: list[float], said: str) -> None:
    values = {tables.STALE: less, tables.ZIP_PAPER: more}
    rows = [{"row": name, "values": {"joint": v}} for name, v in values.items()]
    line = zipit_page.claims_table("two", {"rows": rows}).splitlines()[-1]
    assert line.startswith(f"| {tables.STALE} < {tables.ZIP_PAPER} | joint | ") and said in line


def test_a_table_or_the_report_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main([])
    assert "name a table, or --report" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tables.main(["three"])
    assert "table must be one of two, four, cross, vgg, sweep, got 'three'" in capsys.readouterr().err


def test_committed_page_is_generated() -> None:
    results = harness.ROOT / "benches" / "results" / tables.RESULTS
    assert zipit_page.PAGE.read_text() == zipit_page.page(json.loads(results.read_text()))
