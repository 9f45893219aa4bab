# SPDX-License-Identifier: Apache-2.0
"""``zipfast rank`` as a user meets it: models and data as texts, table and files, a kill, workers, bad usage."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import zipfast
from zipfast import checkpoint, cli, zoo
from zipfast.commands.rank import read_truth
from zipfast.ranking.rank import METRICS, rank

ROOT = Path(zipfast.__file__).parents[1]
MLP = {"in_features": 6, "hidden": [8, 5], "out_features": 4}
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(150, 6, generator=DRAW)
Y = (X[:, :3] + 0.3 * torch.randn(150, 3, generator=DRAW)).argmax(1)
VIEWS = {"all": X, "some": X[:, :2], "noise": torch.randn(150, 4, generator=DRAW)}
FILES = ["all.npz", "some=some.npy", "noise.safetensors", "--labels", "y.npy", "--bootstrap", "10"]
NETS = ["a.safetensors", "b.safetensors", "--data", "flat.npz", "--bootstrap", "10"]
TRUTH = {"all.npz": 90.0, "some": 80.0, "noise.safetensors": 40.0}
BERT = {"vocab_size": 8, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
MODULE = """
import os, time, torch
from pathlib import Path
from zipfast import zoo

def net(seed, hidden=8):
    if os.environ.get("HANG") == str(seed):
        Path("hanging").touch()
        time.sleep(600)
    torch.manual_seed(seed)
    return zoo.mlp(6, [hidden], 4)

def one(): return net(1)
def two(): return net(2, 16)
def three(): return net(3)
def sized(hidden=8): return net(0, hidden)

def data():
    x = torch.randn(150, 6, generator=torch.Generator().manual_seed(5))
    return list(zip(x.split(32), (x[:, 0] > 0).long().split(32)))
