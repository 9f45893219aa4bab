# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torch.nn.utils.prune: copies, compiled code, hooks, what autocast and autograd keep, shared weights."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

import zipfast.compat.prune as prune
from zipfast.compat import _kept


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(_kept.KEPT)
    yield
    gc.collect()
    assert set(_kept.KEPT) <= before and (_kept._after_step is None) == (not _kept.KEPT)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return prune.l1_unstructured(nn.Linear(6, 6), "weight", 12)


def dead(module: nn.Module) -> Tensor:
    return module.weight.detach()[module.weight_mask == 0]


def test_pruning_within_one_autocast_region() -> None:
    """Autocast keeps 16-bit copies of parameters till its end; a sensitivity scan must not read old ones."""
    found = []
    for p in (torch_prune, prune):
        model = nn.Linear(6, 6, bias=False)
        nn.init.constant_(model.weight, 1.0)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found.append([])
            for count in (0, 12, 12):
                p.ln_structured(model, "weight", count // 6, n=1, dim=0)
                found[-1].append(float(model(torch.ones(1, 6)).sum()))
            with torch.enable_grad():
                optimizer = torch.optim.SGD(model.parameters(), 1.0)
                model(torch.ones(1, 6)).sum().backward()
            optimizer.step()  # within the region: the next pass must see it
            found[-1].append(float(model(torch.ones(1, 6)).sum()))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.2)
    assert found[1] == [36, 24, 12, 0]


def test_pruning_between_forward_and_backward_is_an_error() -> None:
    model, x = nn.Linear(6, 6), torch.ones(2, 6, requires_grad=True)
    out = model(x)
    prune.identity(model, "weight")
    out.sum().backward()  # nothing was masked
    out = model(x)
    prune.l1_unstructured(model, "weight", 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    out = model(x)
    model.weight_mask = torch.eye(6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_what_is_read_without_its_forward_pass(how: Callable[[nn.Module], nn.Module]) -> None:
    attention = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    linear = layer()
    x = torch.randn(3, 2, 8)
    attention, linear = how(attention), how(linear)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam([*attention.parameters(), *linear.parameters()], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (attention(x, x, x)[0].square().sum() + compiled(x[..., :6]).square().sum()).backward()
        for module in (attention.out_proj, linear):
            assert not module.weight.grad[module.weight_mask == 0].any()
        optimizer.step()
        assert not dead(attention.out_proj).any() and not dead(linear).any()


def test_a_new_parameter_of_compiled_code_is_guarded_by_train() -> None:
    model = layer()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.weight = nn.Parameter(torch.ones(6, 6))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compiled(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert not model.weight.grad[model.weight_mask == 0].any() and not dead(model).any()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_shared_weights_pruned_in_both_layers(how: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.ModuleList([nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)])
    model[1].weight = model[0].weight
    for each in model:
        prune.l1_unstructured(each, "weight", 0.5)
    other = how(model)
    assert prune.masks(other) == prune.masks(model) and prune.masks(model).density == 0.25
    for net in (model, other):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net[1](net[0](torch.arange(10))).square().sum().backward()
        optimizer.step()
        assert int((net[0].weight != 0).sum()) == 15
    prune.remove(model[0], "weight")  # the mask of the other layer goes on, from this moment
    model[1].weight.grad = torch.ones(10, 6)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not dead(model[1]).any() and prune.is_pruned(model)


def test_classes_that_are_gone_leave_nothing() -> None:
    before = len(_kept._CLASSES)

    class Own(nn.Linear):
        pass

    model = prune.identity(Own(2, 2), "weight")
    assert len(_kept._CLASSES) == before + 1 and type(copy.deepcopy(model)) is type(model)
    del model, Own
    gc.collect()
    assert len(_kept._CLASSES) <= before


def test_what_the_page_says_of_swapped_parameters() -> None:
    model = layer()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match=r"Couldn't swap Linear\.weight"):
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.float32 and not dead(model).any()


@pytest.mark.parametrize("p", [prune, torch_prune])
def test_pruning_within_a_forward_pass(p: Any) -> None:
    model = nn.Linear(6, 6)

    def prune_more(module: nn.Module, inputs: Any) -> None:
        p.l1_unstructured(module, "weight", 5)

    model.register_forward_pre_hook(prune_more)
    for count in (5, 10, 15):
        model(torch.ones(1, 6)).sum().backward()
        assert int((model.weight == 0).sum()) == count and int(model.weight_mask.sum()) == 36 - count


def test_removing_within_a_forward_pass() -> None:
    model = nn.Linear(6, 6)
    model.register_forward_pre_hook(lambda module, inputs: prune.remove(module, "weight") and None)
    method = prune.L1Unstructured.apply(model, "weight", 12)
    model(torch.ones(1, 6)).sum().backward()
    assert not prune.is_pruned(model) and _kept.guard_of(model.weight) is None and model.weight.grad.all()
    with pytest.raises(AssertionError, match="remove: Linear must be pruned by this method, got one that is not"):
        method.remove(model)


def test_an_optimizer_that_steps_within_the_backward_pass() -> None:
    model = layer()
    optimizer = torch.optim.Adam([model.weight], 0.1)

    def step(parameter: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    handle = model.weight.register_post_accumulate_grad_hook(step)
    before = model.weight.detach().clone()
    for _ in range(3):
        model(torch.randn(3, 6)).square().sum().backward()
        assert not dead(model).any()
    assert not torch.equal(model.weight, before)
    handle.remove()  # autograd would keep all of it


def test_masks_of_a_state_that_lost_a_tensor_or_its_metadata() -> None:
    model = nn.Sequential(layer(), layer())
    state = model.state_dict()
    state.pop("1.weight")  # a head, before fine-tuning
    assert list(prune.masks(state)) == ["0.weight"]
    state._metadata["0"][_kept.METADATA] = "damaged"
    with pytest.raises(ValueError, match="masks: the metadata of 'source' must hold masks by name, got str"):
        prune.masks(state)
