# SPDX-License-Identifier: Apache-2.0
"""`zipfast soup` from the command line: every action on small networks, configs of mergekit, bad input in one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import zipfast
from zipfast import checkpoint, cli, zoo
from zipfast.commands.soup import from_mergekit

ARGS = {"in_features": 8, "hidden": [16], "out_features": 3}
FACTORY = ["--factory", "zipfast.zoo:mlp", "--factory-args", json.dumps(ARGS)]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A start, three models fine-tuned from it, one from another start, one with NaN; held-out and test data."""
    folder = tmp_path_factory.mktemp("kitchen")
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 3, generator=generator)

    def data(n: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 8, generator=generator)
        return x + noise * torch.randn(n, 8, generator=generator), (x @ truth).argmax(1)

    def train(model: torch.nn.Module, steps: int, seed: int) -> torch.nn.Module:
        own = torch.Generator().manual_seed(seed)
        x, y = data(300, 0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            pick = torch.randint(0, 300, (64,), generator=own)
            loss = F.cross_entropy(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    for name, n in (("held", 120), ("test", 150)):
        x, y = data(n, 0.5)
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    torch.manual_seed(0)
    base = train(zoo.mlp(**ARGS), 30, 0)
    checkpoint.save(folder / "base.safetensors", base.state_dict())
    for i in range(3):
        checkpoint.save(folder / f"m{i}.safetensors", train(copy.deepcopy(base), 40, i + 1).state_dict())
    torch.manual_seed(9)
    checkpoint.save(folder / "other.safetensors", train(zoo.mlp(**ARGS), 70, 5).state_dict())
    broken = base.state_dict()
    broken["1.weight"][2, 3] = torch.nan
    checkpoint.save(folder / "broken.safetensors", broken)
    return folder


@pytest.fixture
def soup(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in a folder with the models; gives status, stdout, stderr."""
    for file in kitchen.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        status = cli.main(["soup", *argv])
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


MODELS = ["m0.safetensors", "m1.safetensors", "m2.safetensors"]
HELD = [*FACTORY, "--data", "held.npz", "--quiet"]


def test_uniform(soup) -> None:
    status, out, _ = soup("uniform", *MODELS, "--out", "soup.safetensors", *HELD, "--test", "test.npz")
    assert status == 0 and "written to soup.safetensors" in out and "accuracy on test.npz" in out
    found = load_file("soup.safetensors")
    for key, value in found.items():
        wanted = sum(load_file(name)[key] * np.float32(1 / 3) for name in MODELS)
        assert torch.allclose(value, wanted, atol=1e-7)
    facts = checkpoint.read_metadata("soup.safetensors")
    assert facts["recipe"] == "uniform" and facts["weights"] == [1 / 3] * 3
    assert facts["provenance"]["options"]["action"] == "uniform"


def test_weights_and_folder(soup) -> None:
    assert soup("uniform", *MODELS[:2], "--weights", "1,3", "--out", "soup/", "--shard-bytes", "300")[0] == 0
    index = json.loads(Path("soup/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    state = zipfast.states.open_state("soup").load()
    one, two = (load_file(name)["1.weight"] for name in MODELS[:2])
    assert torch.allclose(state["1.weight"], 0.25 * one + 0.75 * two, atol=1e-7)


def test_greedy_with_journal_and_picture(soup) -> None:
    argv = ["greedy", *MODELS, *HELD, "--journal", "j.jsonl", "--plots", "pictures", "--json", "--out", "g.safetensors"]
    status, out, _ = soup(*argv)
    found = json.loads(out)
    assert status == 0 and found["soup"]["score"] >= max(found["soup"]["scores"])
    assert found["accuracy"]["held-out"] == pytest.approx(found["soup"]["score"])
    assert Path("pictures/greedy.png").stat().st_size > 1000
    lines = Path("j.jsonl").read_text()
    assert json.loads(soup(*argv)[1])["soup"] == found["soup"] and Path("j.jsonl").read_text() == lines


def test_learned(soup) -> None:
    argv = ["learned", *MODELS, *HELD, "--granularity", "tensor", "--epochs", "3", "--json", "--out", "l.safetensors"]
    status, out, _ = soup(*argv)
    found = json.loads(out)
    assert status == 0 and found["losses"][-1] < found["losses"][0]
    assert sum(found["soup"]["weights"]) == pytest.approx(1)
    assert len(checkpoint.read_metadata("l.safetensors")["alpha"]) == 4


def test_wise(soup) -> None:
    argv = [
        "wise",
        MODELS[0],
        "--base",
        "base.safetensors",
        *HELD,
        "--alphas",
        "0,0.5,1",
        "--json",
        "--out",
        "w.safetensors",
    ]
    status, out, _ = soup(*argv)
    curve = json.loads(out)["curve"]
    assert status == 0 and [row["alpha"] for row in curve] == [0, 0.5, 1]
    best = max(curve, key=lambda row: row["held-out"])["alpha"]
    one, two = load_file("base.safetensors")["1.bias"], load_file(MODELS[0])["1.bias"]
    assert torch.allclose(load_file("w.safetensors")["1.bias"], (1 - best) * one + best * two, atol=1e-7)


def test_ensemble(soup) -> None:
    status, out, _ = soup("ensemble", *MODELS, *HELD, "--test", "test.npz", "--json")
    found = json.loads(out)
    assert status == 0 and found["held-out"]["greedy_ensemble"] >= max(found["held-out"]["single"])
    assert len(found["test.npz"]["single"]) == 3 and 0 <= found["test.npz"]["ensemble_ece"] <= 1


def test_geometry_names_what_is_wrong(soup) -> None:
    status, out, _ = soup("geometry", *MODELS, "--base", "base.safetensors", *HELD)
    assert status == 0 and "cosines" in out and "different starts" not in out and out.count(" degrees ") == 3
    status, out, _ = soup("geometry", *MODELS[:2], "--base", "base.safetensors", *HELD, "--plots", "pictures", "--json")
    assert len(json.loads(out)["plane"]["scores"]) == 9 and json.loads(out)["advantages"][0]["angle"] > 0
    assert {file.name for file in Path("pictures").iterdir()} == {"line.png", "plane.png"}
    status, out, _ = soup("geometry", MODELS[0], "other.safetensors", "--json")
    found = json.loads(out)
    assert "look trained from different starts" in found["problems"][0] and found["geometry"]["cosines"][0][1] < 0.7
    status, out, _ = soup("geometry", MODELS[0], "broken.safetensors")
    assert "broken.safetensors has NaN or infinity in '1.weight' at flat index 19" in out


def test_check_and_dry_run_write_nothing(soup) -> None:
    before = sorted(p.name for p in Path().iterdir())
    for argv in (["check", *MODELS], ["greedy", *MODELS, "--dry-run", "--out", "soup.safetensors"]):
        status, out, _ = soup(*argv)
        assert status == 0 and "3 models fit together: 4 tensors are mixed" in out and "16 MB of buffers" in out
    assert sorted(p.name for p in Path().iterdir()) == before


def test_mergekit_config(soup) -> None:
    Path("mk.yml").write_text(
        "merge_method: linear\nmodels:\n- model: m0.safetensors\n  parameters: {weight: 1}\n"
        "- model: m1.safetensors\n  parameters: {weight: 3}\ndtype: bfloat16\n"
    )
    assert soup("uniform", "--config", "mk.yml", "--out", "mk.safetensors")[0] == 0
    found = load_file("mk.safetensors")["1.weight"]
    one, two = (load_file(name)["1.weight"] for name in MODELS[:2])
    assert found.dtype == torch.bfloat16 and torch.equal(found, (0.25 * one + 0.75 * two).bfloat16())


def test_mergekit_parts() -> None:
    models = [{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}]
    plain = from_mergekit({"merge_method": "linear", "models": models, "parameters": {"normalize": False, "weight": 5}})
    assert plain == {"models": ["a", "b"], "weights": [2.0, 5.0], "keep_scale": True}
    assert from_mergekit({"merge_method": "zipfast_linear", "models": models}) == {
        "models": ["a", "b"],
        "weights": [2.0, 1.0],
    }
    assert from_mergekit({"weights": [1]}) == {"weights": [1]}
    for values, match in (
        ({"merge_method": "ties"}, "'merge_method' must be linear here, got 'ties'; zipfast-mergekit-yaml has others"),
        ({"merge_method": "linear", "slices": []}, "a linear merge can have .*, got 'slices'"),
        ({"merge_method": "linear", "models": ["a"]}, "'models' must be a list of model and parameters"),
    ):
        with pytest.raises(ValueError, match=match):
            from_mergekit(values)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["uniform"], "'models' must name at least one model, got none"),
        (["uniform", "nothing.safetensors"], "open_state: no checkpoint at nothing.safetensors"),
        (
            ["uniform", "m0.safetensors", "broken.safetensors"],
            "NaN or infinity in broken.safetensors, tensor '1.weight'",
        ),
        (["uniform", *MODELS, "--weights", "1,-1,0"], "'weights' must not add up to 0"),
        (["uniform", *MODELS, "--weights", "1,2"], "'weights' must be 3 finite numbers"),
        (["uniform", *MODELS, "--exclude", "nothing"], "'exclude' 'nothing' matches no tensor"),
        (["greedy", *MODELS], "'data' must name held-out data for greedy, got none; use --data SPEC"),
        (["wise", MODELS[0]], "wise needs --base and one model"),
        (["uniform", *MODELS, "--out", "soup.bin/soup.safetensors"], "cannot write soup.bin/soup.safetensors"),
        (["uniform", *MODELS, "--data", "held.npz"], "'factory' must be package.module:factory"),
    ],
)
def test_bad_input_is_one_sentence(soup, argv: list[str], match: str) -> None:
    before = sorted(p.name for p in Path().iterdir())
    status, out, err = soup(*argv, "--quiet")
    assert status == 1 and not out and err.startswith("zipfast soup: ") and err.count("\n") == 1
    assert match in err, err
    assert sorted(p.name for p in Path().iterdir()) == before


def test_models_that_do_not_fit(soup) -> None:
    state = load_file("m0.safetensors")
    wide = {**state, "extra": torch.zeros(2)}
    wide["3.bias"] = torch.zeros(5)
    checkpoint.save("wide.safetensors", wide)
    status, _, err = soup("check", "m0.safetensors", "wide.safetensors")
    assert status == 1
    for part in ("wide.safetensors has besides extra", "'3.bias' is [3] in m0.safetensors and [5] in wide.safetensors"):
        assert part in err


def test_recalibrated_statistics_are_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    np.savez("data.npz", x=x.numpy(), y=y.numpy())
    arguments = {"depth_n": 1, "width": 0.25, "classes": 3}
    for i in range(2):
        torch.manual_seed(i)
        checkpoint.save(f"{i}.safetensors", zoo.resnet(**arguments).state_dict())
    argv = [
        "uniform",
        "0.safetensors",
        "1.safetensors",
        "--factory",
        "zipfast.zoo:resnet",
        "--quiet",
        "--data",
        "data.npz",
    ]
    argv += ["--factory-args", json.dumps(arguments), "--recalibrate", "data.npz", "--out"]
    for out in ("one.safetensors", "many"):
        assert cli.main(["soup", *argv, out, "--shard-bytes", "4000"]) == 0
        found = zipfast.states.open_state(out).load()
        model = zoo.resnet(**arguments)
        model.load_state_dict(found)
        zipfast.reestimate_batchnorm(model, [(part,) for part in x.split(32)])
        for key, value in model.state_dict().items():
            assert torch.allclose(value.float(), found[key].float(), atol=1e-6) or key.endswith("tracked"), key
        assert float(found[next(key for key in found if key.endswith("running_mean"))].abs().max()) > 0
    assert checkpoint.read_metadata("one.safetensors")["recalibrated"] == "data.npz"
    assert checkpoint.read_metadata("one.safetensors")["recipe"] == "uniform"
    capsys.readouterr()
