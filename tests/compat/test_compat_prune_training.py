# SPDX-License-Identifier: Apache-2.0
"""Parameters pruned by the drop-in for torch.nn.utils.prune, while they are trained, copied, saved, compiled and counted."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import zipfast.compat.prune as prune
from zipfast.compat import _kept

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(_kept.KEPT)
    yield
    gc.collect()
    assert set(_kept.KEPT) <= before and (_kept._after_step is None) == (not _kept.KEPT)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 5)
    ).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(3)).to(dtype), torch.arange(40) % 5


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, clip: float | None = None) -> None:
    x, y = data(next(model.parameters()).dtype)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(x)  # torch ranks the weights of the last forward pass


def gradual(p: Any, model: nn.Sequential, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    """Three rounds while one optimiser goes on, as gradual pruning does it."""
    steps(model, optimizer, 2, clip)
    for _ in range(2):
        p.global_unstructured([(model[i], "weight") for i in (0, 4, 6)], p.L1Unstructured, amount=0.3)
        steps(model, optimizer, 3, clip)
    p.ln_structured(model[4], "weight", 0.25, n=2, dim=0)
    p.l1_unstructured(model[0], "bias", 3)
    steps(model, optimizer, 3, clip)


def layer(size: int = 6, dead: int = 12) -> nn.Linear:
    torch.manual_seed(0)
    return prune.l1_unstructured(nn.Linear(size, size), "weight", dead)


def dead(module: nn.Linear) -> Tensor:
    return module.weight.detach()[module.weight_mask == 0]


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_torch_bit_for_bit(optimizer: str) -> None:
    theirs, ours = network(), network()
    gradual(torch_prune, theirs, OPTIMIZERS[optimizer](theirs.parameters()))
    gradual(prune, ours, OPTIMIZERS[optimizer](ours.parameters()))
    for i in (0, 4, 6):
        assert torch.equal(ours[i].weight_mask, theirs[i].weight_mask)
        torch.testing.assert_close(ours[i].weight, theirs[i].weight, rtol=0, atol=0)
        torch.testing.assert_close(ours[i].bias, theirs[i].bias, rtol=0, atol=0)
    assert torch.equal(ours(data()[0]), theirs(data()[0]))
    assert prune.masks(ours).density < 0.6


def test_clipping_by_norm_sees_masked_gradients() -> None:
    # in float64: torch moves weight_orig behind the others, so the norm is summed in another order
    theirs, ours, plain = (network(torch.float64) for _ in range(3))
    for p, model in ((torch_prune, theirs), (prune, ours)):
        gradual(p, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), clip=0.05)
    torch.testing.assert_close(ours(data(torch.float64)[0]), theirs(data(torch.float64)[0]), rtol=0, atol=1e-12)
    gradual(prune, plain, torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9))  # it did clip
    assert (plain(data(torch.float64)[0]) - ours(data(torch.float64)[0])).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_momentum_from_before_brings_nothing_back(optimizer: str) -> None:
    model = nn.Linear(6, 6)
    steps_of = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(2):
        model(torch.ones(3, 6)).square().sum().backward()
        steps_of.step()
    prune.l1_unstructured(model, "weight", 0.5)
    assert any(
        bool((v[model.weight_mask == 0] != 0).any())
        for v in steps_of.state[model.weight].values()
        if v is not None and v.dim()
    )
    before = model.weight.detach().clone()
    steps_of.zero_grad()
    model(torch.ones(3, 6)).square().sum().backward()
    assert not model.weight.grad[model.weight_mask == 0].any()
    steps_of.step()
    assert not dead(model).any() and len(dead(model)) == 18
    assert not torch.equal(model.weight, before)


def test_steps_of_ones_own() -> None:
    model = layer()
    with torch.no_grad():
        model.weight += 1  # seen by its version
    model(torch.ones(1, 6))
    assert not dead(model).any()
    model.weight.data = torch.ones(6, 6)  # by its memory
    model(torch.ones(1, 6))
    assert not dead(model).any()
    model.weight = nn.Parameter(torch.ones(6, 6))  # by the object, whose gradient is masked from now on
    model(torch.ones(1, 6)).sum().backward()
    assert not dead(model).any() and not model.weight.grad[model.weight_mask == 0].any()
    assert model.weight_orig is model.weight


@pytest.mark.parametrize("mode", [True, False])
def test_rewinding_through_data(mode: bool) -> None:
    """Writes through ``.data`` leave no trace; they are caught at train() and eval(), after pruning, and by refresh."""
    model, x = layer(), torch.ones(1, 6)
    model.weight.data.fill_(1)
    model(x)  # the first pass after pruning
    assert not dead(model).any()
    for notice in (
        lambda: model.train(mode),
        lambda: model.weight_orig,
        lambda: prune.refresh(model),
        model.state_dict,
    ):
        model(x)
        model.weight.data.fill_(1)
        notice()
        model(x)
        assert not dead(model).any()
    model.train(mode)
    model.weight.data.fill_(1)
    model(x)
    assert not dead(model).any()
    model.weight.data.fill_(1)
    model(x)
    assert dead(model).all()  # the documented gap, until something of the above


def test_a_forward_pass_of_weights_at_rest_masks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = nn.Sequential(layer(), layer()), []
    real = _kept.apply_bits_
    monkeypatch.setattr(_kept, "apply_bits_", lambda *args: (calls.append(len(args[0])), real(*args)))
    optimizer, x = torch.optim.SGD(model.parameters(), 0.1), torch.ones(2, 6)
    model(x)
    calls.clear()
    for _ in range(3):
        model(x)
    assert calls == []
    model(x).sum().backward()
    assert calls == [1, 1]  # each gradient
    optimizer.step()
    assert calls == [1, 1, 2]  # both weights at once
    model(x)
    assert calls == [1, 1, 2]


def test_gradients_in_other_ways() -> None:
    model, x = layer(), torch.randn(3, 6)
    alive = model.weight_mask
    (grad,) = torch.autograd.grad(model(x).square().sum(), [model.weight])
    assert not grad[alive == 0].any() and grad[alive == 1].all()
    (grad,) = torch.autograd.grad(model(x).pow(3).sum(), [model.weight], create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), [model.weight])
    w = model.weight.detach().clone().requires_grad_()  # the same, by hand
    (first,) = torch.autograd.grad(nn.functional.linear(x, w * alive, model.bias).pow(3).sum(), [w], create_graph=True)
    (wanted,) = torch.autograd.grad(first.square().sum(), [w])
    torch.testing.assert_close(second, wanted)

    model.zero_grad()
    (model(x) * float("nan")).sum().backward()  # dead entries take no part in what went wrong
    assert not model.weight.grad[alive == 0].any() and model.weight.grad[alive == 1].isnan().all()


def test_a_layer_called_twice_in_one_pass() -> None:
    model = layer()
    with torch.no_grad():
        model.weight += 1
    model(torch.tanh(model(torch.ones(2, 6)))).sum().backward()
    assert not model.weight.grad[model.weight_mask == 0].any()


def test_masking_between_forward_and_backward_leaves_the_graph_alone() -> None:
    model, x = layer(), torch.ones(2, 6, requires_grad=True)
    out = model(x)
    model.state_dict()
    prune.refresh(model)
    model.eval()
    model(x)  # masked again, as after eval()
    out.sum().backward()
    torch.testing.assert_close(x.grad, model.weight.detach().sum(0).expand(2, 6))


def test_mixed_precision_and_checkpointed_passes() -> None:
    model, x = nn.Sequential(layer(), nn.ReLU(), layer()), torch.ones(2, 6, requires_grad=True)
    for reentrant in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    for each in (model[0], model[2]):
        assert each.weight.grad.any() and not each.weight.grad[each.weight_mask == 0].any()


def test_frozen_and_thawed() -> None:
    model = nn.Linear(6, 6).requires_grad_(False)
    prune.l1_unstructured(model, "weight", 0.5)
    model(torch.ones(1, 6))
    model.requires_grad_(True)
    model(torch.ones(1, 6)).sum().backward()
    assert not model.weight.grad[model.weight_mask == 0].any()


def test_functional_call_leaves_the_tensors_of_others_alone() -> None:
    model, own = layer(), torch.ones(6, 6)
    out = torch.func.functional_call(model, {"weight": own, "bias": torch.zeros(6)}, (torch.ones(1, 6),))
    assert out.tolist() == [[6.0] * 6] and bool((own == 1).all())


def test_replicas_of_data_parallel_are_masked() -> None:
    model = layer()
    replica = model._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.ones(6, 6), torch.zeros(6)
    assert replica(torch.ones(1, 6)).sum() == 24


def test_parts_of_attention_and_recurrent_cells() -> None:
    """Their weights are read without the forward pass of the layer that holds them."""
    torch.manual_seed(0)
    attention, lstm = nn.MultiheadAttention(8, 2), nn.LSTM(4, 5)
    prune.l1_unstructured(attention.out_proj, "weight", 0.5)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    prune.l1_unstructured(lstm, "weight_hh_l0", 0.5)
    parts = [(attention.out_proj, "weight"), (attention, "in_proj_weight"), (lstm, "weight_hh_l0")]
    optimizer = torch.optim.Adam([*attention.parameters(), *lstm.parameters()], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(3, 2, 8)
        (attention(x, x, x)[0].square().sum() + lstm(x[..., :4])[0].sum()).backward()
        optimizer.step()
    for module, name in parts:
        assert not getattr(module, name)[getattr(module, f"{name}_mask") == 0].any()


def test_a_resized_layer_is_refused() -> None:
    model = layer()
    model.weight = nn.Parameter(torch.ones(6, 7))
    with pytest.raises(
        ValueError, match=r"'weight' must keep the shape \[6, 6\] of its mask, got \[6, 7\]; call remove"
    ):
        model(torch.ones(1, 7))
    model = layer()
    model.weight.data = torch.ones(3, 6)
    for call in (lambda: model(torch.ones(1, 6)), model.train, model.state_dict, lambda: prune.refresh(model)):
        with pytest.raises(ValueError, match=r"'weight' must keep the shape \[6, 6\] of its mask, got \[3, 6\]"):
            call()


# ------------------------------------------------------------------------------------------------ copies, files, devices


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_train_on_by_themselves(how: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    gradual(prune, model, torch.optim.SGD(model.parameters(), 0.1))
    other = how(model)
    assert prune.masks(other) == prune.masks(model) and type(other[0]) is type(model[0]) is not nn.Conv2d
    assert type(other[0]).__name__ == "Conv2d" and isinstance(other[0], nn.Conv2d)
    before = copy.deepcopy(model.state_dict())
    steps(other, torch.optim.Adam(other.parameters(), 0.1), 3)
    for i in (0, 4, 6):
        assert not other[i].weight[other[i].weight_mask == 0].any()
        assert not torch.equal(other[i].weight, model[i].weight)
    prune.remove(other[4], "weight")
    assert "4.weight" in prune.masks(model).bits
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_torch_cannot_copy_what_it_pruned() -> None:
    """What the table in docs/compat/prune.md says of it, and of the names in its state dict."""
    theirs = torch_prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    assert set(theirs.state_dict()) == {"weight_orig", "weight_mask", "bias"}
    shared = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    shared[1].weight = shared[0].weight
    torch_prune.l1_unstructured(shared[0], "weight", 0.5)
    assert (shared[0].weight == 0).any() and not (shared[1].weight == 0).any()


def test_a_module_saved_whole(tmp_path: Path) -> None:
    model = network()
    prune.l1_unstructured(model[4], "weight", 0.5)
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert prune.masks(found) == prune.masks(model)


def test_states_are_plain_and_always_masked() -> None:
    model = layer()
    with torch.no_grad():
        model.weight += 1  # no forward pass after it
    state = model.state_dict()
    assert set(state) == {"weight", "bias"} and int((state["weight"] == 0).sum()) == 12
    assert [n for n, _ in model.named_parameters()] == ["weight", "bias"] and not list(model.buffers())
    nn.Linear(6, 6).load_state_dict(state)
    model.load_state_dict({"weight": torch.ones(6, 6), "bias": torch.ones(6)})
    assert not dead(model).any()
    model.load_state_dict({"weight": torch.ones(6, 6), "bias": torch.ones(6)}, assign=True)
    assert not dead(model).any()
    model(torch.ones(1, 6)).sum().backward()
    assert not model.weight.grad[model.weight_mask == 0].any()


def test_masks_can_be_assigned() -> None:
    model = layer()
    model.weight_mask = torch.eye(6)
    assert torch.equal(model.weight_mask, torch.eye(6)) and int((model.weight != 0).sum()) <= 6
    with pytest.raises(ValueError, match="weight_mask must hold 0 and 1 only"):
        model.weight_mask = torch.full((6, 6), 0.5)
    model.weight_mask.fill_(1)  # of a copy
    assert torch.equal(model.weight_mask, torch.eye(6))
    with pytest.raises(KeyError, match="weight_orig"):
        model.weight_orig = nn.Parameter(torch.ones(6, 6))


def test_other_dtypes_later() -> None:
    model = layer().to(torch.bfloat16)
    model(torch.ones(1, 6, dtype=torch.bfloat16)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert not dead(model).any() and model.weight_mask.dtype == torch.bfloat16


def test_layers_in_other_memory_formats() -> None:
    model = network().to(memory_format=torch.channels_last)
    plain = network()
    for each in (model, plain):
        gradual(prune, each, torch.optim.SGD(each.parameters(), 0.1, momentum=0.9))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(data()[0]), plain(data()[0]), rtol=1e-4, atol=1e-5)


def test_layers_that_are_parametrized_later() -> None:
    model = layer()
    nn.utils.parametrizations.weight_norm(model, "bias", dim=None)
    prune.remove(model, "weight")
    assert not prune.is_pruned(model)
    model(torch.ones(1, 6)).sum().backward()


def test_compiled_and_exported() -> None:
    model, plain = network(), network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (model, plain):
        prune.global_unstructured([(each[i], "weight") for i in (0, 4, 6)], prune.L1Unstructured, amount=0.6)
    a, b = (torch.optim.Adam(m.parameters(), 0.01) for m in (model, plain))
    x, y = data()
    for _ in range(3):
        for net, optimizer in ((compiled, a), (plain, b)):
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
    for i in (0, 4, 6):
        assert not model[i].weight[model[i].weight_mask == 0].any()
        torch.testing.assert_close(model[i].weight, plain[i].weight)
    model.eval()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


# --------------------------------------------------------------------------------------------------------------- memory


def held(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that are alive after a call, and were not before; what it returns is kept till then."""

    def storages() -> dict[int, int]:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}

    before = storages()
    keep = call()
    after = storages()
    del keep
    return sum(size for place, size in after.items() if place not in before)


def rounds(p: Any, count: int) -> nn.Module:
    model = nn.Linear(128, 64, bias=False)
    for _ in range(count):
        p.global_unstructured([(model, "weight")], p.L1Unstructured, amount=0.2)
    model(torch.ones(1, 128))
    return model


@pytest.mark.parametrize("count", [1, 2, 8])
def test_bytes_a_weight(count: int) -> None:
    n = 128 * 64
    assert held(lambda: rounds(prune, count)) == 4 * n + n // 8
    theirs = held(lambda: rounds(torch_prune, count))
    assert theirs >= 12 * n, "torch has become smaller: docs/compat/prune.md says what it needs"
