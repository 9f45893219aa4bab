# SPDX-License-Identifier: Apache-2.0
"""Layouts of a tensor axis: which features it holds, and in which order.

An axis is described by one of three terms:

* an `Atom`, a set of features whose order is free: one candidate feature space;
* a `Product` of factors, outer to inner, e.g. channels x (height*width) after a flatten;
* a `Concat` of segments, e.g. the skip and the upsampled half after `torch.cat`.

Unifying two terms says "these two axes carry the same features". What remains are the permutations that both allow, so
an atom may later turn out to be a product or a concatenation; it then points to that term.

An atom may *depend* on atoms outside it: the features inside an attention head have one order per head. What an atom may
depend on is noted as `limits`, one per axis that it came from, and only evaluated when all axes are known
(`parents_of`): heads that are found to be the same later must count as the same.

An axis that is indexed by number (q, k, v of a fused projection) is a *stack*: what lies inside it gets atoms of its own
for each index (`alternative`), and a product with a stack outermost reads as a concatenation.

Rules that hold after every call (1 to 5 have a debug assertion below):

1. Two axes are only ever unified at equal size.
2. A product has no part that is a product, no part of size 1 and no concatenation as its outermost part (it is
   distributed: (a|b) x c = (a x c)|(b x c)), and at least two parts.
3. A concatenation has no part that is a concatenation, and at least two parts.
4. An atom never points to a term that contains it: a part is always smaller than its whole.
5. A refused unification freezes both sides: the identity is the one permutation that always fits.
6. An atom without limits stands for values that are equal everywhere (an expanded axis, zeros): any order fits.

Cost: each call walks its terms, a handful of parts for any network seen so far; nothing here touches tensor data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

CONFLICT = "layout conflict"


@dataclass(eq=False)
class Atom:
    """A set of `size` features. `reasons`: why it is frozen (empty: it is not). `flags`: limits on merging it.

    `target` is set once the atom was found to be the same as another term; `resolve` follows it. `limits`: sets of atoms
    that its order may depend on, all of which hold (none: rule 6). `stack`, `alternatives`, `split`: see `alternative`.
    """

    size: int
    reasons: set[str] = field(default_factory=set)
    flags: set[str] = field(default_factory=set)
    target: Layout | None = None
    limits: set[frozenset[Atom]] = field(default_factory=set, repr=False)
    stack: bool = False
    alternatives: dict[tuple[Atom, int], Atom] = field(default_factory=dict, repr=False)
    split: list[Atom] = field(default_factory=list, repr=False)  # of a stack: atoms that have alternatives under it


@dataclass(eq=False)
class Product:
    """Factors of an axis, outermost first; build it with `product`."""

    parts: list[Layout]


@dataclass(eq=False)
class Concat:
    """Segments of an axis, in order; build it with `concat`."""

    parts: list[Layout]


Layout = Atom | Product | Concat


def frozen_atom(size: int, *reasons: str) -> Atom:
    """A new atom that is frozen from the start."""
    return Atom(size, set(reasons))


def own_atom(size: int) -> Atom:
    """The atom of a whole tensor axis: its order depends on nothing outside it."""
    return Atom(size, limits={frozenset()})


def one() -> Atom:
    """The layout of an axis of size 1: nothing to permute."""
    return frozen_atom(1, "size 1")


def size_of(layout: Layout) -> int:
    """Number of positions along the axis."""
    if isinstance(layout, Atom):
        return layout.size
    sizes = [size_of(part) for part in layout.parts]
    return math.prod(sizes) if isinstance(layout, Product) else sum(sizes)


def resolve(layout: Layout) -> Layout:
    """The term that `layout` stands for today: atoms followed to their end, nested terms flattened."""
    if isinstance(layout, Product):
        return product(*layout.parts)  # rebuilt, as its outermost factor may have become a stack
    if isinstance(layout, Concat):
        return concat(*layout.parts)
    if layout.target is None:
        return layout
    found = resolve(layout.target)
    if isinstance(found, Atom):
        layout.target = found  # shortens the next walk; a term is rebuilt each time, as its atoms may be refined
    return found


def product(*parts: Layout) -> Layout:
    """Factors, outermost first, as one axis; parts of size 1 vanish."""
    flat: list[Layout] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Product) else [part]
    flat = [part for part in flat if size_of(part) != 1]
    if not flat:
        return one()
    if len(flat) == 1:
        return flat[0]
    head = flat[0]
    if isinstance(head, Atom) and head.stack:
        return concat(*(product(*(alternative(part, head, i) for part in flat[1:])) for i in range(head.size)))
    if isinstance(head, Concat):
        return concat(*(product(segment, *flat[1:]) for segment in head.parts))
    assert not any(isinstance(part, Product) for part in flat), "rule 2: nested product"
    return Product(flat)


def concat(*parts: Layout) -> Layout:
    """Segments, in order, as one axis; empty segments vanish."""
    flat: list[Layout] = []
    for part in map(resolve, parts):
        flat += part.parts if isinstance(part, Concat) else [part]
    flat = [part for part in flat if size_of(part) != 0]
    if not flat:
        return frozen_atom(0, "empty")
    assert not any(isinstance(part, Concat) for part in flat), "rule 3: nested concatenation"
    return flat[0] if len(flat) == 1 else Concat(flat)


def leaves(layout: Layout) -> list[Atom]:
    """The atoms of a term, in order (an atom may occur twice)."""
    term = resolve(layout)
    if isinstance(term, Atom):
        return [term]
    return [atom for part in term.parts for atom in leaves(part)]


def is_frozen(layout: Layout) -> bool:
    """Whether every atom of the term is frozen, i.e. only the identity is left."""
    return all(atom.reasons for atom in leaves(layout))


def freeze(layout: Layout, reason: str) -> None:
    """Allow only the identity along this axis, and remember why."""
    for atom in leaves(layout):
        atom.reasons.add(reason)


def flag(layout: Layout, name: str) -> None:
    """Note that a permutation of this axis is exact but a merge is not, and why."""
    for atom in leaves(layout):
        atom.flags.add(name)


def unify(first: Layout, second: Layout) -> None:
    """Make both axes carry the same features; what cannot be reconciled is frozen on both sides (rule 5).

    Raises:
        ValueError: the axes differ in size.
    """
    s, t = resolve(first), resolve(second)
    if s is t:
        return
    if size_of(s) != size_of(t):
        raise ValueError(f"unify: both axes must have one size, got {size_of(s)} and {size_of(t)}")
    if is_frozen(s) or is_frozen(t):
        _share_reasons(s, t)
    elif isinstance(s, Atom):
        _point(s, t)
    elif isinstance(t, Atom):
        _point(t, s)
    elif type(s) is type(t):
        _unify_parts(s, t)
    else:
        _unify_product_and_concat(*((s, t) if isinstance(s, Product) else (t, s)))


def _share_reasons(s: Layout, t: Layout) -> None:
    atoms = leaves(s) + leaves(t)
    # Single features are frozen by their size; that says nothing about the atoms beside them.
    reasons = {reason for atom in atoms if atom.size > 1 for reason in atom.reasons} or {CONFLICT}
    for atom in atoms:
        if not atom.reasons:
            atom.reasons |= reasons


def _point(atom: Atom, term: Layout) -> None:
    inside = leaves(term)
    assert atom not in inside, "rule 4: an atom inside its own target"
    assert not atom.reasons, "a frozen atom must have been met by _share_reasons"
    for leaf in inside:
        leaf.flags |= atom.flags
    _restrict(term, atom.limits)
    atom.target = term


def _restrict(term: Layout, limits: set[frozenset[Atom]]) -> None:
    """What an atom may depend on holds for the parts it turned out to have; inner factors may depend on outer ones too."""
    term = resolve(term)
    if isinstance(term, Atom):
        term.limits |= limits
        return
    for part in term.parts:
        _restrict(part, limits)
        if isinstance(term, Product):
            limits = {limit | frozenset(leaves(part)) for limit in limits}


def _conflict(s: Layout, t: Layout) -> None:
    freeze(s, CONFLICT)
    freeze(t, CONFLICT)
    assert is_frozen(s) and is_frozen(t), "rule 5: a refused unification must freeze both sides"


def _unify_product_and_concat(p: Layout, c: Layout) -> None:
    # A product equals a concatenation only where its outermost factor can be cut at the segment boundaries.
    assert isinstance(p, Product) and isinstance(c, Concat)
    head = p.parts[0]
    inner = size_of(p) // size_of(head)
    if not isinstance(head, Atom) or any(size_of(segment) % inner for segment in c.parts):
        return _conflict(p, c)
    unify(head, concat(*(Atom(size_of(segment) // inner) for segment in c.parts)))
    unify(p, c)


def _unify_parts(s: Layout, t: Layout) -> None:
    # Walk both part lists in step. Where the next two parts differ in size, the longer one is cut to the shorter; an
    # earlier step may have refined a later part, hence the resolve and splice in every step.
    assert isinstance(s, Product | Concat) and type(s) is type(t)
    is_product, kind = isinstance(s, Product), type(s)
    todo_s, todo_t = list(s.parts), list(t.parts)
    while todo_s and todo_t:
        for todo in (todo_s, todo_t):
            head = resolve(todo[0])
            todo[:1] = head.parts if isinstance(head, kind) else [head]
        n, m = size_of(todo_s[0]), size_of(todo_t[0])
        if n == m:
            unify(todo_s.pop(0), todo_t.pop(0))
            continue
        long = todo_s if n > m else todo_t
        n, m = max(n, m), min(n, m)
        if is_product and (n % m or not isinstance(long[0], Atom)):
            return _conflict(s, t)
        halves: list[Layout] = [Atom(m), Atom(n // m if is_product else n - m)]
        unify(long[0], kind(halves))
        long[:1] = halves
    assert not todo_s and not todo_t, "rule 1: the parts of equal axes must end together"


def divide(layout: Layout, kind: type[Product] | type[Concat], sizes: Sequence[int]) -> list[Layout]:
    """Refine an axis into factors (`Product`) or segments (`Concat`) of the given sizes, and return them.

    Raises:
        ValueError: the sizes do not multiply (or add up) to the size of the axis.
    """
    total = math.prod(sizes) if kind is Product else sum(sizes)
    if total != size_of(layout):
        raise ValueError(f"divide: 'sizes' must make up the axis of size {size_of(layout)}, got {list(sizes)}")
    if is_frozen(layout):
        reasons = {reason for atom in leaves(layout) for reason in atom.reasons}
        return [frozen_atom(size, *reasons) for size in sizes]
    parts: list[Layout] = [Atom(size) for size in sizes]
    unify(layout, product(*parts) if kind is Product else concat(*parts))
    return parts


def places(layout: Layout) -> Iterator[tuple[int, list[Layout]]]:
    """(offset, factors outermost first) of each segment of an axis."""
    term = resolve(layout)
    offset = 0
    for segment in term.parts if isinstance(term, Concat) else [term]:
        yield offset, list(segment.parts) if isinstance(segment, Product) else [segment]
        offset += size_of(segment)


@dataclass(frozen=True)
class Place:
    """Where an atom lies along an axis: from `offset` on the axis reads [outer, atom.size, block].

    strides: of the atoms outside it in the same segment, by atom: position // stride % size is that atom's index.
    """

    offset: int
    outer: int
    block: int
    strides: dict[Atom, int]


def places_of(layout: Layout, atom: Atom) -> Iterator[Place]:
    """Each place of `atom` along an axis."""
    for offset, factors in places(layout):
        sizes = [size_of(factor) for factor in factors]
        for i, factor in enumerate(factors):
            if factor is atom:
                strides = {f: math.prod(sizes[j + 1 :]) for j, f in enumerate(factors[:i]) if isinstance(f, Atom)}
                yield Place(offset, math.prod(sizes[:i]), math.prod(sizes[i + 1 :]), strides)


# ------------------------------------------------------------------------------------------ dependence and stacks


def _spread(atoms: frozenset[Atom]) -> set[Atom]:
    """What a limit's atoms stand for today."""
    return {leaf for atom in atoms for leaf in leaves(atom)}


