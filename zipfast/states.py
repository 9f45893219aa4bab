# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are read piece by piece: headers first, data only when asked for, never as code.

A :class:`State` is a named list of tensors: a .safetensors file, a Hugging Face folder of shards, a .pt/.pth/.bin file, or a
state dict in memory. `read` gives any run of elements of a tensor, into a buffer of the caller's where there is one, so that
hundreds of checkpoints can be combined in the memory of a few buffers. Files are read by `pread`, not mapped: a file that is
cut off, or on a network, is an error and not a crash.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import METADATA_KEY, why_unreadable

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100 << 20  # bytes; safetensors' own limit
PICKLES = (".pt", ".pth", ".bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
# Weights that only other programs read, by the end of the file's name.
FOREIGN = {
    "tf_model.h5": "TensorFlow", ".h5": "Keras", ".keras": "Keras", ".ckpt.index": "TensorFlow", ".pb": "TensorFlow",
    ".tflite": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".gguf": "llama.cpp", ".ggml": "llama.cpp",
}  # fmt: skip


def foreign(path: str | os.PathLike[str]) -> str | None:
    """What a file, or a file in a folder, belongs to that holds weights of another framework, in words; None: there is none.

    Example:
        >>> foreign("model/tf_model.h5")
        'tf_model.h5 of TensorFlow; save the model from PyTorch as safetensors'
    """
    place = Path(path)
    for name in sorted(file.name for file in place.iterdir()) if place.is_dir() else [place.name]:
        of = next((kind for end, kind in FOREIGN.items() if name.endswith(end)), None)
        if of is not None:
            return f"{name} of {of}; save the model from PyTorch as safetensors"
    return None


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class State:
    """Tensors by name, read on demand.

    Attributes:
        name: the file or folder, for messages.
        entries: dtype and shape of each tensor, in the order of the file.
        ties: names that share another's memory -> that one.
        metadata: the file's own, as texts.
        notes: what had to be done to read it, in words.
        module: whose weights they are, if it was opened from a module.
    """

    def __init__(self, name: str, entries: Mapping[str, Entry]) -> None:
        self.name, self.entries = name, dict(entries)
        self.ties: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.notes: list[str] = []
        self.module: nn.Module | None = None

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        """Elements [start, stop) of a tensor, flat.

        Args:
            into: a contiguous CPU tensor of the entry's dtype with room for them; the result is a view of it. Without it, or
                where the data lies in memory already, the result may share memory with the state: do not write to it.

        Raises:
            ValueError: the file ends before.
        """
        raise NotImplementedError

    def tensor(self, key: str) -> Tensor:
        """A whole tensor; do not write to it."""
        return self.read(key).reshape(self.entries[key].shape)

    def load(self) -> dict[str, Tensor]:
        """All of it, as a state dict; tied names share memory."""
        found = {key: self.tensor(key) for key in self.entries if key not in self.ties}
        return {key: found[self.ties.get(key, key)] for key in self.entries}

    def close(self) -> None:
        """Let go of files."""

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_state(source: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | State, name: str = "") -> State:
    """A checkpoint as a :class:`State`.

    Args:
        source: a .safetensors, .pt, .pth or .bin file; a folder with model.safetensors(.index.json) or pytorch_model.bin
            (.index.json), or with a LoRA adapter of PEFT; a state dict; a module; or a State, which is returned.
        name: what messages call a state dict.

    Raises:
        FileNotFoundError: nothing there. ValueError: not a checkpoint, damaged (with the bytes wanted and got), or one that
            would need code to be run. TypeError: something else.

    Example:
        >>> state = open_state({"w": torch.arange(6.0).reshape(2, 3)}, "mine")
        >>> state.entries["w"].shape, state.read("w", 2, 4).tolist()
        ((2, 3), [2.0, 3.0])
    """
    if isinstance(source, State):
        return source
    if isinstance(source, nn.Module):
        state = _Memory(source.state_dict(keep_vars=False), name or type(source).__name__)
        state.module = source
        return state
    if isinstance(source, Mapping):
        return _Memory(source, name or "state dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"open_state: 'source' must be a path, a state dict or a module, got {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_dir():
        for index in INDEXES:
            if (path / index).is_file():
                return _Sharded(path / index)
        for single in SINGLES:
            if (path / single).is_file():
                return open_state(path / single)
        if (path / "adapter_config.json").is_file():
            from .soups.adapters import Adapter

            return Adapter(path)
        got = foreign(path) or "none of them"
        raise FileNotFoundError(f"open_state: {path} must hold {', '.join((*SINGLES, *INDEXES))}, got {got}")
    if not path.is_file():
        raise FileNotFoundError(f"open_state: no checkpoint at {path}")
    if path.name.endswith(".index.json"):
        return _Sharded(path)
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix in PICKLES:
        return _Pickle(path)
    got = foreign(path) or repr(path.suffix)
    raise ValueError(f"open_state: {path} must end in .safetensors, {', '.join(PICKLES)}, got {got}")


class _Memory(State):
    def __init__(self, state: Mapping[str, Any], name: str) -> None:
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"open_state: {name} must hold tensors, got {type(value).__name__} at {key!r}")
        super().__init__(name, {key: Entry(value.dtype, tuple(value.shape)) for key, value in state.items()})
        self.state = {key: value.detach() for key, value in state.items()}
        seen: dict[tuple[Any, ...], str] = {}
        for key, value in self.state.items():
            if value.numel():
                place = (value.device, value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype)
                if place in seen:
                    self.ties[key] = seen[place]
                seen.setdefault(place, key)

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        flat = self.state[key].reshape(-1)[start:stop]
        here: Tensor = flat if flat.device.type == "cpu" else flat.cpu()
        return here


class _Pickle(_Memory):
    """torch's own files, mapped where they are new enough, as plain tensors only."""

    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except Exception as e:  # torch.load raises whatever the file makes it raise
            raise ValueError(
                f"open_state: {path} cannot be read as plain tensors ({why_unreadable(e)}); code in a checkpoint is never "
                "run: save its state_dict() as .safetensors"
            ) from e
        note = None
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            loaded, note = loaded["state_dict"], "its state_dict was taken"
        if not isinstance(loaded, Mapping):
            raise ValueError(f"open_state: {path} must hold a state dict, got {type(loaded).__name__}")
        super().__init__(loaded, str(path))
        if note is not None:
            self.notes.append(f"{path}: {note}")


def _bytes(flat: Tensor) -> memoryview:
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else bytearray()
    return memoryview(array)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


class _Safetensors(State):
    """Own reader of the header, so that every number in it is checked before it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        try:
            header, self.begin, size = self._header()
            entries, self.offsets = {}, {}
            for key, value in header.items():
                if key == "__metadata__":
                    continue
                entries[key], self.offsets[key] = self._entry(key, value, size)
            super().__init__(str(path), entries)
            self.metadata = dict(header.get("__metadata__") or {})
            order = sorted(self.offsets, key=lambda key: self.offsets[key])
            for key, after in pairwise(order):
                end = self.offsets[key] + entries[key].nbytes
                if end > self.offsets[after]:
                    raise ValueError(f"open_state: {path} is damaged: tensors {key!r} and {after!r} overlap")
        except BaseException:
            os.close(self.file)
            raise

    def _header(self) -> tuple[dict[str, Any], int, int]:
        total = os.fstat(self.file).st_size
        head = os.pread(self.file, 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(LARGEST_HEADER, total - 8):
            raise ValueError(
                f"open_state: {self.path} is no safetensors file or is cut off: its header says {length} bytes, "
                f"the file has {total}"
            )
        try:
            header = json.loads(os.pread(self.file, length, 8))
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except (ValueError, UnicodeDecodeError) as e:
            raise ValueError(f"open_state: {self.path} is no safetensors file: its header is not JSON ({e})") from None
        return header, 8 + length, total - 8 - length

    def _entry(self, key: str, value: Any, size: int) -> tuple[Entry, int]:
        try:
            kind, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"open_state: {self.path} is damaged: the header of tensor {key!r} is {value!r}")
        if kind not in DTYPES:
            raise ValueError(f"open_state: {self.path} holds {key!r} as {kind}; plain {', '.join(DTYPES)} can be read")
        entry = Entry(DTYPES[kind], shape)
        if end - start != entry.nbytes:
            raise ValueError(
                f"open_state: {self.path} is damaged: tensor {key!r} needs {entry.nbytes} bytes, its header says "
                f"{end - start}"
            )
        if end > size:
            raise ValueError(
                f"open_state: {self.path} is cut off: tensor {key!r} ends at byte {end}, the data has {size}"
            )
        return entry, start

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        entry = self.entries[key]
        stop = entry.numel if stop is None else min(stop, entry.numel)
        count = max(0, stop - start)
        buffer = torch.empty(count, dtype=entry.dtype) if into is None else into.view(-1)[:count]
        data = _bytes(buffer)
        at, done = self.begin + self.offsets[key] + start * entry.dtype.itemsize, 0
        while done < len(data):
            got = os.preadv(self.file, [data[done:]], at + done)
            if got <= 0:
                raise ValueError(
                    f"open_state: {self.path} is cut off: tensor {key!r} wants {len(data)} bytes at {at}, got {done}"
                )
            done += got
        return buffer

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # half made, or at the interpreter's end
            self.close()


class _Sharded(State):
    """A Hugging Face index and its files."""

    def __init__(self, index: Path) -> None:
        try:
            places = json.loads(index.read_text())["weight_map"]
            files = sorted({str(file) for file in places.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"open_state: {index} must hold a weight_map, got {type(e).__name__}: {e}") from None
        if bad := [file for file in files if Path(file).name != file]:
            raise ValueError(f"open_state: {index} must name files beside it, got {bad[0]!r}")
        self.parts = {file: open_state(index.parent / file) for file in files}
        missing = [key for key, file in places.items() if key not in self.parts[str(file)].entries]
        if missing:
            raise ValueError(
                f"open_state: {index} names {missing[0]!r} in {places[missing[0]]}, which does not hold it"
            )
        self.place = {key: self.parts[str(file)] for key, file in places.items()}
        super().__init__(str(index.parent), {key: part.entries[key] for key, part in self.place.items()})
        for part in self.parts.values():
            self.ties |= {a: b for a, b in part.ties.items() if a in self.place and b in self.place}
            self.notes += part.notes
            self.metadata |= part.metadata

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        return self.place[key].read(key, start, stop, into)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


# --------------------------------------------------------------------------------------------------------------- writing


class Writer:
    """A .safetensors file that is filled piece by piece and appears whole, or not at all; see :func:`writing`."""

    def __init__(self, file: int, offsets: Mapping[str, int], entries: Mapping[str, Entry]) -> None:
        self.file, self.offsets, self.entries = file, offsets, entries

    def write(self, key: str, start: int, piece: Tensor) -> None:
        """Elements of a tensor from `start` on, in the dtype that was announced."""
        entry = self.entries[key]
        if piece.dtype != entry.dtype or start + piece.numel() > entry.numel:
            raise ValueError(
                f"Writer: '{key}' must get {entry.dtype} elements up to {entry.numel}, got {piece.dtype} up to "
                f"{start + piece.numel()}"
            )
        data = _bytes(piece.detach().contiguous().view(-1))
        at, done = self.offsets[key] + start * entry.dtype.itemsize, 0
        while done < len(data):
            done += os.pwrite(self.file, data[done:], at + done)


def check_room(path: str | os.PathLike[str], size: int) -> None:
    """Fail now where so many bytes would not fit at ``path``.

    Raises:
        OSError: with the bytes needed and free.
    """
    there = os.statvfs(Path(path).parent or ".")
    free = there.f_bavail * there.f_frsize
    if size > free:
        raise OSError(f"cannot write {path}: it needs {size:,} bytes, {free:,} are free")


@contextmanager
def writing(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], metadata: Mapping[str, Any] | None = None
) -> Iterator[Writer]:
    """A safetensors file of these tensors, under its name at the end of the block.

    Raises:
        OSError: the folder cannot be written, or has not enough room: nothing is left then. ValueError: another ending, or a
            dtype that the format has not.
    """
    from .checkpoint import atomic_path, check_writable

    check_writable(path)
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True)}
    }
    at, offsets = 0, {}
    for key, entry in entries.items():
        if entry.dtype not in NAMES:
            raise ValueError(f"writing: '{key}' must be of a dtype that safetensors has, got {entry.dtype}")
        header[key] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.nbytes]}
        offsets[key] = at
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    check_room(path, begin + at)
    with atomic_path(path) as temporary:
        file = os.open(temporary, os.O_WRONLY)
        try:
            os.ftruncate(file, begin + at)
            os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
            yield Writer(file, {key: begin + offset for key, offset in offsets.items()}, entries)
        finally:
            os.close(file)
