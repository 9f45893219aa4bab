# SPDX-License-Identifier: Apache-2.0
"""Optimisers of masked networks: fused and own steps, the three modes, what is dead, state dicts, schedules, hooks."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from zipfast.tickets import Batches, MaskedOptimizer, Masks, Task, train, why_not_fused

NAN = float("nan")
MODES = ("grad", "post", "forward")
Make = Callable[[Any], Optimizer]

SGDS: dict[str, Make] = {
    "sgd": lambda ps: SGD(ps, 0.05),
    "sgd decay": lambda ps: SGD(ps, 0.05, weight_decay=1e-2),
    "sgd momentum": lambda ps: SGD(ps, 0.05, momentum=0.9),
    "sgd momentum decay": lambda ps: SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": lambda ps: SGD(ps, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "sgd dampening": lambda ps: SGD(ps, 0.05, momentum=0.9, dampening=0.3),
    "sgd maximize": lambda ps: SGD(ps, 0.01, momentum=0.5, maximize=True),
}
ADAMS: dict[str, Make] = {
    "adam": lambda ps: Adam(ps, 1e-2),
    "adam decay": lambda ps: Adam(ps, 1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=1e-2),
    "adam decoupled": lambda ps: Adam(ps, 1e-2, weight_decay=1e-2, decoupled_weight_decay=True),
    "adamw": lambda ps: AdamW(ps, 1e-2, weight_decay=0.1),
}
OTHERS: dict[str, Make] = {
    "rmsprop": lambda ps: RMSprop(ps, 1e-2, momentum=0.9, weight_decay=1e-2),
    "rmsprop centered": lambda ps: RMSprop(ps, 1e-2, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-2),
    "amsgrad": lambda ps: Adam(ps, 1e-2, amsgrad=True),
}
FUSED = SGDS | ADAMS
ALL = FUSED | OTHERS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on several threads of a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = OrderedDict(fc=nn.Linear(6, 11), norm=nn.LayerNorm(11), relu=nn.ReLU(), out=nn.Linear(11, 4))
    return nn.Sequential(layers).to(dtype)


def masks_of(net: nn.Module, rate: float = 0.5) -> Masks:
    return Masks.ones(net).prune(net, rate)


def batch(i: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + i)
    return torch.randn(7, 6, generator=generator, dtype=dtype), torch.randint(4, (7,), generator=generator)


def loss_of(net: nn.Module, i: int) -> Tensor:
    x, y = batch(i, next(net.parameters()).dtype)
    return nn.functional.cross_entropy(net(x), y)


def run(steps: MaskedOptimizer, net: nn.Module, count: int = 8, start: int = 0, clip: float | None = None) -> None:
    for i in range(start, start + count):
        steps.zero_grad()
        loss_of(net, i).backward()
        if clip is not None:
            steps.mask_gradients()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        steps.step()


def trained(make: Make, *, dtype: torch.dtype = torch.float32, clip: float | None = None, count: int = 8, **options):
    """A network after a few steps, what is dead set to 0, and its optimiser."""
    net = network(dtype=dtype)
    masks = masks_of(net)
    steps = MaskedOptimizer(make(net.parameters()), net, masks, **options)
    run(steps, net, count, clip=clip)
    masks.apply_(net)
    return net, steps


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def states(steps: MaskedOptimizer) -> dict[str, Tensor]:
    plain = steps.optimizer.state_dict()["state"]
    return {f"{i}/{name}": v for i, own in plain.items() for name, v in own.items() if isinstance(v, Tensor)}


def dead(masks: Masks, steps: MaskedOptimizer, net: nn.Module, gradients: bool = True) -> list[Tensor]:
    """All that must be 0 in mode grad: dead weights, their state, their gradients."""
    found, weights = list[Tensor](), masks.check(net)
    for name, alive in masks.dense().items():
        weight = weights[name]
        own = [weight.detach(), *(v for v in steps.optimizer.state.get(weight, {}).values() if isinstance(v, Tensor))]
        if gradients and weight.grad is not None:
            own.append(weight.grad)
        found += [v[~alive] for v in own if v.shape == weight.shape]
    return found


# fused and own steps


@pytest.mark.parametrize("name", SGDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_sgd_has_the_bits_of_torch(name: str, dtype: torch.dtype) -> None:
    fused, one = trained(SGDS[name], dtype=dtype)
    plain, two = trained(SGDS[name], dtype=dtype, fused=False)
    assert one.fused and not two.fused
    assert same(fused, plain)
    assert all(torch.equal(v, states(two)[n]) for n, v in states(one).items()) and len(states(one)) == len(states(two))


@pytest.mark.parametrize("name", ADAMS)
def test_fused_adam_is_close_to_torch(name: str) -> None:
    """In float64: in float32 torch's own Adam is not that near to the exact one."""
    fused, one = trained(ADAMS[name], dtype=torch.float64, count=25)
    plain, two = trained(ADAMS[name], dtype=torch.float64, count=25, fused=False)
    assert one.fused and not two.fused
    for got, want in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert states(one).keys() == states(two).keys()
    for key, got in states(one).items():
        torch.testing.assert_close(got, states(two)[key], rtol=0, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ADAMS)
