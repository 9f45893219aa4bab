# SPDX-License-Identifier: Apache-2.0
"""What ``zipfast bench`` measures: cases, peers and what they need; one case measured, or the reason why not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import harness  # noqa: E402
import offers  # noqa: E402
import plan  # noqa: E402
import product  # noqa: E402
import product_page  # noqa: E402
import rivals  # noqa: E402
from harness import Job, Peer  # noqa: E402


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for offer in offers.PEERS.values():
        monkeypatch.delenv(offer.variable or "ZIPFAST_NONE", raising=False)


# ------------------------------------------------------------------------------------------------------ cases and peers


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(offers.PEERS, "numpy", dataclasses.replace(offers.PEERS["numpy"], module="no_such.module"))
    assert offers.missing("numpy") == "not installed: pip install numpy"
    assert offers.missing("torch.nn.utils.prune") is None


def test_a_package_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_at_import.py").write_text("raise RuntimeError('made up')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(offers.PEERS, "numpy", dataclasses.replace(offers.PEERS["numpy"], module="breaks_at_import"))
    use, broken = product.importable(["torch", "numpy"])
    assert use == ["torch"] and broken == {"numpy": "cannot be imported: RuntimeError: made up"}


def test_a_checkout_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matching_functions.py").write_text("import no_such_package\n")
    monkeypatch.setenv("ZIPFAST_ZIPIT", str(tmp_path))
    assert offers.missing("ZipIt") is None and offers.version("ZipIt") == "a checkout"
    use, broken = product.importable(["ZipIt"])
    assert not use and broken["ZipIt"].startswith("cannot be imported: ModuleNotFoundError: No module named 'no_such_")


def test_a_peer_that_cannot_be_built_costs_no_other() -> None:
    def broken() -> Peer:
        raise ValueError("made up")

    found = {"broken": harness.guarded(broken, "torch"), "fine": harness.guarded(lambda: Peer(int), "torch")}
    fit, _, failed = product.agreed(Job("gram", "case", Peer(int), found, None))
    assert list(fit) == ["fine"] and failed == [{"case": "case", "peer": "broken", "why": "ValueError: made up"}]


def test_timm_is_called_as_its_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of the same options stands in, which takes the first file for the average."""
    import system_soups

    (tmp_path / "avg_checkpoints.py").write_text(
        "import argparse, glob, os, torch\n"
        "from safetensors.torch import load_file\n"
        "parser = argparse.ArgumentParser()\n"
        "for name in ('input', 'filter', 'output'):\n"
        "    parser.add_argument('--' + name)\n"
        "parser.add_argument('--no-sort', action='store_true')\n"
        "def main():\n"
        "    args = parser.parse_args()\n"
        "    files = sorted(glob.glob(args.input + os.path.sep + args.filter))\n"
        "    assert len(files) == 3 and args.no_sort and not os.path.exists(args.output)\n"
        "    torch.save(load_file(files[0]), args.output)\n"
    )
    monkeypatch.setenv("ZIPFAST_TIMM", str(tmp_path))
    job = system_soups.job(system_soups.QUICK[0], "cpu", ["timm"])
    peer = job.peers["timm avg_checkpoints"]
    ours, found = job.ours.call(), [peer.call() for _ in range(2)][-1]
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        job.agree(ours, found, "timm")
    job.agree(ours, ours, "timm")


def test_every_op_and_peer_has_its_rows() -> None:
    assert set(plan.QUICK) == set(plan.NEED) == set(offers.ops())
    for name, offer in offers.PEERS.items():
        assert set(offer.where) <= set(offers.targets()), name
        assert offer.package or (offer.variable and offer.holds and offer.homepage), name
    assert all((HERE / f"system_{name}.py").is_file() for name in offers.SYSTEMS)
    assert set(rivals.BUILDERS) <= set(offers.ops())


def jobs(target: str, quick: bool, use: list[str]) -> list[Job]:
    with torch.inference_mode(target in offers.ops()):
        return [planned.make() for planned in plan.of(target, "cpu", quick, use)]


@pytest.mark.parametrize("target", list(offers.targets()))
def test_peers_take_part_where_they_are_said_to(target: str) -> None:
    use = [name for name in offers.PEERS if offers.missing(name) is None]
    use, _ = product.importable(offers.taking_part(target, use))
    packages = {peer.package for job in jobs(target, True, use) for peer in job.peers.values()}
    assert packages == set(use)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_full_cases_are_planned_without_building_them(device: str) -> None:
    use = list(offers.PEERS)
    for target in offers.targets():
        full = plan.of(target, device, False, use)
        assert full and all(p.need > 0 for p in full)
        assert max(p.need for p in full) >= max(p.need for p in plan.of(target, device, True, use))
    assert len(plan.of("evidence", "cuda", False, use)) > len(plan.of("evidence", "cpu", False, use))


