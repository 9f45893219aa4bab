# SPDX-License-Identifier: Apache-2.0
"""The rules of ops that move, cut and join axes; see `rules.py` for the others and for what a rule is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from .flow import Flow, op_name, rule, shape_of
from .layout import (
    Atom,
    Concat,
    Layout,
    Product,
    alternative,
    concat,
    divide,
    freeze,
    frozen_atom,
    is_frozen,
    one,
    product,
    resolve,
    size_of,
)
from .rules import freeze_positions


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def _reshape(flow: Flow, node: Node, x: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """Axes are factored, outer to inner: [C, H, W] -> [C*H*W] makes C x (H*W); what does not factor is frozen."""
    todo, out = list(flow.axes(x)), []
    for size in shape_of(node):
        parts: list[Layout] = []
        missing = size
        while missing > 1:
            axis = todo.pop(0)
            term = resolve(axis)
            n = size_of(term)
            if n == 1:
                continue
            if missing % n == 0:
                parts.append(axis)
                missing //= n
            elif isinstance(term, Product):
                todo[:0] = term.parts
            elif n % missing == 0:
                todo[:0] = divide(term, Product, [missing, n // missing])
            else:
                for axis in flow.axes(x):
                    freeze(axis, "reshape")
                return flow.fresh(node, "reshape")
        out.append(parts[0] if len(parts) == 1 else product(*parts))
    return out


@rule("transpose", "swapaxes")
def _transpose(flow: Flow, node: Node, x: Node, first: int, second: int) -> list[Layout]:
    """Two axes change places."""
    axes = list(flow.axes(x))
    axes[first], axes[second] = axes[second], axes[first]
    return axes


@rule("t", "mT", "adjoint")
def _t(flow: Flow, node: Node, x: Node) -> list[Layout]:
    """The last two axes change places."""
    axes = flow.axes(x)
    return axes[:-2] + axes[-2:][::-1]


@rule("numpy_T")
def _reversed(flow: Flow, node: Node, x: Node) -> list[Layout]:
    """All axes in reverse."""
    return flow.axes(x)[::-1]


@rule("permute")
def _permute(flow: Flow, node: Node, x: Node, dims: Sequence[int]) -> list[Layout]:
    """Axes are reordered."""
    return [flow.axes(x)[dim] for dim in dims]


@rule("movedim")
def _movedim(flow: Flow, node: Node, x: Node, source: Any, destination: Any) -> list[Layout]:
    """Axes are moved, the others keep their order."""
    axes = flow.axes(x)
    n = len(axes)
    sources = [d % n for d in ([source] if isinstance(source, int) else source)]
    places = [d % n for d in ([destination] if isinstance(destination, int) else destination)]
    moved = dict(zip(places, sources))
    rest = iter(i for i in range(n) if i not in sources)
    return [axes[moved[i] if i in moved else next(rest)] for i in range(n)]


@rule("unsqueeze")
def _unsqueeze(flow: Flow, node: Node, x: Node, dim: int) -> list[Layout]:
    """An axis of size 1 is added."""
    axes = list(flow.axes(x))
    axes.insert(dim % (len(axes) + 1), one())
    return axes


@rule("squeeze")
def _squeeze(flow: Flow, node: Node, x: Node, dims: Any = None) -> list[Layout]:
    """Axes of size 1 go."""
    axes = flow.axes(x)
    dims = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(axes) for dim in dims}
    return [axis for i, axis in enumerate(axes) if not (i in gone and size_of(axis) == 1)]


@rule("expand", "expand_as", "broadcast_to")
def _expand(flow: Flow, node: Node, x: Node, *args: Any, **kwargs: Any) -> list[Layout]:
    """Repeated axes are equal everywhere: any permutation fits, so they are new and free."""
    sizes, axes = shape_of(node), flow.axes(x)
    padded = [one() for _ in range(len(sizes) - len(axes))] + list(axes)
    return [axis if size_of(axis) == size else Atom(size) for axis, size in zip(padded, sizes)]


@rule("cat", "concat", "concatenate")
def _cat(flow: Flow, node: Node, tensors: Sequence[Node], dim: int = 0) -> list[Layout]:
    """The axis becomes a concatenation; all other axes unify."""
    many = [flow.axes(tensor) for tensor in tensors]
    dim %= len(many[0])
    return [
        concat(*(axes[dim] for axes in many)) if i == dim else flow.broadcast([size], [[axes[i]] for axes in many])[0]
        for i, size in enumerate(shape_of(node))
    ]


@rule("stack")
def _stack(flow: Flow, node: Node, tensors: Sequence[Node], dim: int = 0) -> list[Layout]:
    """A new axis, whose order matters, is added; all others unify."""
    sizes = shape_of(node)
    dim %= len(sizes)
    axes = flow.broadcast(sizes[:dim] + sizes[dim + 1 :], [flow.axes(tensor) for tensor in tensors])
    return axes[:dim] + [frozen_atom(sizes[dim], "stack") if sizes[dim] != 1 else one()] + axes[dim:]


@rule("pad", "constant_pad_nd")
def _pad(flow: Flow, node: Node, x: Node, pads: Sequence[int], *args: Any, **kwargs: Any) -> list[Layout]:
    """Padding with a constant adds free segments; any other padding of a feature axis freezes it."""
    axes = list(flow.axes(x))
    mode = next((value for value in (*args, kwargs.get("mode")) if isinstance(value, str)), "constant")
    for i in range(len(pads) // 2):
        low, high, axis = pads[2 * i], pads[2 * i + 1], len(axes) - 1 - i
        if low == high == 0:
            continue
        if low < 0 or high < 0 or mode != "constant" or is_frozen(axes[axis]):
            freeze(axes[axis], "pad")
            axes[axis] = flow.fresh(node, "pad")[axis]
        else:
            axes[axis] = concat(Atom(low), axes[axis], Atom(high))
    return axes


@rule("slice", "narrow")
def _slice(
    flow: Flow, node: Node, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> list[Layout]:
    """A slice cuts the axis into segments; a stride freezes it."""
    axes = list(flow.axes(x))
    size = size_of(axes[dim])
    if is_frozen(axes[dim]):
        axes[dim] = axes[dim] if shape_of(node)[dim] == size else flow.fresh(node, "slice")[dim]
        return axes
    if op_name(node) == "narrow":
        start, end = start % size, start % size + end
    low, high, _ = slice(start, end).indices(size)
    if step != 1:
        freeze(axes[dim], "slice")
        axes[dim] = flow.fresh(node, "slice")[dim]
    elif (low, high) != (0, size):
        axes[dim] = divide(axes[dim], Concat, [low, high - low, size - high])[1]
    return axes


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split(flow: Flow, node: Node, x: Node, _: Any, dim: int = 0) -> list[list[Layout]]:
    """The axis is cut into segments, one per output."""
    axes = flow.axes(x)
    dim %= len(axes)
    sizes = [shape_of(value)[dim] for value in node.meta["val"]]
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in divide(axes[dim], Concat, sizes)]


@rule("select", "unbind")
def _select(flow: Flow, node: Node, x: Node, dim: int = 0, *args: Any) -> Any:
    """Single positions are picked: the axis is frozen, and what lies inside it may differ from position to position."""
    axes = list(flow.axes(x))
    picked = resolve(axes.pop(dim))
    if isinstance(picked, Atom) and not picked.reasons and not picked.stack:
        picked.stack = True
        flow.stacks.append(picked)
    if not is_frozen(picked):
        freeze(picked, "select")
    size = size_of(picked)
    chosen = range(size) if op_name(node) == "unbind" else [args[0] % size]
    out = [
        [alternative(axis, picked, i) for axis in axes] if isinstance(picked, Atom) and picked.stack else list(axes)
        for i in chosen
    ]
    return out if op_name(node) == "unbind" else out[0]


@rule("index", "index_select")
def _index(flow: Flow, node: Node, x: Node, *args: Any) -> list[Layout]:
    """Axes that are indexed by a tensor are frozen, the others pass."""
    axes = flow.axes(x)
    indexed = [args[0] % len(axes)] if isinstance(args[0], int) else [i for i, v in enumerate(args[0]) if v is not None]
    for dim in indexed:
        freeze(axes[dim], "table index")
    rest = [axis for i, axis in enumerate(axes) if i not in indexed]
    new = len(shape_of(node)) - len(rest)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    return rest[:at] + flow.fresh(node, "table index")[at : at + new] + rest[at:]


@rule("roll", "flip", "cumsum")
def _ordered(flow: Flow, node: Node, x: Node, amount: Any, dims: Any = None) -> list[Layout]:
    """The order of the axis matters: frozen."""
    dims = dims if op_name(node) == "roll" else amount
    for dim in [dims] if isinstance(dims, int) else dims or range(len(flow.axes(x))):
        freeze(flow.axes(x)[dim], "order")
    return list(flow.axes(x))


@rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, node: Node, x: Node, factor: int) -> list[Layout]:
    """Channels become channels x pixels; the pixels are frozen."""
    axes = flow.axes(x)
    channels, pixels = divide(axes[-3], Product, [size_of(axes[-3]) // factor**2, factor**2])
    freeze(pixels, "pixel order")
    freeze_positions((), axes[-2:])
    return axes[:-3] + [channels] + flow.fresh(node, "spatial")[-2:]
