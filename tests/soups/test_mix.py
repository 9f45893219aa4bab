# SPDX-License-Identifier: Apache-2.0
"""Mixing checkpoints: the bits of a plain loop, the memory of a few buffers, every mismatch named, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from zipfast.soups import layout_of, mix, uniform_soup
from zipfast.soups import mix as mix_function
from zipfast.states import Entry, open_state

MIX = sys.modules[mix_function.__module__]


def checkpoints(count: int, dtype: torch.dtype, seed: int = 0) -> list[dict[str, Tensor]]:
    """Several tensors of odd sizes, a scalar, an empty one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"z.w": (37, 41), "a.b": (41,), "s": (), "none": (0, 3), "m.w": (5, 7, 3)}
    return [
        {key: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for key, shape in shapes.items()}
        for _ in range(count)
    ]


def loop(
    states: list[dict[str, Tensor]], weights: list[float], out_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """What everybody would write, in float32 (float64 for float64)."""
    found = {}
    for key, first in states[0].items():
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        total = None
        for state, weight in zip(states, weights):
            term = state[key].to(wide) * torch.tensor(weight, dtype=torch.float64).to(wide)
            total = term if total is None else total + term
        assert total is not None
        found[key] = total.to(out_dtype or first.dtype)
    return found


def equal(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> None:
    assert found is not None and found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def save(folder: Path, states: list[dict[str, Tensor]]) -> list[Path]:
    paths = [folder / f"model{i}.safetensors" for i in range(len(states))]
    for path, state in zip(paths, states):
        safetensors.torch.save_file(state, path)
    return paths


# ----------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_bits_of_a_plain_loop(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    states = checkpoints(count, dtype)
    weights = [0.1 * (i + 1) for i in range(count)]
    wanted = loop(states, weights)
    column = torch.tensor(weights, dtype=torch.float64)
    paths = save(tmp_path, states)
    for sources in (states, paths, [open_state(path) for path in paths]):
        layout = layout_of([open_state(source) for source in sources])
        equal(mix(sources, column, layout=layout), wanted)
    mix(paths, column, layout=layout, out=tmp_path / "out.safetensors")
    with open_state(tmp_path / "out.safetensors") as written:
        assert {k: v.dtype for k, v in written.entries.items()} == {k: v.dtype for k, v in wanted.items()}
        assert all(torch.equal(written.tensor(key), value) for key, value in wanted.items())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes_need_an_output_dtype(out_dtype: torch.dtype) -> None:
    states = [*checkpoints(1, torch.float32), *checkpoints(1, torch.bfloat16, 1)]
    with pytest.raises(ValueError, match=r"5 tensors differ in dtype \('z.w': bfloat16, float32\): say out_dtype"):
        uniform_soup(states)
    equal(uniform_soup(states, out_dtype=out_dtype).state, loop(states, [0.5, 0.5], out_dtype))


def test_small_pieces_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    states = checkpoints(3, torch.float32)
    wanted = loop(states, [1 / 3] * 3)
    monkeypatch.setattr(MIX, "SMALLEST", 64)
    pieces = MIX.groups_of
    monkeypatch.setattr(MIX, "groups_of", lambda keys, entries, models: pieces(keys, entries, models, 1))
    entries = {key: Entry(value.dtype, tuple(value.shape)) for key, value in states[0].items()}
    groups = list(MIX.groups_of(list(entries), entries, 3))
    assert len(groups) > 20 and all(sum(p.stop - p.start for p in group) <= 64 for group in groups)
    for key, entry in entries.items():  # every element once, in order
        runs = [(p.start, p.stop) for group in groups for p in group if p.key == key]
        assert runs[0][0] == 0 and runs[-1][1] == entry.numel
        assert all(one[1] == two[0] for one, two in pairwise(runs))
    monkeypatch.setattr(MIX, "BUFFERS", 100)  # most slices do not fit and come from elsewhere
    equal(uniform_soup(states).state, wanted)


def test_weights_per_tensor() -> None:
    states = checkpoints(2, torch.float32)
    layout = layout_of([open_state(state) for state in states])
    own = {key: torch.tensor([i / 8, 1 - i / 8], dtype=torch.float64) for i, key in enumerate(layout.blended)}
    found = mix(states, own, layout=layout)
    assert found is not None
    for key, column in own.items():
        assert torch.equal(found[key], loop([{key: s[key]} for s in states], column.tolist())[key])


def test_what_is_excluded_is_the_first_models() -> None:
    states = checkpoints(3, torch.float32)
    states[1]["a.b"] = torch.ones(7)  # another shape: no matter, where it is not mixed
    soup = uniform_soup(states, exclude=r"\.b$").state
    assert soup is not None and torch.equal(soup["a.b"], states[0]["a.b"])
    assert torch.equal(soup["z.w"], loop([{"z.w": s["z.w"]} for s in states], [1 / 3] * 3)["z.w"])
    only = uniform_soup(states, include="^z").state
    assert only is not None and torch.equal(only["m.w"], states[0]["m.w"]) and torch.equal(only["z.w"], soup["z.w"])
    with pytest.raises(ValueError, match="'exclude' 'nothing' matches no tensor"):
        uniform_soup(states, exclude="nothing")


def test_whole_numbers() -> None:
    def state(number: int) -> dict[str, Tensor]:
        return {"w": torch.ones(2), "n": torch.tensor([number, 3 - number]), "flag": torch.tensor(True)}

    same = uniform_soup([state(1), state(1)]).state
    assert same is not None and same["n"].tolist() == [1, 2] and same["flag"].item() is True
    with pytest.raises(
        ValueError, match=r"must be equal in all models, got other ones for 'n' in model 2; say int_pol"
    ):
        uniform_soup([state(1), state(1), state(2)])
    for policy, wanted in (("first", [1, 2]), ("max", [2, 2]), ("sum", [3, 3])):
        soup = uniform_soup([state(1), state(2)], int_policy=policy, exclude="flag").state
        assert soup is not None and soup["n"].tolist() == wanted and soup["n"].dtype == torch.int64
    excluded = uniform_soup([state(1), state(2)], int_policy="first").state
    assert excluded is not None and excluded["flag"].dtype == torch.bool
    with pytest.raises(ValueError, match="'int_policy' must be one of equal, first, max, sum, got 'mean'"):
        uniform_soup([state(1)], int_policy="mean")


def test_batch_norm() -> None:
    nets = [nn.BatchNorm1d(3) for _ in range(2)]
    for i, net in enumerate(nets):
        net.train()
        for _ in range(i + 1):
            net(torch.randn(8, 3) + i)
    soup = uniform_soup(nets)
    assert soup.state is not None and soup.state["num_batches_tracked"].item() == 1
    assert soup.state["num_batches_tracked"].dtype == torch.int64
    assert torch.equal(soup.state["running_mean"], (nets[0].running_mean * 0.5 + nets[1].running_mean * 0.5))
    assert soup.notes == ("2 batch-norm statistics are averaged; re-estimate them (zipfast.reestimate_batchnorm)",)


def test_ties(tmp_path: Path) -> None:
    def tied(seed: int) -> dict[str, Tensor]:
        shared = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        return {"table": shared, "head": shared, "w": torch.ones(2)}

    states = [tied(0), tied(1)]
    soup = uniform_soup(states).state
    assert soup is not None and soup["table"].data_ptr() == soup["head"].data_ptr()
    uniform_soup(states, out=tmp_path / "one.safetensors")
    uniform_soup(states, out=tmp_path / "shards", shard_bytes=20)
    for place in (tmp_path / "one.safetensors", tmp_path / "shards"):
        with open_state(place) as written:
            assert torch.equal(written.tensor("head"), soup["table"]) and torch.equal(
                written.tensor("table"), soup["head"]
            )
    states[1]["head"] = states[1]["head"] + 1  # tied in one of them only: two tensors
    soup = uniform_soup(states).state
    assert soup is not None and not torch.equal(soup["table"], soup["head"])


# ------------------------------------------------------------------------------------------------------------------ files


def test_a_sharded_soup_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=16)
    models = [transformers.GPT2LMHeadModel(config) for _ in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    sources = [tmp_path / "0", tmp_path / "1"]
    config.save_pretrained(tmp_path / "soup")
    for shard_bytes in (20_000, 1 << 30, 30_000):  # each in place of the one before
        uniform_soup(sources, out=tmp_path / "soup", shard_bytes=shard_bytes)
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "soup")
        own = [dict(model.named_parameters()) for model in models]
        for key, value in loaded.named_parameters():
            assert torch.equal(value, 0.5 * own[0][key] + 0.5 * own[1][key])
        names = os.listdir(tmp_path / "soup")
        assert (
            ("model.safetensors" in names) == (shard_bytes == 1 << 30) == ("model.safetensors.index.json" not in names)
        )
        counts = {name.split("-of-")[1] for name in names if "-of-" in name}
        assert len(counts) == (shard_bytes != 1 << 30), "no shard of an earlier soup is left"
    with open_state(tmp_path / "soup") as written:
        assert "uniform" in json.dumps(written.metadata)


def spoiled(folder: Path, where: str) -> list[Path]:
    states = checkpoints(2, torch.float32)
    states[1][where].view(-1)[-1] = float("nan")
    return save(folder, states)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nan_is_named_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    paths = spoiled(tmp_path / "in", "m.w")
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    with pytest.raises(
        ValueError, match=r"got NaN or infinity in .*model1.safetensors, tensor 'm.w' at flat index 104"
    ):
        uniform_soup(paths, out=out, shard_bytes=400)
    assert os.listdir(tmp_path) == ["in"]
    good = save(tmp_path / "in", checkpoints(2, torch.float32))
    uniform_soup(good, out=out, shard_bytes=400)  # an earlier result stays as it was
    with open_state(out) as state:
        before, names = state.load(), sorted(os.listdir(tmp_path))
    spoiled(tmp_path / "in", "m.w")
    with pytest.raises(ValueError, match="NaN or infinity"):
        uniform_soup(paths, out=out, shard_bytes=400)
    with open_state(out) as state:
        assert all(torch.equal(state.tensor(key), value) for key, value in before.items())
    assert sorted(os.listdir(tmp_path)) == names and not [n for n in os.listdir(tmp_path / "in") if n.startswith(".")]


def test_overflow_is_named() -> None:
    state = {"w": torch.tensor([1.0, 6e4], dtype=torch.float16)}
    with pytest.raises(
        ValueError, match=r"must fit into torch.float16, got an overflow in 'w' at flat index 1; say out"
    ):
        uniform_soup([state, state], weights=[1.0, 1.0], normalize=False)
    soup = uniform_soup([state, state], weights=[1.0, 1.0], normalize=False, out_dtype=torch.float32).state
    assert soup is not None and soup["w"][1] == 2 * state["w"][1].float()


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_no_room(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=1000))
    with pytest.raises(OSError, match=rf"cannot write .*{out}: it needs \d,\d\d\d bytes, 1,000 are free"):
        uniform_soup(checkpoints(2, torch.float32), out=tmp_path / out)
    assert os.listdir(tmp_path) == []


