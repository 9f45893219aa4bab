# SPDX-License-Identifier: Apache-2.0
"""mlp_steps_: against torch.optim and autograd in float64, sparse against dense, exact zeros, chunks and threads bitwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import zipfast
from zipfast.ops import mlp_steps_

F32, F64 = torch.float32, torch.float64
SPARSE, DENSE = 2.0, 0.0  # sparse_below: all layers, none
NAN = torch.nan


@pytest.fixture(params=["torch", "cpu"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    """The two implementations of a host-only op."""
    if reason := zipfast.ops.why_not(request.param):
        pytest.skip(f"backend {request.param!r}: {reason}")
    with zipfast.backend(request.param):
        yield request.param


def pack(alive: Tensor) -> Tensor:
    """Bits, least significant first, in whole blocks of 64 bytes."""
    bits = torch.zeros(512 * ((alive.numel() + 511) // 512), dtype=torch.uint8)
    bits[: alive.numel()] = alive.reshape(-1)
    return (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


class Run:
    """Arguments of a call: a small net with a mask of some density, and what training did to it so far."""

    def __init__(
        self, sizes: tuple[int, ...] = (13, 33, 20, 5), density: float = 0.3, batch: int = 17, dtype: torch.dtype = F64,
        rule: str = "adam", beta1: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False, steps: int = 20,
        rows: int = 60, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        shapes = list(zip(sizes[1:], sizes))
        self.alive = [torch.rand(s, generator=g) < density for s in shapes]
        self.mask = [pack(a) if density < 1 else torch.empty(0, dtype=torch.uint8) for a in self.alive]
        scale = [(2 / max(1, s[1] * density)) ** 0.5 for s in shapes]
        self.weight = [torch.randn(s, generator=g, dtype=F64) * c for s, c in zip(shapes, scale)]
        self.weight = [(w * a).to(dtype) for w, a in zip(self.weight, self.alive)]
        self.bias = [torch.randn(s[0], generator=g, dtype=F64).to(dtype) * 0.1 for s in shapes]
        momentum, adam = rule != "sgd" or beta1 > 0, rule != "sgd"
        self.first = [torch.zeros_like(p) for p in (*self.weight, *self.bias)] if momentum else []
        self.second = [torch.zeros_like(p) for p in (*self.weight, *self.bias)] if adam else []
        self.data = torch.randn(rows, sizes[0], generator=g, dtype=F64).to(dtype)
        self.label = torch.randint(0, sizes[-1], (rows,), generator=g)
        self.order = torch.randint(0, rows, (steps, batch), generator=g)
        self.lr = torch.linspace(2e-2, 1e-2, steps, dtype=F64)
        self.options = (rule, beta1, 0.99, 1e-8, weight_decay, nesterov)
        self.step = 0

    def copy(self) -> Run:
        return copy.deepcopy(self)

    def args(self, begin: int = 0, end: int | None = None, sparse_below: float = SPARSE) -> tuple:
        lists = self.weight, self.bias, self.mask, self.first, self.second
        part = slice(begin, end)
        return (*lists, self.data, self.label, self.order[part], self.lr[part], *self.options, self.step, sparse_below)

    def go(self, begin: int = 0, end: int | None = None, sparse_below: float = SPARSE) -> Tensor:
        loss = mlp_steps_(*self.args(begin, end, sparse_below))
        self.step += len(loss)
        return loss

    def state(self) -> list[Tensor]:
        return [*self.weight, *self.bias, *self.first, *self.second]

    def check_dead(self) -> None:
        layers = len(self.weight)
        for held in (self.weight, self.first[:layers], self.second[:layers]):
            for t, a in zip(held, self.alive):
                dead = t[~a]
                assert (dead == 0).all() and not dead.signbit().any()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, equal_nan=True)


RULES = [
    {"rule": "sgd", "beta1": 0.0},
    {"rule": "sgd", "beta1": 0.9, "weight_decay": 1e-3},
    {"rule": "sgd", "beta1": 0.8, "nesterov": True, "weight_decay": 1e-3},
    {"rule": "adam"},
    {"rule": "adam", "weight_decay": 1e-2},
    {"rule": "adamw", "weight_decay": 1e-1},
]
NAMES = ["sgd", "momentum", "nesterov", "adam", "adam_decay", "adamw"]


def optim(run: Run) -> list[Tensor]:
    """The losses of torch.optim on an nn.Sequential, masks on gradients; ``run`` gets the parameters and states."""
    rule, beta1, beta2, eps, decay, nesterov = run.options
    linear = [nn.Linear(w.shape[1], w.shape[0], dtype=w.dtype) for w in run.weight]
    for layer, w, b in zip(linear, run.weight, run.bias):
        layer.weight.data, layer.bias.data = w, b
    net = nn.Sequential(*[m for layer in linear for m in (layer, nn.ReLU())][:-1])
    parameters = [layer.weight for layer in linear] + [layer.bias for layer in linear]
    if rule == "sgd":
        how = torch.optim.SGD(parameters, lr=1.0, momentum=beta1, nesterov=nesterov, weight_decay=decay)
    else:
        kind = torch.optim.Adam if rule == "adam" else torch.optim.AdamW
        how = kind(parameters, lr=1.0, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    losses = []
    for rows, lr in zip(run.order, run.lr.tolist()):
        how.param_groups[0]["lr"] = lr
        rows = rows[rows >= 0]
        loss = nn.functional.cross_entropy(net(run.data[rows]), run.label[rows])
        how.zero_grad()
        loss.backward()
        for layer, a in zip(linear, run.alive):
            layer.weight.grad.mul_(a)
        how.step()
        losses.append(loss.detach().double())
    for i, p in enumerate(parameters):
        for held, key in ((run.first, "momentum_buffer" if rule == "sgd" else "exp_avg"), (run.second, "exp_avg_sq")):
            if held:
                held[i] = how.state[p][key]
    return losses


def test_table(host: str) -> None:
    """One weight, two classes, by hand: p = 1/2 at first, so that the gradient is ±1/2 · x."""
    run = Run((1, 2), 1.0, 1, rule="sgd", beta1=0.0, steps=1, rows=1)
    run.weight[0].zero_(), run.bias[0].zero_(), run.data.fill_(4.0), run.label.fill_(1), run.lr.fill_(0.5)
    assert run.go().tolist() == pytest.approx([0.6931471805599453], abs=1e-15)
    assert run.weight[0].tolist() == [[-1.0], [1.0]] and run.bias[0].tolist() == [-0.25, 0.25]
    run.mask[0] = pack(torch.tensor([0, 1]))
    run.weight[0].fill_(3.0)  # a dead weight is taken as 0: logits 0 - 0.25 and 12 + 0.25
    assert run.go().item() < 1e-5
    assert run.weight[0][0].item() == 0 and run.weight[0][1].item() > 3.0


@pytest.mark.parametrize("how", RULES, ids=NAMES)
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("sparse_below", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_torch_optim(host: str, how: dict, density: float, sparse_below: float) -> None:
    run = Run(density=density, **how)
    want, rows = run.copy(), run.order
    rows[3, 9:] = rows[7, ::2] = -1  # short batches, and holes
    want.order = rows
    losses = optim(want)
    close([run.go(sparse_below=sparse_below), *run.state()], [torch.stack(losses), *want.state()])
    if density < 1:
        run.check_dead()


@pytest.mark.parametrize("sizes", [(1, 1), (31, 2), (32, 10), (33, 65, 3), (70, 5, 130, 4), (200, 100, 1), (3, 0, 2)])
@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 40, 70])
@pytest.mark.parametrize("sparse_below", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_sizes(cpu_backend: str, sizes: tuple[int, ...], batch: int, sparse_below: float) -> None:
    for density in (1.0, 0.4, 0.02):
        run = Run(sizes, density, batch, steps=4, rows=90)
        want = run.copy()
        with zipfast.backend("torch"):
            loss = want.go()
        close([run.go(sparse_below=sparse_below), *run.state()], [loss, *want.state()])
        run.check_dead() if density < 1 else None


def test_mixed_layers(cpu_backend: str) -> None:
    """Each layer takes its own path: dense first, sparse in the middle, no mask at the end."""
    run = Run((40, 50, 60, 7), 0.2, 60, steps=10)
    run.alive[0], run.alive[2] = torch.rand(50, 40) < 0.9, torch.ones(7, 60, dtype=torch.bool)
    run.weight[0] = torch.randn(50, 40, dtype=F64) * 0.2 * run.alive[0]
    run.mask[0], run.mask[2] = pack(run.alive[0]), torch.empty(0, dtype=torch.uint8)
    want = run.copy()
    with zipfast.backend("torch"):
        loss = want.go()
    for below in (0.5, DENSE, SPARSE):
        got = run.copy()
        close([got.go(sparse_below=below), *got.state()], [loss, *want.state()])
        got.check_dead()


def test_tiles_of_columns(cpu_backend: str) -> None:
    """More columns than the first cache holds: survivors are stored tile by tile."""
    for batch in (60, 130):
        run = Run((500, 40, 6), 0.3, batch, steps=4, rows=150)
        want = run.copy()
        with zipfast.backend("torch"):
            loss = want.go()
        close([run.go(), *run.state()], [loss, *want.state()])


@pytest.mark.parametrize("how", RULES, ids=NAMES)
def test_all_dead(host: str, how: dict) -> None:
    for below in (SPARSE, DENSE):
        run = Run(steps=5, **how)
        for l in (0, 1):
            run.alive[l].zero_(), run.mask[l].zero_(), run.weight[l].fill_(NAN)  # the dead may hold anything
        assert run.go(sparse_below=below).isfinite().all()
        run.check_dead()
        assert all(t.isfinite().all() for t in run.state())


def test_dead_hold_nothing_but_zero(host: str) -> None:
    """eps = 0 makes 0/0 of every dead weight, and infinite gradients reach them."""
    for below, how in ((b, h) for b in (SPARSE, DENSE) for h in RULES):
        run = Run(steps=3, **how)
        run.options = (*run.options[:3], 0.0, *run.options[4:])
        run.data[run.order[1, 0]] = torch.inf
        run.go(sparse_below=below)
        run.check_dead()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_counts(host: str, steps: int) -> None:
    run = Run(steps=steps)
    before = run.copy()
    loss = run.go()
    assert loss.shape == (steps,) and loss.dtype == F64
    assert equal(run.state(), before.state()) == (steps == 0)
    dirty = Run(steps=0)
    dirty.weight[0][~dirty.alive[0]] = 5.0
    for below in (SPARSE, DENSE):
        got = dirty.copy()
        got.go(sparse_below=below)
        assert equal(got.state(), before.state() if steps == 0 else Run(steps=0).state())


def test_a_batch_without_rows(host: str) -> None:
    """NaN is the mean of nothing; the gradient is 0, and momentum goes on."""
    for batch in (0, 4):
        run = Run(batch=batch, steps=3, weight_decay=0.1)
        run.order.fill_(-1)
        want = run.copy()
        assert run.go().isnan().all()
        for p, q in zip(run.weight, want.weight):
            assert p.isfinite().all() and (p.abs() <= q.abs()).all()


@pytest.mark.parametrize("sparse_below", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_nan_shows_in_the_loss(host: str, sparse_below: float) -> None:
    run = Run((5, 9, 8, 3), 0.6, steps=4)
    run.order %= 50
    run.data[run.order[2, 4]] = NAN
    run.order[:2] = 50
    loss = run.go(sparse_below=sparse_below)
    assert loss[:2].isfinite().all() and loss[2:].isnan().all()
    run.check_dead()
    unseen = Run((5, 9, 8, 3), steps=4)  # a row that is left out does nothing
    unseen.data[0] = NAN
    unseen.order = unseen.order.clamp(min=1)
    unseen.order[:, 3] = -1
    assert unseen.go(sparse_below=sparse_below).isfinite().all()


def test_infinite_activations(host: str) -> None:
    run = Run((4, 6, 3), 1.0, 4, steps=1, rule="sgd", beta1=0.0)
    run.data.fill_(1.0)
    run.weight[0].fill_(-torch.inf)  # ReLU of -inf is 0
    want = nn.functional.cross_entropy(run.bias[1].expand(4, 3), run.label[run.order[0]])
    for below in (SPARSE, DENSE):
        close([run.copy().go(sparse_below=below)], [want.reshape(1)])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("sparse_below", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_chunks_are_one_call(host: str, dtype: torch.dtype, sparse_below: float) -> None:
    for how in RULES:
        run = Run((64, 30, 10), batch=60, dtype=dtype, steps=10, **how)
        parts = run.copy()
        whole = run.go(sparse_below=sparse_below)
        pieces = [parts.go(b, e, sparse_below) for b, e in ((0, 1), (1, 1), (1, 6), (6, 10))]
        assert torch.equal(torch.cat(pieces), whole) and equal(parts.state(), run.state())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_equal_for_every_run_and_thread_count(cpu_backend: str, threads, dtype: torch.dtype) -> None:
    for below, density in ((SPARSE, 0.6), (DENSE, 0.9)):
        run = Run((400, 300, 500, 10), density, 130, dtype, steps=3, rows=200)  # several pieces a layer
        results = []
        for n in (1, 1, 2, 3):
            threads(n)
            got = run.copy()
            results.append([got.go(sparse_below=below), *got.state()])
        assert all(equal(results[0], other) for other in results[1:])


def test_float32_is_near_float64(cpu_backend: str) -> None:
    """Plain gradient descent, as Adam amplifies rounding: its first steps divide a gradient by itself."""
    for below, density in ((SPARSE, 0.3), (DENSE, 1.0)):
        run = Run((64, 100, 30, 10), density, 60, F32, "sgd", 0.9, steps=20)
        wide = run.copy()
        for name in ("weight", "bias", "first", "second"):
            setattr(wide, name, [t.double() for t in getattr(wide, name)])
        wide.data = wide.data.double()
        torch.testing.assert_close(run.go(sparse_below=below), wide.go(sparse_below=below), rtol=1e-4, atol=1e-5)
        for a, b in zip(run.state(), wide.state()):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)


def test_strided_inputs_and_inputs_unchanged(host: str) -> None:
    run = Run()
    plain = run.copy()
    want = plain.go()
    run.data = torch.stack([run.data, run.data], 2)[:, :, 0].T.contiguous().T
    run.label, run.order = run.label.repeat_interleave(2)[::2], run.order.T.contiguous().T
    run.lr = run.lr.flip(0).contiguous().flip(0)
    run.mask[1] = run.mask[1].repeat_interleave(2)[::2]
    before = run.copy()
    assert torch.equal(run.go(), want) and equal(run.state(), plain.state())
    read = ("data", "label", "order", "lr")
    assert all(torch.equal(getattr(run, name), getattr(before, name)) for name in read) and equal(run.mask, before.mask)


def test_what_is_out_of_range(host: str) -> None:
    for name, value, match in (
        ("order", 60, "'order' must be below N = 60, got 60"),
        ("label", 5, r"'label' must be in \[0, 5\), got 5"),
        ("label", -100, r"'label' must be in \[0, 5\), got -100"),
    ):
        run = Run()
        getattr(run, name)[run.order[2, 3] if name == "label" else (2, 3)] = value
        before = run.copy()
        with pytest.raises((RuntimeError, IndexError), match=f"mlp_steps_: {match}" if host == "cpu" else None):
            run.go()
        if host == "cpu":
            assert equal(run.state(), before.state())


def test_learns(cpu_backend: str) -> None:
    run = Run((20, 50, 3), 0.3, 60, F32, steps=300, rows=60)
    loss = run.go()
    assert loss[-20:].mean() < 0.1 < loss[0]


FIELDS = ["weight", "bias", "mask", "first", "second", "data", "label", "order", "lr", "rule", "beta1", "beta2", "eps"]
FIELDS += ["weight_decay", "nesterov", "step", "sparse_below"]
W, B, BYTES = torch.ones(4, 3), torch.ones(4), torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, "mlp_steps_: 'rule' must be one of sgd, adam, adamw, got 'lion'", {"rule": "lion"}),
        (ValueError, r"'beta1' must be in \[0, 1\), got 1.0", {"beta1": 1.0}),
        (ValueError, r"'beta2' must be in \[0, 1\), got -0.1", {"beta2": -0.1}),
        (ValueError, "'eps' must be 0 or more, got -1.0", {"eps": -1.0}),
        (ValueError, "'weight_decay' must be 0 or more, got nan", {"weight_decay": NAN}),
        (ValueError, "'step' must be 0 or more, got -1", {"step": -1}),
        (ValueError, "'nesterov' must be False without rule 'sgd' and .* got True", {"nesterov": True}),
        (TypeError, "'weight' must be a non-empty list of tensors, got Tensor", {"weight": W}),
        (TypeError, r"'weight\[0\]' must be float32 or float64, got float16", {"weight": [W.half()]}),
        (TypeError, "'bias' must be a non-empty list of tensors, got list", {"bias": []}),
        (ValueError, "'mask' must hold 1 tensors for 1 layers, got 2", {"mask": [BYTES, BYTES]}),
        (ValueError, "'first' must hold 2 tensors for 1 layers, got 1", {"first": [W]}),
        (ValueError, "'first' must hold 0 tensors for 1 layers, got 2", {"rule": "sgd", "beta1": 0.0, "second": []}),
        (ValueError, "'second' must hold 0 tensors for 1 layers, got 2", {"rule": "sgd"}),
        (ValueError, r"'weight\[0\]' must be \[out, in\], got \[4\]", {"weight": [B]}),
        (ValueError, r"'bias\[0\]' must be \[out\] = \[4\], got \[3\]", {"bias": [B[:3]]}),
        (TypeError, r"'bias\[0\]' must be float32, got float64", {"bias": [B.double()]}),
        (RuntimeError, r"'first\[1\]' must be on cpu as .*, got meta", {"first": [W, B.to("meta")]}),
        (ValueError, r"'weight\[0\]' must be contiguous, got strides \[1, 4\]", {"weight": [W.T.contiguous().T]}),
        (ValueError, r"'second\[1\]' must be that of its weight or bias = \[4\], got \[3\]", {"second": [W, B[:3]]}),
        (TypeError, r"'mask\[0\]' must be uint8, got bool", {"mask": [BYTES.bool()]}),
        (RuntimeError, r"'mask\[0\]' must be on cpu as .*, got meta", {"mask": [BYTES.to("meta")]}),
        (ValueError, r"'mask\[0\]' must be \[64\] packed bytes or \[0\], got \[2\]", {"mask": [BYTES[:2]]}),
        (TypeError, "'data' must be float32, got float64", {"data": torch.ones(5, 3).double()}),
        (ValueError, r"'data' must be \[N, 3\], got \[5, 4\]", {"data": torch.ones(5, 4)}),
        (TypeError, "'label' must be int64, got int32", {"label": torch.zeros(5, dtype=torch.int32)}),
        (ValueError, r"'label' must be \[N\] = \[5\], got \[4\]", {"label": torch.zeros(4, dtype=torch.int64)}),
        (TypeError, "'order' must be int64, got float32", {"order": torch.zeros(2, 2)}),
        (ValueError, r"'order' must be \[T, B\], got \[2\]", {"order": torch.zeros(2, dtype=torch.int64)}),
        (TypeError, "'lr' must be float64, got float32", {"lr": torch.zeros(2)}),
        (ValueError, r"'lr' must be \[T\] = \[2\], got \[3\]", {"lr": torch.zeros(3).double()}),
        (RuntimeError, "'lr' must be on cpu as .*, got meta", {"lr": torch.zeros(2, device="meta").double()}),
    ],
)  # fmt: skip
def test_errors(error: type, match: str, change: dict) -> None:
    run = Run((3, 4), 0.5, 2, F32, steps=2, rows=5)
    with pytest.raises(error, match=match):
        mlp_steps_(*(dict(zip(FIELDS, run.args())) | change).values())


def test_layers_must_fit() -> None:
    run = Run((3, 4, 2), steps=2)
    run.weight[1] = torch.ones(2, 5, dtype=F64)
    match = r"'weight\[1\]' must be \[out, out of the layer before\] = \[2, 4\], got \[2, 5\]"
    with pytest.raises(ValueError, match=match):
        run.go()