def test_first_fused_adam_step_in_float32(name: str) -> None:
    fused, _ = trained(ADAMS[name], count=1)
    plain, _ = trained(ADAMS[name], count=1, fused=False)
    for got, want in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ["sgd nesterov", "adamw"])
def test_all_alive_is_the_plain_optimiser(name: str, fused: bool | None) -> None:
    net, plain = network(dtype=torch.float64), network(dtype=torch.float64)
    steps = MaskedOptimizer(ALL[name](net.parameters()), net, Masks.ones(net), fused=fused)
    optimizer = ALL[name](plain.parameters())
    run(steps, net)
    for i in range(8):
        optimizer.zero_grad()
        loss_of(plain, i).backward()
        optimizer.step()
    for got, want in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if name.startswith("sgd") else 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    net = network(dtype=dtype)
    masks = masks_of(net)
    for make in (SGDS["sgd nesterov"], ADAMS["adam"]):
        steps = MaskedOptimizer(make(net.parameters()), net, masks)
        assert steps.fused
        run(steps, net, 3)
        assert all(not v.any() for v in dead(masks, steps, net, gradients=False)) and net.fc.weight.isfinite().all()


# modes


@pytest.mark.parametrize("name", ALL)
def test_survivors_are_the_same_in_all_modes(name: str) -> None:
    """Coordinate-wise optimisers: bit for bit, where each takes its own steps."""
    nets = {mode: trained(ALL[name], mode=mode, fused=False)[0] for mode in MODES}
    assert same(nets["grad"], nets["post"]) and same(nets["grad"], nets["forward"])
    assert not same(nets["grad"], trained(ALL[name], count=7, fused=False)[0]), "it does train"


@pytest.mark.parametrize("name", SGDS)
def test_survivors_of_fused_sgd_are_those_of_open_lth(name: str) -> None:
    fused, steps = trained(SGDS[name])
    assert steps.fused and same(fused, trained(SGDS[name], mode="forward")[0])


@pytest.mark.parametrize("name", ["sgd momentum decay", "adam", "rmsprop"])
def test_clipping_couples_the_dead_to_the_survivors(name: str) -> None:
    nets = {mode: trained(ALL[name], mode=mode, fused=False, clip=0.1, count=4)[0] for mode in MODES}
    assert same(nets["post"], nets["forward"]), "both clip by the norm with dead weights in it"
    assert not same(nets["grad"], nets["forward"])
    if name != "rmsprop":
        fused, steps = trained(ALL[name], dtype=torch.float64, clip=0.1, count=4)
        own, _ = trained(ALL[name], dtype=torch.float64, clip=0.1, count=4, fused=False)
        assert steps.fused
        for got, want in zip(fused.parameters(), own.parameters()):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_gradient_norm_is_that_of_the_survivors() -> None:
    for mode in MODES:
        net = network()
        masks = masks_of(net)
        steps = MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks, mode=mode)
        loss_of(net, 0).backward()
        before = net.fc.weight.grad.clone()
        steps.mask_gradients()
        alive = masks.dense()["fc.weight"]
        wanted = torch.where(alive, before, torch.zeros_like(before)) if mode == "grad" else before
        assert torch.equal(net.fc.weight.grad, wanted), mode


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ALL)
def test_what_is_dead_stays_zero(name: str, fused: bool | None) -> None:
    """Weights, state and gradients, though decay, momentum or NaN gradients would move them."""
    net = network()
    masks = masks_of(net)
    net.fc.weight.data[~masks.dense()["fc.weight"]] = NAN
    steps = MaskedOptimizer(ALL[name](net.parameters()), net, masks, fused=fused)
    assert steps.fused == (fused is None and name in FUSED)
    assert all(not v.any() for v in dead(masks, steps, net)), "masked at once"
    clean, _ = trained(ALL[name], count=4, fused=fused)
    for i in range(4):
        steps.zero_grad()
        loss_of(net, i).backward()
        for key, alive in masks.dense().items():
            masks.check(net)[key].grad[~alive] = NAN
        if i % 2:
            steps.mask_gradients()
        steps.step()
        found = dead(masks, steps, net, gradients=not steps.fused or bool(i % 2))
        assert len(found) > 2 * bool(states(steps)) and all(not v.any() for v in found)
        assert all(not v.signbit().any() for v in found), "+0"
    assert same(net, clean), "survivors do not feel them"


