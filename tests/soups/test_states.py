# SPDX-License-Identifier: Apache-2.0
"""States: every kind of checkpoint read piece by piece, every damaged one refused in one sentence; files written whole."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from zipfast import states
from zipfast.states import DTYPES, Entry, open_state, writing


def example(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix, a scalar, an empty tensor, in an order that is not the alphabet's."""
    values = torch.arange(-6, 6).reshape(3, 4)
    return {"w": values.to(dtype), "a.scalar": torch.tensor(3).to(dtype), "none": torch.empty(0, 5, dtype=dtype)}


def same(state: states.State, wanted: dict[str, torch.Tensor]) -> None:
    assert set(state.entries) == set(wanted)
    for key, value in wanted.items():
        entry = state.entries[key]
        assert (entry.dtype, entry.shape, entry.numel) == (value.dtype, tuple(value.shape), value.numel())
        assert torch.equal(state.tensor(key), value), key
    loaded = state.load()
    assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_safetensors_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = example(dtype)
    safetensors.torch.save_file(wanted, tmp_path / "m.safetensors", metadata={"who": "me"})
    with open_state(tmp_path / "m.safetensors") as state:
        same(state, wanted)
        assert state.metadata == {"who": "me"} and not state.ties and not state.notes
        assert state.name == str(tmp_path / "m.safetensors")


def test_pieces(tmp_path: Path) -> None:
    wanted = torch.randn(1000)
    safetensors.torch.save_file({"pad": torch.ones(3), "w": wanted}, tmp_path / "m.safetensors")
    with open_state(tmp_path / "m.safetensors") as state, open_state({"w": wanted}) as memory:
        buffer = torch.full((64,), 7.0)
        for start, stop in ((0, 64), (10, 20), (999, 1000), (5, 5), (990, 5000)):
            end = min(stop, 1000)
            assert torch.equal(state.read("w", start, stop), wanted[start:end])
            assert torch.equal(memory.read("w", start, stop), wanted[start:end])
            into = state.read("w", start, stop, buffer)
            assert torch.equal(into, wanted[start:end])
            assert start == end or into.data_ptr() == buffer.data_ptr()
        state.read("w", 10, 12, buffer.fill_(7.0))
        assert (buffer[2:] == 7.0).all(), "only what was asked for is written"


def test_folders(tmp_path: Path) -> None:
    one, two = {"b.w": torch.randn(3, 2)}, {"a.w": torch.randn(4), "n": torch.tensor(5)}
    (tmp_path / "sharded").mkdir()
    safetensors.torch.save_file(one, tmp_path / "sharded" / "x-1.safetensors")
    safetensors.torch.save_file(two, tmp_path / "sharded" / "x-2.safetensors")
    places = {"b.w": "x-1.safetensors", "a.w": "x-2.safetensors", "n": "x-2.safetensors"}
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for source in (tmp_path / "sharded", index):
        with open_state(source) as state:
            same(state, one | two)
            assert state.name == str(tmp_path / "sharded")
    (tmp_path / "pickled").mkdir()
    torch.save(one, tmp_path / "pickled" / "p-1.bin")
    torch.save(two, tmp_path / "pickled" / "p-2.bin")
    places = {"b.w": "p-1.bin", "a.w": "p-2.bin", "n": "p-2.bin"}
    (tmp_path / "pickled" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    same(open_state(tmp_path / "pickled"), one | two)
    for name in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (safetensors.torch.save_file if name.endswith("s") else torch.save)(two, folder / name)
        same(open_state(str(folder)), two)


def test_a_model_saved_in_shards_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99
    )
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    own = model.state_dict()
    with open_state(tmp_path) as state:
        assert len(state.entries) > 10
        for key in state.entries:
            assert torch.equal(state.tensor(key), own[key])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files(zipped: bool, tmp_path: Path) -> None:
    shared = torch.randn(3, 2)
    wanted = {"one": shared, "w": torch.arange(6.0)[::2], "two": shared, "half": torch.ones(2, dtype=torch.bfloat16)}
    path = tmp_path / "m.pt"
    torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
    state = open_state(path)
    same(state, wanted)
    assert state.ties == {"two": "one"} and not state.notes
    loaded = state.load()
    assert loaded["one"].data_ptr() == loaded["two"].data_ptr()
    torch.save({"epoch": 3, "state_dict": wanted}, path, _use_new_zipfile_serialization=zipped)
    state = open_state(path)
    same(state, wanted)
    assert state.notes == [f"{path}: its state_dict was taken"]


