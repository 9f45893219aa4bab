# SPDX-License-Identifier: Apache-2.0
"""What can be ranked: models by name, modules, factories, and features that were saved before."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..features import batch_labels
from .extract import load_candidate
from .targets import as_features, as_tensor

FEATURE_KEYS = ("features", "x")
LABEL_KEYS = ("labels", "y")

Candidate: TypeAlias = str | nn.Module | Callable[[], nn.Module] | tuple[Any, Any]


@dataclass(frozen=True)
class Source:
    """A candidate, told apart: where features come from, and what the journal calls that."""

    name: str
    origin: str
    model: Callable[[], nn.Module] | None = None
    arrays: Callable[[], tuple[Tensor, Any]] | None = None
    stamp: str = ""  # sizes and dates of its files: a file written anew is another candidate


def sources_of(models: Mapping[str, Candidate] | Iterable[str], load: Callable[[str], nn.Module]) -> list[Source]:
    """One per candidate.

    Raises:
        TypeError: something that is no candidate. ValueError: none, or one name twice.
    """
    if isinstance(models, str):
        models = [models]
    pairs = list(models.items()) if isinstance(models, Mapping) else [_named(spec) for spec in models]
    if not pairs:
        raise ValueError("rank: 'models' must hold at least one candidate, got none")
    names = [name for name, _ in pairs]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"rank: 'models' must have names of their own, got {sorted(double)[0]!r} twice; use NAME=SPEC")
    return [_source(name, given, load) for name, given in pairs]


def _named(spec: Any) -> tuple[str, str]:
    if not isinstance(spec, str):
        raise TypeError(
            f"rank: 'models' must be a mapping of names or a list of texts, got a {type(spec).__name__} in a list"
        )
    name, equals, rest = spec.partition("=")
    if Path(spec).expanduser().exists():  # a file may have a = in its name
        return spec, spec
    return (name, rest) if equals and name and "/" not in name else (spec, spec)


def _source(name: str, given: Candidate, load: Callable[[str], nn.Module]) -> Source:
    if isinstance(given, nn.Module):
        origin = f"{type(given).__name__} {checkpoint.state_hash(_tensors(given))[:16]}"
        return Source(name, origin, model=lambda: given)
    if isinstance(given, (str, os.PathLike)):
        spec = os.fspath(given)
        if is_features(spec):
            return Source(name, spec, arrays=lambda: load_features(spec), stamp=_stamp(spec))
        return Source(name, spec, model=lambda: load(spec), stamp=_stamp(spec))
    if isinstance(given, tuple) and len(given) == 2:
        return Source(name, "arrays", arrays=lambda: (as_features("rank", given[0]), given[1]))
    if callable(given):
        return Source(name, getattr(given, "__qualname__", type(given).__name__), model=given)
    raise TypeError(
        f"rank: a candidate must be a text, a torch module, a function that makes one, or (features, labels), "
        f"got {type(given).__name__} for {name!r}"
    )


def _stamp(spec: str) -> str:
    """Sizes and dates of the files that a spec names; empty if it names none."""
    path = Path(spec.rpartition("@")[2].removeprefix("hf:")).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return " ".join(f"{name}:{size}:{date}" for name, size, date in facts)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}


def is_features(spec: str) -> bool:
    """Whether a text names saved features: .npy, .npz, or a .safetensors with a tensor called features or x."""
    if spec.endswith((".npy", ".npz")):
        return True
    if not spec.endswith(".safetensors") or not Path(spec).expanduser().is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(spec).expanduser(), framework="pt") as file:
            return any(key in file.keys() for key in FEATURE_KEYS)  # noqa: SIM118  (it is no dict)
    except SafetensorError:
        return False  # no such file: whoever loads it as a checkpoint says so by name


def load_features(path: str) -> tuple[Tensor, Any]:
    """Features [N, D], and labels or None, from .npy, .npz or .safetensors; nothing is unpickled.

    Raises:
        FileNotFoundError: nothing there. ValueError: not such a file, or without features.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"rank: no features at {source}")
    found: dict[str, Any]
    try:
        if source.suffix == ".safetensors":
            found = dict(checkpoint.load(source))
        elif source.suffix == ".npy":
            found = {"features": np.load(source, allow_pickle=False)}
        else:
            with np.load(source, allow_pickle=False) as file:
                found = dict(file)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"rank: {source} must hold arrays of numbers, got {' '.join(str(e).split())[:100]}") from None
    features = next((found[key] for key in FEATURE_KEYS if key in found), None)
    if features is None:
        raise ValueError(f"rank: {source} must hold an array called features or x, got {', '.join(found) or 'none'}")
    labels = next((found[key] for key in LABEL_KEYS if key in found), None)
    return as_features("rank", features), labels


def labelled(batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    """Each batch with its labels: the second item of a pair, or the entry called labels of a mapping (then left out).

    Raises:
        ValueError: a batch without labels.
    """
    for batch in batches:
        labels = batch_labels(batch)
        inputs = batch if labels is None else batch[0]
        if labels is None and isinstance(batch, Mapping) and "labels" in batch:
            labels, inputs = batch["labels"], {key: value for key, value in batch.items() if key != "labels"}
        if labels is None:
            raise ValueError("rank: 'batches' must hold labels beside the inputs, got none")
        yield inputs, as_tensor("rank", "labels", labels)


def parameters_of(model: nn.Module) -> int:
    """How many numbers a model is trained on; those that are shared count once."""
    return sum(p.numel() for p in model.parameters())


__all__ = [
    "Candidate",
    "Source",
    "is_features",
    "labelled",
    "load_candidate",
    "load_features",
    "parameters_of",
    "sources_of",
]


def stacked(parts: list[Tensor]) -> Tensor:
    """Batches of features as one matrix."""
    return torch.cat(parts) if len(parts) != 1 else parts[0]