@pytest.mark.parametrize("name", ["sgd momentum", "adam", "rmsprop"])
def test_mode_post_masks_weights_alone(name: str) -> None:
    net = network()
    masks = masks_of(net)
    steps = MaskedOptimizer(ALL[name](net.parameters()), net, masks, mode="post")
    run(steps, net, 3)
    gone = ~masks.dense()["fc.weight"]
    assert not net.fc.weight[gone].any() and net.fc.weight.grad[gone].any()
    assert any(v[gone].any() for v in steps.optimizer.state[net.fc.weight].values() if v.shape == gone.shape)


def test_mode_forward_masks_before_each_forward() -> None:
    net = network()
    masks = masks_of(net)
    steps = MaskedOptimizer(SGD(net.parameters(), 0.1, momentum=0.9), net, masks, mode="forward")
    gone = ~masks.dense()["fc.weight"]
    assert not net.fc.weight[gone].any()
    run(steps, net, 2)
    assert net.fc.weight[gone].any(), "between step and forward what is dead moves"
    with torch.no_grad():
        net(batch(0)[0])
    assert not net.fc.weight[gone].any()
    steps.remove()
    run(steps, net, 1)
    with torch.no_grad():
        net(batch(0)[0])
    assert net.fc.weight[gone].any(), "the hook is gone"
    steps.remove()
    pickle.loads(pickle.dumps(net))
    assert steps.hook is not None and MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks).hook is None
    MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks).remove()


