# SPDX-License-Identifier: Apache-2.0
"""The merge plan: which tensor axes share a feature space, as plain data.

A `Plan` knows nothing of modules or graphs. It can be printed, saved as JSON, compared with the plan of another model,
and applied to any state dict of the same architecture: permute, merge and unmerge are all written against it.

Within one use, the segment of the axis that starts at `offset` reads [outer, size, block], size being the space's:
a plain channel axis has offset 0, outer 1, block 1; the input axis of a linear layer after a spatial flatten has
block = height*width; the second half of a concatenation has the size of the first half as its offset.

A space may have *parents*: the features inside an attention head have one order per head, so that the space 'query' has
the space 'query.blocks' (the heads) as its parent. Its features are then counted parent by parent: with P heads of D
features, feature k of head p is p·D + k of P·D.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

FORMAT = "zipfast.plan/2"
Role = Literal["produce", "consume", "ride"]


@dataclass(frozen=True)
class Use:
    """One place where a tensor's axis carries a space.

    role: 'produce' (output axis of a weight, or its bias: merged by averaging), 'consume' (input axis of a weight:
    unmerged by summing) or 'ride' (per-feature, e.g. of a norm: merged like produced ones). parents: for each parent of
    the space its stride along the axis: at position p its index is (p - offset) // stride % size.
    """

    param: str
    axis: int
    role: Role
    offset: int = 0
    outer: int = 1
    block: int = 1
    parents: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tap:
    """Where to read a space's features: the value of a graph node.

    Of axis `axis` the segment [offset, offset + length) is taken (length -1: all of it); then every axis is split into
    its `factors`, outer to inner (-1: known at run time only, it holds the batch). Of the resulting dimensions, `features`
    are those of the parents and of the space itself, in order; `averaged` belong to other mergeable spaces, whose order
    differs between models: only their means and mean squares say the same in all; the rest are samples.
    """

    node: str
    axis: int
    offset: int
    length: int
    factors: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    averaged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Space:
    """A set of features that all its uses must permute or merge alike.

    size: features per block. parents: spaces outside it, for each combination of which it has an order of its own;
    blocks: how many combinations there are. taps: where its features are observed best; extra: all further places.
    flags: reasons why a permutation is exact but a merge is not ('norm', 'mean', 'softmax', 'contract', 'tied',
    'reparametrised', and 'blocks': other spaces lie inside it). frozen: reasons why it must not be touched at all; empty
    means mergeable.
    """

    name: str
    size: int
    uses: tuple[Use, ...] = ()
    taps: tuple[Tap, ...] = ()
    flags: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    blocks: int = 1
    extra: tuple[Tap, ...] = ()

    @property
    def total(self) -> int:
        """Features of all blocks."""
        return self.size * self.blocks

    def params(self, role: Role) -> tuple[str, ...]:
        """Names of the tensors that use this space in the given role, each once, in order."""
        return tuple(dict.fromkeys(use.param for use in self.uses if use.role == role))


@dataclass(frozen=True)
class Plan:
    """All spaces of an architecture.

    Args:
        spaces: in the order of their first tensor.
        shapes: shape of every parameter and norm statistic, by state-dict name.
        statistics: names among them that are running statistics (re-estimated after a merge).
        aliases: name -> other names of the same tensor (tied parameters); uses list only the first name.
        constants: other buffers that the forward pass reads, equal in all models of an architecture.
        entry, exit: of a part of a network, (space, use) for each place of a mergeable space in the value at which the
            part begins or ends; the use's `param` is the name of the graph node.
    """

    spaces: tuple[Space, ...]
    shapes: Mapping[str, tuple[int, ...]]
    statistics: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    entry: tuple[tuple[str, Use], ...] = ()
    exit: tuple[tuple[str, Use], ...] = ()

    @cached_property
    def mergeable(self) -> tuple[Space, ...]:
        """Spaces that may be permuted and merged."""
        return tuple(space for space in self.spaces if not space.frozen)

    @cached_property
    def frozen(self) -> tuple[Space, ...]:
        """Spaces that must stay as they are, each with its reasons."""
        return tuple(space for space in self.spaces if space.frozen)

    @cached_property
    def _by_name(self) -> dict[str, Space]:
        return {space.name: space for space in self.spaces}

    def children(self, name: str) -> tuple[Space, ...]:
        """The mergeable spaces that lie directly inside a space."""
        return tuple(space for space in self.mergeable if space.parents == (name,))

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Space:
        if name in self._by_name:
            return self._by_name[name]
        raise KeyError(f"plan: no space is named {name!r}; there are {', '.join(s.name for s in self.spaces)}")

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` restores an equal plan."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan that `to_json` wrote.

        Raises:
            ValueError: the text is not a plan of this format.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Plan.from_json: 'text' must be JSON, got {error}") from None
        seen = data.get("format") if isinstance(data, dict) else type(data).__name__
        if seen != FORMAT:
            raise ValueError(f"Plan.from_json: 'format' must be {FORMAT!r}, got {seen!r}")
        return Plan(
            spaces=tuple(
                Space(
                    **{key: _tuples(value) for key, value in space.items() if key not in ("uses", "taps", "extra")},
                    uses=tuple(_use(use) for use in space["uses"]),
                    taps=tuple(_tap(tap) for tap in space["taps"]),
                    extra=tuple(_tap(tap) for tap in space["extra"]),
                )
                for space in data["spaces"]
            ),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            statistics=tuple(data["statistics"]),
            aliases={name: tuple(others) for name, others in data["aliases"].items()},
            constants=tuple(data["constants"]),
            entry=tuple((name, _use(use)) for name, use in data["entry"]),
            exit=tuple((name, _use(use)) for name, use in data["exit"]),
        )

    def same_spaces(self, other: Plan, *, frozen: bool = True) -> None:
        """Check that the two plans describe one architecture, so that their models can be merged.

        Args:
            frozen: also compare sizes of frozen spaces; False lets e.g. the number of classes differ.

        Raises:
            ValueError: they differ; the message names the first difference.
        """
        ours, theirs = {s.name: s for s in self.spaces}, {s.name: s for s in other.spaces}
        for name in (*ours, *theirs):
            if (name in ours) != (name in theirs):
                which = "first" if name in ours else "second"
                raise ValueError(f"same_spaces: space {name!r} must be in both models, got it in the {which} only")
        for name, space in ours.items():
            _same_space(space, theirs[name], frozen)
        if frozen:
            for param in sorted(set(self.shapes) | set(other.shapes)):
                a, b = _shape(self.shapes.get(param)), _shape(other.shapes.get(param))
                if a != b:
                    raise ValueError(f"same_spaces: tensor {param!r} must have one shape, got {a} and {b}")

    def __str__(self) -> str:
        rows = [("space", "size", "produced by", "consumed by", "rides", "tap", "notes")]
        for space in self.spaces:
            inside = [f"in {', '.join(space.parents)}"] if space.parents else []
            notes = [*inside, *space.flags, *([f"frozen: {', '.join(space.frozen)}"] if space.frozen else [])]
            rows.append(
                (
                    space.name,
                    str(space.size) if space.blocks == 1 else f"{space.blocks} x {space.size}",
                    *(_brief(space.params(role)) for role in ("produce", "consume", "ride")),  # type: ignore[arg-type]
                    " ".join(f"{tap.node}:{tap.axis}" for tap in space.taps),
                    ", ".join(notes),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*table, f"{len(self.mergeable)} mergeable, {len(self.frozen)} frozen"])


def _tuples(value: Any) -> Any:
    """JSON knows lists only."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _use(data: Mapping[str, Any]) -> Use:
    return Use(**{key: _tuples(value) for key, value in data.items()})