def parents_of(atom: Atom) -> set[Atom]:
    """The atoms that the order of `atom` may depend on: those that every axis it came from allows."""
    return set.intersection(*map(_spread, atom.limits)) if atom.limits else set()


def alternative(layout: Layout, stack: Atom, index: int) -> Layout:
    """What `layout` is at one index of a stack: atoms that depend on the stack become atoms of their own."""
    term = resolve(layout)
    if not isinstance(term, Atom):
        parts = [alternative(part, stack, index) for part in term.parts]
        return product(*parts) if isinstance(term, Product) else concat(*parts)
    if stack not in parents_of(term):
        return term
    if (stack, index) not in term.alternatives:
        new = Atom(term.size, set(term.reasons), set(term.flags))
        term.alternatives[stack, index] = new
        new.limits = {
            frozenset(leaf for other in _spread(limit) - {stack} for leaf in leaves(alternative(other, stack, index)))
            for limit in term.limits
        }
        if term not in stack.split:
            stack.split.append(term)
    return term.alternatives[stack, index]


def settle(stacks: Sequence[Atom]) -> None:
    """Carry over what was found out about atoms after their alternatives were made."""
    for stack in stacks:
        for atom in stack.split:  # grows while it is walked
            for (other, index), made in list(atom.alternatives.items()):
                if other is stack and (resolve(atom) is not atom or stack not in parents_of(atom)):
                    unify(made, alternative(atom, stack, index))
                elif other is stack and atom.reasons:
                    _share_reasons(made, atom)
