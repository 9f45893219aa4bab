# SPDX-License-Identifier: Apache-2.0
"""The benches' own machinery: order of the pairs, medians, agreement, results files, the page, the GPU steps."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parent.parent / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import bench_moments  # noqa: E402
import bench_regroup  # noqa: E402
import bench_zip_match  # noqa: E402
import ceilings  # noqa: E402
import goals  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import rehearse  # noqa: E402
import report  # noqa: E402
from goals import Goal  # noqa: E402
from harness import Peer, Row, Run  # noqa: E402

import zipfast  # noqa: E402


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
    assert text.split("## CPU")[1].split("## Goals")[0].strip() == "not measured yet"


def test_page_with_the_steps(tmp_path: Path) -> None:
    assert report.steps(tmp_path) == []
    ran = {"step": "tests", "status": "failed: no end\nmore", "seconds": 12.3, "tail": ""}
    document = {"gpu": "A GPU", "commit": "0123456789abcdef", "date": "2026-01-02", "deadline_s": 460.0, "steps": [ran]}
    for change, shown in (({}, True), ({"dry": True}, False), ({"gpu": None}, False)):
        (tmp_path / "gpu.json").write_text(json.dumps(document | change))
        text = report.page([], ran=report.steps(tmp_path))
        assert ("| tests | 12 | failed: no end |" in text) == shown
        assert ("A GPU, commit 0123456789ab, 2026-01-02; 12 s of 460 s." in text) == shown


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
    documents = report.load(folder)
    assert report.PAGE.read_text() == report.page(documents, report.whole(folder), report.steps(folder))
    kernels = report.KERNELS.read_text()
    assert kernels == goals.between(kernels, goals.evaluate(documents))


# --------------------------------------------------------------------------------------------- ceilings, peers, benches


def test_ceilings_quick() -> None:
    rows = ceilings.measure("cpu", quick=True, eigh=True)
    assert {"copy", "read", "fp32", "fp64", "eigh float64 D=64"} <= {r["name"] for r in rows}
    assert all(r["value"] > 0 for r in rows)
    run = Run("cpu", rows)
    run.save("ceilings")
    assert run.rates(1).keys() >= {"copy", "read", "fp32", "fp64"}


def test_ceilings_of_a_gpu_are_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearse.pretended():
        ceilings.beyond_cache("cuda")
        assert torch.cuda.get_device_properties("cuda").L2_cache_size < 50 << 20
    large = SimpleNamespace(L2_cache_size=100 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: large)
    with pytest.raises(RuntimeError, match="larger than twice the L2 of cuda, 100 MiB"):
        ceilings.beyond_cache("cuda")
    large.L2_cache_size = 60 << 20  # an H200 has less
    ceilings.beyond_cache("cuda")


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
    skipped = "SKIPPED [4] tests/gpu/x.py:9: there is one device\n4 skipped"
    assert gpu.judge_pytest(0, skipped) == "not run: every selected test was skipped: there is one device"
    assert gpu.judge_collected(0, "\n12/30 tests collected (18 deselected) in 1s") == "ok"
    assert gpu.judge_collected(0, "\n3 tests collected in 1s") == "ok"
    assert gpu.judge_collected(0, "\n0 tests collected") == "failed: it selects no test"
    assert gpu.judge_collected(5, "") == "failed: pytest exit code 5 while it collected"
    assert gpu.judge_exit(1, "one\ntwo\n") == "failed: exit code 1: two"
    assert gpu.judge_touch(0, "") == "failed: not every op was touched"
    assert gpu.judge_pytest(1, "python: No module named pytest") == "not run: pytest is not installed"
    assert gpu.judge_pytest(5, "") == "not run: no test was selected"
    assert gpu.judge_pytest(1, "1 failed") == "failed: pytest exit code 1"
    assert gpu.judge_sanitizer(0, "touched every op\nERROR SUMMARY: 0 errors") == "ok"
    hazards = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert gpu.judge_sanitizer(0, f"touched every op\n{hazards}") == "ok"
    assert gpu.judge_sanitizer(0, hazards) == "failed: not every op was touched"
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
    monkeypatch.setattr(gpu, "unusable", lambda built: obstacle)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok", 0.0, "made up"))
    assert gpu.main([]) == code and gpu.main(["--require"]) == strict
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert steps[0]["step"] == "info" and steps[-1]["step"] == "report:last"
    assert all(s["status"] == obstacle for s in steps[1:])
    if code == 0:
        assert "NOT RUN: build, touch, tests, streams" in capsys.readouterr().out


def test_the_deadline_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable", lambda built: None)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok"))
    assert gpu.main(["--deadline", "3"]) == 0
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert all(re.fullmatch(r"not run: \d s of 3 are left, its budget is \d+", s["status"]) for s in steps[1:])


def test_the_budgets_fit_into_the_deadline() -> None:
    assert sum(s.budget_s for s in gpu.steps()) + 10 <= gpu.DEADLINE_S < 8 * 60  # and what the machine is asked first


def test_a_step_may_use_what_others_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [gpu.Step(name, 20, ["none"], gpu.judge_exit) for name in ("first", "second", "last")]
    limits: list[float] = []
    monkeypatch.setattr(gpu, "steps", lambda: made)
    monkeypatch.setattr(gpu, "unusable", lambda built: None)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok"))
    monkeypatch.setattr(
        gpu, "execute", lambda step, limit, environment: limits.append(limit) or gpu.Outcome(step.name, "ok")
    )
    gpu.main(["--deadline", "70"])
    assert limits == pytest.approx([30, 50, 70], abs=1)
    limits.clear()
    gpu.main(["--deadline", "24"])  # too little for all: the first are not cut short for the sake of the last
    assert limits == pytest.approx([20, 20, 24], abs=1)
    limits.clear()
    gpu.main(["--only", "last", "--deadline", "70"])
    assert limits == pytest.approx([70], abs=1)


def test_steps_by_name_and_part() -> None:
    assert [s.name for s in gpu.chosen(["bench:moments", "sanitizer"])] == [
        "bench:moments",
        *(f"sanitizer:{kind}" for kind in ("memcheck", "racecheck", "synccheck")),
    ]
    assert gpu.chosen([]) == gpu.steps()
    with pytest.raises(SystemExit, match="no step is called 'benches'; there are build, touch, tests"):
        gpu.chosen(["benches"])


def test_parts_run_alone_share_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable", lambda built: None)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok"))
    monkeypatch.setattr(gpu, "execute", lambda step, limit, environment: gpu.Outcome(step.name, "ok"))

    def after(*only: str) -> list[str]:
        gpu.main(["--only", *only])
        return [s["step"] for s in json.loads((tmp_path / "gpu.json").read_text())["steps"]]

    assert after("touch", "second") == ["info", "touch", "second"]
    assert after("touch", "large") == ["second", "info", "touch", "large"]
    monkeypatch.setenv("ZIPFAST_COMMIT", "another")
    assert after("paths") == ["info", "paths"]


def test_nothing_runs_after_a_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unusable", lambda built: None)
    monkeypatch.setattr(gpu, "info", lambda: gpu.Outcome("info", "ok"))
    monkeypatch.setattr(gpu, "execute", lambda step, limit, environment: gpu.Outcome(step.name, "failed: exit code 1"))
    assert gpu.main([]) == 1
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {s["status"] for s in steps[2:]} == {"not run: the build did not succeed"}


def test_a_bench_of_each_op_is_a_step() -> None:
    benches = {p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py")}
    host_only = {op.stem for op in zipfast.ops.OPS.values() if op.host_only is not None}
    assert {name for name, _ in gpu.BENCHES} == benches - host_only


def test_progress_of_a_long_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu, "BEAT_S", 0.3)
    code = "import time; print('half', flush=True); time.sleep(1.5); print('whole')"
    outcome = gpu.execute(gpu.Step("slow", 20, [sys.executable, "-c", code], gpu.judge_exit), 20, {})
    assert outcome.status == "ok" and outcome.tail == "half\nwhole\n"
    assert "s: half" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("racecheck", "rarecheck"), "invalid choice: 'rarecheck'"),
        ((str(gpu.SANITIZER_FOUND), "0"), r"must be in \[1, 126\), got 0"),
        ((str(HERE / "touch.py"), "gone.py"), "there is no .*gone.py"),
    ],
)
def test_a_malformed_sanitizer_command_is_refused(change, message: str, capsys: pytest.CaptureFixture) -> None:
    stand_in = next(s for s in gpu.steps() if s.name == "sanitizer:racecheck").dry[0].command[2:]
    assert gpu.main(stand_in) == 0
    with pytest.raises(SystemExit):
        gpu.main([change[1] if word == change[0] else word for word in stand_in])
    assert re.search(message, capsys.readouterr().err)


def untouched() -> dict[str, bytes]:
    pages = [report.PAGE, report.KERNELS, *(harness.ROOT / "benches" / "results").iterdir()]
    return {str(p): p.read_bytes() for p in pages}


def test_dry_run_of_some_steps(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = untouched()
    assert gpu.main(["--dry-run", "--only", "build", "ceilings", "bench:regroup", "report", "sanitizer"]) == 0
    said = capsys.readouterr().out
    assert said.count("dry: ok") == 2 * 8 and "nothing was measured" in said
    assert before == untouched() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_dry_run(capsys: pytest.CaptureFixture) -> None:
    """Every step; a goal whose case no bench has shows here, too."""
    before = untouched()
    code = gpu.main(["--dry-run"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("dry: ok") == 2 * len(gpu.steps()) and before == untouched()


# ----------------------------------------------------------------------------------------------------------- rehearsals


def test_a_case_that_is_still_large_is_refused() -> None:
    with rehearse.pretended(), pytest.raises(rehearse.TooLarge, match=r"zeros makes a tensor of shape \[4096, 4096\]"):
        torch.zeros(4096, 4096, device="cuda")


def test_what_asks_for_a_gpu_gets_the_cpu() -> None:
    with rehearse.pretended():
        x = torch.randn(3, 4, device=torch.device("cuda"), generator=torch.Generator("cuda").manual_seed(0)).cuda()
        assert x.to("cuda:0").device.type == "cpu" and torch.device("cuda").type == "cuda"
        half = x.half()
        assert torch.mm(half, half.T, out_dtype=torch.float32).dtype == torch.float32
        torch.cuda.synchronize()
    assert torch.Generator is torch._C.Generator


def test_goals_that_no_job_can_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIPFAST_ZIPIT", raising=False)
    wanted = (
        Goal("op", "n=8", "ratio", 2, "≥ 2x the old one", ("old",)),
        Goal("op", "n=16", "ms", 1, "≤ 1 ms"),
        Goal("op", "n=8", "ratio", 2, "≥ 2x", goals.PUBLIC),
    )
    monkeypatch.setattr(goals, "GOALS", wanted)
    job = harness.Job("op", "n=8", Peer(int), {"new": Peer(int)}, None)
    assert rehearse.unserved("op", [job]) == [
        "op: case 'n=8' has no peer 'old', only new",
        "op: 0 cases are called 'n=16'",
    ]


# ---------------------------------------------------------------------------------------------------------------- goals


def measured_on(gpu_name: str, rows: list[dict], *, date: str = "2026-01-02T00:00:00Z", copy: float = 4e12) -> dict:
    machine = {"device": "cuda", "gpu": gpu_name, "date": date, "commit": "0123456789abcdef+changes"}
    return {"op": "op", "machine": machine, "ceilings": [ceilings.row("copy", copy, "B/s", None, "")], "rows": rows}


def a_row(case: str, ms: float, **more) -> dict:
    empty = {"peers": {}, "backend": "cuda", "percent_of_ceiling": 61.0, "bound": "copy", "bytes": 4e8}
    return {"case": case, "ours": {"ms": ms}} | empty | more


H200 = "NVIDIA H200"
RATIO = Goal("op", "n=8", "ratio", 2.0, "≥ 2x the old one", ("old one", "older"))
TIME = Goal("op", "n=8", "ms", 1.0, "≤ 1 ms")


def test_nothing_is_measured_by_default() -> None:
    found = goals.evaluate([])
    assert len(found) == len(goals.GOALS) and {o.status for o in found} == {"not measured"}
    text = "\n".join(goals.lines(found))
    assert f"Of {len(found)} goals: 0 met, 0 missed, {len(found)} not measured." in text
    assert text.count("| not measured (no results) |") == len(found)


@pytest.mark.parametrize(("ms", "status"), [(1.0, "met"), (1.01, "missed")])
def test_a_time_is_met_or_missed(ms: float, status: str) -> None:
    found = goals.outcome(TIME, [measured_on(H200, [a_row("n=8", ms), a_row("n=88", 0.1)])])
    assert (found.status, found.value, found.percent_of_ceiling) == (status, ms, 61.0)


@pytest.mark.parametrize(("ratio", "status"), [(2.0, "met"), (1.99, "missed")])
def test_a_ratio_is_that_to_the_fastest_such_peer(ratio: float, status: str) -> None:
    peers_found = {"the Old one": {"ratio": 9.0}, "old one, fused": {"ratio": ratio}, "older": {"ratio": 0.1}}
    found = goals.outcome(RATIO, [measured_on(H200, [a_row("n=8", 1.0, peers=peers_found)])])
    assert (found.status, found.value) == (status, ratio)


def test_quantities_of_the_copy_ceiling() -> None:
    document = measured_on(H200, [a_row("n=8", 0.125)])  # 4e8 bytes at 4e12 bytes a second: 0.1 ms
    share = goals.outcome(goals.of_copy("op", "n=8"), [document])
    assert (share.status, share.value) == ("missed", pytest.approx(80))
    floors = goals.outcome(Goal("op", "n=8", "floors", 1.25, "≤ 1.25x"), [document])
    assert (floors.status, floors.value) == ("met", pytest.approx(1.25))


@pytest.mark.parametrize(
    ("documents", "why"),
    [
        ([], "no results"),
        ([measured_on("A100", [a_row("n=8", 1.0)])], "results of A100 only"),
        ([measured_on(H200, [a_row("n=80", 1.0)])], "no such case"),
        ([measured_on(H200, [a_row("n=8 strict", 1.0), a_row("n=8, compat", 1.0)])], "several such cases"),
        ([measured_on(H200, [a_row("n=8", 1.0), a_row("n=8", 1.0)])], "several such cases"),
        ([measured_on(H200, [a_row("n=8", 1.0, peers={"new": {"ratio": 3.0}})])], "no peer 'old one'"),
        (
            [measured_on(H200, [a_row("n=8", 1.0, peers={"old one": {"ratio": 3.0}}, backend="torch")])],
            "served by torch",
        ),
    ],
)
def test_what_is_missing_is_not_met(documents: list[dict], why: str) -> None:
    found = goals.outcome(RATIO, documents)
    assert (found.status, found.why, found.value) == ("not measured", why, None)


def test_without_bytes_or_a_ceiling_there_is_no_share() -> None:
    share = goals.of_copy("op", "n=8")
    assert goals.outcome(share, [measured_on(H200, [a_row("n=8", 1.0, bytes=None)])]).why == "bytes not counted"
    document = measured_on(H200, [a_row("n=8", 1.0)])
    assert goals.outcome(share, [document | {"ceilings": []}]).why == "no copy ceiling"


def test_a_case_may_begin_with_its_name_and_the_newest_file_counts() -> None:
    old = measured_on(H200, [a_row("n=8", 0.5)])
    new = measured_on(H200, [a_row("n=8, all of it", 3.0)], date="2026-01-03T00:00:00Z")
    assert goals.outcome(TIME, [new, old]).value == 3.0


def test_lines_of_goals() -> None:
    document = measured_on(H200, [a_row("n=8", 0.5)])
    text = "\n".join(goals.lines([goals.outcome(TIME, [document]), goals.outcome(RATIO, [document])]))
    assert "Of 2 goals: 1 met, 0 missed, 1 not measured." in text
    assert "| op | n=8 | ≤ 1 ms | 0.5 ms | 61 (copy) | met | NVIDIA H200, 0123456789ab+, 2026-01-02 |" in text
    assert "| op | n=8 | ≥ 2x the old one | – | – | not measured (no peer 'old one') | – |" in text


def test_goals_between_the_marks(tmp_path: Path) -> None:
    page = f"before\n{goals.BEGIN}\nold\n{goals.END}\nafter\n"
    once = goals.between(page, goals.evaluate([]))
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old\n" not in once
    assert goals.between(once, goals.evaluate([])) == once
    with pytest.raises(ValueError, match="once each"):
        goals.between("no marks", [])


def test_check_looks_at_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(tmp_path)
    kernels = tmp_path / "kernels.md"
    kernels.write_text(f"{goals.BEGIN}\n{goals.END}\n")
    arguments = ["report.py", "--results", str(tmp_path), "--page", str(tmp_path / "p.md"), "--kernels", str(kernels)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert report.main() == 0
    monkeypatch.setattr(sys, "argv", [*arguments, "--check"])
    assert report.main() == 0
    kernels.write_text(kernels.read_text().replace("not measured", "met", 1))
    assert report.main() == 1


@dataclasses.dataclass(frozen=True)
class Sized:
    n: int
    features: tuple[int, ...] = (4096, 8)
    name: str = "a case"


def test_sizes_of_cases_are_cut_and_names_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rehearse.smaller(Sized(4096)) == Sized(rehearse.FIELDS["n"], (rehearse.FIELDS["features"], 8))
    seen: list[int] = []

    def by_size(n: int) -> harness.Job:
        seen.append(n)
        return harness.Job("op", f"n={n}, {n}0, x{n}", Peer(int), {}, None)

    job = rehearse.with_smaller_case(by_size, "n")(4096)
    assert (seen, job.case) == ([64], "n=4096, 640, x64")