def test_bad_places(tmp_path: Path) -> None:
    states = checkpoints(1, torch.float32)
    with pytest.raises(OSError, match=r"cannot write .*choose a folder that exists"):
        uniform_soup(states, out=tmp_path / "no" / "out.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file: it is a file; give a folder"):
        uniform_soup(states, out=tmp_path / "file")
    with pytest.raises(ValueError, match="'shard_bytes' must be at least 1, got 0"):
        uniform_soup(states, out=tmp_path / "folder", shard_bytes=0)
    assert os.listdir(tmp_path) == ["file"]


MEMORY = """
import os, sys, torch
from zipfast.soups import uniform_soup
torch.set_num_threads(1)
sources = [f"{sys.argv[1]}/{i}.safetensors" for i in range(int(sys.argv[2]))]
small = {"w": torch.ones(1 << 20)}
uniform_soup([small, small])  # whatever is allocated once
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
uniform_soup(sources, out=f"{sys.argv[1]}/out.safetensors")
print(peak() - before)
"""


def test_memory_is_that_of_the_buffers(tmp_path: Path) -> None:
    big = {f"w{i}": torch.full((2 << 20,), float(i)) for i in range(8)}  # 64 MB
    for i in range(6):
        safetensors.torch.save_file(big, tmp_path / f"{i}.safetensors")
    grown = {}
    for count in (2, 6):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(count)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        grown[count] = int(done.stdout)
    assert max(grown.values()) < 32 << 20, grown  # a model has 64 MB; all are alike, so that they are compared too


