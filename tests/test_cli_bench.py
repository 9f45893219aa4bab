# SPDX-License-Identifier: Apache-2.0
"""``zipfast bench``: what is measured and agreed on, what a report says, and one sentence for bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zipfast import cli
from zipfast.commands import bench

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benches"
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import harness  # noqa: E402
import offers  # noqa: E402
import product_page  # noqa: E402

CHECKOUTS = ("ZIPFAST_ZIPIT", "ZIPFAST_LOGME", "ZIPFAST_TIMM")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHECKOUTS:
        monkeypatch.delenv(name, raising=False)


def fails(capsys: pytest.CaptureFixture, *words: str) -> str:
    """The one sentence that a command ends with."""
    assert cli.main(["bench", *words]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("zipfast bench: ") and "\n" not in said
    return said.removeprefix("zipfast bench: ")


# ---------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """An op and a system, measured."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["gram", "tickets", "--quick", "--json", "--out", str(folder / "out"), "--plots", str(folder / "plots")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "zipfast", "bench", *words], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "[2/2] tickets: " in done.stderr
    return folder, json.loads(done.stdout)


def test_a_record_names_machine_peers_and_settings(ran: tuple[Path, dict]) -> None:
    folder, record = ran
    assert json.loads((folder / "out" / "bench.json").read_text()) == record
    assert record["machine"]["torch"] == torch.__version__ and record["machine"]["cores"] == os.cpu_count()
    assert {"copy", "fp32", "fp64"} <= {c["name"] for c in record["ceilings"]}
    assert record["peers"]["torch"] == {"version": torch.__version__, "why": ""}
    assert record["peers"]["ZipIt"]["why"].startswith("not named: set ZIPFAST_ZIPIT to a checkout of ")
    assert record["failed"] == {} and [d["op"] for d in record["targets"]] == ["gram", "tickets"]
    for document in record["targets"]:
        harness.validate(document)
        assert document["rows"] and not document["disagreements"] and not document["failures"]
    gram = record["targets"][0]["rows"]
    assert {name for row in gram for name in row["peers"]} == {"stack float64 @ T", "numpy float64 @ T"}
    assert all(row["percent_of_ceiling"] > 0 for row in gram)


