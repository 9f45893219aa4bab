# SPDX-License-Identifier: Apache-2.0
"""What a soup is made of, whole checkpoints or adapters, behind one face: what fits, what each is, and their average."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..states import INDEXES, SINGLES, State, open_state
from .adapters import CONFIG, Adapted, Adapter, check_adapters, concatenated, is_adapter, separated, write_adapter
from .mix import SHARD, Layout, layout_of, mix

HASHED = 1 << 20  # bytes at a time


class Whole:
    """Checkpoints of one architecture.

    Attributes:
        states: of the sources, in order. notes: what a user should know.
    """

    config: dict[str, Any] | None = None

    def __init__(self, states: Sequence[State], layout: Layout, int_policy: str, name: str) -> None:
        self.states, self.layout, self.int_policy, self.name = list(states), layout, int_policy, name
        self.notes: tuple[str, ...] = layout.notes

    def mix(
        self,
        members: Sequence[int],
        column: Tensor,
        *,
        out: str | os.PathLike[str] | None = None,
        shard_bytes: int = SHARD,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor] | None:
        """The weighted sum of some of them; column float64 [members]. The state dict, or None where it was written."""
        return mix(
            [self.states[i] for i in members], column, layout=self.layout, out=out, int_policy=self.int_policy,
            shard_bytes=shard_bytes, metadata=metadata, name=self.name,
        )  # fmt: skip

    def alone(self, i: int) -> dict[str, Tensor]:
        """One of them, as it is."""
        return self.states[i].load()

    def fingerprints(self) -> list[str]:
        """A name for the weights of each."""
        return [fingerprint(state) for state in self.states]

    def twins(self) -> list[str]:
        """A note for each pair of sources with the same weights."""
        return twins(self.states, self.layout)


class Adapters(Whole):
    """LoRA adapters of one base: their average is an adapter, or, with the base's weights, a whole model.

    Attributes:
        config: of the adapter that `mix` made last.
    """

    def __init__(
        self,
        states: Sequence[Adapter],
        base: State | None,
        *,
        separate: bool,
        out_dtype: torch.dtype | None,
        notes: Sequence[str],
        name: str,
    ) -> None:
        self.adapters, self.base, self.separate, self.out_dtype, self.name = states, base, separate, out_dtype, name
        self.states, self.notes = list(states), tuple(notes)

    def mix(
        self,
        members: Sequence[int],
        column: Tensor,
        *,
        out: str | os.PathLike[str] | None = None,
        shard_bytes: int = SHARD,
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor] | None:
        chosen = [self.adapters[i] for i in members]
        if self.base is not None:
            model = Adapted(self.base, chosen, column, name=self.name)
            layout = layout_of([model], out_dtype=self.out_dtype, name=self.name)
            one = torch.ones(1, dtype=torch.float64)
            return mix([model], one, layout=layout, out=out, shard_bytes=shard_bytes, metadata=metadata, name=self.name)
        if self.separate:
            tensors, self.config, note = separated(chosen, column, self.out_dtype, name=self.name)
            self.notes = (*self.notes, note)
        else:
            tensors, self.config = concatenated(chosen, column, self.out_dtype)
        if out is None:
            return tensors
        write_adapter(out, tensors, self.config, metadata)
        return None

    def alone(self, i: int) -> dict[str, Tensor]:
        found = self.mix([i], torch.ones(1, dtype=torch.float64))
        assert found is not None
        return found

    def fingerprints(self) -> list[str]:
        base = "" if self.base is None else fingerprint(self.base)
        found = []
        for adapter in self.adapters:
            scales = sorted((module, pair.scale) for module, pair in adapter.pairs.items())
            text = f"{base}|{fingerprint(adapter)}|{scales}"
            found.append(hashlib.sha256(text.encode()).hexdigest()[:16])
        return found

    def twins(self) -> list[str]:
        return _same(self.states, self.fingerprints())


def gather(
    sources: Sequence[Any],
    *,
    base: Any = None,
    separate: bool = False,
    weighted: Tensor | None = None,
    include: str | None = None,
    exclude: str | None = None,
    out: str | os.PathLike[str] | None = None,
    out_dtype: torch.dtype | None = None,
    int_policy: str = "equal",
    name: str,
) -> Whole:
    """Open the sources and check that they fit together.

    Raises:
        ValueError: adapters beside whole checkpoints; options that are for the other kind; what does not fit; a folder with
        an adapter for a whole model, or the other way round: ``from_pretrained`` would add one to the other.
    """
    if isinstance(sources, (str, os.PathLike, Mapping)):
        sources = [sources]
    states = [open_state(source, f"model {i}") for i, source in enumerate(sources)]
    adapters = [state for state in states if isinstance(state, Adapter)]
    if out is not None:
        whole_out, there = not adapters or base is not None, Path(out).expanduser()
        other = (CONFIG,) if whole_out else (*SINGLES, *INDEXES)
        if beside := [file for file in other if (there / file).is_file()]:
            kinds = ("a whole model", "an adapter") if whole_out else ("an adapter", "a whole model")
            raise ValueError(f"{name}: 'out' must be free for {kinds[0]}, got {there} with {beside[0]} of {kinds[1]}")
    if not adapters:
        for option, value in (("base", base), ("separate", separate or None)):
            if value is not None:
                raise ValueError(f"{name}: '{option}' must be left out for whole checkpoints, got {value!r}")
        layout = layout_of(states, include=include, exclude=exclude, out_dtype=out_dtype, name=name)
        return Whole(states, layout, int_policy, name)
    if len(adapters) < len(states):
        whole = next(state for state in states if not isinstance(state, Adapter))
        raise ValueError(
            f"{name}: models must be adapters or whole checkpoints, got {adapters[0].name} and {whole.name}; "
            "zipfast.soups.adapted(base, adapter) makes a whole one"
        )
    for option, text in (("include", include), ("exclude", exclude)):
        if text is not None:
            raise ValueError(f"{name}: '{option}' must be left out for adapters, got {text!r}")
    if separate and base is not None:
        raise ValueError(f"{name}: 'separate' must be left out with a base, into which the changes are merged exactly")
    if base is None and out is not None and Path(out).suffix == ".safetensors":
        raise ValueError(f"{name}: 'out' must be a folder for an adapter, got {os.fspath(out)!r}")
    if is_adapter(base):
        raise ValueError(f"{name}: 'base' must be a whole checkpoint, got the adapter {base}")
    start = None if base is None else open_state(base, "base")
    normalized = weighted is None or abs(float(weighted.sum()) - 1) < 1e-6
    notes = check_adapters(adapters, based=start is not None, normalized=normalized, out_dtype=out_dtype, name=name)
    if start is not None:
        Adapted(start, adapters, torch.full((len(adapters),), 1 / len(adapters), dtype=torch.float64), name=name)
    return Adapters(adapters, start, separate=separate, out_dtype=out_dtype, notes=notes, name=name)


def adapted(base: Any, adapter: Any) -> State:
    """A base with an adapter merged into it, as a checkpoint that every recipe takes; nothing is written.

    Args:
        base: a checkpoint (:func:`zipfast.states.open_state`). adapter: a folder of PEFT.

    Raises:
        ValueError: no adapter; modules that the base has not.

    Cost: the adapter in memory; each weight is formed in float32 when it is read, and rounded once to the base's dtype.
    """
    change = open_state(adapter)
    if not isinstance(change, Adapter):
        raise ValueError(f"adapted: 'adapter' must be a folder with a LoRA adapter of PEFT, got {change.name}")
    return Adapted(open_state(base, "base"), [change], torch.ones(1, dtype=torch.float64))


def fingerprint(state: State) -> str:
    """Names one set of weights: :func:`zipfast.checkpoint.state_hash`, cut to 16 letters, in the memory of one piece."""
    digest = hashlib.sha256()
    for key in sorted(state.entries):
        entry = state.entries[key]
        digest.update(f"{key}|{entry.dtype}|{entry.shape}|".encode())
        step = HASHED // entry.dtype.itemsize
        for start in range(0, entry.numel, step):
            piece = state.read(key, start, start + step).contiguous()
            digest.update(piece.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def twins(states: Sequence[State], layout: Layout) -> list[str]:
    """A note for each pair of sources with the same weights: they count twice. Looked for where a first tensor is equal."""
    if not layout.blended or len(states) < 2:
        return []
    key = max(layout.blended, key=lambda k: layout.entries[k].numel)
    first: dict[bytes, int] = {}
    found = []
    for i, state in enumerate(states):
        start = state.read(key, 0, 4096).contiguous()
        data = bytes(start.view(torch.uint8).numpy().tobytes()) if start.numel() else b""
        j = first.setdefault(data, i)
        if j != i and fingerprint(state) == fingerprint(states[j]):
            found.append(f"{state.name} holds the same weights as {states[j].name}: it counts twice")
    return found


def _same(states: Sequence[State], prints: Sequence[str]) -> list[str]:
    return [
        f"{states[i].name} holds the same weights as {states[prints.index(text)].name}: it counts twice"
        for i, text in enumerate(prints)
        if prints.index(text) != i
    ]
