# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of many checkpoints, in the memory of a few buffers.

Everything that can be wrong is found from the headers, and said in one message, before any data is read. Then pieces of all
models are read, summed by ``blend_`` and written: k models of any size need 16 MB of buffers and no more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..ops import blend_
from ..ops.blend import FINITE
from ..pretrained import copy_companions, folder_of, is_pretrained, write_config
from ..states import INDEXES, SINGLES, Entry, State, check_room, open_state, writing
from .adapters import Adapter

BUFFERS = 16 << 20  # bytes, for pieces of all models together: they stay in the cache between reading and writing
SHARD = 5_000_000_000  # bytes, as Hugging Face cuts
SHARDS = "model-*-of-*.safetensors"
SMALLEST = 16384  # elements of a piece
SHOWN = 5  # problems of a kind that a message names
COUNTERS = "num_batches_tracked"
RUNNING = ("running_mean", "running_var")
INT_POLICIES = ("equal", "first", "max", "sum")


@dataclass(frozen=True)
class Layout:
    """What will be mixed, copied and written, from the headers alone.

    Attributes:
        blended: floating tensors that are summed. copied: taken from the first model (excluded by name, or whole numbers).
        ties: names that are one tensor in every model -> the one that is written.
        entries: dtype and shape of the result.
        notes: what a user should know.
    """

    blended: tuple[str, ...]
    copied: tuple[str, ...]
    ties: dict[str, str]
    entries: dict[str, Entry]
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def layout_of(
    states: Sequence[State],
    *,
    include: str | None = None,
    exclude: str | None = None,
    out_dtype: torch.dtype | None = None,
    name: str = "soup",
) -> Layout:
    """Check that models can be mixed.

    Args:
        states: two or more, or one.
        include, exclude: regular expressions: only tensors with a match of the first and none of the second are mixed; the
            others are those of the first model.
        out_dtype: of the mixed tensors; None: the models' own, on which they must agree.

    Raises:
        ValueError: no model; missing or further tensors, shapes or dtypes that differ: all of them, with names and files.
    """
    if not states:
        raise ValueError(f"{name}: at least one model is needed, got none")
    if adapter := next((state for state in states if isinstance(state, Adapter)), None):
        raise ValueError(
            f"{name}: models must be whole checkpoints here, got the adapter {adapter.name}; uniform_soup and greedy_soup "
            "take adapters, and zipfast.soups.adapted(base, adapter) makes a whole one"
        )
    first, problems, notes = states[0], list[str](), [note for state in states for note in state.notes]
    for state in states[1:]:
        problems += _keys(first, state)
    shared = [key for key in first.entries if all(key in state.entries for state in states)]
    chosen = {key for key in shared if _chosen(key, include, exclude)}
    for what, text in (("include", include), ("exclude", exclude)):
        if text is not None and not any(re.search(text, key) for key in first.entries):
            problems.append(f"'{what}' {text!r} matches no tensor")
    entries: dict[str, Entry] = {}
    blended, copied, mixed = [], [], []
    for key in shared:
        own = [state.entries[key] for state in states]
        shapes = {entry.shape for entry in own}
        if len(shapes) > 1 and key in chosen:
            other = next(s for s in states if s.entries[key].shape != own[0].shape)
            problems.append(
                f"{key!r} is {list(own[0].shape)} in {first.name} and {list(other.entries[key].shape)} in {other.name}"
            )
        if key in chosen and own[0].dtype.is_floating_point:
            blended.append(key)
            dtypes = {entry.dtype for entry in own}
            if len(dtypes) > 1 and out_dtype is None:
                mixed.append(key)
            entries[key] = Entry(out_dtype or own[0].dtype, own[0].shape)
        else:
            copied.append(key)
            entries[key] = own[0]
    if mixed:
        found = sorted({str(s.entries[mixed[0]].dtype).removeprefix("torch.") for s in states})
        problems.append(f"{len(mixed)} tensors differ in dtype ({mixed[0]!r}: {', '.join(found)}): say out_dtype")
    if problems:
        raise ValueError(f"{name}: the models must have the same tensors, got: " + "; ".join(problems))
    running = [key for key in blended if key.rsplit(".", 1)[-1] in RUNNING]
    if running:
        notes.append(
            f"{len(running)} batch-norm statistics are averaged; re-estimate them (zipfast.reestimate_batchnorm)"
        )
    ties = {
        key: other
        for key, other in first.ties.items()
        if key in entries and other in entries and all(state.ties.get(key) == other for state in states)
    }
    return Layout(tuple(blended), tuple(copied), ties, entries, tuple(dict.fromkeys(notes)))