def test_a_report_of_a_run(ran: tuple[Path, dict]) -> None:
    folder, record = ran
    text = (folder / "out" / "report.md").read_text()
    assert text.startswith("# zipfast bench\n") and "**Quick**" in text
    assert record["machine"]["commit"][:12] in text and f"torch {torch.__version__}" in text
    for line in ("| copy | 1 |", "| LogME | not named: set ZIPFAST_LOGME", "## gram", "## tickets"):
        assert line in text, line
    row = record["targets"][0]["rows"][0]
    assert f"| {row['case']} |" in text and f"({row['peers']['stack float64 @ T']['ratio']:.2f}x)" in text
    for name in re.findall(r"\]\((plots/\w+\.png)\)", text):
        assert (folder / "out" / name).read_bytes()[:4] == b"\x89PNG"
        assert (folder / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["bench.json", "plots", "report.md", "results"]


WRONG = """
import harness, torch
from harness import Job, Peer

OP = "gram"


class Case:
    name = "made up"

    def __init__(self, models, width, size):
        self.models, self.width = models, width


def agree(a, b, name):
    assert a == b, f"{a} is not {b}"


def broken():
    raise ValueError("no such thing")


def job(case, device):
    found = {"same": Peer(lambda: 1), "other": Peer(lambda: 2), "broken": Peer(broken), "quiet": Peer(int, None, "x")}
    return Job(OP, case.name, Peer(lambda: 1), found, agree)
"""


def test_what_disagrees_or_fails_is_told_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "benches"
    folder.mkdir()
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder / path.name)
    (folder / "bench_gram.py").write_text(WRONG)
    (folder / "bench_multidot.py").write_text("raise RuntimeError('made up | and so on')\n")
    (folder / "bench_correlate.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(bench, "benches", lambda: folder)
    words = [
        "multidot",
        "correlate",
        "gram",
        "--quick",
        "--peers",
        "torch",
        "--out",
        str(tmp_path / "out"),
        "--memory",
        "100",
    ]
    assert cli.main(["bench", *words, "--quiet"]) == 1
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["failed"]["multidot"].startswith("RuntimeError: made up | and so on (see ")
    assert record["failed"]["correlate"] == "killed by SIGKILL, as when memory runs out"
    gram = record["targets"][0]
    assert gram["disagreements"] == [{"case": "made up", "peer": "other", "why": "1 is not 2"}]
    assert gram["failures"] == [{"case": "made up", "peer": "broken", "why": "ValueError: no such thing"}]
    assert list(gram["rows"][0]["peers"]) == ["same"]  # and what is no peer that was asked for is not measured
    text = (tmp_path / "out" / "report.md").read_text()
    for line in (
        "| gram | made up | other | disagrees: 1 is not 2 |",
        "| gram | made up | broken | failed: ValueError: no such thing |",
        "| correlate | all |  | failed: killed by SIGKILL, as when memory runs out |",
        r"| multidot | all |  | failed: RuntimeError: made up \| and so on",
    ):
        assert line in text, line
    assert "gram made up other disagrees: 1 is not 2" in said
    assert "RuntimeError: made up" in (tmp_path / "out" / "results" / "multidot.log").read_text()


# -------------------------------------------------------------------------------------------------- runs that are killed


class Stopped:
    """Stands in for the processes: writes the documents of a real run, and is interrupted at a target."""

    def __init__(self, record: dict, at: str | None) -> None:
        self.documents = {d["op"]: d for d in record["targets"]}
        self.documents["ceilings"] = {"ceilings": record["ceilings"], "machine": record["machine"]}
        self.at, self.measured = at, []

    def __call__(self, session: bench.Session, name: str, *more: str) -> None:
        if name == self.at:
            raise KeyboardInterrupt
        self.measured.append(name)
        session.path(name).write_text(json.dumps(self.documents[name]))


def test_a_killed_run_goes_on(
    ran: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["bench", "gram", "tickets", "--quick", "--out", str(tmp_path / "out")]

    def run(at: str | None, *more: str) -> tuple[int, list[str]]:
        stopped = Stopped(ran[1], at)
        monkeypatch.setattr(bench.Session, "measure", lambda self, name, *rest: stopped(self, name, *rest))
        return cli.main([*words, *more]), stopped.measured

    assert run("tickets") == (130, ["ceilings", "gram"])
    assert "interrupted" in capsys.readouterr().err and not (tmp_path / "out" / "report.md").exists()
    assert run("tickets", "--restart") == (130, ["ceilings", "gram"])
    assert run("tickets", "--threads", "2") == (130, ["ceilings", "gram"])  # other settings are another run
    assert run("tickets") == (130, ["ceilings", "gram"])
    capsys.readouterr()
    gram = tmp_path / "out" / "results" / "gram.json"
    whole = gram.read_text()
    gram.write_text(whole[:100])  # a damaged result is measured again
    assert run("tickets") == (130, ["ceilings", "gram"])
    gram.write_text(whole)
    capsys.readouterr()
    assert run(None) == (0, ["tickets"])
    assert "going on in " in (said := capsys.readouterr().err) and "1 of 2 are measured" in said
    assert (tmp_path / "out" / "report.md").exists()
    assert run("gram") == (130, ["ceilings"])  # a finished one is measured anew, and its report stays until then
    assert (tmp_path / "out" / "report.md").exists()


def test_without_ceilings_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.Session, "measure", lambda *_: "made up")
    said = fails(capsys, "gram", "--quiet", "--out", str(tmp_path / "out"))
    assert said == "the ceilings could not be measured: made up"


def test_a_report_that_cannot_be_made_leaves_the_old_one(
    ran: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("old")
    stopped = Stopped(ran[1], None)
    monkeypatch.setattr(bench.Session, "measure", lambda self, name, *rest: stopped(self, name, *rest))
    log = tmp_path / "page.log"
    log.write_text("OSError: no space left\n")
    monkeypatch.setattr(bench.Session, "child", lambda *_: (1, "", log))
    said = fails(capsys, "gram", "--quick", "--quiet", "--out", str(tmp_path / "out"))
    assert said.startswith("the report could not be written: OSError: no space left (see ")
    assert (tmp_path / "out" / "report.md").read_text() == "old"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.md", "results"]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zip_mtch"], r"'target' must be of apply_mask, .*, tickets, got 'zip_mtch'; did you mean 'zip_match'\?"),
        (["--peers", "torch,scypy"], r"'peers' must be of torch, .*, LogME, got 'scypy'; did you mean 'scipy'\?"),
        (["--peers", "ZipIt"], "'peers' must be here to take part, got 'ZipIt', which is not named: set ZIPFAST_ZIPIT"),
        (["--threads", "0"], "'threads' must be at least 1, got 0"),
        (["--memory", "0"], "'memory' must be above 0, in GB, got 0"),
        (["--device", "tpu9"], "must be cpu or cuda, got 'tpu9'"),
    ],
)
def test_bad_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert re.search(message, fails(capsys, *words, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out" / "results").exists()


@pytest.mark.parametrize("option", ["--out", "--plots"])
def test_an_unwritable_folder_is_refused_before_anything_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench.Session, "run", lambda self: pytest.fail("measured"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for place, reason in (
        ("file", "it is a file; give a folder"),
        ("file/below", "Not a directory"),
        ("no/no", "No such"),
    ):
        assert f"cannot write {place}: {reason}" in fails(capsys, option, place)
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "bench-out"}


def test_a_checkout_without_its_file_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ZIPFAST_ZIPIT", str(tmp_path))
    said = fails(capsys, "--peers", "ZipIt", "--list")
    assert f"got 'ZipIt', which is ZIPFAST_ZIPIT is {tmp_path}, which has no matching_functions.py" in said


def test_an_installation_without_benches_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "benches").mkdir()  # of somebody else
    monkeypatch.setattr(bench, "PACKAGE", tmp_path / "zipfast")
    said = fails(capsys, "--list")
    assert "and are in neither; install zipfast again" in said and str(tmp_path / "zipfast" / "benches") in said


def test_the_names_of_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "bench.yaml").write_text("peers: [torch, numpy]\nlist: true\njson: true\n")
    assert cli.main(["bench", "--config", str(tmp_path / "bench.yaml")]) == 0
    peers = json.loads(capsys.readouterr().out)["peers"]
    assert [name for name, state in peers.items() if state["version"]] == ["torch", "numpy"]
    (tmp_path / "bench.yaml").write_text("peers: 3\n")
    assert "must be names with commas between them, got 3" in fails(capsys, "--config", str(tmp_path / "bench.yaml"))


