# SPDX-License-Identifier: Apache-2.0
"""The benches' own machinery: order of the pairs, medians, agreement, results files, the page, the GPU steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import bench_moments  # noqa: E402
import bench_regroup  # noqa: E402
import bench_zip_match  # noqa: E402
import ceilings  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from harness import Peer, Row, Run  # noqa: E402


class FakeClock(harness.Clock):
    """Hands out given seconds per peer and remembers the order of the calls."""

    def __init__(self, **seconds: list[float]) -> None:
        self.cuda = False
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order: list[str] = []

    def time(self, peer: Peer) -> float:
        name = peer.call()
        self.order.append(name)
        return next(self.seconds[name])


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESULTS", str(tmp_path))
    monkeypatch.setenv("ZIPFAST_COMMIT", "0123456789abcdef")
    monkeypatch.delenv("ZIPFAST_RUN", raising=False)


def sample(tmp_path: Path, *, gpu_name: str | None = None, op: str = "moments") -> Path:
    """A results file as a run leaves it."""
    run = Run(
        "cpu", [ceilings.row("copy", 2e10, "B/s", 1, "made up"), ceilings.row("fp32", 1e11, "flop/s", 1, "made up")]
    )
    if gpu_name:
        run.machine |= {"gpu": gpu_name, "device": "cuda"}
    times = {"ms": 2.0, "iqr_ms": 0.5, "runs": 5}
    peer = {"ms": 6.1, "iqr_ms": 0.1, "runs": 5, "ratio": 3.0, "ratio_q1": 2.9, "ratio_q3": 3.1}
    row = Row(op, "a case", "cpu", 1, "cpu", times, {"torch.cov": peer}, bytes=2e7, flops=5e7, rate="fp32")
    harness.against_ceiling(row, run.rates(1))
    row.extra = {"extra_bytes": 1 << 20, "extra_over_input": 1.0, "growth_exponent": 2.125}
    run.add(row)
    assert run.path(op).parent == tmp_path
    return run.path(op)


# ------------------------------------------------------------------------------------------------------------- harness


def test_pairs_alternate_ours_first() -> None:
    clock = FakeClock(a=[1.0] * 3, b=[2.0] * 3)
    a, b = harness.pairs(clock, Peer(lambda: "a"), Peer(lambda: "b"), most=3, budget_s=60)
    assert clock.order == ["a", "b", "a", "b", "a", "b"]
    assert (a, b) == ([1.0] * 3, [2.0] * 3)


def test_one_pair_is_timed_without_any_budget() -> None:
    a, b = harness.pairs(FakeClock(a=[1.0], b=[2.0]), Peer(lambda: "a"), Peer(lambda: "b"), most=9, budget_s=0)
    assert (a, b) == ([1.0], [2.0])


def test_ratio_is_the_median_of_the_pairs() -> None:
    # Medians are 2 s and 6 s, ratio 3; the pairs' ratios are 6, 2 and 3.5.
    clock = FakeClock(ours=[1.0, 2.0, 4.0], peer=[6.0, 4.0, 14.0])
    row = harness.compare(
        "op", "case", lambda: "ours", {"p": lambda: "peer"}, agree=None, repeats=3, budget_s=60, clock=clock
    )
    assert row.ours["ms"] == 2000 and row.peers["p"]["ms"] == 6000
    assert row.peers["p"]["ratio"] == 3.5


def test_spread() -> None:
    assert harness.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert harness.spread([1.0, 3.0]) == (2.0, 1.0, 3.0)
    assert harness.timing([0.001, 0.003, 0.002]) == pytest.approx({"ms": 2.0, "iqr_ms": 1.0, "runs": 3})


def test_disagreement_raises_before_anything_is_timed() -> None:
    def agree(ours: float, theirs: float, name: str) -> None:
        assert ours == theirs, f"{ours} is not {theirs}"

    with pytest.raises(harness.Disagreement, match="op case: ours and p disagree: 1 is not 2"):
        harness.compare("op", "case", lambda: 1, {"p": lambda: 2}, agree=agree, clock=FakeClock())


def test_close_refuses_nan() -> None:
    peers.close(torch.ones(3), torch.ones(3) * (1 + 1e-6), 1e-5)
    with pytest.raises(AssertionError, match="largest difference"):
        peers.close(torch.tensor([1.0, torch.nan]), torch.ones(2), 1e-5)


def test_prepare_runs_before_each_call_and_is_not_timed() -> None:
    made: list[int] = []

    def prepare() -> int:
        made.append(len(made))
        return made[-1]

    used: list[int] = []
    peer = Peer(used.append, prepare)
    clock = harness.Clock("cpu")
    assert clock.time(peer) >= 0 and clock.time(peer) >= 0
    assert used == made == [0, 1]


def test_cold_cache_buffer_exceeds_the_cache() -> None:
    clock = harness.Clock("cpu")
    assert clock._buffer.numel() > harness.last_level_cache()


def test_ceiling_is_the_slower_of_bytes_and_flops() -> None:
    row = Row("op", "case", "cpu", 1, "cpu", {"ms": 4.0, "iqr_ms": 0, "runs": 1}, {}, bytes=1e9, flops=1e9, rate="fp32")
    harness.against_ceiling(row, {"copy": 1e12, "fp32": 5e11})
    assert (row.floor_ms, row.bound, row.percent_of_ceiling) == (pytest.approx(2.0), "fp32", pytest.approx(50))
    harness.against_ceiling(row, {"copy": 2.5e11, "fp32": 5e11})
    assert (row.bound, row.percent_of_ceiling) == ("copy", pytest.approx(100))


# -------------------------------------------------------------------------------------------------------- results files


def test_results_file(tmp_path: Path) -> None:
    document = json.loads(sample(tmp_path).read_text())
    harness.validate(document)
    assert document["machine"]["commit"] == "0123456789abcdef"
    assert document["machine"]["torch"] == torch.__version__
    assert document["rows"][0]["percent_of_ceiling"] == pytest.approx(50)
    assert [p.name for p in tmp_path.iterdir()] == [sample(tmp_path).name]  # no temporary file stays behind


def test_a_ceiling_is_the_better_of_two_measurements(tmp_path: Path) -> None:
    run = Run("cpu", [ceilings.row("copy", 1e10, "B/s", 1, ""), ceilings.row("eigh", 1.0, "s", None, "")])
    run.add(Row("op", "case", "cpu", 1, "cpu", {"ms": 2.0, "iqr_ms": 0, "runs": 1}, {}, bytes=2e7))
    run.finish([ceilings.row("copy", 2e10, "B/s", 1, ""), ceilings.row("eigh", 3.0, "s", None, "")])
    document = json.loads(run.path("op").read_text())
    assert [c["value"] for c in document["ceilings"]] == [2e10, 1.0]
    assert document["rows"][0]["percent_of_ceiling"] == pytest.approx(50)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        harness.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rows"), "results lacks rows"),
        (lambda d: d.update(schema=99), "schema must be 1, got 99"),
        (lambda d: d["machine"].pop("torch"), "machine lacks torch"),
        (lambda d: d["ceilings"][0].update(value="fast"), r"ceilings\[0\].value must be a finite number, got 'fast'"),
        (lambda d: d["rows"][0].update(op="other"), r"rows\[0\].op must be 'moments', got 'other'"),
        (lambda d: d["rows"][0]["peers"]["torch.cov"].pop("ratio"), r"rows\[0\].torch.cov lacks ratio"),
    ],
)
def test_validate_names_the_place(tmp_path: Path, change, message: str) -> None:
    document = json.loads(sample(tmp_path).read_text())
    change(document)
    with pytest.raises(ValueError, match=message):
        harness.validate(document)


# ----------------------------------------------------------------------------------------------------------------- page


def test_page_from_results(tmp_path: Path) -> None:
    sample(tmp_path)
    (tmp_path / "gpu.json").write_text('{"steps": []}')
    text = report.page(report.load(tmp_path))
    assert "| case | ours, ms | torch.cov, ms | % of ceiling | spread |" in text
    assert "| a case | 2 | 6.1 (3.00x) | 50 (copy) | 25 % |" in text
    assert "peak memory beyond the input 1 MiB, 1.00 times the input; time grows as n^2.12 from 1024" in text
    assert "commit 0123456789ab" in text and "python benches/report.py" in text
    assert text.split("## GPU")[1].strip() == "not measured yet"


def test_page_with_a_gpu(tmp_path: Path) -> None:
    sample(tmp_path, gpu_name="A GPU")
    text = report.page(report.load(tmp_path))
    assert "### A GPU" in text.split("## GPU")[1]
    assert text.split("## CPU")[1].split("## GPU")[0].strip() == "not measured yet"


def test_page_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sample(tmp_path)
    page = tmp_path / "benchmarks.md"
    arguments = ["report.py", "--results", str(tmp_path), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert report.main() == 1 and "run python benches/report.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", arguments)
    assert report.main() == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert report.main() == 0


def test_broken_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"op": "moments"}')
    with pytest.raises(ValueError, match=r"bad.json: results lacks ceilings, machine, rows, schema"):
        report.load(tmp_path)


def test_committed_page_is_generated() -> None:
    folder = harness.ROOT / "benches" / "results"
    if not list(folder.glob("*.json")) or not report.PAGE.exists():
        pytest.skip("no results in this checkout")
    assert report.PAGE.read_text() == report.page(report.load(folder), report.whole(folder))


# --------------------------------------------------------------------------------------------- ceilings, peers, benches


def test_ceilings_quick() -> None:
    rows = ceilings.measure("cpu", quick=True, eigh=True)
    assert {"copy", "read", "fp32", "fp64", "eigh float64 D=64"} <= {r["name"] for r in rows}
    assert all(r["value"] > 0 for r in rows)
    run = Run("cpu", rows)
    run.save("ceilings")
    assert run.rates(1).keys() >= {"copy", "read", "fp32", "fp64"}


def test_ceilings_of_one_run_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPFAST_RUN", "one")
    rows = [ceilings.row("copy", 1.0, "B/s", None, "made up")]
    Run("cpu", rows).save("ceilings")
    monkeypatch.setattr(ceilings, "measure", lambda device: [])
    assert ceilings.of_run("cpu") == rows
    monkeypatch.setenv("ZIPFAST_RUN", "another")
    assert ceilings.of_run("cpu") == []


def test_groups_of_an_unmerge_matrix() -> None:
    assert peers.groups_of(torch.tensor([[1.0, 0], [0, 1], [1, 0]])).tolist() == [0, 1, 0]
    with pytest.raises(AssertionError, match="one group"):
        peers.groups_of(torch.tensor([[1.0, 0], [0, 0]]))
    with pytest.raises(AssertionError, match="1 of 3 features"):
        peers.same_groups(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    ("bench", "case"),
    [
        (bench_moments, bench_moments.Case(4, 3, batch=2)),
        (bench_zip_match, bench_zip_match.Case(64, True)),
        (bench_zip_match, bench_zip_match.Case(64, False)),
        (bench_regroup, bench_regroup.Case(16, "merge")),
        (bench_regroup, bench_regroup.Case(16, "unmerge")),
    ],
    ids=lambda value: getattr(value, "name", None) or value.OP,
)
def test_small_jobs_agree_with_their_peers(bench, case) -> None:
    made_up = [ceilings.row("copy", 1e10, "B/s", 1, "made up"), ceilings.row("fp32", 1e11, "flop/s", 1, "made up")]
    run = Run("cpu", made_up)
    job = bench.job(case, "cpu")
    job.options["repeats"] = 1
    row = run.measure(job)
    assert row.peers.keys() == job.peers.keys() and (row.percent_of_ceiling or 0) > 0
    assert run.path(job.op).exists()


def test_after_adds_to_the_row_before_it_is_saved() -> None:
    run = Run("cpu")
    job = harness.Job("op", "case", Peer(int), {}, None, after=lambda run, row: row.extra.update(seen=1))
    run.measure(job)
    assert json.loads(run.path("op").read_text())["rows"][0]["extra"] == {"seen": 1}


def test_moments_cases_count_the_network() -> None:
    assert sum(times for _, _, times in bench_moments.RESNET50) == 37
    assert bench_moments.Case(16, 32).flops == 65536 * 32 * 33


def test_memory_of_a_match() -> None:
    found = bench_zip_match.memory(512)
    assert found["input_bytes"] == 512 * 512 * 4 and 0 <= found["extra_bytes"] < 64 << 20


# ------------------------------------------------------------------------------------------------------------ GPU steps


def test_judges() -> None:
    assert gpu.judge_pytest(0, "3 passed, 1 skipped") == "ok"
    assert gpu.judge_pytest(0, "4 skipped") == "not run: every selected test was skipped"
    assert gpu.judge_pytest(1, "python: No module named pytest") == "not run: pytest is not installed"
    assert gpu.judge_pytest(5, "") == "not run: no test was selected"
    assert gpu.judge_pytest(1, "1 failed") == "failed: pytest exit code 1"
    assert gpu.judge_sanitizer(0, "touched every op\nERROR SUMMARY: 0 errors") == "ok"
    assert gpu.judge_sanitizer(gpu.SANITIZER_FOUND, "").startswith("failed")
    assert gpu.judge_sanitizer(255, "Error: device not supported") == (
        "not run: the tool refused (exit code 255): Error: device not supported"
    )


def test_a_step_that_hangs_is_stopped() -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = gpu.execute(gpu.Step("slow", 1, [sys.executable, "-c", code], gpu.judge_exit), 1.5, {})
    assert outcome.status == "failed: no end within 2 s" and outcome.tail.strip() == "begun"
    assert outcome.seconds < 20


def test_a_missing_tool_is_not_run() -> None:
    outcome = gpu.execute(gpu.Step("tool", 1, ["no-such-tool"], gpu.judge_sanitizer), 1, {})
    assert outcome.status == "not run: no-such-tool: No such file or directory"


@pytest.mark.parametrize(
    ("obstacle", "code", "strict"),
    [("not run: no GPU", 0, 2), ("failed: there is a GPU, but _cuda.so was not built", 1, 1)],
)
def test_without_a_usable_gpu(
    obstacle: str,
    code: int,
    strict: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(gpu, "unusable", lambda: obstacle)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok", 0.0, "made up"))
    assert gpu.main([]) == code and gpu.main(["--require"]) == strict
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert steps[0]["step"] == "info" and steps[-1]["step"].startswith("sanitizer")
    assert all(s["status"] == obstacle for s in steps[1:])
    if code == 0:
        assert "NOT RUN: touch, tests, streams" in capsys.readouterr().out


def test_the_deadline_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable", lambda: None)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok"))
    assert gpu.main(["--deadline", "3"]) == 0
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert all(s["status"] == "not run: the deadline of 3 s has passed" for s in steps[1:])
