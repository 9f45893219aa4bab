# SPDX-License-Identifier: Apache-2.0
"""``zipfast zip`` as a user meets it: what it writes, what it prints, and one sentence for every bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import zipfast
from zipfast import MultiHead, checkpoint, cli, sources, zoo

FACTORY = ["--factory", "zipfast.zoo:resnet", "--factory-args", '{"depth_n": 1, "width": 0.5}']


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two checkpoints of one architecture, one with fewer classes, and labelled data."""
    root = tmp_path_factory.mktemp("zip")
    random = np.random.RandomState(0)
    x = random.randn(96, 1, 12, 12).astype("float32")
    for seed, (name, classes) in enumerate({"a": 10, "b": 10, "c": 4}.items()):
        torch.manual_seed(seed)
        net = zoo.resnet(1, width=0.5, classes=classes).train()
        with torch.no_grad():
            net(torch.tensor(x))
        checkpoint.save(root / f"{name}.safetensors", net.eval().state_dict())
    np.savez(root / "data.npz", x=x, y=random.randint(0, 10, 96))
    np.savez(root / "wide.npz", x=random.randn(8, 3, 12, 12).astype("float32"))
    return root


def command(folder: Path, *more: str, models: tuple[str, ...] = ("a", "b"), data: str = "data.npz") -> list[str]:
    paths = [str(folder / f"{name}.safetensors") for name in models]
    return ["zip", *paths, *FACTORY, "--data", str(folder / data), "--quiet", *more]


