# SPDX-License-Identifier: Apache-2.0
"""W* = sum of M W U, against dense matrices: convolutions, flattened and concatenated inputs, norms, tied tensors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from zipfast import Groups
from zipfast.merging import Plan, Space, Use, apply_groups, match_identity


def random_groups(models, size, seed=0):
    """Surjective onto `size` groups, of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(size, (models * size - size,), generator=generator)
    index = torch.cat([torch.arange(size), extra])[torch.randperm(models * size, generator=generator)]
    return Groups(index, models, size, torch.empty(0, 2, dtype=torch.int64), torch.empty(0))


def plan_of(spaces, shapes, **more):
    return Plan(tuple(spaces), shapes, **more)


def states_of(shapes, models, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
        for _ in range(models)
    ]


def axis_matrix(length, parts, models, kind):
    """Per model, the dense M [length, length] or U of an axis; parts: (offset, outer, block, groups)."""
    result = []
    for m in range(models):
        total = torch.eye(length, dtype=torch.float64) / (models if kind == "merge" else 1)
        for offset, outer, block, groups in parts:
            size = groups.size
            if kind == "merge":
                small = groups.merge_matrix(torch.float64)[:, m * size : (m + 1) * size]
            else:
                small = groups.unmerge_matrix(torch.float64)[m * size : (m + 1) * size]
            small, eye = small.contiguous(), torch.eye
            big = torch.kron(eye(outer, dtype=torch.float64), torch.kron(small, eye(block, dtype=torch.float64)))
            end = offset + big.shape[0]
            total[offset:end] = 0
            total[:, offset:end] = 0
            total[offset:end, offset:end] = big
        result.append(total)
    return result


@pytest.mark.parametrize("models", [2, 3, 5])
def test_convolution_and_its_norm(models):
    shapes = {"conv.weight": (6, 4, 3, 2), "conv.bias": (6,), "bn.weight": (6,), "bn.running_var": (6,), "free": (3, 2)}
    inner = Space("inner", 4, (Use("conv.weight", 1, "consume"),))
    outer = Space(
        "outer",
        6,
        (
            Use("conv.weight", 0, "produce"),
            Use("conv.bias", 0, "produce"),
            Use("bn.weight", 0, "ride"),
            Use("bn.running_var", 0, "ride"),
        ),
    )
    groups = {"inner": random_groups(models, 4, 1), "outer": random_groups(models, 6, 2)}
    states = states_of(shapes, models)
    merged = apply_groups(plan_of([inner, outer], shapes), groups, states)
    merge = axis_matrix(6, [(0, 1, 1, groups["outer"])], models, "merge")
    unmerge = axis_matrix(4, [(0, 1, 1, groups["inner"])], models, "unmerge")
    wanted = sum(
        torch.einsum("go,oikl,ih->ghkl", merge[m], states[m]["conv.weight"], unmerge[m]) for m in range(models)
    )
    assert_close(merged["conv.weight"], wanted, atol=1e-14, rtol=1e-14)
    for name in ("conv.bias", "bn.weight", "bn.running_var"):
        assert_close(merged[name], sum(merge[m] @ states[m][name] for m in range(models)), atol=1e-14, rtol=1e-14)
    assert_close(merged["free"], sum(s["free"] for s in states) / models, atol=1e-15, rtol=1e-15)
    assert list(merged) == list(states[0])
    assert all(v.dtype == torch.float64 and v.is_contiguous() for v in merged.values())


@pytest.mark.parametrize("outer, block, offset, rest", [(1, 4, 0, 0), (1, 1, 3, 2), (3, 2, 0, 0), (2, 5, 1, 4)])
def test_segments_of_an_input_axis(outer, block, offset, rest):
    """A spatial flatten (block), repeated features (outer), and a part of an axis (offset)."""
    length = offset + outer * 5 * block + rest
    shapes = {"weight": (3, length), "bias": (3,)}
    space = Space("s", 5, (Use("weight", 1, "consume", offset, outer, block),))
    groups, states = {"s": random_groups(2, 5, 3)}, states_of(shapes, 2)
    merged = apply_groups(plan_of([space], shapes), groups, states)
    unmerge = axis_matrix(length, [(offset, outer, block, groups["s"])], 2, "unmerge")
    wanted = sum(states[m]["weight"] @ unmerge[m] for m in range(2)) / 2
    assert_close(merged["weight"], wanted, atol=1e-14, rtol=1e-14)
    assert_close(merged["bias"], (states[0]["bias"] + states[1]["bias"]) / 2)


