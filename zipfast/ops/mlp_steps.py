# SPDX-License-Identifier: Apache-2.0
"""``mlp_steps_``: training steps of a masked multilayer perceptron, many in one call (Frankle & Carbin 2019, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._mask import mask_bytes, unpack
from ._registry import op

NAME = "mlp_steps_"
RULES = ("sgd", "adam", "adamw")
DTYPES = (torch.float32, torch.float64)


def _contract(
    weight: list[Tensor],
    bias: list[Tensor],
    mask: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    data: Tensor,
    label: Tensor,
    order: Tensor,
    lr: Tensor,
    rule: str,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
    sparse_below: float,
) -> None:
    if rule not in RULES:
        raise ValueError(f"{NAME}: 'rule' must be one of {', '.join(RULES)}, got {rule!r}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{NAME}: '{name}' must be in [0, 1), got {value}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("step", step)):
        if not value >= 0:
            raise ValueError(f"{NAME}: '{name}' must be 0 or more, got {value}")
    momentum = rule != "sgd" or beta1 > 0
    if nesterov and (rule != "sgd" or not momentum):
        raise ValueError(f"{NAME}: 'nesterov' must be False without rule 'sgd' and 'beta1' above 0, got True")

    check.check_tensors(NAME, "weight", weight)
    check.check_dtype(NAME, "weight[0]", weight[0], DTYPES)
    layers, dtype, device = len(weight), weight[0].dtype, weight[0].device
    for name, tensors, count in (
        ("bias", bias, layers),
        ("mask", mask, layers),
        ("first", first, 2 * layers if momentum else 0),
        ("second", second, 2 * layers if rule != "sgd" else 0),
    ):
        if count:
            check.check_tensors(NAME, name, tensors)
        if len(tensors) != count:
            raise ValueError(f"{NAME}: '{name}' must hold {count} tensors for {layers} layers, got {len(tensors)}")
    for l, w in enumerate(weight):
        if w.dim() != 2:
            raise ValueError(f"{NAME}: 'weight[{l}]' must be [out, in], got {list(w.shape)}")
        if l and w.shape[1] != weight[l - 1].shape[0]:
            wanted = [w.shape[0], weight[l - 1].shape[0]]
            check.check_shape(NAME, f"weight[{l}]", w, wanted, "[out, out of the layer before]")
        check.check_shape(NAME, f"bias[{l}]", bias[l], [w.shape[0]], "[out]")
    parameters = [*weight, *bias]
    for name, tensors in (("weight", weight), ("bias", bias), ("first", first), ("second", second)):
        for i, t in enumerate(tensors):
            check.check_dtype(NAME, f"{name}[{i}]", t, (dtype,))
            check.check_device(NAME, f"{name}[{i}]", t, device)
            if not t.is_contiguous():
                raise ValueError(f"{NAME}: '{name}[{i}]' must be contiguous, got strides {list(t.stride())}")
            if name in ("first", "second"):
                check.check_shape(NAME, f"{name}[{i}]", t, parameters[i].shape, "that of its weight or bias")
    for l, m in enumerate(mask):
        check.check_dtype(NAME, f"mask[{l}]", m, (torch.uint8,))
        check.check_device(NAME, f"mask[{l}]", m, device)
        if tuple(m.shape) not in ((0,), (mask_bytes(weight[l].numel()),)):
            size = mask_bytes(weight[l].numel())
            raise ValueError(f"{NAME}: 'mask[{l}]' must be [{size}] packed bytes or [0], got {list(m.shape)}")

    check.check_dtype(NAME, "data", data, (dtype,))
    if data.dim() != 2 or data.shape[1] != weight[0].shape[1]:
        raise ValueError(f"{NAME}: 'data' must be [N, {weight[0].shape[1]}], got {list(data.shape)}")
    check.check_dtype(NAME, "label", label, (torch.int64,))
    check.check_shape(NAME, "label", label, [data.shape[0]], "[N]")
    check.check_dtype(NAME, "order", order, (torch.int64,))
    if order.dim() != 2:
        raise ValueError(f"{NAME}: 'order' must be [T, B], got {list(order.shape)}")
    check.check_dtype(NAME, "lr", lr, (torch.float64,))
    check.check_shape(NAME, "lr", lr, [order.shape[0]], "[T]")
    for name, t in (("data", data), ("label", label), ("order", order), ("lr", lr)):
        check.check_device(NAME, name, t, device)


def _fake(
    weight: list[Tensor],
    bias: list[Tensor],
    mask: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    data: Tensor,
    label: Tensor,
    order: Tensor,
    lr: Tensor,
    rule: str,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
    sparse_below: float,
) -> Tensor:
    return lr.new_empty(order.shape[0])


@op(
    "mlp_steps_(Tensor(a!)[] weight, Tensor(b!)[] bias, Tensor[] mask, Tensor(c!)[] first, Tensor(d!)[] second, "
    "Tensor data, Tensor label, Tensor order, Tensor lr, str rule, float beta1, float beta2, float eps, "
    "float weight_decay, bool nesterov, int step, float sparse_below) -> Tensor",
    contract=_contract,
    fake=_fake,
    host_only="on a GPU dense products with fused masked steps are faster than nets of this size made sparse",
)
def mlp_steps_(
    weight: list[Tensor],
    bias: list[Tensor],
    mask: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    data: Tensor,
    label: Tensor,
    order: Tensor,
    lr: Tensor,
    rule: str,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
    step: int,
    sparse_below: float,
) -> Tensor:
    r"""Train a masked perceptron (ReLU between layers, mean softmax cross entropy) for T iterations, in place.

    .. math:: \theta_{t+1} = m \odot \mathrm{rule}(\theta_t,\ m \odot \nabla L_t(\theta_t))

    Each iteration takes the rows ``order[t]``, and every parameter takes one step of the rule, as torch.optim defines it:
    gradient plus ``weight_decay`` times the parameter (``adamw``: the parameter is shrunk instead), then

    - ``sgd``: buffer = beta1 · buffer + gradient; parameter −= lr[t] · (buffer, or gradient + beta1 · buffer if Nesterov);
    - ``adam``, ``adamw``: averages of gradient and square at rates ``beta1``, ``beta2``, corrected for starting at 0.

    Dead weights and their states are taken as 0, whatever they hold, and are exactly 0 afterwards: only survivors move.

    Args:
        weight: L layers, [out, in], float32 or float64 (all of one dtype), contiguous; the last ``out`` is the classes.
        bias: L vectors [out].
        mask: uint8, packed: bit i & 7 of byte i >> 3 is 1 where weight i, in row-major order, is alive; whole blocks of 64
            bytes, padded with 0.  [0] for a layer without a mask.
        first: momentum buffers (``sgd``) or averages of the gradient, shaped as the L weights, then the L biases; empty for
            ``sgd`` with ``beta1`` 0.  Zeros at the first step of a run.
        second: averages of the squared gradient, in the same order; empty for ``sgd``.
        data: [N, in] of the first layer, in the dtype of the weights.
        label: int64 [N], classes.
        order: int64 [T, B], rows of ``data``; negative ones are left out of their batch, as in a short last one.
        lr: float64 [T], learning rates.
        rule: ``"sgd"``, ``"adam"`` or ``"adamw"``.
        beta1: momentum of ``sgd``; rate of the average of the gradient.
        beta2: rate of the average of the square.
        eps: added to the root of the average square.
        weight_decay: of all parameters, biases too.
        nesterov: look ahead (``sgd`` with momentum only).
        step: steps that this run took before, for the corrections of ``adam``.
        sparse_below: a layer of lower density is computed on its surviving weights alone, others as if dense; 0: none, 2:
            all.  It changes rounding and time, nothing else.

    Returns:
        float64 [T]: mean loss of each batch before its step; NaN where a batch has no row (gradients are 0 then).

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.  A class or row out of range is an error of the
        kernel that meets it.  NaN raises nothing: it shows in the losses.

    Cost and determinism: on a CPU 6 · density · Σ out · in · B flops per iteration (the first layer needs no gradient of its
    input: 4), and the states of survivors alone are read and written.  The same bits for any thread count, and for one call
    of T iterations as for several that follow each other.  A NaN in ``data`` that meets only dead weights stays unseen on
    the sparse path.

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), section 2; Kingma & Ba 2015 (Adam), algorithm 1.
    """
    layers = len(weight)
    alive = [unpack(m, w.shape) if m.numel() else None for m, w in zip(mask, weight)]
    for held in (weight, first[:layers], second[:layers]):
        for p, a in zip(held, alive):
            if a is not None:
                p.copy_(torch.where(a, p, 0))
    losses = []
    for t in range(order.shape[0]):
        valid, rows = order[t] >= 0, order[t].clamp(min=0)
        count = valid.sum()
        x = [torch.where(valid[:, None], data[rows], 0)]
        for l in range(layers):
            y = x[l] @ weight[l].T + bias[l]
            x.append(y.relu() if l + 1 < layers else y)
        logp = torch.log_softmax(x.pop(), 1)
        target = torch.nn.functional.one_hot(torch.where(valid, label[rows], 0), logp.shape[1])
        losses.append(torch.where(valid, -torch.where(target > 0, logp, 0).sum(1), 0).double().sum() / count)

        gradient: list[Tensor] = []  # weights, then biases
        d = torch.where(valid[:, None], (logp.exp() - target) / count, 0)
        for l in reversed(range(layers)):
            g, a = d.T @ x[l], alive[l]
            gradient.insert(0, g if a is None else torch.where(a, g, 0))
            gradient.insert(layers - l, d.sum(0))
            d = torch.where(x[l] <= 0, 0, d @ weight[l])
        for i, (w, g) in enumerate(zip([*weight, *bias], gradient)):
            moved = w * (1 - lr[t] * weight_decay) if rule == "adamw" else w
            if rule != "adamw":
                g = g + weight_decay * w
            if rule != "sgd":
                first[i].lerp_(g, 1 - beta1)
                second[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                root = second[i].sqrt() / (1 - beta2 ** (step + t + 1)) ** 0.5 + eps
                moved = moved - lr[t] / (1 - beta1 ** (step + t + 1)) * first[i] / root
            elif beta1 > 0:
                first[i].mul_(beta1).add_(g)
                moved = moved - lr[t] * (g + beta1 * first[i] if nesterov else first[i])
            else:
                moved = moved - lr[t] * g
            a = alive[i] if i < layers else None
            w.copy_(moved if a is None else torch.where(a, moved, 0))
    return torch.stack(losses) if losses else lr.new_empty(0)