# ----------------------------------------------------------------------------------------------------------- what is wrong


def test_all_problems_in_one_message() -> None:
    first, second, third = checkpoints(3, torch.float32)
    second["extra"] = torch.ones(1)
    del second["s"]
    third["z.w"] = third["z.w"].T.contiguous()
    third["a.b"] = third["a.b"].double()
    with pytest.raises(ValueError) as error:
        uniform_soup([first, second, third], exclude="nothing")
    text = str(error.value)
    for part in (
        "uniform_soup: the models must have the same tensors, got: ",
        "model 1 lacks s",
        "model 1 has besides extra",
        "'z.w' is [37, 41] in model 0 and [41, 37] in model 2",
        "1 tensors differ in dtype ('a.b': float32, float64): say out_dtype",
        "'exclude' 'nothing' matches no tensor",
    ):
        assert part in text, part
    many = {f"t{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(ValueError, match="model 1 lacks t0, t1, t2, t3, t4 and 4 more"):
        uniform_soup([many, {}])


def test_shapes_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"'w' is \[8\] in model 0 and \[1\] in model 1"):
        uniform_soup([{"w": torch.ones(8)}, {"w": torch.ones(1)}])


def test_weights_and_models() -> None:
    one = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="at least one model is needed, got none"):
        uniform_soup([])
    for weights, message in (
        ([1.0], "'weights' must be 2 finite numbers, one per model"),
        ([1.0, float("nan")], "'weights' must be 2 finite numbers"),
        ([1.0, -1.0], "'weights' must not add up to 0"),
        ([0.0, 0.0], "'weights' must not add up to 0"),
        ([0.1 + 0.2, -0.3], "'weights' must not add up to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            uniform_soup([one, {"w": torch.zeros(2)}], weights=weights)


def test_models_that_count_twice_are_noted(tmp_path: Path) -> None:
    states = checkpoints(3, torch.float32)
    paths = save(tmp_path, [*states, states[1]])
    notes = uniform_soup(paths).notes
    assert notes == (f"{paths[3]} holds the same weights as {paths[1]}: it counts twice",)
    assert uniform_soup(states).notes == ()
