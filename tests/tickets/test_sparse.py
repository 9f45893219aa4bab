# SPDX-License-Identifier: Apache-2.0
"""Sparse linear layers: gradients, compilation, state dicts, and when they are preferred."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zipfast.ops import sparse_linear, sparse_linear_input
from zipfast.ops.sparse_linear import columns_of, transpose_layout
from zipfast.tickets import SparseLinear, SparseWeight, sparse
from zipfast.tickets.sparse import linear


def packed(mask: torch.Tensor) -> torch.Tensor:
    bits = torch.zeros(-(-mask.numel() // 512) * 512, dtype=torch.uint8)
    bits[: mask.numel()] = mask.flatten()
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def some_mask(out: int, columns: int, density: float = 0.3) -> torch.Tensor:
    return torch.rand(out, columns, generator=torch.Generator().manual_seed(out + columns)) < density


def pair(out: int = 7, columns: int = 11, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple:
    """A masked nn.Linear and the sparse layer of it."""
    torch.manual_seed(0)
    dense, mask = nn.Linear(columns, out, bias, dtype=dtype), some_mask(out, columns)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return dense, SparseLinear.from_linear(dense, packed(mask)), mask


def test_round_trip() -> None:
    weight, mask = torch.randn(9, 70), some_mask(9, 70)
    weight[0, mask[0].nonzero()[0]] = 0.0  # alive although it is 0
    found = SparseWeight.from_dense(weight, packed(mask))
    assert torch.equal(found.to_dense(), weight.where(mask, torch.zeros(())))
    assert found.value.numel() == mask.sum() and found.shape == (9, 70)
    assert found.density == mask.sum().item() / 630
    assert found.nbytes == 4 * 10 + 6 * found.value.numel()
    assert SparseWeight.from_dense(torch.randn(0, 5), torch.zeros(0, dtype=torch.uint8)).density == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)])
def test_forward_and_gradients_as_dense(lead: tuple, bias: bool) -> None:
    dense, layer, mask = pair(bias=bias)
    x = torch.randn(*lead, 11)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(v) for m, v in zip((dense, layer), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        (y * y.detach().cos()).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(layer.value.grad, dense.weight.grad[mask])
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed: bool) -> None:
    _, layer, _ = pair(4, 5, torch.float64)
    parts = transpose_layout(layer.row_start, layer.column, 5) if transposed else ()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def call(value: torch.Tensor, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return linear(SparseWeight(layer.row_start, layer.column, value, 5), x, bias, transposed=parts)

    inputs = layer.value, x, layer.bias
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_only_wanted_gradients() -> None:
    _, layer, _ = pair()
    layer.requires_grad_(False)
    x = torch.randn(3, 11, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.value.grad is None and layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    _, first, _ = pair(7, 11)
    _, second, _ = pair(3, 7)
    model = nn.Sequential(first, nn.ReLU(), second)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for batch in (4, 4, 9):
        x = torch.randn(batch, 2, 11)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m(v) for m, v in zip((model, compiled), inputs, strict=True)]
        assert torch.equal(*outputs)
        for y in outputs:
            y.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_trains_as_a_masked_dense_layer() -> None:
    dense, layer, mask = pair(dtype=torch.float64)
    x, y = torch.randn(20, 11, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    for module in (dense, layer):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            if module is dense:
                dense.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(layer.weight.to_dense(), dense.weight.detach() * mask)


def test_to_linear_copies_and_state_dicts() -> None:
    dense, layer, _ = pair()
    again = layer.to_linear()
    assert type(again) is nn.Linear and torch.equal(again.weight, dense.weight) and torch.equal(again.bias, dense.bias)
    assert set(layer.state_dict()) == {"value", "bias", "row_start", "column"}
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(torch.ones(2, 11)), layer(torch.ones(2, 11)))
    other = SparseLinear.from_linear(nn.Linear(11, 7), packed(torch.ones(7, 11, dtype=torch.bool)))  # another mask
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(torch.ones(2, 11)), layer(torch.ones(2, 11)))
    assert other.double()(torch.ones(2, 11).double()).dtype == torch.float64
    assert "alive=" in repr(layer)


def test_autocast() -> None:
    _, layer, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 11, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(TypeError, match="'value' must be bfloat16, got float32"):
        layer(torch.ones(2, 11, dtype=torch.bfloat16))


def test_transposed_layout_is_the_gradient() -> None:
    _, layer, _ = pair(40, 33)
    row_start, column, order = transpose_layout(layer.row_start, layer.column, 33)
    grad, value = torch.randn(3, 40), layer.value.detach()
    want = sparse_linear_input(layer.row_start, layer.column, value, [], grad, 33)
    torch.testing.assert_close(sparse_linear(row_start, column, value[order.long()], grad, None), want)


def test_the_order_for_gpus_is_the_same_layer() -> None:
    dense, layer, mask = pair(6, 90)
    before = columns_of(layer.column).tolist()
    assert layer.t_order is None and layer.for_gpu_() is layer
    assert columns_of(layer.column).tolist() != before
    assert torch.equal(layer.weight.to_dense(), dense.weight)
    x = [torch.randn(3, 90).requires_grad_() for _ in range(1)]
    x.append(x[0].detach().clone().requires_grad_())
    for m, v in zip((dense, layer), x, strict=True):
        y = m(v)
        (y * y.detach().cos()).sum().backward()
    torch.testing.assert_close(x[1].grad, x[0].grad)
    dense_grad = SparseWeight(layer.row_start, layer.column, layer.value.grad, 90).to_dense()
    torch.testing.assert_close(dense_grad, dense.weight.grad * mask)


def test_the_order_for_gpus_travels_in_state_dicts() -> None:
    dense, layer, _ = pair(6, 90)
    arranged = copy.deepcopy(layer).for_gpu_()
    assert set(arranged.state_dict()) == {"value", "bias", "row_start", "column"}
    x = torch.randn(2, 90, requires_grad=True)
    for source, target in ((arranged, layer), (copy.deepcopy(layer), arranged)):
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.weight.to_dense(), dense.weight)
        assert (target.t_order is None) == (source.t_order is None)
        torch.testing.assert_close(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (dense, target)))
    assert arranged.for_gpu_().double().weight.to_dense().dtype == torch.float64
    moved = copy.deepcopy(arranged).to("meta")
    assert moved.value.is_meta and torch.equal(arranged.weight.to_dense(), dense.weight.double())


def test_layers_made_on_a_gpu_are_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, layer, mask = pair(6, 90)
    monkeypatch.setattr(sparse, "on_gpu", lambda t: True)
    made = SparseLinear.from_linear(dense, packed(mask))
    assert torch.equal(made.column, copy.deepcopy(layer).for_gpu_().column) and made.t_order is not None
    assert torch.equal(made.weight.to_dense(), dense.weight)


def test_a_layer_made_elsewhere_keeps_its_parameter() -> None:
    _, layer, _ = pair(6, 90)
    value = layer.value
    assert layer.for_gpu_().value is value and value.requires_grad