@pytest.mark.parametrize("mode", MODES)
def test_training_leaves_no_hook(mode: str) -> None:
    net, x = network(), torch.randn(12, 6)
    masks, data = masks_of(net), Batches(x, torch.arange(12) % 4, 5)
    task = Task(network, data, data, data, 3, lambda ps: SGD(ps, 0.1))
    train(task, net, masks, seed=0, mode=mode, trainer="torch")
    assert not net._forward_pre_hooks and Masks.from_zeros(net).within(masks)
    weights = {n: v.clone() for n, v in net.state_dict().items()}
    net(x)
    assert all(torch.equal(v, weights[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_the_model(mode: str, clone: Callable[[nn.Module], nn.Module]) -> None:
    net = network()
    masks = masks_of(net)
    steps = MaskedOptimizer(SGD(net.parameters(), 0.1, momentum=0.9), net, masks, mode=mode)
    run(steps, net, 2)
    other, before = clone(net), {n: v.clone() for n, v in net.state_dict().items()}
    assert same(other, net)
    x = batch(0)[0]
    own = other(x)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items()), "the original is not touched"
    assert torch.equal(own, net(x)) and Masks.from_zeros(other).within(masks)
    run(steps, net, 2, start=2)
    assert not same(other, net)


# groups, schedules, gradients that are not there


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_groups_with_rates_of_their_own(name: str) -> None:
    kind = {"sgd": lambda gs: SGD(gs, 0.1, momentum=0.9), "adam": lambda gs: Adam(gs, 1e-2)}[name]

    def make(net: nn.Sequential) -> Optimizer:
        biases = [net.fc.bias, net.out.bias, *net.norm.parameters()]
        return kind(
            [
                {"params": [net.fc.weight], "lr": 1e-3, "weight_decay": 0.1},
                {"params": biases, "lr": 0.02},
                {"params": [net.out.weight], "lr": 0.0},
            ]
        )

    nets = []
    for fused in (None, False):
        net = network(dtype=torch.float64)
        masks = masks_of(net)
        steps = MaskedOptimizer(make(net), net, masks, fused=fused)
        frozen = net.out.weight.detach().clone()
        run(steps, net)
        assert steps.fused == (fused is None) and torch.equal(net.out.weight, frozen)
        nets.append(net)
    for got, want in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if name == "sgd" else 1e-11)


def test_some_parameters_may_be_frozen_or_left_out() -> None:
    """Masked weights that the optimiser does not hold are masked once, and stay."""
    net = network()
    masks = masks_of(net)
    steps = MaskedOptimizer(SGD([net.out.weight], 0.1, momentum=0.9), net, masks)
    before = net.fc.weight.detach().clone()
    run(steps, net, 3)
    assert torch.equal(net.fc.weight, before) and Masks.from_zeros(net).within(masks)
    frozen = network()
    frozen.fc.weight.requires_grad_(False)
    steps = MaskedOptimizer(Adam(frozen.parameters(), 0.1), frozen, masks)
    run(steps, frozen, 3)
    assert Masks.from_zeros(frozen).within(masks) and frozen.fc.weight not in steps.optimizer.state


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("make", [lambda ps: SGD(ps, 0.1), *FUSED.values()], ids=["plain", *FUSED])
def test_schedulers_change_the_rate(make: Make, fused: bool | None) -> None:
    def one(scheduled: bool) -> nn.Module:
        net = network(dtype=torch.float64)
        steps = MaskedOptimizer(make(net.parameters()), net, masks_of(net), fused=fused)
        base = steps.optimizer.param_groups[0]["lr"]
        factor = [min(1.0, (i + 1) / 4) * 0.1 ** (i >= 5) for i in range(8)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(steps.optimizer, factor.__getitem__) if scheduled else None
        for i in range(7):
            if scheduler is None:
                steps.optimizer.param_groups[0]["lr"] = base * factor[i]
            run(steps, net, 1, start=i)
            if scheduler is not None:
                scheduler.step()
        return net

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's warning of steps of the optimiser that it has not seen
        scheduled = one(True)
    assert same(scheduled, one(False)) and not same(scheduled, trained(make, dtype=torch.float64, count=7)[0])


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adam", "adamw"])
def test_parameters_without_gradient_are_left_alone(name: str, fused: bool | None) -> None:
    """One that had none at first takes its own first step later, as in torch."""

    def one(masked: bool) -> nn.Module:
        net = network(dtype=torch.float64)
        optimizer = ALL[name](net.parameters())
        steps = MaskedOptimizer(optimizer, net, Masks.ones(net), fused=fused) if masked else None
        for i in range(5):
            optimizer.zero_grad()
            loss_of(net, i).backward()
            if i < 2:
                before = net.out.weight.detach().clone()
                net.out.weight.grad = None
            if i == 3:
                net.fc.bias.grad = None
            (optimizer if steps is None else steps).step()
            if i < 2:
                assert torch.equal(net.out.weight, before)
        return net

    for got, want in zip(one(True).parameters(), one(False).parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=0 if name.startswith("sgd") else 1e-11)


def test_no_gradient_at_all() -> None:
    net = network()
    for fused in (None, False):
        steps = MaskedOptimizer(SGD(net.parameters(), 0.1, momentum=0.9), net, masks_of(net), fused=fused)
        before = copy.deepcopy(net)
        steps.mask_gradients()
        steps.step()
        assert same(net, before)


def test_zero_grad() -> None:
    net = network()
    steps = MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks_of(net))
    loss_of(net, 0).backward()
    steps.zero_grad()
    assert all(p.grad is None for p in net.parameters())


# state dicts


@pytest.mark.parametrize("name", ["sgd", "sgd nesterov", "adam decay", "adamw"])
def test_state_dicts_are_those_of_torch(name: str) -> None:
    """From a fused run into a plain optimiser and back, in the midst of a training."""
    net, steps = trained(FUSED[name], dtype=torch.float64, count=3)
    plain, other = trained(FUSED[name], dtype=torch.float64, count=3, fused=False)
    mine, torchs = steps.optimizer.state_dict(), other.optimizer.state_dict()
    assert steps.fused and mine["param_groups"] == torchs["param_groups"]
    kept = {i: set(own) for i, own in mine["state"].items() if own}
    assert kept == {i: set(own) for i, own in torchs["state"].items() if own}
    for key, value in states(steps).items():
        assert value.dtype == states(other)[key].dtype and value.shape == states(other)[key].shape

    masks = Masks.from_zeros(net)
    crossed, back = network(1, torch.float64), network(1, torch.float64)
    crossed.load_state_dict(net.state_dict())
    back.load_state_dict(plain.state_dict())
    one, two = FUSED[name](crossed.parameters()), FUSED[name](back.parameters())
    one.load_state_dict(copy.deepcopy(mine))
    two.load_state_dict(copy.deepcopy(torchs))
    run(MaskedOptimizer(one, crossed, masks, fused=False), crossed, 3, start=3)
    run(MaskedOptimizer(two, back, masks), back, 3, start=3)
    run(steps, net, 3, start=3)
    for found in (crossed, back):
        for got, want in zip(found.parameters(), net.parameters()):
            torch.testing.assert_close(got, want, rtol=0, atol=0 if name.startswith("sgd") else 1e-11)


def test_a_fused_run_goes_on_bit_for_bit() -> None:
    net, steps = trained(ADAMS["adam"], count=3)
    saved = copy.deepcopy((net.state_dict(), steps.optimizer.state_dict()))
    run(steps, net, 3, start=3)
    fresh = network(5)
    fresh.load_state_dict(saved[0])
    optimizer = ADAMS["adam"](fresh.parameters())
    optimizer.load_state_dict(saved[1])
    run(MaskedOptimizer(optimizer, fresh, Masks.from_zeros(fresh)), fresh, 3, start=3)
    assert same(fresh, net)


# why not fused, and errors


def test_reasons_against_the_fused_step() -> None:
    net = network()
    for make in FUSED.values():
        assert why_not_fused(make(net.parameters())) is None
    assert why_not_fused(SGD(net.parameters(), 0.1), "post") == "mode 'post' masks weights alone"
    assert why_not_fused(SGD(net.parameters(), 0.1), "forward") == "mode 'forward' masks weights alone"
    assert why_not_fused(RMSprop(net.parameters())) == "RMSprop is not SGD, Adam or AdamW"
    assert why_not_fused(Adam(net.parameters(), amsgrad=True)) == "it uses amsgrad"
    assert why_not_fused(SGD(net.parameters(), 0.1, differentiable=True)) == "it uses differentiable"

    class Mine(SGD):
        pass

    assert why_not_fused(Mine(net.parameters(), 0.1)) == "Mine is not SGD, Adam or AdamW", "its step may be another"
    strided = nn.Parameter(torch.randn(3, 4).t())
    assert why_not_fused(SGD([strided], 0.1)) == "a parameter of shape [4, 3] is torch.float32 or not contiguous"
    hooked = SGD(net.parameters(), 0.1)
    hooked.register_step_post_hook(lambda *_: None)
    assert why_not_fused(hooked) == "it has hooks around its step"


def test_weights_that_are_not_contiguous() -> None:
    """Channels last: the optimiser's own step, the same numbers."""
    nets = []
    for form in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).double()
        masks = masks_of(net)
        net = net.to(memory_format=form)
        steps = MaskedOptimizer(SGD(net.parameters(), 0.05, momentum=0.9), net, masks)
        assert steps.fused == (form == torch.contiguous_format)
        for i in range(3):
            steps.zero_grad()
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            net(x).square().sum().backward()
            steps.mask_gradients()
            steps.step()
        assert all(not v.any() for v in dead(masks, steps, net))
        nets.append(net)
    for got, want in zip(nets[1].parameters(), nets[0].parameters()):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_errors() -> None:
    net = network()
    masks = masks_of(net)
    with pytest.raises(ValueError, match="'mode' must be one of grad, post, forward, got 'reparam'"):
        MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks, mode="reparam")
    with pytest.raises(ValueError, match="'fused' must be False or None here: RMSprop is not SGD, Adam or AdamW"):
        MaskedOptimizer(RMSprop(net.parameters()), net, masks, fused=True)
    with pytest.raises(ValueError, match="'fused' must be False or None here: mode 'post' masks weights alone"):
        MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks, mode="post", fused=True)
    with pytest.raises(
        ValueError, match=r"^MaskedOptimizer: the masks must be those of this network, got no 'fc\.weight'"
    ):
        MaskedOptimizer(SGD(net.parameters(), 0.1), nn.Linear(3, 3), masks)
    assert MaskedOptimizer(SGD(net.parameters(), 0.1), net, masks, fused=True).fused
