# SPDX-License-Identifier: Apache-2.0
"""masked_step_: against torch.optim tensor by tensor on a CPU, to the bit where that is what the docstring says."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops import masked_step_

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 2053)  # 1024: a block of the emulator
LARGE = (65535, 65536, 65537)  # 65536: a piece of the C++ kernel
TENSORS = 256  # of one CUDA launch
NAN, INF = torch.nan, torch.inf
ALL = torch.zeros(0, dtype=torch.uint8)
FUSES = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")  # torch's own multiply-adds


@dataclass(frozen=True)
class Rule:
    """The numbers of a call, in the order of the op."""

    rule: str
    step: int = 1
    lr: float = 0.05
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    maximize: bool = False

    def optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        same = {"lr": self.lr, "weight_decay": self.weight_decay, "maximize": self.maximize, "foreach": False}
        if self.rule == "sgd":
            own = {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
            return torch.optim.SGD(params, **same, **own)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.rule]
        return kind(params, **same, betas=(self.beta1, self.beta2), eps=self.eps)

    @property
    def states(self) -> int:
        return 2 if self.rule != "sgd" else int(self.momentum != 0)


SGD, MOMENTUM = Rule("sgd"), Rule("sgd", momentum=0.9)
ADAM, ADAMW = Rule("adam"), Rule("adamw", weight_decay=0.1)
RULES = [SGD, MOMENTUM, ADAM, ADAMW]
OPTIONS = [
    *(
        Rule("sgd", weight_decay=wd, momentum=m, dampening=d, nesterov=n, maximize=x)
        for wd, (m, d, n), x in itertools.product(
            (0.0, 1e-2), ((0.0, 0.0, False), (0.9, 0.0, False), (0.5, 0.3, False), (0.9, 0.0, True)), (False, True)
        )
    ),
    *(
        Rule(name, weight_decay=wd, beta1=b1, beta2=b2, eps=eps, maximize=x)
        for name, wd, (b1, b2, eps), x in itertools.product(
            ("adam", "adamw"), (0.0, 1e-2), ((0.9, 0.999, 1e-8), (0.4, 0.5, 1e-3)), (False, True)
        )
    ),
]


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def alive(*shape: int, seed: int, density: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9000 + seed)) < density


def pack(keep: Tensor | None) -> Tensor:
    if keep is None:
        return ALL
    bits = np.packbits(keep.reshape(-1).numpy(), bitorder="little")
    out = np.zeros((keep.numel() + 511) // 512 * 64, np.uint8)
    out[: len(bits)] = bits
    return torch.from_numpy(out)


def run(rule: Rule, param: list[Tensor], states: list[list[Tensor]], grad: list[Tensor], mask: list[Tensor]) -> None:
    first, second = [*states, [], []][:2]
    assert masked_step_(param, first, second, grad, mask, *dataclasses.astuple(rule)) is None


def words(t: Tensor) -> Tensor:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]
    return t.detach().cpu().contiguous().reshape(-1).view(kind)


def dead_are_zero(t: Tensor, keep: Tensor | None) -> bool:
    """Exactly +0, to the bit."""
    return keep is None or not words(t)[~keep.reshape(-1)].any()


def bits_of_reference(rule: Rule, dtype: torch.dtype, quantity: str) -> bool:
    """Whether the compiled kernels have the bits of torch on a CPU."""
    return FUSES and (rule.rule == "sgd" or quantity == "state")


def compare(got: Tensor, want: Tensor, keep: Tensor | None, bits: bool, tolerance: dict[str, float]) -> None:
    assert dead_are_zero(got, keep)
    want = want.detach() if keep is None else torch.where(keep, want.detach(), 0.0)
    if bits:
        assert torch.equal(got.cpu(), want)
    else:
        torch.testing.assert_close(got.cpu(), want, **tolerance)


def test_table_of_sgd(backend: str, device: str) -> None:
    keep = torch.tensor([True, False, True])
    mask, rule = [pack(keep).to(device)], Rule("sgd", lr=0.5, momentum=0.5)
    w, m = torch.tensor([1.0, 2.0, 3.0], device=device), torch.tensor([NAN, 7.0, 7.0], device=device)
    run(rule, [w], [[m]], [torch.tensor([0.5, NAN, 1.0], device=device)], mask)  # the first step does not read m
    assert w.tolist() == [0.75, 0.0, 2.5] and m.tolist() == [0.5, 0.0, 1.0]
    run(replace(rule, step=2), [w], [[m]], [torch.tensor([1.0, INF, 0.0], device=device)], mask)
    assert m.tolist() == [1.25, 0.0, 0.5] and w.tolist() == [0.125, 0.0, 2.25]
    nesterov = replace(rule, step=3, nesterov=True, weight_decay=2.0, maximize=True)
    run(nesterov, [w], [[m]], [torch.tensor([0.25, 0.0, 0.5], device=device)], mask)
    assert m.tolist() == [0.625, 0.0, 4.25]  # m / 2 - g + 2 w
    assert w.tolist() == [0.125 - 0.5 * (0.0 + 0.3125), 0.0, 2.25 - 0.5 * (4.0 + 2.125)]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_table_of_adam(backend: str, device: str, name: str) -> None:
    # without memory every step has the length of the learning rate
    keep = torch.tensor([True, True, False])
    w, m, v = torch.tensor([[1.0, -2.0, 3.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]], device=device).unbind(0)
    grad = torch.tensor([4.0, -0.5, NAN], device=device)
    rule = Rule(name, lr=0.25, beta1=0.0, beta2=0.0, eps=0.0, step=5)
    run(rule, [w], [[m], [v]], [grad], [pack(keep).to(device)])
    assert w.tolist() == [0.75, -1.75, 0.0]
    assert m.tolist() == [4.0, -0.5, 0.0] and v.tolist() == [16.0, 0.25, 0.0]
    run(replace(rule, weight_decay=1.0), [w], [[m], [v]], [grad], [pack(keep).to(device)])
    # coupled: the gradients are 4.75 and -2.25; decoupled: the weights shrink by a quarter first
    assert w.tolist() == ([0.5, -1.5, 0.0] if name == "adam" else [0.3125, -1.0625, 0.0])
    assert m.tolist() == ([4.75, -2.25, 0.0] if name == "adam" else [4.0, -0.5, 0.0])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_ten_steps_of_torch_optim(backend: str, device: str, dtype: torch.dtype, tolerance) -> None:
    shapes = ((1,), (33,), (5, 7), (40,), (0,), (97,))
    keep = [alive(*s, seed=i) if i % 3 else None for i, s in enumerate(shapes)]
    mask = [pack(k).to(device) for k in keep]
    for rule in OPTIONS if backend != "emu" else OPTIONS[::3]:
        peers = [noise(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]
        param = [p.detach().clone().to(device) for p in peers]
        states = [[torch.zeros_like(p) for p in param] for _ in range(rule.states)]
        optimizer = rule.optimizer(peers)
        for step in range(1, 11):
            for i, p in enumerate(peers):
                p.grad = noise(*p.shape, seed=100 * step + i, dtype=dtype)
            optimizer.step()
            # what is dead may have any gradient
            grad = [p.grad if k is None else torch.where(k, p.grad, NAN) for p, k in zip(peers, keep)]
            run(replace(rule, step=step), param, states, [g.to(device) for g in grad], mask)
        slack = tolerance("masked_step_", "weight", dtype)
        for i, p in enumerate(peers):
            compare(param[i], p, keep[i], bits_of_reference(rule, dtype, "weight"), slack)
            held = [
                optimizer.state[p][k] for k in ("momentum_buffer", "exp_avg", "exp_avg_sq") if k in optimizer.state[p]
            ]
            held = [t for t in held if t is not None]
            assert len(held) == rule.states
            for got, want in zip((s[i] for s in states), held):
                # with coupled decay the state follows the weights
                bits = bits_of_reference(rule, dtype, "state") and (rule.rule != "adam" or not rule.weight_decay)
                compare(got, want, keep[i], bits, slack)


def one_step(
    rule: Rule, shapes: list[tuple[int, ...]], dtypes: list[tuple[torch.dtype, torch.dtype]], device: str, density=0.5
) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """Weights and states after a step from random ones; None among the masks: all alive."""
    keep = [alive(*s, seed=i, density=density) if i % 5 != 4 else None for i, s in enumerate(shapes)]
    param = [noise(*s, seed=i, dtype=d).to(device) for i, (s, (d, _)) in enumerate(zip(shapes, dtypes))]
    grad = [noise(*s, seed=i + 50, dtype=d).to(device) for i, (s, (d, _)) in enumerate(zip(shapes, dtypes))]
    states = [
        [
            noise(*s, seed=i + 99 * k, dtype=F64).square().to(d).to(device)
            for i, (s, (_, d)) in enumerate(zip(shapes, dtypes))
        ]
        for k in range(1, rule.states + 1)
    ]
    run(rule, param, states, grad, [pack(k).to(device) for k in keep])
    return [param, *states], keep


def agrees_with_reference(rule: Rule, shapes: list, dtypes: list, device: str, tolerance, density: float = 0.5) -> None:
    got, keep = one_step(rule, shapes, dtypes, device, density)
    with zipfast.backend("torch"):
        want, _ = one_step(rule, shapes, dtypes, "cpu", density)
    for k, (a, b) in enumerate(zip(got, want)):
        for j, (x, y) in enumerate(zip(a, b)):
            bits = bits_of_reference(rule, x.dtype, "state" if k else "weight")
            compare(x, y, keep[j], bits, tolerance("masked_step_", "weight", x.dtype))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.rule}{r.states}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(backend: str, device: str, dtype: torch.dtype, rule: Rule, tolerance) -> None:
    agrees_with_reference(
        replace(rule, step=3), [(n,) for n in SIZES], [(dtype, dtype)] * len(SIZES), device, tolerance
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.rule}{r.states}")
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_large(fast_backend: str, device: str, density: float, rule: Rule, tolerance) -> None:
    for dtype in (F32, BF16):
        pairs = [(dtype, dtype)] * 3
        agrees_with_reference(replace(rule, step=2), [(n,) for n in LARGE], pairs, device, tolerance, density)


@pytest.mark.parametrize("rule", [replace(MOMENTUM, nesterov=True), ADAM], ids=lambda r: r.rule)
def test_dtypes_side_by_side(backend: str, device: str, rule: Rule, tolerance) -> None:
    pairs = [(F32, F32), (F16, F32), (F64, F64), (BF16, BF16), (BF16, F32), (F16, F16)]
    agrees_with_reference(replace(rule, step=2), [(9, 11)] * 6, pairs, device, tolerance)
    agrees_with_reference(replace(rule, step=2), [(33, 40)] * 6, pairs, device, tolerance, 0.2)


@pytest.mark.parametrize("count", [TENSORS, TENSORS + 1, 550])
def test_more_than_one_launch(backend: str, device: str, count: int, tolerance) -> None:
    shapes = [((0,), (3,), (97,), (1,), (5, 4))[j % 5] for j in range(count)]
    agrees_with_reference(replace(MOMENTUM, step=2), shapes, [(F32, F32)] * count, device, tolerance)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.rule}{r.states}")
def test_compiled_backends_have_the_same_bits(cpu_backend: str, rule: Rule) -> None:
    rule = replace(rule, step=2, weight_decay=0.1)
    dtypes = [(F32, F32), (F64, F64), (BF16, F32), (F16, F16), (BF16, BF16)]
    shapes = [(130,)] * 5
    other = "cuda" if zipfast.available("cuda") else "emu"
    if not zipfast.available(other):
        pytest.skip(f"{other}: {zipfast.ops.why_not(other)}")
    a, _ = one_step(rule, shapes, dtypes, "cpu")
    with zipfast.backend(other):
        b, _ = one_step(rule, shapes, dtypes, "cuda" if other == "cuda" else "cpu")
    for x, y in zip(itertools.chain(*a), itertools.chain(*b)):
        assert torch.equal(words(x), words(y))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.rule}{r.states}")
def test_dead_become_zero(backend: str, device: str, rule: Rule) -> None:
    # whatever they were, in groups without survivors and beside them; survivors do not see it
    n, special = 300, torch.tensor([NAN, INF, -0.0, -1.0, 1e30])
    keep = alive(n, seed=0, density=0.3)
    keep[32:128] = keep[192:256] = False
    clean = [torch.where(keep, noise(n, seed=s).abs(), 0.0) for s in range(2 + rule.states)]
    dirty = [torch.where(keep, t, special.repeat(60)) for t in clean]
    results = []
    for w, g, *states in (clean, dirty):
        held = [t.clone().to(device) for t in (w, *states)]
        mask = [pack(keep).to(device)]
        run(replace(rule, step=4), held[:1], [[t] for t in held[1:]], [g.to(device)], mask)
        assert all(dead_are_zero(t, keep) for t in held)
        results.append(held)
    for a, b in zip(*results):
        assert torch.equal(words(a), words(b)) and a[keep.to(device)].isfinite().all()


def test_no_masks(backend: str, device: str) -> None:
    results = []
    for mask in ([], [ALL.to(device)], [pack(torch.ones(70, dtype=torch.bool)).to(device)]):
        w, g = noise(70, seed=0).to(device), noise(70, seed=1).to(device)
        run(SGD, [w], [], [g], mask)
        results.append(w)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rule", [replace(MOMENTUM, step=2), replace(ADAM, step=2)], ids=lambda r: r.rule)
@pytest.mark.parametrize("moved", range(4))
def test_one_of_them_unaligned(backend: str, device: str, rule: Rule, moved: int) -> None:
    # weights, gradients and states of a flat buffer: whichever begins inside a 16-byte word, the bits stay
    n = 1100
    for dtype, state in ((F32, F32), (F64, F64), (BF16, BF16), (F16, F32)):
        keep, results = alive(n, seed=0, density=0.7), []
        for offset in (0, 1):
            kinds = [dtype, dtype, *[state] * rule.states]
            whole = [noise(n + 8, seed=s, dtype=d).abs().to(device) for s, d in enumerate(kinds)]
            begin = [8 - offset * (s == moved) for s in range(len(kinds))]
            views = [t[b : b + n] for t, b in zip(whole, begin)]
            for view, s in zip(views, range(len(kinds))):
                view.copy_(noise(n, seed=50 + s, dtype=kinds[s]).abs())
            before = [t.clone() for t in whole]
            run(rule, views[:1], [[t] for t in views[2:]], views[1:2], [pack(keep).to(device)])
            for t, old, b in zip(whole, before, begin):
                assert torch.equal(t[:b], old[:b]) and torch.equal(t[b + n :], old[b + n :])
            results.append([views[0].clone(), *(t.clone() for t in views[2:])])
        assert all(torch.equal(words(a), words(b)) for a, b in zip(*results))


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_and_strided(backend: str, device: str, offset: int, tolerance) -> None:
    keep = alive(20, 10, seed=0)
    w, m, v = (noise(300, seed=s).abs().to(device) for s in range(3))
    grad = noise(10, 20, seed=3).to(device)
    expected = [t.clone().cpu()[offset : offset + 200].reshape(20, 10) for t in (w, m, v)]
    views = [t[offset : offset + 200].view(20, 10) for t in (w, m, v)]
    before = [t.clone() for t in (w, m, v)]
    run(ADAM, views[:1], [[views[1]], [views[2]]], [grad.T], [pack(keep).to(device)])
    with zipfast.backend("torch"):
        run(ADAM, expected[:1], [[expected[1]], [expected[2]]], [grad.T.cpu()], [pack(keep)])
    for got, want, old, whole in zip(views, expected, before, (w, m, v)):
        torch.testing.assert_close(got.cpu(), want, **tolerance("masked_step_", "weight", F32))
        assert torch.equal(whole[:offset], old[:offset]) and torch.equal(whole[offset + 200 :], old[offset + 200 :])


def test_arguments_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    keep, results = alive(700, seed=0), []
    grad, mask = noise(700, seed=1).to(device), pack(keep).to(device)
    before = grad.clone(), mask.clone()
    for _ in range(2):
        w, m = (noise(700, seed=s).to(device) for s in (2, 3))
        run(replace(MOMENTUM, step=2, weight_decay=0.1), [w], [[m]], [grad], [mask])
        results.append((w, m))
    assert torch.equal(grad, before[0]) and torch.equal(mask, before[1])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_parameters_that_require_gradients(backend: str, device: str) -> None:
    w = torch.nn.Parameter(noise(40, seed=0).to(device))
    (w**2).sum().backward()
    run(SGD, [w], [], [w.grad], [])
    assert w.requires_grad and w.is_leaf and w.grad_fn is None


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    shapes, results = [(200_000,), (5,), (70_000,)], []
    for n in (1, 2, 3):
        threads(n)
        results.append(one_step(replace(ADAM, step=3), shapes, [(F32, F32), (F64, F64), (BF16, BF16)], "cpu")[0])
    for other in results[1:]:
        assert all(
            torch.equal(words(a), words(b)) for a, b in zip(itertools.chain(*results[0]), itertools.chain(*other))
        )


def test_step_compiles() -> None:
    w, m, g = (noise(40, seed=s) for s in range(3))
    own = [w.clone(), m.clone()]
    numbers = dataclasses.astuple(replace(MOMENTUM, step=2))
    torch._dynamo.reset()
    call = torch.compile(
        lambda w, m, g: masked_step_([w], [m], [], [g], [], *numbers), fullgraph=True, backend="aot_eager"
    )
    call(own[0], own[1], g)
    masked_step_([w], [m], [], [g], [], *numbers)
    assert torch.equal(own[0], w) and torch.equal(own[1], m)


A, M = torch.ones(2, 3), torch.zeros(64, dtype=torch.uint8)
META, B = A.to("meta"), A.view(6)


def refuse(rule: Rule = SGD, param=(A,), first=(), second=(), grad=(A,), mask=(), **options) -> tuple:
    return *map(list, (param, first, second, grad, mask)), *dataclasses.astuple(replace(rule, **options))


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, "masked_step_: 'rule' must be one of sgd, adam, adamw, got 'lion'", refuse(Rule("lion"))),
        (ValueError, "'step' must be 1 for the first step, or more, got 0", refuse(step=0)),
        (ValueError, "'lr' must be at least 0, got -0.1", refuse(lr=-0.1)),
        (ValueError, "'lr' must be at least 0, got nan", refuse(lr=NAN)),
        (ValueError, "'weight_decay' must be at least 0, got -1", refuse(weight_decay=-1.0)),
        (ValueError, "'momentum' must be at least 0, got -0.9", refuse(momentum=-0.9)),
        (ValueError, "'eps' must be at least 0, got -1", refuse(ADAM, eps=-1.0)),
        (ValueError, "'beta1' must be at least 0 and below 1, got 1.0", refuse(ADAM, beta1=1.0)),
        (ValueError, "'beta2' must be at least 0 and below 1, got -0.1", refuse(ADAMW, beta2=-0.1)),
        (ValueError, "'nesterov' must be False without .*, got momentum 0.0 and dampening 0.0", refuse(nesterov=True)),
        (TypeError, "'param' must be a non-empty list of tensors, got list", refuse(param=())),
        (TypeError, r"'param\[0\]' must be float32, .* or bfloat16, got int64", refuse(param=[A.long()])),
        (RuntimeError, r"'param\[1\]' must be on cpu as .*, got meta", refuse(param=[A, META], grad=[A, A])),
        (ValueError, r"'param\[0\]' must be contiguous, got strides \[1, 3\]", refuse(param=[A.T])),
        (TypeError, "'grad' must be a non-empty list of tensors, got list", refuse(grad=())),
        (ValueError, "'grad' must hold one tensor for each of 1 in 'param', got 2", refuse(grad=[A, A])),
        (TypeError, r"'grad\[0\]' must be float32, got float64", refuse(grad=[A.double()])),
        (RuntimeError, r"'grad\[0\]' must be on cpu as .*, got meta", refuse(grad=[META])),
        (ValueError, r"'grad\[0\]' must be the shape of 'param' = \[2, 3\], got \[3, 2\]", refuse(grad=[A.T])),
        (TypeError, r"'mask\[0\]' must be uint8, got float32", refuse(mask=[A])),
        (ValueError, r"'mask\[0\]' must be \[64 ceil\(n / 512\)\] = \[64\], got \[8\]", refuse(mask=[M[:8]])),
        (ValueError, "'mask' must hold one tensor for each of 1 in 'param', got 2", refuse(mask=[M, M])),
        (ValueError, "'first' must be an empty list for this rule and momentum, got 1", refuse(first=[A])),
        (ValueError, "'second' must be an empty list for .*, got 1", refuse(MOMENTUM, first=[A], second=[A])),
        (ValueError, "'first' must hold one tensor for each of 1 in 'param' for .*, got 0", refuse(MOMENTUM)),
        (ValueError, "'second' must hold one tensor for each of 1 in 'param' for .*, got 0", refuse(ADAM, first=[A])),
        (TypeError, r"'first\[0\]' must be float32, got float64", refuse(MOMENTUM, first=[A.double()])),
        (TypeError, r"'second\[0\]' must be float32, got float16", refuse(ADAM, first=[A], second=[A.half()])),
        (RuntimeError, r"'first\[0\]' must be on cpu as .*, got meta", refuse(MOMENTUM, first=[META])),
        (
            ValueError,
            r"'first\[0\]' must be the shape of 'param' = \[2, 3\], got \[6\]",
            refuse(MOMENTUM, first=[A.view(6)]),
        ),
        (
            ValueError,
            r"'first\[0\]' must be contiguous, got strides \[1, 2\]",
            refuse(MOMENTUM, first=[A.T.contiguous().T]),
        ),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        masked_step_(*args)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_state_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    weight, state = A.to(dtype), A.to(F32 if dtype == F64 else BF16)
    with pytest.raises(TypeError, match=r"'first\[0\]' must be float(64|32), got (float32|bfloat16)"):
        masked_step_(*refuse(MOMENTUM, param=[weight], grad=[weight], first=[state]))
    half = A.half()
    with pytest.raises(TypeError, match=r"'first\[0\]' must be float16 or float32, got bfloat16"):
        masked_step_(*refuse(MOMENTUM, param=[half], grad=[half], first=[A.bfloat16()]))
