# SPDX-License-Identifier: Apache-2.0
"""Plans are data: saved, printed and compared without a model."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from nets import NETS, build

from zipfast import zoo
from zipfast.merging import Plan, Space, Tap, Use, find_spaces


def plan_of(net, *shape):
    return find_spaces(net, (torch.randn(2, *shape),)).plan


TINY = Plan(
    spaces=(
        Space(
            "a",
            4,
            (Use("a.weight", 0, "produce"), Use("b.weight", 1, "consume", 2, 1, 9)),
            (Tap("relu", 1, 0, 1, 1, 4),),
            ("norm",),
        ),
        Space("b", 3, (Use("b.weight", 0, "produce"),), (), (), ("output",)),
    ),
    shapes={"a.weight": (4, 2), "b.weight": (3, 38)},
    statistics=("n.running_mean",),
    aliases={"a.weight": ("c.weight",)},
    constants=("mask",),
)


@pytest.mark.parametrize("name", NETS)
def test_json_round_trip(name):
    net, x = build(name)
    plan = find_spaces(net, (x,)).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()


def test_json_round_trip_of_every_field():
    assert Plan.from_json(TINY.to_json()) == TINY


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "'text' must be JSON"),
        ("[]", "'format' must be 'zipfast.plan/2', got 'list'"),
        ('{"format": "other/2"}', "'format' must be 'zipfast.plan/2', got 'other/2'"),
    ],
)
def test_json_that_is_no_plan(text, match):
    with pytest.raises(ValueError, match=match):
        Plan.from_json(text)


def test_table():
    lines = str(TINY).splitlines()
    assert lines[0].split() == ["space", "size", "produced", "by", "consumed", "by", "rides", "tap", "notes"]
    assert lines[1].split() == ["a", "4", "a.weight", "b.weight", "relu:1", "norm"]
    assert lines[2].endswith("frozen: output")
    assert lines[1].index("a.weight") == lines[0].index("produced")
    assert lines[3] == "1 mergeable, 1 frozen"


def test_lookup_and_views():
    assert TINY["b"].frozen == ("output",)
    assert [s.name for s in TINY.mergeable] == ["a"] and [s.name for s in TINY.frozen] == ["b"]
    with pytest.raises(KeyError, match="no space is named 'c'; there are a, b"):
        TINY["c"]
    with pytest.raises(FrozenInstanceError):
        TINY.spaces = ()


def test_models_of_one_architecture_agree():
    plan_of(zoo.resnet(1, width=0.25), 1, 8, 8).same_spaces(plan_of(zoo.resnet(1, width=0.25), 1, 16, 16))


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: zoo.resnet(1, width=0.5), "space 'conv1' must have one size, got 4 and 8"),
        (
            lambda: zoo.resnet(2, width=0.25),
            "space 'stages.0.1.conv1' must be in both models, got it in the second only",
        ),
        (lambda: zoo.resnet(1, width=0.25, classes=7), "space 'linear' must have one size, got 10 and 7"),
    ],
)
def test_models_that_differ(other, match):
    with pytest.raises(ValueError, match=f"same_spaces: {match}"):
        plan_of(zoo.resnet(1, width=0.25), 1, 8, 8).same_spaces(plan_of(other(), 1, 8, 8))


def test_heads_may_differ_on_request():
    first = plan_of(zoo.resnet(1, width=0.25), 1, 8, 8)
    second = plan_of(zoo.resnet(1, width=0.25, classes=7), 1, 8, 8)
    first.same_spaces(second, frozen=False)


def test_uses_shapes_and_freezing_are_compared():
    a, b = TINY.spaces
    moved = replace(a, uses=(a.uses[0], replace(a.uses[1], block=3)))
    with pytest.raises(
        ValueError, match=r"same uses, got axis 1 of 'b.weight' \(consume, offset 2, outer 1, block 9\)"
    ):
        TINY.same_spaces(replace(TINY, spaces=(moved, b)))
    shorter = replace(a, uses=a.uses[:1])
    with pytest.raises(ValueError, match=r"got axis 1 of 'b.weight' in the first model only"):
        TINY.same_spaces(replace(TINY, spaces=(shorter, b)))
    with pytest.raises(ValueError, match="space 'a' must be alike in both models, got mergeable and frozen"):
        TINY.same_spaces(replace(TINY, spaces=(replace(a, frozen=("input",)), b)))
    with pytest.raises(ValueError, match="space 'b' must be in both models, got it in the first only"):
        TINY.same_spaces(replace(TINY, spaces=(a,)))
    with pytest.raises(ValueError, match=r"tensor 'b.weight' must have one shape, got \[3, 38\] and none"):
        TINY.same_spaces(replace(TINY, shapes={"a.weight": (4, 2)}))
