# SPDX-License-Identifier: Apache-2.0
"""Layouts by hand: what two axes allow after they were unified."""

import pytest

from zipfast.merging.layout import (
    Atom,
    Concat,
    Product,
    alternative,
    concat,
    divide,
    flag,
    freeze,
    is_frozen,
    leaves,
    one,
    own_atom,
    parents_of,
    places,
    places_of,
    product,
    resolve,
    settle,
    size_of,
    unify,
)


def sizes(layout):
    """[[factor sizes] per segment]"""
    return [[size_of(factor) for factor in factors] for _, factors in places(layout)]


def where(layout, atom):
    """(offset, outer, block) of each place of an atom."""
    return [(place.offset, place.outer, place.block) for place in places_of(layout, atom)]


def test_terms_are_flattened_and_trivial_parts_vanish():
    a, b, c = Atom(2), Atom(3), Atom(4)
    assert sizes(product(a, product(b, one(), c))) == [[2, 3, 4]]
    assert sizes(concat(a, Atom(0), concat(b, c))) == [[2], [3], [4]]
    assert product(a) is a and concat(a) is a
    assert size_of(product()) == 1 and size_of(concat()) == 0


def test_a_concatenation_outside_a_product_is_distributed():
    a, b, c = Atom(2), Atom(3), Atom(4)
    term = product(concat(a, b), c)
    assert isinstance(term, Concat) and sizes(term) == [[2, 4], [3, 4]]
    assert where(term, b) == [(8, 1, 4)]
    assert where(term, c) == [(0, 2, 1), (8, 3, 1)]
    assert [place.strides for place in places_of(term, c)] == [{a: 4}, {b: 4}]


def test_atoms_become_one():
    a, b, c = Atom(5), Atom(5), Atom(5)
    unify(a, b)
    unify(c, a)
    assert resolve(a) is resolve(b) is resolve(c)
    freeze(c, "input")
    assert is_frozen(a) and resolve(b).reasons == {"input"}


def test_flags_and_reasons_follow_into_parts():
    a = Atom(6)
    flag(a, "norm")
    parts = divide(a, Product, [2, 3])
    assert all(part.flags == {"norm"} for part in leaves(a))
    freeze(parts[0], "why")
    assert not is_frozen(a) and is_frozen(parts[0])


def test_products_are_cut_to_common_factors():
    x, y = product(Atom(6), Atom(2)), product(Atom(2), Atom(6))
    unify(x, y)
    assert sizes(x) == sizes(y) == [[2, 3, 2]]
    assert leaves(x) == leaves(y) and not is_frozen(x)


def test_concatenations_are_cut_to_common_segments():
    x, y = concat(Atom(4), Atom(3)), concat(Atom(2), Atom(5))
    unify(x, y)
    assert sizes(x) == sizes(y) == [[2], [2], [3]]
    assert leaves(x) == leaves(y)


def test_product_meets_concatenation_at_its_outer_factor():
    heads, width = Atom(3), Atom(4)
    x, y = product(heads, width), concat(Atom(4), Atom(8))
    unify(x, y)
    # heads 1 | 2: the first segment is one head's width, the second two heads
    assert sizes(x) == sizes(y) == [[4], [2, 4]]
    assert leaves(x) == leaves(y)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (product(Atom(2), Atom(3)), product(Atom(3), Atom(2))),
        (product(Atom(2), Atom(3)), concat(Atom(1), Atom(5))),
    ],
)
def test_what_does_not_fit_is_frozen_on_both_sides(x, y):
    unify(x, y)
    assert is_frozen(x) and is_frozen(y)


def test_a_swap_of_segments_leaves_what_both_orders_allow():
    a, b = Atom(4), Atom(2)
    whole = concat(a, b)
    unify(whole, concat(b, a))  # a|b = b|a: three equal pairs, which may only be swapped together
    assert sizes(whole) == [[2], [2], [2]]
    assert len(set(leaves(whole))) == 1 and not is_frozen(whole)


def test_frozen_meets_free():
    a, b = Atom(4), Atom(4)
    freeze(a, "input")
    unify(a, product(b))
    assert b.reasons == {"input"}
    assert [part.reasons for part in divide(a, Concat, [1, 3])] == [{"input"}, {"input"}]


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="unify: both axes must have one size, got 3 and 4"):
        unify(Atom(3), Atom(4))
    with pytest.raises(ValueError, match=r"divide: 'sizes' must make up the axis of size 6, got \[4, 2\]"):
        divide(Atom(6), Product, [4, 2])


def test_inner_factors_of_an_axis_may_depend_on_outer_ones():
    axis = own_atom(12)
    heads, width = divide(axis, Product, [3, 4])
    assert parents_of(width) == {heads} and parents_of(heads) == set()


def test_what_two_axes_allow_holds_for_both():
    first, second = own_atom(12), own_atom(4)  # e.g. a projection, and a norm with one scale per feature of a head
    heads, width = divide(first, Product, [3, 4])
    unify(width, second)
    assert parents_of(resolve(width)) == set()
    assert parents_of(heads) == set()


def test_dependence_is_evaluated_when_all_is_known():
    # Two projections: their widths meet before their heads do, as in q kT.
    (heads_q, width_q), (heads_k, width_k) = (divide(own_atom(12), Product, [3, 4]) for _ in range(2))
    unify(width_q, width_k)
    assert parents_of(resolve(width_q)) == set()
    unify(heads_q, heads_k)
    assert parents_of(resolve(width_q)) == {resolve(heads_q)}


def test_an_atom_without_limits_stands_for_equal_values():
    free, axis = Atom(4), own_atom(12)
    _, width = divide(axis, Product, [3, 4])
    unify(free, width)  # e.g. a mask that was expanded over the width
    assert parents_of(resolve(width)) == {leaves(axis)[0]}


def test_a_stack_gives_what_lies_inside_it_atoms_of_its_own():
    axis = own_atom(3 * 2 * 4)
    three, heads, width = divide(axis, Product, [3, 2, 4])
    three.stack = True
    freeze(three, "select")
    picked = [[alternative(layout, three, i) for layout in (heads, width)] for i in range(3)]
    assert sizes(axis) == [[2, 4]] * 3
    assert len({id(layout) for pair in picked for layout in pair}) == 6
    for own_heads, own_width in picked:
        assert parents_of(own_width) == {own_heads}
    unify(picked[0][0], picked[1][0])
    settle([three])
    assert resolve(picked[0][0]) is resolve(picked[1][0]) is not resolve(picked[2][0])
    assert where(axis, resolve(picked[1][1])) == [(8, 2, 1)]


def test_what_is_found_out_later_holds_for_the_alternatives():
    axis = own_atom(2 * 6)
    two, width = divide(axis, Product, [2, 6])
    two.stack = True
    first, second = (alternative(width, two, i) for i in range(2))
    unify(width, own_atom(6))  # the same order for both, after all
    settle([two])
    assert resolve(first) is resolve(second)
