# SPDX-License-Identifier: Apache-2.0
"""Layouts by hand: what two axes allow after they were unified."""

import pytest

from zipfast.merging.layout import (
    Atom,
    Concat,
    Product,
    concat,
    divide,
    flag,
    freeze,
    is_frozen,
    leaves,
    one,
    places,
    positions_of,
    product,
    resolve,
    size_of,
    unify,
)


def sizes(layout):
    """[[factor sizes] per segment]"""
    return [[size_of(factor) for factor in factors] for _, factors in places(layout)]


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
    assert list(positions_of(term, b)) == [(8, 1, 4)]
    assert list(positions_of(term, c)) == [(0, 2, 1), (8, 3, 1)]


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