"""


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


Rank = Callable[..., Done]


@pytest.fixture
def rank_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rank:
    """The command in a folder with models and data."""
    monkeypatch.chdir(tmp_path)
    np.savez("flat.npz", x=X.numpy(), y=Y.numpy())
    np.savez("all.npz", features=X.numpy(), labels=Y.numpy())
    np.save("some.npy", VIEWS["some"].numpy())
    np.save("y.npy", Y.numpy())
    checkpoint.save("noise.safetensors", {"features": VIEWS["noise"], "labels": Y})
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        made = {"factory": "zipfast.zoo:mlp", "factory_args": MLP}
        checkpoint.save(f"{name}.safetensors", zoo.mlp(**MLP).state_dict(), made)
    Path("rank_nets_of_a_test.py").write_text(MODULE)
    sys.modules.pop("rank_nets_of_a_test", None)

    def call(*argv: str) -> Done:
        capsys.readouterr()
        status = cli.main(["rank", *argv])
        return Done(status, *capsys.readouterr())

    return call


def start(argv: list[str], *launcher: str, **env: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "zipfast", "rank", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(path: Path | str) -> list[dict[str, str]]:
    """A ranking.csv without how long it took."""
    return [{**row, "seconds": ""} for row in csv.DictReader(Path(path).read_text().splitlines())]


def scores(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["name"]: row["scores"] for row in result["ranking"]["rows"]}


# ------------------------------------------------------------------------------------------- the table


def test_saved_features(rank_: Rank) -> None:
    done = rank_(*FILES, "--metrics", "logme,hscore,knn")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split()[:4] == ["model", "logme", "hscore", "knn"]
    assert [line.split()[1] for line in lines if line[:3].strip()] == ["all.npz", "some", "noise.safetensors"]
    assert f"{zipfast.logme(X, Y):.4f}" in lines[1]


def test_json_is_what_python_says(rank_: Rank) -> None:
    flags = ["--metrics", "hscore,logme", "--shards", "4", "--seed", "3", "--confidence", "0.8", "--mode", "corrected"]
    found = rank_(*FILES, *flags, "--classes", "5", "--ignore-index", "1", "--json").json
    options: Any = {"metrics": ["hscore", "logme"], "shards": 4, "seed": 3, "confidence": 0.8, "mode": "corrected"}
    options |= {"classes": 5, "ignore_index": 1, "bootstrap": 10}
    want = rank(["all.npz", "some=some.npy", "noise.safetensors"], labels=Y, **options).to_dict()
    for row, wanted in zip(found["ranking"]["rows"], json.loads(json.dumps(want))["rows"]):
        assert {**row, "seconds": 0} == {**wanted, "seconds": 0}
    assert found["command"] == "rank" and found["workers"] == 1 and found["options"]["labels"] == "y.npy"


def test_checkpoints_with_every_metric(rank_: Rank) -> None:
    done = rank_(*NETS, "--metrics", ",".join(METRICS), "--json", "--batch-size", "64")
    assert done.status == 0, done.err
    models = {name: zipfast.sources.load_model(name) for name in NETS[:2]}
    want = rank(models, [(X, Y)], metrics=METRICS, bootstrap=0)
    for row in want.rows:
        assert scores(done.json)[row.name] == pytest.approx(row.scores, rel=1e-5)
    assert {row["parameters"] for row in done.json["ranking"]["rows"]} == {125}


def test_every_form_of_a_model(rank_: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.BertConfig(**BERT)
    tokens, labels = torch.arange(240).reshape(60, 4) % 7, torch.arange(60) % 3
    model = hf.BertForSequenceClassification(config).eval()
    model.save_pretrained("bert")
    np.savez("text.npz", input_ids=tokens.numpy(), labels=labels.numpy())
    found = rank_("bert", "mine=bert/", "--data", "text.npz", "--json", "--metrics", "logme,leep").json
    with torch.no_grad():
        want = zipfast.logme(model.bert(tokens).pooler_output, labels)
    assert [s["logme"] for s in scores(found).values()] == pytest.approx([want] * 2, rel=1e-5)
    assert list(scores(found)) == ["bert", "mine"]

    asked: list[Any] = []
    timm = SimpleNamespace(create_model=lambda *args, **options: asked.append((args, options)) or zoo.mlp(**MLP))
    monkeypatch.setitem(sys.modules, "timm", timm)
    torch.save(zoo.mlp(**MLP).state_dict(), "bare.pt")
    forms = ["timm:tiny_net", "bare.pt", "zipfast.zoo:mlp@bare.pt", "a.safetensors", "all.npz"]
    made = ["--factory", "zipfast.zoo:mlp", "--factory-args", json.dumps(MLP)]
    done = rank_(*forms, *made, "--data", "flat.npz", "--bootstrap", "0", "--json")
    assert all(row["error"] is None for row in done.json["ranking"]["rows"]), done.out
    assert asked == [(("tiny_net",), {"pretrained": True})]
    assert scores(done.json)["bare.pt"] == scores(done.json)["zipfast.zoo:mlp@bare.pt"]


def test_layers_and_batches(rank_: Rank) -> None:
    found = rank_(*NETS, "--layers", "2", "4", "--batches", "2", "--json").json
    assert sorted(scores(found)) == ["a.safetensors:2", "a.safetensors:4", "b.safetensors:2", "b.safetensors:4"]
    assert {row["samples"] for row in found["ranking"]["rows"]} == {64}


# ------------------------------------------------------------------------------------------- accuracies


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "model,accuracy\n" + "".join(f"{k}, {v}\n" for k, v in TRUTH.items())),
        ("b.csv", "".join(f"{k},{v}\n" for k, v in TRUTH.items()) + "\nunknown,3\n"),
        ("c.json", json.dumps(TRUTH)),
        ("d.yaml", "".join(f"{k}: {v}\n" for k, v in TRUTH.items())),
    ],
)
def test_truth(rank_: Rank, name: str, text: str) -> None:
    Path(name).write_text(text)
    assert read_truth(name).items() >= TRUTH.items()
    done = rank_(*FILES, "--truth", name)
    assert done.status == 0 and f"weighted Kendall tau with {name}, 95% over the models" in done.out
    assert done.out.splitlines()[-2].split()[:2] == ["logme", "1.000"]
    found = rank_(*FILES, "--truth", name, "--json").json["agreement"]
    assert found["logme"]["tau"] == 1 and found["logme"]["models"] == 3 and "features D" in found


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", ""),
        ("b.csv", "all.npz\nsome\n"),
        ("c.csv", "all.npz,90\nsome,good\n"),
        ("d.json", "[1, 2]"),
        ("e.json", "{"),
        ("f.json", '{"some": null}'),
        ("g.yaml", "- 1"),
        ("h.yaml", "a: [1"),
        ("i.yaml", "all.npz:\n"),
        ("j.json", "{}"),
    ],
)
def test_bad_truth_is_refused_before_the_work(rank_: Rank, name: str, text: str) -> None:
    Path(name).write_text(text)
    done = rank_(*FILES, "--truth", name, "--out", "run")
    assert (done.status, done.out) == (1, "") and not Path("run").exists()
    assert done.err.startswith(f"zipfast rank: truth: {name} must hold names and accuracies, got ")
    assert done.err.count("\n") == 1


def test_truth_of_other_models_does_not_cost_the_table(rank_: Rank) -> None:
    Path("t.csv").write_text("x,1\ny,2\n")
    done = rank_(*FILES, "--truth", "t.csv", "--out", "run", "--plots", "pictures")
    assert done.status == 1 and "all.npz" in done.out and len(rows("run/ranking.csv")) == 3
    assert done.err.startswith("zipfast rank: agreement: 'truth' must name two or more of the scored models (all.npz")
    assert Path("pictures/ranking.png").is_file()


# ------------------------------------------------------------------------------------------- files


def test_out_and_going_on(rank_: Rank) -> None:
    broken = ["nowhere.npz", *NETS]
    first = rank_(*broken, "--out", "run")
    assert first.status == 0 and sorted(os.listdir("run")) == ["journal.jsonl", "ranking.csv", "ranking.json"]
    table = rows("run/ranking.csv")
    assert list(table[0])[:5] == ["model", "logme", "low", "high", "first"] and list(table[0])[-1] == "error"
    assert [row["error"] != "" for row in table] == [False, False, True]
    assert float(table[0]["low"]) < float(table[0]["logme"]) < float(table[0]["high"])
    assert float(table[0]["first"]) + float(table[1]["first"]) == pytest.approx(1)
    saved = json.loads(Path("run/ranking.json").read_text())
    assert scores(saved)[table[0]["model"]]["logme"] == float(table[0]["logme"])
    assert rank_(*broken, "--out", "run").out == first.out  # to the time it took
    assert len(Path("run/journal.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "flags, option",
    [
        (["--seed", "1"], "seed"),
        (["--data", "other.npz"], "data"),
        (["--batch-size", "8"], "data"),
        (["--factory-args", '{"hidden": 9}'], "data"),
        (["--labels", "y.npy"], "data"),
    ],
)
def test_a_folder_of_other_options(rank_: Rank, flags: list[str], option: str) -> None:
    np.savez("other.npz", x=X.numpy(), y=Y.numpy())
    argv = ["rank_nets_of_a_test:sized", "--data", "flat.npz", "--bootstrap", "0", "--out", "run"]
    assert rank_(*argv).status == 0
    done = rank_(*argv, *flags)
    assert (done.status, done.out) == (1, "")
    sentence = f"zipfast rank: 'out' must be a folder for these options, got one with another '{option}' ("
    assert done.err.startswith(sentence) and done.err.count("\n") == 1


def test_plots_and_saved_features(rank_: Rank) -> None:
    pytest.importorskip("matplotlib")
    Path("t.json").write_text(json.dumps({"a.safetensors": 1, "b.safetensors": 2}))
    assert rank_(*NETS, "--plots", "deep/pictures", "--save-features", "kept", "--truth", "t.json").status == 0
    assert Path("deep/pictures/ranking.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir("kept")) == ["a.safetensors.safetensors", "b.safetensors.safetensors"]
    again = rank_("kept/a.safetensors.safetensors", "--plots", ".", "--json").json
    want = scores(rank_(*NETS, "--json").json)["a.safetensors"]["logme"]
    assert next(iter(scores(again).values()))["logme"] == pytest.approx(want, rel=1e-9)
    assert Path("ranking.png").is_file()


def test_config(rank_: Rank) -> None:
    Path("c.yaml").write_text(
        "models: [all.npz, some=some.npy]\nlabels: y.npy\nmetrics: [knn, logme]\nbootstrap: 5\nconfidence: 0.5\n"
    )
    found = rank_("--config", "c.yaml", "--json").json
    assert list(scores(found)) == ["all.npz", "some"] and found["ranking"]["metric"] == "knn"
    found = rank_("noise.safetensors", "--config", "c.yaml", "--metrics", "lfc", "--json").json
    assert list(scores(found)) == ["noise.safetensors"] and found["ranking"]["options"]["bootstrap"] == 5
    assert list(scores(found)["noise.safetensors"]) == ["lfc"]
    Path("c.yaml").write_text("metric: logme\n")
    done = rank_("--config", "c.yaml")
    assert done.status == 1 and "got 'metric'; did you mean 'metrics'?" in done.err


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "'models' must name at least one candidate, got none; see zipfast rank --help"),
        (["all.npz", *FILES], "'models' must have names of their own, got 'all.npz' twice; use NAME=SPEC"),
        ([*FILES, "--metrics", "logme,best"], "'metrics' must be of logme, .*, each once, got logme, best"),
        ([*FILES, "--metrics", ""], "'metrics' must be of logme, .*, each once, got none"),
        (
            [*FILES, "--task", "regression", "--metrics", "lfc"],
            "'metrics' must be logme for task='regression', got lfc",
        ),
        ([*FILES, "--bootstrap", "-1"], "'bootstrap' must be at least 0.*"),
        ([*FILES, "--labels", "none.npy"], "no labels at none.npy"),
        ([*FILES, "--labels", "c.yaml"], "c.yaml must be a .npy of numbers, got .*"),
        ([*FILES, "--truth", "none.csv"], "truth: no file at none.csv"),
        ([*FILES, "--device", "tpu9"], "device: must be cpu or cuda, got 'tpu9'"),
        ([*FILES, "--out", "no/such"], "cannot write no/such: .*; choose a folder that exists and is writable"),
        ([*NETS, "--data", "none.npz"], "load_data: no file or folder at none.npz"),
        ([*NETS, "--batch-size", "0"], "load_data: 'batch_size' must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(rank_: Rank, argv: list[str], sentence: str) -> None:
    Path("c.yaml").write_text("no: array\n")
    done = rank_(*argv)
    assert (done.status, done.out) == (1, "")
    assert re.fullmatch(f"zipfast rank: {sentence}\n", done.err), done.err


def test_nothing_scored_is_status_1(rank_: Rank) -> None:
    Path("t.csv").write_text("x,1\ny,2\n")
    done = rank_("nowhere.npz", "some.npy", "a.safetensors", "--out", "run", "--truth", "t.csv", "--plots", ".")
    assert done.status == 1 and done.err == "" and not Path("ranking.png").exists()
    assert [line.split()[0] for line in done.out.splitlines()[1:]] == ["-"] * 3
    assert "'batches' must be given to score the model 'a.safetensors', got none" in done.out
    assert len(rows("run/ranking.csv")) == 3
    running = start(["some.npy"])
    assert "must hold labels too" in running.communicate(timeout=60)[0] and running.returncode == 1
    one = rank_("nowhere.npz", "all.npz")
    assert one.status == 0 and "no features at nowhere.npz" in one.out


# ------------------------------------------------------------------------------------------- processes


def test_a_killed_run_goes_on(rank_: Rank) -> None:
    """kill -9 while the third model is being made: two are finished, the rerun has the table of an unbroken run."""
    names = [f"{name}=rank_nets_of_a_test:{name}" for name in ("one", "two", "three")]
    argv = [*names, "--data", "rank_nets_of_a_test:data", "--bootstrap", "10", "--out"]
    running = start([*argv, "run"], HANG="3")
    try:
        end = time.monotonic() + 60
        while not Path("hanging").exists():
            assert running.poll() is None and time.monotonic() < end, running.communicate()
            time.sleep(0.01)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL
    assert os.listdir("run") == ["journal.jsonl"]
    lines = Path("run/journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines[1:]] == ["one", "two"]
    assert rank_(*argv, "run").status == 0 and rank_(*argv, "whole").status == 0
    again = Path("run/journal.jsonl").read_text().splitlines()
    assert again[:3] == lines and len(again) == 4
    for got, want in zip(rows("run/ranking.csv"), rows("whole/ranking.csv")):
        assert got["model"] == want["model"] and got["features"] == want["features"]
        for column in ("logme", "low", "high", "first"):  # one thread and two
            assert float(got[column]) == pytest.approx(float(want[column]), abs=1e-9)


def test_two_workers_find_what_one_finds(rank_: Rank) -> None:
    """Models on shares of the data, and saved features that every worker could read whole."""
    argv = [
        "a.safetensors",
        "b.safetensors",
        "all.npz",
        "--data",
        "flat.npz",
        "--metrics",
        "logme,hscore,reg_hscore,lfc",
    ]
    argv += ["--batch-size", "16", "--batches", "10", "--bootstrap", "10", "--json"]
    running = start([*argv, "--out", "run"], "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    two, one = Done(0, out, "").json, rank_(*argv).json
    assert (one["workers"], two["workers"]) == (1, 2) and list(scores(one)) == list(scores(two))
    for name, wanted in scores(one).items():
        assert scores(two)[name] == pytest.approx(wanted, rel=1e-5)
    for row in two["ranking"]["rows"]:
        assert row["samples"] == 150 and row["intervals"]["logme"][0] < row["scores"]["logme"]
    done = rank_(*argv, "--out", "run")
    assert done.status == 1 and "another 'workers' (2, now 1)" in done.err
