# SPDX-License-Identifier: Apache-2.0
"""`zipfast ticket` from the command line: every action on small networks, kills, bad input in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zipfast import checkpoint, cli
from zipfast.commands.ticket import integers, names
from zipfast.tickets import PRESETS, Lottery, Masks, rate_for
from zipfast.zoo import mlp

ROOT = Path(__file__).resolve().parents[1]
MLP = ["--factory", "zipfast.zoo:mlp", "--factory-args", '{"in_features": 6, "hidden": [12], "out_features": 3}']
DATA = ["--data", "train.npz", "--validation-size", "40", "--test", "test.npz"]
SMALL = [*MLP, *DATA, "--iterations", "40", "--every", "10", "--batch-size", "20", "--lr", "0.01"]
FULL = [*SMALL, "--levels", "2", "--seeds", "0,1", "--rewind", "8", "--controls", "reinit,random,oneshot"]


def net(drop: float = 0.2) -> nn.Module:
    """Convolution, batch norm, dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(drop), nn.Flatten(), nn.Linear(144, 10)
    )


def write_data(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 3, generator=generator)
    for name, n in (("train", 140), ("test", 90)):
        x = torch.randn(n, 6, generator=generator)
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=(x @ truth).argmax(1).numpy())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """One thread, which is fastest for small networks; what is measured is kept in a folder of the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and an experiment, `done`; not to be written to."""
    folder = tmp_path_factory.mktemp("tickets")
    write_data(folder)
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert cli.main(["ticket", "run", *FULL, "--out", "done", "--quiet"]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def ticket(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in a folder with data and an experiment; gives status, stdout, stderr."""
    capsys.readouterr()
    for file in finished.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["ticket", *argv])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def files(folder: Path) -> dict[str, str]:
    """All that an experiment holds. Of results all but the time they took; of tensors what is in the file, as safetensors
    writes the entries of its metadata in any order. Leftovers of a kill begin with a dot."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            text = checkpoint.state_hash(load_file(path)) + json.dumps(checkpoint.read_metadata(path))
        else:
            plain = json.loads(path.read_text())
            plain.pop("seconds", None)
            text = json.dumps(plain)
        found[str(path.relative_to(folder))] = text
    return found


# ------------------------------------------------------------------------------------------------------- experiments


def test_run_and_show(ticket) -> None:
    found = Lottery.load("done")
    assert len(found.trainings) == 2 * (3 + 3 * 2)
    assert found.settings["rewind"] == 8 and found.settings["seeds"] == [0, 1]
    status, out, _ = ticket("show", "done", "--plots", "pictures")
    assert status == 0 and out.startswith("| level | P_m % | ticket % |") and "oneshot" in out
    assert {file.name for file in Path("pictures").iterdir()} == {"levels.png", "layers.png"}
    status, out, _ = ticket("show", "done", "--json")
    result = json.loads(out)
    assert result["command"] == "ticket" and result["settings"]["iterations"] == 40 and len(result["trainings"]) == 18


def test_the_same_command_does_nothing_and_more_levels_are_added(ticket) -> None:
    argv = ["run", *SMALL, "--levels", "1", "--out", "here", "--quiet", "--json"]
    status, first, _ = ticket(*argv)
    before = {p: p.stat().st_mtime_ns for p in Path("here").rglob("*.*") if p.name != "settings.json"}
    status, second, _ = ticket(*argv)
    after = {p: p.stat().st_mtime_ns for p in Path("here").rglob("*.*") if p.name != "settings.json"}
    assert status == 0 and json.loads(first) == json.loads(second) and before == after
    part = json.loads(first)["inputs"]
    assert [p["samples"] for p in part] == [100, 40, 90] and all(len(p["hash"]) == 64 for p in part)
    assert ticket("run", *SMALL, "--levels", "2", "--seeds", "0,1", "--out", "here", "--quiet")[0] == 0
    assert len(Lottery.load("here").trainings) == 6


def test_unfinished(ticket) -> None:
    assert ticket("run", *SMALL, "--levels", "1", "--out", "part", "--quiet")[0] == 0
    for file in Path("part/seed-0/ticket/level-01").iterdir():
        file.unlink()
    Path("part/seed-0/ticket/level-01").rmdir()
    status, out, _ = ticket("show", "part")
    assert status == 0 and "1 of 2 trainings are done" in out
    assert json.loads(ticket("check", *SMALL, "--levels", "1", "--out", "part", "--json")[1])["there"] == 1


def test_winning_ticket_is_told(ticket) -> None:
    Path("won/seed-0/ticket").mkdir(parents=True)
    Path("won/settings.json").write_text(
        json.dumps({"seeds": [0], "levels": 2, "controls": [], "control_levels": [], "rewind": 0})
    )
    base = json.loads(Path("done/seed-0/ticket/level-00/result.json").read_text())
    for level, (density, validation, test, early) in enumerate(
        ((1, 90, 80, 30), (0.5, 91, 82, 20), (0.25, 89, 85, 10))
    ):
        place = Path(f"won/seed-0/ticket/level-{level:02d}")
        place.mkdir()
        told = {"level": level, "density": density, "end_validation": validation, "end_test": test, "early": early}
        (place / "result.json").write_text(json.dumps({**base, **told}))
    won = json.loads(ticket("show", "won", "--json")[1])["winning"]  # by validation, not by the test data
    assert won == {"level": 1, "density": 0.5, "test": 82, "dense_test": 80, "early": 20, "dense_early": 30}
    assert (
        "winning ticket: level 1, 50.00 % of the weights: 82.00 % on the test data, dense 80.00 %"
        in ticket("show", "won")[1]
    )


def test_any_network_with_batch_norm_and_dropout(ticket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    argv = [
        "--factory",
        "test_cli_ticket:net",
        "--factory-args",
        '{"drop": 0.3}',
        "--data",
        "digits",
        "--iterations",
        "12",
    ]
    argv += [
        "--levels",
        "1",
        "--optimizer",
        "sgd",
        "--warmup",
        "4",
        "--milestones",
        "6,9",
        "--ignore",
        r"^5\.",
        "--quiet",
    ]
    found = json.loads(ticket("check", *argv, "--json")[1])
    assert found["trainer"] == "torch" and "no nn.Sequential of linear layers" in found["why"]
    assert found["weights"] == 36 and found["options"]["lr"] == 0.1 and found["options"]["momentum"] == 0.9
    assert ticket("run", *argv, "--out", "conv")[0] == 0
    settings = Lottery.load("conv").settings
    assert list(settings["rates"]) == ["0.weight"] and settings["optimizer"]["name"] == "SGD"
    assert ticket("lines", "conv", "--points", "3", "--recalibrate", "--quiet")[0] == 0


# ------------------------------------------------------------------------------------------------------------- looks


def test_lines_need_the_folder_alone(ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    argv = [
        "lines",
        "../done",
        "--level",
        "1,2",
        "--kinds",
        "ticket,reinit",
        "--seeds",
        "1",
        "--points",
        "5",
        "--quiet",
    ]
    status, out, err = ticket(*argv, "--json", "--plots", "pictures")
    assert status == 0, err
    lines = json.loads(out)["lines"]
    assert [(line["kind"], line["level"], line["seed"]) for line in lines] == [
        ("ticket", 1, 1), ("ticket", 2, 1), ("reinit", 1, 1), ("reinit", 2, 1),
    ]  # fmt: skip
    assert all(len(line["barrier"]["scores"]) == 5 and line["stable"] in (True, False) for line in lines)
    assert Path("pictures/lines.png").stat().st_size > 1000
    status, out, _ = ticket("lines", "../done", "--points", "3", "--quiet", "--seeds", "0")
    assert out.count("| ticket |") == 2 and "| ticket | 0 | 100.00 | 0 |" in out


def test_overlap(ticket) -> None:
    status, out, _ = ticket("overlap", "done", "--kinds", "ticket,random", "--json", "--plots", "pictures")
    rows = {(r["kind"], r["level"]): r for r in json.loads(out)["overlap"]}
    assert status == 0 and list(rows) == [("ticket", 0), ("ticket", 1), ("ticket", 2), ("random", 1), ("random", 2)]
    assert rows["ticket", 0]["overlap"] == rows["ticket", 0]["chance"] == 1
    found = Lottery.load("done")
    for level in (1, 2):
        one, two = found.masks(level, seed=0), found.masks(level, seed=1)
        assert rows["ticket", level]["overlap"] == one.overlap(two)
        assert abs(rows["random", level]["overlap"] - rows["random", level]["chance"]) < 0.15
    assert len(list(Path("pictures").iterdir())) == 3
    assert "| ticket | 2 |" in ticket("overlap", "done", "--level", "2")[1]


@pytest.mark.parametrize("kind", ["ticket", "reinit", "random", "oneshot"])
def test_export(ticket, kind: str) -> None:
    found = Lottery.load("done")
    argv = ["export", "done", "--level", "2", "--kinds", kind, "--seeds", "1", "--out"]
    status, out, _ = ticket(*argv, "end.safetensors")
    assert status == 0 and f"{kind} of level 2, seed 1, at iteration 40" in out
    masks = Masks.load("end.masks.safetensors")
    assert masks == found.masks(2, seed=1, kind=kind)
    end, wanted = load_file("end.safetensors"), found.state(2, seed=1, kind=kind)
    assert end.keys() == wanted.keys() and all(torch.equal(end[name], wanted[name]) for name in wanted)
    assert Masks.from_zeros({n: end[n] for n in masks}).within(masks)
    status, out, _ = ticket(*argv, "start.safetensors", "--start")
    first = 0 if kind == "reinit" else 8
    assert status == 0 and f"at iteration {first}" in out
    start, kept = load_file("start.safetensors"), found.start(seed=1)
    facts = checkpoint.read_metadata("start.safetensors")
    assert facts["iteration"] == first and facts["level"] == 2 and facts["masks"] == "start.masks.safetensors"
    same = [torch.equal(start[n], kept[n] * alive) for n, alive in masks.dense().items()]
    assert all(same) if kind != "reinit" else not any(same)
    assert all(bool((start[n][~alive] == 0).all()) for n, alive in masks.dense().items())


# ------------------------------------------------------------------------------------------------------------- options


def checked(ticket, *argv: str) -> dict:
    status, out, err = ticket("check", *argv, "--json")
    assert status == 0, err
    return json.loads(out)


def test_presets_fill_what_is_not_given(ticket) -> None:
    base = ["--network", "lenet-300-100", "--data", "digits"]
    found = checked(ticket, *base)
    preset = PRESETS["lenet-300-100"]
    for name in ("iterations", "batch_size", "lr", "optimizer", "warmup"):
        assert found["options"][name] == getattr(preset, name)
    assert found["rates"] == {"fc1.weight": 0.2, "fc2.weight": 0.2, "out.weight": 0.1}
    assert found["samples"] == {"train": 700, "validation": 300, "test": 797} and found["weights"] == 50_200
    assert found["trainer"] == "mlp" and found["trainings"] == 21
    found = checked(ticket, *base, "--rate", "0.4", "--output-factor", "0", "--levels", "1", "--iterations", "7")
    assert found["rates"] == {"fc1.weight": 0.4, "fc2.weight": 0.4} and found["options"]["iterations"] == 7
    found = checked(
        ticket, *base, "--optimizer", "sgd", "--rates", '{"fc.*": 0.5}', "--ignore", "fc2", "--scope", "global"
    )
    assert found["options"]["lr"] == 0.1 and found["rates"] == {"fc1.weight": 0.5} and found["scope"] == "global"
    assert list(checked(ticket, *base, "--ignore", "out")["rates"]) == ["fc1.weight", "fc2.weight"]
    found = checked(ticket, "--network", "resnet-20-warmup", "--data", "digits", "--iterations", "90", "--levels", "1")
    assert found["options"]["warmup"] == 20_000 and "goes beyond the 90 iterations" in found["notes"][0]


def test_density_is_that_of_the_last_level(ticket) -> None:
    for base in (["--network", "lenet-300-100", "--data", "digits"], SMALL):
        found = checked(ticket, *base, "--density", "0.05", "--levels", "7")
        assert set(found["rates"].values()) == {rate_for(0.05, 7)}
        assert found["densities"][-1] == pytest.approx(0.05) and len(found["densities"]) == 8


def test_check_writes_nothing(ticket) -> None:
    before = sorted(p.name for p in Path().iterdir())
    for argv in (["check", *FULL, "--out", "new"], ["run", *FULL, "--out", "new", "--dry-run"]):
        status, out, _ = ticket(*argv)
        assert status == 0 and "would run 18 trainings, of which 0 are there" in out and "| 2 | " in out
        assert "100 train, 40 validation, 90 test samples of [6], 3 classes" in out
    assert sorted(p.name for p in Path().iterdir()) == before


def test_check_tells_the_ladder_that_is_run(ticket) -> None:
    found = checked(ticket, *FULL)
    for t in Lottery.load("done").trainings:
        assert t.density == pytest.approx(found["densities"][t.level], abs=0.01) and t.trainer == found["trainer"]
    written = sum(p.stat().st_size for p in Path("done").rglob("*.safetensors"))
    assert found["write_bytes"] < written  # and headers


def test_config(ticket) -> None:
    Path("run.yml").write_text(
        "factory: zipfast.zoo:mlp\nfactory-args: {in_features: 6, hidden: [5], out_features: 3}\nseeds: [3, 4]\n"
        "data: train.npz\nvalidation-size: 20\ntest: test.npz\niterations: 5\nlevels: 1\ncontrols: [random]\n"
    )
    assert ticket("run", "--config", "run.yml", "--out", "yml", "--levels", "2", "--quiet")[0] == 0
    found = Lottery.load("yml")
    assert found.settings["seeds"] == [3, 4] and found.settings["levels"] == 2 and len(found.trainings) == 10


def test_lists() -> None:
    assert integers("0,3") == integers([0, 3]) == [0, 3] and integers(2) == [2] and names("a,b") == ["a", "b"]
    for call, bad in ((integers, "1,x"), (integers, [0.5]), (names, 3), (names, "a,,b")):
        with pytest.raises(Exception, match="with commas between them, got"):
            call(bad)


# ---------------------------------------------------------------------------------------------------------------- kill


def test_killed_runs_end_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 within a level, again between levels, and then to the end: every file as without."""
    monkeypatch.chdir(tmp_path)
    argv = [
        "ticket",
        "run",
        "--network",
        "lenet-300-100",
        "--data",
        "digits",
        "--trainer",
        "torch",
        "--iterations",
        "120",
    ]
    argv += [
        "--every",
        "5",
        "--levels",
        "3",
        "--rewind",
        "12",
        "--controls",
        "random",
        "--control-levels",
        "3",
        "--quiet",
    ]
    assert cli.main([*argv, "--out", "whole"]) == 0
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "zipfast", *argv, "--out", "killed", "--checkpoint-seconds", "0"]
    tickets = Path("killed/seed-0/ticket")
    for seen in (tickets / "level-01.partial.safetensors", tickets / "level-02" / "result.json"):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 100
        while not seen.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        assert seen.exists()
    # as a kill in the middle of writing leaves them
    (tickets / ".level-03.partial.safetensors.abc.tmp").write_bytes(b"half")
    (tickets / ".level-03.abc.tmp").mkdir()
    assert cli.main([*argv, "--out", "killed"]) == 0
    whole, killed = files(Path("whole")), files(Path("killed"))
    assert whole.keys() == killed.keys() and "seed-0/random/level-03/model.safetensors" in whole
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert not list(tickets.glob(".level*"))


def test_killed_before_the_settings_were_written(ticket) -> None:
    Path("new").mkdir()
    Path("new/.settings.json.abc.tmp").write_text("{")
    assert ticket("run", *SMALL, "--levels", "0", "--out", "new", "--quiet")[0] == 0
    Path("new/command.json").unlink()  # as a kill just after the settings
    assert ticket("run", *SMALL, "--levels", "0", "--out", "new", "--quiet")[0] == 0
    assert ticket("lines", "new", "--points", "3", "--quiet")[0] == 0


# -------------------------------------------------------------------------------------------------------------- errors


def without(argv: list[str], *options: str) -> list[str]:
    found = list(argv)
    for option in options:
        del found[found.index(option) : found.index(option) + 2]
    return found


RUN = ["run", *SMALL, "--levels", "1", "--out", "new"]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["run", "--data", "digits", "--out", "new"], "there must be --network PRESET or --factory MODULE:NAME, got none"),
        ([*RUN, "--network", "conv-2"], "or --factory MODULE:NAME, got both"),
        (["run", "--network", "lenet", "--data", "digits", "--out", "new"], "'network' must be one of lenet-300-100, "),
        (without(RUN, "--out"), "'out' must name the experiment's folder, got none; use --out FOLDER"),
        (["run", "folder", *SMALL], "there must be no FOLDER with run: name it by --out, got 1"),
        (["show"], "there must be one FOLDER with show, got 0"),
        (["show", "nothing"], "no experiment at nothing; it must hold settings.json"),
        (without(RUN, "--data"), "'data' must name what to train on, got none"),
        (without(RUN, "--test"), "'test' must name labelled data to report accuracies on, got none"),
        (without(RUN, "--validation-size"), "there must be --validation SPEC or --validation-size N, got none"),
        ([*RUN, "--validation-size", "140"], "'validation_size' must be in [1, 140), got 140"),
        (without(RUN, "--iterations"), "'iterations' must be given where there is no preset"),
        ([*RUN, "--iterations", "0"], "'iterations' must be at least 1, got 0"),
        ([*RUN, "--data", "digits"], "'validation_size' must be left out with the digits"),
        ([*RUN, "--data", "nothing.npz"], "no file or folder at nothing.npz"),
        ([*RUN, "--data", "bare.npz"], "bare.npz must hold one input and labels, got no labels"),
        ([*RUN, "--test", "broken.npz"], "test data must be finite, got NaN or infinity in sample 3"),
        ([*RUN, "--test", "narrow.npz"], "test data must be [6] as those to train on, got [4]"),
        ([*RUN, "--test", "more.npz"], "the network must give [N, 8] logits or more, got [2, 3]"),
        ([*RUN, "--factory-args", '{"in_features": 5}'], "the network must take data of shape [6], got: "),
        ([*RUN, "--factory-args", "[{}]"], "'factory_args' must be one JSON object, with --factory"),
        ([*RUN, "--rate", "1.5"], "must be in [0, 1], got 1.5"),
        ([*RUN, "--rates", '{"nothing.*": 0.2}'], "'rates' must match a weight each, got 'nothing.*'"),
        ([*RUN, "--rates", '{"1.*": "x"}'], "'rates' must be one JSON object of numbers"),
        ([*RUN, "--rate", "0.1", "--density", "0.5"], "only one of --rate, --rates and --density can be given"),
        ([*RUN, "--density", "0"], "density must be in (0, 1] and rounds at least 1, got 0.0 and 1"),
        ([*RUN, "--density", "0.5", "--output-factor", "1"], "'output_factor' must come with --rate"),
        ([*RUN, "--only", "nothing"], "'only' must match a layer (1.weight, 3.weight), got 'nothing'"),
        ([*RUN, "--only", "1", "--ignore", "weight"], "there must be a weight to prune, got none"),
        ([*RUN, "--rewind", "40"], "'rewind' must be in [0, 40), got 40"),
        ([*RUN, "--controls", "luck"], "'controls' must be of reinit, random, oneshot, got 'luck'"),
        ([*RUN, "--control-levels", "2"], "'control_levels' must be in [1, 1], got [2]"),
        ([*RUN, "--every", "0"], "'every' 1 or more, got 'grad', 0"),
        ([*RUN, "--mode", "forward", "--trainer", "mlp"], "trainer 'mlp' cannot be used: mode 'forward' lets dead"),
        ([*RUN, "--momentum", "0.9"], "'momentum' must be left out for adam, got 0.9"),
        ([*RUN, "--milestones", "-1"], "'warmup' and 'milestones' must be 0 or more, got 0 and [-1]"),
        ([*RUN, "--lr", "-1"], "Invalid learning rate: -1.0"),
        ([*RUN, "--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        ([*RUN, "--out", "no/where"], "cannot write no/where"),
        ([*RUN, "--out", "train.npz"], "cannot write train.npz: it is a file; give a folder"),
        ([*RUN, "--out", "."], ". must be empty or an experiment's folder, got other files"),
        (["run", *FULL, "--out", "done", "--lr", "0.02"], "got another experiment (optimizer was "),
        (["run", *FULL, "--out", "done", "--batch-size", "30"], "(train was "),
        (["run", *FULL, "--out", "done", "--factory", "zipfast.zoo:resnet"], "unexpected keyword argument 'in_features'"),
        (["check", *FULL, "--out", "done", "--lr", "0.02"], "must be that of done, got another one (optimizer was "),
        (["check", *SMALL, "--controls", "luck"], "'controls' must be of reinit, random, oneshot, got 'luck'"),
        (["check", *SMALL, "--levels", "-1"], "'levels' must be 0 or more and there must be a seed, got -1 and 1"),
        ([*RUN, "--controls", "reinit", "--factory", "zipfast.zoo:mlp@m.safetensors"], "got one with a checkpoint"),
        (["lines", "done", "--points", "4"], "'points' must be odd and at least 3, got 4"),
        (["lines", "done", "--level", "7"], "no level 7 of ticket, seed 0, in done"),
        (["lines", "done", "--kinds", "luck"], "'kinds' must be of ticket, reinit, random, oneshot, got 'luck'"),
        (["lines", "done", "--test", "train.npz", "--points", "3"], "must be that of done, got another one (test was "),
        (["overlap", "done", "--seeds", "0"], "overlap needs two seeds or more, got 1; run with --seeds 0,1"),
        (["overlap", "done", "--seeds", "0,5"], "'seeds' must be of those in done ([0, 1]), got 5"),
        (["export", "done", "--out", "x.safetensors"], "export takes one level of one kind, got none or several"),
        (["export", "done", "--level", "1"], "'out' must name a .safetensors file, got none; use --out FILE"),
        (["export", "done", "--level", "1", "--out", "x.pt"], "'path' must end in .safetensors, got 'x.pt'"),
        (["export", "done", "--level", "9", "--out", "x.safetensors"], "no level 9 of ticket, seed 0, in done"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(ticket, argv: list[str], match: str) -> None:
    x, y = torch.randn(140, 6), torch.arange(140) % 3
    checkpoint.save("m.safetensors", mlp(**json.loads(MLP[3])).state_dict())
    np.savez("bare.npz", x=x)
    np.savez("more.npz", x=x[:8], y=np.arange(8))
    np.savez("narrow.npz", x=x[:, :4], y=y)
    x[3, 1] = torch.nan
    np.savez("broken.npz", x=x, y=y)
    before = sorted(p.name for p in Path().iterdir())
    status, out, err = ticket(*argv, "--quiet")
    assert status == 1 and not out and err.startswith("zipfast ticket: ") and err.count("\n") == 1
    assert match in err, err
    assert sorted(p.name for p in Path().iterdir()) == before


def test_damaged_files_are_named(ticket) -> None:
    assert ticket("run", *SMALL, "--levels", "1", "--out", "here", "--quiet")[0] == 0
    again = ["run", *SMALL, "--levels", "2", "--out", "here", "--quiet"]
    level = Path("here/seed-0/ticket/level-01")
    for path, argv, match in (
        (level / "model.safetensors", again, "level-01/model.safetensors cannot be read as plain tensors"),
        (level / "masks.safetensors", again, "level-01/masks.safetensors cannot be read as plain tensors"),
        (level / "result.json", ["show", "here"], "result.json must be the result of a training, got a damaged file"),
        (
            Path("here/settings.json"),
            ["show", "here"],
            "settings.json must be the settings of an experiment, got a damaged",
        ),
        (Path("here/settings.json"), again, "settings.json must be the settings of an experiment, got a damaged"),
        (
            Path("here/command.json"),
            ["lines", "here"],
            "command.json must hold the options of a run, got a damaged file",
        ),
        (Path("here/command.json"), again, "command.json must hold the options of a run, got a damaged file"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        status, _, err = ticket(*argv)
        assert status == 1 and match in err and err.count("\n") == 1, err
        path.write_bytes(whole)


def test_truncated_checkpoint_within_a_level(ticket) -> None:
    argv = ["run", *SMALL, "--levels", "0", "--out", "here", "--quiet"]
    Path("here/seed-0/ticket").mkdir(parents=True)
    (Path("here") / "seed-0" / "ticket" / "level-00.partial.safetensors").write_bytes(b"\0" * 9)
    assert ticket(*argv)[0] == 1  # no experiment's folder yet
    assert ticket(*argv[:-2], "other", "--quiet")[0] == 0
    Path("here/settings.json").write_bytes(Path("other/settings.json").read_bytes())
    status, _, err = ticket(*argv)
    assert status == 1 and "level-00.partial.safetensors cannot be read as plain tensors" in err


def test_another_factory_of_the_same_shapes_is_refused(ticket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    argv = [
        "run",
        "--factory",
        "test_cli_ticket:net",
        "--data",
        "digits",
        "--iterations",
        "2",
        "--levels",
        "0",
        "--quiet",
    ]
    assert ticket(*argv, "--out", "a")[0] == 0
    status, _, err = ticket(*argv, "--out", "a", "--factory-args", '{"drop": 0.5}')
    assert status == 1 and 'a is of another factory_args (was null, is {"drop": 0.5}); choose another --out' in err


def test_an_experiment_of_the_library_has_no_command(ticket) -> None:
    assert ticket("run", *SMALL, "--levels", "0", "--out", "lib", "--quiet")[0] == 0
    Path("lib/command.json").unlink()
    assert ticket("show", "lib")[0] == 0
    status, _, err = ticket("lines", "lib")
    assert status == 1 and "no lib/command.json; only experiments of `zipfast ticket run` can be trained again" in err