def test_a_merged_model_is_written_loaded_and_merged_again(folder, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert cli.main(command(folder, "--out", str(out), "--evaluate", str(folder / "data.npz"), "--json")) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err == ""
    assert result["zipfast"] == zipfast.__version__ and len(result["inputs"][0]["state_hash"]) == 64
    assert 0 <= result["accuracy"][str(folder / "data.npz")] <= 100
    assert result["spaces"]["conv1"]["features"] == 8
    data = list(sources.load_data(str(folder / "data.npz")))
    models = [
        sources.load_model(
            str(folder / f"{n}.safetensors"), factory=FACTORY[1], factory_args={"depth_n": 1, "width": 0.5}
        )
        for n in "ab"
    ]
    want = zipfast.merge(models, (data[0][0][:2],), data).state_dict
    got = sources.load_model(str(out)).state_dict()  # the factory stands in the file
    assert all(torch.equal(got[key], value) for key, value in want.items())
    assert (
        cli.main(
            [
                "zip",
                str(out),
                str(folder / "b.safetensors"),
                *FACTORY,
                "--data",
                str(folder / "data.npz"),
                "--weights",
                "2,1",
                "--quiet",
            ]
        )
        == 0
    )
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_partial_zip_is_a_folder(folder, tmp_path, capsys):
    where = command(
        folder, "--stop", "stages.1", "--out", str(tmp_path / "net"), "--evaluate", f"1={folder / 'data.npz'}"
    )
    assert cli.main(where) == 0
    text = capsys.readouterr().out
    assert "% of the ensemble's" in text and "accuracy on 1=" in text
    assert [tuple(o.shape) for o in MultiHead.load(tmp_path / "net")(torch.randn(3, 1, 12, 12))] == [(3, 10)] * 2


def test_classifiers_of_different_sizes(folder, tmp_path):
    given = command(folder, "--out", str(tmp_path / "net"), models=("a", "c"))
    at = given.index("--factory-args") + 1
    given[at] = '[{"depth_n": 1, "width": 0.5}, {"depth_n": 1, "width": 0.5, "classes": 4}]'
    assert cli.main(given) == 0
    assert [o.shape[1] for o in MultiHead.load(tmp_path / "net")(torch.randn(3, 1, 12, 12))] == [10, 4]


def test_plan_cuts_and_verify(folder, capsys):
    one = ["zip", str(folder / "a.safetensors"), *FACTORY, "--input-shape", "1x12x12"]
    assert cli.main([*one, "--plan-only"]) == 0
    assert "6 mergeable" in capsys.readouterr().out
    assert cli.main([*one, "--cuts", "--json"]) == 0
    nodes = [cut["node"] for cut in json.loads(capsys.readouterr().out)["cuts"]]
    assert "relu_2" in nodes and "relu_1" not in nodes
    assert (
        cli.main(["zip", str(folder / "a.safetensors"), *FACTORY, "--data", str(folder / "data.npz"), "--verify"]) == 0
    )
    assert capsys.readouterr().out.strip().endswith("ok")


def test_yaml_and_flags(folder, tmp_path, capsys):
    config = tmp_path / "zip.yaml"
    config.write_text(
        f"models: [{folder}/a.safetensors, {folder}/b.safetensors]\nfactory: zipfast.zoo:resnet\n"
        f"factory-args: {{depth_n: 1, width: 0.5}}\ndata: {folder}/data.npz\nmethod: average\nquiet: true\n"
    )
    assert cli.main(["zip", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["method"] == "average"
    assert cli.main(["zip", "--config", str(config), "--json", "--method", "zip", "--alpha", "*.conv1=0.5"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert options["method"] == "zip" and options["alpha"] == {"*.conv1": 0.5}


def test_sweep_and_plots(folder, tmp_path, capsys):
    more = ["--sweep", "--alphas", "0.3,1", "--betas", "0,1", "--evaluate", str(folder / "data.npz"), "--plots"]
    assert cli.main(command(folder, *more, str(tmp_path), "--json")) == 0
    points = json.loads(capsys.readouterr().out)["sweep"]
    assert [(p["alpha"], p["beta"]) for p in points] == [(0.3, 0), (0.3, 1), (1, 0), (1, 1)]
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


BAD = {
    "one model": (["--quiet"], ("a",), r"'models' must name two models or more, got 1"),
    "no such cut": (
        ["--stop", "nowhere"],
        ("a", "b"),
        r"'stop' must be a module's path or a graph node, got 'nowhere'",
    ),
    "no cut": (["--stop", "stages.1.0.conv1"], ("a", "b"), r"the nearest valid cuts are 'relu_2'"),
    "another head": (
        ["--out", "m.safetensors"],
        ("a", "c"),
        r"c.safetensors must hold the tensors of zipfast.zoo:resnet",
    ),
    "no such space": (["--skip", "conv9"], ("a", "b"), r"'skip' must name mergeable spaces, got 'conv9'"),
    "alpha": (["--alpha", "3"], ("a", "b"), r"'alpha' must be in \[0, 1\], got 3"),
    "no folder": (["--out", "missing/m.safetensors"], ("a", "b"), r"cannot write missing/m.safetensors"),
    "wrong ending": (["--out", "m.pt", "--stop", "nowhere"], ("a", "b"), r"nowhere"),
    "no data": (["--data", "missing.npz"], ("a", "b"), r"no file or folder at missing.npz"),
    "sweep": (["--sweep"], ("a", "b"), r"'evaluate' must name labelled data for a sweep"),
    "weights": (["--weights", "1"], ("a", "b"), r"'weights' must be one positive number for each of 2 models"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(folder, tmp_path, monkeypatch, capsys, name):
    import re

    more, models, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(folder, *more, models=models)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("zipfast zip: ")
    assert re.search(message, printed.err), printed.err
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert os.listdir(tmp_path) == []


def test_labels_of_another_head(folder, tmp_path, capsys):
    given = command(folder, "--evaluate", f"1={folder / 'data.npz'}", "--out", str(tmp_path / "net"), models=("a", "c"))
    at = given.index("--factory-args") + 1
    given[at] = '[{"depth_n": 1, "width": 0.5}, {"depth_n": 1, "width": 0.5, "classes": 4}]'
    assert cli.main(given) == 1
    assert "labels must be in [0, 4), the classes of head 1" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_data_of_another_shape(folder, capsys):
    assert cli.main(command(folder, data="wide.npz")) == 1
    error = capsys.readouterr().err
    assert error.startswith("zipfast zip: ") and error.count("\n") == 1


def test_structures_that_differ_name_the_node(folder, tmp_path, capsys):
    torch.manual_seed(9)
    checkpoint.save(tmp_path / "d.safetensors", zoo.resnet(1, width=1.0).state_dict())
    given = ["zip", str(folder / "a.safetensors"), str(tmp_path / "d.safetensors"), *FACTORY[:2], "--factory-args"]
    args = '[{"depth_n": 1, "width": 0.5}, {"depth_n": 1}]'
    assert cli.main([*given, args, "--data", str(folder / "data.npz"), "--quiet"]) == 1
    assert "models 0 and 1 must have one structure, but node 'conv2d' (module conv1) gives" in capsys.readouterr().err
