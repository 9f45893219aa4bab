# SPDX-License-Identifier: Apache-2.0
"""Masks: counts, ties and scopes against their definitions, controls, files, and the networks they are of."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from zipfast import checkpoint
from zipfast.ops._mask import mask_bytes
from zipfast.tickets import PRESETS, Masks, ladder, prunable, rate_for, scores

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")
RATES = {r"fc\d+\.weight": 0.2, r"out\.weight": 0.1}  # of the preset, as `prune` takes them


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on several threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(seed: int = 0) -> nn.Sequential:
    """fc1 of 35 weights, a norm, fc2 of 21, out of 6."""
    torch.manual_seed(seed)
    layers = OrderedDict(
        fc1=nn.Linear(5, 7), norm=nn.BatchNorm1d(7), relu=nn.ReLU(), fc2=nn.Linear(7, 3), out=nn.Linear(3, 2)
    )
    return nn.Sequential(layers)


def convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


def survivors(masks: Masks) -> list[tuple[str, int]]:
    return [(name, int(i)) for name, alive in masks.dense().items() for i in alive.reshape(-1).nonzero().reshape(-1)]


def expected(weights: dict[str, Tensor], masks: Masks, count: int) -> list[tuple[str, int]]:
    """The survivors that are left when `count` of smallest magnitude go: the definition, by one stable sort."""
    before = survivors(masks)
    size = [abs(float(weights[name].detach().reshape(-1)[i])) for name, i in before]
    gone = set(sorted(range(len(before)), key=lambda at: size[at])[:count])
    return [place for at, place in enumerate(before) if at not in gone]


def bits_equal(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.numpy().tobytes() == two.numpy().tobytes()


# making


def test_ones_cover_the_prunable_weights() -> None:
    net = convolutional()
    masks = Masks.ones(net)
    assert list(masks) == ["0.weight", "5.weight"] == list(prunable(net)) and len(masks) == 2
    assert masks.shapes == {"0.weight": (8, 3, 3, 3), "5.weight": (5, 288)}
    assert masks.alive == masks.sizes == {"0.weight": 216, "5.weight": 1440}
    assert masks.density == 1 and masks.densities == {"0.weight": 1.0, "5.weight": 1.0}
    assert masks.facts == {"rule": "ones", "level": 0}
    assert all(alive.all() and alive.shape == masks.shapes[name] for name, alive in masks.dense().items())


def test_only_and_ignore() -> None:
    net = small()
    assert list(Masks.ones(net, only="fc")) == ["fc1.weight", "fc2.weight"]
    assert list(Masks.ones(net, ignore="out")) == ["fc1.weight", "fc2.weight"]
    assert list(Masks.ones(net, only="fc", ignore="1")) == ["fc2.weight"]
    ignored = Masks.ones(net, ignore="out").prune(net, 0.5)
    assert sum(ignored.sizes.values()) == 56 and sum(ignored.alive.values()) == 28, "what is ignored leaves the count"


def test_ones_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'only' must match a layer \(fc1\.weight, .*out\.weight\), got 'fc9'"):
        Masks.ones(small(), only="fc9")
    with pytest.raises(ValueError, match=r"'ignore' must match a layer \(.*\), got 'head'"):
        Masks.ones(small(), ignore="head")
    with pytest.raises(ValueError, match="there must be a weight to prune, got none"):
        Masks.ones(small(), only="fc", ignore="weight")
    with pytest.raises(ValueError, match="there must be a weight to prune, got none"):
        Masks.ones(nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(4, 3)))


def test_from_dense_and_zeros() -> None:
    alive = {"a": torch.tensor([[True, False], [False, True]]), "b": torch.tensor([0.0, 1.0, 1.0])}
    masks = Masks.from_dense(alive)
    assert survivors(masks) == [("a", 0), ("a", 3), ("b", 1), ("b", 2)]
    assert all(torch.equal(masks.dense()[name], value.bool()) for name, value in alive.items())
    with pytest.raises(ValueError, match="'b' must hold 0 and 1 only"):
        Masks.from_dense({"a": alive["a"], "b": torch.tensor([0.0, 0.5])})
    with pytest.raises(ValueError, match="'b' must hold 0 and 1 only"):
        Masks.from_dense({"b": torch.tensor([1.0, NAN])})
    net = small()
    pruned = Masks.ones(net).prune(net, 0.4)
    pruned.apply_(net)
    found = Masks.from_zeros(net)
    assert found == pruned and found.facts == {"rule": "zeros"}
    assert survivors(Masks.from_zeros({"w": torch.tensor([0.0, -0.0, NAN, 1e-45])})) == [("w", 2), ("w", 3)]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 511, 512, 513, 5000])
def test_one_bit_a_weight(size: int) -> None:
    masks = Masks.ones({"w": torch.ones(size)})
    assert masks.nbytes == mask_bytes(size) == 64 * -(-size // 512)
    assert masks.alive == {"w": size}, "padding does not count"
    assert masks.shuffled(1).alive == {"w": size}


def test_nbytes_of_a_network() -> None:
    net = PRESETS["lenet-300-100"].build()
    bits = Masks.ones(net).nbytes * 8
    assert 266_200 <= bits <= 266_200 + 3 * 511


# pruning


def test_prune_global_and_by_layer_replay_the_definition() -> None:
    net = small()
    weights, masks = dict(prunable(net)), Masks.ones(net)
    assert survivors(masks.prune(net, 0.3)) == expected(weights, masks, round(0.3 * 62))
    assert survivors(masks.prune(net, 17)) == expected(weights, masks, 17)
    by_layer = masks.prune(net, 0.3, scope="layer")
    assert by_layer.alive == {name: size - round(0.3 * size) for name, size in masks.sizes.items()}
    for name in masks:
        part = Masks.ones(net, only=re.escape(name))
        assert [p for p in survivors(by_layer) if p[0] == name] == expected(
            weights, part, round(0.3 * part.sizes[name])
        )


def test_prune_by_rates() -> None:
    net = small()
    masks = Masks.ones(net)
    found = masks.prune(net, {r"fc.*": 0.4, "out.weight": 0.5}, scope="layer")
    assert found.alive == {"fc1.weight": 21, "fc2.weight": 13, "out.weight": 3}
    pooled = masks.prune(net, {r"fc.*": 0.4, "out.weight": 0.5})
    assert pooled.alive["out.weight"] == 3, "another fraction, another pool"
    assert pooled.alive["fc1.weight"] + pooled.alive["fc2.weight"] == 56 - round(0.4 * 56)
    left = masks.prune(net, {"fc2.weight": 0.5})
    assert left.alive == {"fc1.weight": 35, "fc2.weight": 11, "out.weight": 6}, "half of 21 is 10, half to even"
    first = masks.prune(net, {r"fc1.*": 0.0, r".*": 1.0})
    assert first.alive == {"fc1.weight": 35, "fc2.weight": 0, "out.weight": 0}, "the first match counts"
    exact = masks.prune(net, {r".*": 1.0, "fc1.weight": 0.0})
    assert exact.alive["fc1.weight"] == 35, "a name comes before patterns"


def test_names_are_no_patterns() -> None:
    weights = {"a.w": torch.randn(8), "abw": torch.randn(8)}
    assert Masks.ones(weights).prune(weights, {"a.w": 0.5}).alive == {"a.w": 4, "abw": 8}


@pytest.mark.parametrize(("survivor", "rate", "gone"), [(5, 0.5, 2), (7, 0.5, 4), (10, 0.25, 2), (10, 0.35, 4)])
def test_fractions_round_half_to_even(survivor: int, rate: float, gone: int) -> None:
    weights = {"w": torch.arange(1.0, survivor + 1)}
    assert (
        Masks.ones(weights).prune(weights, rate).alive
        == {"w": survivor - gone}
        == {"w": survivor - round(rate * survivor)}
    )


def test_ends_of_the_range() -> None:
    net = small()
    masks = Masks.ones(net)
    assert masks.prune(net, 0.0) == masks == masks.prune(net, 0)
    for none in (masks.prune(net, 1.0), masks.prune(net, 62), masks.prune(net, 1.0, scope="layer")):
        assert none.density == 0 and none.prune(net, 0.5) == none
        none.apply_(net)
        assert all(not w.any() for w in prunable(net).values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_whole_ladder_of_lenet_300_100(scope: str) -> None:
    net = PRESETS["lenet-300-100"].build()
    masks = Masks.ones(net)
    counts = dict(masks.sizes)
    pools = [list(counts)[:2], list(counts)[2:]] if scope == "global" else [[name] for name in counts]
    share = {name: 0.1 if name.startswith("out") else 0.2 for name in counts}
    wanted = [sum(counts[name] for name in pool) for pool in pools]
    for level in range(1, 21):
        before = masks
        masks = masks.prune(net, RATES, scope=scope)
        wanted = [n - round(share[pool[0]] * n) for n, pool in zip(wanted, pools)]
        assert [sum(masks.alive[name] for name in pool) for pool in pools] == wanted, "each round is exact"
        assert masks.within(before) and not before.within(masks)
        assert masks.facts["level"] == level and masks.facts["parent"] == before.hash()
        assert 100 * masks.density == pytest.approx(ladder(net, PRESETS["lenet-300-100"], level), abs=2e-3)
    assert round(100 * masks.density, 2) == 1.19 and round(100 * masks.density, 1) == 1.2


def test_rate_for_lands_on_the_target() -> None:
    net = PRESETS["lenet-300-100"].build(image_size=8)
    masks = Masks.ones(net)
    for _ in range(7):
        masks = masks.prune(net, rate_for(0.05, 7))
    assert masks.density == pytest.approx(0.05, abs=7 / 50_200)
    for density, rounds in ((0.0, 3), (1.5, 3), (0.5, 0), (NAN, 2)):
        with pytest.raises(ValueError, match="density must be in"):
            rate_for(density, rounds)


def test_exact_count_where_all_are_equal() -> None:
    weights = {"b": torch.full((4, 5), 0.5), "a": torch.full((10,), -0.5), "c": torch.full((700,), 0.5)}
    masks = Masks.ones(weights)
    one = masks.prune(weights, 0.1)
    assert sum(one.alive.values()) == 730 - 73
    assert one.alive == {"b": 0, "a": 0, "c": 657}, "the first tensor goes first, not the first name"
    assert survivors(masks.prune(weights, 3))[:2] == [("b", 3), ("b", 4)]
    assert survivors(masks.prune(weights, 25))[:2] == [("a", 5), ("a", 6)]
    assert survivors(masks.prune(weights, 0.5, scope="layer"))[0] == ("b", 10)


def test_ties_and_signed_zeros_replay_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {n: torch.randint(-3, 4, (k,), generator=generator) / 4 for n, k in (("z", 300), ("y", 90), ("x", 600))}
    weights["y"][weights["y"] == 0] = -0.0
    masks = Masks.ones(weights)
    for count in (1, 100, 333, 500, 989):
        assert survivors(masks.prune(weights, count)) == expected(weights, masks, count)
    while sum(masks.alive.values()) > 10:
        after = masks.prune(weights, 0.37)
        assert survivors(after) == expected(weights, masks, round(0.37 * sum(masks.alive.values())))
        masks = after


def test_ties_follow_the_order_of_the_masks_with_rates_too() -> None:
    weights = {name: torch.ones(4) for name in ("c", "a", "b")}
    masks = Masks.ones(weights)
    found = masks.prune(weights, {"b": 0.5, "a": 0.5, "c": 0.5})
    assert found.alive == {"c": 0, "a": 2, "b": 4}, "not the order of the rates"
    assert masks.prune(dict(reversed(weights.items())), 0.5) == found, "nor that of the scores"


def test_the_dead_are_not_ranked_again() -> None:
    weights = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = Masks.ones(weights).prune(weights, 2)
    grown = {"w": torch.tensor([100.0, 90.0, 3.0, 4.0])}
    assert survivors(masks.prune(grown, 1)) == [("w", 3)], "what is dead stays dead, whatever it scores"


def test_nan_among_survivors_alone_is_refused() -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    (name, alive), dead = survivors(masks)[-1], (~masks.dense()["fc2.weight"]).reshape(-1).nonzero()[0].item()
    weights = {n: w.detach().clone() for n, w in prunable(net).items()}
    clean = masks.prune(weights, 0.5)
    weights["fc2.weight"].view(-1)[dead] = NAN
    assert masks.prune(weights, 0.5) == clean
    weights[name].view(-1)[alive] = NAN
    with pytest.raises(
        ValueError, match=rf"scores must be numbers, got NaN in '{re.escape(name)}' at flat index {alive}$"
    ):
        masks.prune(weights, 0.5)
    with pytest.raises(ValueError, match="got NaN in"):
        masks.prune(weights, 0.0)
    assert masks.prune(weights, {"fc2.weight": 0.5}).alive["fc2.weight"] < masks.alive["fc2.weight"], "out of scope"
    infinite = {"w": torch.tensor([torch.inf, 1.0, -torch.inf, 2.0])}
    assert survivors(Masks.ones(infinite).prune(infinite, 2)) == [("w", 0), ("w", 2)]


def test_more_than_there_are() -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 40)
    with pytest.raises(ValueError, match=r"'amount' must be at most the 22 survivors, got 23$"):
        masks.prune(net, 23)
    with pytest.raises(ValueError, match=r"'amount' must be .*, got -1$"):
        masks.prune(net, -1)
    with pytest.raises(ValueError, match="a whole number needs scope 'global'"):
        masks.prune(net, 3, scope="layer")


@pytest.mark.parametrize("rate", [-0.1, 1.1, NAN, float("inf")])
def test_a_fraction_is_in_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"a fraction must be in \[0, 1\], got {rate} for 'fc1\.weight'"):
        Masks.ones(small()).prune(small(), rate)
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\], got {rate} for"):
        Masks.ones(small()).prune(small(), {"fc2.weight": 0.2, r"fc1.*": rate})


def test_scopes_and_layers_that_do_not_exist() -> None:
    net = small()
    with pytest.raises(
        ValueError, match=r"got 'fc7\.weight', which matches none of fc1\.weight, fc2\.weight, out\.weight"
    ):
        Masks.ones(net).prune(net, {"fc7.weight": 0.5})
    with pytest.raises(ValueError, match="'scope' must be layer or global, got 'row'"):
        Masks.ones(net).prune(net, 0.5, scope="row")
    with pytest.raises(ValueError, match="must be regular expressions"):
        Masks.ones(net).prune(net, {"fc(": 0.5})


def test_a_scope_without_weights() -> None:
    weights = {"none": torch.empty(0, 4), "w": torch.randn(10)}
    masks = Masks.ones(weights)
    assert masks.densities == {"none": 0.0, "w": 1.0}
    for scope in ("layer", "global"):
        assert masks.prune(weights, 0.5, scope=scope).alive == {"none": 0, "w": 5}
    with pytest.raises(ValueError, match="the scope must hold a weight, got none"):
        masks.prune(weights, {"none": 0.5})
    with pytest.raises(ValueError, match="the scope must hold a weight, got none"):
        masks.prune(weights, {})
    with pytest.raises(ValueError, match="the scope must hold a weight, got none"):
        Masks.ones({"none": torch.empty(0)}).prune({"none": torch.empty(0)}, 0.5)
    masks.apply_(weights)
    assert masks.shuffled(1, "even").alive == {"none": 0, "w": 10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(9, 14, generator=generator).to(dtype)
    masks = Masks.ones({"w": plain})
    found = masks.prune({"w": plain}, 30)
    assert survivors(found) == expected({"w": plain}, masks, 30)
    assert masks.prune({"w": plain.t().contiguous().t()}, 30) == found, "flat indices are row-major"


def test_agrees_with_torch_prune_where_there_are_no_ties() -> None:
    net, other = convolutional(4), convolutional(4)
    masks = Masks.ones(net)
    pairs = [(other[0], "weight"), (other[5], "weight")]
    for count in (331, 265, 700):  # one round after another
        masks = masks.prune(net, count)
        torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=count)
        found = {"0.weight": other[0].weight_mask, "5.weight": other[5].weight_mask}
        assert masks == Masks.from_dense(found)
    masks.apply_(net)
    assert torch.equal(net[0].weight, other[0].weight) and torch.equal(net[5].weight, other[5].weight)


# scores


def test_amounts_of_other_kinds() -> None:
    net = nn.Linear(4, 5)
    masks = Masks.ones(net)
    assert masks.prune(net, np.int64(3)).alive == {"weight": 17} == masks.prune(net, np.float32(0.15)).alive
    for bad in (True, "0.5", None):
        with pytest.raises(TypeError, match="'amount' must be a number, or numbers by name, got"):
            masks.prune(net, bad)
    with pytest.raises(ValueError, match="'amount' must be 0 or more, got -1"):
        masks.prune(net, -1)
    with pytest.raises(TypeError, match="scop"):
        masks.prune(net, 0.5, scop="layer")


def test_weights_of_recurrent_cells_by_name() -> None:
    net = nn.Sequential(nn.GRU(3, 4), nn.Linear(4, 2))
    assert list(Masks.ones(net)) == ["1.weight"]
    assert list(Masks.ones(net, only="weight")) == ["0.weight_ih_l0", "0.weight_hh_l0", "1.weight"]
    with pytest.raises(ValueError, match=r"'only' must be a regular expression, got '\(': missing \)"):
        Masks.ones(net, only="(")


def test_rewinding_to_another_network() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = {k: v for k, v in net.state_dict().items() if k != "1.running_var"}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"the state must be of this network, got no '1\.running_var'"):
        Masks.ones(net).rewind_(net, state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_scores_of_ones_own() -> None:
    net = small()
    masks = Masks.ones(net)
    mine = {name: torch.arange(w.numel(), 0, -1.0).view(w.shape) for name, w in prunable(net).items()}
    found = masks.prune(mine, 0.5, scope="layer", facts={"rule": "position"})
    assert survivors(found) == [(n, i) for n, size in masks.sizes.items() for i in range(size - round(size / 2))]
    assert found.facts["rule"] == "position"
    assert masks.prune({**mine, "other": torch.zeros(3)}, 0.5, scope="layer") == found, "more names do no harm"
    with pytest.raises(ValueError, match=r"Masks\.prune: .* no 'fc2\.weight'"):
        masks.prune({n: s for n, s in mine.items() if n != "fc2.weight"}, 0.5)
    with pytest.raises(ValueError, match=r"'out\.weight' of \[3, 2\] for \[2, 3\]"):
        masks.prune({**mine, "out.weight": mine["out.weight"].t()}, 0.5)
    with pytest.raises(TypeError, match="threshold: 'score"):
        masks.prune({n: s.long() for n, s in mine.items()}, 0.5)


def test_magnitude_is_what_a_network_scores() -> None:
    net = small()
    masks = Masks.ones(net)
    assert masks.prune(scores.magnitude(net, masks), 0.4) == masks.prune(net, 0.4) == masks.prune(net.state_dict(), 0.4)


def test_masks_of_other_parameters() -> None:
    """Masks can be of any parameter, not of `prunable` ones alone: then the network scores them, too."""
    attention = nn.MultiheadAttention(4, 2)
    masks = Masks.ones({"in_proj_weight": attention.in_proj_weight})
    found = masks.prune(attention, 0.5)
    assert found == masks.prune({"in_proj_weight": attention.in_proj_weight}, 0.5)
    found.apply_(attention)
    assert int((attention.in_proj_weight != 0).sum()) == 24


def test_random_scores() -> None:
    net = small()
    masks = Masks.ones(net)
    one = scores.random(masks, 1)
    assert {n: tuple(s.shape) for n, s in one.items()} == masks.shapes
    assert all(bool(((s > 0) & (s <= 1)).all()) for s in one.values())
    found = masks.prune(one, 20)
    assert sum(found.alive.values()) == 42 and found == masks.prune(scores.random(masks, 1), 20)
    assert found != masks.prune(scores.random(masks, 2), 20)
    turned = Masks({n: masks.bits[n] for n in reversed(masks.bits)}, masks.shapes)
    assert all(torch.equal(scores.random(turned, 1)[n], one[n]) for n in one), "the order of the masks does not matter"


# controls


@pytest.mark.parametrize("scope", ["layer", "global", "even"])
def test_shuffled_keeps_counts(scope: str) -> None:
    net = PRESETS["lenet-300-100"].build(image_size=8)
    masks = Masks.ones(net).prune(net, 0.7)
    found = masks.shuffled(5, scope)
    assert found.shapes == masks.shapes and sum(found.alive.values()) == sum(masks.alive.values())
    if scope == "layer":
        assert found.alive == masks.alive
    if scope == "even":
        assert all(abs(alive - masks.density * masks.sizes[n]) <= 2 for n, alive in found.alive.items())
    else:
        assert found.overlap(masks) < 0.4
    assert found == masks.shuffled(5, scope) and found != masks.shuffled(6, scope)
    assert found.facts == {"rule": "random", "scope": scope, "seed": 5, "parent": masks.hash()}


def test_shuffled_does_not_depend_on_the_order_of_the_layers() -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    turned = Masks({n: masks.bits[n] for n in reversed(masks.bits)}, dict(reversed(masks.shapes.items())))
    assert turned.shuffled(3) == masks.shuffled(3)
    equal = Masks.from_dense({name: torch.arange(600) < 300 for name in "ab"}).shuffled(0).dense()
    assert not torch.equal(equal["a"], equal["b"]), "each layer has its own"


@pytest.mark.parametrize("alive", range(0, 24))
def test_even_meets_every_total(alive: int) -> None:
    sizes = {"a": 1, "b": 3, "c": 0, "d": 19}
    flat = torch.arange(23) < alive
    masks = Masks.from_dense(dict(zip(sizes, flat.split(list(sizes.values())))))
    found = masks.shuffled(0, "even").alive
    assert sum(found.values()) == alive and all(0 <= found[n] <= sizes[n] for n in sizes)


def test_shuffled_refuses_other_scopes() -> None:
    with pytest.raises(ValueError, match="'scope' must be one of layer, global, even, got 'row'"):
        Masks.ones(small()).shuffled(0, "row")


# sets


def test_and_or_overlap_within() -> None:
    one = Masks.from_dense({"a": torch.tensor([1, 1, 0, 0]), "b": torch.tensor([1])})
    two = Masks.from_dense({"a": torch.tensor([0, 1, 1, 0]), "b": torch.tensor([1])})
    assert survivors(one & two) == [("a", 1), ("b", 0)] and survivors(one | two) == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
    ]
    assert one.overlap(two) == two.overlap(one) == 0.5 and one.overlap(one) == 1
    assert (one & two).within(one) and one.within(one | two) and not one.within(two)
    nothing = Masks.from_dense({"a": torch.zeros(4), "b": torch.zeros(1)})
    assert nothing.overlap(nothing) == 1 and nothing.overlap(one) == 0
    other = Masks.from_dense({"a": torch.ones(5)})
    for what in (lambda: one & other, lambda: one | other, lambda: one.overlap(other), lambda: one.within(other)):
        with pytest.raises(ValueError, match=r"both must be of one network, got .*'b' besides.*'a' of \[4\] for \[5\]"):
            what()


def test_equality_and_hash() -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    turned = Masks(
        {n: masks.bits[n] for n in reversed(masks.bits)}, dict(reversed(masks.shapes.items())), {"rule": "x"}
    )
    assert turned == masks and turned.hash() == masks.hash() and masks != "masks"
    assert masks != Masks.ones(net) and masks.hash() != Masks.ones(net).hash()
    moved = Masks({f"_{n}": b for n, b in masks.bits.items()}, {f"_{n}": s for n, s in masks.shapes.items()})
    assert moved.hash() != masks.hash()
    flat = Masks(masks.bits, {n: (masks.sizes[n],) for n in masks})
    assert flat.hash() != masks.hash() and flat != masks, "shapes count"
    known = Masks.from_dense({"w": torch.tensor([[True, False], [True, True]])})
    said = hashlib.sha256(b"w|(2, 2)|" + bytes([0b1101] + 63 * [0])).hexdigest()
    assert known.hash() == said, "files of other machines have it"
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


# networks


def test_apply_sets_what_is_dead_to_zero_and_nothing_else() -> None:
    net = convolutional()
    masks = Masks.ones(net).prune(net, 0.6)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    dead = ~masks.dense()["5.weight"]
    net[5].weight.data[dead] = NAN
    masks.apply_(net)
    after = net.state_dict()
    for name, value in after.items():
        alive = masks.dense().get(name, torch.ones_like(value, dtype=torch.bool))
        assert bits_equal(value, torch.where(alive, before[name], torch.zeros_like(value))), f"{name}: +0, bit for bit"
    again = {n: v.clone() for n, v in after.items()}
    masks.apply_(net.state_dict())
    assert all(bits_equal(net.state_dict()[n], again[n]) for n in again)


def test_apply_to_weights_that_are_not_contiguous() -> None:
    net = convolutional()
    masks = Masks.ones(net).prune(net, 0.6)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    assert not other[0].weight.is_contiguous() and Masks.ones(other).prune(other, 0.6) == masks
    masks.apply_(net)
    masks.apply_(other)
    assert torch.equal(net[0].weight, other[0].weight) and not other[0].weight.is_contiguous()


def test_rewind_puts_everything_back() -> None:
    net = convolutional()
    net.train()(torch.randn(6, 3, 8, 8))  # statistics of the norm that are not those of the start
    start = {n: v.detach().clone() for n, v in net.state_dict().items()}
    masks = Masks.ones(net).prune(net, 0.5)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(6, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(v, start[n]) for n, v in net.state_dict().items())
    kept = {n: v.clone() for n, v in start.items()}
    masks.rewind_(net, start)
    for name, value in net.state_dict().items():
        alive = masks.dense().get(name, torch.ones_like(value, dtype=torch.bool))
        assert bits_equal(value, torch.where(alive, start[name], torch.zeros_like(value))), name
        assert bits_equal(start[name], kept[name]), "the start is not written"
    assert int(net[1].num_batches_tracked) == 1
    with pytest.raises(ValueError, match=r"Masks\.rewind_: .*no '5\.weight'"):
        masks.rewind_(net, {n: v for n, v in start.items() if n != "5.weight"})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_masked_networks_stay_plain(clone: Callable) -> None:
    net = convolutional()
    masks = Masks.ones(net).prune(net, 0.5)
    plain = list(net.state_dict())
    masks.apply_(net)
    assert list(net.state_dict()) == plain
    fresh = convolutional(9)
    fresh.load_state_dict(net.state_dict(), strict=True)
    other, same = clone(net), clone(masks)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other.eval()(x), net.eval()(x)) and torch.equal(fresh.eval()(x), net(x))
    assert same == masks and same.facts == masks.facts and same.hash() == masks.hash()
    nn.init.ones_(other[5].weight)
    assert Masks.from_zeros(net) == masks, "copies share nothing"
    same.apply_(other)
    assert torch.equal(other[5].weight != 0, masks.dense()["5.weight"])


def test_shared_weights() -> None:
    net = small()
    net.tied = nn.Linear(5, 7)
    net.tied.weight = net.fc1.weight
    masks = Masks.ones(net)
    assert list(masks) == ["fc1.weight", "fc2.weight", "out.weight"], "once, under its first name"
    masks.prune(net, 0.5).apply_(net)
    assert torch.equal(net.tied.weight, net.fc1.weight)
    tied = Masks.ones({"tied.weight": net.tied.weight})
    assert list(tied.check(net)) == ["tied.weight"], "any of its names is one"


def test_masks_of_another_model_name_all_differences() -> None:
    net = small()
    other = nn.Sequential(OrderedDict(fc1=nn.Linear(6, 7), fc3=nn.Linear(7, 3), out=nn.Linear(3, 2)))
    with pytest.raises(ValueError) as told:
        Masks.ones(net).apply_(other)
    text = str(told.value)
    assert text.startswith("Masks.apply_: the masks must be those of this network, got ")
    assert "no 'fc2.weight'" in text and "'fc1.weight' of [7, 6] for [7, 5]" in text and "out" not in text
    for what in (Masks.ones(net).check, lambda m: Masks.ones(net).prune(m, 0.5)):
        with pytest.raises(ValueError, match=r"no 'fc2\.weight'; 'fc1\.weight' of \[7, 6\] for \[7, 5\]$"):
            what(other)
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    with pytest.raises(ValueError, match=r"no '5\.weight' and 3 more$"):
        Masks.ones(deep).check(nn.Sequential())


# files


def test_files_round_trip(tmp_path: Path) -> None:
    net = convolutional()
    masks = Masks.ones(net).prune(net, 0.3, scope="layer").prune(net, {"5.weight": 0.5})
    path = tmp_path / "masks.safetensors"
    masks.save(path, seed=4)
    found = Masks.load(path)
    assert found == masks and list(found) == list(masks) and found.hash() == masks.hash()
    assert found.facts == {**masks.facts, "seed": 4} and found.facts["level"] == 2 and "seed" not in masks.facts
    assert found.prune(net, 0.2) == masks.prune(net, 0.2)
    assert os.listdir(tmp_path) == [path.name]
    empty = Masks.ones({"none": torch.empty(0, 3), "w": torch.empty(3)})
    empty.save(path)
    assert Masks.load(path) == empty


def test_order_survives_files(tmp_path: Path) -> None:
    weights = {name: torch.ones(4) for name in ("c", "a", "b")}
    Masks.ones(weights).save(tmp_path / "m.safetensors")
    assert list(Masks.load(tmp_path / "m.safetensors")) == ["c", "a", "b"]
    assert Masks.load(tmp_path / "m.safetensors").prune(weights, 0.5).alive == {"c": 0, "a": 2, "b": 4}


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    masks.save(tmp_path / "m.safetensors")
    raw = load_file(tmp_path / "m.safetensors")
    assert raw.keys() == masks.bits.keys() and all(t.dtype == torch.uint8 for t in raw.values())
    assert all(torch.equal(raw[n], masks.bits[n]) for n in raw)
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()[checkpoint.METADATA_KEY])["masks"]
        assert file.get_slice("fc1.weight").get_dtype() == "U8"
    assert about["alive"] == masks.alive and about["hash"] == masks.hash() and about["facts"] == masks.facts
    assert (tmp_path / "m.safetensors").stat().st_size < 64 * 3 + 2000


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    path = tmp_path / "m.safetensors"
    masks.save(path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(path))} is damaged: its bits are not those that were written"
    ):
        Masks.load(path)
    for length in (0, 4, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Masks.load(path)
    for at in range(0, len(good), 2):  # whatever is flipped: refused in words, or the same masks
        for bit in (1, 32):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            try:
                assert Masks.load(path) == masks
            except ValueError as e:
                assert str(path) in str(e)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        Masks.load(tmp_path / "none.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.safetensors must hold masks of format 1, got another file"):
        Masks.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.pt"):
        Masks.load(tmp_path / "weights.pt")
    checkpoint.save(tmp_path / "new.safetensors", {}, {"masks": {"format": 2}})
    with pytest.raises(ValueError, match="of format 1"):
        Masks.load(tmp_path / "new.safetensors")
    net = small()
    about = {"format": 1, "shapes": {"w": [513]}, "alive": {}, "hash": "", "facts": {}}
    checkpoint.save(tmp_path / "short.safetensors", Masks.ones(net).bits, {"masks": about, "order": ["w"]})
    with pytest.raises(ValueError, match=r"is damaged: the mask of 'w' has not the bits of \[513\]"):
        Masks.load(tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        Masks.ones(net).save(tmp_path / "masks.pt")
    with pytest.raises(OSError, match="cannot write"):
        Masks.ones(net).save(tmp_path / "no" / "m.safetensors")


def test_to_json() -> None:
    net = small()
    masks = Masks.ones(net).prune(net, 0.5)
    plain = json.loads(json.dumps(masks.to_json()))
    assert plain["density"] == 0.5 and plain["layers"] == masks.densities and plain["level"] == 1


# several processes

SCRIPT = """
import sys
import torch
from zipfast import distributed
from zipfast.tickets import Masks

torch.set_num_threads(1)
with distributed.process_group() as (rank, world):
    weights = {"w": torch.arange(600.0)}
    masks = Masks.ones(weights).prune(weights, 0.5)
    masks.agree()
    other = masks if rank == 0 else masks.prune(weights, 1)
    try:
        other.agree()
    except RuntimeError as e:
        print(f"{world}: {e}")
"""


def test_agree_names_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(2):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(tmp_path / "script.py")]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in started:
        told, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        assert told.strip() == (
            "2: Masks.agree: all processes must hold the same masks, got others on ranks [1] than on 0"
        )


def test_agree_alone() -> None:
    Masks.ones(small()).agree()
