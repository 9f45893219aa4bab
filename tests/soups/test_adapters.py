# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as ingredients: their average against sums of B A in float64, alone, in a base, greedily, by the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lora import SHAPES, base_state, changes, factors, write
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zipfast
from zipfast import cli
from zipfast.soups import adapted
from zipfast.soups.adapters import PREFIX, Adapter

# PEFT 0.21.2, lora.Linear.get_delta_weight of A = [[1, 2, 3], [-1, 0, 1]], B = [[1, 0], [2, -1]], by its config.
RECORDED = [
    ({"r": 2, "lora_alpha": 3}, [[1.5, 3.0, 4.5], [4.5, 6.0, 7.5]]),
    ({"r": 2, "lora_alpha": 3, "use_rslora": True}, [[2.1213202, 4.2426405, 6.3639607], [6.3639607, 8.485281, 10.606602]]),
    ({"r": 4, "lora_alpha": 8, "rank_pattern": {"wide": 2}, "alpha_pattern": {"0.wide": 1}},
     [[0.5, 1.0, 1.5], [1.5, 2.0, 2.5]]),
]  # fmt: skip


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    """Adapters with all that changes a scale, and the sum of their changes for the weights 0.5, 0.3 and 0.2."""
    one, two = factors(1, 2), factors(2, 3, ranks={"block.1.wide": 1})
    some = factors(3, 4, modules=("block.0.wide", "words"))
    folders = [
        write(tmp_path / "a", one, lora_alpha=8),
        write(tmp_path / "b", two, r=3, use_rslora=True, lora_alpha=5, rank_pattern={"block.1.wide": 1}),
        write(tmp_path / "c", some, r=4, alpha_pattern={"words": 16, r"block\.\d\.wide": 2}, lora_alpha=1),
    ]
    scales = [
        lambda m: 8 / 2,
        lambda m: 5 / math.sqrt(1 if m == "block.1.wide" else 3),
        lambda m: {"words": 4.0, "block.0.wide": 0.5}[m],
    ]
    total = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for weight, tensors, scale in zip((0.5, 0.3, 0.2), (one, two, some), scales):
        for module, change in changes(tensors, scale).items():
            total[module] += weight * change
    return folders, total


