# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints without ever running code from them, and writing them whole or not at all.

Writing goes to a temporary file in the same folder, which is flushed to disk and then renamed: whoever reads the name
sees the old file or the new one, also after a crash. Reading takes .safetensors, and .pt/.pth with weights only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

METADATA_KEY = "zipfast"


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """A file object whose contents appear under ``path`` at the end of the block, all at once.

    Raises:
        OSError: the folder cannot be written; the message names the path. An exception inside the block leaves the
            old file, and no temporary one.
    """
    with atomic_path(path) as temporary, open(temporary, mode) as file:
        yield file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """As `atomic_write`, for writers that want a path: that of a temporary file in the same folder."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as e:
        raise OSError(f"cannot write {target}: {e.strerror}; choose a folder that exists and is writable") from e
    try:
        os.close(handle)
        yield temporary
        sync(temporary)
        umask = os.umask(0)  # mkstemp makes the file private; a checkpoint gets the usual rights
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync(target.parent)  # the rename itself must reach the disk too


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name at the end of the block; on an exception it is deleted.

    Raises:
        OSError: the folder above cannot be written, or `path` is there already.
    """
    target = Path(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail now, before long work, if :func:`save` could not write ``path``; leaves nothing behind.

    Raises:
        ValueError: another ending than .safetensors. OSError: names the path and the reason.
    """
    target = Path(path)
    if target.is_dir():
        raise OSError(f"cannot write {target}: it is a folder; give a file name")
    if target.suffix != ".safetensors":
        raise ValueError(f"save: 'path' must end in .safetensors, got {os.fspath(path)!r}")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as e:
        raise OSError(f"cannot write {target}: {e.strerror}; choose a folder that exists and is writable") from e


def check_folder(path: str | os.PathLike[str]) -> None:
    """Fail now, before long work, if a folder of results could not be written at ``path``; leaves nothing behind.

    Raises:
        OSError: it is a file, or it and the folder above it cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OSError(f"cannot write {target}: it is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=target if target.is_dir() else target.parent):
            pass
    except OSError as e:
        raise OSError(f"cannot write {target}: {e.strerror}; choose a folder that exists and is writable") from e


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors, atomically.

    Args:
        path: ends in .safetensors.
        tensors: by name; tensors that share memory are written once each, under all their names.
        metadata: anything JSON can hold; kept under the key "zipfast" of the file's header.

    Raises:
        ValueError: another ending. TypeError: a value is not a tensor. OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    check_writable(path)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"save: '{name}' must be a tensor, got {type(value).__name__}")
    plain, seen = {}, set[int]()
    for name, value in tensors.items():
        own = value.detach().cpu().contiguous()
        start = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if start in seen or own.untyped_storage().nbytes() != own.nbytes else own
        seen.add(start)
    header = {"format": "pt", METADATA_KEY: json.dumps(dict(metadata or {}), sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, header)


def why_unreadable(e: Exception) -> str:
    """What a reader met in a file, in a few words."""
    told = str(e).strip() or type(e).__name__
    named = re.search(r"GLOBAL ([\w.]+)", told)
    # torch's own first sentence advises to run the file's code; what it met stands behind.
    met = re.search(r"WeightsUnpickler error: *(.+)", told)
    return f"it would run {named[1]}" if named else met[1] if met else told.splitlines()[0]


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pt/.pth/.bin without running any code in it.

    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint, of an unknown kind, damaged, or one that needs
            code to be run; the message names the file.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"load: no checkpoint at {source}")
    readers: dict[str, Callable[[], Any]] = {
        ".safetensors": lambda: _load_safetensors(source, device),
        **dict.fromkeys((".pt", ".pth", ".bin"), lambda: torch.load(source, map_location=device, weights_only=True)),
    }
    if source.suffix not in readers:
        raise ValueError(f"load: {source} must end in {', '.join(readers)}, got {source.suffix!r}")
    try:
        state = readers[source.suffix]()
    except Exception as e:
        raise ValueError(
            f"load: {source} cannot be read as plain tensors ({why_unreadable(e)}); zipfast never runs code from a "
            "checkpoint: save its state_dict() as .safetensors"
        ) from e
    if isinstance(state, Mapping) and "state_dict" in state and isinstance(state["state_dict"], Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"load: {source} must hold a state dict (names and tensors), got {type(state).__name__}")
    return dict(state)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`save` was given as metadata; empty for files of others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"read_metadata: {path} cannot be read as safetensors ({e})") from e
    try:
        found = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError as e:
        raise ValueError(f"read_metadata: {path} has a damaged header ({e})") from None
    return found if isinstance(found, dict) else {}


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names: says which weights went in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_safetensors(source: Path, device: str | torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(source, device=str(device))
