# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole or not at all, read without running code, and hashed by what they hold."""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zipfast import checkpoint
from zipfast.checkpoint import atomic_write, check_writable, load, read_metadata, save, state_hash


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


class Boom(Exception):
    pass


# ------------------------------------------------------------------------------------------ writing


def test_atomic_write(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    with atomic_write(path, "w") as file:
        file.write("text")
        assert path.read_bytes() == b"new"
    assert path.read_text() == "text"
    assert names(tmp_path) == ["a.bin"]


def test_usual_rights(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit])
def test_exception_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["replace", "fsync", "chmod"])
def test_failure_at_any_step_keeps_the_old_file(tmp_path, monkeypatch, state, step):
    path = tmp_path / "a.safetensors"
    save(path, {"x": torch.ones(2)})

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, state)
    monkeypatch.undo()
    same(load(path), {"x": torch.ones(2)})
    assert names(tmp_path) == ["a.safetensors"]


def test_failure_while_writing_keeps_the_old_file(tmp_path, monkeypatch, state):
    import safetensors.torch

    path = tmp_path / "a.safetensors"
    save(path, {"x": torch.ones(2)})

    def fail(*args, **kwargs):
        raise Boom

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(Boom):
        save(path, state)
    assert names(tmp_path) == ["a.safetensors"]
    same(load(path), {"x": torch.ones(2)})


