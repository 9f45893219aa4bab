# SPDX-License-Identifier: Apache-2.0
"""What PyTorch expects of an operator: schema, fake tensors, autograd registration, AOT dispatch, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import zipfast
from zipfast.ops import OPS
from zipfast.ops.blend import FINITE
from zipfast.ops.moments import NO_BAD_VALUE
from zipfast.ops.sparse_linear import transpose_layout


def accumulators(*features: int, models: int, device: str) -> tuple[list, list, list]:
    return (
        [torch.zeros(f, f, dtype=torch.float64, device=device) for f in features],
        [torch.zeros(f, dtype=torch.float64, device=device) for f in features],
        [torch.full((models,), NO_BAD_VALUE, device=device) for _ in features],
    )


HALVES = (torch.float32, torch.float16, torch.bfloat16)


def moments_samples(device: str, grad: bool) -> Iterator[tuple]:
    x = torch.randn(5, 3, 4, 4, device=device, requires_grad=grad)
    y = torch.randn(7, 6, device=device, dtype=torch.float64, requires_grad=grad)
    shift = torch.zeros(6, device=device, dtype=torch.float64), torch.ones(12, device=device, dtype=torch.float64)
    yield *accumulators(6, 12, models=2, device=device), [x, x * 2, y, y + 1], list(shift), [1, 1], [0, 9]
    z = torch.randn(4, 2, 3, device=device, dtype=torch.float16, requires_grad=grad)
    yield *accumulators(3, models=1, device=device), [z], [shift[0][:3].clone()], [2], [0]


def correlate_samples(device: str, grad: bool) -> Iterator[tuple]:
    def sums(features: int) -> tuple:
        x = torch.randn(features, 9, device=device, dtype=torch.float64)
        x[1:3] = 4.0
        return (
            (x @ x.T).requires_grad_(grad),
            x.sum(1).requires_grad_(grad),
            torch.zeros(features, device=device).double(),
        )

    (a, total_a, shift_a), (b, total_b, shift_b) = sums(5), sums(68)
    yield [a, b], [total_a, total_b], [shift_a, shift_b], [9, 9], False, True
    yield [a.T], [total_a], [shift_a], [9], True, False
    yield [a[:0, :0]], [total_a[:0]], [shift_a[:0]], [1], False, False


def zip_match_samples(device: str, grad: bool) -> Iterator[tuple]:
    a = torch.corrcoef(torch.randn(8, 20, device=device))
    a = (torch.triu(a, 1) + torch.triu(a, 1).T).requires_grad_(grad)
    b = torch.corrcoef(torch.randn(4, 20, device=device))
    b = (torch.triu(b, 1) + torch.triu(b, 1).T).requires_grad_(grad)
    yield [a, b], 2, [4, 1], [1, 2], 0.3, False
    yield [a], 2, [8], [1], 1.0, True
    yield [a.double()], 1, [4], [3], 0.0, False


def regroup_samples(device: str, grad: bool) -> Iterator[tuple]:
    x = torch.randn(3, 4, 5, device=device, requires_grad=grad)
    order, start = torch.tensor([0, 4, 1, 7, 2], device=device), torch.tensor([0, 2, 4, 5], device=device)
    yield [x, x * 2], order, start, torch.tensor([2.0, 2.0, 1.0], device=device, dtype=torch.float64), 1
    yield [x.transpose(0, 2)], order[:2] % 3, torch.tensor([0, 1, 1, 2], device=device), None, 2
    yield [x.bfloat16()], order % 3, start, None, 0


def evidence_samples(device: str, grad: bool) -> Iterator[tuple]:
    f = torch.randn(9, 4, device=device, dtype=torch.float64)
    y = torch.randn(9, 3, device=device, dtype=torch.float64)
    sigma, basis = torch.linalg.eigh(f.T @ f)
    z, square = (basis.T @ f.T @ y).requires_grad_(grad), y.square().sum(0)
    yield [sigma, sigma[:2]], [], [z, z[:2, :1]], [square, square[:1]], [9, 9], [4, 5], 0, 1e-3, 11, 1e-5, 0.0, False
    yield [sigma], [], [z], [square], [9], [4], 1, 1e-3, 11, 1e-5, 0.0, True
    off = torch.full((3,), 0.1, device=device, dtype=torch.float64)
    yield [sigma + 1], [off], [z], [square], [9], [4], 2, 1e-10, 100, 0.0, 1e-10, True


def blend_samples(device: str, grad: bool) -> Iterator[tuple]:
    x = [torch.randn(s, device=device).to(d).requires_grad_(grad) for d in HALVES for s in ((3, 4), (5,))]
    out = [torch.zeros(3, 4, device=device), torch.zeros(5, device=device, dtype=torch.bfloat16)]
    bad = torch.full((len(HALVES) + 1, 2), FINITE, device=device)
    yield out, bad, x, torch.rand(len(HALVES), 2, device=device, dtype=torch.float64)
    y = torch.tensor([1.0, torch.nan, 3e38, -2.0], device=device, requires_grad=grad)
    yield [torch.zeros(4, device=device)], bad[:3, :1].clone(), [y, y], torch.ones(2, 1, device=device).double()
    z = torch.randn(4, 3, device=device, dtype=torch.float64, requires_grad=grad).T
    yield [torch.zeros(3, 4, device=device)], bad[:2, :1].clone(), [z], torch.ones(1, 1, device=device).double()


def multidot_samples(device: str, grad: bool) -> Iterator[tuple]:
    g = [torch.randn(3, 4, device=device, requires_grad=grad), torch.randn((), device=device)]
    yield g, [torch.randn(s, device=device).to(d).requires_grad_(grad) for d in HALVES for s in ((3, 4), ())]
    yield [g[0].T.double()], [g[0].T, g[0].T.half()]


def gram_samples(device: str, grad: bool) -> Iterator[tuple]:
    x = [torch.randn(s, device=device).to(d).requires_grad_(grad) for d in HALVES for s in ((3, 4), ())]
    yield x, len(HALVES), []
    yield x, len(HALVES), [torch.randn(3, 4, device=device, requires_grad=grad).bfloat16(), x[1]]
    yield [x[0].T, x[0].T.double()], 2, [x[0].T]


def threshold_samples(device: str, grad: bool) -> Iterator[tuple]:
    x = [torch.randn(s, device=device).requires_grad_(grad) for s in ((30, 40), (7,), ())]
    yield x, [], [300, 2], [0, 1, 0]
    mask = [torch.randint(256, (64 * ((t.numel() + 511) // 512),), device=device, dtype=torch.uint8) for t in x]
    yield [x[0].T, x[1].half(), x[2]], mask, [9, 0, 1], [0, 1, 0]


def packed(n: int, device: str) -> torch.Tensor:
    bits = torch.zeros((n + 511) // 512 * 64, device=device, dtype=torch.uint8)
    bits[: n // 8] = 0b01011010
    return bits


def apply_mask_samples(device: str, grad: bool) -> Iterator[tuple]:
    out = [torch.ones(40, device=device), torch.ones(3, 3, device=device, dtype=torch.bfloat16)]
    none = torch.zeros(0, device=device, dtype=torch.uint8)
    yield out, [packed(40, device), packed(9, device)], []
    source = [torch.randn(40, device=device, requires_grad=grad), torch.randn(3, 3, device=device).bfloat16().T]
    yield out, [none, packed(9, device)], source
    yield out[1:], [], [source[1].requires_grad_(grad)]


def masked_step_samples(device: str, grad: bool) -> Iterator[tuple]:
    param = [torch.randn(40, device=device), torch.randn(3, 3, device=device).half()]
    state = [[torch.rand(40, device=device), torch.rand(3, 3, device=device)] for _ in range(2)]
    given = [torch.randn(40, device=device, requires_grad=grad), torch.randn(3, 3, device=device).half().T]
    mask = [packed(40, device), torch.zeros(0, device=device, dtype=torch.uint8)]
    yield param, [], [], given, [], "sgd", 1, 0.1, 0.0, 0.0, 0.0, False, 0.0, 0.0, 0.0, False
    yield param, state[0], [], given, mask, "sgd", 2, 0.1, 0.01, 0.9, 0.0, True, 0.0, 0.0, 0.0, True
    yield param, *state, given, mask, "adamw", 3, 0.1, 0.01, 0.0, 0.0, False, 0.9, 0.99, 1e-8, False


def mlp_steps_samples(device: str, grad: bool) -> Iterator[tuple]:
    def net(*sizes: int, dtype: torch.dtype) -> tuple[list, list, list]:
        shapes = list(zip(sizes[1:], sizes))
        weight = [torch.randn(s, device=device, dtype=dtype, requires_grad=grad) for s in shapes]
        bias = [torch.randn(s[0], device=device, dtype=dtype, requires_grad=grad) for s in shapes]
        mask = [torch.full((64 * -(-w.numel() // 512),), 0x55, dtype=torch.uint8, device=device) for w in weight]
        for w, m in zip(weight, mask):
            m[-(-w.numel() // 8) :] = 0
            w.detach().view(-1)[1::2] = 0
        return [w.detach().requires_grad_(grad) for w in weight], [b.detach().requires_grad_(grad) for b in bias], mask

    def rows(features: int, dtype: torch.dtype) -> tuple:
        data = torch.randn(7, features, device=device, dtype=dtype, requires_grad=grad)
        label, lr = torch.tensor([0, 1, 1, 0, 1, 0, 0], device=device), torch.full((2,), 0.1, device=device).double()
        return data, label, torch.tensor([[0, 3, 2], [6, 5, -1]], device=device), lr

    weight, bias, mask = net(4, 6, 2, dtype=torch.float32)
    first, second = ([torch.zeros_like(p) for p in (*weight, *bias)] for _ in range(2))
    yield weight, bias, mask, first, second, *rows(4, torch.float32), "adam", 0.9, 0.99, 1e-3, 0.1, False, 3, 0.6
    weight, bias, mask = net(4, 2, dtype=torch.float64)
    mask = [mask[0][:0]]
    first = [torch.zeros_like(p) for p in (*weight, *bias)]
    yield weight, bias, mask, first, [], *rows(4, torch.float64), "sgd", 0.9, 0.0, 0.0, 0.0, True, 0, 0.0
    yield weight, bias, mask, [], [], *rows(4, torch.float64), "sgd", 0.0, 0.0, 0.0, 0.0, False, 0, 0.0


def sparse_layout(device: str) -> tuple:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    row, column = mask.nonzero(as_tuple=True)
    row_start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=6).cumsum(0)]).int()
    return row_start.to(device), column.short().to(device)


def sparse_linear_samples(device: str, grad: bool) -> Iterator[tuple]:
    start, column = sparse_layout(device)
    value = torch.randn(len(column), device=device, requires_grad=grad)
    yield start, column, value, torch.randn(3, 5, device=device), torch.randn(6, device=device)
    x = torch.randn(5, 2, device=device, dtype=torch.float64, requires_grad=grad).T
    yield start, column.int(), value.double(), x, None


def sparse_linear_input_samples(device: str, grad: bool) -> Iterator[tuple]:
    start, column = sparse_layout(device)
    value = torch.randn(len(column), device=device, requires_grad=grad)
    transposed = list(transpose_layout(start, column, 5))
    yield start, column, value, transposed, torch.randn(3, 6, device=device), 5
    yield start, column, value.bfloat16(), transposed, torch.randn(1, 6, device=device).bfloat16(), 5


def sparse_linear_weight_samples(device: str, grad: bool) -> Iterator[tuple]:
    start, column = sparse_layout(device)
    x = torch.randn(3, 5, device=device, requires_grad=grad)
    yield start, column, torch.randn(3, 6, device=device), x
    yield start, column.int(), torch.randn(6, 3, device=device).T.half(), x.half()


SAMPLES: dict[str, Callable[[str, bool], Iterator[tuple]]] = {
    "moments_": moments_samples,
    "correlate": correlate_samples,
    "zip_match": zip_match_samples,
    "regroup": regroup_samples,
    "evidence": evidence_samples,
    "blend_": blend_samples,
    "multidot": multidot_samples,
    "gram": gram_samples,
    "threshold": threshold_samples,
    "apply_mask_": apply_mask_samples,
    "masked_step_": masked_step_samples,
    "mlp_steps_": mlp_steps_samples,
    "sparse_linear": sparse_linear_samples,
    "sparse_linear_input": sparse_linear_input_samples,
    "sparse_linear_weight": sparse_linear_weight_samples,
}
WRITTEN = {"moments_": 3, "blend_": 2, "apply_mask_": 1, "masked_step_": 3}  # the first arguments, in place
NO_GPU = pytest.mark.skipif(not zipfast.available("cuda"), reason=str(zipfast.ops.why_not("cuda")))
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


@pytest.fixture(autouse=True)
def same_samples() -> None:
    torch.manual_seed(0)


def flat(value: object) -> list:
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in flat(v)]
    return [value]


def outcome(call: Callable, args: tuple) -> list:
    """What a call returns and what it leaves in its (copied) arguments."""
    args = copy.deepcopy(args)
    return [v for v in flat(call(*args)) + flat(args) if v is not None]


def same(a: list, b: list) -> None:
    assert [v for v in a if isinstance(v, str)] == [v for v in b if isinstance(v, str)]
    a, b = ([v for v in values if not isinstance(v, str)] for values in (a, b))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)  # float32 kernel against float64 reference


def skip_host_only(name: str, backend: str) -> None:
    if backend in ("emu", "cuda") and OPS[name].host_only is not None:
        pytest.skip(f"{name} is host-only: {OPS[name].host_only}")


def test_every_op_has_samples() -> None:
    assert set(SAMPLES) == set(OPS)
    assert all(len(list(make("cpu", False))) >= 2 for make in SAMPLES.values())


@pytest.mark.filterwarnings("ignore:zipfast.*an autograd kernel was not registered")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name: str, grad: bool, device: str) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not grad:  # the ops have no gradients, which that test would compare
        tests.append("test_aot_dispatch_dynamic")
    for args in SAMPLES[name](device, grad):
        torch.library.opcheck(OPS[name].native, args, test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_compiles_without_graph_break(name: str, device: str) -> None:
    op = OPS[name]
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for args in SAMPLES[name](device, False):
        torch._dynamo.reset()
        same(outcome(compiled, args), outcome(op, args))


FLAT = ["moments_", "regroup", "blend_", "multidot", "gram", "threshold", "apply_mask_", "masked_step_", "mlp_steps_"]
FLAT += ["sparse_linear", "sparse_linear_weight", "correlate"]


@pytest.mark.parametrize("name", FLAT)
def test_compiles_under_an_override(name: str) -> None:
    op = OPS[name]
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    for args in SAMPLES[name]("cpu", False):
        torch._dynamo.reset()
        want = outcome(op, args)
        same(outcome(compiled, args), want)
        with zipfast.backend("torch"):  # the override is guarded: the reference is traced instead
            same(outcome(compiled, args), want)
        same(outcome(compiled, args), want)


@pytest.mark.parametrize("name", ["zip_match", "evidence"])
def test_compiles_under_an_override_with_breaks(name: str) -> None:
    # their references look at values, so that they cannot be one graph; they still run
    op, args = OPS[name], next(SAMPLES[name]("cpu", False))
    compiled = torch.compile(lambda *a: op(*a), backend="aot_eager")
    torch._dynamo.reset()
    with zipfast.backend("torch"):
        same(outcome(compiled, args), outcome(op, args))


def test_in_place_op_inside_a_compiled_loop() -> None:
    op, args = OPS["moments_"], next(SAMPLES["moments_"]("cpu", False))

    def twice(*a):
        op(*a)
        total = a[1][0] + 1
        op(*a)
        return total

    torch._dynamo.reset()
    same(outcome(torch.compile(twice, fullgraph=True, backend="aot_eager"), args), outcome(twice, args))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_fake_shapes(name: str) -> None:
    for args in SAMPLES[name]("cpu", False):
        real = outcome(OPS[name].native, args)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [
                [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a]
                if isinstance(a, list)
                else (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a)
                for a in args
            ]
            # a host read (.item(), a branch on a value) raises here
            fake = [v for v in flat(OPS[name](*fakes)) + flat(fakes) if v is not None]
        for r, f in zip(real, fake, strict=True):
            if isinstance(r, torch.Tensor):
                assert (f.shape, f.dtype, f.device) == (r.shape, r.dtype, r.device)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_meta_tensors(name: str) -> None:
    for args in SAMPLES[name]("cpu", False):
        real = [v for v in flat(OPS[name].native(*copy.deepcopy(args))) if v is not None]
        meta = [
            [v.to("meta") if isinstance(v, torch.Tensor) else v for v in a]
            if isinstance(a, list)
            else (a.to("meta") if isinstance(a, torch.Tensor) else a)
            for a in args
        ]
        got = [v for v in flat(OPS[name](*meta)) if v is not None]
        assert [(g.shape, g.dtype) for g in got] == [(r.shape, r.dtype) for r in real]


class Recorder(TorchDispatchMode):
    """Notes each operator that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_call_is_one_operator(name: str) -> None:
    """No copy, cast or host read around the kernel: the contract and the frame dispatch nothing."""
    if not OPS[name].has("cpu"):
        pytest.skip(f"cpu: {zipfast.ops.why_not('cpu')}")
    for args in SAMPLES[name]("cpu", False):
        with Recorder() as recorder:
            OPS[name](*args)
        assert recorder.seen == [f"zipfast.{name}.default"]


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_outputs_never_require_grad(name: str, backend: str, device: str) -> None:
    """Else the sums of moments_ would keep every batch's graph alive, and backends would differ."""
    skip_host_only(name, backend)
    for args in SAMPLES[name](device, True):
        got = OPS[name](*args)
        assert not any(v.requires_grad for v in flat(got) if v is not None)
        assert not any(v.requires_grad for v in flat(args[: WRITTEN.get(name, 0)]))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_works_in_inference_mode(name: str, backend: str, device: str) -> None:
    skip_host_only(name, backend)
    with torch.inference_mode():
        for args in SAMPLES[name](device, False):
            OPS[name](*args)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_schema_says_what_is_written(name: str) -> None:
    schema = OPS[name].native._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert bool(written) == name.endswith("_")
    assert [a.name for a in schema.arguments if a.name in written] == written
    assert torch.Tag.pt2_compliant_tag in OPS[name].native.tags


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_docstring_has_its_sections(name: str) -> None:
    text = OPS[name].__doc__
    for word in ("Args:", "Raises:", "Cost and determinism:", "Reference: ", ".. math::"):
        assert word in text
    for argument in OPS[name].native._schema.arguments:
        assert f" {argument.name}: " in text