def test_scipy_finds_the_groups_of_complete_linkage() -> None:
    pytest.importorskip("scipy")
    job = rivals.linkage_job(64, ["scipy"])
    (peer,) = job.peers.values()
    job.agree(job.ours.call(), peer.call(), "scipy")
    with pytest.raises(AssertionError, match="the groups are others"):
        job.agree(job.ours.call(), peer.call()[::-1].copy(), "scipy")


# ------------------------------------------------------------------------------------------------------- one measurement


def target_of(memory: float | None) -> product.Target:
    return product.Target(argparse.Namespace(target="gram", device="cpu", memory=memory, quick=True), [])


def test_what_needs_more_memory_is_skipped_visibly() -> None:
    target = target_of(3.5e9)
    huge = plan.Planned("huge", 11.7e9, lambda: pytest.fail("built"))
    target.measure(huge, ["torch"])
    needed = f"needs {(11.7e9 + plan.PROCESS) / 1e9:.1f} GB, 3.5 GB free"
    assert target.skipped == [{"case": "huge", "why": needed}]
    document = target.document(1.0, {})
    record = {"failed": {}, "targets": [document]}
    assert product_page.unmeasured(record) == [["gram", "huge", "", f"skipped: {needed}"]]


def test_a_case_that_cannot_be_built_costs_the_others_nothing(capsys: pytest.CaptureFixture) -> None:
    target = target_of(None)

    def broken() -> Job:
        raise MemoryError

    seen: list[str] = []

    def after(run: harness.Run, row: harness.Row) -> None:
        seen.append(row.case)
        raise FileNotFoundError("no /proc here")

    target.measure(plan.Planned("broken", 1.0, broken), [])
    target.measure(plan.Planned("fine", 1.0, lambda: Job("gram", "fine", Peer(int), {}, None, {}, after)), [])
    assert target.failures == [{"case": "broken", "peer": "", "why": "MemoryError"}]
    assert seen == ["fine"] and [r.case for r in target.run.rows] == ["fine"]
    record = {"failed": {}, "targets": [target.document(1.0, {})]}
    assert ["gram", "fine", "", "memory not measured: FileNotFoundError: no /proc here"] in product_page.unmeasured(
        record
    )


@pytest.mark.parametrize("name", ["mlp_steps", "soups"])
def test_what_a_gpu_has_no_use_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, list]] = []

    class Host(harness.Run):
        def __init__(self, device: str, found: list) -> None:
            made.append((device, found))
            super().__init__("cpu", found)

    copy = {"name": "copy", "value": 1.0, "unit": "B/s", "threads": 1}
    (tmp_path / "ceilings.json").write_text(json.dumps({"ceilings": [copy]}))
    options = argparse.Namespace(
        target=name, device="cuda", memory=1.0, quick=True, peers="", ceilings=str(tmp_path / "ceilings.json")
    )
    monkeypatch.setattr(product, "Once", Host)
    skipped = product.measure(options)["skipped"]
    if name == "mlp_steps":
        assert made == [("cuda", [copy])] and skipped[0]["case"] == "all"
        assert skipped[0]["why"].startswith("not for a GPU: ")
    else:
        assert made == [("cpu", [])] and all("0 MB free" in s["why"] for s in skipped)


def test_better_ceilings_change_the_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ceilings

    slow, fast = (ceilings.row("copy", value, "B/s", 1, "made up") for value in (1e10, 2e10))
    row = harness.Row("gram", "case", "cpu", 1, "cpu", {"ms": 2.0, "iqr_ms": 0, "runs": 1}, {}, bytes=1e7)
    harness.against_ceiling(row, {"copy": 1e10})
    assert row.percent_of_ceiling == pytest.approx(50)
    paths = tmp_path / "ceilings.json", tmp_path / "gram.json"
    paths[0].write_text(json.dumps({"ceilings": [slow], "machine": {}}))
    paths[1].write_text(json.dumps({"op": "gram", "rows": [vars(row)], "ceilings": [slow]}))
    monkeypatch.setattr(product, "ceilings_of", lambda device, quick: [fast])
    options = argparse.Namespace(out=str(paths[0]), again=str(tmp_path), device="cpu", quick=False)
    assert product.again(options)["ceilings"][0]["value"] == 2e10
    assert json.loads(paths[1].read_text())["rows"][0]["percent_of_ceiling"] == pytest.approx(25)