def test_relative_path(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    check_writable("a.safetensors")
    save("a.safetensors", state)
    same(load("a.safetensors"), state)
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("inside", ["missing/a.safetensors", "file/a.safetensors"])
@pytest.mark.parametrize("act", [check_writable, lambda p: save(p, {"x": torch.ones(1)})])
def test_folder_that_cannot_be_written(tmp_path, inside, act):
    (tmp_path / "file").write_text("")
    path = tmp_path / inside
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: .*choose a folder that exists and is writable"):
        act(path)
    assert names(tmp_path) == ["file"]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a.safetensors")
    assert names(tmp_path) == []
    (tmp_path / "b.safetensors").write_bytes(b"old")
    check_writable(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == b"old"
    with pytest.raises(OSError, match="it is a folder; give a file name"):
        check_writable(tmp_path)


def test_save_refuses(tmp_path, state):
    with pytest.raises(ValueError, match=r"save: 'path' must end in .safetensors, got '.*a\.pt'"):
        save(tmp_path / "a.pt", state)
    with pytest.raises(TypeError, match="save: 'lr' must be a tensor, got float"):
        save(tmp_path / "a.safetensors", {**state, "lr": 0.1})
    with pytest.raises(TypeError):
        save(tmp_path / "a.safetensors", state, {"what": object()})
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------ round trips


def test_round_trip(tmp_path, state):
    path = tmp_path / "a.safetensors"
    copies = {k: v.clone() for k, v in state.items()}
    save(path, state)
    same(load(path), state)
    same(load(str(path)), state)
    same(load_file(path), state)  # any other reader can open it
    same(state, copies)


def test_shared_strided_and_trained_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base,
        "tied": base,
        "part": base[1:],
        "transposed": base.T,
        "row": base[:1].expand(5, 4),
        "last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "trained": torch.nn.Parameter(base.clone()),
    }
    save(tmp_path / "a.safetensors", state)
    loaded = load(tmp_path / "a.safetensors")
    same(loaded, {k: v.detach() for k, v in state.items()})
    loaded["a"].zero_()
    assert torch.equal(loaded["tied"], base)


def test_metadata(tmp_path, state):
    metadata = {"options": {"alpha": 0.3, "method": "zip", "inputs": ["a", "b"]}, "plan": 'äö\n"{', "none": None}
    save(tmp_path / "a.safetensors", state, metadata)
    assert read_metadata(tmp_path / "a.safetensors") == metadata
    save(tmp_path / "b.safetensors", state)
    assert read_metadata(tmp_path / "b.safetensors") == {}
    save_file(state, tmp_path / "others.safetensors")
    assert read_metadata(tmp_path / "others.safetensors") == {}
    save_file(state, tmp_path / "hf.safetensors", metadata={"format": "pt"})
    assert read_metadata(str(tmp_path / "hf.safetensors")) == {}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("nested", [False, True])
def test_reads_plain_pickles(tmp_path, state, suffix, nested):
    path = tmp_path / f"a{suffix}"
    torch.save({"state_dict": state, "epoch": 3} if nested else state, path)
    same(load(path), state)


def test_reads_a_module_state_dict(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    net.load_state_dict(load(tmp_path / "a.pt"))
    save(tmp_path / "a.safetensors", net.state_dict())
    net.load_state_dict(load(tmp_path / "a.safetensors"))


# ------------------------------------------------------------------------------------------ files to refuse


class Malicious:
    """Unpickled by a reader that runs code, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_code_is_not_run(tmp_path, suffix, how):
    trap, path = tmp_path / "trap", tmp_path / f"a{suffix}"
    payload = {"w": torch.ones(2), "x": Malicious(trap)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match=r"cannot be read as plain tensors .*never runs code from a checkpoint"):
        load(path)
    assert not trap.exists()
    if how == "torch" and suffix == ".pt":  # the trap works
        torch.load(path, weights_only=False)
        assert trap.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt cannot be .* \(it would run torch\.nn\.modules\.linear\.Linear\);"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged(tmp_path, state, suffix, damage):
    path = tmp_path / f"a{suffix}"
    save(path, state) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"\x07" * 300}[damage])
    with pytest.raises(ValueError, match=rf"load: .*a\{suffix} cannot be read as plain tensors \(.+\)"):
        load(path)


def test_missing_and_unknown(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"load: no checkpoint at {path}"):
            load(path)
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.ckpt must end in .safetensors, .pt, .pth, .bin, got '.ckpt'"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content, kind", [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), ({"epoch": 3}, "dict")]
)
def test_not_a_state_dict(tmp_path, content, kind):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt must hold a state dict \(names and tensors\), got {kind}"):
        load(tmp_path / "a.pt")


def test_metadata_of_a_damaged_file_names_it(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x07" * 300)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_metadata(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------ hash


def test_hash_is_of_the_content(state):
    wanted = state_hash(state)
    assert len(wanted) == 64 and int(wanted, 16)
    assert state_hash({k: state[k].clone() for k in reversed(state)}) == wanted
    strided = torch.zeros(3, 8)
    strided[:, ::2] = state["w"]
    assert state_hash({**state, "w": strided[:, ::2]}) == wanted
    assert state_hash({**state, "w": torch.nn.Parameter(state["w"])}) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["w"][2, 3].add_(1e-6),
        lambda s: s["half"][0].neg_(),
        lambda s: s["count"].add_(1),
        lambda s: s["mask"].logical_not_(),
        lambda s: s.update(v=s.pop("w")),
        lambda s: s.update(w=s["w"].reshape(4, 3)),
        lambda s: s.update(w=s["w"].T.contiguous()),
        lambda s: s.update(w=s["w"].view(torch.int32)),
        lambda s: s.update(brain=s["brain"].view(torch.float16)),
        lambda s: s.update(w=s["w"].double()),
        lambda s: s.update(empty=torch.zeros(3, 0)),
        lambda s: s.pop("count"),
        lambda s: s.update(more=torch.zeros(0)),
    ],
)
def test_hash_notices(state, change):
    before = state_hash(state)
    change(state)
    assert state_hash(state) != before


def test_hash_survives_a_round_trip(tmp_path, state):
    save(tmp_path / "a.safetensors", state)
    assert state_hash(load(tmp_path / "a.safetensors")) == state_hash(state)


def test_hash_is_stable():
    """Over versions and platforms: it is written into metadata."""
    content = b"v|torch.int64|()|" + struct.pack("<q", 7) + b"w|torch.float32|(3,)|" + struct.pack("<3f", 0, 1, 2)
    state = {"w": torch.arange(3.0), "v": torch.tensor(7)}
    assert state_hash(state) == hashlib.sha256(content).hexdigest()