def _tap(data: Mapping[str, Any]) -> Tap:
    return Tap(**{key: _tuples(value) for key, value in data.items()})


def _brief(names: tuple[str, ...], most: int = 2) -> str:
    """The first few names and how many more there are: a residual stream has dozens."""
    return ", ".join(names[:most]) + (f" +{len(names) - most}" if len(names) > most else "")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _same_space(a: Space, b: Space, frozen: bool) -> None:
    if a.size != b.size and (frozen or not (a.frozen and b.frozen)):
        raise ValueError(f"same_spaces: space {a.name!r} must have one size, got {a.size} and {b.size}")
    if bool(a.frozen) != bool(b.frozen):
        word = ("frozen" if a.frozen else "mergeable", "frozen" if b.frozen else "mergeable")
        raise ValueError(f"same_spaces: space {a.name!r} must be alike in both models, got {word[0]} and {word[1]}")
    if a.parents != b.parents:
        raise ValueError(
            f"same_spaces: space {a.name!r} must lie in the same spaces, got {list(a.parents)} and {list(b.parents)}"
        )
    for use_a, use_b in zip(a.uses, b.uses):
        if use_a != use_b:
            raise ValueError(
                f"same_spaces: space {a.name!r} must have the same uses, got axis {use_a.axis} of {use_a.param!r} "
                f"({_where(use_a)}) and axis {use_b.axis} of {use_b.param!r} ({_where(use_b)})"
            )
    if len(a.uses) != len(b.uses):
        longer, which = (a, "first") if len(a.uses) > len(b.uses) else (b, "second")
        use = longer.uses[min(len(a.uses), len(b.uses))]
        raise ValueError(
            f"same_spaces: space {a.name!r} must have the same uses, got axis {use.axis} of {use.param!r} in the "
            f"{which} model only"
        )


def _where(use: Use) -> str:
    return f"{use.role}, offset {use.offset}, outer {use.outer}, block {use.block}"