@pytest.mark.parametrize("outer, block, offset", [(1, 4, 0), (1, 1, 3), (3, 2, 0), (2, 2, 1)])
def test_segments_of_an_output_axis(outer, block, offset):
    """As a concatenation makes them of a norm, or a reshape of a linear layer's rows."""
    length = offset + outer * 4 * block + 2
    shapes = {"weight": (length, 3), "norm": (length,)}
    uses = (Use("weight", 0, "produce", offset, outer, block), Use("norm", 0, "ride", offset, outer, block))
    groups, states = {"s": random_groups(3, 4, 5)}, states_of(shapes, 3)
    merged = apply_groups(plan_of([Space("s", 4, uses)], shapes), groups, states)
    merge = axis_matrix(length, [(offset, outer, block, groups["s"])], 3, "merge")
    for name in shapes:
        assert_close(merged[name], sum(merge[m] @ states[m][name] for m in range(3)), atol=1e-14, rtol=1e-14)


def test_concatenation_of_two_spaces():
    """Inputs [a | b | frozen] of one convolution, and the norm over them; both spaces on both axes."""
    shapes = {"conv.weight": (9, 9, 3, 3), "norm.weight": (9,)}
    a = Space(
        "a", 4, (Use("conv.weight", 1, "consume"), Use("norm.weight", 0, "ride"), Use("conv.weight", 0, "produce"))
    )
    b = Space(
        "b",
        3,
        (Use("conv.weight", 1, "consume", 4), Use("norm.weight", 0, "ride", 4), Use("conv.weight", 0, "produce", 4)),
    )
    groups, states = {"a": random_groups(2, 4, 1), "b": random_groups(2, 3, 2)}, states_of(shapes, 2)
    merged = apply_groups(plan_of([a, b], shapes), groups, states)
    parts = [(0, 1, 1, groups["a"]), (4, 1, 1, groups["b"])]
    merge, unmerge = axis_matrix(9, parts, 2, "merge"), axis_matrix(9, parts, 2, "unmerge")
    wanted = sum(torch.einsum("go,oikl,ih->ghkl", merge[m], states[m]["conv.weight"], unmerge[m]) for m in range(2))
    assert_close(merged["conv.weight"], wanted, atol=1e-14, rtol=1e-14)
    assert_close(merged["norm.weight"], sum(merge[m] @ states[m]["norm.weight"] for m in range(2)))


def test_output_axis_other_than_0():
    """A transposed convolution has its output channels on axis 1."""
    shapes = {"up.weight": (4, 6, 2, 2)}
    spaces = [Space("i", 4, (Use("up.weight", 0, "consume"),)), Space("o", 6, (Use("up.weight", 1, "produce"),))]
    groups, states = {"i": random_groups(2, 4, 1), "o": random_groups(2, 6, 2)}, states_of(shapes, 2)
    merged = apply_groups(plan_of(spaces, shapes), groups, states)
    merge = axis_matrix(6, [(0, 1, 1, groups["o"])], 2, "merge")
    unmerge = axis_matrix(4, [(0, 1, 1, groups["i"])], 2, "unmerge")
    wanted = sum(torch.einsum("go,iokl,ih->hgkl", merge[m], states[m]["up.weight"], unmerge[m]) for m in range(2))
    assert_close(merged["up.weight"], wanted, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_round_once_per_axis(dtype):
    shapes = {"w": (8, 8)}
    space = Space("s", 8, (Use("w", 0, "produce"),))
    groups, states = {"s": random_groups(3, 8, 1)}, states_of(shapes, 3, dtype=dtype)
    merged = apply_groups(plan_of([space], shapes), groups, states)["w"]
    merge = axis_matrix(8, [(0, 1, 1, groups["s"])], 3, "merge")
    wanted = sum(merge[m] @ states[m]["w"].double() for m in range(3))
    assert merged.dtype == dtype
    assert_close(merged.double(), wanted, atol=1e-9, rtol=torch.finfo(dtype).eps / 2 * 1.001)


def test_unmerge_is_equal_to_the_bit():
    """Sums of two members in float32, the other model being zero: halving is exact, so all bits must agree."""
    shapes = {"w": (16, 10, 3, 3)}
    index = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9])
    groups = Groups(index, 2, 10, torch.empty(0, 2), torch.empty(0))
    state = states_of(shapes, 1, dtype=torch.float32)[0]
    space = Space("s", 10, (Use("w", 1, "consume"),))
    merged = apply_groups(plan_of([space], shapes), {"s": groups}, [state, {"w": torch.zeros(shapes["w"])}])["w"]
    unmerge = groups.unmerge_matrix()[:10]
    wanted = torch.einsum("oikl,ih->ohkl", state["w"], unmerge)
    assert torch.equal(2 * merged, wanted)
    assert torch.equal(2 * merged[:, :5], state["w"][:, :5] + state["w"][:, 5:])
    assert (merged[:, 5:] == 0).all()