def test_memory() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight
            self.transposed = nn.Parameter(self.table.weight.detach().T)

    module = Tied()
    state = open_state(module)
    assert state.name == "Tied" and state.ties == {"head.weight": "table.weight"}, "a view of another shape is no tie"
    assert open_state(state) is state
    assert not state.tensor("table.weight").requires_grad
    same(state, dict(module.state_dict()))
    assert open_state({"x": torch.empty(0), "y": torch.empty(0)}, "mine").ties == {}
    assert open_state({}, "mine").name == "mine"


# -------------------------------------------------------------------------------------------------------------- bad files


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "not JSON": (b"{nonsense", b"", "is no safetensors file: its header is not JSON"),
    "not text": (b"\xff\xfe{}", b"", "is no safetensors file: its header is not JSON"),
    "a list": ([1], b"", r"its header is not JSON \(not an object\)"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, bytes(8), "is damaged: the header of tensor 'w' is"),
    "a number": ({"w": 3}, bytes(8), "is damaged: the header of tensor 'w' is 3"),
    "negative": ({"w": {**GOOD, "shape": [-2]}}, bytes(8), "is damaged: the header of tensor 'w'"),
    "fraction": ({"w": {**GOOD, "shape": [2.5]}}, bytes(8), "is damaged: the header of tensor 'w'"),
    "offsets": ({"w": {**GOOD, "data_offsets": [0, 4]}}, bytes(8), "tensor 'w' needs 8 bytes, its header says 4"),
    "backwards": ({"w": {**GOOD, "data_offsets": [8, 0]}}, bytes(8), "tensor 'w' needs 8 bytes, its header says -8"),
    "absurd": ({"w": {**GOOD, "shape": [1 << 62, 1 << 62]}}, bytes(8), "is damaged: tensor 'w' needs"),
    "dtype": ({"w": {**GOOD, "dtype": "F8_E4M3"}}, bytes(8), "holds 'w' as F8_E4M3; plain F64, .*BOOL can be read"),
    "cut": ({"w": GOOD}, bytes(7), "is cut off: tensor 'w' ends at byte 8, the data has 7"),
    "overlap": (
        {"w": GOOD, "v": {**GOOD, "data_offsets": [4, 12]}},
        bytes(12),
        "is damaged: tensors 'w' and 'v' overlap",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers(case: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[case]
    path = raw(tmp_path / "m.safetensors", header, data)
    before = descriptors()
    for _ in range(3):
        with pytest.raises(ValueError, match=message) as error:
            open_state(path)
        assert str(path) in str(error.value)
    assert descriptors() == before


@pytest.mark.parametrize("size", [0, 5, 8, 20])
def test_cut_in_the_header(size: int, tmp_path: Path) -> None:
    whole = raw(tmp_path / "m.safetensors", {"w": GOOD}, bytes(8)).read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"is no safetensors file or is cut off: .*the file has {size}$"):
        open_state(tmp_path / "m.safetensors")


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, 101 << 20])
def test_a_header_that_would_not_fit(length: int, tmp_path: Path) -> None:
    path = raw(tmp_path / "m.safetensors", {}, length=length)
    with pytest.raises(ValueError, match=f"its header says {length} bytes, the file has 10"):
        open_state(path)


def test_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"w": torch.ones(1000)}, path)
    with open_state(path) as state:
        os.truncate(path, path.stat().st_size - 40)
        with pytest.raises(ValueError, match=r"is cut off: tensor 'w' wants 4000 bytes at .*, got 3960"):
            state.read("w")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)

    mark = ""


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_and_never_run(kind: str, tmp_path: Path) -> None:
    Evil.mark = str(tmp_path / "was run")
    path = tmp_path / "m.bin"
    if kind == "plain":
        path.write_bytes(pickle.dumps({"w": Evil()}, 2))
    else:
        torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"it would run posix.system.*code in a checkpoint is never run") as error:
        open_state(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "was run").exists()


