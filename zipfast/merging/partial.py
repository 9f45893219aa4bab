# SPDX-License-Identifier: Apache-2.0
"""A partially merged network: one trunk, a head per model behind it and, for a late start, a stem per model before it.

The trunk runs once. Behind it each head gets the features of its own model back: U of Stoica et al. 2024, §4.2, as a
gather (`Unmerge`), after which it is the model's own, untouched rest. Before a late start each model's stem runs on the
input, and M averages their features (`MergeFeatures`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import checkpoint
from .._version import __version__
from .apply import axis_targets, entry_of
from .graph import Exported
from .match import Groups
from .parts import Part, extract
from .plan import Plan, Use

FORMAT = "zipfast.multihead/1"
WEIGHTS, DESCRIPTION = "model.safetensors", "zipfast.json"


class Unmerge(nn.Module):
    """Gives each feature of a model the value of the merged feature it belongs to; an index per axis, no weights."""

    def __init__(self, index: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.axes = tuple(index)
        for axis, target in index.items():
            self.register_buffer(f"axis{axis}", target.clone())

    def forward(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = x.index_select(axis, self.get_buffer(f"axis{axis}"))
        return x


class MergeFeatures(nn.Module):
    """Averages the models' features group by group along one axis.

    members [most, keep]: index of each member among the stacked features, one row per place in a group; share, alike:
    its part of the mean, 0 where a group has fewer members.
    """

    def __init__(self, axis: int, members: Tensor, share: Tensor) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("members", members)
        self.register_buffer("share", share)

    def forward(self, *values: Tensor) -> Tensor:
        stacked = torch.cat(values, self.axis)
        shape = [1] * stacked.dim()
        shape[self.axis] = -1
        members, share = self.get_buffer("members"), self.get_buffer("share")
        total: Tensor | None = None
        for row in range(members.shape[0]):
            part = stacked.index_select(self.axis, members[row]) * share[row].to(stacked.dtype).reshape(shape)
            total = part if total is None else total + part
        assert total is not None
        return total


class MultiHead(nn.Module):
    """One merged trunk with a head, and if it starts late a stem, for each of M models.

    Called like the models; returns a list of M outputs, each the tensor (or, of several, the dict of tensors) that the
    model itself returns. An ordinary module: it trains, exports, moves and has a state dict.

    stems: M parts, or none. entry: how their features are merged. trunk: the merged part. exits, heads: per model.
    """

    def __init__(
        self,
        trunk: Part,
        exits: Sequence[Unmerge],
        heads: Sequence[Part],
        inputs: Sequence[str],
        *,
        stems: Sequence[Part] = (),
        entry: MergeFeatures | None = None,
        keywords: Sequence[str] = (),
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if len(exits) != len(heads) or len(stems) != (0 if entry is None else len(heads)):
            raise ValueError(
                f"MultiHead: each of {len(heads)} heads must have an exit, and a stem if there is an entry, got "
                f"{len(exits)} exits and {len(stems)} stems"
            )
        self.stems, self.trunk = nn.ModuleList(stems), trunk
        self.entry = entry
        self.exits, self.heads = nn.ModuleList(exits), nn.ModuleList(heads)
        self.inputs, self.keywords = tuple(inputs), tuple(keywords)
        self.origin = dict(origin or {})
        self.eval()

    @property
    def models(self) -> int:
        """M."""
        return len(self.heads)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        value, given = self._trunk(args, kwargs)
        return [self._head(m, value, given) for m in range(self.models)]

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trunk's output alone."""
        return self._trunk(args, kwargs)[0]

    def head(self, m: int, *args: Any, **kwargs: Any) -> Any:
        """The output of one head, at the cost of the trunk and that head (and the stems)."""
        if not 0 <= m < self.models:
            raise ValueError(f"MultiHead.head: 'm' must be in [0, {self.models}), got {m}")
        return self._head(m, *self._trunk(args, kwargs))

    def _trunk(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        unknown = [key for key in kwargs if key not in self.keywords]
        leaves = [x for x in tree_leaves((args, [kwargs.get(k) for k in self.keywords])) if isinstance(x, Tensor)]
        if unknown or len(leaves) != len(self.inputs):
            raise ValueError(
                f"MultiHead: the inputs must be {list(self.inputs)}, got {len(leaves)} tensors"
                f"{' and ' + unknown[0] if unknown else ''}"
            )
        given = dict(zip(self.inputs, leaves))
        if self.entry is not None:
            merged = self.entry(*(stem(*(given[name] for name in _part(stem).inputs)) for stem in self.stems))
            given = {**given, _part(self.trunk).inputs[0]: merged}
        return self.trunk(*(given[name] for name in _part(self.trunk).inputs)), given

    def _head(self, m: int, value: Tensor, given: Mapping[str, Tensor]) -> Any:
        head = _part(self.heads[m])
        return head(self.exits[m](value), *(given[name] for name in head.inputs[1:]))

    def report(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Parameters, and FLOPs of one call with these inputs, against those of the ensemble of all models.

        Returns:
            parameters, ensemble_parameters, flops, ensemble_flops (torch.utils.flop_counter: multiply and add are two).
        """
        own = _flops(self, args, kwargs)
        parts = _flops_by_part(self, args, kwargs)
        count = {name: _parameters(part) for name, part in (("trunk", self.trunk), ("heads", self.heads))}
        return {
            "parameters": _parameters(self),
            "ensemble_parameters": self.models * count["trunk"] + count["heads"] + _parameters(self.stems),
            "flops": own,
            "ensemble_flops": self.models * parts["trunk"] + parts["heads"] + parts["stems"],
        }

    def save(self, folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write weights (safetensors) and graph (JSON) into a folder; `load` needs nothing else.

        Each file is written whole or not at all; the description, which names the weights' hash, comes last.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise OSError(f"cannot write {target}: it is a file; give a folder")
        target.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach() for key, value in self.state_dict().items()}
        description = {
            "format": FORMAT,
            "zipfast": __version__,
            "inputs": self.inputs,
            "keywords": self.keywords,
            "origin": self.origin,
            "weights": checkpoint.state_hash(state),
            "stems": [_part(stem).to_data() for stem in self.stems],
            "entry": None if self.entry is None else {"axis": self.entry.axis},
            "trunk": _part(self.trunk).to_data(),
            "heads": [_part(head).to_data() for head in self.heads],
            "exits": [list(exit_.axes) for exit_ in self.exits],  # type: ignore[arg-type]
        }
        checkpoint.save(target / WEIGHTS, state, metadata)
        with checkpoint.atomic_write(target / DESCRIPTION, "w") as file:
            json.dump(description, file, separators=(",", ":"))

    @staticmethod
    def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> MultiHead:
        """Read what `save` wrote; runs no code from it.

        Raises:
            FileNotFoundError: no such folder or file. ValueError: another format, weights of another save, a damaged file.
        """
        source = Path(folder)
        if not (source / DESCRIPTION).is_file():
            raise FileNotFoundError(f"MultiHead.load: no {DESCRIPTION} in {source}")
        try:
            data = json.loads((source / DESCRIPTION).read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"MultiHead.load: {source / DESCRIPTION} must be JSON ({e})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"MultiHead.load: {source / DESCRIPTION} must be of format {FORMAT!r}")
        state = checkpoint.load(source / WEIGHTS)
        if checkpoint.state_hash(state) != data.get("weights"):
            raise ValueError(f"MultiHead.load: {source / WEIGHTS} must belong to {DESCRIPTION}, got other weights")
        try:
            return _from_description(data, state).to(device)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"MultiHead.load: {source / DESCRIPTION} is damaged ({type(e).__name__}: {e}); save the network again"
            ) from e


def _from_description(data: Mapping[str, Any], state: Mapping[str, Tensor]) -> MultiHead:
    def part(data: Mapping[str, Any], prefix: str) -> Part:
        return Part.from_data(data, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    entry = None
    if data["entry"] is not None:
        entry = MergeFeatures(data["entry"]["axis"], state["entry.members"], state["entry.share"])
    return MultiHead(
        part(data["trunk"], "trunk."),
        [Unmerge({a: state[f"exits.{m}.axis{a}"] for a in axes}) for m, axes in enumerate(data["exits"])],
        [part(head, f"heads.{m}.") for m, head in enumerate(data["heads"])],
        data["inputs"],
        stems=[part(stem, f"stems.{m}.") for m, stem in enumerate(data["stems"])],
        entry=entry,
        keywords=data["keywords"],
        origin=data["origin"],
    )


def build(
    exported: Sequence[Exported],
    states: Sequence[Mapping[str, Tensor]],
    merged: Mapping[str, Tensor],
    plan: Plan,
    groups: Mapping[str, Groups],
    start: str | None,
    stop: str,
    weights: Sequence[float] | None = None,
) -> MultiHead:
    """Assemble the module from the models' graphs and weights, the merged trunk weights and the groups."""
    models = len(states)
    first = exported[0]
    trunk = extract(first, {**states[0], **merged}, begin=start, end=stop)
    exits = [Unmerge({axis: t[m] for axis, t in exit_targets(first, plan, groups, models)}) for m in range(models)]
    heads = [extract(e, s, begin=stop) for e, s in zip(exported, states)]
    stems: list[Part] = []
    entry = None
    if start is not None:
        stems = [extract(e, s, end=start) for e, s in zip(exported, states)]
        entry = _entry(first, plan, groups, models, weights)
    names = [
        node.name
        for node, spec in zip(
            (n for n in first.nodes if n.op == "placeholder"), first.program.graph_signature.input_specs
        )
        if spec.kind.name == "USER_INPUT" and isinstance(node.meta.get("val"), Tensor)
    ]
    origin = {"start": start, "stop": stop}
    return MultiHead(trunk, exits, heads, names, stems=stems, entry=entry, keywords=first.keywords, origin=origin)


def exit_targets(
    exported: Exported, plan: Plan, groups: Mapping[str, Groups], models: int
) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Per axis of the value behind a trunk, per model, the merged position of each of its own positions."""
    return _targets(exported, plan, plan.exit, groups, models)


def _targets(
    exported: Exported, plan: Plan, joints: Sequence[tuple[str, Use]], groups: Mapping[str, Groups], models: int
) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Per axis of the value at a cut, per model, the merged position of each position."""
    by_axis: dict[int, list[Any]] = {}
    for name, use in joints:
        if name in groups:
            by_axis.setdefault(use.axis, []).append(entry_of(plan, plan[name], use, groups[name]))
    found = []
    for axis, entries in sorted(by_axis.items()):
        length = exported.by_name[entries[0].use.param].meta["val"].shape[axis]
        found.append((axis, axis_targets(int(length), models, entries)))
    return found


def _entry(
    exported: Exported, plan: Plan, groups: Mapping[str, Groups], models: int, weights: Sequence[float] | None
) -> MergeFeatures:
    found = _targets(exported, plan, plan.entry, groups, models)
    if len(found) != 1:
        raise ValueError(f"merge: 'start' must be a value with one axis of mergeable features, got {len(found)}")
    ((axis, targets),) = found
    keep = len(targets[0])
    stacked = torch.cat(targets)
    scale = torch.tensor([1.0] * models if weights is None else [float(w) for w in weights], dtype=torch.float64)
    scale = scale.repeat_interleave(keep)
    order = stacked.argsort(stable=True)
    count = torch.bincount(stacked, minlength=keep)
    place = torch.arange(len(order)) - (count.cumsum(0) - count)[stacked[order]]  # within its group
    members = torch.zeros(int(count.max()), keep, dtype=torch.int64)
    share = torch.zeros(int(count.max()), keep, dtype=torch.float64)
    members[place, stacked[order]] = order
    share[place, stacked[order]] = scale[order]
    double = exported.by_name[plan.entry[0][1].param].meta["val"].dtype == torch.float64
    share = share / share.sum(0, keepdim=True)
    return MergeFeatures(axis, members, share if double else share.float())


def _part(module: nn.Module) -> Part:
    assert isinstance(module, Part)
    return module


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _flops(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops())


def _flops_by_part(module: MultiHead, args: Any, kwargs: Mapping[str, Any]) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode

    counted = {"stems": 0, "trunk": 0, "heads": 0}
    with torch.no_grad():
        given = dict(
            zip(
                module.inputs,
                [x for x in tree_leaves((args, [kwargs.get(k) for k in module.keywords])) if isinstance(x, Tensor)],
            )
        )
        if module.entry is not None:
            with FlopCounterMode(display=False) as counter:
                made = [stem(*(given[name] for name in _part(stem).inputs)) for stem in module.stems]
            counted["stems"] = int(counter.get_total_flops())
            given = {**given, _part(module.trunk).inputs[0]: module.entry(*made)}
        with FlopCounterMode(display=False) as counter:
            value = module.trunk(*(given[name] for name in _part(module.trunk).inputs))
        counted["trunk"] = int(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            for m in range(module.models):
                module._head(m, value, given)
        counted["heads"] = int(counter.get_total_flops())
    return counted