# ------------------------------------------------------------------------------------------------- lists and pictures


def test_list(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr().out
    for name in (*offers.targets(), *offers.PEERS):
        assert re.search(rf"^  {re.escape(name)}\b", said, re.MULTILINE), name
    assert re.search(r"^  ZipIt +not named: set ZIPFAST_ZIPIT to a checkout of github.com/gstoica27/ZipIt$", said, re.M)
    assert cli.main(["bench", "--list", "--json", "--peers", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"] == offers.ops() and list(found["systems"]) == ["zipit", "logme", "soups", "tickets"]
    assert found["peers"]["numpy"] == {"version": "", "why": "here, but not asked for"}


def test_memory_that_can_be_used() -> None:
    total, free = bench.total_memory(), bench.free_memory(torch.device("cpu"))
    assert (total is None and free is None) or 0 < free <= total


def test_a_report_without_pictures_says_why(
    ran: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(product_page.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["product_page.py", str(ran[0] / "out" / "bench.json"), str(tmp_path)])
    assert product_page.main() == 0
    text = (tmp_path / "report.md").read_text()
    assert "No pictures: matplotlib is not installed (pip install 'zipfast[plots]')." in text and "](plots" not in text


# ---------------------------------------------------------------------------------------------------- installed packages


def test_a_built_package_has_the_benches_and_its_commit(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    words = ["-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    environment = os.environ | {"ZIPFAST_NATIVE": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "setup.py", *words], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    package = tmp_path / "lib" / "zipfast"
    built = {p.relative_to(package / "benches").as_posix() for p in (package / "benches").rglob("*")}
    assert built == {p.name for p in HERE.glob("*.py")} - {"conftest.py"}
    stamp = package / "_commit.txt"
    assert stamp.is_file() == (ROOT / ".git").exists()
    environment = {k: v for k, v in os.environ.items() if k != "ZIPFAST_COMMIT"} | {
        "PYTHONPATH": str(tmp_path / "lib"),
        "PYTHONWARNINGS": "ignore",
    }
    ask = "from zipfast.commands import bench; f = bench.benches(); print(f, bench.commit(f))"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    commit = stamp.read_text().strip() if stamp.is_file() else "unknown"
    assert done.stdout.split() == [str(package / "benches"), commit]