def test_other_bad_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        open_state(path)
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        open_state(path)
    path.write_bytes(pickle.dumps({"w": Evil()}, 4))
    with pytest.warns(UserWarning, match="protocol 4"), pytest.raises(ValueError, match=r"plain tensors \(") as error:
        open_state(path)
    assert "Do it only if" not in str(error.value), "no advice to run what the file holds"
    torch.save([torch.ones(2)], path)
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        open_state(path)
    torch.save({"w": torch.ones(2), "epoch": 3}, path)
    with pytest.raises(ValueError, match="must hold tensors, got int at 'epoch'"):
        open_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold a weight_map, got TypeError"),
        ("{}", "must hold a weight_map, got KeyError"),
        ("{", "must hold a weight_map, got JSONDecodeError"),
        ('{"weight_map": ["w"]}', "must hold a weight_map, got AttributeError"),
        ('{"weight_map": {"w": "../m.safetensors"}}', "must name files beside it, got '../m.safetensors'"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "must name files beside it, got '/etc/passwd'"),
        ('{"weight_map": {"v": "m.safetensors"}}', "names 'v' in m.safetensors, which does not hold it"),
    ],
)
def test_bad_indexes(content: str, message: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    before = descriptors()
    with pytest.raises(ValueError, match=message):
        open_state(tmp_path)
    assert descriptors() == before


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.safetensors"):
        open_state(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        open_state(tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors, .*index.json, got none of them"):
        open_state(tmp_path / "empty")
    for name, got in (("m.npy", r"got '\.npy'"), ("m.h5", "got m.h5 of Keras; save the model from PyTorch")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=rf"must end in .safetensors, .pt, .pth, .bin, {got}"):
            open_state(tmp_path / name)
    with pytest.raises(TypeError, match="'source' must be a path, a state dict or a module, got int"):
        open_state(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mine must hold tensors, got list at 'w'"):
        open_state({"w": [1.0]}, "mine")  # type: ignore[dict-item]


# ---------------------------------------------------------------------------------------------------------------- writing


def entries_of(tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
    return {key: Entry(value.dtype, tuple(value.shape)) for key, value in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_written_files_are_read_by_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted, path = example(dtype), tmp_path / "out.safetensors"
    with writing(path, entries_of(wanted), {"recipe": "mine"}) as writer:
        for start in (8, 0, 4):  # pieces in any order
            writer.write("w", start, wanted["w"].reshape(-1)[start : start + 4])
        writer.write("a.scalar", 0, wanted["a.scalar"].reshape(-1))
        assert not path.exists(), "nothing under the name before the end"
    assert safetensors.torch.load_file(path).keys() == wanted.keys()
    for key, value in safetensors.torch.load_file(path).items():
        assert torch.equal(value, wanted[key]) and value.dtype == dtype
    with open_state(path) as state:
        same(state, wanted)
        assert json.loads(state.metadata["zipfast"]) == {"recipe": "mine"} and state.metadata["format"] == "pt"
    assert os.listdir(tmp_path) == ["out.safetensors"]


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_text("old")
    before = descriptors()
    with pytest.raises(KeyError), writing(path, {"w": Entry(torch.float32, (2,))}) as writer:
        writer.write("w", 0, torch.ones(2))
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.safetensors"] and descriptors() == before


def test_the_users_umask_holds(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "out.safetensors", {}):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=1000))
    with (
        pytest.raises(OSError, match=r"cannot write .*out.safetensors: it needs 4,\d\d\d bytes, 3,000 are free"),
        writing(tmp_path / "out.safetensors", {"w": Entry(torch.float32, (1000,))}),
    ):
        raise AssertionError("the block must not be entered")
    assert os.listdir(tmp_path) == []


def test_wrong_pieces_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    for start, piece, message in (
        (0, torch.ones(3), "must get torch.float32 elements up to 2, got torch.float32 up to 3"),
        (1, torch.ones(2), "up to 3"),
        (0, torch.ones(2, dtype=torch.float64), "got torch.float64 up to 2"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            writing(path, {"w": Entry(torch.float32, (2,))}) as writer,
        ):
            writer.write("w", start, piece)
    with (
        pytest.raises(ValueError, match=r"'w' must be of a dtype that safetensors has, got torch.complex64"),
        writing(path, {"w": Entry(torch.complex64, (2,))}),
    ):
        raise AssertionError("the block must not be entered")
    assert os.listdir(tmp_path) == []
