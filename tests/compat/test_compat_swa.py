# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torch.optim.swa_utils, beside torch's own on the same models, and against the mean in float64."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

from zipfast.compat import swa
from zipfast.ops import blend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compat" / "swa.md"
U = 2.0**-24


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)]
    model = nn.Sequential(*layers).to(dtype)
    model[1].running_mean.normal_()
    model[1].num_batches_tracked.fill_(10 + seed)
    return model


def mean(models: list[nn.Sequential]) -> dict[str, Tensor]:
    return {n: torch.stack([m.state_dict()[n].double() for m in models]).mean(0) for n in models[0].state_dict()}


def averaged(library: Any, models: list[nn.Sequential], **options: Any) -> Any:
    found = library.AveragedModel(models[0], **options)
    for model in models:
        found.update_parameters(model)
    return found


def own_rule(averaged: Any, current: Any, count: Any) -> None:
    assert len({t.dtype for t in [*averaged, *current]}) == 1
    for a, c in zip(averaged, current):
        a.mul_(0.75).add_(c, alpha=0.25)


def largest(models: list[nn.Sequential]) -> float:
    return max(
        float(p.detach().abs().max()) for m in models for p in [*m.parameters(), *m.buffers()] if p.is_floating_point()
    )


# ------------------------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_equal_averages_are_those_of_torch(count: int, use_buffers: bool) -> None:
    models = [network(seed) for seed in range(count)]
    one, two = (averaged(library, models, use_buffers=use_buffers) for library in (swa, theirs))
    bound = 4 * count * U * largest(models)
    exact, ours = mean(models), one.module.state_dict()
    assert list(one.state_dict()) == list(two.state_dict()) and int(one.n_averaged) == int(two.n_averaged) == count
    for name, value in two.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=bound)
            if "running" not in name or use_buffers:
                torch.testing.assert_close(ours[name].double(), exact[name], rtol=0, atol=bound)
    if not use_buffers:  # those of the latest model
        assert all(torch.equal(a, b) for a, b in zip(one.module.buffers(), models[-1].buffers()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    models = [nn.Linear(7, 3, dtype=dtype) for _ in range(6)]
    one, two = averaged(swa, models), averaged(theirs, models)
    torch.testing.assert_close(one.module.weight, two.module.weight)
    wanted = torch.stack([m.weight.detach() for m in models]).mean(0)
    torch.testing.assert_close(one.module.weight.detach(), wanted)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_exponential_averages_are_those_of_torch(decay: float) -> None:
    models = [network(seed) for seed in range(12)]
    bound = 4 * len(models) * U * largest(models)
    for use_buffers in (False, True):
        two = averaged(theirs, models, multi_avg_fn=theirs.get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
        for options in ({"multi_avg_fn": swa.get_ema_multi_avg_fn(decay)}, {"avg_fn": swa.get_ema_avg_fn(decay)}):
            one = averaged(swa, models, use_buffers=use_buffers, **options)
            for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
                if a.is_floating_point():
                    torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize(
    "options", [{"avg_fn": lambda a, c, n: torch.maximum(a, c) - n}, {"multi_avg_fn": own_rule},
                {"avg_fn": theirs.get_swa_avg_fn()}, {"multi_avg_fn": theirs.get_swa_multi_avg_fn()}],
    ids=["one", "many", "torch's one", "torch's many"],
)  # fmt: skip
def test_functions_of_ones_own_get_what_torch_gives_them(options: dict[str, Any]) -> None:
    models = [network(seed) for seed in range(4)]
    one, two = averaged(swa, models, **options), averaged(theirs, models, **options)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(a, b), name


def test_our_rules_in_the_model_of_torch() -> None:
    models = [network(seed) for seed in range(4)]
    for rule in (swa.get_swa_multi_avg_fn(), swa.get_ema_multi_avg_fn(0.9)):
        one = averaged(swa, models, multi_avg_fn=rule, use_buffers=True)
        two = averaged(theirs, models, multi_avg_fn=rule, use_buffers=True)
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    pair = ([torch.zeros(3)], [torch.full((3,), 4.0)])
    swa.get_swa_multi_avg_fn()(*pair, 3)  # a plain number
    assert pair[0][0].tolist() == [1, 1, 1]
    swa.get_swa_multi_avg_fn()([], [], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [None, "ema"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, rule: str | None) -> None:
    models = [nn.Linear(100, 100).to(dtype) for _ in range(15)]  # 2^k would make many means exact ties
    options = {} if rule is None else {"multi_avg_fn": swa.get_ema_multi_avg_fn(0.9)}
    one = averaged(swa, models, **options)
    exact = models[0].weight.detach().double()
    for n, model in enumerate(models[1:], 1):
        keep = n / (n + 1) if rule is None else 0.9
        exact = exact * keep + model.weight.detach().double() * (1 - keep)
    wrong = (one.module.weight != exact.to(dtype)).double().mean()
    assert wrong < 0.01
    options = {} if rule is None else {"multi_avg_fn": theirs.get_ema_multi_avg_fn(0.9)}
    their_wrong = (averaged(theirs, models, **options).module.weight != exact.to(dtype)).double().mean()
    assert their_wrong > 0.2  # each update rounds
    assert one.module.weight.dtype == dtype and len(one.state_dict()) == 3


def test_half_precision_goes_on_where_others_write() -> None:
    models = [nn.Linear(20, 20).to(torch.bfloat16) for _ in range(6)]
    one = averaged(swa, models[:5])
    copied = copy.deepcopy(one)  # its float32 averages come along
    for each in (one, copied):
        each.update_parameters(models[5])
        assert torch.equal(each.module.weight, averaged(swa, models).module.weight)
    loaded = swa.AveragedModel(models[0])
    loaded.update_parameters(models[0])
    loaded.update_parameters(models[1])
    loaded.load_state_dict(
        averaged(swa, models[:5]).state_dict()
    )  # over float32 averages that are now of another model
    loaded.update_parameters(models[5])
    step = torch.finfo(torch.bfloat16).eps * float(one.module.weight.detach().abs().max())
    torch.testing.assert_close(loaded.module.weight, one.module.weight, rtol=0, atol=2 * step)
    with torch.no_grad():
        loaded.module.weight.zero_()
    loaded.update_parameters(models[0])
    torch.testing.assert_close(loaded.module.weight, (models[0].weight.float() / 7).bfloat16(), rtol=0, atol=0)


def test_models_of_another_dtype_than_the_average() -> None:
    models = [nn.Linear(30, 30).to(torch.bfloat16) for _ in range(3)]
    one = swa.AveragedModel(copy.deepcopy(models[0]).float())
    for model in models:
        one.update_parameters(model)
    wanted = torch.stack([m.weight.detach().double() for m in models]).mean(0)
    torch.testing.assert_close(one.module.weight.detach().double(), wanted, rtol=0, atol=12 * U)


# -------------------------------------------------------------------------------------------------------------- buffers


def test_whole_numbers_are_not_averaged() -> None:
    """torch truncates each mean: of 3, 4, 5 and 9 it makes 3 or 4."""
    counts = [3, 4, 5, 9]
    models = [network(0) for _ in counts]
    for model, count in zip(models, counts):
        model[1].num_batches_tracked.fill_(count)
    found = {}
    for library in (swa, theirs):
        for options in ({}, {"multi_avg_fn": library.get_ema_multi_avg_fn(0.5)}):
            module = averaged(library, models, use_buffers=True, **options).module
            found.setdefault(library.__name__, []).append(int(module[1].num_batches_tracked))
    assert found[swa.__name__] == [9, 9]
    assert found[theirs.__name__][0] < 5.25 and 9 not in found[theirs.__name__]


# -------------------------------------------------------------------------------------------------- calls and life cycle


def test_one_call_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], swa.blend_
    monkeypatch.setattr(swa, "blend_", lambda out, *rest: (calls.append(len(out)), real(out, *rest)))
    models = [network(seed) for seed in range(3)]
    for model in models:
        model[4].to(torch.bfloat16)
    averaged(swa, models)
    assert calls == [6, 6]  # two updates: the 16-bit layer is averaged in float32 with the others
    averaged(swa, [m.double() for m in models])
    assert calls == [6] * 4
    assert isinstance(blend.blend_, type(real))


@pytest.mark.parametrize("form", ["channels last", "rows apart"])
def test_memory_formats(form: str) -> None:
    models = [network(seed) for seed in range(3)]
    plain, found = averaged(swa, models), swa.AveragedModel(models[0])
    for model in [*models, found.module]:
        if form == "channels last":
            model.to(memory_format=torch.channels_last)
        else:
            model[4].weight.data = torch.cat([model[4].weight.data] * 2, 1)[:, :36]
    layer = 0 if form == "channels last" else 4
    strides = found.module[layer].weight.stride()
    assert not found.module[layer].weight.is_contiguous()
    for model in models:
        found.update_parameters(model)
    assert found.module[layer].weight.stride() == strides
    for a, b in zip(found.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(a, b)


def test_states_go_both_ways() -> None:
    models = [network(seed) for seed in range(6)]
    whole = averaged(swa, models)
    for first, second in ((swa, theirs), (theirs, swa), (swa, swa)):
        start = averaged(first, models[:3])
        found = second.AveragedModel(network(9))
        found.load_state_dict(start.state_dict())
        assert int(found.n_averaged) == 3
        for model in models[3:]:
            found.update_parameters(model)
        for (name, a), b in zip(found.state_dict().items(), whole.state_dict().values()):
            torch.testing.assert_close(
                a, b, rtol=0, atol=24 * U * largest(models) if a.is_floating_point() else 0, msg=name
            )
            assert first is theirs or second is theirs or torch.equal(a, b)
    assert isinstance(whole, theirs.AveragedModel)


def test_copies_and_pickles() -> None:
    models = [network(seed) for seed in range(3)]
    one = averaged(swa, models, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    two = pickle.loads(pickle.dumps(one))
    for each in (one, two):
        each.update_parameters(network(7))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    x = torch.randn(2, 2, 5, 5)
    one.eval()
    assert torch.equal(one(x), one.module(x))


def test_wrapped_models_are_taken() -> None:
    models = [network(seed) for seed in range(3)]
    one, two = swa.AveragedModel(models[0]), averaged(swa, models)
    for model in models:
        one.update_parameters(nn.DataParallel(model))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_with_swalr_in_a_loop() -> None:
    """The loop of torch's own documentation, with either library."""
    x, y = torch.randn(64, 2, 5, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 5
    found = []
    for library in (swa, theirs):
        model = network(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        average, schedule = library.AveragedModel(model), library.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for epoch in range(6):
            for batch in range(0, 64, 16):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch : batch + 16]), y[batch : batch + 16]).backward()
                optimizer.step()
            if epoch >= 2:
                average.update_parameters(model)
                schedule.step()
        library.update_bn([x[:32], x[32:]], average)
        average.eval()
        found.append((average(x).detach(), optimizer.param_groups[0]["lr"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1] == 0.05


# ------------------------------------------------------------------------------------------------------------ batch norm


def batches() -> list[Tensor]:
    return list(torch.randn(5, 8, 2, 5, 5, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("form", [lambda b: b, lambda b: (b, 1), lambda b: [b]], ids=["tensor", "tuple", "list"])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_update_bn_is_that_of_torch(form: Callable[[Tensor], Any], device: torch.device | None) -> None:
    one, two = network(0).eval(), network(0).eval()
    swa.update_bn([form(b) for b in batches()], one, device)
    theirs.update_bn([form(b) for b in batches()], two, device)
    assert not one.training and one[1].momentum == two[1].momentum == 0.1
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    swa.update_bn(iter([]), nn.Linear(2, 2))  # nothing to do


class Inner(nn.Module):
    """A norm behind a choice of what it is given."""

    def __init__(self, get: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.norm, self.get = nn.BatchNorm1d(3), get

    def forward(self, x: Any) -> Tensor:
        return self.norm(self.get(x))


class Batch:
    """A batch of a class of its own, as graph libraries have them."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> Batch:
        return Batch(self.x.to(device))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "get, form, device",
    [
        (lambda b: b["feats"], lambda x: {"feats": x}, None),
        (lambda b: b["feats"], lambda x: ({"feats": x, "x": 3}, 1), None),
        (lambda b: b.x, Batch, None),
        (lambda b: b.x, Batch, "cpu"),
        (lambda views: torch.cat(views), lambda x: [[x, x + 1], 0], None),
        (lambda views: torch.cat(views), lambda x: ((x, x + 1), 0), None),
    ],
)
@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, swa.AveragedModel, compiled, lambda m: swa.AveragedModel(compiled(m))],
    ids=["plain", "averaged", "compiled", "averaged compiled"],
)
def test_update_bn_with_inputs_of_other_kinds(
    get: Callable[[Any], Tensor], form: Callable[[Tensor], Any], device: Any, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    one, two = wrap(Inner(get)), wrap(Inner(get))
    loader = [form(x) for x in torch.randn(4, 8, 3)]
    swa.update_bn(loader, one, device)
    theirs.update_bn(loader, two, device)
    for a, b in zip(one.buffers(), two.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, swa.AveragedModel, nn.DataParallel], ids=["plain", "averaged", "parallel"]
)
def test_update_bn_by_keyword(wrap: Callable[[nn.Module], nn.Module]) -> None:
    x = torch.randn(8, 3)
    model = wrap(Inner(lambda t: t))
    for device in (None, "cpu"):
        swa.update_bn([{"x": x}], model, device)
    (mean,) = (b for name, b in model.named_buffers() if name.endswith("running_mean"))
    torch.testing.assert_close(mean, x.mean(0))


def test_update_bn_where_torch_differs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].eval()  # frozen
    x = torch.randn(2000, 3)
    swa.update_bn([x], model)
    torch.testing.assert_close(model[1].running_var, x.var(0))  # of what it will see: no dropout
    assert model[0].training and not model[1].training
    other = copy.deepcopy(model)
    theirs.update_bn([x], other)
    assert (other[1].running_var > 1.5 * x.var(0)).all() and other[1].training

    def stops() -> Iterator[Tensor]:
        yield x
        raise OSError("the disk")

    for loader, error in ((stops, OSError), (list, ValueError)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=r"the disk|'batches' must hold at least one batch, got none"):
            swa.update_bn(loader(), model)
        assert all(torch.equal(before[n], v) for n, v in model.state_dict().items()) and model[1].momentum == 0.1


# --------------------------------------------------------------------------------------------------------------- errors


def test_other_models_are_refused() -> None:
    """torch averages what fits, and broadcasts what does not."""
    small, wide, normless = network(1)[:4], network(1), network(1)
    wide[4] = nn.Linear(36, 1)
    normless[1].running_mean = None
    for model, message in (
        (small, "'model' must have the 6 parameters of the averaged one, got 4"),
        (wide, "'module.4.weight' of 'model' must have the shape [5, 36] of the averaged one, got [1, 36]"),
        (normless, "'model' must have the 3 buffers of the averaged one, got 2"),
    ):
        found = averaged(swa, [network(0), network(2)])
        before = copy.deepcopy(found.state_dict())
        with pytest.raises(ValueError, match=re.escape(message.replace("module.", ""))):
            found.update_parameters(model)
        assert all(torch.equal(before[n], v) for n, v in found.state_dict().items())
    reference = theirs.AveragedModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    reference.update_parameters(nn.Sequential(nn.Linear(1, 2)))  # not a word


def test_errors_of_the_constructor_and_rules() -> None:
    for library in (swa, theirs):
        with pytest.raises(AssertionError, match=r"one of 'avg_fn' and 'multi_avg_fn' must be None|Only one of"):
            library.AveragedModel(nn.Linear(1, 1), avg_fn=min, multi_avg_fn=max)
        for decay in (-0.1, 1.5):
            with pytest.raises(ValueError, match=rf"'decay' must be in \[0, 1\], got {decay}|Invalid decay"):
                library.get_ema_multi_avg_fn(decay)


# ----------------------------------------------------------------------------------------------------------------- docs


def test_the_page_lists_every_call_of_torch() -> None:
    rows = re.findall(r"^\| `([\w.]+)[^|]*\| (same|same, and fixed where [^|]+|not offered, because [^|]+) \|$",
                      PAGE.read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
    listed = dict(rows)
    methods = {f"AveragedModel.{n}" for n in ("update_parameters", "forward", "state_dict")}
    assert set(theirs.__all__) | methods <= set(listed)
    assert set(theirs.__all__) == set(swa.__all__)