def _keys(first: State, other: State) -> list[str]:
    found = []
    for what, one, two in (("lacks", first, other), ("has besides", other, first)):
        names = [key for key in one.entries if key not in two.entries]
        if names:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            found.append(f"{other.name} {what} {shown}")
    return found


def _chosen(key: str, include: str | None, exclude: str | None) -> bool:
    return (include is None or re.search(include, key) is not None) and (
        exclude is None or re.search(exclude, key) is None
    )


def weights_of(weights: Sequence[float] | Tensor | None, models: int, *, normalize: bool, name: str) -> Tensor:
    """One weight per model, float64 [k]; by default 1/k each.

    Raises:
        ValueError: another number of them, NaN, or a sum of 0 where they are to be normalised.
    """
    if weights is None:
        return torch.full((models,), 1 / models, dtype=torch.float64)
    found = torch.as_tensor(weights, dtype=torch.float64).cpu()
    if found.shape != (models,) or not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name}: 'weights' must be {models} finite numbers, one per model, got {found.tolist()}")
    if normalize:
        total = float(found.sum())
        if abs(total) < 1e-12 * float(found.abs().sum()) or total == 0:
            raise ValueError(f"{name}: 'weights' must not add up to 0, got {found.tolist()}")
        found = found / total
    return found


@dataclass(frozen=True)
class Piece:
    """A run of elements of a tensor, and where it begins."""

    key: str
    start: int
    stop: int