def read_changes(folder: Path) -> dict[str, np.ndarray]:
    """Of a written adapter, with the scale that its config says, looked up as PEFT does."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def pattern(name: str, module: str, otherwise: float) -> float:
        for key, value in config[name].items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return otherwise

    for key, value in tensors.items():
        if "lora_A" in key or "lora_embedding_A" in key:
            module = key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
            assert value.shape[0] == pattern("rank_pattern", module, config["r"])
    assert not config["use_rslora"]
    return changes(
        tensors, lambda m: pattern("alpha_pattern", m, config["lora_alpha"]) / pattern("rank_pattern", m, config["r"])
    )


# ---------------------------------------------------------------------------------------------------------------- average


@pytest.mark.parametrize(("config", "want"), RECORDED, ids=["plain", "rslora", "patterns"])
def test_a_change_is_pefts(tmp_path: Path, config: dict, want: list) -> None:
    a, b = torch.tensor([[1.0, 2, 3], [-1, 0, 1]]), torch.tensor([[1.0, 0], [2, -1]])
    folder = write(tmp_path / "a", {"block.0.wide.lora_A.weight": a, "block.0.wide.lora_B.weight": b}, **config)
    base = {"block.0.wide.weight": torch.zeros(2, 3)}
    found = adapted(base, folder).load()["block.0.wide.weight"]
    torch.testing.assert_close(found, torch.tensor(want), rtol=1e-6, atol=0)


def test_the_average_is_exact_and_an_adapter(three, tmp_path: Path) -> None:
    folders, total = three
    out = tmp_path / "soup"
    soup = zipfast.uniform_soup(folders, weights=[5, 3, 2], out=out)
    assert soup.path == str(out) and soup.state is None
    found = read_changes(out)
    assert found.keys() == total.keys()
    for module, want in total.items():
        np.testing.assert_allclose(found[module], want, rtol=0, atol=3e-6 * np.abs(want).max(), err_msg=module)
    config = json.loads((out / "adapter_config.json").read_text())
    ranks = {module: 2 + 3 + (4 if module in ("block.0.wide", "words") else 0) for module in total} | {
        "block.1.wide": 3
    }
    assert config["r"] in (5, 9)
    again = Adapter(out)
    assert {module: again.entries[pair.a].shape[0] for module, pair in again.pairs.items()} == ranks
    assert all(pair.scale == 1 for pair in again.pairs.values())
    assert json.loads(again.metadata["zipfast"])["recipe"] == "uniform"
    assert config["inference_mode"] is True and config["base_model_name_or_path"] == "base"


def test_the_average_in_memory_and_of_an_average(three, tmp_path: Path) -> None:
    folders, total = three
    soup = zipfast.uniform_soup(folders, weights=[5, 3, 2])
    write(tmp_path / "again", {key.removeprefix(PREFIX): value for key, value in soup.state.items()}, **soup.config)
    found = read_changes(tmp_path / "again")
    half = zipfast.uniform_soup(
        [tmp_path / "again", folders[0]], weights=[1.0, -0.5], normalize=False, out=tmp_path / "d"
    )
    assert half.weights == (1.0, -0.5)
    first = changes(load_file(folders[0] / "adapter_model.safetensors"), lambda m: 4.0)
    for module, want in total.items():
        np.testing.assert_allclose(found[module], want, rtol=0, atol=3e-6 * np.abs(want).max())
        moved = want - 0.5 * first[module]
        np.testing.assert_allclose(read_changes(tmp_path / "d")[module], moved, rtol=0, atol=6e-6 * np.abs(want).max())


def test_weights_of_torchs_own_kind_of_file(tmp_path: Path) -> None:
    tensors = factors(1, 2)
    one, two = write(tmp_path / "a", tensors), write(tmp_path / "b", tensors)
    (two / "adapter_model.safetensors").unlink()
    torch.save({PREFIX + key: value for key, value in tensors.items()}, two / "adapter_model.bin")
    found, want = adapted(base_state(), two).load(), adapted(base_state(), one).load()
    assert all(torch.equal(found[key], value) for key, value in want.items())


def test_separate_averages_are_another_thing(tmp_path: Path) -> None:
    one, two = factors(1, 2), factors(2, 2)
    folders = [write(tmp_path / "a", one), write(tmp_path / "b", two)]
    soup = zipfast.uniform_soup(folders, separate=True, out=tmp_path / "soup")
    found = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    for key in one:
        torch.testing.assert_close(found[PREFIX + key], (one[key] + two[key]) / 2)
    apart, exact = read_changes_of(found, 2.0), {}
    for tensors in (one, two):
        for module, change in changes(tensors, lambda m: 2.0).items():
            exact[module] = exact.get(module, 0) + change / 2
    off = math.sqrt(sum(((apart[m] - exact[m]) ** 2).sum() for m in exact) / sum((exact[m] ** 2).sum() for m in exact))
    assert off > 0.3
    assert (
        soup.notes[-1]
        == f"A and B were averaged separately, not the changes: the result is {100 * off:.1f}% away from it"
    )
    # with one A for both the averages agree, and the rank stays
    same = {key: one[key] if "_A" in key else two[key] for key in one}
    soup = zipfast.uniform_soup([folders[0], write(tmp_path / "s", same)], separate=True)
    assert soup.notes[-1].endswith("exact, as all A or all B are equal")
    assert soup.state[PREFIX + "conv.lora_A.weight"].shape[0] == 2


def read_changes_of(tensors, scale: float) -> dict[str, np.ndarray]:
    return changes(tensors, lambda m: scale)


def test_halves_are_rounded_once(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(i), factors(i, 2, dtype=torch.bfloat16)) for i in range(3)]
    soup = zipfast.uniform_soup(folders)
    key = PREFIX + "block.0.wide.lora_B.weight"
    want = torch.cat(
        [factors(i, 2, dtype=torch.bfloat16)["block.0.wide.lora_B.weight"].double() * 2 / 3 for i in range(3)], 1
    )
    assert soup.state[key].dtype is torch.bfloat16
    assert torch.equal(soup.state[key], want.to(torch.bfloat16))
    wide = zipfast.uniform_soup(folders, out_dtype=torch.float32)
    torch.testing.assert_close(wide.state[key].double(), want, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------------- base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_merged_into_the_base(three, tmp_path: Path, dtype: torch.dtype) -> None:
    folders, total = three
    base = base_state(dtype)
    soup = zipfast.uniform_soup(folders, weights=[5, 3, 2], base=base)
    assert soup.config is None and list(soup.state) == list(base)
    for key, value in base.items():
        module = key.removesuffix(".weight")
        want = torch.from_numpy(value.double().numpy() + total.get(module, 0.0))
        assert soup.state[key].dtype is dtype
        wide = max(torch.finfo(dtype).eps / 2, 1e-6)  # rounded once; the factors themselves are float32
        torch.testing.assert_close(
            soup.state[key].double(), want, rtol=1.01 * wide, atol=3e-6 * float(want.abs().max()), msg=key
        )
        if module not in total:
            assert torch.equal(soup.state[key], value)


def test_pieces_of_a_merged_weight(three) -> None:
    folders, _ = three
    state = adapted(base_state(), folders[0])
    for key in state.entries:
        whole = state.tensor(key).flatten()
        for start in range(0, whole.numel(), 3):
            for stop in (start + 1, start + 4, whole.numel()):
                piece = state.read(key, start, stop)
                torch.testing.assert_close(piece, whole[start:stop], rtol=2e-6, atol=1e-6)
        buffer = torch.empty(whole.numel())
        assert torch.equal(state.read(key, 0, None, buffer), whole)


def test_a_weight_stored_as_input_by_output(tmp_path: Path) -> None:
    modules = ("block.0.wide", "block.0.square")
    tensors = factors(1, 2, modules)
    folder = write(tmp_path / "a", tensors, fan_in_fan_out=True)
    base = {key: value.T.contiguous() for key, value in base_state().items() if key[:-7] in modules}
    found = zipfast.uniform_soup([folder], base=base).state
    for module, change in changes(tensors, lambda m: 2.0).items():
        want = base[f"{module}.weight"].double() + torch.from_numpy(change.T.copy())
        torch.testing.assert_close(found[f"{module}.weight"].double(), want, rtol=1e-6, atol=1e-6)


def test_biases_and_modules_of_their_own(tmp_path: Path) -> None:
    modules, base = ("block.0.wide",), base_state()
    folders, values = [], []
    for i in range(2):
        own = {"head.weight": torch.randn(2, 4), "block.0.wide.base_layer.bias": torch.randn(5)}
        values.append(own)
        config = {"bias": "lora_only", "modules_to_save": ["head"]}
        folders.append(write(tmp_path / str(i), factors(i, 2, modules) | own, **config))
    plain = write(tmp_path / "plain", factors(5, 2, modules))
    soup = zipfast.uniform_soup(folders, weights=[1, 3])
    for key in values[0]:
        torch.testing.assert_close(soup.state[PREFIX + key], values[0][key] / 4 + values[1][key] * 0.75)
    merged = zipfast.uniform_soup([*folders, plain], base=base).state
    for key, name in (("head.weight", "head.weight"), ("block.0.wide.base_layer.bias", "block.0.wide.bias")):
        torch.testing.assert_close(merged[name], (values[0][key] + values[1][key] + base[name]) / 3)
    with pytest.raises(
        ValueError, match=r"'base_model.model.block.0.wide.base_layer.bias' is in .*0, not in .*plain: say base"
    ):
        zipfast.uniform_soup([folders[0], plain])
    with pytest.raises(ValueError, match="is no change but a tensor of its own: weights must add up to 1 then"):
        zipfast.uniform_soup(folders, weights=[1, 1], normalize=False)


def test_a_bias_of_the_change(tmp_path: Path) -> None:
    modules, base = ("block.0.wide",), base_state()
    bias = torch.randn(5)
    one = write(tmp_path / "a", factors(1, 2, modules) | {"block.0.wide.lora_B.bias": bias}, lora_bias=True)
    two = write(tmp_path / "b", factors(2, 2, modules))
    soup = zipfast.uniform_soup([one, two])
    torch.testing.assert_close(soup.state[PREFIX + "block.0.wide.lora_B.bias"], bias)  # 2 of scale by 1/2 of weight
    assert soup.config["lora_bias"] is True
    merged = zipfast.uniform_soup([one, two], base=base).state
    torch.testing.assert_close(merged["block.0.wide.bias"], base["block.0.wide.bias"] + bias)


# ----------------------------------------------------------------------------------------------------------------- greedy


def test_greedy_of_whole_models_and_of_adapters(tmp_path: Path) -> None:
    truth = factors(1, 2)
    folders = []
    for i, noise in enumerate((0.3, 0.3, 5.0)):
        g = torch.Generator().manual_seed(10 + i)
        own = {
            key: value + noise * torch.randn(value.shape, generator=g) if "_B" in key else value
            for key, value in truth.items()
        }
        folders.append(write(tmp_path / str(i), own))
    base = base_state()
    target = adapted(base, write(tmp_path / "truth", truth)).load()
    seen = []

    def near(state: dict[str, Tensor]) -> float:
        seen.append(set(state))
        return -float(sum((state[key] - value).square().sum() for key, value in target.items()))

    journal = tmp_path / "soup.jsonl"
    soup = zipfast.greedy_soup(folders[::-1], near, base=base, journal=journal)
    assert soup.weights == (0, 0.5, 0.5) and soup.score > max(soup.scores)
    assert all(keys == set(base) for keys in seen)
    want = zipfast.uniform_soup(folders[:2], base=base).state
    assert all(torch.allclose(soup.state[key], want[key], rtol=1e-6, atol=1e-6) for key in want)
    count = len(seen)
    again = zipfast.greedy_soup(folders[::-1], near, base=base, journal=journal)
    assert again.weights == soup.weights and len(seen) == count  # of the journal
    plain = zipfast.greedy_soup(folders, lambda state: 0.0, scores=[3, 2, 1], out=tmp_path / "greedy")
    assert plain.weights == (1, 0, 0) and Adapter(tmp_path / "greedy").pairs


def test_an_adapter_of_another_scale_is_another(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", factors(1, 2)), write(tmp_path / "b", factors(1, 2), lora_alpha=2)]
    folders.append(write(tmp_path / "c", factors(1, 2)))
    notes = zipfast.uniform_soup(folders).notes
    assert len(notes) == 1 and re.search(r"c holds the same weights as .*a: it counts twice", notes[0])


def test_adapted_models_are_checkpoints_for_every_recipe(three) -> None:
    folders, _ = three
    base = base_state()
    models = [adapted(base, folder) for folder in folders]
    found = zipfast.soups.geometry(models, base)
    assert found.cosines.shape == (3, 3)
    mean = zipfast.uniform_soup(models).state
    want = zipfast.uniform_soup(folders, base=base).state
    assert all(torch.allclose(mean[key], want[key], rtol=1e-5, atol=1e-5) for key in want)


def test_ties_of_what_is_changed_are_undone(tmp_path: Path) -> None:
    weight = torch.randn(7, 4)
    base = {"words.weight": weight, "head.weight": weight, "other.weight": torch.ones(2)}
    folder = write(tmp_path / "a", factors(1, 2, ("words",)))
    found = zipfast.uniform_soup([folder], base=base).state
    assert torch.equal(found["head.weight"], weight) and not torch.equal(found["words.weight"], weight)


# --------------------------------------------------------------------------------------------------------------- the command


NETS = """
from torch import nn
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    save_file(net.state_dict(), "base.safetensors")
    (tmp_path / "adapter_nets.py").write_text(NETS)
    x = torch.randn(60, 6)
    np.savez("held.npz", x=x.numpy(), y=net(x).argmax(1).numpy())
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        tensors = {
            "0.lora_A.weight": torch.randn(2, 6, generator=g),
            "0.lora_B.weight": 0.1 * torch.randn(8, 2, generator=g),
        }
        write(Path(f"a{i}"), tensors, base_model_name_or_path="base.safetensors", target_modules=["0"])
    names = ["a0", "a1", "a2"]

    def run(*argv: str) -> tuple[int, str]:
        status = cli.main(["soup", *argv])
        told = capsys.readouterr()
        return status, told.out + told.err

    status, told = run("uniform", *names, "--out", "soup")
    assert status == 0 and "uniform soup of 3 of 3 models" in told
    assert Adapter("soup").entries[PREFIX + "0.lora_A.weight"].shape == (6, 6)
    status, told = run("check", *names)
    assert status == 0 and "3 adapters fit together: 1 modules, rank 6 at most" in told
    data = ["--data", "held.npz", "--factory", "adapter_nets:net", "--base", "base.safetensors", "--quiet"]
    status, told = run("greedy", *names, *data, "--out", "greedy.safetensors")
    assert status == 0 and "accuracy on held-out" in told
    assert load_file("greedy.safetensors").keys() == net.state_dict().keys()
    status, told = run("uniform", *names, "--base", "base.safetensors", "--out", "whole.safetensors")
    want = zipfast.uniform_soup(names, base="base.safetensors").state
    assert status == 0 and all(torch.equal(value, want[key]) for key, value in load_file("whole.safetensors").items())
    status, told = run("uniform", *names, "--separate", "--out", "apart")
    assert status == 0 and "averaged separately" in told
    status, told = run("greedy", *names, "--data", "held.npz", "--out", "x")
    assert status == 1 and "'base' must name the model of the adapters, to evaluate them in, got none" in told
    status, told = run("geometry", *names)
    assert status == 1 and "adapters are for uniform and greedy, got them for geometry" in told
