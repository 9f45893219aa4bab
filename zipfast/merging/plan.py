# SPDX-License-Identifier: Apache-2.0
"""The merge plan: which tensor axes share a feature space, as plain data.

A `Plan` knows nothing of modules or graphs. It can be printed, saved as JSON, compared with the plan of another model,
and applied to any state dict of the same architecture: permute, merge and unmerge are all written against it.

Within one use, the segment of the axis that starts at `offset` reads [outer, size, block], size being the space's:
a plain channel axis has offset 0, outer 1, block 1; the input axis of a linear layer after a spatial flatten has
block = height*width; the second half of a concatenation has the size of the first half as its offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

FORMAT = "zipfast.plan/1"
Role = Literal["produce", "consume", "ride"]


@dataclass(frozen=True)
class Use:
    """One place where a tensor's axis carries a space.

    role: 'produce' (output axis of a weight, or its bias: merged by averaging), 'consume' (input axis of a weight:
    unmerged by summing) or 'ride' (per-feature, e.g. of a norm: merged like produced ones).
    """

    param: str
    axis: int
    role: Role
    offset: int = 0
    outer: int = 1
    block: int = 1


@dataclass(frozen=True)
class Tap:
    """Where to read a space's features: the value of a graph node, laid out along `axis` as in `Use`.

    `outer` is -1 where the axis also holds the batch, so that its length is only known at run time.
    """

    node: str
    axis: int
    offset: int
    outer: int
    block: int
    size: int


@dataclass(frozen=True)
class Space:
    """A set of features that all its uses must permute or merge alike.

    flags: reasons why a permutation is exact but a merge is not ('norm', 'mean', 'softmax', 'contract',
    'reparametrised'). frozen: reasons why it must not be touched at all; empty means mergeable.
    """

    name: str
    size: int
    uses: tuple[Use, ...] = ()
    taps: tuple[Tap, ...] = ()
    flags: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

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
    """

    spaces: tuple[Space, ...]
    shapes: Mapping[str, tuple[int, ...]]
    statistics: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()

    @cached_property
    def mergeable(self) -> tuple[Space, ...]:
        """Spaces that may be permuted and merged."""
        return tuple(space for space in self.spaces if not space.frozen)

    @cached_property
    def frozen(self) -> tuple[Space, ...]:
        """Spaces that must stay as they are, each with its reasons."""
        return tuple(space for space in self.spaces if space.frozen)

    def __getitem__(self, name: str) -> Space:
        for space in self.spaces:
            if space.name == name:
                return space
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
                    name=space["name"],
                    size=space["size"],
                    uses=tuple(Use(**use) for use in space["uses"]),
                    taps=tuple(Tap(**tap) for tap in space["taps"]),
                    flags=tuple(space["flags"]),
                    frozen=tuple(space["frozen"]),
                )
                for space in data["spaces"]
            ),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            statistics=tuple(data["statistics"]),
            aliases={name: tuple(others) for name, others in data["aliases"].items()},
            constants=tuple(data["constants"]),
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
            notes = [*space.flags, *([f"frozen: {', '.join(space.frozen)}"] if space.frozen else [])]
            rows.append(
                (
                    space.name,
                    str(space.size),
                    *(_brief(space.params(role)) for role in ("produce", "consume", "ride")),  # type: ignore[arg-type]
                    " ".join(f"{tap.node}:{tap.axis}" for tap in space.taps),
                    ", ".join(notes),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*table, f"{len(self.mergeable)} mergeable, {len(self.frozen)} frozen"])


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