def groups_of(
    keys: Sequence[str], entries: Mapping[str, Entry], models: int, buffers: int = BUFFERS
) -> Iterator[list[Piece]]:
    """Runs of tensors that are worked on together: as many as fit into the buffers, large tensors in pieces."""
    most = max(SMALLEST, buffers // (8 * (models + 1)))  # elements in a group; 8 bytes at most each
    group: list[Piece] = []
    room = most
    for key in keys:
        start, size = 0, entries[key].numel
        while start < size or size == 0:
            stop = min(size, start + room)
            group.append(Piece(key, start, stop))
            room -= stop - start
            start = stop
            if room <= 0:
                yield group
                group, room = [], most
            if size == 0:
                break
    if group:
        yield group


class Arena:
    """One block of memory, handed out in slices and taken back all at once: no page of it is asked for twice."""

    def __init__(self, size: int) -> None:
        self.memory, self.used = torch.empty(size, dtype=torch.uint8), 0

    def take(self, dtype: torch.dtype, count: int) -> Tensor:
        """Room for so many numbers; from elsewhere where the block is full."""
        begin = -(-self.used // 64) * 64
        end = begin + count * dtype.itemsize
        if end > self.memory.numel():
            return torch.empty(count, dtype=dtype)
        self.used = end
        return self.memory[begin:end].view(dtype)

    def reset(self) -> None:
        """All slices are free again."""
        self.used = 0


def read_group(states: Sequence[State], group: Sequence[Piece], arena: Arena | None = None) -> list[Tensor]:
    """The pieces of all models, those of model 0 first; in the arena, until it is reset."""
    found = []
    for state in states:
        for piece in group:
            into = None if arena is None else arena.take(state.entries[piece.key].dtype, piece.stop - piece.start)
            found.append(state.read(piece.key, piece.start, piece.stop, into))
    return found


def blend_group(
    states: Sequence[State],
    group: Sequence[Piece],
    weight: Tensor,
    out: list[Tensor],
    name: str,
    arena: Arena | None = None,
) -> None:
    """Sum the pieces of all models into `out`; weight [k, pieces].

    Raises:
        ValueError: a value that is not finite; file, tensor and place are named.
    """
    bad = torch.full((len(states) + 1, len(group)), FINITE)
    blend_(out, bad, read_group(states, group, arena), weight)
    if bool((bad != FINITE).any()):
        i, j = (int(n) for n in (bad != FINITE).nonzero()[0])
        where = f"{group[j].key!r} at flat index {group[j].start + int(bad[i, j])}"
        if i == len(states):
            raise ValueError(f"{name}: the sum must fit into {out[j].dtype}, got an overflow in {where}; say out_dtype")
        raise ValueError(f"{name}: all values must be finite, got NaN or infinity in {states[i].name}, tensor {where}")


def mix(
    sources: Sequence[Any],
    weights: Tensor | Mapping[str, Tensor],
    *,
    layout: Layout,
    out: str | os.PathLike[str] | None = None,
    int_policy: str = "equal",
    shard_bytes: int = SHARD,
    metadata: Mapping[str, Any] | None = None,
    name: str = "soup",
) -> dict[str, Tensor] | None:
    """Mix checkpoints into a new one.

    Args:
        sources: k of what :func:`zipfast.states.open_state` takes.
        weights: float64 [k], or one such for each blended tensor.
        layout: of :func:`layout_of` on them.
        out: a .safetensors file; or a folder, for shards with an index as Hugging Face reads them, with the configuration
            of the first source if that is a model of transformers, and with its tokenizer files if it is a folder; None: a
            state dict.
        int_policy: for whole numbers that differ: ``"equal"`` (an error), ``"first"``, ``"max"``, ``"sum"``; batch norm's
            counters are always those of the first model.
        shard_bytes: of a file in a folder. metadata: kept in the files.

    Returns:
        The state dict, or None where it was written.

    Raises:
        ValueError: values that are not finite (file, tensor, place); whole numbers that differ. OSError: no room.

    Cost: every input byte read once, every output byte written once; 16 MB of buffers.
    """
    if int_policy not in INT_POLICIES:
        raise ValueError(f"{name}: 'int_policy' must be one of {', '.join(INT_POLICIES)}, got {int_policy!r}")
    states = [open_state(source) for source in sources]
    keys = [key for key in layout.entries if key not in layout.ties]
    if out is None:
        found = {key: torch.empty(layout.entries[key].shape, dtype=layout.entries[key].dtype) for key in keys}
        for piece, values in _pieces(states, weights, layout, keys, int_policy, name):
            found[piece.key].view(-1)[piece.start : piece.stop] = values
        return {key: found[layout.ties.get(key, key)] for key in layout.entries}
    target = Path(out)
    if target.suffix == ".safetensors":
        _write(target, states, weights, layout, keys, int_policy, metadata, name)
        return None
    _write_shards(target, states, weights, layout, keys, int_policy, shard_bytes, metadata, name)
    return None


def _pieces(
    states: Sequence[State],
    weights: Tensor | Mapping[str, Tensor],
    layout: Layout,
    keys: Sequence[str],
    int_policy: str,
    name: str,
) -> Iterator[tuple[Piece, Tensor]]:
    """The result, piece by piece."""
    blended, arena = set(layout.blended), Arena(BUFFERS)
    for group in groups_of([key for key in keys if key in blended], layout.entries, len(states)):
        columns = [weights if isinstance(weights, Tensor) else weights[piece.key] for piece in group]
        arena.reset()
        result = [arena.take(layout.entries[piece.key].dtype, piece.stop - piece.start) for piece in group]
        blend_group(states, group, torch.stack(columns, 1), result, name, arena)
        yield from zip(group, result)
    for key in keys:
        if key not in blended:
            yield Piece(key, 0, layout.entries[key].numel), _copied(states, key, int_policy, name)


def _copied(states: Sequence[State], key: str, int_policy: str, name: str) -> Tensor:
    first = states[0].read(key)
    if first.dtype.is_floating_point or key.rsplit(".", 1)[-1] == COUNTERS or int_policy == "first":
        return first
    others = [state.read(key) for state in states[1:]]
    same = all(other.shape == first.shape and torch.equal(other, first) for other in others)
    if same and int_policy != "sum":
        return first
    if int_policy == "equal" or any(other.shape != first.shape for other in others):
        other = next(s for s, o in zip(states[1:], others) if o.shape != first.shape or not torch.equal(o, first))
        raise ValueError(
            f"{name}: whole numbers must be equal in all models, got other ones for {key!r} in {other.name}; "
            "say int_policy (first, max or sum), or exclude it"
        )
    stack = torch.stack([first, *others])
    return stack.amax(0) if int_policy == "max" else stack.sum(0).to(first.dtype)


def _write(
    path: Path,
    states: Sequence[State],
    weights: Tensor | Mapping[str, Tensor],
    layout: Layout,
    keys: Sequence[str],
    int_policy: str,
    metadata: Mapping[str, Any] | None,
    name: str,
) -> None:
    # A file has no ties: names that share a tensor get a copy each, so that any loader finds all of them.
    doubles: dict[str, list[str]] = {}
    for key, other in layout.ties.items():
        if other in keys:
            doubles.setdefault(other, []).append(key)
    names = [n for key in keys for n in (key, *doubles.get(key, ()))]
    facts = {**(metadata or {}), "ties": {a: b for a, b in layout.ties.items() if b in keys}}
    with writing(path, {n: layout.entries[n] for n in names}, facts) as writer:
        for piece, values in _pieces(states, weights, layout, keys, int_policy, name):
            for key in (piece.key, *doubles.get(piece.key, ())):
                writer.write(key, piece.start, values)


def _write_shards(
    folder: Path,
    states: Sequence[State],
    weights: Tensor | Mapping[str, Tensor],
    layout: Layout,
    keys: Sequence[str],
    int_policy: str,
    shard_bytes: int,
    metadata: Mapping[str, Any] | None,
    name: str,
) -> None:
    """All files under other names first, then renamed, the index last: what was there before stays until all is written."""
    first: State = getattr(states[0], "base", states[0])  # with adapters merged into it
    origin = folder_of(first.name)
    before, after = ({e[key].dtype for key in layout.blended} for e in (states[0].entries, layout.entries))
    changed = next(iter(after)) if len(after) == 1 and before != after else None
    if shard_bytes < 1:
        raise ValueError(f"{name}: 'shard_bytes' must be at least 1, got {shard_bytes}")
    checkpoint.check_folder(folder)
    check_room(folder, layout.nbytes)
    shards: list[list[str]] = [[]]
    size = 0
    for key in keys:
        size += layout.entries[key].nbytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
            size = layout.entries[key].nbytes
        shards[-1].append(key)
    places: dict[str, str] = {}
    fresh = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".soup.", dir=folder) as temporary:
            files = []
            for i, shard in enumerate(shards, 1):
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLES[0]
                _write(Path(temporary) / file, states, weights, layout, shard, int_policy, metadata, name)
                own = dict.fromkeys(shard, file)
                places |= own | {a: file for a, b in layout.ties.items() if b in own}
                files.append(file)
            if origin is not None:
                copy_companions(origin, folder, changed)
            elif is_pretrained(first.module):
                write_config(first.module, folder, changed)
            # A reader takes whichever of index and single file it looks for first: none of an earlier model may stay.
            for old in (folder / INDEXES[0], folder / SINGLES[0], *folder.glob(SHARDS)):
                old.unlink(missing_ok=True)
            for file in files:
                os.replace(Path(temporary) / file, folder / file)
        if len(shards) > 1:
            with checkpoint.atomic_write(folder / INDEXES[0], "w") as index:
                json.dump({"metadata": {"total_size": layout.nbytes}, "weight_map": places}, index, indent=1)
    except BaseException:
        if fresh:
            shutil.rmtree(folder)
        raise
