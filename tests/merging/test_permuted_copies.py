# SPDX-License-Identifier: Apache-2.0
"""The proof for each architecture: a copy with every space randomly permuted computes the same, is found again exactly,
and merges into the original; nothing is written by hand for any of them."""

from __future__ import annotations

import pytest
import torch
from variety import CASES, build, twin

import zipfast
from zipfast.merging import Plan, permute, random_permutations

# Relative to the largest output, float32. Worst seen: 8.4e-6 (mobilenet_v2, permuted), 8.4e-6 (merged).
TOLERANCE = 1e-4
# Mergeable spaces, and how many of them lie inside others.
SPACES = {
    "mlp": (2, 0),
    "vgg": (4, 0),
    "vgg_bn": (4, 0),
    "resnet_basic": (6, 0),
    "resnet_bottleneck": (10, 0),
    "mobilenet_v2": (25, 0),
    "convnext": (6, 0),
    "unet": (6, 0),
    "unet_groupnorm": (11, 5),
    "groups_and_shuffle": (5, 1),
    "vit": (9, 4),
    "swin": (18, 8),
    "bert": (10, 4),
    "bert_mask": (10, 4),
    "bert_tied": (9, 4),
    "gpt2": (9, 4),
    "gpt2_eager": (9, 4),
    "llama": (9, 4),
    "fused_qkv": (4, 2),
    "torch_transformer": (5, 2),
}


@pytest.fixture(scope="module", params=CASES)
def example(request):
    case = build(request.param)
    graph = zipfast.find_spaces(case.net, case.args, case.kwargs)
    permutations = random_permutations(graph.plan, 1)
    copy = twin(case, permute(graph.plan, permutations, case.net.state_dict()))
    return request.param, case, graph.plan, permutations, copy


def error(case, net) -> float:
    want = case.run()
    return float((case.run(net) - want).abs().max() / want.abs().max())


def test_the_copy_computes_the_same(example):
    _, case, plan, _, copy = example
    assert error(case, copy) < TOLERANCE
    moved = [k for k, v in case.net.state_dict().items() if not torch.equal(v, copy.state_dict()[k])]
    assert len(moved) >= len(plan.mergeable)


@pytest.mark.parametrize("method", ["zip", "permute"])
def test_the_copy_is_found_again_and_merges_back(example, method):
    _, case, plan, permutations, copy = example
    merged = zipfast.merge(
        [case.net, copy],
        case.args,
        [case.batch()],
        example_kwargs=case.kwargs,
        method=method,
        taps="all",
        reestimate=False,
    )
    for space in plan.mergeable:
        groups, moved = merged.groups[space.name], permutations[space.name].index
        # feature k of the one is feature moved[k] of the other
        assert torch.equal(groups.of_model(0), groups.of_model(1)[moved]), space.name
        assert groups.is_permutation
    assert error(case, merged.module) < TOLERANCE


def test_every_axis_of_every_weight_is_in_the_plan(example):
    _, case, plan, _, _ = example
    covered = {(use.param, use.axis) for space in plan.spaces for use in space.uses}
    names = {twin for first, others in plan.aliases.items() for twin in others}
    for name, value in case.net.named_parameters():
        if name in names:
            continue
        for axis in range(min(value.dim(), 2)):
            assert value.shape[axis] == 1 or (name, axis) in covered, f"{name} axis {axis}"
    for space in plan.frozen:
        assert space.frozen and all(space.frozen)
    for space in plan.mergeable:
        assert space.taps, space.name


def test_spaces_and_blocks(example):
    name, _, plan, _, _ = example
    if name in SPACES:
        assert (len(plan.mergeable), sum(bool(s.parents) for s in plan.mergeable)) == SPACES[name], str(plan)
    for space in plan.mergeable:
        for parent in space.parents:
            assert "blocks" in plan[parent].flags or plan[parent].frozen
    assert Plan.from_json(plan.to_json()) == plan


def test_where_only_a_permutation_is_exact_nothing_merges_inside_a_model(example):
    name, case, plan, _, _ = example
    other = build(name, seed=5)
    merged = zipfast.merge(
        [case.net, other.net], case.args, [case.batch()], example_kwargs=case.kwargs, reestimate=False
    )
    inside = 0
    for space in plan.mergeable:
        groups = merged.groups[space.name]
        if space.flags:
            assert groups.is_permutation, space.name
        inside += sum(groups.in_model_merges)
    if any(not space.flags for space in plan.mergeable):
        assert inside > 0  # of free spaces some merge inside, or beta would not be 1
    assert torch.isfinite(case.run(merged.module)).all()


@pytest.mark.parametrize(
    ("name", "flag", "spaces"),
    [
        ("vit", "norm", 1),
        ("bert", "norm", 1),
        ("llama", "mean", 1),
        ("vit", "contract", 2),
        ("gpt2", "contract", 2),
        ("bert_tied", "tied", 1),
        ("gpt2", "tied", 1),
        ("bag_of_tokens", "tied", 1),
        ("unet_groupnorm", "norm", 10),
    ],
)
def test_flags(name, flag, spaces):
    case = build(name)
    plan = zipfast.find_spaces(case.net, case.args, case.kwargs).plan
    assert sum(flag in space.flags for space in plan.mergeable) == spaces, str(plan)


@pytest.mark.parametrize("name", ["resnet_basic", "vit", "llama"])
def test_three_copies(name):
    case = build(name)
    plan = zipfast.find_spaces(case.net, case.args, case.kwargs).plan
    state = case.net.state_dict()
    copies = [twin(case, permute(plan, random_permutations(plan, seed), state)) for seed in (1, 2)]
    merged = zipfast.merge([case.net, *copies], case.args, [case.batch()], taps="all", reestimate=False, beta=0.0)
    assert error(case, merged.module) < TOLERANCE


@pytest.mark.parametrize("name", ["vgg", "resnet_basic", "vit", "bert_tied", "gpt2", "llama", "fused_qkv"])
def test_weights_alone_find_the_copy(name):
    case = build(name)
    plan = zipfast.find_spaces(case.net, case.args, case.kwargs).plan
    copy = twin(case, permute(plan, random_permutations(plan, 3), case.net.state_dict()))
    merged = zipfast.merge(
        [case.net, copy], case.args, [case.batch()], method="permute", similarity="weights", reestimate=False
    )
    assert error(case, merged.module) < TOLERANCE