def test_integers_are_exact():
    """Small whole numbers leave no room for rounding, whatever the order of summation."""
    shapes = {"w": (6, 12), "b": (6,)}
    states = [{k: (v * 4).round() for k, v in s.items()} for s in states_of(shapes, 2, dtype=torch.float32)]
    pairs = Groups(torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]), 2, 6, torch.empty(0, 2), torch.empty(0))
    spaces = [Space("i", 6, (Use("w", 1, "consume", 0, 1, 2),)), Space("o", 6, (Use("w", 0, "produce"),))]
    merged = apply_groups(plan_of(spaces, shapes), {"i": pairs, "o": pairs}, states)["w"]
    merge = axis_matrix(6, [(0, 1, 1, pairs)], 2, "merge")
    unmerge = axis_matrix(12, [(0, 1, 2, pairs)], 2, "unmerge")
    assert torch.equal(merged.double(), sum(merge[m] @ states[m]["w"].double() @ unmerge[m] for m in range(2)))


def test_identity_is_the_average():
    shapes = {"w": (4, 4), "b": (4,)}
    space = Space("s", 4, (Use("w", 0, "produce"), Use("b", 0, "produce"), Use("w", 1, "consume")))
    states, plan = states_of(shapes, 2), plan_of([space], shapes)
    average = {k: (states[0][k] + states[1][k]) / 2 for k in shapes}
    for groups in ({}, {"s": match_identity(2, 4)}):
        merged = apply_groups(plan, groups, states)
        for name, value in average.items():
            assert torch.equal(merged[name], value)


def test_integer_buffers_and_scalars():
    space = Space("s", 2, (Use("w", 0, "produce"),))
    states = [
        {
            "w": torch.ones(2),
            "tracked": torch.tensor(3 + m),
            "mask": torch.tensor([m == 0]),
            "scale": torch.tensor(1.0 + m),
        }
        for m in range(2)
    ]
    merged = apply_groups(plan_of([space], {"w": (2,)}), {"s": match_identity(2, 2)}, states)
    assert merged["tracked"].item() == 3 and merged["tracked"].dtype == torch.int64
    assert merged["mask"].tolist() == [True]
    assert merged["scale"].item() == 1.5 and merged["scale"].dim() == 0
    merged["tracked"].add_(1)
    assert states[0]["tracked"].item() == 3


@pytest.mark.parametrize("keys", [("a", "b"), ("b", "a"), ("b",)])
def test_tied_tensors(keys):
    """Tied tensors are merged once and stay equal, in whatever order a state dict names them."""
    shapes = {"a": (4, 3)}
    space = Space("s", 4, (Use("a", 0, "produce"),))
    plan = plan_of([space], shapes, aliases={"a": ("b",)})
    groups, whole = {"s": random_groups(2, 4)}, states_of(shapes, 2)
    merged = apply_groups(plan, groups, [{key: s["a"] for key in keys} for s in whole])
    assert tuple(merged) == keys
    wanted = apply_groups(plan, groups, whole)["a"]
    for key in keys:
        assert torch.equal(merged[key], wanted)
    if len(keys) == 2:
        assert merged["a"].data_ptr() != merged["b"].data_ptr()


