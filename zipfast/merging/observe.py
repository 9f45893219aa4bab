# SPDX-License-Identifier: Apache-2.0
"""Where to read the features of each space.

The paper's place is the input of the last layer that consumes a space. A stream's very last consumer may follow a global
pool, which leaves one sample per image; an earlier one sees every pixel, and where there is no earlier one the value
before the pool does. Features that only meet other features (q and k) are read on both sides; features that nothing
consumes are read at the last value that carries them.

Further places (`Space.extra`) are all consumers' inputs and all producers' outputs: what is dead at one place, e.g. after
a ReLU, is alive at another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from .flow import Flow, op_name, shape_of
from .layout import Atom, Product, is_frozen, leaves, places, resolve, size_of
from .plan import Tap, Use

if TYPE_CHECKING:
    from .reading import Region

# Ops that average positions, and ops that may stand between an average and a consumer without changing any value.
AVERAGES = {"mean"} | {f"{kind}{d}d" for kind in ("avg_pool", "adaptive_avg_pool") for d in (1, 2, 3)}
PASSING = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "dropout", "to"}
MAKES = {"linear", "addmm", "baddbmm", "mm", "bmm", "matmul", "einsum", "embedding"}
MAKES |= {f"{kind}{d}d" for kind in ("conv", "conv_transpose") for d in (1, 2, 3)}

Spot = tuple[Node, int]


def choose_taps(
    flow: Flow, region: Region, uses: Mapping[Atom, list[Use]], parents: Mapping[Atom, tuple[Atom, ...]]
) -> dict[Atom, tuple[tuple[Tap, ...], tuple[Tap, ...]]]:
    """For each mergeable atom its taps and the further ones, all inside the region."""
    order = region.exported.order
    wanted = {atom for atom in uses if not atom.reasons}
    reads: dict[Atom, list[tuple[str, int, int, Node, int]]] = {atom: [] for atom in wanted}
    spots: dict[Atom, list[Spot]] = {atom: [] for atom in wanted}

    def visible(node: Node) -> bool:
        return node.op == "call_function" and (node in region or node is region.start) and node not in flow.weights

    found = [(read.node, read.axis, read.how) for read in flow.reads if flow_reader(read.at, region)]
    if region.stop is not None:  # whatever leaves the region is consumed behind it
        found += [(region.stop, axis, "consume") for axis in range(len(flow.axes(region.stop)))]
    for node, axis, how in found:
        if visible(node):
            for atom in dict.fromkeys(leaves(flow.axes(node)[axis])):
                if atom in wanted:
                    best, at = _before_average(flow, atom, node, axis, region)
                    reads[atom].append((how, _samples(best, atom), order[best], best, at))
                    spots[atom] += [(best, at), (node, axis)]
    carriers: dict[Atom, Spot] = {}
    for node, layouts in flow.layouts.items():
        if visible(node) and isinstance(node.meta.get("val"), Tensor):
            for axis, layout in enumerate(layouts):
                for atom in dict.fromkeys(leaves(layout)):
                    if atom in wanted:
                        carriers[atom] = (node, axis)
                        if op_name(node) in MAKES:
                            spots[atom].append((node, axis))
    taps = {}
    for atom in wanted:
        main = _main(reads[atom], carriers.get(atom))
        own = _place_all(flow, main, atom, parents[atom], wanted)
        more = _place_all(flow, spots[atom], atom, parents[atom], wanted)
        taps[atom] = (own or more[:1], tuple(tap for tap in more if tap not in (own or more[:1])))
    return taps


def flow_reader(at: Node | None, region: Region) -> bool:
    """Whether the node that reads a value lies in the region."""
    return at is None or at in region


def _main(reads: list[tuple[str, int, int, Node, int]], carrier: Spot | None) -> list[Spot]:
    consumed = [read for read in reads if read[0] == "consume"]
    if consumed:
        best = max(consumed, key=lambda read: read[1:3])
        return [best[3:]]
    if reads:
        return [read[3:] for read in reads[-2:]]
    return [carrier] if carrier is not None else []


def _samples(node: Node, atom: Atom) -> int:
    return math.prod(shape_of(node)) // atom.size


def _before_average(flow: Flow, atom: Atom, node: Node, axis: int, region: Region) -> Spot:
    """The value before the averages that lead to `node`, if that shows more samples of the same features."""
    best, current = (node, axis), node
    while current.op == "call_function" and op_name(current) in AVERAGES | PASSING and current is not region.start:
        averages, current = op_name(current) in AVERAGES, current.all_input_nodes[0]
        if current.op != "call_function" or current in flow.weights:
            break
        carries = [i for i, layout in enumerate(flow.axes(current)) if atom in leaves(layout)]
        if len(carries) != 1:
            break
        if averages and _samples(current, atom) > _samples(best[0], atom):
            best = (current, carries[0])
    return best


def _place_all(
    flow: Flow, spots: list[Spot], atom: Atom, parents: tuple[Atom, ...], mergeable: set[Atom]
) -> tuple[Tap, ...]:
    made = (_tap(flow, node, axis, atom, parents, mergeable) for node, axis in dict.fromkeys(spots))
    return tuple(dict.fromkeys(tap for tap in made if tap is not None))


def _tap(flow: Flow, node: Node, axis: int, atom: Atom, parents: tuple[Atom, ...], mergeable: set[Atom]) -> Tap | None:
    """The first place of an atom along an axis as a tap; None where the value does not show it by parent."""
    sizes = node.meta["val"].shape
    offset, length, dims, factors = 0, -1, [], []
    for i, layout in enumerate(flow.axes(node)):
        term = resolve(layout)
        if i == axis:
            segments = [(at, own) for at, own in places(term) if atom in own]
            if not segments:
                return None
            offset, parts = segments[0]
            if len(list(places(term))) > 1:
                length = math.prod(size_of(part) for part in parts)
        else:
            parts = list(term.parts) if isinstance(term, Product) and not is_frozen(term) else [term]
        split = [size_of(part) for part in parts]
        if not isinstance(sizes[i], int):  # the batch is in this axis
            if length != -1 and i == axis:
                return None
            open_ = [j for j, part in enumerate(parts) if is_frozen(part)]
            if not open_:
                return None
            split[open_[0]] = -1
        factors.append(tuple(split))
        dims += parts
    if any(dims.count(part) != 1 for part in (*parents, atom)):
        return None
    own = (*parents, atom)
    averaged = [j for j, part in enumerate(dims) if part not in own and mergeable & set(leaves(part))]
    return Tap(
        node.name, axis, offset, length, tuple(factors), tuple(dims.index(part) for part in own), tuple(averaged)
    )