def test_inputs_are_unchanged_and_results_are_new():
    shapes = {"w": (4, 4), "b": (4,), "free": (3,)}
    space = Space("s", 4, (Use("w", 0, "produce"), Use("b", 0, "produce"), Use("w", 1, "consume")))
    states = [{k: v.requires_grad_() for k, v in s.items()} for s in states_of(shapes, 2)]
    copies = [{k: v.detach().clone() for k, v in s.items()} for s in states]
    groups = random_groups(2, 4)
    index = groups.index.clone()
    merged = apply_groups(plan_of([space], shapes), {"s": groups}, states)
    assert not any(v.requires_grad for v in merged.values())
    for value in merged.values():
        value.fill_(7)
    for state, copy in zip(states, copies):
        assert all(torch.equal(state[k], copy[k]) for k in shapes)
    assert torch.equal(groups.index, index)


def test_strided_weights_and_two_runs():
    shapes = {"w": (6, 4, 3, 3)}
    spaces = [Space("i", 4, (Use("w", 1, "consume"),)), Space("o", 6, (Use("w", 0, "produce"),))]
    groups, states = {"i": random_groups(2, 4), "o": random_groups(2, 6)}, states_of(shapes, 2, dtype=torch.float32)
    plan = plan_of(spaces, shapes)
    first, second = apply_groups(plan, groups, states), apply_groups(plan, groups, states)
    last = apply_groups(plan, groups, [{"w": s["w"].contiguous(memory_format=torch.channels_last)} for s in states])
    assert torch.equal(first["w"], second["w"])
    assert torch.equal(first["w"], last["w"])


# ------------------------------------------------------------------------------------------ messages


SHAPES = {"conv.weight": (4, 3)}
PLAN = plan_of([Space("s", 4, (Use("conv.weight", 0, "produce"),))], SHAPES)


def test_missing_tensor():
    states = states_of(SHAPES, 2)
    with pytest.raises(ValueError, match=r"the state dict of model 1 must hold 'conv.weight', got none of that name"):
        apply_groups(PLAN, {}, [states[0], {}])


def test_shapes_that_differ():
    states = [states_of(SHAPES, 1)[0], {"conv.weight": torch.zeros(4, 2)}]
    message = r"'conv.weight' must have one shape in all models, got \[4, 3\] in model 0 and \[4, 2\] in model 1"
    with pytest.raises(ValueError, match=message):
        apply_groups(PLAN, {}, states)


@pytest.mark.parametrize("shape", [(5, 3), (3, 3)])
def test_shapes_that_are_not_the_plans(shape):
    states = states_of({"conv.weight": shape}, 2)
    with pytest.raises(ValueError, match=r"'conv.weight'"):
        apply_groups(PLAN, {"s": match_identity(2, 4)}, states)


@pytest.mark.parametrize("groups, got", [(match_identity(3, 4), "3 x 4 to 4"), (match_identity(2, 5), "2 x 5 to 5")])
def test_groups_that_do_not_fit(groups, got):
    message = f"groups of space 's' must map 2 x 4 features to 4, got {got}"
    with pytest.raises(ValueError, match=message):
        apply_groups(PLAN, {"s": groups}, states_of(SHAPES, 2))


def test_groups_that_keep_more():
    groups = Groups(torch.tensor([0, 1, 2, 3, 0, 1, 2, 4]), 2, 5, torch.empty(0, 2), torch.empty(0))
    with pytest.raises(ValueError, match="got 2 x 4 to 5"):
        apply_groups(PLAN, {"s": groups}, states_of(SHAPES, 2))


def test_unknown_space():
    with pytest.raises(KeyError, match="no space is named 'other'"):
        apply_groups(PLAN, {"other": match_identity(2, 4)}, states_of(SHAPES, 2))


def test_two_output_axes():
    # A mean over both axes has no members where one group is of A alone and the other of B: only permutations fit.
    plan = plan_of([Space("s", 4, (Use("w", 0, "produce"), Use("w", 1, "ride")))], {"w": (4, 4)})
    states = states_of({"w": (4, 4)}, 2)
    with pytest.raises(ValueError, match=r"'w' must have one merged output axis, got axes \[0, 1\]"):
        apply_groups(plan, {"s": random_groups(2, 4)}, states)
    merged = apply_groups(plan, {"s": match_identity(2, 4)}, states)
    assert_close(merged["w"], (states[0]["w"] + states[1]["w"]) / 2)


def test_groups_of_a_frozen_space():
    plan = plan_of([Space("s", 4, (Use("conv.weight", 0, "produce"),), frozen=("output",))], SHAPES)
    with pytest.raises(ValueError, match="'s'"):
        apply_groups(plan, {"s": random_groups(2, 4)}, states_of(SHAPES, 2))
